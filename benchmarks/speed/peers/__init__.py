"""How fast other engines are at the same shapes, in one run: `python -m benchmarks speed peers`.

Every engine computes the same Llama: real 7B widths, a few decoder layers, weights that depend on a seed and on their
names only, each rounded to what the engine stores. Each has a process of its own, so that memory and crashes are its
own, and perhaps an interpreter of its own, as peers bring versions of everything:

    main ── measure ─┬─ worker ── lite_decoder     ours, and torch's and gemlite's int4 linears in the same decoder
                     ├─ worker ── lite_onnx        ours by ONNX Runtime, on an artifact (onnx_artifact); no torch
                     ├─ worker ── hugging_face     transformers, bitsandbytes through it
                     ├─ worker ── llamacpp         llama.cpp, on a GGUF that is written here; no torch there
                     └─ tower                      with --vision: the vision tower, which is no engine's own

    a worker:  load ─▶ check ─▶ probe ─▶ rounds, the engines taking turns
                       │        └ a short prefill: is the real one worth waiting for?
                       └ logits beside ours: no speed is told of an engine that computes something else

Layers all cost the same. So each engine is timed with all its layers and with none (or one), and the difference is the
price of a layer; 32 of them are a model of the real decoder, and every figure made in this way bears a "~". Where our
ONNX engine and llama.cpp are in one run, `report` sets one against the other.

`engine`, `worker` and `llamacpp` run in the peers' own environment too, as does `benchmarks.speed.weights`: they import
numpy and nothing else that has to be installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.speed.harness import Record
    from benchmarks.speed.peers.measure import Setting
    from benchmarks.speed.weights import Shapes


def _parser() -> argparse.ArgumentParser:
    from benchmarks.speed.harness import above_zero
    from benchmarks.speed.peers.specs import PEERS_PYTHON, REFERENCE, SPECS
    from lite.console import positive
    from lite.engines.cores import available_cores

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed peers",
        description="Time other engines at the shapes of our decoder, whichever is installed, and print a table as "
        "markdown. Weights are random; nothing is downloaded.",
        epilog="exit status: 0 done, 1 an engine failed (one that is not installed did not), 2 wrong use, 130 "
        "interrupted.",
    )
    names = [spec.name for spec in SPECS]
    engines = f"only these, beside {REFERENCE.name}: {', '.join(repr(name) for name in names)}"
    prompt = "the prompt, an image of 1369 patches and a question (default: %(default)s)"
    limit = (
        "an engine whose prefill would take longer, by a probe, is not asked for it; and the most that its decoding "
        "takes in a round, a few tokens excepted (default: %(default)g)"
    )
    widths = "other widths than those of a 7B model; hidden and intermediate a multiple of 128"
    vision = "also time the vision tower of an artifact, and tell what a draft takes from image to text"
    python = (
        "an interpreter that has llama-cpp-python and gguf; if there is none, our own is asked for them (default: "
        "build/peers-venv/bin/python, which `make peers` makes)"
    )
    add = parser.add_argument
    add("--layers", type=positive, default=2, metavar="N", help="decoder layers (default: %(default)s)")
    add("--prompt-tokens", type=positive, default=1472, metavar="T", help=prompt)
    add("--new-tokens", type=positive, default=32, metavar="T", help="timed in each round (default: %(default)s)")
    add("--engines", nargs="+", choices=names, default=names, metavar="NAME", help=engines)
    add("--threads", type=positive, default=available_cores(), metavar="N", help="of each (default: %(default)s)")
    add("--rounds", type=positive, default=3, metavar="N", help="(default: %(default)s)")
    add("--limit-s", type=above_zero, default=30.0, metavar="S", help=limit)
    add("--widths", nargs=4, type=positive, metavar=("HIDDEN", "INTERMEDIATE", "HEADS", "VOCABULARY"), help=widths)
    add("--vision", type=Path, metavar="ARTIFACT", help=vision)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--peers-python", type=Path, default=PEERS_PYTHON, metavar="FILE", help=python)
    add("--json", type=Path, metavar="FILE", help="write everything to a JSON file, too")
    return parser


def _shapes(parser: argparse.ArgumentParser, given: Sequence[int] | None) -> Shapes:
    from benchmarks.speed.weights import Shapes

    if given is None:
        return Shapes()
    hidden, intermediate, heads, vocab = given
    if hidden % 128 or intermediate % 128 or hidden % (2 * heads):
        got = f"got --widths {' '.join(map(str, given))}"
        parser.error(f"{got} · expected multiples of 128, and an even number for each head · choose others")
    return Shapes(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab,
    )


def _setting(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Setting:
    from benchmarks.speed.peers.measure import Setting
    from benchmarks.speed.weights import Model
    from lite.engines.torch_engine.device import check_device

    setting = Setting(
        model=Model(shapes=_shapes(parser, arguments.widths), num_layers=arguments.layers),
        num_prompt_tokens=arguments.prompt_tokens,
        num_new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        threads=arguments.threads,
        limit_s=arguments.limit_s,
        device=check_device(arguments.device),
        peers_python=arguments.peers_python.absolute(),
        vision=None if arguments.vision is None else arguments.vision.absolute(),
    )
    longest = setting.model.shapes.max_position_embeddings
    if setting.max_seq_len > longest:
        parser.error(
            f"got {setting.max_seq_len} tokens · expected at most {longest}, the context of the model · take fewer "
            "--prompt-tokens"
        )
    return setting


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # Workers import this package as well, and need none of that.
    from benchmarks.speed.harness import run_main
    from benchmarks.speed.peers.measure import Measured, measure
    from benchmarks.speed.peers.report import reports
    from benchmarks.speed.peers.specs import SPECS
    from lite.bench.table import to_json

    parser = _parser()

    def run(arguments: argparse.Namespace, record: Record) -> int:
        setting = _setting(parser, arguments)
        found, vision = measure([spec for spec in SPECS if spec.name in arguments.engines], setting)
        for one in found:
            if isinstance(one, Measured):  # peers may have other versions of our own packages
                record.about["versions"] = one.about["versions"] | record.about["versions"]
        about = to_json(setting)
        del about["peers_python"], about["vision"]
        record.begin(setting=about)
        for name, report in reports(found, vision, setting).items():
            record.add(name, report)
        return record.end()

    return run_main(parser, argv, run)
