"""The folder an export works in, and goes on from when it was stopped.

    .NAME.export/            beside the artifact NAME
      lock                   one export at a time
      arguments.json         what the finished parts were made with: another export refuses to go on with them
      vision.onnx, projector.onnx
      decoder/               the finished parts
      reports/0007.json      what each part's rounding changed
      importance.json        what tokens were measured to count
      hidden-0007            the calibration's hidden states before layer 7

The files become the artifact at the very end, by hard links, so that nothing is lost while it is measured. Every file
has its name only when it is complete and on the disk (`lite.files`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock, Timeout

from export.write.decoder import DecoderFolder, PartReport
from lite.errors import ArtifactError, CheckpointError
from lite.files import link_or_copy, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor


VISION_NAME: Final = "vision.onnx"
PROJECTOR_NAME: Final = "projector.onnx"
IMPORTANCE_NAME: Final = "importance.json"
PARTS: Final = "decoder/model-*.safetensors"


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
    def vision(self) -> tuple[Path, Path]:
        """Where vision.onnx and projector.onnx are written."""
        return self.path / VISION_NAME, self.path / PROJECTOR_NAME

    @property
    def worth_keeping(self) -> bool:
        """Whether there is something to go on from, of whatever checkpoint: a finished part, or a measurement."""
        return any(self.path.glob(PARTS)) or (self.path / IMPORTANCE_NAME).is_file()

    def require_same(self, arguments: dict[str, Any]) -> None:
        """Refuse to go on with parts that were made with other arguments; note the arguments where there are none."""
        before = self.read("arguments.json")
        if before is None or not self.worth_keeping:
            for file in self.vision:
                file.unlink(missing_ok=True)
            self.write("arguments.json", arguments)
            return
        now = json.loads(json.dumps(arguments))
        changed = [
            f"{name} {now.get(name)!r} (was {before.get(name)!r})"
            for name in sorted(now.keys() | before.keys())
            if now.get(name) != before.get(name)
        ]
        if changed:
            raise ArtifactError(
                f"{self.path}: got {', '.join(changed)} · expected the arguments of the export that was stopped there, "
                f"{len(list(self.path.glob(PARTS)))} parts of its decoder finished · repeat those to go on, or remove "
                "the folder to begin anew"
            )

    def report(self, part: int) -> PartReport:
        """Return the report of a finished part."""
        values = self.read(f"reports/{part:04d}.json")
        if values is None:
            msg = f"{self.path}: got no report of part {part} · expected one, as the part is there"
            raise ArtifactError(f"{msg} · remove the folder to begin anew")
        return PartReport(**values)

    def whole_report(self) -> PartReport:
        """Add up the reports of the parts that are finished."""
        whole = PartReport()
        for part in range(self.decoder.num_finished()):
            whole.merge(self.report(part))
        return whole

    def finish_part(self, part: int, tensors: Mapping[str, Tensor], report: PartReport) -> None:
        """Write the report of a part, and then the part itself, which says that all is there."""
        self.write(f"reports/{part:04d}.json", dataclasses.asdict(report))
        self.decoder.write(part, tensors)

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
        write_whole(self.path / name, f"{json.dumps(value, indent=1)}\n")

    def link_into(self, folder: Path) -> None:
        """Put the finished parts of the artifact into another folder: as hard links, or copies where there are none."""
        for file in (*self.vision, *sorted(self.decoder.folder.iterdir())):
            if file.suffix != ".partial":
                link_or_copy(file, folder / file.relative_to(self.path))


@contextlib.contextmanager
def work_folder(out: Path, num_hidden_layers: int) -> Iterator[WorkFolder]:
    """Lock the folder that an export to `out`, the artifact to be, works in.

    Left without an error, or by one that would come again (a bad checkpoint or calibration), the folder is removed;
    what an earlier export has left there is not this one's to throw away, though. Left by anything else, as an
    interrupt or a full disk, it stays if there is something in it to go on from.

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
    keep, had = True, work.worth_keeping
    try:
        yield work
        keep = False
    except CheckpointError:
        keep = had
        raise
    finally:
        # Removed while it is locked: the next export must not begin in a folder that is going away.
        if not keep or not work.worth_keeping:
            shutil.rmtree(path, ignore_errors=True)
        lock.release()
