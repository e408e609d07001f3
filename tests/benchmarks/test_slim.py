"""The environment without torch: what is measured of it, what contradicts the claim, and the claim itself."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from repository import ROOT

from benchmarks.gates import slim
from benchmarks.gates.slim import Run, Slim, main
from lite.artifact.open import Artifact
from lite.errors import LiteError
from lite.loading import load
from lite.studies.sources.listed import read_studies

FILMS = [study.image for study in read_studies(slim.STUDIES)]
# What the base and the extra `cpu` ask for.
PACKAGES = ("numpy", "pillow", "sentencepiece", "onnxruntime")


def linked_environment(folder: Path, *, own: Path | None = None) -> None:
    """Make an environment out of what is installed here already, but only of the packages that are claimed to do."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for name in PACKAGES:
        package = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}:
            (site_packages / top).symlink_to(str(package.locate_file(top)))
    for name in ("lite", "kernels"):
        if own is None:
            shutil.copytree(ROOT / name, site_packages / name)
        else:
            (site_packages / name).symlink_to(own / name)


# -- Without torch ---------------------------------------------------------------------------------------------------


def test_an_artifact_drafts_where_there_is_no_torch_and_torch_is_asked_for_in_words(
    demo_onnx_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slim, "make_environment", linked_environment)
    monkeypatch.setattr(slim, "VENV", tmp_path / "venv")
    measured = slim.measure_slim(demo_onnx_artifact.path, FILMS[:2])
    assert measured.broken() == []
    model = load(demo_onnx_artifact.path, engine="onnx")
    assert list(measured.run.texts) == [model.findings(film).text for film in FILMS[:2]]
    assert {name.lower() for name in measured.sizes} == set(PACKAGES)
    assert measured.run.after_import == ()
    assert measured.run.after_findings == ("PIL", "numpy", "onnxruntime", "sentencepiece")
    python = [str(tmp_path / "venv" / "bin" / "python"), "-I"]
    done = subprocess.run([*python, "-c", "import torch"], capture_output=True, text=True, check=False)
    assert "No module named 'torch'" in done.stderr
    message = r"generate: got exit status 1 \(error: .*: got no torch · .* leave out what asks"
    with pytest.raises(LiteError, match=message):
        slim.generate(python, demo_onnx_artifact.path, FILMS[:1], engine="torch", cwd=tmp_path)


def test_a_copy_of_the_package_from_elsewhere_proves_nothing(
    demo_onnx_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slim, "make_environment", lambda folder: linked_environment(folder, own=ROOT))
    monkeypatch.setattr(slim, "VENV", tmp_path / "venv")
    with pytest.raises(LiteError, match="got lite from .* expected the copy in .*venv"):
        slim.measure_slim(demo_onnx_artifact.path, FILMS[:1])


# -- Its parts -------------------------------------------------------------------------------------------------------


def install_by_hand(site_packages: Path, name: str, files: dict[str, int], *, gone: str = "") -> None:
    """Lay out a package with files of so many bytes as pip would."""
    about = site_packages / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    record = "".join(f"{file},,\n" for file in (*files, gone) if file)
    (about / "RECORD").write_text(record)
    for file, size in files.items():
        (site_packages / file).parent.mkdir(parents=True, exist_ok=True)
        (site_packages / file).write_bytes(bytes(size))


def test_sizes_are_of_the_packages_and_not_of_what_every_environment_has(tmp_path: Path) -> None:
    site_packages = tmp_path / "lib" / "site-packages"
    install_by_hand(site_packages, "small", {"small.py": 70})
    install_by_hand(site_packages, "Large", {"large/a.so": 4000, "large.libs/b.so": 500}, gone="large/removed.py")
    install_by_hand(site_packages, "pip", {"pip/main.py": 9000})
    install_by_hand(site_packages, "setuptools", {"setuptools/main.py": 9000, "pkg_resources/main.py": 9000})
    (site_packages / "distutils-precedence.pth").write_bytes(bytes(9000))
    sizes = slim.installed_sizes(site_packages)
    assert list(sizes.items()) == [("Large", 4500), ("small", 70)]


