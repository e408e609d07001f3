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

from benchmarks.speed.decoders import weight_bytes
from benchmarks.speed.linears import Tinygemm, round_to_groups
from benchmarks.speed.peers import lite_decoder, lite_onnx, main, measure, onnx_artifact, process, worker
from benchmarks.speed.peers.engine import Engine, NotHere
from benchmarks.speed.peers.lite_decoder import LiteEngine
from benchmarks.speed.peers.llamacpp import gguf_name
from benchmarks.speed.peers.measure import Measured, NotMeasured, Runner, Setting, Times, groups, needed_bytes
from benchmarks.speed.peers.report import (
    Modelled,
    costs,
    modelled_decode,
    modelled_prefill,
    ratios,
    reports,
)
from benchmarks.speed.peers.specs import PEERS_PYTHON, REFERENCE, SPECS, THEIRS
from benchmarks.speed.weights import Model, Shapes
from lite.artifact.open import Artifact, load_artifact
from lite.engines.torch_engine.load import load_decoder
from lite.errors import LiteError
from lite.eval.figures import quantiles

# A vocabulary as large as the tokenizer that an artifact gets.
SHAPES = Shapes(
    hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2, vocab_size=1024
)  # fmt: skip
TINY = ("--widths", "128", "256", "2", "1024", "--layers", "2", "--prompt-tokens", "24", "--new-tokens", "5")
QUICK = (*TINY, "--rounds", "2", "--threads", "1")
SPEC = {spec.name: spec for spec in SPECS}


def tiny_model(layers: int = 2) -> Model:
    return Model(shapes=SHAPES, num_layers=layers)


def tiny_order(form: str, layers: int = 2, folder: Path = Path(), **changes: Any) -> worker.Order:
    values: dict[str, Any] = {
        "module": "", "form": form, "packages": (), "install": "", "model": tiny_model(layers), "max_seq_len": 40,
        "device": "cpu", "threads": torch.get_num_threads(), "folder": folder,
    }  # fmt: skip
    return worker.Order(**(values | changes))


def tiny_setting(**changes: Any) -> Setting:
    values: dict[str, Any] = {
        "model": tiny_model(), "num_prompt_tokens": 24, "num_new_tokens": 5, "rounds": 2, "threads": 1, "limit_s": 30.0,
        "device": "cpu", "peers_python": PEERS_PYTHON,
    }  # fmt: skip
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
        self.sections = self.document["sections"]
        self.rows: dict[str, dict[str, Any]] = {row["engine"]: row for row in self.sections["measured"]["rows"]}

    def cells(self, name: str) -> dict[str, str]:
        """Return an engine's row in the first table."""
        return cells_of(self.table, name)


