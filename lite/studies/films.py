"""The films of studies: which are there, and one hash of all that a model's answers depend on."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lite.studies.study import Study


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
