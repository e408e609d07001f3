"""The gate: green on what is exported today, red with its numbers on a decoder off by 5 % in one layer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_baselines import TEXT
from test_compare import scaled_copy

import lite
from benchmarks import exports
from benchmarks.exports import Source
from benchmarks.gates import gate, slim
from benchmarks.gates.baselines import Judged, read_gates
from benchmarks.gates.gate import SUBJECTS, main
from benchmarks.quality.compare import draft
from benchmarks.quality.engines import compare_engines
from export.options import export_parser
from lite.artifact.open import Artifact, load_artifact
from lite.errors import LiteError
from lite.loading import load
from lite.studies.sources.listed import read_studies
from lite.studies.study import Study

ONLY = ("--only", "fp16", "imports")


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    path = tmp_path / "gates.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the gate is made to measure: passes the gates above, which are of nothing else."""
    values: dict[str, Any] = {"fp16.bytes": 1000, "fp16.mean_kl": 2e-5, "imports.lite": ("numpy",)}
    monkeypatch.setattr(gate, "measure", lambda *_: values)
    return values


# -- Command line ----------------------------------------------------------------------------------------------------


def verdicts(printed: str) -> dict[str, str]:
    """Read gate and verdict from the table."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    return {row[0]: row[-1] for row in rows[2:]}


def test_what_passes_is_listed_with_machine_and_versions(
    gates: Path, measured: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--gates", str(gates), *ONLY]) == 0
    printed = capsys.readouterr().out
    assert verdicts(printed) == dict.fromkeys(measured, "pass")
    assert "REGRESSION" not in printed
    assert re.search(r"^machine: .*core", printed, re.MULTILINE)
    assert re.search(r"^versions: Python 3.*torch 2", printed, re.MULTILINE)


def test_a_regression_names_metric_old_new_and_tolerance(
    gates: Path, measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A metric without a baseline beside a regression: the regression decides.
    measured |= {"fp16.mean_kl": 0.004, "imports.lite": ("cv2", "numpy"), "fp16.same_top": 0.5}
    assert main(["--gates", str(gates), *ONLY, "--json", str(tmp_path / "gate.json")]) == 1
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "REGRESSION: fp16.mean_kl was 2.6e-05, is 0.004, tolerance +50 %" in lines
    assert "REGRESSION: imports.lite was 1 package, is 2 packages +cv2, tolerance +0" in lines
    expected = ["pass", "REGRESSION", "no baseline", "REGRESSION"]
    assert list(verdicts(printed).values()) == expected
    written = json.loads((tmp_path / "gate.json").read_text(encoding="utf-8"))
    assert [row["verdict"] for row in written["gates"]] == expected
    assert written["gates"][1] == {
        "name": "fp16.mean_kl",
        "value": 0.004,
        "gate": {"baseline": 2.6e-5, "tolerance": "+50 %"},
        "verdict": "REGRESSION",
    }
    assert written["gates"][3]["value"] == ["cv2", "numpy"]
    assert {"machine", "versions", "command"} < written.keys()


def test_no_baseline_is_neither_a_pass_nor_a_regression(
    gates: Path, measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured["fp16.same_top"] = 0.5
    assert main(["--gates", str(gates), *ONLY]) == 3
    assert "no baseline: fp16.same_top was –, is 0.5, tolerance –" in capsys.readouterr().out
    # What has not even a value has failed.
    assert main(["--gates", str(gates), *ONLY, "slim"]) == 1
    assert "REGRESSION: slim was –, is failed, tolerance –" in capsys.readouterr().out
    assert main(["--gates", str(tmp_path / "none.toml")]) == 3
    assert "got no gates file" in capsys.readouterr().err


def test_update_prints_old_and_new_and_then_passes_but_for_what_failed(
    gates: Path, measured: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    measured["fp16.mean_kl"] = 0.004
    assert main(["--gates", str(gates), *ONLY, "--update"]) == 0
    printed = capsys.readouterr().out
    assert "fp16.mean_kl: 2.600e-05 → 0.004000" in printed.splitlines()
    assert verdicts(printed)["fp16.mean_kl"] == "pass"
    del measured["fp16.mean_kl"]
    measured["fp16.bytes"] = 2000
    assert main(["--gates", str(gates), *ONLY, "--update"]) == 1
    updated = read_gates(gates, SUBJECTS)
    assert (updated["fp16.mean_kl"].baseline, updated["fp16.bytes"].baseline) == (0.004, 2000)


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(["--only", "fp8"])
    (tmp_path / "fp16").mkdir()
    assert main(["--artifacts", str(tmp_path), "--only", "fp16", "bnb-nf4"]) == 2
    assert f"{tmp_path / 'bnb-nf4'}: got no such folder" in capsys.readouterr().err


# -- Exporting and measuring -----------------------------------------------------------------------------------------


def test_candidates_are_commands_of_the_exporter(tmp_path: Path) -> None:
    source = Source(verify=tmp_path, calibration=tmp_path, device="cpu")
    for name, recipe in gate.CANDIDATES.items():
        options = export_parser().parse_args(source.command(recipe, tmp_path / name)[3:])
        assert (options.vision, options.decoder) == (("int8", "fp16") if name == "vision-int8" else ("fp32", name))
        assert options.engine == ("onnx" if name == "gptq-int4" else "torch")
        assert recipe.calibrated == name.startswith("gptq") == (options.calibration_data is not None)


def test_an_export_that_fails_is_a_regression(
    tiny_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(command: list[str]) -> None:
        raise LiteError(f"exit status 1: no {Path(command[command.index('--out') + 1]).name}")

    # What an earlier run has left must not be taken for what this one could not export.
    shutil.copytree(tiny_artifact.path, tmp_path / "gate" / "fp16")
    monkeypatch.setattr(gate, "OUT", tmp_path / "gate")
    monkeypatch.setattr(gate, "NUM_CALIBRATION_FILMS", 1)
    monkeypatch.setattr(exports, "measured_run", fail)
    # Imports are measured of another artifact.
    assert main(["--only", "imports", "bnb-nf4", "--json", str(tmp_path / "gate.json")]) == 1
    printed = capsys.readouterr()
    for name in ("gptq-int4", "bnb-nf4"):
        assert f"error: {name}: exit status 1: no {name}" in printed.err.splitlines()
    assert "REGRESSION: imports.lite was 0 packages, is failed, tolerance +0" in printed.out.splitlines()
    failed = [name for name in read_gates(gate.GATES, SUBJECTS) if name.startswith(("bnb-nf4.", "imports."))]
    assert len(failed) == 8
    assert verdicts(printed.out) == dict.fromkeys(failed, "REGRESSION")
    assert {row["value"] for row in json.loads((tmp_path / "gate.json").read_text())["gates"]} == {None}


@pytest.fixture(scope="module")
def onnx_artifact(demo_onnx_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The candidate gptq-int4, under the name that the gate gives it."""
    out = tmp_path_factory.mktemp("onnx") / "gptq-int4"
    out.symlink_to(demo_onnx_artifact.path)
    return load_artifact(out)


