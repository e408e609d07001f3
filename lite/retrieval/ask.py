"""A question to an index, in words or by a film, and the studies that answer it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite.artifact.open import load_artifact
from lite.errors import LiteError
from lite.retrieval.index import Hit, Index, What
from lite.retrieval.towers import embeddings_id

if TYPE_CHECKING:
    from lite.image.film import Rendering
    from lite.retrieval.towers import Retrieval


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The studies that an index has nearest to a question."""

    what: What  # what the question was compared with
    hits: tuple[Hit, ...]  # the nearest first
    num_tokens: int = 0  # of a question in words; the towers may read less
    cut: int | None = None  # how many of them the tower has read, where that is less

    @property
    def remark(self) -> str | None:
        """What to know of it, in words."""
        return (
            None if self.cut is None else f"the text has {self.num_tokens} tokens, of which the first {self.cut} count"
        )

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return what `json.dumps` takes, an object a study."""
        return [
            {
                "rank": rank,
                "similarity": round(hit.similarity, 6),
                "id": hit.study.id,
                "image": hit.study.image,
                "report": hit.study.report,
            }
            for rank, hit in enumerate(self.hits, start=1)
        ]


def open_index(path: Path, artifact: Path | None = None) -> tuple[Index, Path]:
    """Open an index to be asked, and find the artifact whose towers can.

    Args:
        path: the index.
        artifact: where the artifact is; None: where it was when the index was made.

    Raises:
        LiteError: there is no index, it has no study or is of another artifact, or the artifact is not there.
    """
    index = Index(path)
    if not len(index):
        msg = f"{path}: got an index with no study · expected at least one to search in"
        raise LiteError(f"{msg} · add some: python -m lite index ARTIFACT SOURCE --out {path}")
    found = Path(index.header.artifact) if artifact is None else artifact
    if artifact is None and not found.is_dir():
        msg = f"{path}: got an index by an artifact that is not at {found} any more · expected it, to read the question"
        raise LiteError(f"{msg} · say where it is with --artifact")
    return Index(path, artifact_id=embeddings_id(load_artifact(found))), found


def ask_words(index: Index, towers: Retrieval, text: str, what: What = "films", *, top: int) -> Answer:
    """Find the films, or the reports, that are nearest to a text.

    Raises:
        LiteError: there are no words in it, or nothing to search in.
    """
    if not text.strip():
        raise LiteError("got a text without words · expected what to look for · write some")
    (num_tokens,) = towers.count_tokens([text])
    most = towers.wordpiece.max_tokens
    (hits,) = index.search(towers.embed_texts([text]), what, top=top)
    return Answer(what=what, hits=tuple(hits), num_tokens=num_tokens, cut=most if num_tokens > most else None)


def ask_film(
    index: Index,
    towers: Retrieval,
    film: str | Path,
    what: What | None = None,
    *,
    top: int,
    rendering: Rendering = "mimic-cxr-jpg",
    any_film: bool = False,
) -> Answer:
    """Find the reports, or the films, that are nearest to a film; None: reports where there are any.

    Raises:
        ImageError: it cannot be read, or is not a frontal one.
        LiteError: there is nothing to search in.
    """
    what = what or ("reports" if len(index.reports) else "films")
    vector = towers.embed_images([film], rendering=rendering, any_film=any_film)
    return Answer(what=what, hits=tuple(index.search(vector, what, top=top)[0]))
