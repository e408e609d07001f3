"""The command line of `lite.bench`, called in this process, and what its children do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lite.bench import __main__ as cli
from lite.bench import machine
from lite.bench.measure import Job
from lite.bench.run import _work

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


def work(*arguments: Any) -> None:
    """Measure in a child as ever, but the bandwidth of 64 MiB: of more it takes longer than all the rest."""
    machine._CPU_READ_BYTES, machine._last_level_cache_bytes = 64 << 20, lambda: 1 << 20  # type: ignore[misc, assignment]
    _work(*arguments)
