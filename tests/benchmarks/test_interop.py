"""What `make interop` compares other readers with, and that it notices when one of them is wrong.

The environment of the tests has no gptqmodel. Its part is played by transformers with dense weights, taken from the
numbers that the folder was packed from; bitsandbytes and fp16 folders have their own readers here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny import decoder_folder, gptq_llama, random_llama, tiny_llama_config

from benchmarks.quality import interop_peer
from benchmarks.quality.command import main
from benchmarks.quality.interop import Comparison, compare, read_folder, request_of, table
from benchmarks.quality.interop_peer import Reader, Request, read, readers
from export.quantize.gptq import Grid, round_to_nearest
from kernels.bnb import import_bitsandbytes
from lite.artifact.open import Artifact

VOCAB = 96
REQUIREMENTS = ROOT / "benchmarks" / "quality" / "interop-requirements.txt"
DOWN = "model.layers.1.mlp.down_proj"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def llama_config(**changes: Any) -> dict[str, Any]:
    return tiny_llama_config(
        VOCAB, hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=64
    ) | dict(changes)


class Written(NamedTuple):
    """A decoder folder, and the weights of the plain model it stands for."""

    artifact: Artifact
    plain: dict[str, torch.Tensor]


def write_gptq(folder: Path, bits: int = 4, group_size: int = 32, *, head: bool = False) -> Written:
    """Write a GPTQ folder, on demand with a head in 8 bits."""
    config, stored = gptq_llama(llama_config(), bits=bits, group_size=group_size, lm_head_bits=8 if head else None)
    plain = {}
    for name, weight in random_llama(llama_config()).items():
        plain[name] = weight.float()
        if name not in stored:
            size = weight.shape[1] if group_size == -1 else group_size
            rounded = round_to_nearest(plain[name], Grid(bits=bits if "_proj." in name else 8, group_size=size))
            plain[name] = rounded.values * rounded.scales.float().repeat_interleave(size, dim=1)
    return Written(decoder_folder(folder, config, stored), plain)


def llama(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(**llama_config()))
    model.load_state_dict(weights)
    return model.to(dtype)


def peer(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Reader:
    """A reader that has the weights from elsewhere, and rounds them."""
    return Reader(name="peer", needs=(), load=lambda _: llama(weights, dtype))


def compared(artifact: Artifact, reader: Reader) -> Comparison:
    folder, file = read_folder(artifact), artifact.path / "peer.safetensors"
    return compare(folder, reader.name, read(request(artifact), reader, file), file)


def request(artifact: Artifact) -> Request:
    asked = request_of(read_folder(artifact))
    return Request(**asked | {"folder": Path(asked["folder"])})


def library_tensors(kind: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what bitsandbytes' own layer stores."""
    modules = import_bitsandbytes().nn
    out_features, in_features = weight.shape
    if kind == "nf4":
        layer = modules.Linear4bit(in_features, out_features, bias=False, quant_type="nf4", compress_statistics=True)
        layer.weight = modules.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=True, module=layer)
        layer.weight = layer.weight.to("cpu")
    else:
        layer = modules.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
        layer.weight = modules.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return dict(layer.state_dict())


@pytest.mark.parametrize(
    ("kind", "weights", "kernel"),
    [
        # The latter on a CPU that multiplies bfloat16.
        ("nf4", {"ours in float16", "ours in bfloat16, scales too"}, "Linear4bit"),
        ("int8", {"ours in float16 but for the last bit"}, "Linear8bitLt"),
    ],
)
def test_bitsandbytes_folders_are_read_as_transformers_does(
    tmp_path: Path, kind: str, weights: set[str], kernel: str
) -> None:
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float16"}
    four |= {"bnb_4bit_use_double_quant": True}
    quantization = {"quant_method": "bitsandbytes", **(four if kind == "nf4" else {"load_in_8bit": True})}
    stored = {}
    for name, weight in random_llama(llama_config()).items():
        if "_proj." in name:
            tensors = library_tensors(kind, weight.float() if kind == "nf4" else weight)
            stored |= {f"{name.removesuffix('weight')}{key}": tensor for key, tensor in tensors.items()}
        else:
            stored[name] = weight
    artifact = decoder_folder(tmp_path, llama_config(quantization_config=quantization), stored)
    (reader,) = readers(request(artifact))
    row = compared(artifact, reader)
    assert (row.wrong, row.kernel, row.skipped) == ("", kernel, "")
    assert row.weights in weights
    assert len(read_folder(artifact).linears) == 14


