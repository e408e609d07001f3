"""`python -m export onnx`: decoder.onnx is added to an artifact, whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

import lite
from export import OnnxSettings, add_onnx
from export.__main__ import main as export_main
from lite.__main__ import main as lite_main
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import OnnxPart
from lite.errors import ArtifactError, LiteError

QUICK = ["--verify-studies", "1", "--verify-tokens", "4", "--device", "cpu", "--quiet"]


@pytest.fixture
def own_gptq_artifact(tmp_path: Path, tiny_gptq_artifact: Artifact) -> Path:
    return Path(shutil.copytree(tiny_gptq_artifact.path, tmp_path / "own-gptq"))


def siblings(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.parent.iterdir())


def test_it_is_added_in_place_and_again(
    own_gptq_artifact: Path, films: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_artifact(own_gptq_artifact)
    reader = lite.load(own_gptq_artifact, device="cpu")
    expected = reader.findings(films[0]).text
    beside = siblings(own_gptq_artifact)
    assert export_main(["onnx", str(own_gptq_artifact), *QUICK]) == 0
    out, err = capsys.readouterr()
    first = load_artifact(own_gptq_artifact)
    assert first.id != before.id
    assert first.id in out
    assert "--engine onnx" in out
    assert err == ""
    first.verify()
    assert first.manifest.parts.decoder_onnx is not None
    kept = {name: record for name, record in first.manifest.files.items() if name in before.manifest.files}
    assert kept == before.manifest.files
    assert siblings(own_gptq_artifact) == beside
    # Who had it open goes on, and reads the same.
    assert reader.findings(films[0]).text == expected
    opened = lite.load(own_gptq_artifact, engine="onnx")
    text = opened.findings(films[0]).text
    assert export_main(["onnx", str(own_gptq_artifact), *QUICK]) == 0
    again = load_artifact(own_gptq_artifact)
    assert again.id == first.id, "the same bytes, the same id"
    assert opened.findings(films[0]).text == lite.load(own_gptq_artifact, engine="onnx").findings(films[0]).text == text


def test_out_leaves_the_old_one(own_gptq_artifact: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in own_gptq_artifact.rglob("*") if path.is_file()}
    out = tmp_path / "other"
    assert export_main(["onnx", str(own_gptq_artifact), "--out", str(out), "--activations", "float16", *QUICK]) == 0
    assert {path: path.read_bytes() for path in own_gptq_artifact.rglob("*") if path.is_file()} == before
    part = load_artifact(out).manifest.parts.decoder_onnx
    assert part is not None
    assert part.cache_dtypes == ("float16", "int8")
    # A place that is taken is not overwritten.
    assert export_main(["onnx", str(own_gptq_artifact), "--out", str(out), *QUICK]) == 1


def test_what_cannot_be_done_leaves_everything(
    tiny_artifact: Artifact, own_gptq_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = siblings(tiny_artifact.path)
    for artifact, message in (
        (tiny_artifact.path, "got a decoder in fp16 · expected gptq-int4 or gptq-int8"),
        (tmp_path / "nowhere", "got a path that does not exist"),
    ):
        assert export_main(["onnx", str(artifact), *QUICK]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert message in err
    assert siblings(tiny_artifact.path) == beside
    file = own_gptq_artifact / "decoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    beside = siblings(own_gptq_artifact)
    assert export_main(["onnx", str(own_gptq_artifact), *QUICK]) == 1
    assert "got sha256" in capsys.readouterr().err
    assert siblings(own_gptq_artifact) == beside


@pytest.mark.parametrize("measured", ["divergence", "int8_cache"])
def test_a_graph_that_computes_something_else_is_not_kept(
    own_gptq_artifact: Path, monkeypatch: pytest.MonkeyPatch, measured: str
) -> None:
    from export import verify

    measure_onnx = verify.measure_onnx

    def worse(*arguments: Any, **settings: Any) -> OnnxPart:
        part = measure_onnx(*arguments, **settings)
        assert part.fidelity is not None
        found = dataclasses.replace(getattr(part.fidelity, measured), mean_kl=float("nan"))
        return dataclasses.replace(part, fidelity=dataclasses.replace(part.fidelity, **{measured: found}))

    monkeypatch.setattr(verify, "measure_onnx", worse)
    before, beside = load_artifact(own_gptq_artifact), siblings(own_gptq_artifact)
    with pytest.raises(ArtifactError, match=r"parity of decoder\..*onnx: got mean KL nan .*not kept"):
        add_onnx(own_gptq_artifact, OnnxSettings(verify_studies=1, verify_tokens=4, device="cpu"))
    assert load_artifact(own_gptq_artifact) == before
    assert siblings(own_gptq_artifact) == beside


@pytest.mark.parametrize(
    ("error", "said"), [(28, "got a full disk"), (5, "got an error from the system (Input/output")]
)
def test_a_full_disk_leaves_everything_and_is_told_in_words(
    own_gptq_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: int, said: str
) -> None:
    def full(*arguments: Any, **settings: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("export.write.onnx_part.write_int8_cache_graph", full)
    before, beside = load_artifact(own_gptq_artifact), siblings(own_gptq_artifact)
    assert export_main(["onnx", str(own_gptq_artifact), *QUICK]) == 1
    assert capsys.readouterr().err.startswith(f"error: {own_gptq_artifact}: {said}")
    assert load_artifact(own_gptq_artifact) == before
    before.verify()
    assert siblings(own_gptq_artifact) == beside


def test_an_onnx_runtime_without_an_int8_cache_writes_the_float_one(
    own_gptq_artifact: Path, films: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    assert export_main(["onnx", str(own_gptq_artifact), *QUICK]) == 0
    assert "its int8 cache       none: it takes onnxruntime 1.27 or newer at export" in capsys.readouterr().out
    artifact = load_artifact(own_gptq_artifact)
    assert artifact.manifest.parts.decoder_onnx is not None
    assert artifact.manifest.parts.decoder_onnx.cache_dtypes == ("float32",)
    assert "decoder.int8_cache.onnx" not in artifact.manifest.files
    assert lite_main(["info", str(own_gptq_artifact)]) == 0
    assert lite.load(own_gptq_artifact, engine="onnx").findings(films[0]).cache_dtype == "float32"
    with pytest.raises(LiteError, match="got cache_dtype 'int8' · expected float32"):
        lite.load(own_gptq_artifact, engine="onnx", cache_dtype="int8")


def test_places_that_are_refused(
    own_gptq_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_artifact(own_gptq_artifact)
    assert export_main(["onnx", str(own_gptq_artifact), "--out", str(own_gptq_artifact / "sub"), *QUICK]) == 1
    assert "got a place inside the artifact" in capsys.readouterr().err
    monkeypatch.chdir(own_gptq_artifact)
    assert export_main(["onnx", ".", *QUICK]) == 1
    assert "got the folder you are in" in capsys.readouterr().err
    assert export_main(["onnx", ".", "--out", "../beside", *QUICK]) == 0
    assert load_artifact("../beside").manifest.parts.decoder_onnx is not None
    assert load_artifact(own_gptq_artifact) == before


def test_ctrl_c_leaves_everything(own_gptq_artifact: Path) -> None:
    before, beside = load_artifact(own_gptq_artifact), siblings(own_gptq_artifact)
    with subprocess.Popen(
        [sys.executable, "-m", "export", "onnx", own_gptq_artifact, "--verify-studies", "400", "--device", "cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(own_gptq_artifact.parent.glob(".*.partial/decoder.onnx.data")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=300)
    assert process.returncode == 130, told
    assert printed == ""
    assert told.splitlines()[-1] == f"interrupted: {own_gptq_artifact} is as it was"
    assert "Traceback" not in told
    assert load_artifact(own_gptq_artifact) == before
    before.verify()
    assert siblings(own_gptq_artifact) == beside
