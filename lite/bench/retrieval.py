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
from lite.eval.figures import RESAMPLES, Estimate, Quantiles, mean_sums, quantiles
from lite.eval.labels import LABELS, read_labels
from lite.eval.paired import Comparison, compare
from lite.image.files import load_image
from lite.image.preprocess import preprocess
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
class Embedded:
    """What one artifact makes of the studies, and what that took."""

    films: NDArray[np.float32]  # [N, dim]; NaN where the film cannot be used
    reports: NDArray[np.float32]  # [N, dim]
    labels: NDArray[np.float32]  # [14, dim]: the labels' names
    film: Quantiles  # seconds a film: read, prepared, embedded
    tower: Quantiles  # of these, in the tower
    text: Quantiles  # seconds a report
    texts_per_s: float  # all reports at once
    peak_bytes: int | None  # of the process
    num_cut: int  # reports of more tokens than the tower reads
    refused: Mapping[str, str]  # by study: why its film cannot be used


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalRow:
    """One artifact's figures, and how they differ from those of the first one."""

    name: str
    figures: Mapping[str, Estimate]
    beside_first: Mapping[str, Comparison]
    median_ranks: Mapping[str, Estimate]
    precision: Mapping[str, float]  # by label: of the nearest films to its name, the share that have it
    film_cosine: float  # with the first artifact's vector of the same film: the smallest
    report_cosine: float
    costs: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalBench:
    """All artifacts on the same pairs of film and report."""

    num_pairs: int
    prevalence: Mapping[str, float]  # by label: of all films, which is precision by chance
    rows: tuple[RetrievalRow, ...]
    notes: tuple[str, ...]


def run_retrieval(
    artifacts: Sequence[tuple[str, Path]], studies: Sequence[Study], options: dict[str, Any]
) -> RetrievalBench:
    """Measure artifacts, each in a process of its own, one after the other.

    Args:
        artifacts: names and folders.
        studies: with reports.
        options: of `load_retrieval`.

    Raises:
        LiteError: an artifact cannot be used, or fewer than two films can.
    """
    everything = [_apart(path, studies, options) for _, path in artifacts]
    usable = ~np.any([np.isnan(of.films[:, 0]) for of in everything], axis=0)
    if usable.sum() < 2:
        why = next(iter(everything[0].refused.values()), "there are no more")
        raise LiteError(f"got {usable.sum()} pairs of film and report · expected at least two · see: {why}")
    reports = [study.reference for study, use in zip(studies, usable, strict=True) if use]
    readings = [read_labels(report) for report in reports]
    has = {name: np.array([of[name].status == "positive" for of in readings]) for name in LABELS}
    has = {name: of for name, of in has.items() if of.any()}
    rows: list[RetrievalRow] = []
    first: tuple[Any, Any] = everything[0].films[usable], everything[0].reports[usable]
    found = [diagonal_ranks(of.films[usable], of.reports[usable]) for of in everything]
    for (name, _), of, ranks in zip(artifacts, everything, found, strict=True):
        sums = _hits(ranks)
        rows.append(
            RetrievalRow(
                name=name,
                figures={figure: value.estimate() for figure, value in sums.items()},
                beside_first={
                    figure: compare(value, _hits(found[0])[figure]) for figure, value in sums.items() if rows
                },
                median_ranks={way: _median(rank) for way, rank in ranks.items()},
                precision={label: _precision(of, usable, label, here) for label, here in has.items()},
                film_cosine=float((of.films[usable] * first[0]).sum(axis=1).min()),
                report_cosine=float((of.reports[usable] * first[1]).sum(axis=1).min()),
                costs=_costs(of),
            )
        )
    prevalence: dict[str, float] = {name: float(here.mean()) for name, here in has.items()}
    notes = tuple(_notes(everything[0], reports))
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


