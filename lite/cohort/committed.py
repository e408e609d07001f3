"""Lines that other processes have written and committed, on their way into a journal, each study once.

    results.ray/0/studies/…     a file a block of what is to be drafted
                /committed/…    a file for each file of lines that is whole, called like it
                /lines/…        {"id", "line", "refusal"}; refusal: why a worker cannot draft at all
               /1/…             the same for what the first pass has left

The folder is beside the journal, and lives no longer than the run; what a killed one has left is taken over first.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from lite.errors import LiteError
from lite.files import disk_errors_explained
from lite.studies.journal import SETTINGS
from lite.studies.results import Findings, Result
from lite.studies.study import MODEL_FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lite.cohort.run import Extras, Listener
    from lite.studies.journal import Journal
    from lite.studies.study import Study


class Committed:
    """The folder that is written into, and the way from there into the journal."""

    def __init__(
        self,
        journal: Journal,
        studies: Sequence[Study],
        *,
        artifact_id: str,
        request: dict[str, Any],
        extras: Extras,
        told: Listener,
    ) -> None:
        """Look at nothing yet; the arguments are those of `draft_studies`."""
        self.path = journal.path.absolute().with_suffix(".ray")
        self.left = {_plain(study.id): study for study in studies if study.id not in journal.done}
        self._journal, self._extras, self._told = journal, extras, told
        self._artifact_id, self._request = artifact_id, request

    def prepare(self, number: int, size: int) -> Path:
        """Write what is left as a file a block, of so many studies; return the folder of this pass.

        Raises:
            LiteError: it cannot be written.
        """
        folder, rows = self.path / str(number), list(self.left.items())
        with disk_errors_explained(folder):
            for name in ("studies", "committed", "lines"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            for start in range(0, len(rows), size):
                lines = [json.dumps({"id": id_, "study": _to_json(s)}) for id_, s in rows[start : start + size]]
                (folder / "studies" / f"{start:09}.json").write_text("\n".join(lines) + "\n")
        return folder

    def take(self, *, failures: bool = True) -> None:
        """Take over what is committed; where `failures` are not, those studies are tried again.

        Raises:
            LiteError: a worker cannot draft at all, or the journal is of other settings, or there is no room.
        """
        taken = []
        with disk_errors_explained(self.path):
            for mark in sorted(self.path.glob("*/committed/*.parquet")):
                file = mark.parent.with_name("lines") / f"{mark.stem}.json"
                if file.is_file():  # what is on its way is called ….pending.parquet, and has no such file
                    for row in _rows(file):
                        self._take(row, where=str(file), failures=failures)
                    taken += [file, mark]
            if taken:
                self._journal.sync(wait=True)
            for file in taken:
                file.unlink()

    def _take(self, row: Mapping[str, Any], *, where: str, failures: bool) -> None:
        if row["refusal"]:
            if failures:
                raise LiteError(row["refusal"])
            return
        result, study = Result.from_json(row["line"], where=where), self.left.get(row["id"])
        findings = result.findings
        if study is None or (findings is None and not failures):
            return
        if findings is not None:
            made = findings.artifact_id, result.request, result.study.reason, result.study.path.name
            if made != (self._artifact_id, self._request, study.reason, study.path.name):
                return  # of another run, which was killed
            self._journal.expect({name: getattr(findings, name) for name in SETTINGS})
        self._end(row["id"], findings or LiteError(result.error))

    def _end(self, row_id: str, result: Findings | LiteError) -> None:
        study = self.left.pop(row_id)
        if study.id in self._journal.done:
            return
        if isinstance(result, Findings):
            self._extras.write(study, result)
        self._journal.add(study, result)
        self._told(study, result)

    def give_up(self) -> None:
        """Call what is left failed."""
        for row_id, study in list(self.left.items()):
            msg = f"{study.path}: got workers that ended over it · expected its findings · draft it alone, to see why"
            self._end(row_id, LiteError(f"{msg}: python -m lite generate"))

    def clear(self) -> None:
        """Take the folder away."""
        shutil.rmtree(self.path, ignore_errors=True)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield what is whole in a file of lines: what a power cut has torn is drafted again."""
    for line in file.read_text(encoding="utf-8").split("\n"):
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _to_json(study: Study) -> str:
    """Return what a worker must know of a study. ASCII: a file's name may hold half a surrogate pair."""
    return json.dumps(
        {name: getattr(study, name) for name in MODEL_FIELDS} | {"image": str(study.path), "id": study.id}
    )


def _plain(study_id: str) -> str:
    """Return an id as Arrow takes text."""
    return study_id.encode("utf-8", "backslashreplace").decode()
