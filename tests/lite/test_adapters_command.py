"""The commands with a hospital's adapter: `--adapter` for all films, `--adapters` for those that are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hospital
import pytest
from bench_command import write_list

from lite.__main__ import main
from lite.artifact.open import Artifact
from lite.cohort.worker import Drafter, Work
from lite.loading import load

ON = ("--engine", "torch", "--device", "cpu")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(adapted_artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(command: str, *arguments: object) -> tuple[int, str, str]:
        status = main([command, str(adapted_artifact.path), *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def test_generate_and_run_use_it_and_a_file_is_of_one(
    run: Run, adapted_artifact: Artifact, films: list[Path], tmp_path: Path
) -> None:
    with load(adapted_artifact.path, engine="torch", device="cpu", adapters=["a", "b"]) as model:
        texts = {name: model.findings(films[0], adapter=name).text for name in (None, "a", "b")}
    for name, text in texts.items():
        status, out, _ = run("generate", films[0], "--json", *ON, *([] if name is None else ["--adapter", name]))
        assert (status, json.loads(out)["prediction"], json.loads(out)["adapter"]) == (0, text, name)
    assert run("generate", films[0], *ON, "--adapter", "c")[2].endswith("export adapter`\n")
    listed, results = tmp_path / "list.json", tmp_path / "out.jsonl"
    entry = {"conversations": [{"value": "<image>\nDescribe."}, {"value": "No effusion."}]}
    listed.write_text(json.dumps([entry | {"id": f"{i}", "image": str(film)} for i, film in enumerate(films[:2])]))
    command = ("run", listed, "--out", results, *ON)
    assert run(*command, "--adapter", "a", "--limit", "1", "--confidence", "auto")[0] == 0
    line = json.loads(results.read_text())
    assert (line["prediction"], line["adapter"], line["request"]["adapter"]) == (texts["a"], "a", "a")
    for other in (["--adapter", "b"], []):
        status, _, err = run(*command, "--confidence", "auto", *other)
        assert (status, "got results of {" in err, results.read_text().count("\n")) == (1, True, 1)
    assert run(*command, "--confidence", "auto", "--adapter", "a")[0] == 0
    assert results.read_text().count("\n") == 2
    # A calibration is of one adapter. Texts of random weights state nothing: it comes as far as that.
    assert "got drafts with the adapter a · expected no adapter" in run("confidence", results, *ON)[2]
    assert "0 sentences that state something" in run("confidence", results, "--adapter", "a", *ON)[2]
    assert "0 sentences that state something" in run("confidence", listed, "--adapter", "b", *ON)[2]


def test_confidence_is_of_the_adapter_that_is_named_or_of_the_artifacts_own(
    run: Run, adapted_artifact: Artifact, films: list[Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("lite.eval.calibration.find_calibration", lambda *given: asked.append(given[2]))
    for name in ([], ["--adapter", "b"]):
        assert run("generate", films[0], *ON, *name, "--confidence", "auto")[0] == 0
    assert asked == [None, "b"]
    own = tmp_path / "own"
    factors = hospital.stored_factors(adapted_artifact.decoder_config())
    hospital.artifact_with_adapters(adapted_artifact.with_parts(adapters={}), own, published=factors)
    listed = write_list(tmp_path, films[:1])
    assert main(["confidence", str(own), str(listed), *ON]) == 1
    assert "0 sentences that state something" in capsys.readouterr().err


def test_a_worker_of_a_cluster_uses_it(adapted_artifact: Artifact, films: list[Path]) -> None:
    work = Work(
        artifact=str(adapted_artifact.path), artifact_id=adapted_artifact.id, batch_size=1, folder=".",
        options={"engine": "torch", "device": "cpu", "adapters": ("b",)}, request={"adapter": "b"},
    )  # fmt: skip
    (line,) = Drafter(work)({"id": ["1"], "study": [json.dumps({"image": str(films[0])})]})["line"]
    assert json.loads(line)["adapter"] == "b"


def test_plan_and_info_tell_of_them(run: Run, adapted_artifact: Artifact) -> None:
    status, out, _ = run("plan", *ON, "--adapters", "a, b", "--json")
    assert (status, json.loads(out)["adapters"]) == (0, ["a", "b"])
    for wrong in ("a,", ""):
        with pytest.raises(SystemExit):
            run("plan", "--adapters", wrong)
    _, out, _ = run("info")
    for name, part in adapted_artifact.manifest.parts.adapters.items():
        assert part.fidelity is not None
        own = ", a projector of its own" if name == "b" else ""
        assert f"adapter {name:<16}rank {part.rank}, trained on the base model{own}\n" in out
        assert f"{part.fidelity.divergence} from the checkpoint with it, along the reports of 2 studies" in out
