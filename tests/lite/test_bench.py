"""`python -m lite.bench` from the command line to its figures, with real processes and the real runtime."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from bench_command import FAST, bench, job_of, write_list
from repository import ROOT
from tiny import relist

from lite.artifact import open as artifact_module
from lite.artifact.open import Artifact
from lite.bench import __main__ as cli
from lite.bench.costs import disk_bytes, out_of_memory, traffic_of
from lite.bench.measure import _Loop
from lite.bench.results import NotRun, Throughput
from lite.bench.run import _notes, _runs
from lite.config import DecoderConfig
from lite.engines.options import LoadOptions
from lite.eval.figures import Missing, quantiles
from lite.model import FindingsModel
from lite.studies.study import Study


@pytest.fixture(scope="module")
def benched(
    tiny_artifact: Artifact, films: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, Any], Path]:
    """The tiny artifact against a record of itself, with everything that can be written."""
    folder = tmp_path_factory.mktemp("bench")
    listed = write_list(folder, films[:3])
    data = ("--data", str(listed))
    assert cli.main(["record", str(tiny_artifact.path), *data, "--out", str(folder / "fp16"), "--device", "cpu"]) == 0
    outputs = ("--json", str(folder / "bench.json"), "--html", str(folder / "bench.html"))
    status = cli.main([str(tiny_artifact.path), *data, "--reference", str(folder / "fp16"), *FAST[:-2], *outputs])
    return status, json.loads((folder / "bench.json").read_text()), folder


def test_every_figure_is_taken(benched: tuple[int, dict[str, Any], Path], tiny_artifact: Artifact) -> None:
    status, document, _ = benched
    assert status == 0
    (row,) = document["rows"]
    assert row["artifact_id"] == tiny_artifact.id
    assert row["disk_bytes"] == tiny_artifact.nbytes
    assert (row["num_runs"], row["num_warmup"]) == (4, 2)
    for stage, times in row["latency"].items():
        assert 0 < times["p20"] <= times["p50"] <= times["p80"] <= times["p90"] <= times["p99"] < 60, stage
    assert row["latency"]["decode_token"]["count"] >= 4
    assert row["latency"]["total"]["p50"] > row["latency"]["ttft"]["p50"] > row["latency"]["vision"]["p50"]
    (batch,) = row["batches"]
    assert (batch["batch_size"], batch["num_studies"]) == (2, 2)
    assert batch["studies_per_min"]["p50"] > 0
    assert batch["plan"]["cache_bytes"] == 2 * row["plan"]["cache_bytes"]
    memory = row["memory"]
    stages = [memory[f"{stage}_bytes"] for stage in ("before", "load", "image", "vision", "prefill", "decode")]
    assert stages == sorted(stages)
    assert 50e6 < stages[0] < stages[-1] < 2e9
    traffic = row["traffic"]
    assert 0 < traffic["achieved"] < traffic["bandwidth"] < 1e13
    read = traffic["weight_bytes"] + traffic["cache_bytes"]
    assert traffic["achieved"] * row["latency"]["decode_token"]["p50"] == pytest.approx(read, rel=1e-4)
    # float32 on a CPU: every linear and the head once, keys and values of the prompt and half of the text.
    config = tiny_artifact.decoder_config()
    assert traffic["weight_bytes"] == linear_weights(config) * 4
    context = row["num_prompt_tokens"] + row["tokens_per_study"] / 2
    in_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert traffic["cache_bytes"] == pytest.approx(context * in_token, rel=0.2)
    assert row["energy_j"]["why"] == "no GPU"


@pytest.fixture(scope="module")
def both(
    tiny_onnx_artifact: Artifact, films: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One artifact by torch and by onnx, with an int8 cache."""
    folder = tmp_path_factory.mktemp("both")
    arguments = ["--data", str(write_list(folder, films[:2])), "--engine", "both", "--cache-dtype", "int8"]
    assert cli.main([str(tiny_onnx_artifact.path), *arguments, *FAST, "--json", str(folder / "j.json")]) == 0
    torch_row, onnx_row = json.loads((folder / "j.json").read_text())["rows"]
    return torch_row, onnx_row


def test_both_engines_have_a_row_each(both: tuple[dict[str, Any], ...], tiny_onnx_artifact: Artifact) -> None:
    ran = [[row[key] for key in ("name", "engine", "device", "dtype", "cache_dtype", "provider")] for row in both]
    assert ran == [
        ["artifact torch", "torch", "cpu", "float32", "int8", "CPU"],
        ["artifact onnx", "onnx", "cpu", "float32", "int8", "CPU"],
    ]
    assert {row["artifact_id"] for row in both} == {tiny_onnx_artifact.id}
    assert [(row["backend"], row["fallbacks"]) for row in both] == [("torch", []), ("onnxruntime", [])]
    assert all(row["latency"]["total"]["p50"] > 0 for row in both)


