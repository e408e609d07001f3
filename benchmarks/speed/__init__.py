"""How fast everything is, each figure beside its yardstick: `python -m benchmarks speed COMMAND`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks.commands import run_one_of

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS: Final = {
    "adapters": ("benchmarks.speed.adapters", "what an adapter costs a token of the onnx engine"),
    "cohort": ("benchmarks.speed.cohort", "what lite run costs beside the bare loop, and whether its memory grows"),
    "depth": ("benchmarks.speed.depth", "random weights of the real widths, and what 32 layers take, from fewer"),
    "drafts": ("benchmarks.speed.drafts", "what drafting is worth: tokens per pass, the cost of a step, wall time"),
    "gpu": ("benchmarks.speed.gpu", "the whole runtime on a GPU at full size, and its kernels, beside other libraries"),
    "peers": ("benchmarks.speed.peers", "other runtimes at the same shapes, whichever are installed"),
    "products": ("benchmarks.speed.products", "4-bit products by OpenVINO beside ONNX Runtime's"),
    "search": ("benchmarks.speed.search", "what a search takes in an index as large as a cohort"),
    "rivals": ("benchmarks.speed.rivals", "what a user would take instead, one film end to end"),
    "profile": ("benchmarks.speed.profile", "where the onnx engine's time goes, operator by operator"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with all arguments behind its name; return its exit status."""
    return run_one_of(
        COMMANDS,
        argv,
        prog="python -m benchmarks speed",
        description="Measure time and memory: what is wrong is not timed, and each figure stands beside its yardstick.",
    )
