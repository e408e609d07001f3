"""The slim claim, `python -m benchmarks slim`: with the base and the `cpu` extra alone, no torch, an artifact drafts.

    checkout ──▶ wheel ──pip──▶ build/slim-venv ─┬─▶ MB, package by package
                                                 ├─▶ python -m lite generate: the same texts as in this environment?
                                                 └─▶ which packages a process that drafts has loaded

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
from typing import Any, Final

from lite.artifact.open import load_artifact
from lite.bench.machine import machine
from lite.bench.table import markdown_table
from lite.console import run_command, say
from lite.errors import ArtifactError, LiteError
from lite.studies.readers import read_studies

ROOT: Final = Path(__file__).resolve().parents[2]
VENV: Final = Path("build", "slim-venv").absolute()
ARTIFACT: Final = Path("build", "demo", "artifact").absolute()
STUDIES: Final = ROOT / "benchmarks" / "references" / "phantom" / "studies.json"
EXIT_WRONG_USE: Final = 2

# What the wheel is built from. Beside it a checkout may hold an old build/, which would get into the wheel.
_SOURCES: Final = ("lite", "export", "kernels", "benchmarks")
_ABOUT: Final = ("pyproject.toml", "README.md", "LICENSE")
_NOT_PACKAGED: Final = shutil.ignore_patterns("__pycache__", "checkpoint", "references")
# Part of any environment; newer Pythons leave setuptools out.
_EVERYWHERE: Final = ("pip", "setuptools")

# The packages that a process which drafts has loaded, without Python's own modules, this project's, what the
# environment loads into every process before the first line, and modules that come from no package.
_PROBE: Final = """\
import json, sys, time
before = set(sys.modules)
def packages():
    new = [name for name, module in sys.modules.items() if name not in before and getattr(module, "__spec__", None)]
    names = {name.partition(".")[0] for name in new}
    return sorted(name for name in names - sys.stdlib_module_names - {"kernels", "lite"} if name[0] != "_")
