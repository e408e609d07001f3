"""The command line of `python -m benchmarks speed peers`."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.speed.peers.engines import PEERS_PYTHON, REFERENCE, SPECS
from benchmarks.speed.peers.estimate import estimate, measured_costs, modelled_costs
from benchmarks.speed.peers.measure import Measured, NoRow, Row, Setting, measure
from benchmarks.speed.peers.ratios import against_llama_cpp
from benchmarks.speed.peers.report import format_report
from benchmarks.speed.peers.weights import Model
from benchmarks.speed.peers.worker import CHECK_PROMPT, CHECK_TOKENS
from benchmarks.speed.synthetic import Widths
from lite.bench.machine import machine, versions
from lite.console import positive
from lite.engines.cores import available_cores
from lite.engines.torch_engine.decoder import check_device
from lite.errors import LiteError

LAYERS: Final = 2
PROMPT_TOKENS: Final = 1472  # an image of 1369 patches and a question
NEW_TOKENS: Final = 32
ROUNDS: Final = 3
LIMIT_S: Final = 30.0
SEED: Final = 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed peers",
        description="Time other engines at the shapes of our decoder, whichever is installed, and print a table as "
        "markdown. Weights are random; nothing is downloaded.",
        epilog="exit status: 0 done, 1 an engine failed (one that is not installed did not), 2 wrong use, 130 "
        "interrupted.",
    )
    names = [spec.name for spec in SPECS]
    parser.add_argument(
        "--layers", type=positive, default=LAYERS, metavar="N", help="decoder layers (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens", type=positive, default=PROMPT_TOKENS, metavar="T",
        help="the prompt, image included (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--new-tokens", type=positive, default=NEW_TOKENS, metavar="T",
        help="timed after it, in each round (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--engines", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"only these, beside {REFERENCE.name}: {', '.join(repr(name) for name in names)}",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=positive, default=available_cores(), metavar="N", help="of each engine (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive, default=ROUNDS, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--limit-s", type=_seconds, default=LIMIT_S, metavar="S",
        help="an engine whose prefill would take longer, by a probe, is not asked for it; and the most that its "
        "decoding takes in a round, a few tokens excepted (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--widths", nargs=4, type=positive, metavar=("HIDDEN", "INTERMEDIATE", "HEADS", "VOCABULARY"),
        help="other widths than those of a 7B model; hidden and intermediate a multiple of 128",
    )  # fmt: skip
    parser.add_argument(
        "--vision", type=Path, metavar="ARTIFACT",
        help="also time the vision tower of an artifact, and tell what a draft takes from image to text",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--peers-python", type=Path, default=PEERS_PYTHON, metavar="FILE",
        help="an interpreter that has llama-cpp-python and gguf; if there is none, our own is asked for them (default: "
        "build/peers-venv/bin/python, which `make peers` makes)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a JSON file, too")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0 or math.isinf(value):
        raise argparse.ArgumentTypeError(f"got {text} · expected seconds above 0")
    return value


def _widths(parser: argparse.ArgumentParser, given: Sequence[int] | None) -> Widths:
    if given is None:
        return Widths()
    hidden, intermediate, heads, vocab = given
    if hidden % 128 or intermediate % 128 or hidden % (2 * heads):
        got = f"got --widths {' '.join(map(str, given))}"
        parser.error(f"{got} · expected multiples of 128, and an even number for each head · choose others")
    return Widths(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads, vocab_size=vocab)


def _setting(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Setting:
    widths = _widths(parser, arguments.widths)
    # One more is decoded untimed, and the check has a length of its own.
    max_seq_len = max(arguments.prompt_tokens + arguments.new_tokens + 1, CHECK_PROMPT + CHECK_TOKENS)
    config = widths.llama_config(arguments.layers)
    if max_seq_len > config["max_position_embeddings"]:
        parser.error(
            f"got {max_seq_len} tokens · expected at most {config['max_position_embeddings']}, the context of the "
            "model · take fewer --prompt-tokens"
        )
    return Setting(
        model=Model(config=config, shapes=widths.base_shapes(arguments.layers), seed=SEED, max_seq_len=max_seq_len),
        num_prompt_tokens=arguments.prompt_tokens,
        num_new_tokens=arguments.new_tokens,
        rounds=arguments.rounds,
        threads=arguments.threads,
        limit_s=arguments.limit_s,
        device=check_device(arguments.device),
        peers_python=arguments.peers_python.absolute(),
        vision=None if arguments.vision is None else arguments.vision.absolute(),
    )


def _document(measured: Measured, setting: Setting, about: dict[str, Any]) -> dict[str, Any]:
    depth, vision = setting.model.num_layers, measured.vision

    def values(row: Row | NoRow) -> dict[str, Any]:
        if isinstance(row, NoRow):
            return asdict(row)
        modelled = asdict(estimate(row, depth)) | {"end_to_end_s": modelled_costs(row, depth, vision).end_to_end_s}
        end_to_end_s = measured_costs(row, vision).end_to_end_s
        return asdict(row) | {"end_to_end_s": end_to_end_s, "modelled_32_layers": modelled}

    settings = asdict(setting)
    del settings["peers_python"], settings["vision"], settings["model"]["shapes"]
    return about | {
        "setting": settings,
        "vision": None if vision is None else asdict(vision),
        "rows": [values(row) for row in measured.rows],
        "ratios": [asdict(ratios) for ratios in against_llama_cpp(measured, depth)],
    }


def _versions(rows: Sequence[Row | NoRow]) -> dict[str, str]:
    """Return our own versions and those of the peers, which may have other ones of the same packages."""
    found = versions()
    for row in rows:
        if isinstance(row, Row):
            found |= {package: version for package, version in row.versions.items() if package not in found}
    return found


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace, command: str) -> int:
    """Measure, print, write; return the exit status."""
    setting = _setting(parser, arguments)
    specs = [spec for spec in SPECS if spec.name in arguments.engines]
    measured = measure(specs, setting)
    found = _versions(measured.rows)
    about = {"machine": machine(), "versions": found, "command": command}
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    provenance = f"- Machine: {machine()}.\n- Versions: {listed}.\n- Command: `{command}`."
    sys.stdout.write(f"{format_report(measured, setting)}\n{provenance}\n")
    if arguments.json is not None:
        text = json.dumps(_document(measured, setting, about), ensure_ascii=False, allow_nan=False, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 1 if any(isinstance(row, NoRow) and row.failed for row in measured.rows) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given)
    try:
        return run(parser, arguments, shlex.join(["python", "-m", "benchmarks", "speed", "peers", *given]))
    except LiteError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
