"""How command lines end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import warnings
from pathlib import Path

import pytest

from lite.console import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    ProgressLine,
    default_interrupts,
    keeping_interrupts,
    run_command,
)
from lite.errors import ImageError, LiteError


def swallow_an_interrupt() -> int:
    """What torch does at times: the interrupt comes, and another error goes."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 1)  # until it has come
    except KeyboardInterrupt:
        raise LiteError("could not determine the shape") from None
    return 0


def test_an_interrupt_that_became_another_error_is_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(swallow_an_interrupt) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_an_interrupt_an_error_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise LiteError("got nothing")

    assert run_command(fail) == EXIT_FAILED
    assert capsys.readouterr().err == "error: got nothing\n"
    with pytest.raises(LiteError), keeping_interrupts():
        fail()


def test_errors_may_have_a_status_and_interrupts_a_word_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ImageError("got noise")

    assert run_command(fail, statuses={ImageError: 3}) == 3
    assert run_command(fail, statuses={LiteError: 3}) == EXIT_FAILED
    assert run_command(swallow_an_interrupt, interrupted=lambda: "half of it is there") == EXIT_INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1] == "half of it is there"


def test_what_the_system_says_of_files_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command(lambda: len((tmp_path / "none").read_bytes())) == EXIT_FAILED
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'}: got No such file or directory · expected ")


def test_warnings_of_libraries_are_notes(capsys: pytest.CaptureFixture[str]) -> None:
    def warn() -> int:
        warnings.simplefilter("always")
        warnings.warn("the file has an odd palette", UserWarning, stacklevel=1)
        return 0

    assert run_command(warn) == 0
    assert capsys.readouterr().err == "note: the file has an odd palette\n"


@pytest.mark.parametrize("left", ["terminal", "file"])
def test_progress_is_written_over_on_a_terminal_and_said_now_and_then_elsewhere(
    left: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 10.0, 40.0, 50.0, 80.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    monkeypatch.setattr("sys.stderr.isatty", lambda: left == "terminal", raising=False)
    progress = ProgressLine("drafting", 4)
    for done in range(1, 5):
        progress.show(done)
    shown = capsys.readouterr().err
    second = "drafting 2/4, about 40 s to go"
    if left == "file":
        assert shown == f"{second}\n"  # 10 s is too soon, 50 s is soon after 40 s, and the end needs no line
    else:
        assert shown.split("\r\x1b[K")[1:] == [
            "drafting 1/4, about 30 s to go", second, "drafting 3/4, about 17 s to go", ""
        ]  # fmt: skip


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_who_ignores_interrupts_goes_on_ignoring_them(ignored: signal.Handlers) -> None:
    before = signal.signal(signal.SIGINT, ignored)
    try:
        with keeping_interrupts():
            assert signal.getsignal(signal.SIGINT) is ignored
        assert signal.getsignal(signal.SIGINT) is ignored
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_is_not_of_python_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    assert run_command(lambda: 7) == 7


def test_in_another_thread_a_command_runs_all_the_same() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(run_command(lambda: 7)))
    thread.start()
    thread.join()
    assert found == [7]


def test_ctrl_c_while_asyncio_computes_is_one_line(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of a task's step: with another handler than Python's it ends the loop, and leaves tracebacks."""

    async def compute() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # where Python looks for signals
            pass
        await asyncio.sleep(60)

    async def all_of_it() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(compute())

    def command() -> int:
        with default_interrupts():
            asyncio.run(all_of_it())
        return 0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_command(command) == EXIT_INTERRUPTED
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    gc.collect()  # a task whose error nobody has asked for says so when it goes
    assert (capfd.readouterr().err, caplog.text) == ("interrupted\n", "")
