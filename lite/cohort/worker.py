"""What a worker does of a cohort on many machines: it holds one model, and drafts blocks of studies."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite._version import __version__
from lite.errors import LiteError
from lite.loading import load
from lite.session.draft import as_they_end
from lite.studies.results import Result
from lite.studies.study import Study

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lite.model import FindingsModel
    from lite.session.draft import Draft


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What each worker is to do."""

    artifact: str  # an absolute path
    artifact_id: str
    options: dict[str, Any]  # of `lite.load`
    request: dict[str, Any]  # DRAFTING
    batch_size: int
    folder: str  # that names of films are relative to
    version: str = __version__


class Drafter:
    """A worker: one model. What makes it useless is a line, too, so that the run can say it and end."""

    def __init__(self, work: Work) -> None:
        """Load the model."""
        self._work = work
        self._refusal: str | None = None
        try:
            self._model = self._load()
        except LiteError as error:
            self._refusal = str(error)

    def _load(self) -> FindingsModel:
        work, here = self._work, f"on the node {socket.gethostname()}"
        if work.version != __version__:
            msg = f"got llava-rad-lite {__version__} {here} · expected {work.version} · install it on all nodes"
            raise LiteError(msg)
        if not Path(work.artifact).is_dir():
            msg = f"{work.artifact}: got no such folder {here} · expected the artifact, by the same path on all nodes"
            raise LiteError(f"{msg} · share the folder, or copy it there")
        with contextlib.suppress(OSError):  # films by relative names will say what is missing
            os.chdir(work.folder)
        model = load(work.artifact, **work.options)
        if model.artifact.id != work.artifact_id:
            msg = f"{work.artifact}: got the artifact {model.artifact.id} {here} · expected {work.artifact_id}"
            raise LiteError(f"{msg} · copy it there again")
        return model

    def __call__(self, block: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Draft a block of studies."""
        ids, lines = list(block["id"]), [""] * len(block["id"])
        if self._refusal is not None:
            return {"id": ids, "line": lines, "refusal": [self._refusal] * len(ids)}
        model, request = self._model, self._work.request
        studies = [Study(**json.loads(study)) for study in block["study"]]

        def submit(number: int) -> Draft:
            study = studies[number]
            return model.submit(study.image, study.reason, query=study.query, request_id=study.id, **request)

        window = model.window(self._work.batch_size)
        for number, result in as_they_end(range(len(studies)), submit, window=window):
            lines[number] = Result.of(studies[number], result, request=request).to_json()
        return {"id": ids, "line": lines, "refusal": [""] * len(ids)}
