"""How far what one artifact, engine or format computes and writes is from another: `python -m benchmarks quality`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks.commands import run_one_of

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS: Final = {
    "artifacts": ("benchmarks.quality.artifacts", "what artifacts lose against a reference, on a list of studies"),
    "engines": (
        "benchmarks.quality.engines",
        "torch, ONNX Runtime and their int8 caches side by side",
    ),
    "formats": (
        "benchmarks.quality.formats",
        "what each decoder format costs and takes, and each trick of GPTQ",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with all arguments behind its name; return its exit status."""
    return run_one_of(
        COMMANDS,
        argv,
        prog="python -m benchmarks quality",
        description="Compare what is computed along a reference's texts, and what is written freely.",
    )
