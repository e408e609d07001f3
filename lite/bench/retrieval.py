"""Retrieval measured: how often a report finds its film and a film its report, and what embedding costs.

The published evaluation takes a study's own film as the one right answer, the diagonal of a matrix of cosines, and the
rank of a study is where its own stands among all, the most similar first. So another study with the same report is a
miss where it stands before: of equals it does where it comes first in the list, as in a stable sort.
"""

from __future__ import annotations

import logging
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lite.bench.columns import duration, number
from lite.bench.table import markdown_table
from lite.errors import LiteError
from lite.eval.figures import RESAMPLES, Estimate, Quantiles, Sums, mean_sums, quantiles
from lite.eval.labels import LABELS, Label, read_labels
from lite.eval.paired import Comparison, compare
from lite.memory.process import peak_rss_bytes
from lite.memory.sizes import shown_bytes
from lite.retrieval.nearest import dot_products, nearest
from lite.retrieval.towers import load_retrieval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from lite.studies.study import Study

TOP: Final = (1, 5, 10)
NEAREST: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What embedding takes."""

    film: Quantiles  # seconds a film, from the file on
    report: Quantiles  # seconds a report by itself
    reports_per_s: float  # all at once
    peak_bytes: int | None  # of the process


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What one artifact makes of the studies."""

    films: NDArray[np.float32]  # [N, dim]; NaN where the film cannot be used
    reports: NDArray[np.float32]  # [N, dim]
    labels: NDArray[np.float32]  # [14, dim]: the labels' names
    costs: Costs
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalRow:
    """One artifact's figures, and how they differ from those of the first one."""

    name: str
    recall: Mapping[str, Estimate]
    beside_first: Mapping[str, Comparison]
    median_rank: Mapping[str, Estimate]
    precision: Mapping[Label, float]  # of the nearest films to a label's name, the share that have it
    least_cosines: tuple[float, float]  # with the first artifact's vectors, of films and of reports
    costs: Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalBench:
    """All artifacts on the same pairs of film and report."""

    num_pairs: int
    prevalence: Mapping[Label, float]  # of all films, the share that have a label: precision by chance
    rows: tuple[RetrievalRow, ...]
    notes: tuple[str, ...]


def run_retrieval(
    artifacts: Sequence[tuple[str, Path]], studies: Sequence[Study], options: Mapping[str, Any]
) -> RetrievalBench:
    """Measure artifacts, each in a process of its own, one after the other.

    Args:
        artifacts: names and folders.
        studies: with reports.
        options: of `load_retrieval`.

    Raises:
        LiteError: an artifact cannot be used, or fewer than two films can.
    """
    embedded = [_apart(path, studies, options) for _, path in artifacts]
    usable = ~np.any([np.isnan(of.films[:, 0]) for of in embedded], axis=0)
    reports = [study.reference for study, use in zip(studies, usable, strict=True) if use]
    if len(reports) < 2:
        msg = f"got {len(reports)} pairs of film and report · expected at least two"
        raise LiteError(" ".join((f"{msg} · take a longer list.", *embedded[0].notes)))
    readings = [read_labels(report) for report in reports]
    has = {name: np.array([of[name].status == "positive" for of in readings]) for name in LABELS}
    has = {name: of for name, of in has.items() if of.any()}
    rows: list[RetrievalRow] = []
    for (name, _), of in zip(artifacts, embedded, strict=True):
        vectors, first = ((each.films[usable], each.reports[usable]) for each in (of, embedded[0]))
        ranks = diagonal_ranks(*vectors)
        sums = _recall(ranks)
        theirs = sums if not rows else _recall(diagonal_ranks(*first))
        cosines = [float((own * other).sum(axis=1).min()) for own, other in zip(vectors, first, strict=True)]
        found = {label: nearest(vectors[0], of.labels[[LABELS.index(label)]], NEAREST)[0][0] for label in has}
        row = RetrievalRow(
            name=name,
            recall={figure: value.estimate() for figure, value in sums.items()},
            beside_first={figure: compare(value, theirs[figure]) for figure, value in sums.items() if rows},
            median_rank={way: _median(rank) for way, rank in ranks.items()},
            precision={label: float(here[found[label]].mean()) for label, here in has.items()},
            least_cosines=(cosines[0], cosines[1]),
            costs=of.costs,
        )
        rows.append(row)
    prevalence = {label: float(here.mean()) for label, here in has.items()}
    notes = (
        f"Another study with the same words is a miss where it stands before. {len(reports) - len(set(reports))} of "
        f"{len(reports)} reports have the words of one before.",
        f"Intervals: studies drawn again {RESAMPLES} times, the middle 95 %.",
        *embedded[0].notes,
    )
    return RetrievalBench(num_pairs=len(reports), prevalence=prevalence, rows=tuple(rows), notes=notes)


def diagonal_ranks(films: NDArray[np.float32], reports: NDArray[np.float32]) -> dict[str, NDArray[np.int64]]:
    """Return where each study's own film, and report, stands among all, from 1, the most similar first.

    Args:
        films: [N, dim].
        reports: [N, dim], of the same studies.
    """
    numbers = np.arange(len(films))
    own = (films.astype(np.float64) * reports).sum(axis=1)
    to_film, to_report = np.ones(len(films), np.int64), np.ones(len(films), np.int64)
    for row, report in enumerate(reports):
        similarities = dot_products(films, numbers, report)
        to_film[row] += np.sum((similarities > own[row]) | ((similarities == own[row]) & (numbers < row)))
        to_report += (similarities > own) | ((similarities == own) & (row < numbers))
    return {"text to film": to_film, "film to text": to_report}