def _hits(ranks: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    return {f"{way} R@{top}": mean_sums((of <= top).tolist()) for way, of in ranks.items() for top in TOP}


def _median(ranks: NDArray[np.int64]) -> Estimate:
    rng = np.random.default_rng(0)
    drawn = [np.median(ranks[rng.integers(len(ranks), size=len(ranks))]) for _ in range(RESAMPLES)]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(value=float(np.median(ranks)), low=float(low), high=float(high), count=len(ranks))


def _precision(of: Embedded, usable: NDArray[np.bool_], label: Any, here: NDArray[np.bool_]) -> float:  # noqa: ANN401
    query = of.labels[LABELS.index(label)][None]
    return float(here[nearest(of.films[usable], query, NEAREST)[0][0]].mean())


# -- A process for each artifact -------------------------------------------------------------------------------------


def _apart(path: Path, studies: Sequence[Study], options: dict[str, Any]) -> Embedded:
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(embed, path, list(studies), options).result()
        except BrokenProcessPool as error:
            msg = f"{path}: got a process that was ended, out of memory as a rule · expected figures · free some memory"
            raise LiteError(msg) from error


def embed(path: Path, studies: Sequence[Study], options: dict[str, Any]) -> Embedded:
    """Embed films and reports one by one, and all reports at once.

    Raises:
        LiteError: the artifact cannot be used. A film that cannot is left out.
    """
    logging.getLogger("lite.retrieval.towers").setLevel(logging.ERROR)  # how many texts are cut is in the notes
    with load_retrieval(path, **options) as towers:
        how, texts = towers.artifact.manifest.preprocessing, [study.reference for study in studies]
        films = np.full((len(studies), towers.dim), np.nan, np.float32)
        refused, whole_s, tower_s, text_s = {}, [], [], []
        for row, study in enumerate(studies):
            started = time.perf_counter()
            try:
                pixels = preprocess(load_image(study.image).image, how)[None]
            except LiteError as error:
                refused[study.id] = str(error)
                continue
            prepared = time.perf_counter()
            films[row] = towers.embed_pixels(pixels)[0]
            ended = time.perf_counter()
            whole_s.append(ended - started)
            tower_s.append(ended - prepared)
        for text in texts:
            started = time.perf_counter()
            towers.embed_texts([text])
            text_s.append(time.perf_counter() - started)
        started = time.perf_counter()
        reports = towers.embed_texts(texts)
        return Embedded(
            films=films,
            reports=reports,
            labels=towers.embed_texts([label.lower() for label in LABELS]),
            film=quantiles(whole_s or [np.nan]),
            tower=quantiles(tower_s or [np.nan]),
            text=quantiles(text_s),
            texts_per_s=len(texts) / (time.perf_counter() - started),
            peak_bytes=peak_rss_bytes(),
            num_cut=sum(count > towers.wordpiece.max_tokens for count in towers.count_tokens(texts)),
            refused=refused,
        )


# -- Words -----------------------------------------------------------------------------------------------------------


def _costs(of: Embedded) -> dict[str, str]:
    def spread(times: Quantiles) -> str:
        return f"{duration(times.p50)} ({duration(times.p20)} – {duration(times.p80)})"

    return {
        "a film, read and embedded": spread(of.film),
        "… in the tower": spread(of.tower),
        "films/s": number(1 / of.film.p50),
        "a report": spread(of.text),
        "reports/s, all at once": number(of.texts_per_s),
        "peak memory": "–" if of.peak_bytes is None else shown_bytes(of.peak_bytes),
    }


def _notes(of: Embedded, reports: Sequence[str]) -> list[str]:
    notes = [
        "A study's own is the one right answer: another with the same words is a miss where it stands before, and of "
        f"equals that is who comes first in the list. {len(reports) - len(set(reports))} of {len(reports)} reports "
        "have the words of one before.",
        f"Intervals: studies drawn again {RESAMPLES} times, the middle 95 %.",
    ]
    if of.num_cut:
        notes.append(f"{of.num_cut} reports have more tokens than the tower reads: the rest does not count.")
    if of.refused:
        study, why = next(iter(of.refused.items()))
        notes.append(f"In no figure: {len(of.refused)} films that cannot be used, such as that of {study}: {why}")
    return notes


def format_retrieval(bench: RetrievalBench) -> str:
    """Return a bench as text, which is markdown too."""
    first, *others = bench.rows
    names = [row.name for row in bench.rows]
    versus = [f"{row.name} less {first.name} (p)" for row in others]
    lines = []
    for figure in first.figures:
        chance = int(figure.rpartition("@")[2]) / bench.num_pairs
        apart = [_apart_text(row.beside_first[figure]) for row in others]
        lines.append((figure, f"{min(1, chance):.3f}", *(_shown(row.figures[figure], 3) for row in bench.rows), *apart))
    for way in first.median_ranks:
        chance, none = (bench.num_pairs + 1) / 2, [""] * len(others)
        lines.append(
            (f"{way}, median rank", number(chance), *(_shown(r.median_ranks[way], 1) for r in bench.rows), *none)
        )
    labels = [
        (f"{label}, P@{NEAREST}", f"{chance:.2f}", *(f"{r.precision[label]:.2f}" for r in bench.rows))
        for label, chance in bench.prevalence.items()
    ]
    mean = [float(np.mean(list(of.values()))) for of in (bench.prevalence, *(row.precision for row in bench.rows))]
    costs = [(cost, *(row.costs[cost] for row in bench.rows)) for cost in first.costs]
    cosines = [
        (f"least cosine with {first.name}, {of}", *(f"{getattr(row, f'{of}_cosine'):.5f}" for row in bench.rows))
        for of in ("film", "report")
    ]
    tables = [
        markdown_table((f"{bench.num_pairs} pairs", "chance", *names, *versus), lines),
        markdown_table(
            ("films by a label's name", "chance", *names), [*labels, ("mean", *(f"{value:.2f}" for value in mean))]
        ),
        markdown_table(("costs", *names), [*costs, *(cosines if others else [])]),
    ]
    return "\n\n".join([*tables, "\n".join(f"- {note}" for note in bench.notes)])


def _shown(of: Estimate, digits: int) -> str:
    return f"{of.value:.{digits}f} ({of.low:.{digits}f} – {of.high:.{digits}f})"


def _apart_text(of: Comparison) -> str:
    return f"{of.difference.value:+.3f} ({of.difference.low:+.3f} – {of.difference.high:+.3f}), {of.p_value:.3f}"
