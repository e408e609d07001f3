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
    from lite.retrieval.towers import Retrieval


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The studies that an index has nearest to a question."""

    what: What  # what the question was compared with
    hits: tuple[Hit, ...]  # the nearest first
    remark: str | None = None  # what to know of it, in words

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return what `json.dumps` takes, an object a study."""
        return [
            {"rank": rank, "similarity": round(hit.similarity, 6), **hit.study.to_dict()}
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
    index.require("films")
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
    (count,), most = towers.count_tokens([text]), towers.wordpiece.max_tokens
    remark = f"the text has {count} tokens, of which the first {most} count" if count > most else None
    (hits,) = index.search(towers.embed_texts([text]), what, top=top)
    return Answer(what=what, hits=tuple(hits), remark=remark)


def ask_film(
    index: Index,
    towers: Retrieval,
    film: str | Path,
    what: What | None = None,
    *,
    top: int,
    **how: Any,
) -> Answer:
    """Find the reports, or the films, that are nearest to a film; None: reports where there are any.

    Args:
        how: rendering and any_film, as `load_image` takes them.

    Raises:
        ImageError: it cannot be read, or is not a frontal one.
        LiteError: there is nothing to search in.
    """
    what = what or ("reports" if len(index.reports) else "films")
    (hits,) = index.search(towers.embed_images([film], **how), what, top=top)
    return Answer(what=what, hits=tuple(hits))
