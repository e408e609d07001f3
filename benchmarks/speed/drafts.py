"""What drafting is worth: `python -m benchmarks speed drafts ARTIFACT [--reports FILE]`.

    tokens per pass   reports, each as if it were being written, guessed by a table of the others (or of some of them)
    a step's cost     of 1 to 8 tokens, over one of one token, on the decoder itself
    wall time         the same reports decoded token by token and drafted, in turns, with the costs measured here
    GPU               bytes that a token takes, counted

Reports are those of phantoms unless a file of others is given. The decoder's random or small weights would not write
them: its steps are timed, and what it chooses is replaced by what the report says. So times are those of such texts on
such widths. A table never holds the report that is being written.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.report import write_findings
from benchmarks.phantom.write import study_seed
from benchmarks.speed.harness import Clock, Record, Report, Row, in_turns, run_main, shown, timed
from lite.artifact.open import Artifact, load_artifact
from lite.config import DecoderConfig
from lite.console import positive
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.protocol import NO_DRAFTS, ChosenTokens, Segment
from lite.errors import LiteError
from lite.eval.figures import quantiles
from lite.loading import prompt_of
from lite.memory.counts import cache_bytes_per_token, decode_weight_bytes
from lite.session.drafting import Costs, Drafting, Known, measure_costs
from lite.session.ngrams import Ngrams, join, read_texts
from lite.session.request import Progress, Request
from lite.session.rows import Row as SessionRow

NUM_PHANTOMS: Final = 501
SIZES: Final = (0, 100, 500)
LONGEST: Final = (3, 7, 15)
CONTEXT: Final = 1450  # an image of 1369 patches, a question, and half a text
CURVE: Final = range(1, 9)
FREE: Final = Costs([1, 2], [1.0, 1.0])
TWO_ROWS: Final = "two rows, nothing drafted"
SEED: Final = 20261130


def phantom_reports(count: int) -> list[str]:
    """Write the reports of phantoms."""
    seeds = (study_seed(SEED, index) for index in range(count))
    return [write_findings(sample_study(seed), np.random.default_rng(seed)).text for seed in seeds]


# -- Tokens per pass -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Passes:
    """What came of writing some reports."""

    passes: int = 0
    tokens: int = 0  # EOS included
    drafted: int = 0
    accepted: int = 0

    def write(self, text: Sequence[int], eos: int, table: Ngrams | None, longest: int) -> None:
        """Write a report, whose first token the prompt gives."""
        whole, at = [*text, eos], 1
        while at < len(whole):
            guesses = table.follow(whole[:at], longest) if table is not None else []
            right = 0
            while right < len(guesses) and at + right < len(text) and guesses[right].token_id == whole[at + right]:
                right += 1
            self.passes, self.tokens = self.passes + 1, self.tokens + right + 1
            self.drafted, self.accepted = self.drafted + len(guesses), self.accepted + right
            at += right + 1


def tokens_per_pass(texts: Sequence[Sequence[int]], eos: int) -> Report:
    """Write each report by a table of others, of some sizes."""
    report = Report(title="Tokens per pass, each report by a table of others")
    sample = random.Random(SEED).sample(range(len(texts)), min(len(texts), NUM_PHANTOMS))
    for size in sorted({min(size, len(texts) - 1) for size in SIZES}):
        found = {longest: Passes() for longest in LONGEST}
        for index in sample:
            others = [*texts[:index], *texts[index + 1 :]]
            table = Ngrams(join(random.Random(index).sample(others, size), eos)) if size else None
            for longest, passes in found.items():
                passes.write(texts[index], eos, table, longest)
        line = {"past reports": str(size)}
        for longest, passes in found.items():
            accepted = f" ({passes.accepted / passes.drafted:.0%} accepted)" if passes.drafted else ""
            line[f"≤ {longest}"] = f"{passes.tokens / passes.passes:.2f}{accepted}"
        report.lines.append(line)
        report.figures[str(size)] = {str(longest): dataclasses.asdict(passes) for longest, passes in found.items()}
    return report


# -- Steps of the decoder --------------------------------------------------------------------------------------------


class Dictated:
    """An engine whose steps take what they take, and whose choices are those of a report."""

    verifies_together = False

    def __init__(self, engine: Any, text: Sequence[int], start: int) -> None:  # noqa: ANN401 - any engine's
        """Have the text begin at a position."""
        self._engine, self._text, self._start = engine, text, start

    def decode(self, cache: Any, drafts: Mapping[int, Sequence[int]] = NO_DRAFTS) -> Known:  # noqa: ANN401
        """Take the step; behind the token at place n of the text comes that at n + 1."""
        first = cache.num_cached_tokens[0] - self._start + 1
        self._engine.decode(cache, drafts).wait()
        chosen = tuple(self._text[first : first + 1 + len(drafts.get(0, ()))])
        cache.input_ids[0] = chosen[-1]
        return Known({0: ChosenTokens(chosen, (0.0,) * len(chosen))})


class Writer:
    """A row of an engine, behind a prompt, that reports are written into."""

    def __init__(self, engine: Any, eos: int) -> None:  # noqa: ANN401
        """Make a cache that holds a prompt's numbers, whichever."""
        self.engine, self.eos = engine, eos
        self.start = min(CONTEXT, engine.config.max_position_embeddings - 256)
        self.cache = engine.new_cache(1, self.start + 256)
        self.cache.copy_prefix(0, 0, self.start)  # onto itself, so that it is not one page of zeros
        engine.extend(Segment(row=0, start=self.start, input_ids=(1,), num_logits=1, is_prompt=False), self.cache)

    def step(self, num_tokens: int) -> None:
        """Decode behind the prompt, once."""
        self.cache.truncate(0, self.start, newest=1)
        self.engine.decode(self.cache, {0: (1,) * (num_tokens - 1)} if num_tokens > 1 else NO_DRAFTS)

    def write(self, text: Sequence[int], drafting: Drafting | None) -> int:
        """Write a report behind its first token; return the number of steps."""
        whole = [*text, self.eos]
        request: Request[Any] = Request(
            id="", input_ids=(1,), film=None, see=lambda: None, max_new_tokens=len(whole) + 1
        )
        progress, row = Progress(request), SessionRow[Any](0)
        dictated: Any = Dictated(self.engine, whole, self.start)
        self.cache.truncate(0, self.start, newest=whole[0])
        progress.token_ids, row.num_chosen, steps = [whole[0]], 1, 0
        while len(progress.token_ids) < len(whole):
            if drafting is None:
                chosen = dictated.decode(self.cache).wait()
            else:
                chosen = drafting.decode(dictated, self.cache, [(row, progress)], lambda _: len(whole)).wait()
            progress.token_ids += chosen[0].token_ids
            row.num_chosen += 1
            steps += 1
        return steps


