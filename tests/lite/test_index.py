"""An index of vectors: what a search finds is what brute force finds, and what a kill leaves is never half a study."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repository import ROOT

from lite.errors import LiteError
from lite.retrieval import index as index_module
from lite.retrieval import nearest as nearest_module
from lite.retrieval.index import FILMS, REPORTS, ROWS, STUDIES, Index, Indexed, IndexWriter
from lite.retrieval.nearest import nearest

DIM = 24
FILES = (FILMS, REPORTS, STUDIES, ROWS)


def vectors(count: int, seed: int = 0, dim: int = DIM) -> Any:
    drawn = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def study(number: int) -> Indexed:
    return Indexed(id=f"s{number}", image=f"/films/{number}.png", report=f"Répört {number}.\n" if number % 3 else None)


def writer(path: Path, artifact_id: str = "towers") -> IndexWriter:
    return IndexWriter(path, artifact_id=artifact_id, dim=DIM, artifact="/artifact")


def add(out: IndexWriter, start: int, end: int) -> None:
    """Add studies whose vectors are known by their numbers."""
    films, reports = (np.concatenate([vectors(1, 2 * n + k) for n in range(start, end)]) for k in (0, 1))
    out.add([study(n) for n in range(start, end)], films, reports[[n % 3 > 0 for n in range(start, end)]])


def check(path: Path, count: int) -> None:
    """The index holds the first studies, whole."""
    index = Index(path)
    numbers = [n for n in range(count) if n % 3]
    assert list(index) == [study(n) for n in range(count)]
    assert np.array_equal(index.films, np.concatenate([np.empty((0, DIM)), *(vectors(1, 2 * n) for n in range(count))]))
    assert np.array_equal(
        index.reports, np.concatenate([np.empty((0, DIM)), *(vectors(1, 2 * n + 1) for n in numbers)])
    )


# -- Search ----------------------------------------------------------------------------------------------------------


def brute_force(matrix: Any, query: Any, top: int) -> list[tuple[int, float]]:
    similarities = [float((row.astype(np.float64) * query).sum()) for row in matrix]
    order = sorted(range(len(matrix)), key=lambda row: (-similarities[row], row))
    return [(row, similarities[row]) for row in order[:top]]


@pytest.mark.parametrize(
    ("count", "num_queries", "top"), [(1, 1, 3), (75, 2, 1), (301, 1, 10), (301, 7, 10), (90, 3, 90)]
)
def test_search_is_brute_force(monkeypatch: pytest.MonkeyPatch, count: int, num_queries: int, top: int) -> None:
    """In blocks that do not fit, with rows that come several times: in the order of the matrix."""
    monkeypatch.setattr(nearest_module, "BLOCK_ROWS", 37)
    monkeypatch.setattr(nearest_module, "_EXACT_ROWS", 5)
    monkeypatch.setattr(nearest_module, "_SIMILARITIES", 2 * count)
    matrix, queries = vectors(count), vectors(num_queries, 1)
    for copies in (1, 4):  # rows 3, 7, 11 … are the same
        matrix[3::copies] = matrix[3] if copies > 1 and count > 3 else matrix[3::copies]
        queries[-1] = matrix[-1]
        rows, similarities = nearest(matrix, queries, top)
        for number, query in enumerate(queries):
            wanted = brute_force(matrix, query, top)
            assert list(zip(rows[number].tolist(), similarities[number].tolist(), strict=True)) == wanted


def test_rows_that_a_float32_product_cannot_tell_apart_come_in_their_order() -> None:
    """By a hair: the product in float32 puts some of them in the wrong order."""
    query = vectors(1, 5, 512)
    matrix = query + np.random.default_rng(0).standard_normal((200, 512)).astype(np.float32) * np.float32(1e-7)
    wanted = [row for row, _ in brute_force(matrix, query[0], 200)]
    rough = np.argsort(-(matrix @ query[0]), kind="stable").tolist()
    assert any(set(rough[:top]) != set(wanted[:top]) for top in range(1, 200))
    for top in range(1, 200):
        assert nearest(matrix, query, top)[0][0].tolist() == wanted[:top]


def test_an_index_is_searched_by_films_and_by_reports(tmp_path: Path) -> None:
    with writer(tmp_path / "index") as out:
        for start in range(0, 60, 7):
            add(out, start, min(start + 7, 60))
    index = Index(tmp_path / "index", artifact_id="towers")
    queries = vectors(3, 99)
    numbers = {"films": list(range(60)), "reports": [n for n in range(60) if n % 3]}
    for what, matrix in (("films", index.films), ("reports", index.reports)):
        for query, hits in zip(queries, index.search(queries, what, top=5), strict=True):
            wanted = brute_force(matrix, query, 5)
            assert [(hit.study, hit.similarity) for hit in hits] == [
                (study(numbers[what][row]), similarity) for row, similarity in wanted
            ]
    assert len(index.search(queries[:1], "films", top=1_000)[0]) == 60
    assert index[-1] == study(59)
    with pytest.raises(IndexError):
        index[60]


# -- Exactly once ----------------------------------------------------------------------------------------------------


def test_what_was_not_finished_is_cut_off(tmp_path: Path) -> None:
    """Whatever a kill leaves: each file may have more, or less of what is under way, in any order."""
    for name, end in (("some", 5), ("all", 9)):
        with writer(tmp_path / name) as out:
            add(out, 0, 5)
            if end == 9:
                add(out, 5, 9)
    some, everything = ({file: (tmp_path / name / file).read_bytes() for file in FILES} for name in ("some", "all"))
    tails = {file: everything[file][len(some[file]) :] for file in FILES}
    left = {file: (b"", tail[:3], tail[: len(tail) // 2], tail, tail[:-1] + b"\0") for file, tail in tails.items()}
    left[STUDIES] = left[STUDIES][1::2]
    left[ROWS] = (b"", tails[ROWS][:3], bytes(16), bytes(21))  # the row that decides is not whole, or never came
    for number, ends in enumerate(itertools.product(*left.values())):
        folder = tmp_path / f"cut-{number}"
        shutil.copytree(tmp_path / "some", folder)
        for file, end in zip(FILES, ends, strict=True):
            with (folder / file).open("ab") as stream:
                stream.write(end)
        check(folder, 5)
        with writer(folder) as out:
            assert len(out) == 5
            if not number % 7:
                add(out, 5, 9)
        grown = everything if not number % 7 else some
        assert {file: (folder / file).read_bytes() for file in FILES} == grown
        shutil.rmtree(folder)


def test_a_failed_write_leaves_whole_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what comes next is written over what it has left."""
    real = index_module._write
    for failing in range(4):
        calls = itertools.count()

        def write(file: Any, at: int, data: bytes, failing: int = failing, calls: Any = calls) -> None:
            if next(calls) == failing:
                file.seek(at)
                file.write(data[: len(data) // 3])
                raise OSError(28, "No space left on device")
            real(file, at, data)

        path = tmp_path / f"{failing}"
        with writer(path) as out:
            add(out, 0, 4)
            monkeypatch.setattr(index_module, "_write", write)
            with pytest.raises(LiteError, match="full disk"):
                add(out, 4, 9)
            there = 5 if failing == 3 else 4  # of its five rows one was whole already: a reader may have seen it
            check(path, there)
            assert len(out) == there
            monkeypatch.setattr(index_module, "_write", real)
            add(out, there, 8)
            check(path, 8)


KILLED = """
import sys
sys.path[:0] = [{tests!r}, {lite!r}]
from pathlib import Path
from test_index import add, writer
with writer(Path(sys.argv[1])) as out:
    for number in range(len(out), 100_000):
        add(out, number, number + 1)
"""


def test_killed_at_any_point_it_goes_on_behind_the_last_study(tmp_path: Path) -> None:
    """The process is killed without a word, in the middle of whatever it does; a reader looks on meanwhile."""
    path, seen = tmp_path / "index", 0
    code = KILLED.format(tests=str(ROOT / "tests"), lite=str(ROOT / "tests" / "lite"))
    for number in range(6):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
        while process.poll() is None and (not (path / ROWS).exists() or len(Index(path)) < seen + 5 + number):
            time.sleep(0.0005 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
        assert len(Index(path)) >= seen + 5 + number
        seen = len(Index(path))
        check(path, seen)
    with writer(path) as out:
        add(out, seen, seen + 2)
    check(path, seen + 2)


def test_a_reader_keeps_what_it_has_opened_while_another_writes(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        add(out, 0, 4)
        before = Index(tmp_path)
        wanted = before.search(vectors(1, 7), "films", top=9)
        add(out, 4, 8)
        assert before.search(vectors(1, 7), "films", top=9) == wanted
        assert (len(before), len(Index(tmp_path))) == (4, 8)


def test_one_process_writes_it_at_a_time(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from lite.retrieval.index import IndexWriter\n"
    code += "with IndexWriter(Path(sys.argv[1]), artifact_id='towers', dim=24): pass"
    with writer(tmp_path / "index") as out:
        add(out, 0, 2)
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "index")], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert "is writing · expected one that is free" in done.stderr
        add(out, 2, 4)
    check(tmp_path / "index", 4)


# -- Refused ---------------------------------------------------------------------------------------------------------


def test_a_study_is_there_once(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        add(out, 0, 4)
        assert out.has("s1", "/moved/1.png", "Répört 1.\n")
        assert not out.has("s9", "/films/9.png", None)
        for image, report in (("/films/2.png", "Répört 1.\n"), ("/films/1.png", "Another."), ("/films/1.png", None)):
            with pytest.raises(LiteError, match="another film or report for s1 "):
                out.has("s1", image, report)
        with pytest.raises(LiteError, match="in the index already"):
            add(out, 3, 6)
        with pytest.raises(LiteError, match="in the index already"):
            out.add([study(6), study(6)], vectors(2))
    check(tmp_path, 4)


@pytest.mark.parametrize(
    ("films", "reports", "message"),
    [
        (vectors(2, dim=DIM + 1), vectors(1), r"films of shape \[2, 25\] · expected \[2, 24\]"),
        (vectors(3), vectors(1), r"films of shape \[3, 24\] · expected \[2, 24\]"),
        (vectors(2), None, r"reports of shape \[0, 24\] · expected \[1, 24\]"),
        (vectors(2) * 1.01, vectors(1), r"vector of length 1.01 among films · expected 1"),
        (vectors(2), vectors(1) * np.nan, "vector of length nan among reports"),
    ],
)
def test_vectors_are_what_they_should_be(tmp_path: Path, films: Any, reports: Any, message: str) -> None:
    with writer(tmp_path) as out:
        with pytest.raises(LiteError, match=message):
            out.add([study(3), study(4)], films, reports)
        assert len(out) == 0


def test_an_index_of_something_else_is_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "index") as out:
        add(out, 0, 1)
    with pytest.raises(LiteError, match="an index by the artifact towers · expected others"):
        Index(tmp_path / "index", artifact_id="others")
    with (
        pytest.raises(LiteError, match="an index by the artifact towers · expected others"),
        writer(tmp_path / "index", "others"),
    ):
        pass
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.jsonl").write_text("{}\n")
    (tmp_path / "file").write_text("")
    for name in ("results", "file"):
        with pytest.raises(LiteError, match="something that is no index"), writer(tmp_path / name):
            pass
        with pytest.raises(LiteError, match="got no index"):
            Index(tmp_path / name)
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["results.jsonl"]


def test_an_empty_index_says_what_is_missing(tmp_path: Path) -> None:
    with writer(tmp_path) as out:
        with pytest.raises(LiteError, match="an index with no study · expected at least one"):
            Index(tmp_path).search(vectors(1), "films", top=3)
        out.add([study(0)], vectors(1))
    with pytest.raises(LiteError, match="an index with 1 studies, none with a report"):
        Index(tmp_path).search(vectors(1), "reports", top=3)
    with pytest.raises(LiteError, match=r"queries of shape \[1, 25\] · expected \[1, 24\]"):
        Index(tmp_path).search(vectors(1, dim=25), "films", top=3)


def shortened(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], object]] = {
    FILMS: shortened,
    REPORTS: shortened,
    STUDIES: shortened,
    ROWS: lambda file: file.write_bytes(file.read_bytes()[:32] + bytes(16) + file.read_bytes()[48:]),
    "index.json": lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"dim": 0})),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_index_is_not_searched_and_not_gone_on_with(tmp_path: Path, name: str) -> None:
    with writer(tmp_path) as out:
        add(out, 0, 5)
    DAMAGES[name](tmp_path / name)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(LiteError, match=f"{name}.*got a damaged index"):
        Index(tmp_path)
    with pytest.raises(LiteError, match="got a damaged index"), writer(tmp_path):
        pass
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "line", ["[]", '{"id":1,"image":"a"}', '{"id":"a","image":"a","report":null}', '{"id":"a"}', "x"]
)
def test_a_line_that_is_no_study_is_named(tmp_path: Path, line: str) -> None:
    with writer(tmp_path) as out:
        add(out, 0, 3)
    lines = (tmp_path / STUDIES).read_bytes().splitlines(keepends=True)
    lines[1] = line.encode().ljust(len(lines[1]) - 1) + b"\n"
    (tmp_path / STUDIES).write_bytes(b"".join(lines))
    assert Index(tmp_path)[0] == study(0)
    with pytest.raises(LiteError, match="study 2: got a damaged index"):
        Index(tmp_path)[1]


@pytest.mark.parametrize("version", [2, None, "1"])
def test_another_version_is_refused(tmp_path: Path, version: Any) -> None:
    with contextlib.suppress(LiteError), writer(tmp_path):
        pass
    header = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(header | {"format_version": version}))
    with pytest.raises(LiteError, match=f"format_version {version!r} · expected 1"):
        Index(tmp_path)
