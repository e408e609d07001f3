"""The tiny random checkpoint, studies for it, and what it exports to: each made once."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import random_checkpoint
import torch
from exported import check_unchanged, exported, made_once
from small_export import FORMS, Folders, Small, write_studies

from export import export_artifact
from export.source.checkpoint import Checkpoint, open_checkpoint
from lite.artifact.open import Artifact


@pytest.fixture(scope="session")
def folders() -> Folders:
    """Read only, as all here."""
    out = made_once("small-checkpoint", random_checkpoint.write)
    return out / "llava-rad-phantom", out / "base"


@pytest.fixture
def own(folders: Folders, tmp_path: Path) -> Folders:
    """A copy that the test may damage."""
    copied = Path(shutil.copytree(folders[0].parent, tmp_path / "copy"))
    return copied / folders[0].name, copied / folders[1].name


@pytest.fixture(scope="session")
def source(folders: Folders) -> Checkpoint:
    return open_checkpoint(*folders)


@pytest.fixture(scope="session")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_studies(tmp_path_factory.mktemp("studies"))


@pytest.fixture(scope="session")
def small(folders: Folders, listed: Path) -> Iterator[Small]:
    """What gives the artifact in a form, exporting it when it is first asked for."""
    made: list[Artifact] = []

    @functools.cache
    def of(form: str) -> Artifact:
        settings, threads = FORMS[form](listed), torch.get_num_threads()
        artifact = exported(f"small-{form}", lambda out: export_artifact(*folders, out, settings), form, threads)
        made.append(artifact)
        return artifact

    yield of
    for artifact in made:
        check_unchanged(artifact.path.parent)


@pytest.fixture(scope="session")
def artifact(small: Small) -> Artifact:
    return small("fp16")


@pytest.fixture(scope="session")
def gptq_artifact(small: Small) -> Artifact:
    return small("gptq-int4")
