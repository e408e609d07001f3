"""`python -m benchmarks speed peers`, on a model of a few thousand weights: engines that are installed, and not.

llama.cpp lives in an environment of its own; where there is none, its rows say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from repository import ROOT

from benchmarks.speed.peers import lite_decoder, lite_onnx, main, measure, onnx_artifact, worker
from benchmarks.speed.peers.engine import Engine, Unavailable
from benchmarks.speed.peers.engines import PEERS_PYTHON, REFERENCE, SPECS
from benchmarks.speed.peers.estimate import Costs, Line, estimate, measured_costs, modelled_costs
from benchmarks.speed.peers.lite_decoder import LiteEngine, TinygemmLinear, round_to_groups
from benchmarks.speed.peers.llamacpp import gguf_name
from benchmarks.speed.peers.measure import Depth, Measured, NoRow, Row, Runner, Setting, groups, needed_bytes
from benchmarks.speed.peers.ratios import THEIRS, Ratios, against_llama_cpp
from benchmarks.speed.peers.report import format_report, prefill_flop
from benchmarks.speed.peers.weights import Model
from benchmarks.speed.synthetic import Widths
from lite.artifact.open import Artifact, load_artifact
from lite.bench.measure import quantiles
from lite.bench.results import Missing
from lite.engines.torch_engine.decoder import load_decoder
from lite.errors import LiteError

# A vocabulary as large as the tokenizer that an artifact gets.
WIDTHS = Widths(hidden_size=128, intermediate_size=256, num_attention_heads=2, vocab_size=1024)
TINY = ("--widths", "128", "256", "2", "1024", "--layers", "2", "--prompt-tokens", "24", "--new-tokens", "5")
QUICK = (*TINY, "--rounds", "2", "--threads", "1")
SPEC = {spec.name: spec for spec in SPECS}


def tiny_model(layers: int = 2) -> Model:
    return Model(config=WIDTHS.llama_config(layers), shapes=WIDTHS.base_shapes(layers), seed=0, max_seq_len=40)


def tiny_setting(**changes: Any) -> Setting:
    values: dict[str, Any] = {
        "model": tiny_model(),
        "num_prompt_tokens": 24,
        "num_new_tokens": 5,
        "rounds": 2,
        "threads": 1,
        "limit_s": 30.0,
        "device": "cpu",
        "peers_python": PEERS_PYTHON,
    }
    return Setting(**(values | changes))


@pytest.fixture(scope="module", autouse=True)
def hurried() -> Iterator[None]:
    """Leave out what is only there for true times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_SETTLE_S", 0.0)
        # What an engine sets in its own process is undone here.
        patch.setattr("os.environ", dict(os.environ))
        yield


class Ran:
    """One run of the command: exit status, table, and the rows of its JSON document."""

    def __init__(self, out: Path, *arguments: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.status = main([*QUICK, *arguments, "--json", str(out)])
        self.files = out.parent
        self.table = printed.getvalue()
        self.document = json.loads(out.read_text(encoding="utf-8"))
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in self.document["rows"]}

    def cells(self, name: str) -> list[str]:
        """Return an engine's row in the first table."""
        line = next(line for line in self.table.splitlines() if line.startswith(f"| {name} "))
        return [cell.strip() for cell in line.strip("|").split("|")]


