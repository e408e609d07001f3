"""Clients that go, and clients that mean harm: what is left of them afterwards is nothing."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import re
import socket
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx

from benchmarks.hostile.material import Material
from benchmarks.serve.asking import CHAT, ROUTES, Answer, ask_all, at_a_time, body_of
from benchmarks.serve.kinds import KEY, KINDS, MAX_BODY, MAY_BE_READ, Part, Target
from benchmarks.serve.running import PATIENCE_S, Running
from benchmarks.speed.harness import Report
from lite.memory.sizes import shown_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.studies.study import Study

MAX_IDLE_S: Final = 1.0
# Four films at a time of 80 million pixels, each in four bands, and once more while it is turned into another kind.
MAX_GROWTH_BYTES: Final = 4 * 80_000_000 * 4 * 2
WAYS: Final = ("while it sends", "while it waits", "in the prompt", "in the text")
ENDINGS: Final = ("4xx", "closed", "read")
_STATUS: Final = re.compile(rb"^HTTP/1\.[01] (\d{3}) ", re.MULTILINE)
_RESET: Final = struct.pack("ii", 1, 0)


def _texts(server: Running, studies: Sequence[Study]) -> list[str]:
    answers = asyncio.run(ask_all(server, studies, clients=1))
    return [answer.text if isinstance(answer, Answer) else f"{answer!r}" for answer in answers]


def measure_hang_ups(artifact: Path, studies: Sequence[Study], *, count: int, clients: int, seed: int) -> Report:
    """Let clients go at random points, and see how soon all rows are free and whether texts are still the same."""
    report = Report(title=f"{count} clients that hang up, {clients} at a time")
    rng = random.Random(f"hang-ups:{seed}")
    ways = [WAYS[number % len(WAYS)] for number in range(count)]
    with Running(artifact, "--max-queue", str(16 * count)) as server:
        before = _texts(server, studies)
        tokens = server.counts("tokens_total")[""]
        asyncio.run(at_a_time(clients, [hang_up(server, rng.choice(studies), way, rng) for way in ways]))
        seconds = server.idle_after_s()
        tokens = server.counts("tokens_total")[""] - tokens
        seen = server.counts("failures_total").get("client_gone", 0)
        after = _texts(server, studies)
    report.notes.append(f"{seen:.0f} were seen to go; {tokens:,.0f} tokens drafted for all")
    report.bar(f"no row busy {seconds:.2f} s after the last", f"{MAX_IDLE_S:g} s", is_met=seconds <= MAX_IDLE_S)
    report.bar(f"the same texts as before: {before == after}", "True", is_met=before == after)
    return report


async def hang_up(server: Running, study: Study, way: str, rng: random.Random) -> None:
    """Ask for a text, or for so many that a server which went on would be busy for long; and go in one of `WAYS`."""
    route = rng.choice(ROUTES)
    many = {"temperature": 2.0, "n": 16} if route == CHAT else {}
    request = httpx.Request("POST", server.url + route, **body_of(route, study, 256, **many))
    lines = [f"POST {route} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items()), "", ""]
    sent = "\r\n".join(lines).encode() + request.read()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        writer.write(sent[: rng.randrange(len(sent))] if way == "while it sends" else sent)
        await writer.drain()
        for _ in range({"in the prompt": 1, "in the text": rng.randrange(2, 9)}.get(way, 0)):
            await asyncio.wait_for(reader.readuntil(b"data: "), PATIENCE_S)
        await asyncio.sleep(rng.uniform(0, 0.2))
    if rng.random() < 0.5:  # as of a machine that is switched off; else it says good-bye
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()


def measure_hostile(artifact: Path, studies: Sequence[Study], *, count: int, clients: int, seed: int) -> Report:
    """Send requests of every kind in turns, and see that each is refused and the server is as it was."""
    report = Report(title=f"{count} hostile requests, {clients} at a time")
    inputs = [(kind, seed + number) for number in range(count) for kind in KINDS][:count]
    with tempfile.NamedTemporaryFile("w", encoding="ascii") as key:
        key.write(KEY)
        key.flush()
        with Running(artifact, "--api-key-file", key.name, "--max-body", str(MAX_BODY), key=KEY) as server:
            before, held = _texts(server, studies), server.memory()
            Path(f"/proc/{server.process.pid}/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
            endings, visits = asyncio.run(_attack(server, studies, inputs, clients))
            grown, seconds = server.memory("VmHWM") - held, server.idle_after_s()
            faults = [line for line in server.log.splitlines() if re.search(r'"(status": 5\d\d|fault)', line)]
            after = _texts(server, studies)
    counts = collections.Counter((kind, ending) for (kind, _), ending in zip(inputs, endings, strict=True))
    report.lines = [{"kind": kind, **{word: str(counts[kind, word]) for word in ENDINGS}} for kind in KINDS]
    wrong = [
        f"{kind}:{seed} {ending}" for (kind, seed), ending in zip(inputs, endings, strict=True) if ending not in ENDINGS
    ]
    report.figures |= {"failures": wrong}
    report.bar(f"{len(wrong)} neither refused nor closed: {wrong[:9]}", "0", is_met=not wrong)
    report.bar(f"{len(faults)} answers of 5xx in the server's own log: {faults[:9]}", "0", is_met=not faults)
    most = shown_bytes(MAX_GROWTH_BYTES)
    report.bar(
        f"at the most {shown_bytes(grown)} more than the {shown_bytes(held)} before",
        most,
        is_met=grown <= MAX_GROWTH_BYTES,
    )
    report.bar(f"{visits} visits where films were said to be", "0", is_met=not visits)
    report.bar(f"no row busy after {seconds:.2f} s", f"{MAX_IDLE_S:g} s", is_met=seconds <= MAX_IDLE_S)
    report.bar(f"the same texts as before: {before == after}", "True", is_met=before == after)
    return report


async def _attack(
    server: Running, studies: Sequence[Study], inputs: Sequence[tuple[str, int]], clients: int
) -> tuple[list[str], int]:
    """Send inputs by kind and seed; return how each has ended, and how often films were looked for."""
    visits = []

    def visited(_: object, writer: asyncio.StreamWriter) -> None:
        visits.append(writer)
        writer.close()

    async with await asyncio.start_server(visited, "127.0.0.1", 0) as decoy:
        listed = studies[0].path.parent.parent / "studies.json"
        material = Material(artifact=listed, adapted=listed, studies=listed, predictions=listed)
        target = Target(server.port, material, f"127.0.0.1:{decoy.sockets[0].getsockname()[1]}")
        return await at_a_time(clients, [ending_of(target, kind, seed) for kind, seed in inputs]), len(visits)


async def ending_of(target: Target, kind: str, seed: int) -> str:
    """Send an input, and return how it has ended: one of `ENDINGS`, or what is wrong."""
    try:
        answered = await asyncio.wait_for(
            exchange(target.port, KINDS[kind](target, random.Random(f"{kind}:{seed}"))), PATIENCE_S
        )
    except TimeoutError:
        return f"neither answered nor closed in {PATIENCE_S:g} s"
    statuses = [int(status) for status in _STATUS.findall(answered)]
    if all(status // 100 == 4 for status in statuses):
        return "4xx" if statuses else "closed"
    return "read" if kind in MAY_BE_READ and statuses == [200] else f"got {statuses}: {answered[-200:]!r}"


async def exchange(port: int, parts: Sequence[Part]) -> bytes:
    """Do what a client does, and return all that comes back until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answered = bytearray()

    async def read() -> None:
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(1 << 16):
                answered.extend(part)

    reading = asyncio.create_task(read())
    try:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                if isinstance(part, float):
                    await asyncio.wait({reading}, timeout=part)
                elif part is None:
                    writer.write_eof()
                else:
                    writer.write(part)
                    await writer.drain()
        await reading
    finally:
        reading.cancel()
        writer.transport.abort()
    return bytes(answered)
