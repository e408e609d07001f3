"""`python -m benchmarks speed peers`, on models of a few thousand weights: engines that are installed, and not.

llama.cpp and OpenVINO live in an environment of their own; where there is none, their rows say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import SMALL
from repository import ROOT
from tiny import HIDDEN_SIZE, write_tiny_artifact, write_tiny_gptq_artifact

from benchmarks.speed.harness import Unavailable
from benchmarks.speed.peers import main, measure
from benchmarks.speed.peers.measure import Setting, with_real_depth
from benchmarks.speed.peers.process import Process
from benchmarks.speed.peers.specs import DENSE, PEERS_PYTHON, SPECS, Spec
from benchmarks.speed.peers.worker import NotHere, Order, Worker
from benchmarks.speed.weights import Shapes
from lite.errors import LiteError

SHAPES = dataclasses.replace(SMALL, intermediate_size=512)
# Of 64 inputs rounding takes more away.
GPTQ = dataclasses.replace(SPECS["lite gptq-int4"], max_difference=0.8)
ONNX = ["lite onnx int4", "lite onnx int4 int8-cache"]
# How far rounding takes the logits of one layer and of two.
DIFFERENCES = {
    "transformers float32": (0, 1e-5),
    "transformers bfloat16": (1e-3, 0.03),
    "bitsandbytes nf4": (0.1, 0.4),
    "bitsandbytes int8": (1e-3, 0.06),
}
APART = {"llama.cpp Q4_0": (1e-3, 0.4), "llama.cpp Q8_0 flash": (1e-3, 0.06)}
APART |= {"OpenVINO int4": (0.1, 0.4), "OpenVINO int4 u8-cache": (0.1, 0.4)}


def cells_of(table: str, name: str, layers: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return dict(zip(lines[0], next(line for line in lines if line[:2] == [name, layers]), strict=True))


# -- All of it, in processes of their own ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ran") / "peers.json"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(measure, "Setting", functools.partial(Setting, shapes=SHAPES))
        sizes = ["--layers", "1", "2", "--prompt-tokens", "24", "--new-tokens", "5", "--rounds", "2", "--threads", "1"]
        engines = [*ONNX, *DIFFERENCES, *APART]
        assert main([*sizes, "--device", "cpu", "--engines", *engines, "--json", str(out)]) == 0
    read: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return read


@pytest.mark.full
def test_engines_compute_the_same_but_for_rounding_and_are_measured(document: dict[str, Any]) -> None:
    rows, prefill = (
        {(row["engine"], row["layers"]): row for row in document["sections"][what]["rows"]}
        for what in ("decode", "prefill")
    )
    present = {**DIFFERENCES, **(APART if PEERS_PYTHON.exists() else {})}
    for name in {*APART} - {*present}:
        assert rows[name, "–"]["why"].endswith("not installed: make peers")
    for name in (*ONNX, *present):
        least, most = present.get(name, (0.1, 0.4))
        for layers in ("1", "2"):
            row = rows[name, layers]
            assert row["why"] is None
            assert least <= row["difference"] < most, name
            assert (row["time"]["count"], prefill[name, layers]["time"]["count"]) == (2 * 5, 2)
            assert (row["ratio"] is None) == (name == ONNX[0])
            assert row["bandwidth"] > 1e8
            assert 3e7 < row["peak_bytes"] < 2e9
        assert rows[name, "1"]["weight_bytes"] < rows[name, "2"]["weight_bytes"]
        assert rows[name, "~32"]["time"] or rows[name, "~32"]["why"].startswith("noise")
    if "OpenVINO int4" in present:
        # The same integers: what is apart is only how activations are rounded.
        apart = rows["OpenVINO int4", "2"]["difference"] - rows[ONNX[0], "2"]["difference"]
        assert abs(apart) < 0.01
        assert "not fused" not in rows["OpenVINO int4 u8-cache", "2"]["computes_in"]
    # Keys and values of a layer; one token was decoded before the five that are timed: the third of them sees 28.
    assert rows[ONNX[0], "1"]["cache_bytes"] == 2 * 256 * 28 * 4
    assert rows[ONNX[1], "2"]["cache_bytes"] == 2 * 2 * 256 * 28
    # torch is not in the process.
    assert rows[ONNX[0], "2"]["peak_bytes"] < 0.5 * rows["transformers float32", "2"]["peak_bytes"]
    head, layer = 1200 * 256, 4 * 256**2 + 3 * 256 * 512
    assert rows["transformers float32", "1"]["weight_bytes"] == 4 * (head + layer + 3 * 256)
    assert document["setting"]["layers"] == [1, 2]
    assert {"torch", "onnxruntime"} <= document["versions"].keys()
    del document["command"]
    assert str(ROOT) not in json.dumps(document)


@pytest.mark.full
def test_ctrl_c_ends_the_workers() -> None:
    code = f"""
