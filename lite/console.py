"""What the command lines have in common: how a run ends, what they say on stderr, how they read a count."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import time
import warnings
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import FrameType

EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130
_SECONDS_BETWEEN_LINES: Final = 30
EXIT_BROKEN_PIPE: Final = 141  # what a shell reports for a program that SIGPIPE ended


def run_command(
    command: Callable[[], int],
    *,
    statuses: Mapping[type[LiteError], int] = MappingProxyType({}),
    interrupted: Callable[[], str] = lambda: "interrupted",
) -> int:
    """Run a command; return its exit status, or that of the way in which it ended.

    Each end is one line on stderr: an error, also one that the system makes of a disk that is full, or Ctrl-C. A
    reader that has gone (`| head`) is none.

    Args:
        command: what to run.
        statuses: the exit status of errors that have one of their own.
        interrupted: says after Ctrl-C what has become of the work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")
    try:
        with keeping_interrupts(), _warnings_said():
            status = command()
        sys.stdout.flush()
    except LiteError as error:
        say(f"error: {error}")
        return statuses.get(type(error), EXIT_FAILED)
    except KeyboardInterrupt:
        say(interrupted())
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        where, what = error.filename or "output", error.strerror or error
        say(f"error: {where}: got {what} · expected to read or write it · check the disk and its permissions")
        _forget_stdout()
        return EXIT_FAILED
    return status


def _forget_stdout() -> None:
    """Let what could not be written go nowhere: Python flushes stdout once more at exit."""
    with contextlib.suppress(OSError, ValueError):  # it may be no file, such as a test's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _warnings_said() -> Iterator[None]:
    """Have what libraries warn of on a line of its own, without the place in their code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"note: {message}")
        yield


@contextlib.contextmanager
def keeping_interrupts() -> Iterator[None]:
    """Let Ctrl-C end a block as KeyboardInterrupt even where a library has made an error of its own out of it.

    torch does, when it comes while torch asks Python about an argument: what is raised then is a ValueError.
    """
    if threading.current_thread() is not threading.main_thread():  # where no signal comes, and no handler can be set
        yield
        return
    came = False
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        if callable(before):
            before(number, frame)

    # Who ignores it, or has left it to the system, goes on doing so.
    if callable(before):
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        if callable(before):
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def default_interrupts() -> Iterator[None]:
    """Have Python's own handler take Ctrl-C: asyncio cancels its tasks in good order only where that one is set."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_line(line: str) -> None:
    """Write a line to stdout, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def say(line: str) -> None:
    """Write a line to stderr, over what progress has left there on a terminal."""
    start = "\r\x1b[K" if sys.stderr.isatty() else ""
    sys.stderr.write(f"{start}{line}\n")
    sys.stderr.flush()


def show_progress(what: str, done: int, total: int) -> None:
    """Show how far something is: on a terminal, in a line that is written over."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{what}{f' {done}/{total}' if total > 1 else ' …'}")
        sys.stderr.flush()


class ProgressLine:
    """Say how far something is: in a line that is written over on a terminal, and elsewhere in a line now and then."""

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self._started = self._said = time.monotonic()

    def show(self, done: int) -> None:
        """Say that so much is done."""
        now = time.monotonic()
        left = (now - self._started) / done * (self.total - done)
        text = f"{self.what} {done}/{self.total}, about {left:.0f} s to go"
        if done == self.total:
            text = ""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
        elif text and now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            say(text)


def positive(text: str) -> int:
    """Read an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        msg = f"got {text!r}, expected a whole number from 1"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Call folders by their names where these tell them apart, and by their paths where not."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
