"""What the documentation tells one to type: every command is read by its own parser, and the Python is run."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Never

import pytest
from repository import ROOT

from benchmarks.phantom.write import write_studies
from lite.artifact.open import Artifact

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / "benchmarks" / "phantom" / "README.md"]
# Commands of others, which no parser here could read.
OTHERS = {".ci/run", "cd", "export", "git", "hf", "pip", "python", "python3"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|((?:^    [^\n]*\n)+)", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:\.venv/bin/)?(?:make|python -m|llava-rad-lite) [^`]+)`")


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield language and text of each block of code; one that is only indented has the language ''."""
    for language, fenced, indented in BLOCK.findall(page.read_text(encoding="utf-8")):
        yield language, fenced or re.sub(r"^    ", "", indented, flags=re.MULTILINE)


def commands() -> Iterator[tuple[str, str]]:
    """Yield page and command of every line that one could type; within sentences they are only the beginning of one."""
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for language, text in blocks(page):
            if language in ("", "sh", "bash", "console"):
                for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
                    command = re.sub(r"^\$ |(?<=\S)(  | # ).*", "", line).strip()
                    if re.match(r"(\w+=\S+ )*(make|(\.venv/bin/)?python3?|pip|llava-rad-lite|\.ci/run)\b", command):
                        yield name, command
                    elif language and command:
                        assert command.split()[0] in OTHERS, f"{name}: {command}: teach this test what it is"
        for command in INLINE.findall(page.read_text(encoding="utf-8")):
            yield name, f"{' '.join(command.split())} ..."


def run(module: str, arguments: list[str]) -> None:
    main = importlib.import_module(f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module).main
    with contextlib.suppress(SystemExit):
        main(arguments)


def parse(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command read its arguments, and stop it before it does anything."""
    read, parsed = argparse.ArgumentParser.parse_args, []

    def stop(*args: Any, **kwargs: Any) -> Never:
        parsed.append(read(*args, **kwargs))
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    run(module, arguments)
    assert parsed


def check_synopsis(module: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Check that the options of a line with brackets or dots are those of the command."""
    commands = itertools.takewhile(lambda word: re.fullmatch(r"[a-z][a-z-]*", word), arguments)
    run(module, [*commands, "--help"])
    known = capsys.readouterr().out
    assert known
    for option in re.findall(r"--[a-z][a-z-]*", " ".join(arguments)):
        assert option in known, option


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_every_command_is_one(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)
    while re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)} <= set(targets)
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        assert {extra for listed in re.findall(r"\[([\w,]+)\]", command) for extra in listed.split(",")} <= set(extras)
    elif words[0] == "llava-rad-lite" or words[1] == "-m":
        module, *arguments = ["lite", *words[1:]] if words[0] == "llava-rad-lite" else words[2:]
        if module.partition(".")[0] not in ("benchmarks", "export", "lite"):
            return
        if any(mark in command for mark in ("[", "...", "…")):
            check_synopsis(module, arguments, capsys)
        else:
            parse(module, arguments, monkeypatch)
    else:
        assert (ROOT / words[-1]).exists()


def test_the_commands_are_found() -> None:
    assert len(set(commands())) > 20


def test_what_is_named_is_there() -> None:
    """Links, and files of this repository by their paths; the README leads to every page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        links = [page.parent / link for link in re.findall(r"\]\(([^):#]+)\)", text)]
        files = [
            ROOT / name for name in re.findall(r"`((?:benchmarks|docs|export|kernels|lite|tests)/[\w/]+\.\w+)`", text)
        ]
        assert [path for path in links + files if not path.exists()] == [], page
        if page.name == "README.md" and page.parent == ROOT:
            assert {path for path in PAGES if path.parent.name == "docs"} <= set(links)


@pytest.mark.parametrize("page", [page for page in PAGES if any(name == "python" for name, _ in blocks(page))])
def test_the_python_runs(page: Path, demo_artifact: Artifact, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "artifact").symlink_to(demo_artifact.path)
    code = "\n".join(text for name, text in blocks(page) if name == "python")
    film = next(write_studies(tmp_path / "studies", count=1, seed=1, dicom=True).parent.rglob("*.dcm"))
    for name in re.findall(r"\"(\w+\.(?:dcm|png))\"", code):
        shutil.copy(film if name.endswith("dcm") else next(film.parent.glob("*.png")), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "documentation"})  # noqa: S102
