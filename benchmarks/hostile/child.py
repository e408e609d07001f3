"""Read one hostile input in a child process that is bounded, and that sees what the reading does.

The child is a fork: all modules are loaded in it, so an input takes milliseconds. It may take `SECONDS` and grow by
`EXTRA_BYTES`; Python's audit events say when something is run, fetched, or written or read where nothing should be.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS: Final = 10
EXTRA_BYTES: Final = 1 << 30
MARK: Final = "hostile_input_has_run"
"""What a payload puts into `sys.modules` where it is run."""

# What nothing that reads an input may do, whatever the input says.
_FORBIDDEN: Final = frozenset({
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn", "subprocess.Popen"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "webbrowser.open"),
    *("os.symlink", "os.truncate", "os.chmod"),
})  # fmt: skip
# And what is done in the folder of the input alone, where a command that is given it may write.
_CHANGES: Final = frozenset({"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link"})

Ending: TypeAlias = Literal["read", "refused", "failure"]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How the reading of an input ended."""

    ending: Ending
    why: str = ""


class Watch:
    """Audit events of the children: what they may not do, with the folder that they may not open a file in."""

    def __init__(self, outside: Path) -> None:
        """Watch from now on; nothing is refused before a child begins. The folder of the inputs is beside `outside`."""
        self.outside = str(outside.resolve())
        self.inside = str(outside.resolve().with_name("input")) + os.sep
        self.seen: list[str] | None = None
        tempfile.gettempdir()  # is found out once, by writing
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            return
        if event in _FORBIDDEN or (event in _CHANGES and not self._is_inside(arguments)):
            self.seen.append(f"{event}{arguments[:1]!r:.80}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, flags = os.fsdecode(arguments[0]), arguments[2] or 0
            if os.path.realpath(path).startswith(self.outside):
                self.seen.append(f"opened {path:.80}, which an input names")
            # What is opened in the name of a folder is a file without one, which is gone with the process.
            elif flags & (os.O_WRONLY | os.O_RDWR) and not (
                path == os.devnull or os.path.realpath(path).startswith(self.inside) or Path(path).is_dir()
            ):
                self.seen.append(f"opened {path:.80} to write")

    def _is_inside(self, arguments: tuple[Any, ...]) -> bool:
        """Say whether all paths of an event are in the folder of the input; the last argument is what they start at."""
        paths = [os.fsdecode(path) for path in arguments if isinstance(path, str | bytes | os.PathLike)]
        start = f"/proc/self/fd/{arguments[-1]}" if arguments[-1] >= 0 else ""
        return all(os.path.realpath(os.path.join(start, path)).startswith(self.inside) for path in paths)  # noqa: PTH118

    def read(self, reading: Callable[[], object]) -> Outcome:
        """Fork, read in the child, and say how that ended."""
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            os.close(receive)
            self._in_child(reading, send)
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            said = pipe.read().decode(errors="replace")
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            return Outcome("failure", "it hangs" if number == signal.SIGALRM else signal.Signals(number).name)
        ending, _, why = said.partition("\n")
        if ending == "read" or ending == "refused":
            return Outcome(ending, why)  # type: ignore[arg-type]  # narrowed by the comparison, which mypy cannot see
        return Outcome("failure", why or f"the child ended with {os.waitstatus_to_exitcode(status)}, without a word")

    def _in_child(self, reading: Callable[[], object], send: int) -> None:
        """Read, send how that ended, and leave without what Python does at exit."""
        ending = "failure"
        try:
            alone()
            _bound()
            self.seen = []
            try:
                reading()
                ending, why = "read", ""
            except LiteError as error:
                ending, why = "refused", str(error)
            seen, self.seen = self.seen, None
            if seen or MARK in sys.modules:
                ending, why = "failure", "; ".join(seen) or "code of the input was run"
        except BaseException as error:  # noqa: BLE001 - that is what is looked for
            self.seen = None
            last = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {str(error)[:120]} ({Path(last.filename).name}, {last.name})"
        os.write(send, f"{ending}\n{why}".encode(errors="replace")[:4000])
        os._exit(0)


def alone() -> None:
    """Let torch compute with this thread alone: it would wait for those that its parent has and a fork has not."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def _bound() -> None:
    """Limit what this process may take, and let nothing that it prints be seen."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size = pages * resource.getpagesize() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # a crash is counted, not printed
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