import lite
after_import = packages()
started = time.perf_counter()
model = lite.load(sys.argv[1], engine=sys.argv[2], device="cpu")
load_s = time.perf_counter() - started
findings = model.findings(sys.argv[3])
print(json.dumps({
    "lite": lite.__file__, "after_import": after_import, "after_findings": packages(), "load_s": load_s,
    "peak_rss_bytes": findings.memory.peak_rss_bytes,
}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A fresh process that has drafted one film."""

    lite: Path  # where the package comes from
    after_import: tuple[str, ...]  # packages loaded by `import lite`
    after_findings: tuple[str, ...]
    load_s: float  # of the artifact, its hashes compared
    peak_rss_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slim:
    """What the slim environment is and does."""

    sizes: dict[str, int]  # bytes of each package, the largest first
    probe: Probe
    engines: tuple[str, ...]  # that drafted, film by film
    texts: tuple[str, ...]
    expected: tuple[str, ...]  # by the onnx engine of this environment

    @property
    def nbytes(self) -> int:
        """What is installed, in total."""
        return sum(self.sizes.values())

    @property
    def same_text(self) -> float:
        """The share of texts that are equal."""
        return sum(map(str.__eq__, self.texts, self.expected)) / len(self.expected)

    def broken(self) -> list[str]:
        """Return what contradicts the claim; nothing if it holds."""
        found = []
        if torch := [name for name in (*self.sizes, *self.probe.after_findings) if name.lower() == "torch"]:
            found.append(f"got {torch[0]} in the slim environment · expected none · see who brings it")
        if wrong := sorted({*self.engines} - {"onnx"}):
            found.append(f"got the engine {wrong[0]} · expected onnx · see lite/engines/resolve.py")
        if self.same_text < 1.0:
            equal = round(self.same_text * len(self.expected))
            found.append(f"got {equal} of {len(self.expected)} texts as in this environment · expected all · compare")
        return found


def measure_slim(artifact: Path, films: Sequence[Path], venv: Path = VENV) -> Slim:
    """Make the environment anew, measure it, and let it draft.

    Args:
        artifact: with `decoder.onnx`.
        films: at least one.
        venv: where the environment is made; what lies there is removed.

    Raises:
        LiteError: the environment cannot be made, or cannot draft.
    """
    venv = venv.absolute()
    make_environment(venv)
    # Before anything runs there: that may write files of its own.
    sizes = installed_sizes(next(venv.glob("lib/python*/site-packages")))
    # Isolated: neither PYTHONPATH nor the working directory is searched.
    python = [str(venv / "bin" / "python"), "-I"]
    with tempfile.TemporaryDirectory(prefix="slim-") as elsewhere:
        probe = run_probe(python, artifact, films[0], engine="auto", cwd=Path(elsewhere))
        if not probe.lite.is_relative_to(venv.resolve()):
            msg = f"got lite from {probe.lite.parent} · expected the copy in {venv} · see what is in its site-packages"
            raise LiteError(msg)
        drafts = generate(python, artifact, films, cwd=Path(elsewhere))
    expected = generate([sys.executable], artifact, films, cwd=ROOT, more=("--engine", "onnx"))
    return Slim(
        sizes=sizes,
        probe=probe,
        engines=tuple(draft["engine"] for draft in drafts),
        texts=tuple(draft["prediction"] for draft in drafts),
        expected=tuple(draft["prediction"] for draft in expected),
    )


def make_environment(venv: Path) -> None:
    """Make a virtual environment with a wheel of this checkout, its `cpu` extra, and nothing else.

    Args:
        venv: where; what lies there is removed.

    Raises:
        LiteError: something else lies there, Python cannot make one, or pip cannot install.
    """
    if venv.exists() and not (venv / "pyvenv.cfg").is_file() and not (venv.is_dir() and not any(venv.iterdir())):
        msg = f"{venv}: got something that is no virtual environment · expected one, or nothing, as what lies there is "
        raise LiteError(f"{msg}removed · name another place")
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
        package.name: sum(file.stat().st_size for file in _files(package) if file.is_file())
        for package in importlib.metadata.distributions(path=[str(site_packages)])
        if package.name.lower() not in _EVERYWHERE
    }
    return dict(sorted(sizes.items(), key=lambda entry: -entry[1]))


def _files(package: importlib.metadata.Distribution) -> list[Path]:
    return [Path(str(package.locate_file(file))) for file in package.files or ()]


def generate(
    python: Sequence[str], artifact: Path, films: Sequence[Path], *, cwd: Path, more: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run `python -m lite generate --json`; return what it prints of each film.

    Raises:
        LiteError: it failed.
    """
    command = [*python, "-m", "lite", "generate", str(artifact.resolve()), *map(str, films), "--json", *more]
    printed = _run(command, cwd=cwd, what="python -m lite generate", hint="expected findings · run it by itself")
    return [json.loads(line) for line in printed.splitlines()]


def run_probe(python: Sequence[str], artifact: Path, film: Path, *, engine: str, cwd: Path) -> Probe:
    """Draft one film in a fresh process on the CPU, and ask what that has loaded.

    Raises:
        LiteError: it failed.
    """
    command = [*python, "-c", _PROBE, str(artifact.resolve()), engine, str(film)]
    printed = _run(command, cwd=cwd, what=f"drafting {film.name}", hint="expected findings · see there")
    found = json.loads(printed.splitlines()[-1])
    return Probe(
        lite=Path(found["lite"]).resolve(),
        after_import=tuple(found["after_import"]),
        after_findings=tuple(found["after_findings"]),
        load_s=found["load_s"],
        peak_rss_bytes=found["peak_rss_bytes"],
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
    table = markdown_table(("package", "MB"), [*rows, ("together", f"{slim.nbytes / 1e6:,.1f}")])
    probe = slim.probe
    peak = "–" if probe.peak_rss_bytes is None else f"{probe.peak_rss_bytes / 1e6:,.0f} MB"
    equal = round(slim.same_text * len(slim.expected))
    lines = (
        f"texts as in this environment: {equal} of {len(slim.expected)}",
        f"loaded in {probe.load_s:.2f} s, hashes compared; peak RSS {peak}",
        f"imported: {', '.join(probe.after_findings)}",
        f"machine: {machine()}",
    )
    return "\n".join((table, "", *lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks slim",
        description="Install the base and the cpu extra alone into an environment of their own, let it draft the films "
        "of the phantom's reference with no torch, and say what it takes. PIP_ARGS in the environment goes to pip.",
        epilog="exit status: 0 the claim holds, 1 it does not or could not be tried, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument(
        "--artifact", type=Path, default=ARTIFACT, metavar="DIR",
        help="one of the phantom model with decoder.onnx (default: build/demo/artifact, of make demo)",
    )  # fmt: skip
    parser.add_argument(
        "--venv", type=Path, default=VENV, metavar="DIR",
        help="where the environment is made; what lies there is removed (default: build/slim-venv)",
    )  # fmt: skip
    return parser


def _measure_and_print(arguments: argparse.Namespace) -> int:
    try:
        load_artifact(arguments.artifact).onnx_part()
    except ArtifactError as error:
        say(f"error: {error}")
        return EXIT_WRONG_USE
    films = [study.path for study in read_studies(STUDIES)]
    slim = measure_slim(arguments.artifact, films, arguments.venv)
    sys.stdout.write(f"{format_report(slim)}\n")
    for line in slim.broken():
        say(f"error: {line}")
    return 1 if slim.broken() else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _measure_and_print(arguments))


if __name__ == "__main__":
    sys.exit(main())