def test_measuring_onnx_loads_no_torch(both: tuple[dict[str, Any], ...]) -> None:
    """torch alone takes 150 MB and more; what is left is Python, numpy and ONNX Runtime."""
    of_torch, of_onnx = ([row["memory"]["before_bytes"], row["memory"]["decode_bytes"]] for row in both)
    assert of_onnx[0] < 110e6 < of_torch[0]
    assert of_onnx[1] < 160e6 < of_torch[1]


def test_the_plan_of_the_onnx_engine_is_close(both: tuple[dict[str, Any], ...]) -> None:
    row = both[1]
    plan = sum(row["plan"][part] for part in row["plan"] if part.endswith("_bytes") and part != "load_work_bytes")
    assert plan == pytest.approx(row["memory"]["decode_bytes"], rel=0.1)


def test_traffic_of_the_onnx_engine_is_what_its_graph_holds(
    both: tuple[dict[str, Any], ...], tiny_onnx_artifact: Artifact
) -> None:
    """Integers and float scales, once; keys and values a byte each."""
    file = tiny_onnx_artifact.path / "decoder.onnx"
    constants = onnx.load(file, load_external_data=False).graph.initializer
    held = sum(
        int(entry.value)
        for constant in constants if constant.name.endswith((".values", ".scales"))
        for entry in constant.external_data if entry.key == "length"
    )  # fmt: skip
    traffic, config = both[1]["traffic"], tiny_onnx_artifact.decoder_config()
    assert traffic["weight_bytes"] == held > 0
    context = both[1]["num_prompt_tokens"] + both[1]["tokens_per_study"] / 2
    in_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert traffic["cache_bytes"] == pytest.approx(context * in_token, rel=0.2)


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_bytes_on_disk_are_those_that_the_engine_reads(
    engine: Any, tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    whole = artifact_module.sha256_of
    monkeypatch.setattr(artifact_module, "sha256_of", lambda file: hashed.append(file) or whole(file))
    tiny_onnx_artifact.verify(engine=engine)
    assert disk_bytes(tiny_onnx_artifact, engine) == sum(file.stat().st_size for file in hashed)
    assert 0 < disk_bytes(tiny_onnx_artifact, engine) < tiny_onnx_artifact.nbytes


def test_an_artifact_without_decoder_onnx_is_measured_by_torch_alone(
    tiny_artifact: Artifact, tiny_onnx_artifact: Artifact, films: list[Path], tmp_path: Path
) -> None:
    paths = [tiny_artifact.path, tiny_onnx_artifact.path]
    own_settings = ("--device", "cpu", "--dtype", "float32", "--provider", "cpu", "--batch-sizes", "1,3")
    given = (*paths, "--data", write_list(tmp_path, films[:1]), "--engine", "both", *own_settings)
    job = job_of(*given, "--cache-dtype", "int8")
    common = {"cache_dtype": "int8", "rows": 3, "verify": False}
    torch = LoadOptions(engine="torch", device="cpu", dtype="float32", **common)
    onnx_only = LoadOptions(engine="onnx", provider="cpu", **common)
    names = [name for name, _ in job.artifacts]
    assert list(_runs(job)) == [
        (names[0], paths[0], torch), (f"{names[1]} torch", paths[1], torch), (f"{names[1]} onnx", paths[1], onnx_only)
    ]  # fmt: skip
    assert _notes(job, []) == (f"{names[0]}: by torch alone, as it has no decoder.onnx.",)
    # A float cache is that of the activations, which are each engine's own.
    ways = job_of(*given, "--cache-dtype", "float32").ways
    assert {engine: options.cache_dtype for engine, options in ways.items()} == {"torch": None, "onnx": "float32"}


def test_what_was_asked_for_reaches_the_loader(tiny_artifact: Artifact, films: list[Path], tmp_path: Path) -> None:
    given = ("--device", "cpu", "--dtype", "bfloat16", "--cache-dtype", "int8", "--memory-limit", "1GiB")
    job = job_of(tiny_artifact.path, "--data", write_list(tmp_path, films[:1]), *given)
    expected = LoadOptions(
        device="cpu", dtype="bfloat16", cache_dtype="int8", memory_limit=1 << 30, rows=4, verify=False
    )  # fmt: skip
    assert job.ways == {"": expected}


def test_a_gpu_plan_of_one_study_counts_the_rows_that_are_there(tiny_model: FindingsModel) -> None:
    """A GPU holds the cache of all rows from the first study on, a CPU only that of the rows in use."""
    job = SimpleNamespace(max_new_tokens=2)
    on_gpu = dataclasses.replace(tiny_model.plan.workload, device="cuda", num_rows=4)
    gpu_plan = dataclasses.replace(tiny_model.plan, workload=on_gpu)
    for plan, rows in ((gpu_plan, 4), (tiny_model.plan, 1)):
        loop = _Loop(model=SimpleNamespace(plan=plan), job=job, on_progress=lambda *_: None)
        assert (loop.planned(1, 100).num_rows, loop.planned(5, 100).num_rows) == (rows, 5)


NO_TORCH = """
import importlib.machinery
finder = importlib.machinery.PathFinder
whole = finder.find_spec
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in ("torch", "safetensors") else whole(name, path, target)
finder.find_spec = classmethod(find_spec)
"""


@pytest.mark.full
def test_the_onnx_engine_is_measured_where_there_is_no_torch(
    tiny_onnx_artifact: Artifact, films: list[Path], tmp_path: Path
) -> None:
    # Python runs this file at its start: in the bench, and in the process that it measures in.
    (tmp_path / "sitecustomize.py").write_text(NO_TORCH)
    listed = write_list(tmp_path, films[:1])
    command = [sys.executable, "-m", "lite.bench", str(tiny_onnx_artifact.path), "--data", str(listed)]
    command += ["--engine", "both", *FAST[2:], "--json", str(tmp_path / "j.json")]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0
    assert "By onnx alone, as torch is not installed." in done.stdout
    (row,) = json.loads((tmp_path / "j.json").read_text())["rows"]
    assert (row["engine"], row["cache_dtype"]) == ("onnx", "float32")
    assert row["traffic"]["achieved"] > 0


def test_a_gpu_that_cannot_be_asked_leaves_a_gap_with_its_reason(tiny_onnx_artifact: Artifact) -> None:
    missing = traffic_of(tiny_onnx_artifact, [SimpleNamespace(device="dml", engine="onnx")])
    assert isinstance(missing, Missing)
    assert "got the device 'dml'" in missing.todo


def linear_weights(config: DecoderConfig) -> int:
    """The weights of all linears, the head's among them, counted once more by hand."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * hidden * (2 * q + 2 * kv + 3 * inner) + config.vocab_size * hidden


def test_a_model_loses_nothing_against_itself(benched: tuple[int, dict[str, Any], Path]) -> None:
    _, document, _ = benched
    quality = document["rows"][0]["record_quality"]
    assert quality["divergence"]["mean_kl"]["value"] == pytest.approx(0, abs=1e-9)
    assert quality["divergence"]["same_top"]["value"] == 1
    assert quality["same_text"]["value"] == 1
    assert quality["kl_gap_limit"] > 0.01  # a flat distribution over 420 tokens, of which 64 are known
    assert quality["bleu_1"]["value"] == quality["rouge_l"]["value"] == pytest.approx(1)
    assert document["rows"][0]["report_quality"] == document["reference_report_quality"]
    assert [study["reference_text"] for study in document["studies"]] == [
        draft["text"] for draft in document["rows"][0]["drafts"]
    ]


def test_the_report_is_there(benched: tuple[int, dict[str, Any], Path]) -> None:
    page = (benched[2] / "bench.html").read_text(encoding="utf-8")
    assert "Not for clinical use" in page
    assert page.count("data:image") >= 3
    assert not list(benched[2].glob("*.partial"))


def test_another_model_is_told_from_the_reference(
    benched: tuple[int, dict[str, Any], Path],
    tmp_path: Path,
    tiny_artifact: Artifact,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One layer's weights off by a third: the same size, the same speed, another distribution."""
    other = damaged(tiny_artifact.path, tmp_path / "other", factor=1.3)
    settings = ("--data", benched[2] / "list.json", "--reference", benched[2] / "fp16", *FAST[:-2])
    status, out, _ = bench(capsys, other, *settings, "--json", tmp_path / "j.json")
    assert status == 0
    (off,) = json.loads((tmp_path / "j.json").read_text())["rows"]
    same = benched[1]["rows"][0]
    assert same["disk_bytes"] == off["disk_bytes"]
    mean_kl = [row["record_quality"]["divergence"]["mean_kl"]["value"] for row in (same, off)]
    assert mean_kl[0] < 1e-9 < 1e-4 < mean_kl[1]
    assert "Not for clinical use" in out
    assert all(word in out for word in ("other", "mean KL", "TTFT", "tokens/s", "planned", "Machine:", "Reference:"))
    # Each line of the comparison names what was measured, and how.
    (line,) = [line for line in out.splitlines() if line.startswith("| other ")]
    assert [cell.strip() for cell in line.split("|")][2:4] == ["fp16", "torch on cpu, float32"]


def damaged(source: Path, out: Path, *, factor: float) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    weights = out / "decoder" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name] * factor}, weights)
    relist(out, "decoder/model.safetensors")
    return out