def cells_of(table: str, name: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return dict(zip(lines[0], next(line for line in lines if line[0] == name), strict=True))


ONNX = ["lite onnx int4", "lite onnx int4 int8-cache"]
MEASURED = ["lite dense", *ONNX]
LLAMA_CPP = ["llama.cpp Q4_0", "llama.cpp Q8_0 flash"]
LINEARS, HEAD, NORMS = 2 * (4 * 128 * 128 + 3 * 128 * 256), 128 * 1024, 5 * 128


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_artifact: Artifact) -> Ran:
    files = tmp_path_factory.mktemp("ran")
    vision = "--vision", str(tiny_artifact.path)
    with pytest.MonkeyPatch.context() as patch:
        # The engines' files stay.
        patch.setattr(measure.tempfile, "TemporaryDirectory", lambda **_: contextlib.nullcontext(files))
        out = files / "peers.json"
        return Ran(out, "--device", "cpu", *vision, "--engines", *MEASURED, *LLAMA_CPP)


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One engine dies in a round, one computes something else, one is not installed, and no prefill is worth it."""
    ask = process.Process.ask

    def die_in_a_round(self: process.Process, what: str, **arguments: Any) -> dict[str, Any]:
        is_round = what == "round" and arguments["num_new_tokens"] > 1
        if is_round and self.about["computes_in"].startswith("bfloat16"):
            self._process.send_signal(signal.SIGSEGV)
        return ask(self, what, **arguments)

    wrong = dataclasses.replace(SPEC["lite gptq-int4"], max_difference=0.01)
    absent = dataclasses.replace(SPEC["llama.cpp Q8_0"], packages=("no-such-engine",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process.Process, "ask", die_in_a_round)
        patch.setattr(measure, "measured_bandwidth", lambda *_: 1e9)
        patch.setattr("benchmarks.speed.peers.specs.SPECS", (REFERENCE, SPEC["tinygemm int4"], wrong, absent))
        out = tmp_path_factory.mktemp("troubled") / "peers.json"
        return Ran(out, "--limit-s", "1e-9", "--engines", "tinygemm int4", wrong.name, absent.name)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_engines_are_measured_or_have_a_reason(ran: Ran) -> None:
    assert ran.status == 0
    assert list(ran.rows) == [spec.name for spec in SPECS if spec.name in {*MEASURED, *LLAMA_CPP}]
    assert [ran.rows[name]["why"] for name in MEASURED] == [None] * len(MEASURED)
    for name in LLAMA_CPP:
        assert PEERS_PYTHON.exists() or ran.rows[name]["why"].endswith("not installed: make peers")
    vision = ran.sections["measured"]["vision_s"]
    assert vision["count"] == 2
    for name in MEASURED:
        row, depth = ran.rows[name], "1" if name in ONNX else "0"
        prefill = row["times"]["2"]["prefill"]
        assert (row["time"]["count"], prefill["count"]) == (2 * 5, 2)
        assert row["times"]["2"]["decode"] == row["time"]
        assert row["times"][depth]["decode"]["p50"] > 0
        assert row["bandwidth"] > 1e8
        assert 3e7 < row["peak_bytes"] < 2e9
        # One token was decoded before the five that are timed: the third of these attends over 24 + 1 + 3.
        assert row["cache_bytes"] == 2 * 2 * 128 * 28 * (1 if "int8-cache" in name else 4)
        assert row["end_to_end_s"] == pytest.approx(vision["p50"] + prefill["p50"] + 100 * row["time"]["p50"], rel=1e-4)
        cells = ran.cells(name)
        assert float(cells["end to end s"]) == pytest.approx(row["end_to_end_s"], rel=0.01)
        assert float(cells["prefill tokens/s"].split()[0].replace(",", "")) == pytest.approx(
            24 / prefill["p50"], rel=0.01
        )


@pytest.mark.full
def test_our_onnx_engine_computes_what_the_reference_does(ran: Ran) -> None:
    float32, int8 = (ran.rows[name] for name in ONNX)
    for row in (float32, int8):
        assert 0.1 < row["difference"] < 0.4
        # Integers, a float32 scale for a block of 128; the head in 8 bits.
        assert row["weight_bytes"] == LINEARS // 2 + HEAD + (LINEARS + HEAD) // 128 * 4 + 4 * NORMS
        assert row["load_s"] > 0
        # torch wrote the artifact in another process.
        assert row["peak_bytes"] < 0.5 * ran.rows["lite dense"]["peak_bytes"]
    assert float32["difference"] != int8["difference"] == pytest.approx(float32["difference"], rel=0.1)
    assert [row["computes in"].rpartition(" ")[2] for row in (float32, int8)] == ["float32", "int8"]
    assert ran.rows["lite dense"]["load_s"] is None


@pytest.mark.full
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="no build/peers-venv: make peers")
def test_llama_cpp_reads_the_file_written_for_it(ran: Ran) -> None:
    for name, most in zip(LLAMA_CPP, (0.4, 0.06), strict=True):
        assert 1e-3 < ran.rows[name]["difference"] < most
        assert "1" in ran.rows[name]["times"]
    assert ran.rows["llama.cpp Q4_0"]["weight_bytes"] == LINEARS // 32 * 18 + HEAD // 32 * 34 + 4 * NORMS
    assert list(ran.sections["ratios"]["measured"]) == ONNX


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_what_goes_wrong_is_told_and_the_rest_goes_on(troubled: Ran) -> None:
    assert troubled.status == 1
    rows, table = troubled.rows, troubled.table
    assert rows["tinygemm int4"]["why"].startswith("its process ended with signal 11")
    assert rows["lite gptq-int4"]["why"].startswith("got logits that differ from those of lite dense by 0.")
    assert [troubled.cells(name)["ms"] for name in ("tinygemm int4", "lite gptq-int4")] == ["WRONG", "WRONG"]
    assert set(troubled.cells("lite gptq-int4").values()) == {"lite gptq-int4", "WRONG", "–"}
    # What is not there is no failure.
    assert (rows["llama.cpp Q8_0"]["why"], rows["llama.cpp Q8_0"]["is_wrong"]) == (
        "no-such-engine not installed: make peers", False,
    )  # fmt: skip
    # A prefill beyond the limit is not waited for; the cache is as long as after one.
    row = rows["lite dense"]
    assert row["no_prefill"].startswith("slower than 1e-09 s, probe of 24 tokens: ")
    assert row["time"]["count"] == 2 * measure.MIN_NEW_TOKENS
    assert "¹ lite dense: prefill slower than 1e-09 s" in table
    assert row["cache_bytes"] == 2 * 2 * 128 * 4 * 27


def test_the_document_says_what_the_figures_depend_on(troubled: Ran) -> None:
    document = troubled.document
    assert document["setting"]["threads"] == 1
    assert document["setting"]["model"]["shapes"]["hidden_size"] == 128
    assert {"torch", "onnxruntime"} <= document["versions"].keys()
    assert document["command"].startswith("python -m benchmarks speed peers --widths 128")
    assert f"- Command: `{document['command']}`." in troubled.table
    assert "lite dense" in troubled.sections["modelled"]
    del document["command"]
    assert str(ROOT) not in json.dumps(document)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--widths", "100", "256", "2", "256"], "multiples of 128"),
        (["--widths", "128", "256", "3", "256"], "multiples of 128"),
        (["--prompt-tokens", "4090"], "at most 4096"),
        (["--engines", "vllm"], "invalid choice: 'vllm'"),
        (["--limit-s", "0"], "a number above 0"),
    ],
)
def test_wrong_use_is_told_before_anything_runs(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    assert said in capsys.readouterr().err


def test_a_broken_tower_is_told_before_anything_is_measured(
    own_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_artifact / "vision.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(measure, "start_engine", lambda *_: pytest.fail("an engine was started"))
    assert main([*QUICK, "--engines", REFERENCE.name, "--vision", str(own_artifact)]) == 1
    said = capsys.readouterr().err
    assert str(file) in said
    assert "export the artifact again" in said


def test_whoever_ends_a_worker_ends_what_it_has_started(tmp_path: Path) -> None:
    command = ["sh", "-c", 'sleep 60 & echo "{\\"child\\": $!}"; wait']
    started = process.Process(command, name="a worker", threads=1, folder=tmp_path)
    status = Path(f"/proc/{started.about['child']}/status")
    assert status.exists()
    started.close()
    deadline = time.monotonic() + 120
    # Nobody may have asked for its exit status yet: then it is a zombie.
    while status.exists() and "State:\tZ" not in status.read_text(encoding="ascii"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.full
def test_ctrl_c_ends_the_workers() -> None:
    command = [sys.executable, "-m", "benchmarks", "speed", "peers", *TINY, "--rounds", "100000"]
    command += ["--engines", REFERENCE.name]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8") as started:
        assert started.stderr is not None
        assert any(line.startswith("round: ") for line in started.stderr)
        listed = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text(encoding="ascii")
        workers = [int(child) for child in listed.split()]
        assert workers
        os.kill(started.pid, signal.SIGINT)
        assert started.wait(timeout=300) == 130
    assert [pid for pid in workers if Path(f"/proc/{pid}").exists()] == []


# --- parts -----------------------------------------------------------------------------------------------------------


def test_tinygemm_multiplies_with_the_integers_of_gptq() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    values, scales = round_to_groups(weight)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    rounded = values.float().view(256, 2, 128) * scales.bfloat16().float().unsqueeze(-1)
    expected = x.float() @ rounded.flatten(1).T
    product = Tinygemm(weight)(x).float()
    assert float((product - expected).abs().max()) < 0.02 * float(expected.abs().max())
    assert float((rounded.flatten(1) - weight).abs().max()) < 0.6 * float(scales.max())


def logits_of(engine: Engine) -> torch.Tensor:
    """Put a short text through an engine, as the workers' check does."""
    engine.start(2)
    return torch.stack([torch.as_tensor(engine.read(ids)).clone() for ids in ([1, 2, 3, 4], [5], [6])])