# --- the comparison --------------------------------------------------------------------------------------------------


@DTYPES
def test_a_peer_that_only_rounds_agrees(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interop_peer, "_PROBE_ROWS", 100)  # 128 and 256 inputs: the last few are fewer
    artifact, plain = write_gptq(tmp_path)
    row = compared(artifact, peer(plain, dtype))
    name = str(dtype).removeprefix("torch.")
    assert (row.wrong, row.weights, row.dtype, row.kernel) == ("", f"ours in {name}", name, "Linear")
    assert row.mean_kl is not None
    assert row.same_top is not None
    assert 0 <= row.mean_kl < {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-2}[dtype]
    assert row.same_top > 0.9


def test_a_kernel_may_round_the_scales_first(tmp_path: Path) -> None:
    artifact, plain = write_gptq(tmp_path)
    stored = load_file(tmp_path / "decoder" / "model.safetensors")
    for name in read_folder(artifact).linears:
        scales = stored[f"{name}.scales"].float()[stored[f"{name}.g_idx"].long()].T
        plain[f"{name}.weight"] = (plain[f"{name}.weight"] / scales).round() * scales.bfloat16().float()
    row = compared(artifact, peer(plain, torch.bfloat16))
    assert (row.wrong, row.weights) == ("", "ours in bfloat16, scales too")


def test_a_kernel_that_takes_scales_for_magnitudes_is_seen(tmp_path: Path) -> None:
    artifact, plain = write_gptq(tmp_path)
    scales = load_file(tmp_path / "decoder" / "model.safetensors")[f"{DOWN}.scales"]
    plain[f"{DOWN}.weight"] *= scales.sign().repeat_interleave(32, dim=0).T
    row = compared(artifact, peer(plain))
    assert row.wrong.startswith("the weights differ")
    assert row.weights.startswith(f"{DOWN}: ")


@DTYPES
def test_one_wrong_bit_is_seen(tmp_path: Path, dtype: torch.dtype) -> None:
    artifact, plain = write_gptq(tmp_path)
    file = tmp_path / "decoder" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{DOWN}.qweight"][-1, -1] ^= 1 << 28  # the lowest of the last of eight fields
    save_file(tensors, file)
    row = compared(artifact, peer(plain, dtype))
    assert row.wrong.startswith("the weights differ")
    assert re.fullmatch(
        rf"{re.escape(DOWN)}: \d+ of 32768 weights differ from ours in {str(dtype)[6:]}, by \S+ at most", row.weights
    )


@pytest.mark.parametrize(
    ("factor", "wrong"), [(1.1, r"KL \S+ above 1e-05, what rounding to float32 explains"), (math.nan, ".*not finite.*")]
)
def test_a_peer_with_other_norms_is_seen_by_its_logits(tmp_path: Path, factor: float, wrong: str) -> None:
    artifact, plain = write_gptq(tmp_path)
    row = compared(artifact, peer(plain | {"model.norm.weight": factor * plain["model.norm.weight"]}))
    assert row.weights == "ours in float32"
    assert re.fullmatch(wrong, row.wrong)


def test_a_peer_that_fails_is_wrong(tmp_path: Path) -> None:
    artifact, _ = write_gptq(tmp_path)
    row = compared(artifact, Reader(name="peer", needs=(), load=lambda _: 1 / 0))
    assert row.wrong == "cannot read it: ZeroDivisionError: division by zero"
    assert table([row]).splitlines()[-1] == f"peer WRONG: {row.wrong}"


# --- the command -----------------------------------------------------------------------------------------------------


