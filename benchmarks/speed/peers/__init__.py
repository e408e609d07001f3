"""How fast other engines are at the same shapes, in one run: `python -m benchmarks speed peers`.

Every engine computes the same Llama: real 7B widths, a few decoder layers, weights that depend on a seed and on their
names only, each rounded to what the engine stores. Each has a process of its own, so that memory and crashes are its
own, and perhaps an interpreter of its own, as peers bring versions of everything:

    command ── measure ─┬─ worker ── lite_decoder     ours, and torch's and gemlite's int4 linears in the same decoder
                        ├─ worker ── lite_onnx        ours by ONNX Runtime, on an artifact (onnx_artifact); no torch
                        ├─ worker ── hugging_face     transformers, bitsandbytes through it
                        ├─ worker ── llamacpp         llama.cpp, on a GGUF that is written here; no torch there
                        └─ tower                      with --vision: the vision tower, which is no engine's own

    a worker:  load ─▶ check ─▶ probe ─▶ rounds, the engines taking turns
                       │        └ a short prefill: is the real one worth waiting for?
                       └ logits beside ours: no speed is told of an engine that computes something else

Layers all cost the same. So each engine is timed with all its layers and with none (or one), and the difference is the
price of a layer; 32 of them are a model of the real decoder, and every figure made in this way bears a "~"
(`estimate`). Where our ONNX engine and llama.cpp are in one run, `ratios` sets one against the other.

`weights`, `engine`, `apart`, `worker` and `llamacpp` run in the peers' own environment too: they import numpy and no
other package of this project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # Workers import this package as well, and need none of that.
    from benchmarks.speed.peers.command import main as run

    return run(argv)