def difference(logits: Any, reference: Any) -> float:
    logits, reference = (torch.as_tensor(each) for each in (logits, reference))
    return float((logits - reference).norm() / reference.norm())


def lite_engine(form: str, layers: int = 2) -> LiteEngine:
    return lite_decoder.build(tiny_order(form, layers))


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    return logits_of(lite_engine("dense"))


@pytest.fixture(scope="module")
def gptq() -> LiteEngine:
    return lite_engine("gptq-int4")


def test_the_swapped_decoder_is_near_the_one_with_gptq(gptq: LiteEngine, dense: torch.Tensor) -> None:
    tinygemm = lite_engine("tinygemm int4")
    assert difference(logits_of(tinygemm), logits_of(gptq)) < 0.03
    assert 0.1 < difference(logits_of(tinygemm), dense) < 0.4
    rest = 4 * (HEAD + NORMS)
    assert lite_engine("dense").weight_bytes - rest == 4 * LINEARS
    assert gptq.weight_bytes - rest == LINEARS // 2 + LINEARS // 128 * 2
    assert tinygemm.weight_bytes - rest == LINEARS // 2 + LINEARS // 128 * 4


def test_the_tokens_that_are_timed_are_the_most_probable(gptq: LiteEngine) -> None:
    gptq.start(2)
    gptq.first_token([1, 2, 3, 4])
    chosen = [gptq.newest]
    for _ in range(3):
        gptq.next_token()
        chosen.append(gptq.newest)
    gptq.start(2)
    again = [int(gptq.read(ids).argmax()) for ids in ([1, 2, 3, 4], *([token] for token in chosen[:-1]))]
    assert again == chosen


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
    for each in (gptq, engine):
        each.start(1)
    # Embeddings, norms and head are float16 there.
    assert difference(engine.read([1, 2, 3, 4]), gptq.read([1, 2, 3, 4])) < 2e-3
    assert weight_bytes(decoder) < gptq.weight_bytes


