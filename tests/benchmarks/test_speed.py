"""The harness of all measurements of speed: rows, tables, turns, the document; and the random model that they share."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from repository import run_python

from benchmarks.speed import COMMANDS, main
from benchmarks.speed.harness import Clock, Record, Report, Row, Unavailable, in_turns, kept_apart, table
from benchmarks.speed.weights import Model, Shapes
from lite.errors import LiteError
from lite.eval.figures import quantiles


def test_a_time_stands_beside_its_yardstick() -> None:
    row = Row(
        names={"engine": "a", "rows": "1"}, time=quantiles([0.04, 0.05, 0.06]), nbytes=4_000_000_000, bandwidth=1e11
    )
    row.cells["more"] = "x"
    assert row.line() == {
        "engine": "a", "rows": "1", "ms": "50", "p20–p80": "44–56", "MB": "4,000", "GB/s": "80", "of bandwidth": "80%",
        "more": "x",
    }  # fmt: skip
    document = row.document()
    assert (document["engine"], document["share"], document["time"]["p50"]) == ("a", 0.8, 0.05)
    assert Row(names={"engine": "b"}, why="not installed").line() == {"engine": "b", "ms": "–"}
    assert Row(names={"engine": "b"}, why="off", is_wrong=True).line()["ms"] == "WRONG"


def test_a_table_has_all_columns_and_no_gaps() -> None:
    assert table([{"a": "1", "b": "2"}, {"a": "3", "c": "4"}]).splitlines() == [
        "| a | b | c |", "|---|--:|--:|", "| 1 | 2 | – |", "| 3 | – | 4 |",
    ]  # fmt: skip


def test_a_report_tells_why_and_whose_fault_it_is() -> None:
    report = Report(title="Decoding")
    for name in "abc":
        report.add(Row(names={"engine": name}, why="not installed"))
    report.add(Row(names={"engine": "theirs"}, why="failed", is_wrong=True), ours=False)
    report.add(Row(names={"engine": "ours"}, why="off by 3", is_wrong=True))
    assert report.wrong == ["ours: off by 3"]
    text = report.markdown()
    assert "- a, and 2 more: not installed" in text
    assert "- theirs: failed" in text
    assert "- WRONG: ours: off by 3" in text
    assert text.count("off by 3") == 1
    assert text.count("WRONG") == 2


def test_turns_are_taken_and_one_that_fails_is_left_out() -> None:
    order: list[str] = []

    def turn(name: str, fails_at: int = 0) -> list[float]:
        order.append(name)
        if fails_at == len(order):
            raise RuntimeError("no memory\nfor long")
        return [1.0, 3.0]

    found = in_turns({"good": lambda: turn("good"), "bad": lambda: turn("bad", 4)}, 3)
    assert order == ["good", "bad", "good", "bad", "good"]
    assert found == {"good": [[1.0, 3.0]] * 3, "bad": "failed (RuntimeError: no memory)"}
    row = Row(names={"engine": "good"}, against="other")
    row.took(found["good"], [[2.0, 2.0], [1.0, 1.0], [1.0, 1.0]])
    assert row.time is not None
    assert (row.time.p50, row.time.count) == (2.0, 6)
    assert row.line()["× other"] == "2.00 (1.40–2.00)", "round by round"
    row.took(found["bad"])
    assert (row.why, row.is_wrong) == (found["bad"], True)
    clock = Clock()
    for _ in range(3):
        clock.mark()
    assert len(clock.seconds()) == 2
    assert clock.seconds() == []


def test_sections_are_kept_apart_and_written_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    record = Record(command="python -m benchmarks speed x", file=file)
    record.begin("A note.", card="some")
    errors = {"odd": ValueError("odd\nmore"), "absent": Unavailable("no such card"), "ours": LiteError("got"), "": None}
    for name, error in errors.items():
        report = Report(title=name.title(), lines=[{"what": "half"}], figures={"value": math.nan})
        with kept_apart(report):
            if error is not None:
                raise error
        record.add(name, report)
        assert list(json.loads(file.read_text())["sections"])[-1] == name
    document = json.loads(file.read_text())
    assert document["sections"]["odd"]["wrong"] == ["Odd: failed (ValueError: odd)"]
    assert document["sections"]["absent"]["wrong"] == []
    assert document["sections"][""]["value"] is None
    assert (document["card"], document["command"]) == ("some", "python -m benchmarks speed x")
    assert document["machine"]
    assert "numpy" in document["versions"]
    assert record.end() == 1
    printed = capsys.readouterr().out
    assert "Not measured to the end: failed (ValueError: odd)." in printed
    assert "- A note." in printed
    assert "2 of ours wrong: Odd: failed (ValueError: odd); Ours: got." in printed


def test_weights_depend_on_their_names_alone() -> None:
    shapes = Shapes(hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1, vocab_size=64)
    shallow, deep = (Model(shapes=shapes, num_layers=layers) for layers in (1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    drawn = deep.tensor(name)
    assert np.array_equal(shallow.tensor(name), drawn)
    assert not np.array_equal(deep.tensor(name.replace("up", "gate")), drawn)
    assert drawn.std() == pytest.approx(128**-0.5, rel=0.05)
    assert deep.tensor("lm_head.weight").std() == pytest.approx(3 * 128**-0.5, rel=0.05)
    assert deep.tensor_shapes["model.layers.1.self_attn.v_proj.weight"] == (64, 128)


def test_the_default_shapes_are_the_published_ones() -> None:
    shapes = Shapes()
    # 32 layers of 4 * 4096² + 3 * 4096 * 11008 weights, embeddings and head of 32000 * 4096, and 65 norms of 4096.
    assert sum(math.prod(shape) for shape in shapes.tensors(32).values()) == 6_738_415_616
    lora = shapes.lora(32)
    assert len(lora) == 448
    # The published adapter_model.bin: 319,971,402 bytes, names and index included.
    assert 2 * sum(math.prod(shape) for shape in lora.values()) == 319_815_680
    config = shapes.config(32)
    heads = ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    assert [config[key] for key in heads] == [32, 32, 4096, 1e-5, 10000.0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main([command, "--help"])
    assert f"python -m benchmarks speed {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        # A machine with a GPU that is lent for an hour: torch, Triton, numpy, safetensors, and no network.
        ("benchmarks.speed.gpu", "sentencepiece PIL onnx onnxruntime transformers jinja2 matplotlib cv2"),
        # The peers' own environment: numpy.
        (
            "benchmarks.speed.peers.worker, benchmarks.speed.peers.llamacpp",
            "torch safetensors sentencepiece PIL tqdm onnxruntime",
        ),
        # What is measured in this process is ours without torch.
        ("benchmarks.speed.peers.worker, benchmarks.speed.peers.lite", "torch safetensors"),
    ],
)
def test_what_runs_elsewhere_needs_no_more_than_is_there(modules: str, absent: str) -> None:
    code = f"import sys, {modules}; print(*[name for name in {absent.split()} if name in sys.modules])"
    assert run_python("-c", code) == ""