def cost_curve(writer: Writer, rounds: int) -> Report:
    """Time steps of so many tokens in turns."""
    report = Report(title="A step of so many tokens")
    clock = Clock()
    turns: dict[int, Callable[[], list[float]]] = {
        count: functools.partial(timed, functools.partial(writer.step, count), clock) for count in CURVE
    }
    in_turns(turns, 1)
    found = in_turns(turns, rounds)
    for count in CURVE:
        row = Row(names={"tokens": str(count)}, against="one token")
        row.took(found[count], found[1])
        report.add(row)
    return report


def wall_time(
    writers: Mapping[str, Writer], texts: Sequence[Sequence[int]], past: Sequence[Sequence[int]], rounds: int
) -> Report:
    """Write reports token by token and drafted, in turns.

    Args:
        writers: by name; "drafts off" is the one that drafts are held against, "drafted" the one that drafts.
        texts: one for each round, none of them in `past`.
        past: those that a table holds.
        rounds: how many.
    """
    report = Report(title=f"Reports of {np.mean([*map(len, texts)]):.0f} tokens, {len(past)} past ones")
    drafted = writers["drafted"]
    costs = measure_costs(drafted.engine, drafted.cache.max_seq_len)
    drafting = Drafting(costs, eos_token_id=drafted.eos, texts=join(past, drafted.eos))
    report.notes.append(f"Costs as measured at load: {costs}.")
    seconds: dict[str, list[list[float]]] = {name: [] for name in writers}
    cpu: dict[str, list[float]] = {name: [] for name in writers}
    for text in itertools.islice(itertools.cycle(texts), rounds):
        for name, writer in writers.items():
            started, spent = time.perf_counter(), time.process_time()
            writer.write(text, drafting if name == "drafted" else None)
            seconds[name].append([(time.perf_counter() - started) / len(text)])
            cpu[name].append((time.process_time() - spent) / len(text))
    for name in writers:
        row = Row(names={"decoding": name}, against="drafts off")
        row.took(seconds[name], seconds["drafts off"])
        report.add(row)
    faster = quantiles([off[0] / own[0] for off, own in zip(seconds["drafts off"], seconds["drafted"], strict=True)])
    spared = quantiles([off / own for off, own in zip(cpu["drafts off"], cpu["drafted"], strict=True)])
    padded = quantiles([own / off for off, own in zip(cpu["drafts off"], cpu[TWO_ROWS], strict=True)])
    done = drafting.statistics
    report.figures |= {"costs": costs.ratios, "speed-up": faster, "cpu speed-up": spared, **dataclasses.asdict(done)}
    report.notes.append(
        f"{faster.p50:.2f} times as fast (p20–p80 {faster.p20:.2f}–{faster.p80:.2f}); by CPU time {spared.p50:.2f} "
        f"({spared.p20:.2f}–{spared.p80:.2f}), and two rows with nothing drafted take {padded.p50:.2f} "
        f"({padded.p20:.2f}–{padded.p80:.2f}) of one's; "
        f"{done.tokens / done.steps:.2f} tokens a step, {done.drafted / done.steps:.2f} drafted, "
        f"{done.accepted / max(1, done.drafted):.0%} of these accepted."
    )
    started = time.perf_counter()
    count = sum(1 for text in texts for at in range(1, len(text)) if drafting.guess(text[:at], 7) is not None)
    report.notes.append(f"{1e6 * (time.perf_counter() - started) / count:.0f} µs a guess of up to 7 tokens.")
    return report