@pytest.mark.full
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_our_onnx_engine_has_an_artifact_for_each_depth(ran: Ran, gptq: LiteEngine, cache_dtype: str) -> None:
    engine = lite_onnx.build(tiny_order(cache_dtype, folder=ran.files))
    found = {}
    for layers in (2, 1, 2):
        for each in (engine, gptq):
            each.start(layers)
        found[layers] = engine.read([1, 2, 3, 4])
        assert difference(found[layers], gptq.read([1, 2, 3, 4])) < 0.05
        assert difference(engine.read([5]), gptq.read([5])) < 0.05
    assert difference(found[1], found[2]) > 0.3
    # Started anew, it has forgotten.
    engine.start(2)
    assert np.array_equal(engine.read([1, 2, 3, 4]), found[2])
    with pytest.raises(NotHere, match="CPUs only"):
        lite_onnx.build(tiny_order("float32", device="cuda"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "least", "most", "weight_bytes"),
    [
        ("transformers float32", 0, 1e-5, 4 * (HEAD + NORMS + LINEARS)),
        ("transformers bfloat16", 1e-3, 0.03, 2 * (HEAD + NORMS + LINEARS)),
        ("bitsandbytes nf4", 0.1, 0.4, None),
        # Integers, a float32 for each of a layer's 1152 outputs, and a byte for each of 14 layouts.
        ("bitsandbytes int8", 1e-3, 0.06, 4 * (HEAD + NORMS) + LINEARS + 2 * 4 * 1152 + 14),
    ],
)
def test_transformers_compute_the_same_but_for_rounding(
    name: str, least: float, most: float, weight_bytes: int | None, dense: torch.Tensor
) -> None:
    spec = SPEC[name]
    started = worker.Worker(tiny_order(spec.form, module=spec.module, packages=spec.packages))
    engine: Any = started.engine
    assert json.loads(json.dumps(started.about()))["versions"]["transformers"]
    assert least <= difference(logits_of(engine), dense) < most
    assert weight_bytes is None or engine.weight_bytes == weight_bytes
    # A cache that was filled is a cache of that length: the next token attends over it.
    engine.start(2)
    engine.fill(24)
    filled = engine.read([5])
    assert engine.position == int(engine.cache.get_seq_length()) == 25
    engine.start(2)
    assert difference(filled, engine.read([5])) > 0.05


def test_fewer_layers_are_the_first_ones() -> None:
    """The depth that tells what a layer costs has to be a real model, and the whole one comes back after it."""
    deep, shallow, whole = lite_engine("dense", 2), lite_engine("dense", 1), lite_engine("dense", 2)
    for layers, other in ((1, shallow), (2, whole)):
        for engine in (deep, other):
            engine.start(layers)
        assert torch.equal(deep.read([7, 8, 9]), other.read([7, 8, 9]))


