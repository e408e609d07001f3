"""How command lines end."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lite.console import EXIT_FAILED, EXIT_INTERRUPTED, keeping_interrupts, run_command
from lite.errors import LiteError


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
