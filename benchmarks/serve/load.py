"""Many clients at once: is every text the right one, when does its first word come, what does HTTP cost, what leaks."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any, Final

import lite
from benchmarks.serve.asking import Answer, ask_all
from benchmarks.serve.running import ROWS, Running
from benchmarks.speed.harness import Clock, Report, Row, in_turns, ratio, timed
from lite.eval.figures import quantiles
from lite.memory.sizes import shown_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lite.studies.study import Study

MIN_THROUGHPUT: Final = 0.9
MAX_GROWTH: Final = 0.02
_FEW_TOKENS: Final = 4
_MARKS: Final = 20


def measure_load(artifact: Path, studies: Sequence[Study], *, clients: int, rounds: int) -> Report:
    """Have clients ask for all studies, a part each round, in turns with `findings_batch`, and compare each text."""
    report = Report(title=f"{len(studies)} studies by {clients} clients, {ROWS} rows")
    size = max(1, len(studies) // rounds)
    parts = [studies[start : start + size] for start in range(0, len(studies), size)]
    answers: list[Answer | Exception] = []
    clock = Clock()
    with Running(artifact) as server, lite.load(artifact, rows=ROWS) as model:

        def batch(part: Sequence[Study]) -> list[float]:
            return timed(lambda: [*model.findings_batch(part, batch_size=ROWS)], clock)

        def served(part: Sequence[Study]) -> list[float]:
            return timed(lambda: answers.extend(asyncio.run(ask_all(server, part, clients=clients))), clock)

        for turn in (batch, served):
            turn(parts[-1][:ROWS])
        answers.clear()
        left, again = iter(parts), iter(parts)
        turns = in_turns({"batch": lambda: batch(next(left)), "served": lambda: served(next(again))}, len(parts))
    for name, what in (("batch", "findings_batch"), ("served", "HTTP, both routes in turns")):
        row = Row(names={"studies by": what}, against="findings_batch" if name == "served" else "")
        row.took(turns[name], turns["batch"] if row.against else "")
        report.add(row)
    _judge_texts(report, artifact, studies, answers)
    if not isinstance(batches := turns["batch"], str) and not isinstance(others := turns["served"], str):
        share = ratio(batches, others)
        told = f"throughput {share.p50:.2f} ({share.p20:.2f}–{share.p80:.2f}) of findings_batch"
        report.bar(told, f"≥ {MIN_THROUGHPUT}", is_met=share.p50 >= MIN_THROUGHPUT)
    return report


def texts_of(artifact: Path, studies: Sequence[Study], **options: Any) -> list[str]:
    """Draft studies one by one, by the library."""
    with lite.load(artifact, rows=1, **options) as model:
        return [model.findings(study.image, study.reason).text for study in studies]


def _judge_texts(
    report: Report, artifact: Path, studies: Sequence[Study], answers: Sequence[Answer | Exception]
) -> None:
    """Count what was lost, and what has another text than it has by itself."""
    lost = [answer for answer in answers if isinstance(answer, Exception)]
    others = [
        (study, answer.text)
        for study, answer, text in zip(studies, answers, texts_of(artifact, studies), strict=True)
        if isinstance(answer, Answer) and answer.text != text
    ]
    # One row of 4-bit products is rounded otherwise than several; with drafts on, a study by itself is one of two rows.
    again = texts_of(artifact, [study for study, _ in others], drafts="auto") if others else []
    crossed = [study.id for (study, text), other in zip(others, again, strict=True) if text != other]
    report.bar(f"{len(lost)} of {len(studies)} lost {lost[:1] or ''}".rstrip(), "0", is_met=not lost)
    report.bar(f"{len(crossed)} crossed {crossed[:9] or ''}".rstrip(), "0", is_met=not crossed)
    told = quantiles([answer.ttft_s for answer in answers if isinstance(answer, Answer)])
    first = f"time to the first text: p50 {told.p50:.3f} s, p99 {told.p99:.3f} s, the wait for a row included"
    report.notes += [f"{len(others) - len(crossed)} texts that one row alone rounds otherwise", first]


def measure_memory(artifact: Path, studies: Sequence[Study], *, clients: int, requests: int) -> Report:
    """Look at what the server holds while it answers very many short requests."""
    report = Report(title=f"Memory over {requests} requests of {_FEW_TOKENS} tokens")
    endless, step, held = itertools.cycle(studies), max(1, requests // _MARKS), {}
    with Running(artifact) as server:
        for done in range(step, requests + 1, step):
            part = [*itertools.islice(endless, step)]
            found = asyncio.run(ask_all(server, part, clients=clients, max_new_tokens=_FEW_TOKENS))
            report.wrong += [f"lost: {answer}" for answer in found if isinstance(answer, Exception)][:1]
            held[done] = server.memory()
    report.lines = [{"requests": str(done), "held": shown_bytes(rss)} for done, rss in held.items()]
    growth = max(abs(rss / held[step] - 1) for rss in held.values())
    told = f"{growth:.1%} away from what it held after {step}, at the most"
    report.bar(told, f"{MAX_GROWTH:.0%}", is_met=growth <= MAX_GROWTH)
    return report
