"""The command line of `lite.bench`, called in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lite.bench import __main__ as cli
from lite.bench.measure import Job

FAST = ("--device", "cpu", "--runs", "4", "--batch-sizes", "2", "--max-new-tokens", "8")


def write_list(folder: Path, films: list[Path], *, missing: bool = False) -> Path:
    turns = [{"value": "<image>\nDescribe."}, {"value": "Small left pleural effusion. No pneumothorax."}]
    names = [str(film) for film in films] + (["not-there.png"] if missing else [])
    entries = [
        {"id": f"s{number}", "image": name, "reason": "Cough." if number % 2 else None, "conversations": turns}
        for number, name in enumerate(names)
    ]
    path = folder / "list.json"
    path.write_text(json.dumps(entries))
    return path


def bench(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def job_of(*arguments: object) -> Job:
    return cli._job(cli._parser().parse_args([str(argument) for argument in arguments]), "")