ONNX = ["lite onnx int4", "lite onnx int4 int8-cache"]
MEASURED = ["lite dense", *ONNX]
LLAMA_CPP = ["llama.cpp Q4_0", "llama.cpp Q8_0 flash"]
ABSENT = ["transformers float16", "gemlite int4"]
LINEARS, HEAD, NORMS = 2 * (4 * 128 * 128 + 3 * 128 * 256), 128 * 1024, 5 * 128


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_artifact: Artifact) -> Ran:
    files = tmp_path_factory.mktemp("ran")
    vision = "--vision", str(tiny_artifact.path)
    with pytest.MonkeyPatch.context() as patch:
        # The engines' files stay.
        patch.setattr(measure.tempfile, "TemporaryDirectory", lambda **_: contextlib.nullcontext(files))
        out = files / "peers.json"
        return Ran(out, "--device", "cpu", *vision, "--engines", *MEASURED, *LLAMA_CPP, *ABSENT)


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One engine dies in a round, one computes something else, one is not installed, and no prefill is worth it."""
    ask = measure.Worker.ask

    def die_in_a_round(self: measure.Worker, what: str, **arguments: Any) -> dict[str, Any]:
        if what == "round" and self.about["computes_in"].startswith("bfloat16"):
            self._process.send_signal(signal.SIGSEGV)
        return ask(self, what, **arguments)

    wrong = dataclasses.replace(SPEC["lite gptq-int4"], max_difference=0.01)
    absent = dataclasses.replace(SPEC["llama.cpp Q8_0"], packages=("no-such-engine",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.Worker, "ask", die_in_a_round)
        patch.setattr(measure, "measured_bandwidth", lambda _: 1e9)
        patch.setattr("benchmarks.speed.peers.command.SPECS", (REFERENCE, SPEC["tinygemm int4"], wrong, absent))
        out = tmp_path_factory.mktemp("troubled") / "peers.json"
        return Ran(out, "--limit-s", "1e-9", "--engines", "tinygemm int4", wrong.name, absent.name)


# --- the command -----------------------------------------------------------------------------------------------------


def test_engines_are_measured_or_have_a_reason(ran: Ran) -> None:
    assert ran.status == 0
    assert list(ran.rows) == [spec.name for spec in SPECS if spec.name in {*MEASURED, *LLAMA_CPP, *ABSENT}]
    assert [name for name in MEASURED if "why" in ran.rows[name]] == []
    for name in ABSENT:
        assert ran.cells(name)[:3] == [name, "needs a CUDA GPU", "–"]
    for name in LLAMA_CPP:
        here = PEERS_PYTHON.exists()
        assert here or ran.cells(name)[1].endswith("not installed: make peers")


@pytest.mark.parametrize("name", MEASURED)
def test_figures_are_of_the_size_they_must_have(ran: Ran, name: str) -> None:
    row = ran.rows[name]
    assert (row["decode"]["count"], row["prefill"]["count"]) == (2 * 5, 2)
    for times in (row["decode"], row["prefill"]):
        assert 0 < times["p20"] <= times["p50"] <= times["p80"] < 5
    assert row["shallow"]["num_layers"] == (1 if name in ONNX else 0)
    assert row["bandwidth"] > 1e8
    assert 3e7 < row["peak_bytes"] < 2e9
    # One token was decoded before the five that are timed: the third of these attends over 24 + 1 + 3.
    assert row["cache_bytes"] == 2 * 2 * 128 * 28 * (1 if "int8-cache" in name else 4)
    assert all(float(cell.replace(",", "")) > 0 for cell in ran.cells(name)[3:5])


@pytest.mark.parametrize("name", ONNX)
def test_our_onnx_engine_computes_what_the_reference_does(ran: Ran, name: str) -> None:
    row = ran.rows[name]
    assert 0.02 < row["difference"] < 0.25
    # Integers, a float32 scale for a block of 128; the head in 8 bits.
    assert row["weight_bytes"] == LINEARS // 2 + HEAD + (LINEARS + HEAD) // 128 * 4 + 4 * NORMS
    assert row["load_s"] > 0
    assert float(ran.cells(name)[11]) == pytest.approx(row["load_s"], rel=0.01)
    # torch wrote the artifact in another process.
    assert row["peak_bytes"] < 0.5 * ran.rows["lite dense"]["peak_bytes"]


def test_an_int8_cache_is_another_computation(ran: Ran) -> None:
    float32, int8 = (ran.rows[name] for name in ONNX)
    assert float32["difference"] != int8["difference"] == pytest.approx(float32["difference"], rel=0.1)
    assert [row["computes_in"].rpartition(" ")[2] for row in (float32, int8)] == ["float32", "int8"]
    assert ran.rows["lite dense"]["load_s"] is None


def test_the_tower_takes_its_turns(ran: Ran) -> None:
    vision = ran.document["vision"]
    assert vision["count"] == 2
    for name in MEASURED:
        row = ran.rows[name]
        parts = vision["p50"] + row["prefill"]["p50"] + 100 * row["decode"]["p50"]
        assert row["end_to_end_s"] == pytest.approx(parts)
        assert float(ran.cells(name)[-1]) == pytest.approx(parts, rel=0.01)


def test_the_document_says_what_the_figures_depend_on(ran: Ran) -> None:
    document = ran.document
    assert document["setting"]["threads"] == 1
    assert document["setting"]["model"]["config"]["hidden_size"] == 128
    assert {"torch", "onnxruntime", "onnx"} <= document["versions"].keys()
    assert document["command"].startswith("python -m benchmarks speed peers --widths 128")
    assert f"- Command: `{document['command']}`." in ran.table
    assert document["machine"] in ran.table
    assert "modelled_32_layers" in ran.rows["lite dense"]
    del document["command"]
    assert str(ROOT) not in json.dumps(document)


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="no build/peers-venv: make peers")
def test_llama_cpp_reads_the_file_written_for_it(ran: Ran) -> None:
    for name, most in zip(LLAMA_CPP, (0.25, 0.05), strict=True):
        assert 1e-3 < ran.rows[name]["difference"] < most
        assert ran.rows[name]["shallow"]["num_layers"] == 1
    row = ran.rows["llama.cpp Q4_0"]
    assert row["weight_bytes"] == LINEARS // 32 * 18 + HEAD // 32 * 34 + 4 * NORMS
    assert row["load_s"] > 0
    assert [ratios["name"] for ratios in ran.document["ratios"] if not ratios["modelled"]] == ONNX


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_engine_that_dies_is_told_of_and_the_rest_goes_on(troubled: Ran) -> None:
    assert troubled.status == 1
    assert "- tinygemm int4 failed: its process ended with signal 11" in troubled.table
    assert troubled.cells("tinygemm int4")[1] == "failed: see below"
    assert troubled.rows["lite dense"]["decode"]["p50"] > 0


def test_no_times_of_an_engine_that_computes_something_else(troubled: Ran) -> None:
    assert "- lite gptq-int4 failed: got logits that differ from those of lite dense by 0." in troubled.table
    assert set(troubled.cells("lite gptq-int4")[1:]) == {"failed: see below", "–"}


def test_what_is_not_installed_is_no_failure(troubled: Ran, ran: Ran) -> None:
    assert troubled.cells("llama.cpp Q8_0")[1] == "no-such-engine not installed: make peers"
    assert not troubled.rows["llama.cpp Q8_0"]["failed"]
    assert ran.status == 0


def test_a_prefill_beyond_the_limit_is_not_waited_for(troubled: Ran) -> None:
    row = troubled.rows["lite dense"]
    assert row["prefill"]["why"].startswith("slower than 1e-09 s, probe of 24 tokens: ")
    assert row["decode"]["count"] == 2 * measure.MIN_NEW_TOKENS
    assert "¹ lite dense: prefill slower than 1e-09 s" in troubled.table
    # The cache is as long as after a prefill.
    assert row["cache_bytes"] == 2 * 2 * 128 * 4 * 27


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--widths", "100", "256", "2", "256"], "multiples of 128"),
        (["--widths", "128", "256", "3", "256"], "multiples of 128"),
        (["--prompt-tokens", "4090"], "at most 4096"),
        (["--engines", "vllm"], "invalid choice: 'vllm'"),
        (["--limit-s", "0"], "seconds above 0"),
    ],
)
def test_wrong_use_is_told_before_anything_runs(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "garbled"])
def test_a_broken_tower_is_told_before_anything_is_measured(
    own_artifact: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_artifact / "vision.onnx"
    file.write_bytes(file.read_bytes()[:-1] if damage == "truncated" else bytes(file.stat().st_size))
    monkeypatch.setattr(measure, "start_engine", lambda *_: pytest.fail("an engine was started"))
    assert main([*QUICK, "--engines", REFERENCE.name, "--vision", str(own_artifact)]) == 1
    said = capsys.readouterr().err
    assert str(file) in said
    assert "export the artifact again" in said


def test_whoever_ends_a_worker_ends_what_it_has_started(tmp_path: Path) -> None:
    command = ["sh", "-c", 'sleep 60 & echo "{\\"child\\": $!}"; wait']
    started = measure.Worker(command, name="a worker", threads=1, folder=tmp_path)
    status = Path(f"/proc/{started.about['child']}/status")
    assert status.exists()
    started.close()
    deadline = time.monotonic() + 120
    # Nobody may have asked for its exit status yet: then it is a zombie.
    while status.exists() and "State:\tZ" not in status.read_text(encoding="ascii"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_ends_the_workers() -> None:
    command = [sys.executable, "-m", "benchmarks.speed.peers", *TINY, "--rounds", "100000", "--engines", REFERENCE.name]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stderr is not None
        assert any(line.startswith("round 1") for line in process.stderr)
        workers = children(process.pid)
        assert workers
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=300) == 130
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(child) for child in listed.split()]


# --- parts -----------------------------------------------------------------------------------------------------------


def test_weights_depend_on_seed_and_name_alone() -> None:
    shallow, deep = tiny_model(1), tiny_model(2)
    name = "model.layers.0.self_attn.q_proj.weight"
    other = name.replace("q_proj", "k_proj")
    assert np.array_equal(shallow.tensor(name), deep.tensor(name))
    assert not np.array_equal(deep.tensor(name), deep.tensor(other))
    assert not np.array_equal(deep.tensor(name), dataclasses.replace(deep, seed=1).tensor(name))
    assert deep.tensor(name).std() == pytest.approx(128**-0.5, rel=0.05)


def test_tinygemm_multiplies_with_the_integers_of_gptq() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    values, scales = round_to_groups(weight)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    rounded = values.float().view(256, 2, 128) * scales.bfloat16().float().unsqueeze(-1)
    expected = x.float() @ rounded.flatten(1).T
    product = TinygemmLinear(weight)(x).float()
    assert float((product - expected).abs().max()) < 0.02 * float(expected.abs().max())
    assert float((rounded.flatten(1) - weight).abs().max()) < 0.6 * float(scales.max())


def logits_of(engine: Engine) -> torch.Tensor:
    """Put a short text through an engine, as the workers' check does."""
    engine.start(2)
    found = [engine.prefill([1, 2, 3, 4]), engine.decode_one_token(5), engine.decode_one_token(6)]
    return torch.stack([torch.as_tensor(logits).clone() for logits in found])


def difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return float((logits - reference).square().mean().sqrt() / reference.square().mean().sqrt())


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    return logits_of(lite_engine("dense"))


def lite_engine(form: str, layers: int = 2) -> LiteEngine:
    threads = torch.get_num_threads()
    return lite_decoder.build(form, tiny_model(layers), device="cpu", threads=threads, folder=Path())


@pytest.fixture(scope="module")
def gptq() -> LiteEngine:
    return lite_engine("gptq-int4")


def test_the_swapped_decoder_is_near_the_one_with_gptq(gptq: LiteEngine, dense: torch.Tensor) -> None:
    tinygemm = lite_engine("tinygemm")
    assert difference(logits_of(tinygemm), logits_of(gptq)) < 0.03
    assert 0.02 < difference(logits_of(tinygemm), dense) < 0.25
    rest = 4 * (HEAD + NORMS)
    assert lite_engine("dense").weight_bytes - rest == 4 * LINEARS
    assert gptq.weight_bytes - rest == LINEARS // 2 + LINEARS // 128 * 2
    assert tinygemm.weight_bytes - rest == LINEARS // 2 + LINEARS // 128 * 4


def test_the_artifact_has_the_integers_of_gptq(
    gptq: LiteEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], returncode=1, stderr="a warning\nerror: no room\n")
    monkeypatch.setattr(onnx_artifact.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(LiteError, match="python -m export onnx: error: no room"):
        onnx_artifact.write_artifact(tmp_path / "onnx", tiny_model(), num_layers=1)
    (written,) = tmp_path.iterdir()
    decoder = load_decoder(load_artifact(written), device="cpu")
    engine = LiteEngine(decoder, max_seq_len=40, computes_in="float32")
    gptq.start(1)
    # Embeddings, norms and head are float16 there.
    assert difference(engine.prefill([1, 2, 3, 4]), gptq.prefill([1, 2, 3, 4])) < 2e-3


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_our_onnx_engine_has_an_artifact_for_each_depth(ran: Ran, gptq: LiteEngine, cache_dtype: str) -> None:
    engine = lite_onnx.build(cache_dtype, tiny_model(), device="cpu", threads=1, folder=ran.files)
    found = {}
    for layers in (2, 1, 2):
        for each in (engine, gptq):
            each.start(layers)
        found[layers] = torch.from_numpy(engine.prefill([1, 2, 3, 4]))
        assert difference(found[layers], gptq.prefill([1, 2, 3, 4])) < 0.05
        after = torch.from_numpy(engine.decode_one_token(5))
        assert difference(after, gptq.decode_one_token(5)) < 0.05
    assert difference(found[1], found[2]) > 0.3
    # Started anew, it has forgotten.
    engine.start(2)
    assert torch.equal(torch.from_numpy(engine.prefill([1, 2, 3, 4])), found[2])


def test_our_onnx_engine_is_measured_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="CPUs only"):
        lite_onnx.build("float32", tiny_model(), device="cuda", threads=1, folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "least", "most", "weight_bytes"),
    [
        ("transformers float32", 0, 1e-5, 4 * (HEAD + NORMS + LINEARS)),
        ("transformers bfloat16", 1e-3, 0.03, 2 * (HEAD + NORMS + LINEARS)),
        ("bitsandbytes nf4", 0.02, 0.25, None),
        # Integers, a float32 for each of a layer's 1152 outputs, and a byte for each of 14 layouts.
        ("bitsandbytes int8", 1e-3, 0.05, 4 * (HEAD + NORMS) + LINEARS + 2 * 4 * 1152 + 14),
    ],
)
def test_transformers_compute_the_same_but_for_rounding(
    name: str, least: float, most: float, weight_bytes: int | None, dense: torch.Tensor
) -> None:
    order = {
        **dataclasses.asdict(SPEC[name]),
        "model": dataclasses.asdict(tiny_model()),
        "device": "cpu",
        "folder": ".",
    }
    process = worker.Worker({**order, "threads": torch.get_num_threads()})
    engine: Any = process.engine
    assert json.loads(json.dumps(process.about()))["versions"]["transformers"]
    assert least <= difference(logits_of(engine), dense) < most
    assert weight_bytes is None or engine.weight_bytes == weight_bytes
    # A cache that was filled is a cache of that length: the next token attends over it.
    engine.start(2)
    engine.fill(24)
    filled = engine.decode_one_token(5)
    assert engine.position == int(engine.cache.get_seq_length()) == 25
    engine.start(2)
    assert difference(filled, engine.prefill([5])) > 0.05


