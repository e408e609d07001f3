"""What a user would take instead, end to end for one film: `python -m benchmarks speed rivals`.

    LLaVA-Rad's shapes      our onnx engine with 1369, 361 and 100 image tokens, prompts by int8 weights; with 1369 by
                            the stored ones, too; llama.cpp and OpenVINO with 1369
    MedGemma-4B's shapes    a Gemma 3 of 4B with 256 image tokens by llama.cpp, and its tower of 4096 patches

A film is its tower, a prompt and a text. Weights are random, every decoder is compared with an exact one, each is timed
at two depths in turns with all others, and the line through them gives all layers: every figure with a "~". The tower
is our own in 8 bits for LLaVA-Rad's shapes, whoever decodes, and transformers' in float32 for MedGemma's, which is not
llama.cpp's. Ids stand for image tokens there. A text's tokens are decoded one by one, drafts off.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import operator
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.speed.depth import at
from benchmarks.speed.harness import NONE, Record, Report, Row, Unavailable, in_turns, reason, run_main, shown
from benchmarks.speed.peers.measure import Bench, Setting, with_real_depth
from benchmarks.speed.peers.process import Process
from benchmarks.speed.peers.specs import SPECS, Spec
from benchmarks.speed.synthetic import REAL_LAYERS
from benchmarks.speed.weights import Shapes
from lite.console import positive
from lite.engines.cores import available_cores
from lite.errors import LiteError

IMAGE_TOKENS: Final = (1369, 361, 100)
TEXT_TOKENS: Final = 100
QUESTION_TOKENS: Final = 56
"""Text of a prompt: ours' with a reason for the exam; the rival gets as many."""
OURS: Final = SPECS["lite onnx int4 int8-cache int8-prompts"]
STORED: Final = SPECS["lite onnx int4 int8-cache"]
"""The same where memory is short: prompts by the weights that tokens are decoded by."""
GEMMA: Final = {
    "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "vocab_size": 262208, "sliding_window": 1024, "query_pre_attn_scalar": 256,
}  # fmt: skip
GEMMA_DEPTHS: Final = (2, 6)
MEDGEMMA: Final = "MedGemma-4B by llama.cpp Q4_0"
SIGLIP_LAYERS: Final = 27
SIGLIP: Final = {layers: replace(SPECS["transformers float32"], form=f"siglip {layers} 896") for layers in (1, 3)}


