"""What pip installs: the demo and the console command run from it, outside the repository, with nothing else of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from repository import ROOT

PACKAGES = ("lite", "export", "kernels", "benchmarks")
ABOUT = ("pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that sees nothing of the repository; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, encoding="utf-8", check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the programs of an environment that has the wheel, and by name what this one has."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ABOUT:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    run(*pip, "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site_packages,) = (folder / "venv").glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (site_packages / "others.pth").write_text("\n".join(others), encoding="utf-8")
    return python.parent


@pytest.mark.full
def test_the_demo_runs_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    files = json.loads(run(
        installed / "python", "-c",
        f"import json, importlib; print(json.dumps([importlib.import_module(n).__file__ for n in {PACKAGES}]))",
        cwd=tmp_path,
    ))  # fmt: skip
    for file in files:
        assert Path(file).is_relative_to(installed.parent), f"{file} is not of the wheel"
        assert Path(file).with_name("py.typed").is_file()
    package_files = {path for path in installed.parent.rglob("*") if path.suffix != ".pyc"}
    assert any(path.match("lite/serve/page/index.html") for path in package_files)
    out = run(installed / "python", "-m", "benchmarks", "demo", "--out", "demo", cwd=tmp_path)
    assert "findings agree in label, side, zone and size" in out
    assert "make test" not in out
    assert (tmp_path / "demo" / "findings.png").is_file()
    program = installed / "llava-rad-lite"
    drafted = run(program, "run", "demo/artifact", "demo/films/studies.json", "--out", "drafts.jsonl", cwd=tmp_path)
    assert drafted == "6 of 6 studies are drafted in drafts.jsonl\n"
    assert "label F1" in run(program, "score", "drafts.jsonl", "--metrics", "labels,rules", cwd=tmp_path)
    assert "fidelity decoder" in run(program, "info", "demo/artifact", cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "drafts.jsonl"]
    assert {path for path in installed.parent.rglob("*") if path.suffix not in (".pyc", "")} <= package_files