def test_fewer_layers_are_the_first_ones() -> None:
    """The depth that tells what a layer costs has to be a real model, and the whole one comes back after it."""
    deep, shallow = lite_engine("dense", 2), lite_engine("dense", 1)
    for engine in (deep, shallow):
        engine.start(1)
    assert torch.equal(deep.prefill([7, 8, 9]), shallow.prefill([7, 8, 9]))
    whole = lite_engine("dense", 2)
    for engine in (deep, whole):
        engine.start(2)
    assert torch.equal(deep.prefill([7, 8, 9]), whole.prefill([7, 8, 9]))


def test_gguf_names_leave_out_the_layers_above() -> None:
    names = [gguf_name(name, 1) for name in tiny_model(2).shapes]
    assert [name for name in names if name is not None and name.startswith("blk.")] == [
        f"blk.0.{part}.weight"
        for part in (
            "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm",
        )
    ]  # fmt: skip
    assert {"token_embd.weight", "output_norm.weight", "output.weight"} <= set(names)


def row(*, decode_s: float, shallow: Depth, prefill_s: float | None = None, name: str = "engine") -> Row:
    return Row(
        name=name,
        versions={},
        computes_in="float32",
        difference=0.0,
        weight_bytes=3_000_000_000,
        cache_bytes=1_000_000_000,
        prefill=Missing(why="too slow") if prefill_s is None else quantiles([prefill_s]),
        decode=quantiles([decode_s] * 10),
        shallow=shallow,
        last_token_only=(),
        load_s=None,
        bandwidth=80e9,
        peak_bytes=None,
        turns=("engine",),
    )


