"""Where studies come from: lists, tables, folders, and the layouts of public data sets. A reader each."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.errors import LiteError
from lite.image.headers import read_header
from lite.studies.sources import chexpert, mimic, openi, padchest, r2gen
from lite.studies.sources.base import StudyList
from lite.studies.sources.folder import read_folder, read_pattern
from lite.studies.sources.listed import read_entries, read_json
from lite.studies.sources.table import read_table
from lite.studies.sources.tables import is_table

if TYPE_CHECKING:
    from types import ModuleType

    from lite.studies.sources.base import SourceOptions
    from lite.studies.study import Study

DATA_SETS: Final[tuple[ModuleType, ...]] = (mimic, chexpert, openi, padchest, r2gen)
"""Readers of layouts: each has NAME, `recognises(path) -> bool` and `read(path, options) -> StudyList`."""


def read_source(source: str, options: SourceOptions) -> StudyList:
    """Read studies from wherever they are; what the source is shows in its content.

    Args:
        source: a JSON list, a CSV or TSV table, a folder of films or DICOM files, a pattern such as "films/*.png", one
            film, or a file or folder of a public data set in its own layout (see `docs/cohorts.md`).
        options: how it is read.

    Raises:
        LiteError: there is nothing, nothing that is known, or no study in it.
        BackendUnavailable: it has DICOM files, and pydicom is not installed.
    """
    path = Path(source)
    if not path.exists():
        if glob.has_magic(source):
            return _wanted(read_pattern(source, options))
        msg = f"{source}: got nothing there · expected a list, a table, a folder or a pattern · check the path"
        raise LiteError(msg)
    named = any((options.image_column, options.id_column, options.reason_column, options.reference_column))
    if named and path.is_file() and is_table(path):  # who names columns wants those
        return _wanted(read_table(path, options))
    for data_set in DATA_SETS:
        if data_set.recognises(path):
            found: StudyList = data_set.read(path, options)
            return _wanted(found)
    if path.is_dir():
        return _wanted(read_folder(path, options))
    if is_table(path):
        return _wanted(read_table(path, options))
    if path.suffix.lower() == ".json":
        return _wanted(read_entries(path, read_json(path), options))
    return _wanted(read_pattern(glob.escape(source), options))


def _wanted(studies: StudyList) -> StudyList:
    """Leave out what `--where frontal,chest` does not want, by the headers of DICOM files."""
    where = studies.options.where
    if not (where.frontal or where.chest):
        return studies
    wanted: list[Study] = []
    for study in studies:
        header = read_header(study.path)
        refused = header and ((where.chest and header.not_chest) or (where.frontal and header.not_frontal))
        if refused:
            studies.leave_out(f"that are {refused}")
        else:
            wanted.append(study)
    studies[:] = wanted
    return studies
