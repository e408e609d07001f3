"""`python -m benchmarks`: every command is there, gets its own arguments, and is imported only when it is asked for."""

from __future__ import annotations

import importlib
import inspect

import pytest
from repository import run_python

from benchmarks.__main__ import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_called(name: str) -> None:
    module, _ = COMMANDS[name]
    assert list(inspect.signature(importlib.import_module(module).main).parameters) == ["argv"]


def test_help_lists_each_command_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in COMMANDS.items():
        assert f"  {name:<11}{text}" in lines
    assert max(map(len, lines)) <= 120


def test_a_command_gets_what_stands_behind_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main(["quality", "formats", "--help"])
    assert capsys.readouterr().out.startswith("usage: python -m benchmarks quality formats")
    assert main(["phantom", "write", "README.md", "--count", "1"]) == 1
    assert "README.md" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["--no-such-option", "demo"], ["demo", "--no-such"]])
def test_wrong_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    assert "usage: python -m benchmarks" in capsys.readouterr().err


def test_what_is_not_asked_for_is_not_imported() -> None:
    code = (
        "import sys; from benchmarks.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: print([name for name in sys.modules if name.startswith('benchmarks.') or name in ('numpy', 'lite')])"
    )
    assert run_python("-c", code).splitlines()[-1] == "['benchmarks.commands', 'benchmarks.__main__']"
