"""Patches that become fewer image tokens: what each method keeps, and the way through a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import IMAGE_SIZE, NUM_IMAGE_TOKENS

import lite
from lite.artifact.open import Artifact
from lite.artifact.parts import ImageMethod
from lite.errors import LiteError
from lite.image_tokens import (
    METHODS,
    attention_weights,
    check_image_tokens,
    diverse_weights,
    mean_weights,
    random_weights,
    reduce_patches,
    rotary_positions,
)

RNG = np.random.default_rng(5)
PATCHES = RNG.standard_normal((49, 8)).astype(np.float32)
ATTENTION = RNG.random(49).astype(np.float32)


def weights(method: ImageMethod, count: int) -> np.ndarray:
    if method == "mean":
        return mean_weights(49, count)
    if method == "attention":
        return attention_weights(PATCHES, ATTENTION, count)
    return diverse_weights(PATCHES, count) if method == "diverse" else random_weights(49, count)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 4, 9, 25, 36])
def test_each_token_is_a_mean_of_patches(method: ImageMethod, count: int) -> None:
    found = weights(method, count)
    assert found.shape == (count, 49)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(reduce_patches(PATCHES, ATTENTION, count, method), found @ PATCHES)
    if method != "mean":  # no patch counts twice, and tokens come in the order in which a film is read
        assert ((found > 0).sum(0) <= 1).all()
        kept = found[(found == 1).any(1)].argmax(1)
        assert (np.diff(kept) > 0).all()
    assert reduce_patches(PATCHES, ATTENTION, 49, method) is PATCHES


@pytest.mark.parametrize(("fine", "coarse"), [(7, 3), (37, 19), (8, 4), (8, 1)])
def test_means_of_a_grid_are_torchs_adaptive_pooling(fine: int, coarse: int) -> None:
    film = torch.from_numpy(RNG.standard_normal((fine * fine, 5)).astype(np.float32))
    pooled = torch.nn.functional.adaptive_avg_pool2d(film.T.view(1, 5, fine, fine), coarse).flatten(2)[0].T
    np.testing.assert_allclose(mean_weights(fine**2, coarse**2) @ film.numpy(), pooled.numpy(), atol=1e-6)


def test_attention_keeps_what_is_looked_at_most_and_merges_all_else() -> None:
    found = attention_weights(PATCHES, ATTENTION, 32)
    kept = {int(row.argmax()) for row in found if (row == 1).any()}
    assert set(np.argsort(-ATTENTION)[:27].tolist()) <= kept
    assert ((found > 0).sum(0) == 1).all()  # every patch is in some token


def test_diverse_patches_are_far_apart() -> None:
    copies = np.concatenate([PATCHES[:5]] * 9 + [PATCHES[5:9]])
    chosen = diverse_weights(copies, 9) @ copies
    assert len(np.unique(chosen.round(5), axis=0)) == 9  # none of the copies twice, where there are nine different ones


@pytest.mark.parametrize(
    ("count", "method", "message"),
    [
        (2, "mean", "expected a square: 1, 4 · choose one of them"),
        (0, "mean", "got image_tokens 0 · expected 1 to 4"),
        (9, "diverse", "got image_tokens 9 · expected 1 to 4"),
        (True, "random", "got image_tokens True"),
        (1, "best", "expected mean, attention, diverse, random"),
    ],
)
def test_what_cannot_be_given_is_refused(
    tiny_artifact: Artifact, count: int, method: ImageMethod, message: str
) -> None:
    with pytest.raises(LiteError, match=message):
        check_image_tokens(tiny_artifact.manifest.parts.vision, count, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_reads_as_many_tokens_as_were_asked_for(
    tiny_onnx_artifact: Artifact, films: list[Path], method: ImageMethod
) -> None:
    whole = lite.load(tiny_onnx_artifact.path, rows=1)
    pixels = RNG.standard_normal((2, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    for count in (1, NUM_IMAGE_TOKENS):
        with lite.load(tiny_onnx_artifact.path, rows=1, image_tokens=count, image_method=method) as model:
            features = model.vision(pixels)
            assert features.shape[:2] == (2, count)
            out = torch.empty(features.shape)
            np.testing.assert_array_equal(model.vision(pixels, out), features)
            found = model.findings(films[0], max_new_tokens=2)
        expected = whole.findings(films[0], max_new_tokens=2)
        assert found.num_prompt_tokens == expected.num_prompt_tokens - NUM_IMAGE_TOKENS + count
        assert (found.num_image_tokens, found.image_method) == (count, method if count < NUM_IMAGE_TOKENS else None)
        if count == NUM_IMAGE_TOKENS:
            assert found.token_ids == expected.token_ids
            np.testing.assert_array_equal(features, whole.vision(pixels))
    whole.close()


def test_fewer_tokens_are_spread_over_the_positions_of_all(tiny_onnx_artifact: Artifact, films: list[Path]) -> None:
    """Both engines turn queries and keys by the places that stand for others: 1 of 4 tokens in the middle of these."""
    part = check_image_tokens(tiny_onnx_artifact.manifest.parts.vision, 1, "random")
    assert rotary_positions(tiny_onnx_artifact.manifest.parts.vision, 3, 8) is None
    positions = rotary_positions(part, 3, 8)
    assert positions is not None
    np.testing.assert_array_equal(positions, [0, 1, 2, 4.5, 7, 8, 9, 10])

    def scored(engine: str, cache_dtype: str, *, spread: bool = True) -> np.ndarray:
        with lite.load(
            tiny_onnx_artifact.path, engine=engine, device="cpu", rows=1, image_tokens=1, cache_dtype=cache_dtype
        ) as model:
            if not spread:
                model.decoder.positions = None  # type: ignore[attr-defined]
            return model.score(films[0], [5, 6, 7])

    expected = scored("torch", "float32")
    apart = np.sqrt(np.square(scored("torch", "float32", spread=False) - expected).mean())
    assert apart > 0.1
    # The onnx engine rounds what goes into its products to 8 bits.
    for engine, cache_dtype in (("onnx", "float32"), ("onnx", "int8"), ("torch", "int8")):
        assert np.sqrt(np.square(scored(engine, cache_dtype) - expected).mean()) < apart / 2