import functools, sys
from benchmarks.speed.peers import main, measure
from benchmarks.speed.weights import Shapes
measure.Setting = functools.partial(measure.Setting, shapes={SHAPES!r})
sys.exit(main(["--rounds", "100000", "--prompt-tokens", "8", "--engines", "{DENSE.name}"]))
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8") as started:
        assert started.stderr is not None
        assert any(line.startswith("measuring ") for line in started.stderr)
        listed = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text(encoding="ascii")
        workers = [int(child) for child in listed.split()]
        assert workers
        os.kill(started.pid, signal.SIGINT)
        assert started.wait(timeout=300) == 130
    deadline = time.monotonic() + 60  # one that was just being started ends as nobody writes to it any more
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- The loop, with workers in this process --------------------------------------------------------------------------


class Here:
    """A worker in this process, which is asked as one of its own is."""

    def __init__(self, command: list[str], **_: Any) -> None:
        order = json.loads(command[-1])
        try:
            self.worker = Worker(Order(**{**order, "folder": Path(order["folder"])}))
        except NotHere as error:
            raise Unavailable(str(error)) from error
        self.about = json.loads(json.dumps(self.worker.about()))

    def ask(self, what: str, *, limit_s: float | None = None, **arguments: Any) -> Any:  # noqa: ARG002 - as a process has it
        if what == "bandwidth":
            return {"bytes_per_s": 1e9}
        return json.loads(json.dumps(getattr(self.worker, what)(**arguments)))

    def close(self) -> None:
        pass


