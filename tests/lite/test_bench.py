"""`python -m lite.bench` from the command line to its figures, with real processes and the real runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import onnx
import pytest
from bench_command import FAST, bench, job_of, work, write_list
from repository import ROOT
from safetensors.torch import load_file, save_file
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


class Done(NamedTuple):
    """What a bench has left."""

    status: int
    document: dict[str, Any]
    folder: Path
    out: str
    err: str


def run(folder: Path, *arguments: object) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr("lite.bench.run._work", work)
        status = cli.main([*map(str, arguments), "--json", str(folder / "bench.json")])
    return Done(status, json.loads((folder / "bench.json").read_text()), folder, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def benched(tiny_artifact: Artifact, films: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The tiny artifact against a record of itself, another model, and one that cannot be loaded, with a report."""
    folder = tmp_path_factory.mktemp("bench")
    data = ("--data", str(write_list(folder, films[:3])))
    assert cli.main(["record", str(tiny_artifact.path), *data, "--out", str(folder / "fp16"), "--device", "cpu"]) == 0
    other = damaged(tiny_artifact.path, folder / "other", factor=1.3)
    broken = Path(shutil.copytree(tiny_artifact.path, folder / "broken"))
    (broken / "tokenizer.model").write_bytes(b"x" * (broken / "tokenizer.model").stat().st_size)
    settings = ("--reference", folder / "fp16", *FAST[:-2], "--html", folder / "bench.html")
    return run(folder, tiny_artifact.path, other, broken, *data, *settings)


def damaged(source: Path, out: Path, *, factor: float) -> Path:
    """One layer's weights off by a factor: the same size, the same speed, another distribution."""
    shutil.copytree(source, out)
    weights = out / "decoder" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name] * factor}, weights)
    relist(out, "decoder/model.safetensors")
    return out


