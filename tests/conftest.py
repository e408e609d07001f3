"""Fixtures: a tiny random artifact for most tests, and the demo model's own artifact."""

from __future__ import annotations

import functools
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from exported import check_unchanged, export_demo_gptq, exported, made_once
from repository import CHECKPOINT
from tiny import film, write_tiny_artifact, write_tiny_gptq_artifact

from lite.artifact.open import Artifact
from lite.loading import load
from lite.model import FindingsModel

DEMO_CHECKPOINT = CHECKPOINT / "llava-rad-phantom", CHECKPOINT / "base"
SENTENCES = """The heart size is normal. The lungs are clear. No pleural effusion or pneumothorax is seen.
A chat between a curious user and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:
Provide a description of the findings in the radiology image given the following indication: cough
There is a small left pleural effusion. Mild cardiomegaly. Right lower lobe consolidation, 3.4 cm."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run what is marked `full` or `gpu`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `full` or `gpu`, unless --full asks for it."""
    if config.getoption("full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full") or item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def shared(name: str, make: Callable[[Path], Artifact], *settings: object) -> Iterator[Artifact]:
    """Yield the artifact that `make` exports once, and fail if a test has changed it."""
    artifact = exported(name, make, *settings)
    yield artifact
    check_unchanged(artifact.path.parent)


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A SentencePiece model with Llama's settings: BPE, byte fallback, no normalisation, spaces kept."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES.splitlines()),
        model_writer=written,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


@pytest.fixture(scope="session")
def tiny_gptq_artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Artifact:
    """A complete artifact with random weights in 4 bits. Read only."""
    return write_tiny_gptq_artifact(tmp_path_factory.mktemp("tiny-gptq") / "artifact", tokenizer_model)


@pytest.fixture(scope="session")
def tiny_onnx_artifact(tiny_gptq_artifact: Artifact) -> Iterator[Artifact]:
    """The same with decoder.onnx. Read only: take `own_onnx_artifact` to damage one."""
    from export import OnnxSettings, add_onnx

    settings = OnnxSettings(verify_studies=2, verify_tokens=16, device="cpu")
    make = functools.partial(add_onnx, tiny_gptq_artifact.path, settings)
    yield from shared("tiny-onnx", lambda out: make(out=out), tiny_gptq_artifact.id, settings)


@pytest.fixture
def own_onnx_artifact(tmp_path: Path, tiny_onnx_artifact: Artifact) -> Path:
    """A copy of it that the test may damage."""
    return Path(shutil.copytree(tiny_onnx_artifact.path, tmp_path / "own-onnx"))


@pytest.fixture(scope="session")
def adapted_artifact() -> Iterator[Artifact]:
    """A tiny random model in 4 bits, with the adapters of `adapted.NAMES`. Read only."""
    import adapted

    yield from shared("adapted", adapted.export_adapted, Path(adapted.__file__).read_bytes())


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Artifact:
    """A complete artifact with random weights. Read only: take `own_artifact` to damage one."""
    return write_tiny_artifact(tmp_path_factory.mktemp("tiny") / "artifact", tokenizer_model)


@pytest.fixture
def own_artifact(tmp_path: Path, tiny_artifact: Artifact) -> Path:
    """A copy of the tiny artifact that the test may damage."""
    return Path(shutil.copytree(tiny_artifact.path, tmp_path / "own"))


@pytest.fixture(scope="session")
def tiny_model(tiny_artifact: Artifact) -> FindingsModel:
    return load(tiny_artifact.path, device="cpu")


@pytest.fixture(scope="session")
def demo_artifact() -> Iterator[Artifact]:
    """The demo model's artifact, from the checkpoint in the repository. Read only, as the next three."""
    from export import export_artifact

    yield from shared("demo", lambda out: export_artifact(*DEMO_CHECKPOINT, out))


@pytest.fixture(scope="session")
def demo_model(demo_artifact: Artifact) -> FindingsModel:
    return load(demo_artifact.path, device="cpu")


@pytest.fixture(scope="session")
def calibration() -> Path:
    """The list of the films that the demo calibrates on."""
    from benchmarks.demo import CALIBRATION_SEED, NUM_CALIBRATION_FILMS
    from benchmarks.phantom.write import LIST_NAME, write_studies

    films: dict[str, Any] = {"count": NUM_CALIBRATION_FILMS, "seed": CALIBRATION_SEED, "dicom": False}
    return made_once("calibration", lambda out: write_studies(out, **films), films) / LIST_NAME


@pytest.fixture(scope="session")
def demo_int4_artifact(calibration: Path) -> Iterator[Artifact]:
    """The demo model in 4 bits, as the demo exports it."""
    yield from shared("demo-int4", lambda out: export_demo_gptq(out, "gptq-int4", calibration), calibration)


@pytest.fixture(scope="session")
def demo_onnx_artifact(calibration: Path, demo_int4_artifact: Artifact) -> Iterator[Artifact]:
    """The same with decoder.onnx; its own copy."""
    from export import OnnxSettings, add_onnx

    settings = OnnxSettings(calibration_data=calibration, verify_data=calibration, verify_studies=8)
    yield from shared(
        "demo-onnx", lambda out: add_onnx(demo_int4_artifact.path, settings, out=out), calibration, settings
    )


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five PNG files."""
    folder = tmp_path_factory.mktemp("films")
    paths = [folder / f"film{seed}.png" for seed in range(5)]
    for seed, path in enumerate(paths):
        film(seed).save(path)
    return paths
