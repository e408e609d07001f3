"""What only a GPU can show of the kernels: real shapes, and that a CUDA graph may hold them."""

from __future__ import annotations

import pytest
import torch
from random_weights import random_gptq
from within import assert_within

from kernels import reference
from kernels.decode_attention import decode_attention
from kernels.lora_add import lora_add
from kernels.quant_matmul import quant_matmul
from kernels.quant_weight import QuantWeight
from kernels.rotary_and_cache import rotary_and_cache

if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU: no CUDA graphs", allow_module_level=True)
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("M", [1, 8, 100])
@pytest.mark.parametrize("shape", [(12288, 4096), (4096, 11008)])
@pytest.mark.parametrize("bits", [4, 8])
def test_real_shapes(bits: int, shape: tuple[int, int], M: int) -> None:
    weight = QuantWeight.from_gptq(random_gptq(bits, *shape, 128))
    x = torch.randn(M, shape[1], generator=torch.Generator().manual_seed(1)).half()
    got = quant_matmul(x.cuda(), weight.to("cuda"))
    op = "quant_matmul decode" if M <= 16 else "quant_matmul prefill"
    assert_within(got, reference.quant_matmul(x.float(), weight), op, bits)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_cuda_graph_serves_every_token(*, quantized: bool) -> None:
    """Captured once, replayed with other inputs, slots and lengths: the same as without a graph."""
    B, heads, head_dim, slots = 2, 4, 128, 300
    hidden = heads * head_dim
    weight = QuantWeight.from_gptq(random_gptq(4, 3 * hidden, hidden, 128)).to("cuda")
    kind = torch.int8 if quantized else torch.float16
    cache = dict(zip(("k_cache", "v_cache"), torch.zeros(2, B, heads, slots, head_dim, dtype=kind).cuda(), strict=True))
    if quantized:
        cache |= dict(zip(("k_scales", "v_scales"), torch.zeros(2, B, heads, slots).half().cuda(), strict=True))
    x = torch.zeros(B, 1, hidden, dtype=torch.float16, device="cuda")
    at = torch.zeros(B, 1, dtype=torch.int64, device="cuda")

    def token() -> torch.Tensor:
        qkv = quant_matmul(x, weight)
        q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, heads, heads), dim=-2)
        cos, sin = reference.rotary_table(at, head_dim, 1e4)
        q, _ = rotary_and_cache(q, k, v, cos, sin, at, **cache)
        return decode_attention(q[:, 0], lengths=at[:, 0] + 1, **cache)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        token()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = token()
    inputs = torch.randn(5, B, 1, hidden, generator=torch.Generator().manual_seed(0)).half().cuda()
    graphed = []
    for step in range(5):
        x.copy_(inputs[step])
        at.copy_(torch.tensor([[step], [step + 200]]))
        graph.replay()
        graphed.append(out.clone())
    for step in range(5):
        x.copy_(inputs[step])
        at.copy_(torch.tensor([[step], [step + 200]]))
        assert torch.equal(token(), graphed[step])


@pytest.mark.parametrize(("M", "parts", "K"), [(1, (4096,) * 3, 4096), (16, (4096,), 11008), (256, (4096, 64), 4096)])
def test_one_cuda_graph_serves_all_adapters(M: int, parts: tuple[int, ...], K: int) -> None:
    """Captured without any, replayed with other rows and adapters: as the reference has it."""
    torch.manual_seed(0)
    a, b = torch.randn(3, len(parts) * 64, K) / K**0.5, torch.randn(3, sum(parts), 64) / 8
    a, b, base, x = a.half(), b.half(), torch.randn(M, sum(parts)).half(), torch.zeros(M, K).half()
    held = base.cuda(), x.cuda(), a.cuda(), b.cuda(), torch.full((M,), -1, device="cuda")
    lora_add(*held, parts=parts)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora_add(*held, parts=parts)
    for _ in range(3):
        x, chosen = torch.randn(M, K).half(), torch.randint(-1, 3, (M,))
        for kept, now in zip(held, (base, x, a, b, chosen), strict=True):
            kept.copy_(now)
        graph.replay()
        expected = reference.lora_add(base.float(), x.float(), a.float(), b.float(), chosen, parts=parts)
        assert_within(held[0], expected, "lora_add", 16)
