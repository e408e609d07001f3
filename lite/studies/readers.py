"""Lists of studies: JSON in LLaVA-Rad's evaluation format, or in ReXrank's.

    [{"id": …, "image": "p10/film.jpg", "reason": "Cough." or null, "view": "AP", "conversations": [{"value": question},
      {"value": findings}]}, …]

Only `image` is needed. Without `id` a study is called by its image; without a reason (or with null) the model is asked
the question without one; without `conversations` there is no report to compare with. What the evaluation's own loader
leaves out is left out here, and counted: a view that is not frontal, findings that are null, NaN or empty, reports
that were not cut by rule. ReXrank's object of studies by their ids is read by `key_image_path`, `section_findings` and
the indication in `context`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lite.errors import LiteError
from lite.image.words import FRONTAL, view_of_words
from lite.studies.study import Study

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOTHING: Final = ("", "nan", "none", "null", "n/a")
_INDICATION: Final = re.compile(r"Indication:\s*(.*?)\s*(?:</context>|$)", re.DOTALL | re.IGNORECASE)


class _NoStudy(Exception):  # noqa: N818 - never leaves this module
    """What is wrong with an entry."""


class _LeftOut(Exception):  # noqa: N818 - never leaves this module
    """Why the evaluation's own loader leaves an entry out."""


class StudyList(list[Study]):
    """Studies, and how many entries of their list were left out for which reason."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self.left_out: Counter[str] = Counter()

    @property
    def remark(self) -> str | None:
        """What was left out, in words."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        entries = len(self) + self.left_out.total()
        return f"{self.left_out.total()} of {entries} studies of the list left out: {reasons}" if reasons else None


def read_studies(path: Path, *, image_folder: Path | None = None, unique: bool = True) -> StudyList:
    """Read a list of studies. That the films are there is another question: see `check_films`.

    Args:
        path: the list.
        image_folder: what the entries' `image` is relative to, also one that begins with a slash; the list's own folder
            when not given.
        unique: an id that comes twice, of another film, is an error; the same film twice is left out once.

    Raises:
        LiteError: no such file, not JSON, no studies in it, an entry (counted from 1) that is not one, or see `unique`.
    """
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        got = "a folder" if path.is_dir() else f"a file that cannot be read ({error})"
        msg = f"{path}: got {got} · expected a JSON list of studies · check the path"
        raise LiteError(msg) from error
    if isinstance(entries, dict) and entries and all(isinstance(entry, dict) for entry in entries.values()):
        entries = [_of_rexrank(name, entry) for name, entry in entries.items()]
    if not isinstance(entries, list) or not entries:
        msg = f"{path}: got no list, or an empty one · expected a JSON list of studies · check the path"
        raise LiteError(msg)
    studies = StudyList()
    seen: dict[str, Study] = {}
    for number, entry in enumerate(entries, start=1):
        try:
            study = _study(entry, path.parent, image_folder)
        except _LeftOut as reason:
            studies.left_out[str(reason)] += 1
            continue
        except _NoStudy as error:
            msg = (
                f"{path}: got an entry {number} that is no study ({error}) · expected an image, and id, reason and "
                "conversations (a question and its answer) where there are · correct it, or take it out"
            )
            raise LiteError(msg) from error
        if unique and (before := seen.setdefault(study.id, study)) is not study:
            if before == study:
                studies.left_out["listed before"] += 1
                continue
            msg = f"{path}: got the id {study.id} again in entry {number} · expected each once · correct it"
            raise LiteError(msg)
        studies.append(study)
    if not studies:
        msg = f"{path}: got no study that can be used ({studies.remark}) · expected frontal films · check the list"
        raise LiteError(msg)
    return studies


def _study(entry: object, beside: Path, image_folder: Path | None) -> Study:
    if not isinstance(entry, dict):
        raise _NoStudy(f"it is {json.dumps(entry)[:40]}")
    if (view := _text(entry, "view")) and view_of_words(view) not in FRONTAL:
        raise _LeftOut(f"of view {view.strip()[:20]}")
    if (method := _text(entry, "generate_method")) and method.lower() != "rule-based":
        raise _LeftOut(f"with findings by {method[:20]}")
    image, number_or_name = entry.get("image"), entry.get("id")
    if isinstance(image, list) and len(image) != 1:
        raise _NoStudy(f"it has {len(image)} films: name the frontal one")
    image = _text({"image": image[0]} if isinstance(image, list) else entry, "image")
    if not image:
        raise _NoStudy("it has no image")
    if isinstance(number_or_name, float):  # how tables write numbers where some are missing
        number_or_name = int(number_or_name) if number_or_name.is_integer() else _text(entry, "id")
    if not isinstance(number_or_name, str | int | None):
        raise _NoStudy(f"its id is {json.dumps(number_or_name)[:40]}")
    turns = entry.get("conversations") or [{}, {}]
    if not (isinstance(turns, list) and len(turns) == 2 and all(isinstance(turn, dict) for turn in turns)):
        raise _NoStudy("its conversations are not a question and its answer")
    if "value" in turns[1] and not _text(turns[1], "value"):
        raise _LeftOut("without findings")
    return Study(
        _film(image, beside, image_folder),
        _text(entry, "reason"),
        id=image if number_or_name in (None, "") else str(number_or_name),
        question=(_text(turns[0], "value") or "").replace("<image>", "").strip(),
        reference=_text(turns[1], "value") or "",
    )


def _film(image: str, beside: Path, image_folder: Path | None) -> Path:
    """Return where a film is: in a folder that was named also where its path begins with a slash, or with `mimic/`."""
    film = (image_folder or beside) / image
    if image_folder is None or film.is_file():
        return film
    inside = image_folder / image.lstrip("/")
    shorter = image_folder / image.removeprefix("mimic/")
    return inside if Path(image).is_absolute() else shorter if shorter.is_file() else film


def _text(entry: dict[str, Any], name: str) -> str | None:
    value = entry.get(name)
    if _is_nothing(value):
        return None
    if not isinstance(value, str):
        raise _NoStudy(f"its {name} is {json.dumps(value)[:40]}, not text")
    return value


def _is_nothing(value: object) -> bool:
    """Say whether it is nothing, in the ways that tables have of writing that."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def _of_rexrank(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return a study of ReXrank's as an entry of a list; its README and its files disagree on `report`."""
    if "image_path" not in entry and "key_image_path" not in entry:
        return entry | {"id": entry.get("id", name)}
    films = entry.get("image_path") or []
    films = films if isinstance(films, list) else [films]
    views = entry.get("frontal_lateral") or []
    views = views if isinstance(views, list) else [views]
    frontal = [film for film, view in zip(films, views, strict=False) if str(view).lower() == "frontal"]
    context = entry.get("context")
    if isinstance(context, dict):
        indication = context.get("indication", context.get("Indication"))
    else:
        found = _INDICATION.search(context) if isinstance(context, str) else None
        indication = found[1] if found else None
    known = [key for key in ("section_findings", "report", "reports") if key in entry]
    if known[:1] != ["section_findings"]:  # both may stand there, and one be empty
        known.sort(key=lambda key: _is_nothing(entry[key]))
    named = entry.get("key_image_path")
    return {
        "id": name,
        "image": (frontal[:1] or films) if _is_nothing(named) else named,
        "view": None if frontal or not views else "Lateral",
        "reason": indication or None,
        "conversations": [{}, {"value": entry[known[0]] if known else None}],
    }


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