class GemmaBench(Bench):
    """Random Gemmas of a few depths, which transformers computes exactly."""

    exact = SPECS["transformers float32"]
    config: Any = GEMMA

    def make(self, layers: int, out: Path) -> None:
        """Write a Gemma 3 in float16, as transformers draws it."""
        import torch
        from transformers import AutoModelForCausalLM, Gemma3TextConfig

        torch.manual_seed(0)
        make: Any = AutoModelForCausalLM  # without types
        drawn = make.from_config(Gemma3TextConfig(**self.config, num_hidden_layers=layers), dtype=torch.float16)
        drawn.save_pretrained(out / "dense" / "decoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """A way to read a film."""

    name: str
    image_tokens: int
    bench: Bench
    loaded: dict[int, Process]
    tower: dict[int, Process]  # by depth; one is all of it
    real_layers: int = REAL_LAYERS

    def turns(self) -> dict[Any, Callable[[], Any]]:
        """Return what is to be timed in a round; towers are shared."""
        tokens = self.image_tokens + QUESTION_TOKENS
        decoders = {
            (self.name, self.image_tokens, layers): functools.partial(self.bench.turn, process, tokens)
            for layers, process in self.loaded.items()
        }
        return decoders | {process: functools.partial(process.ask, "tower") for process in self.tower.values()}


def row_of(rival: Rival, found: dict[Any, Any], first: list[list[float]] | None) -> tuple[Row, list[list[float]]]:
    """Add up a film, round by round.

    Returns:
        The row, and seconds by round.

    Raises:
        LiteError: something failed.
        Unavailable: the line through two depths falls.
    """
    texts = {layers: _whole(found[rival.name, rival.image_tokens, layers]) for layers in rival.loaded}
    phases: dict[str, list[float]] = {}
    for what in ("prefill", "decode"):
        times: Any = {layers: [one[what] for one in rounds] for layers, rounds in texts.items()}
        phases[what] = [*map(statistics.median, _whole(with_real_depth(times, rival.real_layers)[rival.real_layers]))]
    times = {layers: [[one["seconds"]] for one in _whole(found[process])] for layers, process in rival.tower.items()}
    phases["tower"] = [one[0] for one in _whole(with_real_depth(times, SIGLIP_LAYERS)[SIGLIP_LAYERS])]
    pairs = zip(phases["tower"], phases["prefill"], phases["decode"], strict=True)
    film = [[seen + read + TEXT_TOKENS * token] for seen, read, token in pairs]
    row = Row(names={"": rival.name, "image tokens": f"{rival.image_tokens}"}, against=OURS.name)
    row.took(film, first or "")
    medians = {what: statistics.median(seconds) for what, seconds in phases.items()}
    row.cells = {f"~{what}, s": shown(medians[what]) for what in ("tower", "prefill")}
    row.cells["~decode, ms/token"] = shown(1e3 * medians["decode"])
    peaks = [process.ask("peak")["bytes"] for process in rival.loaded.values()]
    row.cells["~peak GB"] = NONE if None in peaks else shown(at(rival.real_layers, [*rival.loaded], peaks) / 1e9)
    watts = [each for rounds in texts.values() for one in rounds for each in one["watts"]]
    row.cells["~J"] = shown(statistics.median(watts) * row.time.p50) if watts and row.time is not None else NONE
    row.figures = {"phases": phases, "peak_bytes": peaks, "watts": watts}
    return row, film


def _whole(rounds: Any) -> Any:  # noqa: ANN401 - what was timed
    if isinstance(rounds, str):
        raise Unavailable(rounds) if rounds.startswith("noise") else LiteError(rounds)
    return rounds


def field(setting: Setting, folder: Path, stack: contextlib.ExitStack, report: Report) -> list[Rival]:
    """Load all there are; the report says why one is not among them.

    Raises:
        LiteError: our own engine failed.
    """
    llava = Bench(setting, folder / "llava-rad", OURS, stack)
    tower = {SIGLIP_LAYERS: _tower(llava, OURS, stack)}
    rivals = [
        Rival(name=OURS.name, image_tokens=tokens, bench=llava, loaded=llava.loaded, tower=tower)
        for tokens in IMAGE_TOKENS
    ]
    for name in (STORED.name, "llama.cpp Q4_0", "llama.cpp Q4_0 flash", "OpenVINO int4 u8-cache"):
        with _told(report, name):
            loaded = llava.load(SPECS[name], stack)
            rivals.append(Rival(name=name, image_tokens=IMAGE_TOKENS[0], bench=llava, loaded=loaded, tower=tower))
    with _told(report, MEDGEMMA):
        shapes = replace(setting.shapes, vocab_size=GEMMA["vocab_size"])
        shorter = replace(setting, layers=GEMMA_DEPTHS, num_prompt_tokens=256 + QUESTION_TOKENS, shapes=shapes)
        gemma = GemmaBench(shorter, folder / "medgemma", SPECS["llama.cpp Q4_0"], stack)
        siglip = {layers: _tower(gemma, spec, stack) for layers, spec in SIGLIP.items()}
        rivals.append(
            Rival(name=MEDGEMMA, image_tokens=256, bench=gemma, loaded=gemma.loaded, tower=siglip, real_layers=34)
        )
    return rivals


def _tower(bench: Bench, spec: Spec, stack: contextlib.ExitStack) -> Process:
    """Start a process for a tower alone, and run it once."""
    process = bench.start(spec, bench.setting.layers[0])
    stack.callback(process.close)
    process.ask("tower")
    return process


@contextlib.contextmanager
def _told(report: Report, name: str, image_tokens: str = NONE) -> Iterator[None]:
    try:
        yield
    except (Unavailable, LiteError) as error:
        wrong = isinstance(error, LiteError)
        report.add(Row(names={"": name, "image tokens": image_tokens}, why=reason(error), is_wrong=wrong))


def measure(setting: Setting, folder: Path) -> Report:
    """Time all of them in turns.

    Raises:
        LiteError: our own engine failed.
    """
    report = Report(title=f"One film and {TEXT_TOKENS} tokens, end to end")
    with contextlib.ExitStack() as stack:
        rivals = field(setting, folder, stack, report)
        turns = functools.reduce(operator.or_, [rival.turns() for rival in rivals])
        found = in_turns(turns, setting.rounds)
        first: list[list[float]] | None = None
        for rival in rivals:
            with _told(report, rival.name, f"{rival.image_tokens}"):
                row, film = row_of(rival, found, first)
                report.add(row)
                first = film if rival is rivals[0] else first
    report.notes += [
        f"{setting.threads} threads, {setting.rounds} rounds; depths {setting.layers} of 32, {GEMMA_DEPTHS} of 34, and "
        f"{tuple(SIGLIP)} of 27 of MedGemma's tower; a prompt has {QUESTION_TOKENS} tokens beside the image's; "
        f"{setting.num_new_tokens} tokens decoded.",
        "Peak memory is that of the decoder's process (RSS) once loaded, without a tower. Joules: of all processors, "
        f"mean watts while a decoder runs × seconds; {NONE}: not readable here.",
    ]
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed rivals",
        description="Read one film and write 100 tokens by our engine and by what a user would take instead.",
        epilog="exit status: 0 done, 1 one failed, 2 wrong use, 130 interrupted.",
    )
    add, threads = parser.add_argument, available_cores()
    add("--layers", type=positive, nargs=2, default=[1, 4], metavar="N", help="two depths of LLaVA-Rad's decoder (1 4)")
    add("--new-tokens", type=positive, default=16, metavar="T", help="timed in each round (default: %(default)s)")
    add("--threads", type=positive, default=threads, metavar="N", help="of each (default: %(default)s)")
    add("--rounds", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    add("--limit-s", type=positive, default=120, metavar="S", help="for a prompt and its tokens (default: %(default)s)")
    add("--models", type=Path, metavar="DIR", help="keep the random models there, or take those that are there")
    add("--json", type=Path, metavar="FILE", help="write everything to a JSON file, too")

    def run(arguments: argparse.Namespace, record: Record) -> int:
        setting = Setting(
            layers=tuple(sorted(arguments.layers)), num_prompt_tokens=IMAGE_TOKENS[0] + QUESTION_TOKENS,
            num_new_tokens=arguments.new_tokens, rounds=arguments.rounds, threads=arguments.threads,
            limit_s=arguments.limit_s, device="cpu", shapes=Shapes(),
        )  # fmt: skip
        with contextlib.ExitStack() as stack:
            models = arguments.models or stack.enter_context(tempfile.TemporaryDirectory(prefix="rivals-"))
            record.begin()
            record.add("rivals", measure(setting, Path(models).absolute()))
        return record.end()

    return run_main(parser, argv, run)
