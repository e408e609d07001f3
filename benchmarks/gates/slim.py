"""The slim claim, `python -m benchmarks slim`: with the base and the `cpu` extra alone, no torch, an artifact drafts.

    checkout ──▶ wheel ──pip──▶ build/slim-venv ─┬─▶ MB, package by package
                                                 └─▶ python -m lite generate: the same texts as in this environment?
                                                     which packages has its process loaded?

What is installed is the wheel that pip builds, and it runs from another folder: nothing is read from the checkout.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.exports import ROOT
from lite.bench.machine import machine
from lite.bench.table import markdown_table
from lite.console import run_command, say
from lite.errors import LiteError
from lite.studies.sources.listed import read_studies

VENV: Final = Path("build", "slim-venv").absolute()
ARTIFACT: Final = Path("build", "demo", "artifact").absolute()
STUDIES: Final = ROOT / "benchmarks" / "references" / "phantom" / "studies.json"

# What the wheel is built from. Beside it a checkout may hold an old build/, which would get into the wheel.
_SOURCES: Final = ("lite", "export", "kernels", "benchmarks")
_ABOUT: Final = ("pyproject.toml", "README.md", "LICENSE")
_NOT_PACKAGED: Final = shutil.ignore_patterns("__pycache__", "checkpoint", "references")
# Part of any environment; newer Pythons leave setuptools out.
_EVERYWHERE: Final = ("pip", "setuptools")

# The command line, and behind what it prints the packages that the process has loaded: without Python's own modules,
# this project's, what the environment loads into every process before the first line, and what comes from no package.
_GENERATE: Final = """\
import json, sys
before = set(sys.modules)
def packages():
    new = [name for name, module in sys.modules.items() if name not in before and getattr(module, "__spec__", None)]
    names = {name.partition(".")[0] for name in new}
    return sorted(name for name in names - sys.stdlib_module_names - {"kernels", "lite"} if name[0] != "_")