def test_the_model_of_32_layers_is_a_straight_line() -> None:
    shallow = Depth(num_layers=1, prefill=quantiles([0.4]), decode=quantiles([0.03]))
    found = estimate(row(decode_s=0.07, shallow=shallow, prefill_s=1.0), 3)
    assert isinstance(found.decode, Line)
    assert (found.decode.layer_s, found.decode.rest_s) == (pytest.approx(0.02), pytest.approx(0.01))
    assert found.decode.modelled_s == pytest.approx(0.01 + 32 * 0.02)
    assert isinstance(found.prefill, Line)
    assert found.prefill.modelled_s == pytest.approx(0.1 + 32 * 0.3)
    # llama.cpp's last layer costs less than the others: a negative rest is no noise.
    cheap_last = estimate(
        row(decode_s=0.07, shallow=dataclasses.replace(shallow, prefill=quantiles([0.3])), prefill_s=1.7), 3
    )
    assert isinstance(cheap_last.prefill, Line)
    assert cheap_last.prefill.modelled_s == pytest.approx(0.3 + 31 * 0.7)
    noisy = estimate(row(decode_s=0.02, shallow=shallow), 3)
    assert isinstance(noisy.decode, Missing)
    assert isinstance(noisy.prefill, Missing)
    assert isinstance(estimate(row(decode_s=0.07, shallow=shallow), 1).decode, Missing)