def test_pip_that_finds_no_index_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    # Were there one after all, nothing would be installed.
    pip_args = ["--dry-run", "--retries", "0", "--index-url", (tmp_path / "no-index").as_uri()]
    with pytest.raises(
        LiteError, match=r"pip install: got exit status 1 \(ERROR: .*\) · expected an index .* PIP_ARGS"
    ):
        slim.install(Path(sys.executable), pip_args)


def test_pip_gets_a_copy_of_the_sources_the_constraints_and_what_pip_args_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    copied: set[str] = set()

    def run(command: list[str], *, cwd: Path, what: str, hint: str) -> str:
        commands.append(command)
        if "pip" in command:
            copied.update(path.relative_to(cwd).as_posix() for path in cwd.rglob("*"))
        return ""

    monkeypatch.setattr(slim, "_run", run)
    monkeypatch.setenv("PIP_ARGS", "--find-links '/some where'")
    slim.make_environment(tmp_path / "venv")
    made, pip = commands
    assert made == [sys.executable, "-m", "venv", "--clear", str(tmp_path / "venv")]
    assert pip[0] == str(tmp_path / "venv" / "bin" / "python")
    assert pip[pip.index("--find-links") + 1] == "/some where"
    assert pip[pip.index("-c") + 1] == str(ROOT / "constraints.txt")
    assert pip[-1].endswith("[cpu]")
    assert not pip[-1].startswith(str(ROOT))
    assert {"pyproject.toml", "README.md", "LICENSE", "lite/model.py", "lite/bench/report.html.j2"} <= copied
    assert not any(path.startswith(("build", "benchmarks/phantom/checkpoint", ".")) for path in copied)


# -- The verdict -----------------------------------------------------------------------------------------------------

EXPECTED = ("Clear lungs.", "Large heart.")


@pytest.mark.parametrize(
    ("sizes", "imported", "texts", "message"),
    [
        (("numpy", "onnxruntime"), ("numpy",), EXPECTED, ""),
        (("numpy",), ("numpy", "torch"), EXPECTED, "got torch in the slim environment"),
        (("numpy", "torch"), ("numpy",), EXPECTED, "got torch in the slim environment"),
        (("numpy",), ("numpy",), ("Clear lungs.", "Large heart. Clear lungs."), "got 1 of 2 texts as in this"),
    ],
)
def test_what_contradicts_the_claim_is_said_and_fails(
    sizes: tuple[str, ...], imported: tuple[str, ...], texts: tuple[str, ...], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = Run(lite=Path("lite"), after_import=(), after_findings=imported, texts=texts)
    measured = Slim(sizes=dict.fromkeys(sizes, 1_250_000), run=run, expected=EXPECTED)
    monkeypatch.setattr(slim, "measure_slim", lambda *_: measured)
    assert main([]) == bool(message)
    printed = capsys.readouterr()
    assert [message in line for line in printed.err.splitlines()] == [True] * bool(message)
    table = printed.out.splitlines()
    assert table[2].split() == ["|", "numpy", "|", "1.2", "|"]
    assert table[2 + len(sizes)].split() == ["|", "together", "|", f"{1.25 * len(sizes):.1f}", "|"]
    assert f"texts as in this environment: {1 + (texts == EXPECTED)} of 2" in table
    assert f"imported: {', '.join(imported)}" in table


def test_an_environment_that_cannot_be_made_and_an_artifact_that_cannot_draft_fail(
    demo_onnx_artifact: Artifact, tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(_: Path) -> None:
        raise LiteError("pip install: got exit status 1")

    monkeypatch.setattr(slim, "make_environment", fail)
    assert main(["--artifact", str(tiny_artifact.path)]) == 1
    assert "got an artifact without decoder.onnx" in capsys.readouterr().err
    monkeypatch.setattr(slim, "read_studies", lambda path: read_studies(path)[:1])
    assert main(["--artifact", str(demo_onnx_artifact.path)]) == 1
    assert capsys.readouterr().err == "error: pip install: got exit status 1\n"
