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

import pytest
import torch
from repository import ROOT

from benchmarks.speed.peers import main, measure, process, worker
from benchmarks.speed.peers.measure import Runner, Setting, groups, needed_bytes
from benchmarks.speed.peers.specs import PEERS_PYTHON, REFERENCE, SPECS
from benchmarks.speed.weights import Model, Shapes
from lite.artifact.open import Artifact
from lite.errors import LiteError

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