# -- A GPU, counted --------------------------------------------------------------------------------------------------


def bytes_per_token(config: DecoderConfig, figures: Mapping[str, Any], size: str) -> Report:
    """Count what a token takes of a GPU's bandwidth: weights and cache are read once for all tokens of a step."""
    report = Report(title=f"Bytes a token on a GPU, counted, {size} past reports")
    weights = decode_weight_bytes(config, itemsize=2)
    for cache, itemsize in (("float16", 2), ("int8", 1)):
        read = weights + CONTEXT * cache_bytes_per_token(config, itemsize=itemsize)
        for longest, passes in figures[size].items():
            tokens = passes["tokens"] / passes["passes"]
            # Each further token of a step writes its own keys and values, and its activations are small beside them.
            written = (1 + int(longest)) * cache_bytes_per_token(config, itemsize=itemsize)
            each = (read + written) / tokens
            line = {"cache": cache, "drafts": f"≤ {longest}", "MB a token": shown(each / 1e6)}
            report.lines.append(line | {"plain, MB": shown(read / 1e6), "fewer": f"{read / each:.2f} ×"})
    return report


# -- Command line ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed drafts",
        description="Say what drafting is worth: tokens per pass, what a step of several tokens costs, and wall time.",
        epilog="exit status: 0 done, 1 nothing could be measured, 2 wrong use, 130 interrupted.",
    )
    add = parser.add_argument
    add("artifact", type=Path, metavar="ARTIFACT", help="whose decoder.onnx is timed")
    add("--reports", type=Path, metavar="FILE", help="reports as for `lite drafts build` (default: phantoms')")
    add("--tokenizer", type=Path, metavar="ARTIFACT", help="whose tokenizer makes tokens of them (default: its own)")
    add("--cache-dtype", choices=["float32", "float16", "int8"], help="as for lite (default: as it computes)")
    add("--rounds", type=positive, default=20, metavar="N", help="reports that are timed (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    return parser


def _texts(arguments: argparse.Namespace, artifact: Artifact) -> tuple[list[list[int]], int]:
    tokenizer, _ = prompt_of(load_artifact(arguments.tokenizer) if arguments.tokenizer is not None else artifact)
    reports = phantom_reports(NUM_PHANTOMS) if arguments.reports is None else read_texts(arguments.reports)
    if len(reports) < 3:
        raise LiteError(f"{arguments.reports}: got {len(reports)} reports · expected 3 or more · add some")
    return [tokenizer.encode(text) for text in reports], tokenizer.eos_token_id


def _run(arguments: argparse.Namespace, record: Record) -> int:
    artifact = load_artifact(arguments.artifact)
    config, (texts, eos) = artifact.decoder_config(), _texts(arguments, artifact)
    passes = tokens_per_pass(texts, eos)
    lengths = f"{len(texts)} reports of {np.mean([*map(len, texts)]):.0f} tokens"
    record.begin(f"{lengths}, {arguments.reports or 'of phantoms'}.", artifact_id=artifact.id)
    record.add("passes", passes)
    record.add("gpu", bytes_per_token(config, passes.figures, max(passes.figures, key=int)))
    make = functools.partial(OnnxDecoder, artifact, cache_dtype=arguments.cache_dtype)
    plain, drafted = Writer(make(), eos), Writer(make(two_rows=True), eos)
    record.add("costs", cost_curve(drafted, arguments.rounds))
    rng = random.Random(SEED)
    rng.shuffle(texts)
    held_out, past = texts[: arguments.rounds], texts[arguments.rounds :]
    writers = {"drafts off": plain, TWO_ROWS: drafted, "drafted": drafted}
    record.add("wall", wall_time(writers, held_out, past, arguments.rounds))
    return record.end()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_main(_parser(), argv, _run)