def test_every_figure_is_taken(benched: Done, tiny_artifact: Artifact) -> None:
    row = benched.document["rows"][0]
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
def both(tiny_onnx_artifact: Artifact, films: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One artifact by torch and by onnx, with an int8 cache, on two films and one that is not there."""
    folder = tmp_path_factory.mktemp("both")
    settings = ("--data", write_list(folder, films[:2], missing=True), "--engine", "both", "--cache-dtype", "int8")
    return run(folder, tiny_onnx_artifact.path, *settings, *FAST)


def test_both_engines_have_a_row_each(both: Done, tiny_onnx_artifact: Artifact) -> None:
    rows = both.document["rows"]
    ran = [[row[key] for key in ("name", "engine", "device", "dtype", "cache_dtype", "provider")] for row in rows]
    assert ran == [
        ["artifact torch", "torch", "cpu", "float32", "int8", "CPU"],
        ["artifact onnx", "onnx", "cpu", "float32", "int8", "CPU"],
    ]
    assert {row["artifact_id"] for row in rows} == {tiny_onnx_artifact.id}
    assert [(row["backend"], row["fallbacks"]) for row in rows] == [("torch", []), ("onnxruntime", [])]
    assert all(row["latency"]["total"]["p50"] > 0 for row in rows)


def test_a_film_that_is_missing_is_told_of_and_left_out(both: Done) -> None:
    assert both.status == 1
    assert "skipped by artifact onnx: " in both.err
    assert "not-there.png: got no such file" in both.err
    assert "no reference" in both.out
    for row in both.document["rows"]:
        assert [draft["error"] is None for draft in row["drafts"]] == [True, True, False]


def test_measuring_onnx_loads_no_torch(both: Done) -> None:
    """torch alone takes 150 MB and more; what is left is Python, numpy and ONNX Runtime."""
    memory = [row["memory"] for row in both.document["rows"]]
    of_torch, of_onnx = ([use["before_bytes"], use["decode_bytes"]] for use in memory)
    assert of_onnx[0] < 110e6 < of_torch[0]
    assert of_onnx[1] < 160e6 < of_torch[1]


def test_the_plan_of_the_onnx_engine_is_close(both: Done) -> None:
    row = both.document["rows"][1]
    plan = sum(row["plan"][part] for part in row["plan"] if part.endswith("_bytes") and part != "load_work_bytes")
    assert plan == pytest.approx(row["memory"]["decode_bytes"], rel=0.1)


def test_traffic_of_the_onnx_engine_is_what_its_graph_holds(both: Done, tiny_onnx_artifact: Artifact) -> None:
    """Integers and float scales, once; keys and values a byte each."""
    row = both.document["rows"][1]
    file = tiny_onnx_artifact.path / "decoder.onnx"
    constants = onnx.load(file, load_external_data=False).graph.initializer
    held = sum(
        int(entry.value)
        for constant in constants if constant.name.endswith((".values", ".scales"))
        for entry in constant.external_data if entry.key == "length"
    )  # fmt: skip
    traffic, config = row["traffic"], tiny_onnx_artifact.decoder_config()
    assert traffic["weight_bytes"] == held > 0
    context = row["num_prompt_tokens"] + row["tokens_per_study"] / 2
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


def test_films_that_an_artifact_was_calibrated_on_are_told_by_their_bytes(
    tiny_artifact: Artifact, films: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / "calibrated"
    shutil.copytree(tiny_artifact.path, other)
    manifest = json.loads((other / "manifest.json").read_text())
    record = {
        "data": "a.json",
        "sha256": "0" * 64,
        "studies": 1,
        "tokens": 9,
        "token_weights": {"image": 1.0},
        "measured": False,
    }
    # The first film, whatever it is called, and one that is not judged.
    seen = [artifact_module.sha256_of(films[0])[:16], "0" * 16]
    manifest["parts"]["decoder"]["calibration"] = record | {"films": seen}
    (other / "manifest.json").write_text(json.dumps(manifest))
    job = job_of(tiny_artifact.path, other, "--data", write_list(tmp_path, films[:2]))
    assert _notes(job, []) == ("calibrated: was calibrated on 1 of these 2 films: what it loses flatters.",)


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


def test_each_number_of_image_tokens_is_a_row_of_each_method(
    tiny_artifact: Artifact, films: list[Path], tmp_path: Path
) -> None:
    given = ("--image-tokens", "4,1", "--image-methods", "mean", "random")
    job = job_of(tiny_artifact.path, "--data", write_list(tmp_path, films[:1]), *given)
    (name, _), runs = job.artifacts[0], list(_runs(job))
    assert [run for run, _, _ in runs] == [f"{name} 4", f"{name} 1 mean", f"{name} 1 random"]  # 4 are all there are
    options = [(options.image_tokens, options.image_method) for _, _, options in runs]
    assert options == [(4, "mean"), (1, "mean"), (1, "random")]


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


def test_a_model_loses_nothing_against_itself_and_another_is_told_from_it(benched: Done) -> None:
    same, off, _ = benched.document["rows"]
    kl = [row["record_quality"]["divergence"]["mean_kl"]["value"] for row in (same, off)]
    assert kl[0] < 1e-9 < 1e-4 < kl[1]
    assert same["disk_bytes"] == off["disk_bytes"]
    quality = same["record_quality"]
    assert quality["divergence"]["same_top"]["value"] == quality["same_text"]["value"] == 1
    assert quality["kl_gap_limit"] > 0.01  # a flat distribution over 420 tokens, of which 64 are known
    assert quality["bleu_1"]["value"] == quality["rouge_l"]["value"] == pytest.approx(1)
    assert same["report_quality"] == benched.document["reference_report_quality"]
    shown = [study["reference_text"] for study in benched.document["studies"]]
    assert shown == [draft["text"] for draft in same["drafts"]]


def test_the_tables_and_the_report_are_there(benched: Done) -> None:
    words = ("Not for clinical use", "mean KL", "TTFT", "tokens/s", "planned", "Machine:", "Reference:")
    assert all(word in benched.out for word in words)
    # Each line of the comparison names what was measured, and how.
    (line,) = [line for line in benched.out.splitlines() if line.startswith("| other ")]
    assert [cell.strip() for cell in line.split("|")][2:4] == ["fp16", "torch on cpu, float32"]
    page = (benched.folder / "bench.html").read_text(encoding="utf-8")
    assert "Not for clinical use" in page
    assert page.count("data:image") >= 3
    assert not list(benched.folder.glob("*.partial"))


def test_an_artifact_that_cannot_be_loaded_is_a_row_and_does_not_stop_the_rest(benched: Done) -> None:
    assert benched.status == 1
    assert re.search("error: broken: .*the file is damaged", benched.err)
    assert "sha256" in benched.document["rows"][2]["error"]


def test_a_record_of_the_first_studies_is_compared_on_those(
    benched: Done, tiny_artifact: Artifact, films: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    listed = write_list(tmp_path, films[:4])
    settings = ("--data", listed, "--reference", benched.folder / "fp16")
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


def test_quantiles() -> None:
    found = quantiles([float(value) for value in range(101)])
    assert (found.p20, found.p50, found.p80, found.p90, found.p99, found.count) == (20, 50, 80, 90, 99, 101)
