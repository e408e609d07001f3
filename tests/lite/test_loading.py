"""Loading a model: what does not fit is refused then, and what the package gives to whoever imports it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from repository import ROOT, run_python
from tiny import relist, write_tiny_artifact

import lite
from lite.artifact.open import Artifact, load_artifact
from lite.engines.cores import available_cores
from lite.errors import ArtifactError, ContextLengthError, LiteError, PromptError
from lite.loading import load
from lite.model import FindingsModel
from lite.studies.results import StudyError
from lite.vision import VisionEncoder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"hidden_size": 32}}, "width 32"),
        ({"vision": {"image_size": 42}}, "28 pixels .* image_size 42"),
        ({"vision": {"num_patches": 640}}, "640 image tok"),
    ],
)
def test_parts_that_do_not_fit_fail_at_load(own_artifact: Path, changes: dict[str, Any], message: str) -> None:
    relist(own_artifact, "vision.onnx", **changes)
    with pytest.raises(ArtifactError, match=f"got .*{message}"):
        load(own_artifact, device="cpu")


def test_an_unknown_option_is_refused_with_the_known_ones(
    tiny_artifact: Artifact, tiny_model: FindingsModel, films: list[Path]
) -> None:
    with pytest.raises(TypeError, match="got the option 'devcie' .* engine, device, dtype"):
        load(tiny_artifact.path, devcie="cpu")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="got the option 'temperature' .* max_new_tokens, .* sampling"):
        tiny_model.findings(films[0], temperature=0.7)  # type: ignore[call-arg]


def test_a_small_vocabulary_fails_at_load(tmp_path: Path, tokenizer_model: bytes) -> None:
    artifact = write_tiny_artifact(tmp_path / "artifact", tokenizer_model, llama_changes={"vocab_size": 300})
    with pytest.raises(ArtifactError, match="420 pieces .* vocab_size 300"):
        load(artifact.path, device="cpu")


def test_a_vision_graph_of_another_shape_fails_at_load(own_artifact: Path) -> None:
    file = own_artifact / "vision.onnx"
    graph = onnx.load(file)
    graph.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 42
    graph.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 42
    onnx.save(graph, file)
    relist(own_artifact, "vision.onnx")
    with pytest.raises(ArtifactError, match=r"vision\.onnx: got"):
        VisionEncoder(load_artifact(own_artifact))


def test_what_is_no_graph_fails_at_load(own_artifact: Path) -> None:
    (own_artifact / "vision.onnx").write_bytes(b"\x00garbage")
    relist(own_artifact, "vision.onnx")
    with pytest.raises(ArtifactError, match="cannot load"):
        load(own_artifact, device="cpu")


def refusal(setup: str, artifact: Artifact) -> str:
    """Return what `load` says in a process where something was done to the packages."""
    code = f"""
import sys
{setup}
import lite
try:
    lite.load({str(artifact.path)!r})
except lite.BackendUnavailable as error:
    print(error)
"""
    return run_python("-c", code)


@pytest.mark.parametrize(("module", "extra"), [("onnxruntime", "cpu"), ("torch", "torch"), ("safetensors", "torch")])
def test_a_missing_package_names_its_extra(tiny_artifact: Artifact, module: str, extra: str) -> None:
    assert f"llava-rad-lite[{extra}]" in refusal(f"sys.modules[{module!r}] = None", tiny_artifact)


def test_a_torch_that_does_not_load_says_why(tiny_artifact: Artifact, tmp_path: Path) -> None:
    """A broken installation raises an ImportError that names no module."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object file')")
    assert "libcudart.so.99: cannot open" in refusal(f"sys.path.insert(0, {str(tmp_path)!r})", tiny_artifact)


def test_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr("lite.engines.cores._CGROUP_CPU_MAX", quota)
    assert available_cores() == 8
    for text, cores in (("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("garbage", 8)):
        quota.write_text(text)
        assert available_cores() == cores
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    quota.write_text("max 100000")
    assert available_cores() == 2
    quota.write_text("50000 100000")
    assert available_cores() == 1
    quota.write_text("max 100000")
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert available_cores() == 8


def test_public_surface() -> None:
    assert dir(lite) == sorted(lite.__all__)
    assert all(getattr(lite, name) is not None for name in lite.__all__)
    with pytest.raises(AttributeError, match="no attribute 'surprise'"):
        _ = lite.surprise


@pytest.mark.parametrize("name", ["decoder", "vision", "prompt", "tokenizer", "plan"])
def test_a_models_parts_are_read_only(tiny_model: FindingsModel, name: str) -> None:
    """The session holds its own: what is set here would have no effect."""
    with pytest.raises(AttributeError, match=f"cannot assign to field '{name}'"):
        setattr(tiny_model, name, None)


def test_the_base_install_is_what_the_runtime_imports() -> None:
    """Nothing more, and nothing less once an engine's extra is there."""
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    base = {name.lower() for name in re.findall(r'"([A-Za-z0-9-]+)', listed[1])}
    extras = {"onnxruntime", "pydicom", "safetensors", "torch"}
    imported: set[str] = set()
    for file in (ROOT / "lite").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    imported -= {*sys.stdlib_module_names, "kernels", "lite"}
    assert imported - extras == {"PIL" if name == "pillow" else name for name in base}


def test_errors_are_one_tree() -> None:
    errors = [getattr(lite, name) for name in lite.__all__ if name.endswith(("Error", "Unavailable"))]
    errors.remove(StudyError)
    assert all(issubclass(error, LiteError) for error in errors)
    assert issubclass(ContextLengthError, PromptError)
