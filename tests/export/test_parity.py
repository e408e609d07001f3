"""Parity: what it computes film by film and layer by layer is that of the whole, and what is wrong it finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from driving import score_text
from small_export import Small

from export.logits import artifact_logits, onnx_logits, source_logits
from export.studies import FilmStudies, StudyReader, by_film
from lite.artifact.parts import CacheDtype
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.torch_engine.load import load_decoder
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from export.source.checkpoint import Checkpoint
    from lite.artifact.open import Artifact


def judged_films(
    source: Checkpoint, artifact: Artifact, count: int = 6
) -> tuple[list[FilmStudies], list[torch.Tensor]]:
    """Built-in studies, four of one film and two of another, and the films' features."""
    films = by_film(
        StudyReader(
            source.tokenizer, artifact.manifest, max_seq_len=source.decoder.max_position_embeddings, max_tokens=16
        ).built_in(count)
    )
    assert [len(film.studies) for film in films] == [4, count - 4]
    return films, [torch.from_numpy(VisionEncoder(artifact)(film.pixel_values[None])[0]) for film in films]


@pytest.mark.parametrize("form", ["fp16", "rtn-int4", "bnb-nf4", "bnb-int8"])
def test_parity_film_by_film_and_layer_by_layer_is_that_of_the_whole_decoder(
    source: Checkpoint, small: Small, form: str
) -> None:
    artifact = small(form)
    films, features = judged_films(source, artifact)
    caches: tuple[CacheDtype | None, ...] = (None, "int8")
    found = artifact_logits(artifact, films, features, "cpu", show=False, cache_dtypes=caches)
    asked = [(study, image) for film, image in zip(films, features, strict=True) for study in film.studies]
    for cache_dtype, layered in zip(caches, found, strict=True):
        decoder = load_decoder(artifact, device="cpu", cache_dtype=cache_dtype)
        for (study, image), logits in zip(asked, layered, strict=True):
            whole = score_text(decoder, study.input_ids, study.target_ids, image)
            assert whole.shape == logits.shape == (16, decoder.config.vocab_size)
            torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)
    for exact, rounded in zip(*found, strict=True):
        assert not torch.equal(exact[0], rounded[0]), "the question is read behind a rounded film"
        assert not torch.equal(exact[1:], rounded[1:])


def test_the_source_computes_studies_of_a_film_as_each_by_itself(source: Checkpoint, artifact: Artifact) -> None:
    films, features = judged_films(source, artifact)
    together = iter(source_logits(source, films, features, "cpu", show=False))
    for film, image in zip(films, features, strict=True):
        for study in film.studies:
            (alone,) = source_logits(source, [FilmStudies(studies=(study,))], [image], "cpu", show=False)
            torch.testing.assert_close(next(together), alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_decoder_onnx_reads_studies_of_a_film_as_each_by_itself(
    tiny_onnx_artifact: Artifact, cache_dtype: CacheDtype | None
) -> None:
    reader = StudyReader(
        tiny_onnx_artifact.file("tokenizer.model"), tiny_onnx_artifact.manifest, max_seq_len=512, max_tokens=16
    )
    films = by_film(reader.built_in(5))
    encoder, decoder = VisionEncoder(tiny_onnx_artifact), OnnxDecoder(tiny_onnx_artifact, cache_dtype=cache_dtype)
    features = [torch.from_numpy(encoder(film.pixel_values[None])[0]) for film in films]
    together = iter(onnx_logits(tiny_onnx_artifact, films, features, cache_dtype))
    for film, image in zip(films, features, strict=True):
        for study in film.studies:
            alone = score_text(decoder, study.input_ids, study.target_ids, image.numpy())
            torch.testing.assert_close(next(together), torch.from_numpy(alone), rtol=0, atol=1e-4)
