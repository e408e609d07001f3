"""Predictions of any program about studies: a file of results, or ReXrank's object of studies.

ReXrank's texts are whole reports, "Findings: … Impression: …": the findings are taken from the prediction and the
reference alike.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from lite.errors import LiteError
from lite.studies.results import Result, read_results
from lite.studies.sources.listed import rexrank_entry
from lite.studies.study import Study

if TYPE_CHECKING:
    from pathlib import Path

_FINDINGS: Final = re.compile(r"\s*findings?\s*:\s*(.*?)\s*(?:\bimpressions?\s*:.*)?", re.IGNORECASE | re.DOTALL)


def read_predictions(path: Path) -> list[Result]:
    """Read what `python -m lite run` has written in any of its JSON forms, or another program in one of them.

    Args:
        path: a line of JSON a study (`read_results`), or one object of studies with "model_prediction" in each.

    Raises:
        LiteError: no such file, nothing in it, or a study that is malformed.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return read_results(path)  # which says what is wrong with a file that is neither
    if not isinstance(value, dict) or not value or not all(isinstance(entry, dict) for entry in value.values()):
        return read_results(path)
    return [_of_rexrank(name, entry, where=f"{path}: study {name!r}") for name, entry in value.items()]


def _of_rexrank(name: str, value: dict[str, Any], *, where: str) -> Result:
    entry = rexrank_entry(name, value)
    image, reference = entry["image"], entry["conversations"][1]["value"] if "conversations" in entry else None
    prediction = value.get("model_prediction")
    if not isinstance(prediction, str) or not isinstance(reference, str | None):
        msg = f"{where}: got no model_prediction or texts that are none · expected both as text · write it again"
        raise LiteError(msg)
    film = image[0] if isinstance(image, list) and image else image
    study = Study(film if isinstance(film, str) else "", id=name, reference=_findings(reference or ""))
    return Result(study=study, prediction=_findings(prediction))


def _findings(report: str) -> str:
    section = _FINDINGS.fullmatch(report)
    return section[1] if section else report
