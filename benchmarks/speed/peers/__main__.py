"""`python -m benchmarks.speed.peers`."""

from __future__ import annotations

import sys

from benchmarks.speed.peers import main

if __name__ == "__main__":
    sys.exit(main())