def python_that(tmp_path: Path, does: str) -> str:
    """Write a program that is called as the peers' Python is: -I, the script, the folder of request and answers."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    return str(program)


def test_an_artifact_in_fp16_is_read_by_transformers_where_this_project_cannot_be_imported(
    tmp_path: Path, tiny_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = "import sys, runpy; sys.argv = sys.argv[2:]; sys.modules |= dict.fromkeys(('lite', 'kernels', 'export', "
    hidden += "'benchmarks')); runpy.run_path(sys.argv[0], run_name='__main__')"
    python = python_that(tmp_path, f'exec {sys.executable} -I -c "{hidden}" "$@"')
    assert main(["interop", str(tiny_artifact.path), "--python", python]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^python 3\.\S+, torch \S+, transformers \S+", printed, re.MULTILINE)
    assert re.search(r"\| transformers \| Linear \| +float16 \| .* ours in float32 \|\n", printed)
    assert "decoder: 16 bits, 15 linears" in printed
    assert "1 of 1 readings agree with ours" in printed


def test_what_a_failed_peer_has_said_is_shown(
    tmp_path: Path, tiny_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = '{"versions": {}, "answers": {"peer": {"failed": "RuntimeError: 42"}}}'
    python = python_that(tmp_path, f"echo no such kernel >&2; echo '{answers}' > $3/answers.json")
    assert main(["interop", str(tiny_artifact.path), "--python", python]) == 1
    printed = capsys.readouterr()
    assert printed.err == "  | no such kernel\n"
    assert "peer WRONG: cannot read it: RuntimeError: 42" in printed.out


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is not None, reason="gptqmodel is installed")
def test_without_the_peers_a_gptq_folder_does_not_pass(
    tiny_gptq_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        interop_peer.main(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setattr(subprocess, "run", in_this_process)
    assert main(["interop", str(tiny_gptq_artifact.path), "--python", sys.executable, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["versions"]["torch"] == torch.__version__
    folder = document["folders"][str(tiny_gptq_artifact.path / "decoder")]
    # About half.
    assert 0.4 < folder["negative_scales"] / folder["scales"] < 0.6
    rows = folder["readings"]
    assert [row["reader"] for row in rows] == ["transformers", "gptq_torch", "gptq_torch_fused", "gptqmodel"]
    assert re.search(r"gptqmodel and .*not installed: run this by `make interop`", rows[1]["skipped"])
    assert rows[-1]["wrong"] == "no peer read this folder"


def test_what_a_peer_cannot_do_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())  # as if all were installed
    by_row, plain = write_gptq(tmp_path / "row", 4, -1)
    with_head, _ = write_gptq(tmp_path / "head", 8, 64, head=True)
    monkeypatch.setattr(interop_peer, "_load_gptq_by", lambda _backend, _dtype, _folder: llama(plain))
    monkeypatch.setattr(interop_peer, "_load_by_gptqmodel", lambda _: 1 / 0)

    def rows(artifact: Artifact) -> dict[str, Comparison]:
        return {reader.name: compared(artifact, reader) for reader in readers(request(artifact))}

    by_reader = rows(by_row)
    skipped = [reader for reader, row in by_reader.items() if row.skipped]
    assert skipped == ["transformers", "gptq_torch_fused", "gptqmodel"]
    assert "group size -1" in by_reader["gptqmodel"].skipped
    assert by_reader["gptq_torch"].wrong == ""
    skipped = [reader for reader, row in rows(with_head).items() if "lm_head" in row.skipped]
    assert skipped == ["transformers", "gptq_torch", "gptq_torch_fused"]


def test_what_is_not_there_ends_the_command(
    tmp_path: Path, tiny_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["interop", str(tmp_path / "nothing")]) == 1
    assert re.search(r"^error: .*nothing", capsys.readouterr().err)
    assert main(["interop", str(tiny_artifact.path), "--python", str(tmp_path / "python")]) == 1
    assert "python: got No such file or directory · expected the Python of the peers'" in capsys.readouterr().err


def test_its_environment_is_pinned_and_shares_the_projects_versions() -> None:
    def pins(path: Path) -> dict[str, str]:
        lines = [line.partition(";")[0].strip() for line in path.read_text().splitlines() if "< " not in line]
        return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))

    peers, ours = pins(REQUIREMENTS), pins(ROOT / "constraints.txt")
    assert {"gptqmodel", "optimum", "accelerate"} <= set(peers)
    for package in ("torch", "transformers", "safetensors", "bitsandbytes"):
        assert peers[package] == ours[package], package
