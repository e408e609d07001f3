"""What the command lines have in common: how a run ends, what they say on stderr, how they read a count."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Final

from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import FrameType

EXIT_FAILED: Final = 1
EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141  # what a shell reports for a program that SIGPIPE ended


def run_command(command: Callable[[], int]) -> int:
    """Run a command; return its exit status, or that of the way in which it ended.

    A `LiteError` is one line on stderr, Ctrl-C and a reader that has gone are none of its business.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")
    try:
        with keeping_interrupts():
            status = command()
        sys.stdout.flush()
    except LiteError as error:
        say(f"error: {error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`). Python flushes stdout once more at exit: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return status


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
