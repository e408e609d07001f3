"""The whole decoder on the GPU kernels, under Triton's interpreter, against the same decoder without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted_decoder import SETTINGS, decode
from repository import ROOT, run_python

# How far logits may be from the reference's, as a share of their spread: in float16 each op rounds; in float32 only the
# order of sums differs, which in a cache of int8 turns a last bit into a whole step now and then.
ALLOWED = {"float16": 2e-2, "int8": 2e-2}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    out = tmp_path_factory.mktemp("interpreted")
    # One thread: the tensors are tiny, and two threads would only wait for one another.
    script = ROOT / "tests" / "interpreted_decoder.py"
    run_python(script, out, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return json.loads((out / "found.json").read_text())


@pytest.mark.full
@pytest.mark.parametrize("name", SETTINGS)
def test_the_decoder_on_the_kernels_is_the_decoder_without(interpreted: Any, name: str, tmp_path: Path) -> None:
    got, expected = interpreted[name], decode(tmp_path / "reference", *SETTINGS[name])
    assert (got["backend"], expected["backend"]) == ("triton", "reference")
    assert (got["shown"], got["fallbacks"]) == ("triton", [])
    # Of each layer qkv, o, gate and up, and down are one weight each in tiles; the head has 16 bits.
    assert got["tiled"] == [True] * 8 + [False]
    assert expected["tiled"] == [False] * (2 * 7 + 1)
    # The steps are those that a graph would hold: all three rows, whichever are free.
    assert (got["steps"], expected["steps"]) == ([[3, 0, 0, False]], [])
    assert got["num_cached_tokens"] == expected["num_cached_tokens"]
    assert len(got["logits"]) == len(expected["logits"]) == 3 + 2 + 3
    for ours, theirs in zip(map(torch.tensor, got["logits"]), map(torch.tensor, expected["logits"]), strict=True):
        assert float((ours - theirs).abs().max()) < ALLOWED[name] * float(theirs.std())
    assert got["tokens"] == expected["tokens"]
    assert len({tuple(row[3:]) for row in zip(*got["tokens"], strict=True)}) == 3, "rows that all say the same"
