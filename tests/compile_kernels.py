"""Compile every Triton kernel for kinds of cards, on a machine without any: `compile_kernels.py 75 86`.

The interpreter accepts much that the compiler does not. This calls the launchers as for a real card, at Vicuna's
shapes, with a driver that only knows the card's compute capability; Triton compiles as far as machine code and launches
nothing. What it prints is one JSON object: of each card the kernels, and what their machine code needs.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.backend import Card
from kernels.gpu import add_rms_norm, decode_attention, lora_add, quant_matmul, rotary_and_cache, sample, silu_mul
from kernels.lora_add import lora_plan
from kernels.quant_matmul import decode_plan
from kernels.reference import Sampled

HIDDEN_SIZE, INNER, HEADS, HEAD_DIM, SLOTS, VOCAB_SIZE = 4096, 11008, 32, 128, 2048, 32000
MULTIPROCESSORS = 128


class NoGpu:
    """As much of a driver as compiling asks for."""

    capability = 0

    def get_current_device(self) -> int:
        # Triton keeps what it has compiled by the device, and asks for its target only once.
        return self.capability

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002 - a driver's
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def launch_all(capability: int) -> None:
    """Call each launcher, in every variant that differs for the compiler."""
    float16 = torch.float16
    card = Card(capability=divmod(capability, 10), multiprocessors=MULTIPROCESSORS)
    K, N = HIDDEN_SIZE, INNER
    x, out = torch.empty(64, K, dtype=float16), torch.empty(64, N, dtype=float16)
    for bits, group_size, decoded in ((4, 128, (1, 2, 16)), (8, 32, (1,))):
        tiles = torch.empty(N // 16, K * bits // 1024, 16, 32, dtype=torch.int32)
        scales = torch.empty(K // group_size, N, dtype=float16)
        form = {"bits": bits, "group_size": group_size}
        for M in decoded:
            cut = decode_plan(M, (N, K), bits, card)._replace(splits=2)._asdict()
            quant_matmul.decode(x[:M], tiles, scales, out[:M], torch.empty(2, M, N), **form, **cut)
        quant_matmul.dequantize(tiles, scales, torch.empty(64, K, dtype=float16), begin=0, end=64, **form)
    if capability >= 80:
        cut = {"rows": 1, "block_n": 32, "splits": 1, "num_warps": 4}
        y = torch.empty(1, N, dtype=torch.bfloat16)
        quant_matmul.decode(x[:1].bfloat16(), tiles, scales, y, y, **form, **cut)
    workspace = torch.empty(6 * HEADS, SLOTS // 64, HEAD_DIM)
    # Vicuna's, a row at a time; and rows of grouped queries over int8, with the other kind of integers.
    for stored, B, T, kv_heads, integer in ((float16, 1, 1, HEADS, torch.int32), (torch.int8, 2, 3, 8, torch.int64)):
        q, k = (torch.empty(B, T, heads, HEAD_DIM, dtype=float16) for heads in (HEADS, kv_heads))
        cache = torch.empty(B, kv_heads, SLOTS, HEAD_DIM, dtype=stored)
        scales_of_cache = torch.empty(B, kv_heads, SLOTS, dtype=float16) if stored == torch.int8 else None
        caches, pair = (cache, cache), (scales_of_cache, scales_of_cache)
        lengths, slots, table = (
            torch.ones(B, T).to(integer),
            torch.ones(B, T).to(integer),
            torch.empty(B, T, HEAD_DIM // 2),
        )
        decode_attention.decode_attention(q, *caches, lengths, *pair, workspace, workspace, q, block_s=64)
        rotary_and_cache.rotary_and_cache(q, k, k, table, table, slots, *caches, *pair, q, k)
    x = torch.empty(1, HIDDEN_SIZE, dtype=float16)
    add_rms_norm.add_rms_norm(x, x, x[0], 1e-5, x, x)
    silu_mul.silu_mul(torch.empty(1, 2 * INNER, dtype=float16), torch.empty(1, INNER, dtype=float16))
    launch_lora_add(card, torch.bfloat16 if capability >= 80 else float16)
    logits, ids, floats = torch.empty(2, VOCAB_SIZE, dtype=float16), torch.empty(2, 5).long(), torch.empty(2, 5)
    sampled = Sampled(ids[:, 0], floats[:, 0], ids, floats, torch.empty(2, dtype=torch.bool))
    sample.sample(logits, floats[:, 0], floats[:, 0], ids[:, 0], ids[:, 0], sampled)


def launch_lora_add(card: Card, dtype: torch.dtype) -> None:
    """Add adapters of one rank and of an odd one, to parts of one output too: Triton takes a 1 for a constant."""
    for M, K, ends, rank in ((1, HIDDEN_SIZE, (4096, 8192, 12288), 64), (16, INNER, (4096,), 16), (1, 40, (1, 2), 300)):
        a, b = torch.empty(2, len(ends) * rank, K, dtype=dtype), torch.empty(2, ends[-1], rank, dtype=dtype)
        x, y = torch.empty(M, K, dtype=dtype), torch.empty(M, ends[-1], dtype=dtype)
        plan = lora_plan(M, K, len(ends), rank, card)._asdict()
        lora_add.lora_add(y, x, a, b, torch.zeros(M).long(), torch.empty(8, M, a.shape[1]), ends=ends, **plan)


def main(capabilities: list[int]) -> None:
    cards = NoGpu()
    driver.set_active(cards)
    compiled: dict[int, dict[str, list[dict[str, Any]]]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        ptx = kernel.asm["ptx"]
        found = {
            "target": kernel.metadata.target.arch,
            "shared_bytes": kernel.metadata.shared,
            "loads_of_16_bytes": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx)),
            # But for approximations (rsqrt.approx.ftz) and logarithms, none may: see kernels/gpu/quant_matmul.py.
            "flushes_denormals": bool(re.search(r"\b(add|mul|fma)\.[\w.]*ftz", ptx)),
            "machine_code_bytes": len(kernel.asm["cubin"]),
        }
        compiled[cards.capability].setdefault(self.fn.__name__, []).append(found)
        return kernel

    JITFunction.run = compile_only
    for capability in capabilities:
        cards.capability = capability
        compiled[capability] = {}
        launch_all(capability)
    json.dump(compiled, sys.stdout)


if __name__ == "__main__":
    main([int(capability) for capability in sys.argv[1:]])