def test_gguf_names_leave_out_the_layers_above() -> None:
    names = [gguf_name(name, 1) for name in tiny_model(2).tensor_shapes]
    assert [name for name in names if name is not None and name.startswith("blk.")] == [
        f"blk.0.{part}.weight"
        for part in (
            "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm",
        )
    ]  # fmt: skip
    assert {"token_embd.weight", "output_norm.weight", "output.weight"} <= set(names)


# --- what follows from the times -------------------------------------------------------------------------------------


def found(
    *,
    decode: dict[int, float],
    prefill: dict[int, float] | None = None,
    name: str = "engine",
    peak: int | None = None,
    turns: tuple[str, ...] = ("engine",),
) -> Measured:
    about = {
        "versions": {}, "computes_in": "float32", "weight_bytes": 3_000_000_000, "cache_bytes_per_token": 1_000_000,
        "last_token_only": (), "load_s": None,
    }  # fmt: skip
    times = {
        depth: Times(decode=quantiles([seconds] * 10), prefill=None if prefill is None else quantiles([prefill[depth]]))
        for depth, seconds in decode.items()
    }
    return Measured(
        name=name, about=about, difference=0.0, times=times, slow=None if prefill else "too slow", context=1000,
        bandwidth=80e9, peak_bytes=peak, turns=turns,
    )  # fmt: skip


def line_of(model: Modelled | str) -> Modelled:
    assert isinstance(model, Modelled)
    return model


def test_the_model_of_32_layers_is_a_straight_line() -> None:
    one = found(decode={3: 0.07, 1: 0.03}, prefill={3: 1.0, 1: 0.4})
    decode = line_of(modelled_decode(one))
    assert (decode.layer_s, decode.rest_s) == (pytest.approx(0.02), pytest.approx(0.01))
    for seconds in (decode.at_s, decode.low_s, decode.high_s):
        assert seconds == pytest.approx(0.01 + 32 * 0.02)
    assert line_of(modelled_prefill(one)).at_s == pytest.approx(0.1 + 32 * 0.3)
    # llama.cpp's last layer costs less than the others: a negative rest is no noise.
    cheap_last = found(decode={3: 0.07, 1: 0.03}, prefill={3: 1.7, 1: 0.3})
    assert line_of(modelled_prefill(cheap_last)).at_s == pytest.approx(0.3 + 31 * 0.7)
    assert "noise" in str(modelled_decode(found(decode={3: 0.02, 1: 0.03})))
    assert modelled_prefill(found(decode={3: 0.07, 1: 0.03})) == "no prefill was timed"
    assert "one depth only" in str(modelled_decode(found(decode={1: 0.07})))


def test_the_model_shows_how_much_noise_it_amplifies() -> None:
    spread = {2: [0.04, 0.05, 0.06], 1: [0.03, 0.04, 0.05]}
    times = {depth: Times(decode=quantiles(seconds), prefill=None) for depth, seconds in spread.items()}
    model = line_of(modelled_decode(dataclasses.replace(found(decode={1: 1.0}), times=times)))
    # p20 and p80 are 6 ms from the medians: 10 ms a layer may be none, or 22.
    assert model.at_s == pytest.approx(0.05 + 30 * 0.01)
    assert model.low_s == pytest.approx(0.044)
    assert model.high_s == pytest.approx(0.056 + 30 * 0.022)


def test_modelled_figures_look_different_from_measured_ones() -> None:
    gone = NotMeasured(name="gone", why="not installed", failed=False)
    done = found(decode={2: 0.05, 0: 0.01}, prefill={2: 2.0, 0: 0.0})
    tables = {name: one.markdown() for name, one in reports([done, gone], None, tiny_setting(rounds=1)).items()}
    # 4 GB in 50 ms are 80 GB/s, all that there is; 24 tokens in 2 s.
    assert cells_of(tables["measured"], "gone")["ms"] == "–"
    row = next(line for line in tables["measured"].splitlines() if line.startswith("| engine | float32"))
    assert [cell.strip() for cell in row.strip("|").split("|")][2:9] == [
        "50", "50–50", "4,000", "80", "100%", "0.0e+00", "12 (12–12)",
    ]  # fmt: skip
    assert "~" not in row
    row = next(line for line in tables["modelled"].splitlines() if "~650" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
        "20", "10", "~650 (650–650)", "~1.538", "1", "0", "~32 (32–32)",
    ]  # fmt: skip


