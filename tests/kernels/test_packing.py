"""GPTQ v1 to the bit: against an unpacker that shares nothing with the packer, written from the format's page."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from random_weights import random_gptq, random_integers
from unpacked import unpacked

from export.write.onnx_graph import CONTRIB, Graph
from kernels.gptq import GptqWeight, gptq_matmul, to_tensors
from kernels.packing import pack, symmetric_qzeros, to_blocks, unpack

SHAPES = [(8, 64, 32), (24, 96, 32), (16, 128, 128), (40, 256, 64)]  # out, in, group size


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inputs", "group_size"), SHAPES)
def test_an_independent_unpacker_rebuilds_the_weights(bits: int, out: int, inputs: int, group_size: int) -> None:
    values, scales = random_integers(bits, out, inputs, group_size)
    expected = values.double().numpy() * scales.double().repeat_interleave(group_size, dim=1).numpy()
    tensors = to_tensors(values, scales, bits=bits)
    np.testing.assert_array_equal(unpacked(tensors, bits), expected)
    weight = GptqWeight.from_tensors(tensors, bits=bits)
    assert weight.shape == (out, inputs)
    assert weight.group_size == group_size
    np.testing.assert_array_equal(weight.dequantize(torch.float32).double().numpy(), expected)
    x = torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(1))
    product = gptq_matmul(x, weight)
    assert product.shape == (2, 3, out)
    torch.testing.assert_close(product.double(), x.double() @ torch.from_numpy(expected).T, rtol=1e-5, atol=1e-3)


def test_shapes_dtypes_and_words_are_those_of_version_1() -> None:
    tensors = to_tensors(*random_integers(4, 16, 128, 32), bits=4)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "qweight": ((16, 16), torch.int32),
        "qzeros": ((4, 2), torch.int32),
        "scales": ((4, 16), torch.float16),
        "g_idx": ((128,), torch.int32),
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert {f"{word:#x}" for word in tensors["qzeros"].flatten().tolist()} == {"0x77777777"}
    assert {f"{word:#x}" for word in symmetric_qzeros(2, 8, 8).flatten().tolist()} == {"0x7f7f7f7f"}
    # Along the inputs, the first of eight in the lowest bits.
    words = to_tensors(torch.arange(8).expand(8, 8) - 8, torch.ones(8, 1).half(), bits=4)["qweight"]
    assert f"{int(words[0, 0]):#x}" == "0x76543210"


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_undoes_packing_for_every_word(bits: int) -> None:
    words = torch.tensor([[0, -1], [-(2**31), 2**31 - 1], [0x12345678, -0x12345678]], dtype=torch.int32)
    assert torch.equal(pack(unpack(words, bits), bits), words)


def test_values_beyond_the_range_do_not_reach_their_neighbours() -> None:
    values = torch.zeros(8, 8, dtype=torch.int64)
    values[0, 1] = 99
    weight = GptqWeight.from_tensors(to_tensors(values, torch.ones(8, 1).half(), bits=4), bits=4)
    expected = torch.zeros(8, 8)
    expected[0, 1] = 7
    assert torch.equal(weight.dequantize(torch.float32), expected)


def test_a_large_weight_is_expanded_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.reference.ROWS_VALUES", 3 * 64)
    weight = random_gptq(4, 40, 64, 32)
    taken: list[int] = []
    right = GptqWeight.rows
    monkeypatch.setattr(GptqWeight, "rows", lambda self, b, e, dtype: taken.append(e - b) or right(self, b, e, dtype))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gptq_matmul(x, weight), x @ right(weight, 0, 40, torch.float32).T)
    assert sum(taken) == 40
    assert max(taken) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("g_idx"), "missing or unknown: g_idx$"),
        (lambda t: t.update(bias=torch.zeros(8)), "missing or unknown: bias$"),
        (lambda t: t.update(qzeros=t["qzeros"] + 1), "got other qzeros"),
        (lambda t: t.update(qzeros=t["qzeros"][:, :0]), r"^qzeros: got \[2, 0\]"),
        (lambda t: t.update(g_idx=t["g_idx"].flip(0)), "another order .* desc_act=False"),
        (lambda t: t.update(scales=t["scales"].float()), r"^scales: got \[2, 16\] torch.float32"),
        (lambda t: t.update(scales=t["scales"][:0]), "expected two matrices"),
        (lambda t: t.update(qweight=t["qweight"][0]), "expected two matrices"),
        (lambda t: t.update(scales=torch.ones(128, 16).half()), "got 64 inputs in 128 groups"),
    ],
)
def test_tensors_that_are_no_symmetric_version_1_weight_are_refused(change: object, message: str) -> None:
    tensors = to_tensors(*random_integers(4, 16, 64, 32), bits=4)
    change(tensors)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        GptqWeight.from_tensors(tensors, bits=4)


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a last dimension of 64"):
        gptq_matmul(torch.zeros(2, 32), random_gptq(8, 16, 64, 32))


# ---- the layout of ONNX Runtime's MatMulNBits

BLOCKS = [(8, 64, 32), (24, 256, 128), (16, 256, 256)]  # out, in, group size; the last: one group a row


def from_blocks(blocks: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """Rebuild w[out, in] = scale * (q - zero) by the operator's page: low bits first, a block after the other."""
    out, groups, width = blocks.shape
    block_size = width * 8 // bits
    weight = np.zeros((out, groups * block_size))
    for n in range(out):
        for k in range(groups * block_size):
            group, place = divmod(k, block_size)
            byte, shift = divmod(place * bits, 8)
            q = int(blocks[n, group, byte]) >> shift & ((1 << bits) - 1)
            weight[n, k] = float(scales[n, group]) * (q - (1 << (bits - 1)))
    return weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inputs", "group_size"), BLOCKS)
