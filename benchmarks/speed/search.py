"""What a search takes: `python -m benchmarks speed search --films 377000 --dim 512`.

An index of random vectors, as large as a cohort, is searched in processes of their own, with one thread of BLAS and
with more: opened, asked a first time while nothing of it is in memory, and then often. What is found is compared with
brute force in float64, and the memory is the most that the process had resident, the mapped index included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.speed.harness import Record, Report, Row, run_main, shown
from lite.console import ProgressLine, positive
from lite.engines.cores import available_cores
from lite.memory.process import peak_rss_bytes
from lite.memory.sizes import shown_bytes
from lite.retrieval.index import FILMS, Index, Indexed, IndexWriter
from lite.retrieval.nearest import dot_products

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

TOP: Final = 10
_CHECKED: Final = 3
_BAR_S: Final = 0.05
_BAR_BYTES: Final = 0.8e9


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0 all well, 1 something is wrong, 2 wrong use."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks speed search", description="Time exact searches.")
    parser.add_argument("--films", type=positive, default=377_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--dim", type=positive, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--queries", type=positive, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document, too")
    return run_main(parser, argv, run)


def run(arguments: argparse.Namespace, record: Record) -> int:
    """Write an index, and search in it."""
    record.begin(f"{arguments.films:,} random vectors of {arguments.dim} numbers, the {TOP} nearest.")
    with tempfile.TemporaryDirectory(prefix="search-") as folder:
        path = Path(folder) / "index"
        started = time.perf_counter()
        num_bytes = write_random(path, arguments.films, arguments.dim)
        report = Report(title="Searches")
        report.notes.append(f"Written in {time.perf_counter() - started:.0f} s: {num_bytes / 1e9:.3f} GB on the disk.")
        for threads in sorted({1, available_cores()}):
            report.add(_in_a_process(path, threads, arguments.queries))
        fastest = min(row.time.p50 for row in report.rows if row.time is not None)
        report.bar(f"{1e3 * fastest:.1f} ms a query", f"{1e3 * _BAR_S:.0f} ms", is_met=fastest <= _BAR_S)
        report.bar(f"{num_bytes / 1e9:.3f} GB", f"{_BAR_BYTES / 1e9:.1f} GB", is_met=num_bytes <= _BAR_BYTES)
        record.add("search", report)
    return record.end()


def random_vectors(count: int, dim: int, seed: int) -> NDArray[np.float32]:
    """Draw vectors of length 1."""
    drawn = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    vectors: NDArray[np.float32] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return vectors


def write_random(path: Path, count: int, dim: int) -> int:
    """Write an index of random films; return its bytes."""
    progress = ProgressLine("writing", count)
    with IndexWriter(path, artifact_id="random", dim=dim) as writer:
        while (start := len(writer)) < count:
            numbers = range(start, min(start + 5_000, count))
            studies = [Indexed(id=f"{n}", image=f"/films/{n}.png") for n in numbers]
            writer.add(studies, random_vectors(len(studies), dim, start))
            progress.show(len(writer))
        return writer.num_bytes


def _in_a_process(path: Path, threads: int, num_queries: int) -> Row:
    """Search with so many threads: BLAS reads how many when it is loaded."""
    os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(search, path, num_queries).result()
    nbytes = path.joinpath(FILMS).stat().st_size
    row = Row(names={"threads": f"{threads}"}, nbytes=nbytes, bandwidth=nbytes / found["read_s"])
    row.took("another answer than by brute force" if found["wrong"] else [found["warm_s"]])
    row.figures = {name: found[name] for name in ("open_s", "first_s", "peak_bytes")}
    row.cells = {f"{name}, ms": shown(1e3 * found[f"{name}_s"]) for name in ("open", "first")}
    row.cells["peak memory"] = shown_bytes(found["peak_bytes"] or 0)
    return row


def search(path: Path, num_queries: int) -> dict[str, Any]:
    """Search in this process: seconds, bytes, and whether an answer is wrong."""
    with (path / FILMS).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    index = Index(path)
    open_s = time.perf_counter() - started
    queries = random_vectors(num_queries + 1, index.header.dim, 20_261_130)
    marks, found = [time.perf_counter()], []
    for query in queries:
        found.append(index.search(query[None], "films", top=TOP)[0])
        marks.append(time.perf_counter())
    seconds, peak = np.diff(marks).tolist(), peak_rss_bytes()
    started = time.perf_counter()
    for _ in range(_CHECKED):
        index.films.sum()
    found_s = {"read_s": (time.perf_counter() - started) / _CHECKED, "first_s": seconds[0], "warm_s": seconds[1:]}
    wrong = 0
    for query, hits in zip(queries[:_CHECKED], found, strict=False):
        exact = dot_products(index.films, np.arange(len(index)), query)
        nearest = np.argsort(-exact, kind="stable")[:TOP]
        wrong += [(hit.study.id, hit.similarity) for hit in hits] != [(f"{row}", exact[row]) for row in nearest]
    return found_s | {"open_s": open_s, "peak_bytes": peak, "wrong": wrong}