def test_what_an_engine_leaves_out_is_no_operation_of_its_prefill() -> None:
    shallow = Depth(num_layers=1, prefill=quantiles([0.4]), decode=quantiles([0.03]))
    whole = row(decode_s=0.07, shallow=shallow, prefill_s=1.0)
    less = dataclasses.replace(whole, last_token_only=("mlp.",))
    least = dataclasses.replace(whole, last_token_only=("self_attn.o_proj.", "mlp."))
    assert prefill_flop(whole, tiny_setting()) == 2 * LINEARS * 24
    assert prefill_flop(less, tiny_setting()) == 2 * (LINEARS - 3 * 128 * 256) * 24
    assert prefill_flop(least, tiny_setting()) == 2 * (LINEARS - 3 * 128 * 256 - 128 * 128) * 24
    assert "flatters" in format_report(Measured(rows=[less]), tiny_setting())
    assert "flatters" not in format_report(Measured(rows=[whole]), tiny_setting())


def test_modelled_figures_look_different_from_measured_ones() -> None:
    shallow = Depth(num_layers=0, prefill=quantiles([0.0]), decode=quantiles([0.01]))
    gone = NoRow(name="gone", why="not installed", failed=False)
    done = row(decode_s=0.05, shallow=shallow, prefill_s=2.0)
    text = format_report(Measured(rows=[done, gone]), tiny_setting(rounds=1))
    _, measured, _, modelled = (line for line in text.splitlines() if line.startswith("| engine "))
    cells = [cell.strip() for cell in measured.strip("|").split("|")]
    # 4 GB in 50 ms are 80 GB/s, all that there is; 24 tokens in 2 s.
    assert cells[3:9] == ["4,000", "50", "50–50", "80", "100%", "12"]
    assert "~" not in measured
    cells = [cell.strip() for cell in modelled.strip("|").split("|")]
    assert cells[1:5] == ["20", "10", "~650 (650–650)", "~1.54"]
    assert cells[5:] == ["1", "0", "~32 (32–32)"]


def test_the_model_shows_how_much_noise_it_amplifies() -> None:
    seconds = [0.04, 0.05, 0.06]
    deep = row(decode_s=0.0, shallow=Depth(num_layers=1, prefill=None, decode=quantiles([0.03, 0.04, 0.05])))
    found = estimate(dataclasses.replace(deep, decode=quantiles(seconds)), 2).decode
    assert isinstance(found, Line)
    # p20 and p80 are 6 ms from the medians: 10 ms a layer may be none, or 22.
    assert found.modelled_s == pytest.approx(0.05 + 30 * 0.01)
    assert found.low_s == pytest.approx(0.044)
    assert found.high_s == pytest.approx(0.056 + 30 * 0.022)


def test_end_to_end_is_the_tower_and_the_prefill_and_a_hundred_tokens() -> None:
    shallow = Depth(num_layers=0, prefill=quantiles([0.5]), decode=quantiles([0.01]))
    done, vision = row(decode_s=0.05, shallow=shallow, prefill_s=2.5), quantiles([0.5])
    assert measured_costs(done, vision) == Costs(decode_s=0.05, prefill_s=2.5, end_to_end_s=0.5 + 2.5 + 5)
    # 20 ms and 1 s a layer.
    modelled = modelled_costs(done, 2, vision)
    assert modelled.end_to_end_s == pytest.approx(0.5 + (0.5 + 32) + 100 * (0.01 + 32 * 0.02))
    slow = row(decode_s=0.05, shallow=shallow)
    assert measured_costs(slow, vision).end_to_end_s is None
    text = format_report(Measured(rows=[done, slow], vision=vision), tiny_setting())
    last = [line.strip("| ").rpartition("|")[2].strip() for line in text.splitlines() if line.startswith("| engine ")]
    assert last == ["end to end s", "8", "–", "~end to end s", "~98", "–"]
    assert "end to end" not in format_report(Measured(rows=[done]), tiny_setting())


