"""Studies on their way into an index: their films and reports embedded, some at a time, each study once."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lite.errors import LiteError
from lite.retrieval.index import Indexed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from lite.retrieval.index import IndexWriter
    from lite.retrieval.towers import Retrieval
    from lite.studies.study import Study


def entry_of(study: Study) -> Indexed:
    """Return what an index keeps of a study.

    Raises:
        LiteError: its film is not a file.
    """
    report = study.reference.encode("utf-8", "replace").decode().strip()  # a list may hold half a surrogate pair
    return Indexed(id=study.id, image=str(Path(study.path).absolute()), report=report or None)


def fill(
    writer: IndexWriter,
    towers: Retrieval,
    studies: Iterable[Study],
    *,
    told: Callable[[Study, int | LiteError], None],
    batch_size: int,
    **how: Any,
) -> None:
    """Add studies that are not in the index yet; one whose film cannot be used is told of, and left out.

    Args:
        writer: open.
        towers: those that the index is of.
        studies: read lazily.
        told: of each study: how many tokens its report has, 0 without one, once it is on the disk; or why it is not.
        batch_size: how many are sent to the disk together, and at most lost by a kill.
        how: rendering and any_film, as `load_image` takes them.

    Raises:
        LiteError: there is no room.
    """
    left = iter(studies)
    while some := tuple(itertools.islice(left, batch_size)):
        films: list[NDArray[np.float32]] = []
        taken: list[tuple[Study, Indexed]] = []
        for study in some:
            try:
                films += list(towers.embed_images([study.image], **how))
            except LiteError as error:
                told(study, error)
            else:
                taken.append((study, entry_of(study)))
        reports = [entry.report for _, entry in taken if entry.report is not None]
        if taken:
            vectors = towers.embed_texts(reports) if reports else None
            writer.add([entry for _, entry in taken], np.stack(films), vectors)
        lengths = iter(towers.count_tokens(reports))
        for study, entry in taken:
            told(study, next(lengths) if entry.report is not None else 0)
