"""Artifacts that are exported once for all tests: by the first process that asks, for all workers and later runs.

A folder's name ends with a hash of what the artifact is made from: the exporter and what it imports, the checkpoint,
the versions of the libraries, and the settings. Another hash makes another folder, so nothing here goes stale.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock
from repository import CHECKPOINT, ROOT

from lite.artifact.open import Artifact, load_artifact

CACHE = ROOT / "build" / "test-artifacts"
TESTS = ("tests/tiny.py", "tests/random_checkpoint.py", "tests/small_export.py")
SOURCES = ("export", "kernels", "lite", "benchmarks/phantom", *TESTS)
# Doors and instruments: nothing that an artifact is made from.
NOT_SOURCES = ("lite/bench/", "lite/cli/", "lite/cohort/", "lite/serve/")
LIBRARIES = ("bitsandbytes", "numpy", "onnx", "onnxruntime", "sentencepiece", "torch")
FORGOTTEN_AFTER_S = 3600


@functools.cache
def source_hash() -> str:
    """Hash the files and versions that every artifact depends on."""
    digest = hashlib.sha256(repr((sys.version_info, *map(version, LIBRARIES))).encode())
    files = [
        file for name in SOURCES for file in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name])
    ]
    for file in sorted(files):
        name = file.relative_to(ROOT).as_posix()
        if file.is_file() and "__pycache__" not in name and not name.startswith(NOT_SOURCES):
            digest.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def folder_hash(folder: Path) -> str:
    """Hash the names and the content of all files."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(folder)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def made_once(name: str, make: Callable[[Path], object], *settings: object) -> Path:
    """Return the folder that `make(folder)` writes. It is made where there is none, or where someone changed it."""
    key = hashlib.sha256(repr((source_hash(), *settings)).encode()).hexdigest()[:16]
    folder, seal = CACHE / f"{name}-{key}", CACHE / f"{name}-{key}.sha256"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):
        if not (seal.exists() and seal.read_text() == folder_hash(folder)):
            for old in CACHE.glob(f"{name}-{'?' * len(key)}"):
                if old == folder or time.time() - old.stat().st_mtime > FORGOTTEN_AFTER_S:
                    old.with_suffix(".sha256").unlink(missing_ok=True)
                    shutil.rmtree(old)
            make(folder)
            seal.write_text(folder_hash(folder))
    return folder


def check_unchanged(folder: Path) -> None:
    """Fail if a test has written into a shared folder."""
    seal = folder.with_suffix(".sha256")
    if seal.read_text() != folder_hash(folder):
        seal.unlink()
        msg = f"{folder}: a test has changed what all tests share · expected it to copy the folder first"
        raise AssertionError(msg)


def export_demo_gptq(out: Path, decoder_format: Any, calibration: Path, **gptq: Any) -> Artifact:
    """Export the demo model in GPTQ with the demo's weights of tokens, which a search would take long to find."""
    from export import ExportSettings, GptqSettings, TokenWeights, export_artifact

    weights = TokenWeights(image=0.3, prompt=0.1)
    settings = GptqSettings(calibration_data=calibration, token_weights=weights, **gptq)
    checkpoint = CHECKPOINT / "llava-rad-phantom", CHECKPOINT / "base"
    return export_artifact(*checkpoint, out, ExportSettings(decoder_format=decoder_format, gptq=settings))


def exported(name: str, make: Callable[[Path], Artifact], *settings: object) -> Artifact:
    """Return the artifact that `make(out)` exports, in a folder called as most are."""

    def write(out: Path) -> None:
        out.mkdir()
        make(out / "artifact")

    return load_artifact(made_once(name, write, *settings) / "artifact")
