"""Where the repository and the demo's checkpoint are, and a fresh interpreter in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "benchmarks" / "phantom" / "checkpoint"


def run_python(*arguments: str | Path, **environment: str) -> str:
    """Run a fresh interpreter in the repository's root and return what it prints: `-c code`, or a file to run."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()