import lite
after_import = packages()
from lite.__main__ import main
status = main(["generate", *sys.argv[1:], "--json"])
print(json.dumps({"lite": lite.__file__, "after_import": after_import, "after_findings": packages()}))
sys.exit(status)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a fresh process of `python -m lite generate` has drafted and loaded."""

    lite: Path  # where the package comes from
    after_import: tuple[str, ...]  # packages loaded by `import lite`
    after_findings: tuple[str, ...]
    texts: tuple[str, ...]  # film by film


@dataclass(frozen=True, slots=True, kw_only=True)
class Slim:
    """What the slim environment is and does."""

    sizes: dict[str, int]  # bytes of each package, the largest first
    run: Run
    expected: tuple[str, ...]  # by the onnx engine of this environment

    @property
    def nbytes(self) -> int:
        """What is installed, in total."""
        return sum(self.sizes.values())

    @property
    def num_equal(self) -> int:
        """How many texts are as expected."""
        return sum(map(str.__eq__, self.run.texts, self.expected))

    def broken(self) -> list[str]:
        """Return what contradicts the claim; nothing if it holds."""
        found = []
        if torch := [name for name in (*self.sizes, *self.run.after_findings) if name.lower() == "torch"]:
            found.append(f"got {torch[0]} in the slim environment · expected none · see who brings it")
        if self.num_equal < (total := len(self.expected)):
            found.append(f"got {self.num_equal} of {total} texts as in this environment · expected all · compare")
        return found


def measure_slim(artifact: Path, films: Sequence[Path]) -> Slim:
    """Make the environment anew, measure it, and let it draft.

    Args:
        artifact: with `decoder.onnx`.
        films: at least one.

    Raises:
        LiteError: there is no `decoder.onnx`, the environment cannot be made, or it cannot draft.
    """
    expected = generate([sys.executable], artifact, films, engine="onnx").texts
    make_environment(VENV)
    # Before anything runs there: that may write files of its own.
    sizes = installed_sizes(next(VENV.glob("lib/python*/site-packages")))
    with tempfile.TemporaryDirectory(prefix="slim-") as elsewhere:
        # Isolated: neither PYTHONPATH nor the working directory is searched.
        run = generate([str(VENV / "bin" / "python"), "-I"], artifact, films, cwd=Path(elsewhere))
    if not run.lite.is_relative_to(VENV.resolve()):
        msg = f"got lite from {run.lite.parent} · expected the copy in {VENV} · see what is in its site-packages"
        raise LiteError(msg)
    return Slim(sizes=sizes, run=run, expected=expected)


def make_environment(venv: Path) -> None:
    """Make a virtual environment, in the place of an earlier one, with a wheel of this checkout and its `cpu` extra.

    Raises:
        LiteError: Python cannot make one, or pip cannot install.
    """
    hint = "expected an environment · install Python's venv module (Debian: the python3-venv package)"
    _run([sys.executable, "-m", "venv", "--clear", str(venv)], cwd=ROOT, what="python -m venv", hint=hint)
    # Where the Makefile has them, too.
    install(venv / "bin" / "python", shlex.split(os.environ.get("PIP_ARGS", "")))


def install(python: Path, pip_args: Sequence[str]) -> None:
    """Build a wheel of this checkout and install it with its `cpu` extra.

    Args:
        python: of the environment.
        pip_args: further arguments for pip.

    Raises:
        LiteError: pip cannot.
    """
    with tempfile.TemporaryDirectory(prefix="slim-source-") as folder:
        for name in _SOURCES:
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=_NOT_PACKAGED)
        for name in _ABOUT:
            shutil.copy(ROOT / name, folder)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        pip += [*pip_args, "-c", str(ROOT / "constraints.txt"), f"{folder}[cpu]"]
        hint = "expected an index with the packages · check the network, or name another index in PIP_ARGS"
        _run(pip, cwd=Path(folder), what="pip install", hint=hint)


def installed_sizes(site_packages: Path) -> dict[str, int]:
    """Return the bytes of each installed package, the largest first; pip and setuptools are left out."""
    sizes = {
        package.name: sum(file.stat().st_size for file in _files(package))
        for package in importlib.metadata.distributions(path=[str(site_packages)])
        if package.name.lower() not in _EVERYWHERE
    }
    return dict(sorted(sizes.items(), key=lambda entry: -entry[1]))


def _files(package: importlib.metadata.Distribution) -> list[Path]:
    located = [Path(str(package.locate_file(file))) for file in package.files or ()]
    return [file for file in located if file.is_file()]


def generate(
    python: Sequence[str], artifact: Path, films: Sequence[Path], *, engine: str = "auto", cwd: Path = ROOT
) -> Run:
    """Draft films by the command line, in a fresh process on the CPU.

    Raises:
        LiteError: it failed.
    """
    options = ["--engine", engine, "--device", "cpu"]
    command = [*python, "-c", _GENERATE, str(artifact.resolve()), *map(str, films), *options]
    printed = _run(command, cwd=cwd, what="python -m lite generate", hint="expected findings · run it by itself")
    *drafts, loaded = (json.loads(line) for line in printed.splitlines())
    return Run(
        lite=Path(loaded["lite"]).resolve(),
        after_import=tuple(loaded["after_import"]),
        after_findings=tuple(loaded["after_findings"]),
        texts=tuple(draft["prediction"] for draft in drafts),
    )


def _run(command: Sequence[str], *, cwd: Path, what: str, hint: str) -> str:
    """Run a command and return what it prints.

    Raises:
        LiteError: it failed.
    """
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
        # pip has more to say after its error.
        said = [line for line in lines if line.startswith("ERROR:")] or lines or ["it says nothing"]
        raise LiteError(f"{what}: got exit status {done.returncode} ({said[-1]}) · {hint}")
    return done.stdout


# -- Command line ----------------------------------------------------------------------------------------------------


def format_report(slim: Slim) -> str:
    """Return the packages as a markdown table, and what the environment did."""
    rows = [(name, f"{size / 1e6:,.1f}") for name, size in slim.sizes.items()]
    return "\n".join(
        (
            markdown_table(("package", "MB"), [*rows, ("together", f"{slim.nbytes / 1e6:,.1f}")]),
            f"\ntexts as in this environment: {slim.num_equal} of {len(slim.expected)}",
            f"imported: {', '.join(slim.run.after_findings)}",
            f"machine: {machine()}",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks slim",
        description="Install the base and the cpu extra alone into build/slim-venv, let it draft the films of the "
        "phantom's reference with no torch, and say what it takes. PIP_ARGS in the environment goes to pip.",
        epilog="exit status: 0 the claim holds, 1 it does not or could not be tried, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument(
        "--artifact", type=Path, default=ARTIFACT, metavar="DIR",
        help="one of the phantom model with decoder.onnx (default: build/demo/artifact, of make demo)",
    )  # fmt: skip
    artifact: Path = parser.parse_args(argv).artifact
    return run_command(lambda: _measure_and_print(artifact))


def _measure_and_print(artifact: Path) -> int:
    slim = measure_slim(artifact, [study.path for study in read_studies(STUDIES)])
    sys.stdout.write(f"{format_report(slim)}\n")
    for line in slim.broken():
        say(f"error: {line}")
    return 1 if slim.broken() else 0