def test_blocks_are_the_same_weight(bits: int, out: int, inputs: int, group_size: int) -> None:
    weight = random_gptq(bits, out, inputs, group_size)
    # A block may be a part of a group.
    for block_size in {group_size, 32}:
        blocks = to_blocks(weight.qweight, bits, block_size)
        assert (blocks.dtype, blocks.shape) == (torch.uint8, (out, inputs // block_size, block_size * bits // 8))
        per_block = weight.scales.t().repeat_interleave(group_size // block_size, dim=1).numpy()
        expected = weight.dequantize(torch.float32).double().numpy()
        np.testing.assert_array_equal(from_blocks(blocks.numpy(), per_block, bits), expected)


def rounded_to_int8(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Round each block of x [M, K] as MatMulNBits does with accuracy_level 4."""
    blocks = x.unflatten(1, (-1, block_size))
    steps = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.round(blocks / steps) * steps).flatten(1)


@pytest.mark.parametrize("accuracy_level", [0, 1, 4])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inputs", "group_size"), [*BLOCKS, (40, 192, 64)])
def test_onnx_runtime_reads_the_blocks(bits: int, out: int, inputs: int, group_size: int, accuracy_level: int) -> None:
    weight = random_gptq(bits, out, inputs, group_size)
    form = {"K": inputs, "N": out, "bits": bits, "block_size": group_size, "accuracy_level": accuracy_level}
    graph = Graph()
    graph.add("MatMulNBits", "x", "B", "scales", outputs=["y"], domain=CONTRIB, **form)
    graph.constants = [
        numpy_helper.from_array(to_blocks(weight.qweight, bits, group_size).numpy(), "B"),
        numpy_helper.from_array(weight.scales.t().float().flatten().numpy(), "scales"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    model = graph.model("product", [x], [y], ("", CONTRIB))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for rows in (1, 2, 4, 5, 16):
        inputs_x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
        (got,) = session.run(None, {"x": inputs_x.numpy()})
        multiplied = rounded_to_int8(inputs_x, group_size) if accuracy_level == 4 else inputs_x
        expected = (multiplied @ weight.dequantize(torch.float32).T).numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))