def test_end_to_end_is_the_tower_and_the_prefill_and_a_hundred_tokens() -> None:
    done, vision = found(decode={2: 0.05, 0: 0.01}, prefill={2: 2.5, 0: 0.5}), quantiles([0.5])
    assert costs(done, vision)["end to end"] == 0.5 + 2.5 + 5
    # 20 ms and 1 s a layer.
    expected = 0.5 + (0.5 + 32) + 100 * (0.01 + 32 * 0.02)
    assert costs(done, vision, real_depth=True)["end to end"] == pytest.approx(expected)
    slow = found(decode={2: 0.05, 0: 0.01}, name="slow")
    assert costs(slow, vision)["end to end"] is costs(done, None)["end to end"] is None
    tables = reports([done, slow], vision, tiny_setting())
    assert cells_of(tables["measured"].markdown(), "slow")["end to end s"] == "–"
    assert "~98" in tables["modelled"].markdown()
    assert "end to end" not in reports([done], None, tiny_setting())["measured"].markdown()


def test_we_stand_against_the_better_of_llama_cpp() -> None:
    """Each figure against the better one, whichever setting has it, and only where there is one."""

    def engine(name: str, decode: float, prefill: float | None, peak: int, *turns: str) -> Measured:
        """Make one of two layers, each of which takes 40 % of it all."""
        prefills = None if prefill is None else {2: prefill, 1: 0.6 * prefill}
        return found(decode={2: decode, 1: 0.6 * decode}, prefill=prefills, name=name, peak=peak, turns=turns)

    ours = engine("lite onnx int4", 0.02, 3.0, 900)
    plain, flash = engine(THEIRS[0], 0.03, 6.0, 1200), engine(THEIRS[1], 0.04, 4.5, 1000)
    vision, three = quantiles([1.0]), [ours, plain, flash]
    # End to end: 1 + 3 + 2 seconds against 1 + 6 + 3, and 1 + 4.5 + 4 with flash attention.
    here = ratios(three, vision, real_depth=False)[ours.name]
    assert here == pytest.approx({"decode": 1.5, "prefill": 1.5, "end to end": 9.5 / 6, "peak memory": 0.9})
    # 32 layers take 0.2 + 32 × 0.4 = 13 times as long, but for the tower.
    real = ratios(three, vision, real_depth=True)[ours.name]
    assert (real["decode"], real["prefill"]) == (pytest.approx(1.5), pytest.approx(1.5))
    assert (real["end to end"], real["peak memory"]) == (pytest.approx((1 + 13 * 8.5) / (1 + 13 * 5)), None)
    text = reports(three, vision, tiny_setting())["ratios"].markdown()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "×" in line]
    assert [line for line in lines if line[0] == ours.name] == [
        [ours.name, "2", "1.50×", "1.50×", "1.58×", "0.90×"],
        [ours.name, "~32", "~1.50×", "~1.50×", "~1.69×", "–"],
    ]
    elsewhere = engine(THEIRS[1], 0.04, 4.5, 1000, "alone")
    assert "no turns with each other" in reports([ours, elsewhere], vision, tiny_setting())["ratios"].markdown()
    slow = engine("lite onnx int4", 0.02, None, 900)
    assert ratios([slow, plain], None, real_depth=False)[ours.name]["prefill"] is None
    assert ratios([ours], None, real_depth=False) == ratios([plain], None, real_depth=False) == {}


def test_engines_share_rounds_as_far_as_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, specs = tiny_setting(), [spec for spec in SPECS if spec.module == "lite_decoder"]
    monkeypatch.setattr(measure, "free_memory", lambda _: 1e12)
    assert groups(specs, setting) == [specs]
    for_two = 3.1 * needed_bytes(REFERENCE, setting.model) / measure._MEMORY_SHARE
    monkeypatch.setattr(measure, "free_memory", lambda _: for_two)
    assert [len(group) for group in groups(specs, setting)] == [2, 1]
    monkeypatch.setattr(measure, "free_memory", lambda _: 0.0)
    assert groups(specs, setting) == [[spec] for spec in specs]


def test_a_reference_that_fails_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Runner:
        raise LiteError("out of memory")

    monkeypatch.setattr(measure, "Runner", fail)
    with pytest.raises(LiteError, match="lite dense: out of memory"):
        measure.measure([SPEC["tinygemm int4"]], tiny_setting())
