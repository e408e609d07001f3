"""What a server withstands: what counts as lost, crossed and not refused, and the command from end to end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from benchmarks.hostile.material import Material
from benchmarks.phantom.write import write_studies
from benchmarks.serve import hostile
from benchmarks.serve.asking import ROUTES, Answer, ask, at_a_time
from benchmarks.serve.command import main
from benchmarks.serve.hostile import ending_of
from benchmarks.serve.kinds import KINDS, Target
from benchmarks.serve.load import _judge_texts, texts_of
from benchmarks.speed.harness import Report
from lite.artifact.open import Artifact
from lite.errors import LiteError
from lite.studies.sources.listed import read_studies
from lite.studies.study import Study

OK = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
CHUNK = 'data: {"id": 1, "choices": [{"delta": {"content": "The"}}]}\n\n'
PIECE = 'event: piece\ndata: {"text": "The"}\n\n'


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> list[Study]:
    return read_studies(write_studies(tmp_path_factory.mktemp("serve") / "studies", count=4, seed=1, dicom=True))


def target(port: int, studies: list[Study]) -> Target:
    listed = studies[0].path.parent.parent / "studies.json"
    return Target(port, Material(artifact=listed, adapted=listed, studies=listed, predictions=listed), "127.0.0.1:9")


def beside(answer: str | None, use: Callable[[int], Awaitable[object]]) -> object:
    """Use a server once that answers everything alike; None: not at all."""
    has_ended = asyncio.Event()

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            if answer is not None:
                writer.write(answer.encode())
                writer.write_eof()
            await reader.read(-1)
        writer.close()
        has_ended.set()

    async def run() -> object:
        async with await asyncio.start_server(answered, "127.0.0.1", 0, limit=1 << 24) as server:
            found = await use(server.sockets[0].getsockname()[1])
            await has_ended.wait()
            return found

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "kind", "ending"),
    [
        ("HTTP/1.1 404 Not Found\r\n\r\n", "base64", "4xx"),
        ("HTTP/1.1 404 Not Found\r\n\r\nHTTP/1.1 400 Bad\r\n\r\n", "base64", "4xx"),
        ("", "base64", "closed"),
        (OK, "film", "read"),
        (OK, "base64", r"got \[200\]"),
        ("HTTP/1.1 404 Not Found\r\n\r\nHTTP/1.1 500 Oh\r\n\r\n", "base64", r"got \[404, 500\]"),
        ("HTTP/1.1 307 Elsewhere\r\n\r\n", "path", r"got \[307\]"),
        (None, "base64", "neither answered nor closed"),
    ],
)
def test_what_is_neither_refused_nor_closed_is_told(
    answer: str | None, kind: str, ending: str, studies: list[Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    if answer is None:
        monkeypatch.setattr(hostile, "PATIENCE_S", 0.2)
    found = beside(answer, lambda port: ending_of(target(port, studies), kind, 0))
    assert re.match(ending, str(found)), found


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_an_input(kind: str, studies: list[Study]) -> None:
    to = target(9, studies)
    made = [KINDS[kind](to, random.Random(f"{kind}:{seed}")) for seed in (*range(5), *range(5))]
    assert made[:5] == made[5:]
    assert any(parts != made[0] for parts in made)


@pytest.mark.parametrize(
    ("stream", "end"),
    [
        (CHUNK + CHUNK + "data: [DONE]\n\n", "TheThe"),
        (PIECE + 'event: findings\ndata: {"prediction": "The"}\n\n', "The"),
        (CHUNK, "a stream that ends behind 'The'"),
        (PIECE + 'event: findings\ndata: {"prediction": "The heart"}\n\n', "a stream that ends behind 'The'"),
        (PIECE + 'data: {"error": {"message": "too late"}}\n\n', "too late"),
    ],
)
def test_a_text_is_whole_or_lost(stream: str, end: str, studies: list[Study]) -> None:
    async def use(port: int) -> str:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            try:
                return (await ask(client, ROUTES[0], studies[0])).text
            except LiteError as error:
                return str(error)

    assert end in str(beside(OK + stream, use))
    refused = str(beside("HTTP/1.1 429 Busy\r\nConnection: close\r\n\r\nlater", use))
    assert "429" in refused
    assert "later" in refused


def test_texts_that_were_lost_or_changed_places_are_counted(tiny_onnx_artifact: Artifact, studies: list[Study]) -> None:
    path = tiny_onnx_artifact.path
    answers: list[Answer | Exception] = [Answer(text, 1.0) for text in texts_of(path, studies)]
    for changed, wrong in (
        (answers, []),
        ([LiteError("gone"), *answers[1:]], ["1 of 4 lost [LiteError('gone')]; bar 0: missed"]),
        ([answers[1], answers[0], *answers[2:]], [f"2 crossed {[study.id for study in studies[:2]]}; bar 0: missed"]),
    ):
        report = Report(title="load")
        _judge_texts(report, path, studies, changed)
        assert report.wrong == wrong


def test_jobs_are_done_so_many_at_a_time() -> None:
    under_way, most = 0, 0

    async def job(number: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return number

    assert asyncio.run(at_a_time(3, [job(number) for number in range(9)])) == [*range(9)]
    assert most == 3


@pytest.mark.full
def test_the_command(tiny_onnx_artifact: Artifact, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    counts = {"studies": 8, "rounds": 1, "requests": 20, "hang-ups": 8, "hostile": len(KINDS), "clients": 6}
    options = [part for name, count in counts.items() for part in (f"--{name}", str(count))]
    main([str(tiny_onnx_artifact.path), *options, "--json", str(figures)])
    sections = json.loads(figures.read_text(encoding="utf-8"))["sections"]
    assert set(sections) == {"load", "memory", "hang-ups", "hostile", "start", "stop"}
    assert [section["why"] for section in sections.values()] == [None] * len(sections)
    wrong = [line for section in sections.values() for line in section["wrong"]]
    timed = ("throughput", "no row busy", "from process to ready", "away from what it held", "exit status 0 after")
    assert [line for line in wrong if not any(words in line for words in timed)] == []