@pytest.fixture
def setting(tokenizer_model: bytes, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """Of tiny artifacts, with our torch engine as the one that all take turns with."""
    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setattr(measure, "Process", Here)
    monkeypatch.setattr(measure, "ours", lambda _: GPTQ)
    monkeypatch.setattr(measure, "SETTLE_S", 0.0)
    monkeypatch.setattr(measure, "write_checkpoint", lambda out, **_: out.mkdir())

    def export(checkpoint: Path, out: Path, *options: str) -> None:
        write: Any = write_tiny_gptq_artifact if "gptq-int4" in options else write_tiny_artifact
        changes = {"num_hidden_layers": int(checkpoint.name.removeprefix("checkpoint-"))}
        write(out, tokenizer_model, **(changes if "gptq-int4" in options else {"llama_changes": changes}))

    monkeypatch.setattr(measure, "export_checkpoint", export)
    return Setting(
        layers=(1, 2), num_prompt_tokens=24, num_new_tokens=5, rounds=2, threads=torch.get_num_threads(), limit_s=30,
        device="cpu", shapes=Shapes(hidden_size=HIDDEN_SIZE, vocab_size=300),
    )  # fmt: skip


def named(name: str, **changes: Any) -> Spec:
    return dataclasses.replace(GPTQ, name=name, **changes)


def test_what_goes_wrong_is_told_and_the_rest_goes_on(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine dies in a round, one computes something else, one is not installed, one takes too long."""
    rounds: dict[str, int] = {}
    turn = measure.Bench.turn

    def troubled(bench: measure.Bench, process: Any) -> Any:
        form = process.worker.engine.computes_in
        rounds[form] = rounds.get(form, 0) + 1
        if form == "dies" and rounds[form] == 4:  # two untimed, and the first timed
            raise LiteError("its process ended with signal 11: it says nothing")
        if form == "slow":
            raise Unavailable("took longer than 30 s")
        return turn(bench, process)

    start = measure.Bench.start

    def named_start(bench: measure.Bench, spec: Spec, layers: int) -> Any:
        process: Any = start(bench, spec, layers)
        if spec.name in ("dies", "slow"):
            process.worker.engine.computes_in = spec.name
        return process

    monkeypatch.setattr(measure.Bench, "start", named_start)
    monkeypatch.setattr(measure.Bench, "turn", troubled)
    absent = named("absent", packages=("no-such-engine",), install="make peers")
    specs = [DENSE, GPTQ, named("dies"), named("slow"), named("wrong", max_difference=0.01), absent]
    found = measure.measure(specs, setting)
    measured, prefill = found["decode"], found["prefill"]
    rows = {row.label: row for row in measured.rows}
    for report in found.values():
        timed = [row.label for row in report.rows if row.time and "~" not in row.label]
        assert timed == ["lite dense, 1", "lite dense, 2", "lite gptq-int4, 1", "lite gptq-int4, 2", "dies, 1"]
    assert rows["dies, 2"].why == "its process ended with signal 11: it says nothing"
    assert str(rows["wrong, –"].why).startswith("got logits that differ from those of lite dense by 0.")
    assert rows["absent, –"].why == "no-such-engine not installed: make peers"
    assert rows["slow, –"].why == "took longer than 30 s"
    # What is not there, or slow, is no failure.
    assert [line.partition(":")[0] for line in measured.wrong] == ["dies, 2", "wrong, –"]
    text = measured.markdown()
    assert cells_of(text, "dies", "2")["ms"] == cells_of(text, "wrong", "–")["ms"] == "WRONG"
    assert cells_of(text, "lite dense", "2")["logits off by"] == "0.0e+00"
    assert " (" in cells_of(text, "lite dense", "2")["× lite gptq-int4"]
    assert cells_of(text, "lite gptq-int4", "2")["× lite gptq-int4"] == "–"
    assert cells_of(prefill.markdown(), "lite dense", "2")["tokens/s"] != "–"
    row = rows["lite dense, 2"]
    assert row.time is not None
    assert row.time.count == 2 * 5
    # 2 layers, keys and values of 2 heads of 16 in float32, and 28 tokens.
    assert row.figures["cache_bytes"] == 2 * 2 * 32 * 28 * 4
    assert [label for label in rows if "~" in label] == ["lite dense, ~32", "lite gptq-int4, ~32"]


def test_our_engine_that_fails_stops_everything(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ours", lambda _: dataclasses.replace(GPTQ, packages=("no-such-engine",)))
    with pytest.raises(LiteError, match="lite gptq-int4: no-such-engine not installed"):
        measure.measure([DENSE], setting)


def test_the_tokens_that_are_timed_are_the_most_probable(tmp_path: Path, tokenizer_model: bytes) -> None:
    write_tiny_gptq_artifact(tmp_path / "int4", tokenizer_model)
    order = {name: getattr(GPTQ, name) for name in ("module", "form", "packages", "install")}
    process = Worker(
        Order(**order, folder=tmp_path, vocab_size=300, max_seq_len=40, device="cpu", threads=torch.get_num_threads())
    )
    seen: list[list[int]] = []
    logits: list[Any] = []
    read = process.engine.read

    def noted(input_ids: list[int]) -> Any:
        seen.append(input_ids)
        logits.append(read(input_ids).clone())
        return logits[-1]

    process.engine.read = noted  # type: ignore[method-assign]
    taken = process.round(24, 3)
    assert [len(taken[phase]) for phase in ("prefill", "decode")] == [1, 3]
    assert [len(ids) for ids in seen] == [24, 1, 1, 1, 1]
    assert [[int(values.argmax())] for values in logits[:-1]] == seen[1:]


# -- What follows from the times -------------------------------------------------------------------------------------


def test_32_layers_are_a_straight_line_of_each_round() -> None:
    found = with_real_depth({1: [[0.03], [0.02, 0.03, 0.9]], 3: [[0.07], [0.09]]})
    assert found[32] == [[pytest.approx(0.65)], [pytest.approx(0.03 + 31 * 0.03)]]
    assert with_real_depth({1: [[0.9]], 3: [[0.1]]})[32] == "noise: give it more --layers"
    assert 32 not in with_real_depth({1: [[0.9]], 3: "it has died"})
    assert with_real_depth({1: [[0.9]], 32: [[1.0]]})[32] == [[1.0]], "measured"


# -- Processes -------------------------------------------------------------------------------------------------------


def shell(script: str, folder: Path) -> Process:
    return Process(["sh", "-c", script], log=folder / "log.txt", threads=1)


def test_a_process_that_dies_or_is_slow_says_so(tmp_path: Path) -> None:
    with pytest.raises(LiteError, match="its process ended with signal 11: a word"):
        shell("echo a word >&2; kill -SEGV $$", tmp_path)
    with contextlib.closing(shell("echo '{}'; read line; echo '{\"said\": 1}'; sleep 60", tmp_path)) as started:
        assert started.ask("anything", limit_s=60) == {"said": 1}
        with pytest.raises(Unavailable, match=r"took longer than 0\.01 s"):
            started.ask("more", limit_s=0.01)


def test_a_worker_says_what_it_cannot_do(tmp_path: Path) -> None:
    order = {
        "module": "lite",
        "form": "onnx int8",
        "install": "x",
        "folder": str(tmp_path),
        "max_seq_len": 8,
        "vocab_size": 8,
    }
    order |= {"device": "cpu", "threads": 1}
    for packages, error, said in (
        (["no-such-engine"], Unavailable, "no-such-engine not installed: x"),
        ([], LiteError, "ArtifactError: .*int4"),
    ):
        command = [sys.executable, "-m", "benchmarks.speed.peers.worker", json.dumps(order | {"packages": packages})]
        with pytest.raises(error, match=said):
            Process(command, log=tmp_path / "log.txt", threads=1)


def test_whoever_ends_a_worker_ends_what_it_has_started(tmp_path: Path) -> None:
    started = shell('sleep 60 & echo "{\\"child\\": $!}"; wait', tmp_path)
    status = Path(f"/proc/{started.about['child']}/status")
    assert status.exists()
    started.close()
    deadline = time.monotonic() + 120
    # Nobody may have asked for its exit status yet: then it is a zombie.
    while status.exists() and "State:\tZ" not in status.read_text(encoding="ascii"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "2", "2"], "one point gives no line"),
        (["--prompt-tokens", "4090"], "at most 4096"),
        (["--engines", "vllm"], "invalid choice: 'vllm'"),
        (["--limit-s", "0"], "expected a whole number from 1"),
    ],
)
def test_wrong_use_is_told_before_anything_runs(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    assert said in capsys.readouterr().err