def test_what_fails_is_told_of_and_does_not_stop_the_rest(
    tiny_artifact: Artifact, own_artifact: Path, films: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged artifact is a row of its own, a film that is missing is skipped and counted."""
    (own_artifact / "tokenizer.model").write_bytes(b"x" * (own_artifact / "tokenizer.model").stat().st_size)
    listed = write_list(tmp_path, films[:2], missing=True)
    outputs = ("--json", tmp_path / "j.json")
    status, out, err = bench(capsys, own_artifact, tiny_artifact.path, "--data", listed, *FAST, *outputs)
    assert status == 1
    assert "error: own: " in err
    assert "the file is damaged" in err
    assert "skipped by artifact: " in err
    assert "not-there.png: got no such file" in err
    assert "no reference" in out
    failed, measured = json.loads((tmp_path / "j.json").read_text())["rows"]
    assert "sha256" in failed["error"]
    assert measured["latency"]["total"]["p50"] > 0
    assert [draft["error"] is None for draft in measured["drafts"]] == [True, True, False]


def test_a_memory_limit_below_the_plan_is_refused_with_its_parts(
    tiny_artifact: Artifact, films: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = write_list(tmp_path, films[:1])
    status, _, err = bench(capsys, tiny_artifact.path, "--data", listed, *FAST, "--memory-limit", "64MiB")
    assert status == 1
    assert "got a memory limit of 64.0 MiB · expected at least" in err
    assert "Python and its packages" in err


def test_a_record_of_other_studies_is_refused(
    benched: tuple[int, dict[str, Any], Path], tiny_artifact: Artifact, films: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    record = benched[2] / "fp16"
    for chosen, missing, message in (
        (films[1:4], False, "got studies of sha256"),
        (films[:2], True, "got 1 of 3 studies without their film"),
    ):
        listed = write_list(tmp_path, chosen, missing=missing)
        status, _, err = bench(capsys, tiny_artifact.path, "--data", listed, "--reference", record)
        assert status == 1
        assert message in err


def test_a_record_of_the_first_studies_is_compared_on_those(
    benched: tuple[int, dict[str, Any], Path], tiny_artifact: Artifact, films: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    listed = write_list(tmp_path, films[:4])
    settings = ("--data", listed, "--reference", benched[2] / "fp16")
    job = job_of(tiny_artifact.path, *settings)
    assert [study.id for study in job.studies] == ["s0", "s1", "s2"]
    assert "the record is of the first 3 of 4 studies: taking those" in capsys.readouterr().err
    status, _, err = bench(capsys, tiny_artifact.path, *settings, "--limit", 2)
    assert status == 1
    assert "got 2 studies · expected the first 3, " in err
    assert err.rstrip().endswith("give --limit 3")


def test_a_batch_that_memory_is_too_small_for_is_not_the_end(
    tiny_model: FindingsModel, films: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is full at some batch size; what was measured before stays."""
    studies = [Study(id="1", image=films[0], reason=None)]
    whole = type(tiny_model).findings_batch

    def full(model: FindingsModel, batch: Any, *, batch_size: int, **others: Any) -> Any:
        if batch_size == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nand much more")
        return whole(model, batch, batch_size=batch_size, **others)

    monkeypatch.setattr(type(tiny_model), "findings_batch", full)
    job = SimpleNamespace(batch_sizes=(1, 2), max_new_tokens=2)
    done, not_run = _Loop(model=tiny_model, job=job, on_progress=lambda *_: None).batches(studies, 100)
    assert isinstance(done, Throughput)
    assert isinstance(not_run, NotRun)
    assert not_run.why == "CUDA out of memory. Tried to allocate 2.00 GiB"
    with pytest.raises(RuntimeError, match="shapes"):
        out_of_memory(RuntimeError("shapes do not fit"))


def test_the_runtime_tells_the_same_times(tiny_model: FindingsModel, films: list[Path]) -> None:
    findings = tiny_model.findings(films[0])
    assert findings.timings.total_s == pytest.approx(
        findings.timings.ttft_s + sum(findings.timings.decode_steps_s), rel=1e-9
    )


def test_quantiles() -> None:
    found = quantiles([float(value) for value in range(101)])
    assert (found.p20, found.p50, found.p80, found.p90, found.p99, found.count) == (20, 50, 80, 90, 99, 101)
