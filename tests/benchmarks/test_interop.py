"""What `make interop` compares other readers with, and that it notices when one of them is wrong.

The environment of the tests has no gptqmodel. Its part is played by transformers with dense weights, taken from the
numbers that the folder was packed from; bitsandbytes and fp16 folders have their own readers here.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny import random_llama, tiny_llama_config

from benchmarks.quality import interop_peer
from benchmarks.quality.command import main
from benchmarks.quality.interop import Comparison, compare, read_folder, request_of, table
from benchmarks.quality.interop_peer import Reader, Request, read, readers
from kernels.bnb import import_bitsandbytes
from lite.errors import LiteError

VOCAB = 96
REQUIREMENTS = ROOT / "benchmarks" / "quality" / "interop-requirements.txt"
DOWN = "model.layers.1.mlp.down_proj"


def llama_config(**changes: Any) -> dict[str, Any]:
    return tiny_llama_config(
        VOCAB, hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=64
    ) | dict(changes)


def pack(values: NDArray[np.int64], bits: int) -> torch.Tensor:
    """Pack along the rows, low bits first: as the digits of a number to the base 2^bits."""
    digits = values.astype(np.uint32).reshape(-1, 32 // bits, values.shape[1])
    worth = (2**bits) ** np.arange(32 // bits, dtype=np.uint32)
    return torch.from_numpy((digits * worth[:, None]).sum(axis=1, dtype=np.uint32).view(np.int32))


def packed_linear(weight: torch.Tensor, bits: int, group_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Round to nearest; return the tensors of GPTQ version 1 and the weight they stand for, [out, in]."""
    out_features, in_features = weight.shape
    size = in_features if group_size == -1 else group_size
    group = np.arange(in_features) // size
    zero = np.full((in_features // size, out_features), 2 ** (bits - 1))
    widest = np.stack([weight[:, torch.from_numpy(group == g)].abs().amax(1).numpy() for g in range(len(zero))])
    scales = (widest / (2 ** (bits - 1) - 1)).astype(np.float16)
    integers = np.rint(weight.T.numpy() / scales[group].astype(np.float32)) + zero[group]
    integers = integers.clip(0, 2**bits - 1).astype(np.int64)
    true = scales[group].astype(np.float64) * (integers - zero[group])
    tensors = {
        "qweight": pack(integers, bits),
        "qzeros": pack((zero - 1).T, bits).T.contiguous(),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    return tensors, torch.from_numpy(true.T.copy()).float()


def write_gptq(
    folder: Path, bits: int = 4, group_size: int = 32, *, head_bits: int | None = None
) -> dict[str, torch.Tensor]:
    """Write a GPTQ folder; return the weights of the plain model it stands for."""
    config = llama_config()
    stored, plain = {}, {}
    for name, weight in random_llama(config).items():
        if "_proj." in name or (head_bits and name == "lm_head.weight"):
            here = head_bits if name == "lm_head.weight" and head_bits else bits
            tensors, plain[name] = packed_linear(weight, here, group_size)
            stored |= {f"{name.removesuffix('weight')}{key}": tensor for key, tensor in tensors.items()}
        else:
            stored[name] = weight.half()
            plain[name] = stored[name].float()
    quantization = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": bits, "group_size": group_size}
    write(folder, config | {"quantization_config": quantization}, stored)
    return plain


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], None]) -> None:
    """Edit one tensor of a folder in place."""
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    edit(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def llama(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(**llama_config()))
    model.load_state_dict(weights)
    return model.to(dtype)


def peer(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Reader:
    """A reader that has the weights from elsewhere, and rounds them."""
    return Reader(name="peer", needs=(), load=lambda _: llama(weights, dtype))


def compared(path: Path, reader: Reader) -> Comparison:
    folder, file = read_folder(path), path / "answer" / "peer.safetensors"
    file.parent.mkdir(exist_ok=True)
    answer = read(request(path), reader, file)
    return compare(folder, folder.logits(), reader.name, answer, file)


def request(path: Path) -> Request:
    asked = request_of(read_folder(path))
    return Request(**asked | {"folder": Path(asked["folder"])})


# --- our reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_gptq_is_unpacked_to_the_numbers_it_was_packed_from(tmp_path: Path, bits: int, group_size: int) -> None:
    plain = write_gptq(tmp_path, bits, group_size)
    folder = read_folder(tmp_path)
    assert (folder.format, folder.bits, folder.group_size, len(folder.linears)) == ("gptq", bits, group_size, 14)
    for name, linear in folder.linears.items():
        assert torch.equal(linear.weight, plain[f"{name}.weight"]), name
    assert {name for name in plain if name.removesuffix(".weight") not in folder.linears} == set(folder.others)


def test_a_head_may_have_more_bits_than_the_rest(tmp_path: Path) -> None:
    plain = write_gptq(tmp_path, 4, 64, head_bits=8)
    linears = read_folder(tmp_path).linears
    assert torch.equal(linears["lm_head"].weight, plain["lm_head.weight"])
    assert torch.equal(linears[DOWN].weight, plain[f"{DOWN}.weight"])


def test_our_logits_are_those_of_the_plain_model(tmp_path: Path) -> None:
    plain = write_gptq(tmp_path)
    folder = read_folder(tmp_path)
    with torch.inference_mode():
        expected = llama(plain)(folder.input_ids()).logits
    logits = folder.logits()
    assert logits.shape == (4, 64, VOCAB)
    assert float((logits - expected).abs().max()) < 1e-4
    assert float(expected.std()) > 0.5


def library_tensors(kind: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what bitsandbytes' own layer stores, and what its own functions make of that."""
    modules, functions = import_bitsandbytes().nn, import_bitsandbytes().functional
    out_features, in_features = weight.shape
    if kind == "nf4":
        layer = modules.Linear4bit(in_features, out_features, bias=False, quant_type="nf4", compress_statistics=True)
        layer.weight = modules.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=True, module=layer)
        layer.weight = layer.weight.to("cpu")
        back = functions.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        layer = modules.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
        layer.weight = modules.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
        back = functions.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    return dict(layer.state_dict()), back


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int8", 8)])
def test_bitsandbytes_folders_are_expanded_as_the_library_does(tmp_path: Path, kind: str, bits: int) -> None:
    config = llama_config() | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
    }
    stored, plain = {}, {}
    for name, weight in random_llama(config).items():
        if "_proj." in name:
            tensors, plain[name] = library_tensors(kind, weight.float() if kind == "nf4" else weight.half())
            stored |= {f"{name.removesuffix('weight')}{key}": tensor for key, tensor in tensors.items()}
        else:
            stored[name] = weight.half()
    write(tmp_path, config, stored)
    folder = read_folder(tmp_path)
    assert (folder.format, folder.bits, folder.group_size, len(folder.linears)) == (kind, bits, None, 14)
    for name, linear in folder.linears.items():
        torch.testing.assert_close(linear.weight, plain[f"{name}.weight"].float(), rtol=2e-6, atol=1e-7)
    assert folder.logits().isfinite().all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "got no config.json.*make interop"),
        (lambda folder: (folder / "model.safetensors").unlink(), "got no config.json with .*safetensors"),
        (lambda folder: edit_config(folder, checkpoint_format="gptq_v2"), "got checkpoint_format 'gptq_v2'"),
        (lambda folder: edit_config(folder, quant_method="awq"), "got quant_method 'awq'"),
        (lambda folder: edit_config(folder, quant_method="bitsandbytes"), "no linear in the format int8"),
        (lambda folder: keep_all_but(folder, f"{DOWN}.qzeros"), "missing or unknown: qzeros"),
        (lambda folder: keep_all_but(folder, "lm_head.weight"), "lm_head.weight.*export it again"),
        (lambda folder: change(folder, f"{DOWN}.qzeros", flip_one_bit), "got other qzeros"),
        (lambda folder: halve(folder, f"{DOWN}.qzeros"), "qzeros: got "),
        (lambda folder: halve(folder, f"{DOWN}.g_idx", 3), "g_idx: got "),
    ],
)
def test_a_folder_it_cannot_read_is_an_error_that_says_why(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    write_gptq(tmp_path)
    damage(tmp_path)
    with pytest.raises(LiteError, match=re.compile(message, re.DOTALL)):
        read_folder(tmp_path).logits()


def edit_config(folder: Path, **changes: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def keep_all_but(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def halve(folder: Path, name: str, divisor: int = 2) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name][: len(tensors[name]) // divisor].clone()
    save_file(tensors, folder / "model.safetensors")


# --- the comparison --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float32, "ours in float32"), (torch.float16, "ours in float16"), (torch.bfloat16, "ours in bfloat16")],
)
def test_a_peer_that_only_rounds_agrees(tmp_path: Path, dtype: torch.dtype, weights: str) -> None:
    row = compared(tmp_path, peer(write_gptq(tmp_path), dtype))
    assert (row.wrong, row.weights, row.dtype, row.kernel) == ("", weights, str(dtype)[6:], "Linear")
    assert row.mean_kl is not None
    assert row.same_top is not None
    assert 0 <= row.mean_kl < {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-2}[dtype]
    assert row.same_top > 0.9


def test_weights_are_asked_for_a_few_inputs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "benchmarks.quality.interop_peer._PROBE_ROWS", 100
    )  # 128 and 256 inputs: the last few are fewer
    row = compared(tmp_path, peer(write_gptq(tmp_path)))
    assert (row.wrong, row.weights) == ("", "ours in float32")


def test_a_kernel_may_round_the_scales_first(tmp_path: Path) -> None:
    plain = write_gptq(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in read_folder(tmp_path).linears:
        scales = stored[f"{name}.scales"].float()[stored[f"{name}.g_idx"].long()].T
        plain[f"{name}.weight"] = (plain[f"{name}.weight"] / scales).round() * scales.bfloat16().float()
    row = compared(tmp_path, peer(plain, torch.bfloat16))
    assert (row.wrong, row.weights) == ("", "ours in bfloat16, scales too")


def flip_one_bit(words: torch.Tensor) -> None:
    words[-1, -1] ^= 1 << 28  # the lowest of the last of eight fields


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_wrong_bit_is_seen(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = write_gptq(tmp_path)
    change(tmp_path, f"{DOWN}.qweight", flip_one_bit)
    row = compared(tmp_path, peer(plain, dtype))
    assert row.wrong.startswith("the weights differ")
    assert re.fullmatch(
        rf"{re.escape(DOWN)}: \d+ of 32768 weights differ from ours in {str(dtype)[6:]}, by \S+ at most", row.weights
    )


def test_a_peer_with_other_norms_is_seen_by_its_logits(tmp_path: Path) -> None:
    plain = write_gptq(tmp_path)
    row = compared(tmp_path, peer(plain | {"model.norm.weight": 1.1 * plain["model.norm.weight"]}))
    assert row.weights == "ours in float32"
    assert re.fullmatch(r"KL \S+ above 1e-05, what rounding to float32 explains", row.wrong)


def test_a_peer_whose_logits_are_not_numbers_is_seen(tmp_path: Path) -> None:
    plain = write_gptq(tmp_path)
    row = compared(tmp_path, peer(plain | {"model.norm.weight": torch.full((128,), torch.nan)}))
    assert "not finite" in row.wrong


def test_a_peer_that_fails_is_wrong_and_what_it_said_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gptq(tmp_path)

    def load(_: Path) -> Any:
        sys.stdout.write("no such kernel\n")
        raise RuntimeError("42")

    row = compared(tmp_path, Reader(name="peer", needs=(), load=load))
    assert row.wrong == "cannot read it: RuntimeError: 42"
    assert capsys.readouterr().err == "  | no such kernel\n\n"
    assert table([row]).splitlines()[-1] == f"peer WRONG: {row.wrong}"


# --- the command -----------------------------------------------------------------------------------------------------


def write_fp16(folder: Path) -> None:
    config = llama_config()
    write(folder, config, {name: weight.half() for name, weight in random_llama(config).items()})


def test_an_artifact_in_fp16_is_read_by_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fp16(tmp_path / "decoder")
    assert main(["interop", str(tmp_path), "--python", sys.executable]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^python 3\.\S+, torch \S+, transformers \S+", printed, re.MULTILINE)
    assert re.search(r"\| transformers \| Linear \| +float16 \| .* ours in float32 \|\n", printed)
    assert "decoder: float16, 16 bits, 15 linears" in printed
    assert "1 of 1 readings agree with ours" in printed


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="gptqmodel is installed")
def test_without_the_peers_a_gptq_folder_does_not_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gptq(tmp_path)
    assert main(["interop", str(tmp_path), "--python", sys.executable, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["versions"]["torch"] == torch.__version__
    rows = document["folders"][str(tmp_path)]
    assert [row["reader"] for row in rows] == ["transformers", "gptq_torch", "gptqmodel"]
    assert re.search(r"gptqmodel and .*not installed: run this by `make interop`", rows[1]["skipped"])
    assert rows[-1]["wrong"] == "no peer read this folder"


def test_what_a_peer_cannot_do_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())  # as if all were installed
    plain = write_gptq(tmp_path / "row", 4, -1)
    write_gptq(tmp_path / "head", 8, 64, head_bits=8)
    monkeypatch.setattr(interop_peer, "_load_gptq_in_float32", lambda _: llama(plain))
    monkeypatch.setattr(interop_peer, "_load_by_gptqmodel", lambda _: 1 / 0)

    def rows(name: str) -> dict[str, Comparison]:
        return {reader.name: compared(tmp_path / name, reader) for reader in readers(request(tmp_path / name))}

    by_reader = rows("row")
    assert [reader for reader, row in by_reader.items() if row.skipped] == ["transformers", "gptqmodel"]
    assert "group size -1" in by_reader["gptqmodel"].skipped
    assert by_reader["gptq_torch"].wrong == ""
    skipped = [reader for reader, row in rows("head").items() if "lm_head" in row.skipped]
    assert skipped == ["transformers", "gptq_torch"]


def test_what_is_not_there_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["interop", str(tmp_path / "nothing")]) == 1
    assert re.search(r"^error: .*nothing: got no config.json.* · expected an artifact", capsys.readouterr().err)
    write_fp16(tmp_path)
    assert main(["interop", str(tmp_path), "--python", str(tmp_path / "python")]) == 1
    assert "python: got No such file or directory · expected the Python of the peers'" in capsys.readouterr().err


def test_the_script_runs_where_this_project_cannot_be_imported(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "quality" / "interop_peer.py"
    write_fp16(tmp_path / "decoder")
    (tmp_path / "request.json").write_text(json.dumps(request_of(read_folder(tmp_path))))
    hidden = f"import sys, runpy; sys.argv = [{str(script)!r}, {str(tmp_path)!r}]; sys.modules |= dict.fromkeys("
    hidden += "('lite', 'kernels', 'export', 'benchmarks')); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-I", "-c", hidden], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())["answers"]
    assert answers == {"transformers": {"kernel": "Linear", "dtype": "float16"}}


def test_its_environment_is_pinned_and_shares_the_projects_versions() -> None:
    def pins(path: Path) -> dict[str, str]:
        lines = [line.partition(";")[0].strip() for line in path.read_text().splitlines() if "< " not in line]
        return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))

    peers, ours = pins(REQUIREMENTS), pins(ROOT / "constraints.txt")
    assert {"gptqmodel", "optimum", "accelerate"} <= set(peers)
    for package in ("torch", "transformers", "safetensors", "bitsandbytes"):
        assert peers[package] == ours[package], package
