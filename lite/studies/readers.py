"""Lists of studies: JSON in LLaVA-Rad's evaluation format.

    [{"id": …, "image": "p10/film.jpg", "reason": "Cough." or null, "conversations": [{"value": question},
      {"value": findings}]}, …]

Only `image` is needed. Without `id` a study is called by its image; without a reason (or with null) the model is asked
the question without one; without `conversations`, or findings in them, there is no report to compare with.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from lite.errors import LiteError
from lite.studies.study import Study

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class _NoStudy(Exception):  # noqa: N818 - never leaves this module
    """What is wrong with an entry."""


def read_studies(path: Path, *, image_folder: Path | None = None, unique: bool = True) -> list[Study]:
    """Read a list of studies. That the films are there is another question: see `check_films`.

    Args:
        path: the list.
        image_folder: what the entries' `image` is relative to; the list's own folder when not given.
        unique: an id that comes twice is an error.

    Raises:
        LiteError: no such file, not JSON, no studies in it, an entry (counted from 1) that is not one, or see `unique`.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path}: got a file that cannot be read ({error}) · expected a JSON list of studies · check the path"
        raise LiteError(msg) from error
    if not isinstance(entries, list) or not entries:
        msg = f"{path}: got no list, or an empty one · expected a JSON list of studies · check the path"
        raise LiteError(msg)
    studies: list[Study] = []
    seen: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        try:
            study = _study(entry, path.parent if image_folder is None else image_folder)
        except _NoStudy as error:
            msg = (
                f"{path}: got an entry {number} that is no study ({error}) · expected an image, and id, reason and "
                "conversations (a question and its answer) where there are · correct it, or take it out"
            )
            raise LiteError(msg) from error
        if unique and study.id in seen:
            msg = f"{path}: got the id {study.id} again in entry {number} · expected each once · correct it"
            raise LiteError(msg)
        seen.add(study.id)
        studies.append(study)
    return studies


def _study(entry: object, image_folder: Path) -> Study:
    if not isinstance(entry, dict):
        raise _NoStudy(f"it is {json.dumps(entry)[:40]}")
    image, number_or_name = _text(entry, "image"), entry.get("id")
    if not image:
        raise _NoStudy("it has no image")
    if not isinstance(number_or_name, str | int | None):
        raise _NoStudy(f"its id is {json.dumps(number_or_name)[:40]}")
    turns = entry.get("conversations") or [{}, {}]
    if not (isinstance(turns, list) and len(turns) == 2 and all(isinstance(turn, dict) for turn in turns)):
        raise _NoStudy("its conversations are not a question and its answer")
    return Study(
        image_folder / image,
        _text(entry, "reason"),
        id=image if number_or_name in (None, "") else str(number_or_name),
        question=(_text(turns[0], "value") or "").replace("<image>", "").strip(),
        reference=_text(turns[1], "value") or "",
    )


def _text(entry: dict[str, object], name: str) -> str | None:
    value = entry.get(name)
    if not isinstance(value, str | None):
        raise _NoStudy(f"its {name} is {json.dumps(value)[:40]}, not text")
    return value


def check_films(studies: Sequence[Study], listed: Path, *, option: str = "--image-folder", every: bool) -> int:
    """Find out before any work which films are not there.

    Args:
        studies: of a list.
        listed: the list.
        option: what the command line calls the films' folder.
        every: one missing film is an error; otherwise only when there is none at all.

    Returns:
        The number of films that are missing.

    Raises:
        LiteError: see `every`.
    """
    missing = [study.path for study in studies if not study.path.is_file()]
    if missing and (every or len(missing) == len(studies)):
        msg = (
            f"{listed}: got {len(missing)} of {len(studies)} films that are not there, the first {missing[0]} · "
            f"expected a file for each · name the folder that the list's images are relative to with {option}"
        )
        raise LiteError(f"{msg}{', or take them out of the list' if len(missing) < len(studies) else ''}")
    return len(missing)


def sha256_of_studies(studies: Sequence[Study]) -> str:
    """Hash what a model's answers depend on: ids, reasons and the films' bytes, in order; "none" for a missing film.

    Reports and questions are left out: the model does not see them.
    """
    digest = hashlib.sha256()
    for study in studies:
        try:
            film = hashlib.sha256(study.path.read_bytes()).hexdigest()
        except OSError:
            film = "none"
        digest.update(json.dumps([study.id, study.reason, film]).encode())
    return digest.hexdigest()
