"""The Triton kernels as machine code for cards that are not here: what the interpreter takes has to compile, too."""

from __future__ import annotations

import json
from typing import Any

import pytest
from repository import ROOT, run_python

KERNELS = {
    "add_rms_norm_kernel",
    "combine_kernel",
    "dequantize_kernel",
    "expand_kernel",
    "partial_attention_kernel",
    "partial_products_kernel",
    "rotary_and_cache_kernel",
    "sample_kernel",
    "shrink_kernel",
    "silu_mul_kernel",
    "sum_partials_kernel",
}
MAX_SHARED_BYTES = 99 << 10
"""What a program may have on the cards with the least: 8.6, 8.9 and 12.0. Volta and Turing have less, and need none."""


COMMON, OTHERS = 86, (70, 120)
"""A common card; the oldest and the newest: three instruction sets."""


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    # A cache of its own, or nothing would be compiled the second time.
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": ""}
    capabilities = (COMMON, *OTHERS) if request.config.getoption("full") else (COMMON,)
    script = ROOT / "tests" / "compile_kernels.py"
    found: dict[str, Any] = json.loads(run_python(script, *map(str, capabilities), **environment))
    return found


@pytest.mark.parametrize("capability", [COMMON, *(pytest.param(other, marks=pytest.mark.full) for other in OTHERS)])
def test_every_kernel_compiles(capability: int, compiled: dict[str, Any]) -> None:
    kernels = compiled[str(capability)]
    assert set(kernels) == KERNELS
    for name, variants in kernels.items():
        for found in variants:
            assert found["target"] == capability
            assert found["machine_code_bytes"] > 0
            assert found["shared_bytes"] <= (MAX_SHARED_BYTES if capability >= 80 else 48 << 10)
            # A logarithm does, of numbers from 2^-24 on.
            assert not found["flushes_denormals"] or name == "sample_kernel"
    # Weights and cache are read 16 bytes at a time, as their layouts are made for.
    for name in ("partial_products_kernel", "dequantize_kernel", "partial_attention_kernel"):
        assert all(found["loads_of_16_bytes"] >= 2 for found in kernels[name]), name
    for name in ("shrink_kernel", "expand_kernel"):  # but for the last, of a rank and widths that are odd
        assert all(found["loads_of_16_bytes"] >= 2 for found in kernels[name][:2]), name
