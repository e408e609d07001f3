"""How fast other engines are at the same shapes, in one run: `python -m benchmarks speed peers`.

Random checkpoints of the real 7B widths are written at a few depths and exported by the exporter's own command, in 16
and in 4 bits. Every engine computes that Llama, from our artifact. Each has a process of its own, so that memory and
crashes are its own, and perhaps an interpreter of its own, as peers bring versions of everything:

    main ── measure ─┬─ worker ── lite             ours, by torch, and by ONNX Runtime with no torch in the process
                     ├─ worker ── hugging_face     transformers, bitsandbytes through it
                     └─ worker ── llamacpp         llama.cpp, on a GGUF that is written here; no torch there

    a worker:  load ─▶ check ─▶ a round untimed ─▶ rounds, in turns with our own engine
                       └ logits beside ours: no speed is told of an engine that computes something else

Layers all cost the same. So each engine is timed at two depths or more, and the difference is the price of a layer; 32
of them are a model of the real decoder, and every figure made in this way bears a "~".

`worker` and `llamacpp` run in the peers' own environment too: they import nothing that is not installed there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.speed.harness import Record


def _parser() -> argparse.ArgumentParser:
    from benchmarks.speed.peers.specs import SPECS
    from benchmarks.speed.synthetic import REAL_LAYERS
    from lite.console import positive
    from lite.engines.cores import available_cores

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed peers",
        description="Time other engines at the shapes of our decoder, whichever is installed, and print a table as "
        "markdown. Weights are random; nothing is downloaded.",
        epilog="exit status: 0 done, 1 an engine failed (one that is not installed or slow did not), 2 wrong use, 130 "
        "interrupted.",
    )
    engines = f"only these: {', '.join(map(repr, SPECS))}"
    prompt = "the prompt, an image of 1369 patches and a question (default: %(default)s)"
    limit = "an engine whose prompt and tokens take longer is given up (default: %(default)s)"
    add = parser.add_argument
    depths = range(1, REAL_LAYERS + 1)
    add("--layers", type=int, nargs="+", default=[1, 3], metavar="N", choices=depths, help="2 depths or more (1 3)")
    add("--prompt-tokens", type=positive, default=1472, metavar="T", help=prompt)
    add("--new-tokens", type=positive, default=32, metavar="T", help="timed in each round (default: %(default)s)")
    add("--engines", nargs="+", choices=SPECS, default=list(SPECS), metavar="NAME", help=engines)
    add("--threads", type=positive, default=available_cores(), metavar="N", help="of each (default: %(default)s)")
    add("--rounds", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    add("--limit-s", type=positive, default=120, metavar="S", help=limit)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything to a JSON file, too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # Workers import this package as well, and need none of that.
    from benchmarks.speed.harness import run_main
    from benchmarks.speed.peers.measure import Setting, measure
    from benchmarks.speed.peers.specs import SPECS
    from lite.bench.table import to_json
    from lite.engines.machine import check_device

    parser = _parser()

    def run(arguments: argparse.Namespace, record: Record) -> int:
        setting = Setting(
            layers=tuple(sorted(set(arguments.layers))),
            num_prompt_tokens=arguments.prompt_tokens,
            num_new_tokens=arguments.new_tokens,
            rounds=arguments.rounds,
            threads=arguments.threads,
            limit_s=arguments.limit_s,
            device=check_device(arguments.device),
        )
        longest = setting.shapes.max_position_embeddings
        if len(setting.layers) < 2:
            parser.error("got one depth · expected two or more: one point gives no line")
        if setting.max_seq_len > longest:
            got = f"got {setting.max_seq_len} tokens · expected at most {longest}, the context of the model"
            parser.error(f"{got} · take fewer --prompt-tokens")
        found = measure([spec for name, spec in SPECS.items() if name in arguments.engines], setting)
        record.begin(setting=to_json(setting))
        for name, report in found.items():
            record.add(name, report)
        return record.end()

    return run_main(parser, argv, run)
