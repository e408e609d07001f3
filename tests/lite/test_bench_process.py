"""The processes of `lite.bench`: how they end, and what is said then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_command import FAST, bench, write_list
from repository import ROOT

from lite.artifact.open import Artifact


@pytest.mark.full
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_child_ends_with_the_bench(
    how: signal.Signals, tiny_artifact: Artifact, films: list[Path], tmp_path: Path
) -> None:
    """Ctrl-C reaches every process of the terminal; a kill only the one."""
    listed = write_list(tmp_path, films[:1])
    command = [sys.executable, "-m", "lite.bench", str(tiny_artifact.path), "--data", str(listed), "--runs", "100000"]
    process = subprocess.Popen(
        [*command, "--device", "cpu"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        # torch is what the child loads last: by then it measures, however busy the machine is.
        while not any(map(has_torch, children_of(process.pid))) and time.monotonic() < deadline:
            time.sleep(0.1)
        children = children_of(process.pid)
        assert any(map(has_torch, children))
        (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    if how == signal.SIGINT:
        assert process.returncode == 130, err
        assert err.strip().endswith("interrupted")
    assert "Traceback" not in out + err
    deadline = time.monotonic() + 120  # multiprocessing's own helper ends when its pipe has
    while any(is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(child) for child in children)


def has_torch(pid: int) -> bool:
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def is_running(pid: int) -> bool:
    """Say whether a process is there and not only waits to be noticed as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def interrupted(*_: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("end", "expected", "said"),
    [
        (interrupted, 130, "interrupted\n"),
        (killed, 1, "got a process that was ended by signal 9 (out of memory, as a rule)"),
    ],
)
def test_how_a_child_ends_is_said(
    end: object, expected: int, said: str, tiny_artifact: Artifact, films: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Ctrl-C may be seen by the child first: that is an interruption all the same."""
    monkeypatch.setattr("lite.bench.run._work", end)
    status, _, err = bench(capsys, tiny_artifact.path, "--data", write_list(tmp_path, films[:1]), *FAST)
    assert status == expected
    assert said in err
