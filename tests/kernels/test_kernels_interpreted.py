"""Run the Triton kernels' tests under Triton's interpreter, on the CPU, in a process of its own.

TRITON_INTERPRET has to be set before Triton is imported, and would put every op of the other tests on the interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from repository import ROOT


def test_the_kernels_under_the_interpreter(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    # One thread: the tensors are tiny, and two threads would only wait for one another.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = map(str, sorted((ROOT / "tests" / "kernels").glob("test_kernels_triton*.py")))
    tier = ["--full"] if request.config.getoption("full") else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tier, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # None is skipped, and none left out but of cross products; that the backend is Triton's and which kernels ran they
    # check themselves.
    summary = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"[1-9]\d\d passed in .*" if tier else r"[5-9]\d passed, \d+ deselected in .*", summary), (
        done.stdout
    )
