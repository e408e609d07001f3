"""Where the features of a film are written: memory of torch's on the same device, or a new array."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import HIDDEN_SIZE, IMAGE_SIZE, NUM_IMAGE_TOKENS

from lite.artifact.open import Artifact
from lite.engines.onnx_session import CPU, CUDA
from lite.errors import LiteError, MemoryBudgetError
from lite.vision import VisionEncoder


@pytest.fixture(scope="module")
def encoder(tiny_artifact: Artifact) -> VisionEncoder:
    return VisionEncoder(tiny_artifact)


def pixels(rows: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((rows, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)


@pytest.mark.parametrize("rows", [1, 3])
def test_features_are_written_where_they_are_wanted(encoder: VisionEncoder, rows: int) -> None:
    expected = encoder(pixels(rows))
    assert isinstance(expected, np.ndarray)
    out = torch.full((rows, NUM_IMAGE_TOKENS, HIDDEN_SIZE), float("nan"))
    address = out.data_ptr()
    got = encoder(pixels(rows), out)
    assert got is out
    assert out.data_ptr() == address
    np.testing.assert_array_equal(out.numpy(), expected)


def test_only_the_place_that_is_meant_is_written(encoder: VisionEncoder) -> None:
    whole = torch.full((3, NUM_IMAGE_TOKENS, HIDDEN_SIZE), 7.0)
    encoder(pixels(1), whole[1:2])
    np.testing.assert_array_equal(whole[1].numpy(), encoder(pixels(1))[0])
    assert bool((whole[[0, 2]] == 7.0).all())


def test_pixels_that_do_not_lie_together_are_read_right(encoder: VisionEncoder) -> None:
    """They are handed over by their address."""
    apart = np.ascontiguousarray(pixels(1).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not apart.flags.c_contiguous
    out = torch.empty(1, NUM_IMAGE_TOKENS, HIDDEN_SIZE)
    np.testing.assert_array_equal(encoder(apart, out).numpy(), encoder(pixels(1)))


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1", "meta", "mps"])
def test_on_another_device_the_features_are_a_new_array(encoder: VisionEncoder, device: str) -> None:
    def data_ptr() -> int:
        pytest.fail("its address was asked for")

    out: Any = SimpleNamespace(device=device, shape=(1, NUM_IMAGE_TOKENS, HIDDEN_SIZE), data_ptr=data_ptr)
    assert not encoder.writes_to(device)
    got = encoder(pixels(1), out)
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, encoder(pixels(1)))


@pytest.mark.parametrize(
    ("provider", "device_id", "places"),
    [
        (CPU, None, {"cpu": ("cpu", 0)}),
        (CUDA, None, {"cuda": ("cuda", 0), "cuda:0": ("cuda", 0)}),
        (CUDA, "0", {"cuda": ("cuda", 0), "cuda:0": ("cuda", 0)}),
        (CUDA, "1", {"cuda:1": ("cuda", 1)}),
        ("DmlExecutionProvider", None, {}),
    ],
)
def test_the_place_is_that_of_the_provider(
    tiny_artifact: Artifact, provider: str, device_id: str | None, places: dict[str, tuple[str, int]]
) -> None:
    encoder = VisionEncoder(tiny_artifact)
    options = {provider: {} if device_id is None else {"device_id": device_id}, CPU: {}}
    session: Any = SimpleNamespace(get_providers=lambda: list(options), get_provider_options=lambda: options)
    encoder._projector = session
    for device in ("cpu", "cuda", "cuda:0", "cuda:1", "mps"):
        assert encoder._place(device) == places.get(device), device
        assert encoder._place(torch.device(device)) == places.get(device)
        assert encoder.writes_to(device) is (device in places)


@pytest.mark.parametrize(
    ("message", "kind"),
    [("Failed to allocate memory for requested buffer of size 99", MemoryBudgetError), ("bad node", LiteError)],
)
def test_an_error_of_onnx_runtime_is_one_of_ours(
    encoder: VisionEncoder, message: str, kind: type[LiteError], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def run(self, *_: Any) -> Any:
            raise Exception(message)  # theirs have no other base

        def __getattr__(self, name: str) -> Any:
            return getattr(session, name)

    session = encoder._projector
    monkeypatch.setattr(encoder, "_projector", Failing())
    with pytest.raises(LiteError, match=rf"{message}\) · expected CPUExecutionProvider to compute the graph · ") as got:
        encoder(pixels(1))
    assert type(got.value) is kind
