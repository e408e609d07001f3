"""The part `retrieval` of an artifact that is being written, and how far its embeddings are from the checkpoint's."""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from export.source import forward
from export.source.retrieval import VOCABULARY_NAME
from export.studies import by_film
from export.write.retrieval_onnx import build_film_onnx, build_text_onnx
from export.write.vision_onnx import checked, write_vision_onnx
from lite.artifact.parts import RetrievalFidelity, RetrievalPart, unhashed
from lite.retrieval.towers import open_towers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.settings import ExportSettings
    from export.source.checkpoint import Checkpoint
    from export.source.retrieval import RetrievalSource
    from export.studies import NamedStudies
    from lite.artifact.open import Artifact

FILM_NAME: Final = "film.onnx"
TEXT_NAME: Final = "text.onnx"
RECALL_AT: Final = (1, 5, 10)


def write_retrieval(
    source: Checkpoint, retrieval: RetrievalSource, artifact: Artifact, settings: ExportSettings
) -> RetrievalPart:
    """Write the graphs and the vocabulary into an artifact that has its `vision.onnx`; return the part."""
    vision = artifact.manifest.parts.vision
    film = build_film_onnx(
        source.read_tower() | retrieval.read_film(), source.tower, vision_format=vision.format
    ).SerializeToString()
    # By itself it is no model: what is checked is what the runtime will load.
    checked((artifact.path / vision.graph).read_bytes() + film)
    (artifact.path / FILM_NAME).write_bytes(film)
    text = build_text_onnx(
        retrieval.read_text(), retrieval.bert, text_format=settings.text_format, model_name=f"{source.name}-text"
    )
    write_vision_onnx(text, artifact.path / TEXT_NAME)
    shutil.copyfile(retrieval.vocabulary, artifact.path / VOCABULARY_NAME)
    return RetrievalPart(
        files=unhashed(TEXT_NAME, FILM_NAME, VOCABULARY_NAME),
        text=TEXT_NAME,
        film=FILM_NAME,
        vocabulary=VOCABULARY_NAME,
        text_format=settings.text_format,
        dim=retrieval.bert.dim,
        vocab_size=retrieval.bert.vocab_size,
        max_tokens=retrieval.bert.max_tokens,
    )


def measure_retrieval(
    source: Checkpoint, retrieval: RetrievalSource, artifact: Artifact, part: RetrievalPart, judged: NamedStudies
) -> RetrievalPart:
    """Embed the films and the texts that parity is measured on, by the checkpoint and by the artifact; compare."""
    films = by_film(judged.studies)
    texts = [study.findings for film in films for study in film.studies]
    of_text = np.repeat(np.arange(len(films)), [len(film.studies) for film in films])
    pixels = [film.pixel_values[None] for film in films]
    with open_towers(artifact.with_parts(retrieval=part)) as towers, torch.inference_mode():
        tensors = source.read_tower() | retrieval.read_film()
        film_pairs = (
            np.concatenate(
                [forward.film_embeddings(tensors, source.tower, torch.from_numpy(values)).numpy() for values in pixels]
            ),
            np.concatenate([towers.embed_pixels(values) for values in pixels]),
        )
        tensors = retrieval.read_text()
        ids = [torch.tensor(towers.wordpiece.cut(row)) for row in towers.wordpiece.encode(texts)]
        text_pairs = (
            np.stack([forward.text_embedding(tensors, retrieval.bert, row).numpy() for row in ids]),
            towers.embed_texts(texts),
        )
    fidelity = RetrievalFidelity(
        data=judged.data,
        films=len(films),
        texts=len(texts),
        film_cosine=_smallest_cosine(*film_pairs),
        text_cosine=_smallest_cosine(*text_pairs),
        recall=_recall(film_pairs[1], text_pairs[1], of_text) if len(films) > 1 else {},
        source_recall=_recall(film_pairs[0], text_pairs[0], of_text) if len(films) > 1 else {},
    )
    return dataclasses.replace(part, fidelity=fidelity)


def _smallest_cosine(source: NDArray[np.float32], ours: NDArray[np.float32]) -> float:
    return float(np.einsum("nd,nd->n", source.astype(np.float64), ours.astype(np.float64)).min())


def _recall(films: NDArray[np.float32], texts: NDArray[np.float32], of_text: NDArray[np.int64]) -> dict[str, float]:
    """Return how often a text's film is among the k nearest, and one of a film's texts; a tie is lost."""
    similarity = texts.astype(np.float64) @ films.T.astype(np.float64)
    own = similarity[np.arange(len(texts)), of_text]
    place_of_film = (similarity >= own[:, None]).sum(axis=1)
    mine = of_text[:, None] == np.arange(len(films))
    best = np.where(mine, similarity, -np.inf).max(axis=0)
    place_of_text = ((similarity >= best) & ~mine).sum(axis=0) + 1
    places = {"text to film": place_of_film, "film to text": place_of_text}
    return {f"{way} @{k}": float((place <= k).mean()) for way, place in places.items() for k in RECALL_AT}