def _recall(ranks: Mapping[str, NDArray[np.int64]]) -> dict[str, Sums]:
    return {f"{way} R@{top}": mean_sums((of <= top).tolist()) for way, of in ranks.items() for top in TOP}


def _median(ranks: NDArray[np.int64]) -> Estimate:
    rng = np.random.default_rng(0)
    drawn = np.median(rng.choice(ranks, (RESAMPLES, len(ranks))), axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(value=float(np.median(ranks)), low=float(low), high=float(high), count=len(ranks))


# -- A process for each artifact -------------------------------------------------------------------------------------


def _apart(path: Path, studies: Sequence[Study], options: Mapping[str, Any]) -> Embedded:
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(embed, path, list(studies), options).result()
        except BrokenProcessPool as error:
            msg = f"{path}: got a process that was ended, out of memory as a rule · expected figures · free some memory"
            raise LiteError(msg) from error


def embed(path: Path, studies: Sequence[Study], options: Mapping[str, Any]) -> Embedded:
    """Embed films and reports one by one, and all reports at once.

    Raises:
        LiteError: the artifact cannot be used. A film that cannot is left out.
    """
    logging.getLogger("lite.retrieval.towers").setLevel(logging.ERROR)  # how many texts are cut is in the notes
    texts, notes = [study.reference for study in studies], []
    refused: list[str] = []
    films_s, texts_s = [], []
    with load_retrieval(path, **options) as towers:
        films = np.full((len(studies), towers.dim), np.nan, np.float32)
        for row, study in enumerate(studies):
            started = time.perf_counter()
            try:
                films[row] = towers.embed_images([study.image])[0]
            except LiteError as error:
                refused.append(str(error))
            films_s.append(time.perf_counter() - started)
        for text in texts:
            started = time.perf_counter()
            towers.embed_texts([text])
            texts_s.append(time.perf_counter() - started)
        started = time.perf_counter()
        reports = towers.embed_texts(texts)
        per_s = len(texts) / (time.perf_counter() - started)
        if num_cut := sum(count > towers.wordpiece.max_tokens for count in towers.count_tokens(texts)):
            notes.append(f"{num_cut} reports have more tokens than the tower reads: the rest does not count.")
        if refused:
            notes.append(f"In no figure: {len(refused)} films that cannot be used, such as {refused[0]}.")
        labels = towers.embed_texts([label.lower() for label in LABELS])
    peak = peak_rss_bytes()
    costs = Costs(film=quantiles(films_s), report=quantiles(texts_s), reports_per_s=per_s, peak_bytes=peak)
    return Embedded(films=films, reports=reports, labels=labels, costs=costs, notes=tuple(notes))


# -- Words -----------------------------------------------------------------------------------------------------------


def format_retrieval(bench: RetrievalBench) -> str:
    """Return a bench as text, which is markdown too."""
    rows, first = bench.rows, bench.rows[0]
    names, others = [row.name for row in rows], rows[1:]
    versus = [f"{row.name} less {first.name} (p)" for row in others]
    lines = [
        (
            figure,
            f"{min(1, int(figure.rpartition('@')[2]) / bench.num_pairs):.3f}",
            *(_shown(row.recall[figure], 3) for row in rows),
            *(_difference(row.beside_first[figure]) for row in others),
        )
        for figure in first.recall
    ]
    middle, none = number((bench.num_pairs + 1) / 2), [""] * len(others)
    lines += [
        (f"{way}, median rank", middle, *(_shown(r.median_rank[way], 1) for r in rows), *none)
        for way in first.median_rank
    ]
    by_label = [
        (label, *(f"{of[label]:.2f}" for of in (bench.prevalence, *(row.precision for row in rows))))
        for label in bench.prevalence
    ]
    means = [float(np.mean(list(of.values()))) for of in (bench.prevalence, *(row.precision for row in rows))]
    costs = {
        "a film, read and embedded": [_spread(row.costs.film) for row in rows],
        "films/s": [number(1 / row.costs.film.p50) for row in rows],
        "a report": [_spread(row.costs.report) for row in rows],
        "reports/s, all at once": [number(row.costs.reports_per_s) for row in rows],
        "peak memory": ["–" if row.costs.peak_bytes is None else shown_bytes(row.costs.peak_bytes) for row in rows],
        f"a film's cosine with that of {first.name}, at least": [f"{row.least_cosines[0]:.5f}" for row in rows],
        f"a report's cosine with that of {first.name}, at least": [f"{row.least_cosines[1]:.5f}" for row in rows],
    }
    tables = [
        markdown_table((f"{bench.num_pairs} pairs", "chance", *names, *versus), lines),
        markdown_table(
            (f"label's name, P@{NEAREST}", "chance", *names),
            [*by_label, ("mean", *(f"{value:.2f}" for value in means))],
        ),
        markdown_table(("costs", *names), [(name, *cells) for name, cells in costs.items()]),
    ]
    return "\n\n".join([*tables, "\n".join(f"- {note}" for note in bench.notes)])


def _shown(of: Estimate, digits: int) -> str:
    return f"{of.value:.{digits}f} ({of.low:.{digits}f} – {of.high:.{digits}f})"


def _difference(of: Comparison) -> str:
    return f"{of.difference.value:+.3f} ({of.difference.low:+.3f} – {of.difference.high:+.3f}), {of.p_value:.3f}"


def _spread(times: Quantiles) -> str:
    return f"{duration(times.p50)} ({duration(times.p20)} – {duration(times.p80)})"
