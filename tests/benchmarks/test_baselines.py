"""Baselines and tolerances: what passes, what is better, what is worse, and how the file is read and rewritten."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gates.baselines import Gate, WrongUseError, read_gates, update_baselines
from benchmarks.gates.gate import SUBJECTS, main

TEXT = """\
# Why.
[fp16.bytes]
baseline = 1000  # in total
tolerance = "±10"

[fp16.mean_kl]
tolerance = "+50 %"
baseline = 2.600e-05

[imports.lite]
baseline = ["numpy"]
tolerance = "+0"
"""


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    path = tmp_path / "gates.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("baseline", "tolerance", "verdicts"),
    [
        (2.0, "+50 %", {"pass": [3.0, 2.0, 1.0], "better": [0.9], "REGRESSION": [3.01, math.nan, math.inf]}),
        (-2.0, "+50 %", {"pass": [-1.0, -2.0], "REGRESSION": [-0.99]}),
        (0.9, "-0.02", {"pass": [0.881, 0.9], "better": [0.93], "REGRESSION": [0.879, math.nan]}),
        (1000, "+64", {"pass": [1064, 936], "better": [935], "REGRESSION": [1065]}),
        (1000, "±10", {"pass": [990, 1000, 1010], "REGRESSION": [989, 1011, math.nan, ("numpy",)]}),
        (0.0, "+1e-6", {"pass": [0.0, 9e-7], "REGRESSION": [1.1e-6]}),
        (
            ("a", "b"),
            "+0",
            {"pass": [("a", "b")], "better": [("a",), ()], "REGRESSION": [("a", "b", "c"), ("c",), 1.0]},
        ),
        (("a", "b"), "±1", {"pass": [("a", "b", "c"), ("a",)], "REGRESSION": [(), ("a", "b", "c", "d")]}),
    ],
)
def test_a_tolerance_has_a_size_and_a_direction_and_what_is_far_on_the_better_side_is_no_regression(
    baseline: Any, tolerance: str, verdicts: dict[str, list[Any]]
) -> None:
    gate = Gate(baseline=baseline, tolerance=tolerance)
    assert {verdict: [gate.judge(value) for value in values] for verdict, values in verdicts.items()} == {
        verdict: [verdict] * len(values) for verdict, values in verdicts.items()
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[fp16.bytes", "cannot be read"),
        ("fp16 = 3", r"\[fp16\]: got a gate of something that is not measured"),
        ("[fp8.bytes]\nbaseline = 1\ntolerance = '+0'", r"\[fp8\]: got a gate of something .* fp16, gptq-int8"),
        ("[fp16.bytes]\nbaseline = 1", r"\[fp16\.bytes\]: got other keys"),
        ("[fp16.bytes]\nbaseline = 1\ntolerance = '+0'\nworse = 'above'", "got other keys"),
        ("[fp16.bytes]\nbaseline = 'much'\ntolerance = '+0'", "got the baseline 'much'"),
        ("[fp16.bytes]\nbaseline = true\ntolerance = '+0'", "got the baseline True"),
        ("[fp16.bytes]\nbaseline = 1\ntolerance = 0.1", 'got the tolerance "0.1" · expected one such as'),
        ("[fp16.bytes]\nbaseline = 1\ntolerance = '50 %'", 'got the tolerance "50 %"'),
    ],
)
def test_a_gates_file_that_cannot_be_used_is_wrong_use(
    gates: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    gates.write_text(text, encoding="utf-8")
    with pytest.raises(WrongUseError, match=message):
        read_gates(gates, SUBJECTS)
    assert main(["--gates", str(gates)]) == 2
    assert str(gates) in capsys.readouterr().err


def test_an_update_changes_the_numbers_and_nothing_else(gates: Path) -> None:
    values = {
        "fp16.bytes": 1024,
        "fp16.mean_kl": 2.6000001e-5,
        "imports.lite": ("numpy", "torch"),
        "fp16.same_top": 1.0,
    }
    changes = update_baselines(gates, values)
    assert changes == ["fp16.bytes: 1000 → 1024", 'imports.lite: ["numpy"] → ["numpy", "torch"]']
    expected = TEXT.replace("1000", "1024").replace('["numpy"]', '["numpy", "torch"]')
    assert gates.read_text(encoding="utf-8") == expected
    assert update_baselines(gates, values) == []