def test_we_stand_against_the_better_of_llama_cpp() -> None:
    """Each figure against the better one, whichever setting has it, and only where there is one."""

    def engine(name: str, decode: float, prefill: float | None, peak: int) -> Row:
        """Make a row of two layers, each of which takes 40 % of it all."""
        shallow_prefill = None if prefill is None else quantiles([0.6 * prefill])
        shallow = Depth(num_layers=1, prefill=shallow_prefill, decode=quantiles([0.6 * decode]))
        return dataclasses.replace(row(decode_s=decode, shallow=shallow, prefill_s=prefill, name=name), peak_bytes=peak)

    ours = engine("lite onnx int4", 0.02, 3.0, 900)
    plain, flash = engine(THEIRS[0], 0.03, 6.0, 1200), engine(THEIRS[1], 0.04, 4.5, 1000)
    measured = Measured(rows=[ours, plain, flash], vision=quantiles([1.0]))
    here, real = against_llama_cpp(measured, 2)
    # End to end: 1 + 3 + 2 seconds against 1 + 6 + 3, and 1 + 4.5 + 4 with flash attention.
    assert dataclasses.asdict(here) == pytest.approx(
        dataclasses.asdict(
            Ratios(name=ours.name, num_layers=2, modelled=False, decode=1.5, prefill=1.5, end_to_end=9.5 / 6, peak=0.9)
        )
    )
    # 32 layers take 0.2 + 32 × 0.4 = 13 times as long, but for the tower.
    assert (real.num_layers, real.modelled, real.peak) == (32, True, None)
    assert (real.decode, real.prefill) == (pytest.approx(1.5), pytest.approx(1.5))
    assert real.end_to_end == pytest.approx((1 + 13 * 8.5) / (1 + 13 * 5))
    text = format_report(measured, tiny_setting())
    assert "Against llama.cpp Q4_0 and llama.cpp Q4_0 flash," in text
    assert "no turns with each other" not in text
    elsewhere = dataclasses.replace(flash, turns=(flash.name,))
    assert "no turns with each other" in format_report(Measured(rows=[ours, elsewhere]), tiny_setting())
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "×" in line]
    assert lines == [
        [ours.name, "2", "1.50×", "1.50×", "1.58×", "0.90×"],
        [ours.name, "~32", "~1.50×", "~1.50×", "~1.69×", "–"],
    ]
    slow = engine("lite onnx int4", 0.02, None, 900)
    assert [ratios.prefill for ratios in against_llama_cpp(Measured(rows=[slow, plain]), 2)] == [None, None]
    assert against_llama_cpp(Measured(rows=[ours]), 2) == against_llama_cpp(Measured(rows=[plain]), 2) == []
    # At one depth nothing is modelled.
    assert len(against_llama_cpp(Measured(rows=[ours, flash]), 1)) == 1


def test_engines_share_rounds_as_far_as_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, specs = tiny_setting(), [spec for spec in SPECS if spec.module == "lite_decoder"]
    monkeypatch.setattr(measure, "free_memory", lambda _: 1e12)
    assert groups(specs, setting) == [specs]
    for_three = 4.1 * needed_bytes(REFERENCE, setting.model) / measure._MEMORY_SHARE
    monkeypatch.setattr(measure, "free_memory", lambda _: for_three)
    assert [len(group) for group in groups(specs, setting)] == [3, 1]
    monkeypatch.setattr(measure, "free_memory", lambda _: 0.0)
    assert groups(specs, setting) == [[spec] for spec in specs]


def test_a_reference_that_fails_stops_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Runner:
        raise LiteError("out of memory")

    monkeypatch.setattr(measure, "Runner", fail)
    with pytest.raises(LiteError, match="lite dense: out of memory"):
        measure.measure([SPEC["tinygemm int4"]], tiny_setting())
