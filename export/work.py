"""The folder an export works in, and goes on from when it was stopped.

    .NAME.export/            beside the artifact NAME
      lock                   one export at a time
      arguments.json         what the finished parts were made with: another export refuses to go on with them
      vision.onnx
      decoder/               the finished parts
      reports/0007.json      what each part's rounding changed
      token_weights.json     what the search chose
      hidden-0007            the calibration's hidden states before layer 7

The files become the artifact at the very end, by hard links, so that nothing is lost while it is measured. Every file
has its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from export.decoder import DecoderFolder, PartReport
from lite.errors import ArtifactError, LiteError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def work_path(out: Path) -> Path:
    """Return the folder that an export to `out` works in."""
    target = out.absolute()
    return target.with_name(f".{target.name}.export")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkFolder:
    """The folder, locked."""

    path: Path
    decoder: DecoderFolder

    @property
    def vision(self) -> Path:
        """Where vision.onnx is written."""
        return self.path / "vision.onnx"

    def require_same(self, arguments: dict[str, Any]) -> None:
        """Refuse to go on with parts that were made with other arguments; note the arguments where there are none.

        Raises:
            ArtifactError: They differ; the message says in what.
        """
        before = self.read("arguments.json")
        if before is None:
            self.write("arguments.json", arguments)
            return
        now = json.loads(json.dumps(arguments))
        changed = [
            f"{name} {now.get(name)!r} (was {before.get(name)!r})"
            for name in sorted(now.keys() | before.keys())
            if now.get(name) != before.get(name)
        ]
        if changed:
            msg = (
                f"{self.path}: got {', '.join(changed)} · expected the arguments of the export that was stopped there "
                f"with {self.decoder.num_finished()} of {self.decoder.num_parts} parts of the decoder finished · "
                "repeat those to go on, or remove the folder to begin anew"
            )
            raise ArtifactError(msg)

    def report(self, part: int) -> PartReport | None:
        """Return the report of a finished part."""
        values = self.read(f"reports/{part:04d}.json")
        return None if values is None else PartReport(**values)

    def keep_report(self, part: int, report: PartReport) -> None:
        """Write the report of a part; before the part itself, which says that all is there."""
        self.write(f"reports/{part:04d}.json", dataclasses.asdict(report))

    def read(self, name: str) -> Any:  # noqa: ANN401 - parsed JSON
        """Return what was written under a name; None if nothing was."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            msg = f"{file}: got something that is not JSON ({error}) · expected what an export wrote"
            raise ArtifactError(f"{msg} · remove {self.path} to begin anew") from error

    def write(self, name: str, value: object) -> None:
        """Keep something as JSON."""
        file = self.path / name
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)

    def discard_parts(self) -> None:
        """Delete the finished parts: they were of no use."""
        shutil.rmtree(self.decoder.folder)

    def link_into(self, folder: Path) -> None:
        """Put the finished parts of the artifact into another folder: as hard links, or copies where there are none."""
        (folder / "decoder").mkdir()
        files = [self.vision, *sorted(file for file in self.decoder.folder.iterdir() if file.suffix != ".partial")]
        for file in files:
            target = folder / file.relative_to(self.path)
            try:
                os.link(file, target)
            except OSError:
                shutil.copyfile(file, target)


@contextlib.contextmanager
def work_folder(out: Path, num_hidden_layers: int) -> Iterator[WorkFolder]:
    """Lock the folder that an export to `out` works in.

    Left without an error, or by one that would come again (bad input), the folder is removed, unless it was there
    before. Left by anything else, as an interrupt or a full disk, it stays when there is a finished part of the decoder
    to go on from.

    Args:
        out: The artifact to be.
        num_hidden_layers: Of the decoder.

    Raises:
        ArtifactError: Another export is at work there, or the folder cannot be made.
    """
    path = work_path(out)
    try:
        for folder in (path / "decoder", path / "reports"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{path.parent}: got {error.strerror} · expected a folder that can be written · choose another place"
        raise ArtifactError(msg) from error
    lock = FileLock(path / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        msg = f"{path}: got a folder that another export is working in · expected one at a time · wait for it to end"
        raise ArtifactError(msg) from error
    work = WorkFolder(path=path, decoder=DecoderFolder(path / "decoder", num_hidden_layers))
    keep = True
    had = work.decoder.num_finished()
    try:
        yield work
        keep = False
    except LiteError:
        # What an earlier export has finished is not this one's to throw away.
        keep = had > 0
        raise
    finally:
        lock.release()
        if not keep or not work.decoder.num_finished():
            shutil.rmtree(path, ignore_errors=True)
