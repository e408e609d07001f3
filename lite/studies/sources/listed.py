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

import json
import re
from pathlib import Path
from typing import Any, Final

from lite.errors import LiteError
from lite.studies.sources.base import SourceOptions, StudyList, is_frontal, is_nothing
from lite.studies.study import Study

_INDICATION: Final = re.compile(r"Indication:\s*(.*?)\s*(?:Comparison:|</context>|$)", re.DOTALL | re.IGNORECASE)


class _NoStudy(Exception):  # noqa: N818 - never leaves this module
    """What is wrong with an entry."""


class _LeftOut(Exception):  # noqa: N818 - never leaves this module
    """Why the evaluation's own loader leaves an entry out."""


def read_studies(path: Path, *, image_folder: Path | None = None, unique: bool = True) -> StudyList:
    """Read a list of studies. That the films are there is another question: see `lite.studies.films.check_films`.

    Args:
        path: the list.
        image_folder: what the entries' `image` is relative to, also one that begins with a slash; the list's own folder
            when not given.
        unique: an id that comes twice, of another film, is an error; the same film twice is left out once.

    Raises:
        LiteError: no such file, not JSON, no studies in it, an entry (counted from 1) that is not one, or see `unique`.
    """
    return read_entries(path, read_json(path), SourceOptions(image_folder=image_folder), unique=unique)


def read_json(path: Path) -> Any:  # noqa: ANN401 - whatever there is
    """Return what a JSON file holds.

    Raises:
        LiteError: no such file, or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        got = "a folder" if path.is_dir() else f"a file that cannot be read ({error})"
        msg = f"{path}: got {got} · expected a JSON list of studies · check the path"
        raise LiteError(msg) from error


def read_entries(path: Path, entries: object, options: SourceOptions, *, unique: bool = True) -> StudyList:
    """Read the studies of a list that has been parsed: see `read_studies`."""
    kind = "list of studies"
    rows = entries
    if isinstance(entries, dict) and entries and all(isinstance(entry, dict) for entry in entries.values()):
        kind = "ReXrank's studies"
        rows = list(entries.values())
        entries = [rexrank_entry(name, entry) for name, entry in entries.items()]
    if not isinstance(entries, list) or not isinstance(rows, list) or not entries:
        msg = f"{path}: got no list, or an empty one · expected a JSON list of studies · check the path"
        raise LiteError(msg)
    studies = StudyList(kind, options)
    for number, (entry, row) in enumerate(zip(entries, rows, strict=True), start=1):
        try:
            study = _study(entry, path.parent, options.image_folder)
        except _LeftOut as reason:
            studies.leave_out(str(reason))
            continue
        except _NoStudy as error:
            msg = (
                f"{path}: got an entry {number} that is no study ({error}) · expected an image, and id, reason and "
                "conversations (a question and its answer) where there are · correct it, or take it out"
            )
            raise LiteError(msg) from error
        studies.take(study, row=row, where=f"{path}: entry {number}", unique=unique)
    return studies.finish(path)


def _study(entry: object, beside: Path, image_folder: Path | None) -> Study:
    if not isinstance(entry, dict):
        raise _NoStudy(f"it is {json.dumps(entry)[:40]}")
    if (view := _text(entry, "view")) and not is_frontal(view):
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
        film_path(image, beside, image_folder),
        _text(entry, "reason"),
        id=image if number_or_name in (None, "") else str(number_or_name),
        question=(_text(turns[0], "value") or "").replace("<image>", "").strip(),
        reference=_text(turns[1], "value") or "",
    )


def film_path(image: str, beside: Path, image_folder: Path | None) -> Path:
    """Return where a film is: in a folder that was named also where its path begins with a slash, or with `mimic/`."""
    film = (image_folder or beside) / image
    if image_folder is None or film.is_file():
        return film
    inside = image_folder / image.lstrip("/")
    shorter = image_folder / image.removeprefix("mimic/")
    return inside if Path(image).is_absolute() else shorter if shorter.is_file() else film


def _text(entry: dict[str, Any], name: str) -> str | None:
    value = entry.get(name)
    if is_nothing(value):
        return None
    if not isinstance(value, str):
        raise _NoStudy(f"its {name} is {json.dumps(value)[:40]}, not text")
    return value


def rexrank_entry(name: str, entry: dict[str, Any]) -> dict[str, Any]:
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
        known.sort(key=lambda key: is_nothing(entry[key]))
    named = entry.get("key_image_path")
    return {
        "id": name,
        "image": (frontal[:1] or films) if is_nothing(named) else named,
        "view": None if frontal or not views else "Lateral",
        "reason": indication or None,
        "conversations": [{}, {"value": entry[known[0]] if known else None}],
    }
