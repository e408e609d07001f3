"""The two towers of retrieval: films and texts become vectors of one space, where what belongs together is near.

    film ─image─▶ pixel_values ─vision.onnx─▶ last hidden states ─film.onnx─▶ film_embeds [B, dim]
    text ─WordPiece─▶ input_ids ─text.onnx──────────────────────────────────▶ text_embeds [B, dim]

`film.onnx` is no graph of its own but the end of another: behind the bytes of `vision.onnx` it makes one graph of both,
so that the tower is stored once. Vectors have length 1: their product is the cosine.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lite.artifact.open import load_artifact
from lite.config import to_json
from lite.engines.onnx_session import CPU, check_provider, errors_explained, import_onnxruntime, open_session
from lite.errors import ArtifactError, LiteError, MemoryBudgetError
from lite.image.files import load_image
from lite.image.preprocess import preprocess
from lite.memory.process import release_free_memory, rss_bytes
from lite.memory.sizes import parse_bytes, shown_bytes
from lite.retrieval.wordpiece import WordPiece
from lite.vision import ATTENTION, PATCHES, PIXELS, check_signature

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from lite.artifact.open import Artifact
    from lite.artifact.parts import RetrievalPart
    from lite.image.files import ImageSource
    from lite.image.film import Rendering

FILM_EMBEDS, TEXT_EMBEDS, INPUT_IDS = "film_embeds", "text_embeds", "input_ids"
MAX_BATCH: Final = 32
"""Texts that are computed at a time, all of one length: then none of them is padded."""
_LOG: Final = logging.getLogger(__name__)
_LOADED: Final = 3.2
"""What a graph takes at most while it is loaded, of its bytes: as bytes, as a message, and float16 made float32."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Retrieval:
    """Towers ready to embed, made by `load_retrieval`, for several threads at once. A context manager: it closes them.

    `artifact_id` is a hash of all that embeddings depend on, 16 hex digits: the graphs of both towers, vocabulary and
    preprocessing. Embeddings of another id are of another space.
    """

    artifact: Artifact
    artifact_id: str
    wordpiece: WordPiece
    _sessions: dict[str, Any]

    @property
    def dim(self) -> int:
        """The numbers of an embedding."""
        return _part(self.artifact).dim

    def close(self) -> None:
        """Give the memory back. Nothing can be embedded any more."""
        self._sessions.clear()
        release_free_memory()

    def __enter__(self) -> Retrieval:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def embed_images(
        self, films: Iterable[ImageSource], *, rendering: Rendering = "mimic-cxr-jpg", any_film: bool = False
    ) -> NDArray[np.float32]:
        """Embed films, one after another, each whatever `lite.image.files.load_image` takes and read as it would.

        Returns:
            float32 [N, dim], rows of length 1.

        Raises:
            ImageError: a film cannot be read, or is not a frontal one.
            BackendUnavailable: it is DICOM, and pydicom is not installed.
            LiteError: the towers are closed, or ONNX Runtime fails.
        """
        if isinstance(films, str | bytes):
            raise LiteError(f"got one {type(films).__name__} · expected several films · put it into a list")
        how, rows = self.artifact.manifest.preprocessing, []
        for film in films:
            loaded = load_image(film, rendering=rendering, any_film=any_film)
            rows.append(self.embed_pixels(preprocess(loaded.image, how)[None])[0])
        return np.array(rows, np.float32).reshape(-1, self.dim)

    def embed_pixels(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed films as `lite.image.preprocess.preprocess` makes them, float32 [B, 3, S, S]: float32 [B, dim]."""
        return self._run(FILM_EMBEDS, PIXELS, pixel_values)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts. One of more tokens than the tower reads (`count_tokens`) is cut, with a warning in the log.

        Returns:
            float32 [N, dim], rows of length 1.

        Raises:
            PromptError: one is no text.
            LiteError: the towers are closed, or ONNX Runtime fails.
        """
        if isinstance(texts, str):
            raise LiteError("got one text · expected several · put it into a list")
        whole = self.wordpiece.encode(texts)
        ids = [self.wordpiece.cut(row) for row in whole]
        for number, (row, kept) in enumerate(zip(whole, ids, strict=True)):
            if len(kept) < len(row):
                _LOG.warning("text %d: %d tokens, of which the tower reads the first %d", number, len(row), len(kept))
        embeddings = np.empty((len(ids), self.dim), np.float32)
        left = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        while left:
            batch = [number for number in left[:MAX_BATCH] if len(ids[number]) == len(ids[left[0]])]
            embeddings[batch] = self.embed_ids(np.array([ids[number] for number in batch], np.int64))
            left = left[len(batch) :]
        return embeddings

    def embed_ids(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embed texts as ids, int64 [B, T], 0 behind the end of the shorter ones: float32 [B, dim]."""
        return self._run(TEXT_EMBEDS, INPUT_IDS, input_ids)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, before it is cut to `wordpiece.max_tokens`."""
        return [len(row) for row in self.wordpiece.encode(texts)]

    def _run(self, output: str, name: str, values: NDArray[Any]) -> NDArray[np.float32]:
        session = self._sessions.get(output)
        if session is None:
            raise LiteError("got towers that are closed · expected open ones · load them again")
        with errors_explained(session.get_providers()[0]):
            rows: NDArray[np.float32] = session.run([output], {name: values})[0]
        if not np.isfinite(rows).all():
            raise LiteError(f"got {output} that are not finite · expected numbers · a tower overflowed: export in fp32")
        return rows


def load_retrieval(
    path: str | os.PathLike[str],
    *,
    provider: str = CPU,
    threads: int | None = None,
    memory_limit: int | str | None = None,
    verify: bool = True,
) -> Retrieval:
    """Load the towers of an artifact that was exported with `--retrieval`. Its decoder is not touched.

    Args:
        path: the artifact's folder.
        provider: of ONNX Runtime: a name of its own, or cpu, cuda …
        threads: that compute; None: one for each core.
        memory_limit: refuse to take more memory in this process, in bytes or text such as "2GiB".
        verify: compare the sha256 of the files with the manifest first.

    Raises:
        ArtifactError: there is none, it has no such part, or it is damaged.
        BackendUnavailable: onnxruntime, tokenizers or the provider is not there.
        MemoryBudgetError: the towers would take more than `memory_limit`.
        LiteError: a number is out of its range.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise LiteError(f"got threads={threads!r} · expected a whole number from 1, or None · leave it out")
    artifact = load_artifact(path)
    files = _files(artifact)
    if memory_limit is not None:
        bytes_of = [artifact.manifest.files[name].bytes for name in files.values()]
        limit, expected = parse_bytes(memory_limit), (rss_bytes() or 0) + int(_LOADED * sum(bytes_of))
        if expected > limit:
            msg = f"{artifact.path}: got a memory limit of {shown_bytes(limit)} · expected {shown_bytes(expected)},"
            raise MemoryBudgetError(f"{msg} the towers and what this process has already · raise it")
    runtime = import_onnxruntime()
    chosen = check_provider(provider, runtime.get_available_providers(), version=runtime.__version__)
    if verify:
        artifact.verify(names=files.values())
    return open_towers(artifact, provider=chosen, threads=threads)


def open_towers(artifact: Artifact, *, provider: str = CPU, threads: int | None = None) -> Retrieval:
    """Load the towers of an artifact that has been checked, or is being written; see `load_retrieval`."""
    part, vision = _part(artifact), artifact.manifest.parts.vision
    text, film = artifact.file(part.text), artifact.file(part.film)
    sessions = {
        FILM_EMBEDS: open_session(artifact.file(vision.graph), provider=provider, threads=threads, tail=film),
        TEXT_EMBEDS: open_session(text, provider=provider, threads=threads),
    }
    pixels = (3, vision.image_size, vision.image_size)
    seen = {PATCHES: (vision.num_patches, vision.tower.hidden_size), ATTENTION: (vision.num_patches,)}
    check_signature(sessions[FILM_EMBEDS], film, {PIXELS: pixels}, seen | {FILM_EMBEDS: (part.dim,)})
    check_signature(sessions[TEXT_EMBEDS], text, {INPUT_IDS: (None,)}, {TEXT_EMBEDS: (part.dim,)})
    wordpiece = WordPiece(artifact.file(part.vocabulary), vocab_size=part.vocab_size, max_tokens=part.max_tokens)
    return Retrieval(artifact=artifact, artifact_id=embeddings_id(artifact), wordpiece=wordpiece, _sessions=sessions)


def _part(artifact: Artifact) -> RetrievalPart:
    part = artifact.manifest.parts.retrieval
    if part is None:
        msg = f"{artifact.path}: got an artifact without towers for retrieval · expected one that was exported with "
        raise ArtifactError(f"{msg}--retrieval --text-vocab DIR · export it again")
    return part


def _files(artifact: Artifact) -> dict[str, str]:
    """Return the files that embeddings depend on, by what they are."""
    part, vision = _part(artifact), artifact.manifest.parts.vision
    return {"vision": vision.graph, "film": part.film, "text": part.text, "vocabulary": part.vocabulary}


def embeddings_id(artifact: Artifact) -> str:
    """Return the id of the space that an artifact's embeddings are of: see `Retrieval.artifact_id`.

    Raises:
        ArtifactError: it has no towers for retrieval.
    """
    depends: dict[str, Any] = {what: artifact.manifest.files[name].sha256 for what, name in _files(artifact).items()}
    depends |= {"preprocessing": to_json(artifact.manifest.preprocessing), "max_tokens": _part(artifact).max_tokens}
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
