"""The whole runtime on one GPU, in one run: `python -m benchmarks speed gpu`.

All 32 layers at Vicuna-7B's widths, the weights drawn on the GPU, torch's allocator held to what a small card has:

    command ─▶ sections, the most important first, each with time of its own
        decode       a token at 1,470 of context, ours beside other libraries' linears in the same decoder
        prefill      a prompt of 1,420 tokens beside cuBLAS alone at the same shapes
        memory       the plan of `lite.memory` beside what torch's allocator has held
        few_sms      decode again on as many multiprocessors as a small card has
        int8_cache   what it gains, what it loses
        batches      continuous batching beside batches that wait for their longest text
        kernels      `benchmarks.speed.kernels`

    rig         the device: its clock, its memory limit, its bandwidth, the decoder that all sections share
    model       decoders made of random weights; peers' linears in them; what they should compute, plainly

What is wrong is not timed. A section that fails says why, and the others go on; after each the JSON file is written.
On a CPU everything but the card's own features runs at small shapes: the tests do that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    from benchmarks.speed.gpu.command import main as run

    return run(argv)
