"""Studies to measure on: a JSON list in LLaVA-Rad's evaluation format.

    [{"id": …, "image": "p10/film.jpg", "reason": "Cough." or null, "conversations": [{"value": question},
      {"value": findings}]}, …]

`reason` and `conversations` may be missing: there is then no reason, and no report to compare with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lite.errors import LiteError


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedStudy:
    """One entry of a list: the film's path and the texts around it."""

    id: str
    image: Path
    reason: str | None
    query: str
    report: str  # the findings that come with the film; empty where there are none


def read_studies(path: Path, *, image_folder: Path | None = None) -> list[ListedStudy]:
    """Read a list of studies. That the films are there is found when they are read.

    Args:
        path: the list.
        image_folder: what the entries' `image` is relative to; the list's own folder when not given.

    Raises:
        LiteError: no such file, not JSON, no studies in it, an entry (counted from 1) that is not one, or an id that
            comes twice.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path}: got a file that cannot be read ({error}) · expected a JSON list of studies · check the path"
        raise LiteError(msg) from error
    if not isinstance(entries, list) or not entries:
        msg = f"{path}: got no list, or an empty one · expected a JSON list of studies · check the path"
        raise LiteError(msg)
    studies: dict[str, ListedStudy] = {}
    for number, entry in enumerate(entries, start=1):
        try:
            study = _listed_study(entry, path.parent if image_folder is None else image_folder)
        except (KeyError, TypeError, ValueError) as error:
            msg = (
                f"{path}: got an entry {number} that is no study ({type(error).__name__}: {error}) · expected id and "
                "image, and reason and conversations (a question and its answer) where there are · correct it"
            )
            raise LiteError(msg) from error
        if study.id in studies:
            msg = f"{path}: got the id {study.id} again in entry {number} · expected each once · correct it"
            raise LiteError(msg)
        studies[study.id] = study
    return list(studies.values())


def _listed_study(entry: dict[str, object], image_folder: Path) -> ListedStudy:
    question, report = "", ""
    if entry.get("conversations") is not None:
        turns = entry["conversations"]
        if not isinstance(turns, list) or len(turns) != 2:
            msg = "conversations is not a question and its answer"
            raise ValueError(msg)
        question, report = (turn["value"] for turn in turns)
        if not (isinstance(question, str) and isinstance(report, str)):
            msg = "a question or an answer is not text"
            raise TypeError(msg)
    reason = entry.get("reason")
    if not isinstance(reason, (str, type(None))):
        msg = "a reason is not text"
        raise TypeError(msg)
    return ListedStudy(
        id=str(entry["id"]),
        image=image_folder / str(entry["image"]),
        reason=reason,
        query=question.replace("<image>", "").strip(),
        report=report,
    )


def sha256_of_studies(studies: Sequence[ListedStudy]) -> str:
    """Hash what a model's answers depend on: ids, reasons and the films' bytes, in order; "none" for a missing film.

    Reports and questions are left out: the model does not see them.
    """
    digest = hashlib.sha256()
    for study in studies:
        try:
            film = hashlib.sha256(study.image.read_bytes()).hexdigest()
        except OSError:
            film = "none"
        digest.update(json.dumps([study.id, study.reason, film]).encode())
    return digest.hexdigest()
