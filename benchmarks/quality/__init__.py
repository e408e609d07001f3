"""How far artifacts, engines, formats and other programs are from each other: `python -m benchmarks quality`."""