@pytest.mark.full
def test_green_on_what_is_exported_and_red_on_a_layer_off_by_5_percent(
    onnx_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The committed baselines, record and films; the artifact is exported as the gate would."""
    damaged = tmp_path / "damaged"
    scaled_copy(onnx_artifact, damaged / "gptq-int4", r"model\.layers\.1\..*\.scales", 1.05)
    subjects = ("gptq-int4", "gptq-int4-engines")
    assert main(["--artifacts", str(onnx_artifact.path.parent), "--only", *subjects]) == 0
    green = capsys.readouterr().out
    gates = read_gates(gate.GATES, SUBJECTS)
    expected = [name for name in gates if name.startswith("gptq-int4")]
    assert len(expected) == 15
    assert verdicts(green) == dict.fromkeys(expected, "pass")
    assert main(["--artifacts", str(damaged), "--only", "gptq-int4"]) == 1
    red = capsys.readouterr().out
    assert verdicts(red)["gptq-int4.mean_kl"] == "REGRESSION"
    assert verdicts(red)["gptq-int4.bytes"] == verdicts(red)["gptq-int4.plan_error"] == "pass"
    old = f"{gates['gptq-int4.mean_kl'].baseline:.4g}"
    line = re.search(r"^REGRESSION: gptq-int4\.mean_kl was (\S+), is (\S+), tolerance \+150 %$", red, re.MULTILINE)
    assert line
    assert line[1] == old
    # By far: not what another CPU would do.
    assert float(line[2]) > 10 * float(old)
    # decoder.onnx has kept its weights: the engines no longer compute the same, and the caches of each of them do.
    tables = compare_engines(damaged / "gptq-int4", read_studies(gate.STUDIES)[:3])
    losses = {(row.name, row.loss.reference): row.loss for rows in tables.values() for row in rows if row.loss}
    for candidate, yardstick, metric, passes in (
        ("onnx", "torch", "onnx_kl_to_torch", False),
        ("onnx-int8-cache", "onnx", "onnx_kl_of_int8_cache", True),
        ("torch-int8-cache", "torch", "torch_kl_of_int8_cache", True),
    ):
        lost = losses[candidate, yardstick].divergence.mean_kl.value
        assert (gates[f"gptq-int4-engines.{metric}"].judge(lost) != "REGRESSION") is passes, metric


def test_the_plan_is_what_decoder_and_cache_take(
    tiny_artifact: Artifact, demo_int4_artifact: Artifact, films: list[Path]
) -> None:
    for artifact, film in ((tiny_artifact, films[0]), (demo_int4_artifact, read_studies(gate.STUDIES)[0].image)):
        model = load(artifact.path, device="cpu")
        one, two = (draft(model, [Study(film)] * rows, name="demo", batch_size=rows) for rows in (1, 2))
        assert gate.plan_error(model, one) == gate.plan_error(model, two) == 0
        assert two[0].memory.cache_bytes > one[0].memory.cache_bytes > 0


@pytest.mark.full
def test_a_package_too_many_is_named_and_no_other_is(onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has loaded one package more than the committed baselines know."""
    monkeypatch.setattr(slim, "_GENERATE", slim._GENERATE.replace("import lite\n", "import lite, pluggy\n", 1))
    gates = read_gates(gate.GATES, SUBJECTS)
    found = gate.measure_imports(onnx_artifact.path, read_studies(gate.STUDIES)[0].path)
    lite_, findings, onnx = (
        str(Judged(name=name, value=found[name], gate=gates[f"imports.{name}"]))
        for name in ("lite", "findings", "onnx")
    )
    assert lite_ == "REGRESSION: lite was 0 packages, is 1 package +pluggy, tolerance +0"
    assert onnx == "REGRESSION: onnx was 4 packages, is 5 packages +pluggy, tolerance +0"
    assert re.findall(r"\+(\w+)", findings) == ["pluggy", "0"]


def test_an_environment_without_torch_is_measured_in_megabytes_texts_and_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gptq-int4").mkdir()
    run = slim.Run(
        lite=tmp_path,
        after_import=(),
        after_findings=("PIL", "numpy", "onnxruntime", "sentencepiece"),
        texts=("a",) * 23 + ("b",),
    )
    measured = slim.Slim(sizes={"numpy": 150_000_000, "pillow": 50_000_000}, run=run, expected=("a",) * 24)
    asked: list[tuple[Path, int]] = []

    def measure(artifact: Path, films: list[Path]) -> slim.Slim:
        asked.append((artifact, len(films)))
        return measured

    monkeypatch.setattr(slim, "measure_slim", measure)
    arguments = ["--artifacts", str(tmp_path), "--only", "slim"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert verdicts(printed) == {"slim.mb": "pass", "slim.imports": "pass", "slim.same_text": "REGRESSION"}
    assert re.search(r"\| slim\.mb +\| +\S+ \| +200 \|", printed)
    assert asked == [(tmp_path / "gptq-int4", 24)]


def test_ratios_are_of_medians_and_the_artifacts_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    # By artifact and engine: seconds of the tower and of a decoded token.
    pace = {
        "fp16 by torch": (0.2, 0.01),
        "gptq-int4 by torch": (0.2, 0.03),
        "vision-int8 by torch": (0.1, 0.01),
        "gptq-int4 by onnx": (0.2, 0.003),
    }

    def fake(path: Path, *, engine: str, device: str = "cpu", cache_dtype: str = "float32") -> Any:
        assert (device, cache_dtype) == ("cpu", "float32")
        name = f"{path.name} by {engine}"

        def findings(image: object, reason: object) -> Any:
            # The first study warms up, and two more are slow by chance: with it they would be half of all.
            slow = 50 if name != "fp16 by torch" and turns.count(name) < 3 else 1
            turns.append(name)
            vision_s, token_s = pace[name]
            # One slow token in a text does not count either.
            steps = (slow * token_s, slow * token_s, 40 * token_s)
            return SimpleNamespace(timings=SimpleNamespace(vision_s=slow * vision_s, decode_steps_s=steps))

        return SimpleNamespace(findings=findings, artifact=None)

    monkeypatch.setattr(lite, "load", fake)
    paths = {name: Path(name) for name in gate.NEEDS["timed"]}
    ratios = gate.measure_ratios(paths, read_studies(gate.STUDIES)[:5])
    assert list(ratios.values()) == [pytest.approx(3), pytest.approx(0.5), pytest.approx(0.1)]
    assert list(ratios) == ["int4_over_fp16_decode", "int8_over_fp32_vision", "onnx_over_torch_decode"]
    assert turns == list(pace) * 6
