"""The reference ops against their definitions, worked out another way, on odd shapes."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.reference import attention, rms_norm, rotary, rotary_table

ODD_SHAPES = [(1, 1, 1, 1, 2), (2, 3, 5, 1, 6), (3, 1, 7, 7, 10), (1, 4, 5, 3, 8)]  # B, kv_heads, S, T, head_dim


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 1, 129)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_is_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    got = rms_norm(x, weight, 1e-5)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert got.dtype == dtype
    torch.testing.assert_close(got, exact.to(dtype))


def test_rms_norm_does_not_overflow_in_half_precision() -> None:
    x = torch.full((1, 8), 3e4, dtype=torch.float16)  # its square is far beyond float16
    torch.testing.assert_close(rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-6), torch.ones_like(x))


def test_rotary_turns_each_pair_by_its_angle() -> None:
    head_dim, theta, position = 6, 100.0, 5
    x = torch.arange(1.0, 7.0).view(1, 1, 1, head_dim)
    cos, sin = rotary_table(torch.tensor([[position]]), head_dim, theta)
    got = rotary(x, cos, sin).flatten().tolist()
    for i in range(head_dim // 2):
        angle = position * theta ** (-2 * i / head_dim)
        turned = complex(x.flatten()[i], x.flatten()[i + 3]) * complex(math.cos(angle), math.sin(angle))
        assert got[i] == pytest.approx(turned.real, abs=1e-5)
        assert got[i + 3] == pytest.approx(turned.imag, abs=1e-5)


def test_rotary_sees_only_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)

    def product(q_position: int, k_position: int) -> float:
        turned = [
            rotary(x, *rotary_table(torch.tensor([[at]]), 8, 1e4)) for x, at in ((q, q_position), (k, k_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-4)


def test_rotary_table_at_the_end_of_a_long_context() -> None:
    cos, sin = rotary_table(torch.tensor([4095]), 128, 1e4)
    exact = [4095 * 1e4 ** (-2 * i / 128) for i in range(64)]
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0].double(), torch.tensor(exact).double().cos(), atol=1e-3, rtol=0)
    torch.testing.assert_close(sin[0].double(), torch.tensor(exact).double().sin(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sizes", ODD_SHAPES)
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_is_its_definition_and_unseen_slots_are_poison(sizes: tuple[int, ...], groups: int) -> None:
    batch, kv_heads, slots, length, head_dim = sizes
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, kv_heads * groups, length, head_dim, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, slots, head_dim, generator=generator)
    starts = torch.randint(0, slots - length + 1, (batch, 1), generator=generator)
    position_ids = starts + torch.arange(length)
    for b in range(batch):
        k[b, :, int(position_ids[b, -1]) + 1 :] = float("nan")
        v[b, :, int(position_ids[b, -1]) + 1 :] = float("nan")
    got = attention(q, k, v, position_ids)
    for b in range(batch):
        for h in range(kv_heads * groups):
            for t in range(length):
                seen = int(position_ids[b, t]) + 1
                scores = k[b, h // groups, :seen] @ q[b, h, t] / math.sqrt(head_dim)
                torch.testing.assert_close(got[b, h, t], scores.softmax(0) @ v[b, h // groups, :seen])


def test_attention_computes_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 16, generator=generator)
    position_ids = torch.arange(9)[None]
    got = attention(q[None].half()[0], k.half(), v.half(), position_ids)
    exact = attention(q.half().float(), k.half().float(), v.half().float(), position_ids)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, exact.half())
