"""A judge behind an OpenAI-compatible endpoint: asked once a pair of texts, patiently, within a budget.

    pair, vote ──► on disk already? ──► wait for a place ──► ask ──► six kinds twice? ──► on disk ──► median of votes
                                                              └── 429, 5xx, cut off, prose: again, 4 times in all

Nothing is sent unless an address is given, and to a machine other than this one only if its name is spelled out. The
file of answers holds hashes and counts, no text: a run that is interrupted asks for nothing twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import itertools
import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from lite.console import ProgressLine, default_interrupts
from lite.errors import BackendUnavailable, LiteError
from lite.eval.chexprompt import ERRORS, SEVERITIES, Counts, Prompt, parse_answer
from lite.files import check_writable, disk_errors_explained

ATTEMPTS: Final = 4
LONGEST_WAIT_S: Final = 600.0
OPTIONS: Final[Mapping[str, Any]] = MappingProxyType({"temperature": 0, "max_tokens": 512})
"""What is sent beside the messages unless other options are given."""
_AGAIN: Final = frozenset({408, 409, 425, 429})
_FORMAT: Final = re.compile(r"response_format|json_schema|json_object|grammar", re.IGNORECASE)
_CHARACTERS_A_TOKEN: Final = 4
_ANSWER_TOKENS: Final = 120  # of our JSON object


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions:
    """Whom to ask, and how."""

    url: str
    model: str
    key: str = ""
    send_reports_to: str | None = None  # the host's name, where it is not this machine
    prompt: Prompt
    options: Mapping[str, Any] = field(default_factory=dict)  # of each request; None leaves one of OPTIONS out
    votes: int = 1
    concurrency: int = 4
    max_requests: int | None = None
    timeout_s: float = 120.0
    backoff_s: float = 1.0  # before the second attempt; twice as long before each further one
    cache: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what would send reports where nobody has said that they may go."""
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or "\\" in self.url:
            msg = f"got --judge-url {self.url} · expected an address such as http://127.0.0.1:8080/v1 · correct it"
            raise LiteError(msg)
        if self.votes % 2 == 0:
            msg = f"got {self.votes} votes · expected an odd number, of which there is a median · give one more"
            raise LiteError(msg)
        if not self.is_local and (self.send_reports_to or "").lower() != host:
            msg = (
                f"got the judge {host}, which is not this machine · expected that reports may be sent there · if your "
                f"data's terms allow it, add --send-reports-to {host}"
            )
            raise LiteError(msg)

    @property
    def is_local(self) -> bool:
        """Whether the address is this very machine's."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def sent_options(self) -> dict[str, Any]:
        """What is sent beside the messages."""
        return {name: value for name, value in {**OPTIONS, **self.options}.items() if value is not None}

    @property
    def label(self) -> str:
        """What each score has to be called: scores of another prompt, judge or temperature are others."""
        options = ", ".join(f"{name} {value}" for name, value in self.sent_options.items())
        votes = f", median of {self.votes} votes" if self.votes > 1 else ""
        prompt = f"{self.prompt.name} (sha256 {self.prompt.sha256[:12]})"
        return f"CheXprompt's kinds by {self.model} at {urlsplit(self.url).netloc}, {prompt}, {options}{votes}"


class Cost(NamedTuple):
    """What judging would take."""

    requests: int  # that no answer is on disk for
    cached: int
    input_tokens: int  # estimated, at 4 characters a token
    output_tokens: int


class _Ask(NamedTuple):
    key: str
    reference: str
    candidate: str


class _Unscored(Exception):  # noqa: N818 - never leaves this module
    """Why there is no answer to a question."""


@dataclass(slots=True)
class Judge:
    """Asks, remembers and counts. `unscored` says after `judge` why reports have no score."""

    options: JudgeOptions
    unscored: Counter[str] = field(default_factory=Counter)
    num_requests: int = 0
    _answers: dict[str, Counts] = field(default_factory=dict)
    _not_before: float = 0.0  # where the endpoint has asked for patience
    _formats: list[dict[str, Any]] = field(default_factory=list)  # to ask for, the best first

    def __post_init__(self) -> None:
        """Read what has been answered before."""
        self._formats = self.options.prompt.formats
        if self.options.cache is not None:
            check_writable(self.options.cache)
            self._answers = dict(_read_cache(self.options.cache))

    def cost(self, references: Sequence[str], predictions: Sequence[str]) -> Cost:
        """Say what `judge` would ask for; ask nothing."""
        asks = self._asks(references, predictions)
        new = [ask for ask in asks if ask.key not in self._answers]
        prompts = [self.options.prompt.messages(ask.reference, ask.candidate) for ask in new]
        characters = sum(len(message["content"]) for messages in prompts for message in messages)
        return Cost(len(new), len(asks) - len(new), -(-characters // _CHARACTERS_A_TOKEN), _ANSWER_TOKENS * len(new))

    def judge(self, references: Sequence[str], predictions: Sequence[str]) -> list[Counts | None]:
        """Count the errors of each prediction: the median of the votes, or None where a vote cannot be had.

        Raises:
            LiteError: the endpoint refuses all requests (such as a wrong key or model).
            BackendUnavailable: the openai package is not installed.
        """
        asks = [ask for ask in self._asks(references, predictions) if ask.key not in self._answers]
        reasons: dict[str, str] = {}
        if asks:
            try:
                with default_interrupts():
                    asyncio.run(self._ask_all(asks, reasons))
            except* LiteError as refusals:
                raise refusals.exceptions[0] from None
        found: list[Counts | None] = []
        for pair in zip(references, predictions, strict=True):
            keys = [self._key(*pair, vote) for vote in range(self.options.votes)]
            lacking = [reasons[key] for key in keys if key not in self._answers]
            self.unscored.update(lacking[:1])
            found.append(None if lacking else _median([self._answers[key] for key in keys]))
        return found

    def _asks(self, references: Sequence[str], predictions: Sequence[str]) -> list[_Ask]:
        """Return every question once, however many studies have the same texts."""
        asks = [
            _Ask(self._key(reference, candidate, vote), reference, candidate)
            for reference, candidate in zip(references, predictions, strict=True)
            for vote in range(self.options.votes)
        ]
        return list({ask.key: ask for ask in asks}.values())

    def _key(self, reference: str, candidate: str, vote: int) -> str:
        options = self.options
        asked = options.url, options.model, options.sent_options, options.prompt.sha256, reference, candidate, vote
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    async def _ask_all(self, asks: Sequence[_Ask], reasons: dict[str, str]) -> None:
        """Ask what has not been answered; put down why questions have no answer."""
        waiting, done = iter(asks), itertools.count(1)
        progress = ProgressLine("judging", len(asks))
        # Answers are kept as they come: whatever ends this, Ctrl-C too, they are on disk.
        async with _client(self.options) as client, asyncio.TaskGroup() as group:

            async def work() -> None:
                for ask in waiting:
                    try:
                        self._remember(ask.key, await self._ask(client, ask))
                    except _Unscored as reason:
                        reasons[ask.key] = str(reason)
                    progress.show(next(done))

            for _ in range(self.options.concurrency):
                group.create_task(work())

    async def _ask(self, client: Any, ask: _Ask) -> Counts:  # noqa: ANN401 - openai's client
        """Ask until there is an answer.

        Raises:
            _Unscored: there is none.
            LiteError: there will be none for anybody.
        """
        reason = ""
        for attempt in range(ATTEMPTS):
            await asyncio.sleep(self.options.backoff_s * 2 ** (attempt - 1) if attempt else 0.0)
            while (left := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(left)
            if self.num_requests == self.options.max_requests:
                raise _Unscored(f"not asked, as {self.options.max_requests} requests were allowed")
            self.num_requests += 1
            counts, reason = await self._attempt(client, ask)
            if counts is not None:
                return counts
        raise _Unscored(reason)

    async def _attempt(self, client: Any, ask: _Ask) -> tuple[Counts | None, str]:  # noqa: ANN401
        """Ask once; return the answer, or why there is none yet."""
        import openai

        form = self._formats[0] if self._formats else None
        try:
            reply = await client.chat.completions.create(
                model=self.options.model,
                messages=self.options.prompt.messages(ask.reference, ask.candidate),
                extra_body=self.options.sent_options | ({"response_format": form} if form else {}),
            )
            content = reply.choices[0].message.content
        except openai.APIStatusError as error:
            if form and _FORMAT.search(str(error)):  # one it does not know: llama-cpp-python's server says so by a 500
                self._formats = [other for other in self._formats if other != form]
                return None, f"status {error.status_code} to each format"
            return None, self._refused(error)
        except openai.APIConnectionError:
            return None, "no connection, or one that was cut"
        except (openai.OpenAIError, AttributeError, LookupError, TypeError, ValueError):
            return None, "an answer that is none of the API's"
        return parse_answer(content) if isinstance(content, str) else None, "an answer without all counts"

    def _refused(self, error: Any) -> str:  # noqa: ANN401 - openai's error
        """Say what a status means for one question, and how long all have to wait.

        Raises:
            _Unscored: asking again would not help.
            LiteError: nor for any other question.
        """
        status: int = error.status_code
        if status in (400, 422):
            raise _Unscored(f"refused with status {status}")
        if status in _AGAIN or status >= 500:
            wait = _retry_after(error.response.headers.get("retry-after"))
            if wait > LONGEST_WAIT_S:
                raise _Unscored(f"asked to wait longer than {LONGEST_WAIT_S:.0f} s")
            self._not_before = max(self._not_before, time.monotonic() + wait)
        else:
            msg = (
                f"got {' '.join(str(error).split())[:200]} from {self.options.url} · expected an OpenAI-compatible "
                f"endpoint that knows the key and the model {self.options.model} · check --judge-url, --judge-model "
                "and --judge-key-file"
            )
            raise LiteError(msg)
        return f"status {status}"

    def _remember(self, key: str, counts: Counts) -> None:
        self._answers[key] = counts
        if self.options.cache is None:
            return
        with disk_errors_explained(self.options.cache), self.options.cache.open("ab+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")  # a run was killed while it wrote
            line = json.dumps({"key": key, "counts": counts})
            file.write(f"\n{line}\n".encode() if torn else f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())


def _read_cache(path: Path) -> Iterator[tuple[str, Counts]]:
    """Yield what was answered; a line that was cut off is passed over."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
            halves = [tuple(map(int, half)) for half in value["counts"]]
            key = str(value["key"])
        except (ValueError, TypeError, LookupError):
            continue
        if len(halves) == len(SEVERITIES) and {len(half) for half in halves} == {len(ERRORS)}:
            yield key, (halves[0], halves[1])


def _median(votes: Sequence[Counts]) -> Counts:
    halves = [
        tuple(int(statistics.median(vote[half][kind] for vote in votes)) for kind in range(len(ERRORS)))
        for half in range(len(SEVERITIES))
    ]
    return halves[0], halves[1]


def _retry_after(header: str | None) -> float:
    """Read Retry-After: seconds, or a date."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def _client(options: JudgeOptions) -> Any:  # noqa: ANN401 - openai's client
    try:
        import openai
    except ImportError as error:
        msg = f'got no openai package ({error}) · a judge is asked by it · pip install "llava-rad-lite[judge]"'
        raise BackendUnavailable(msg) from error
    # A proxy from the environment, or a redirect, would take reports to where nobody has said that they may go.
    http = openai.DefaultAsyncHttpxClient(trust_env=not options.is_local, follow_redirects=False)
    return openai.AsyncOpenAI(
        base_url=options.url,
        api_key=options.key or "none",
        organization="",
        project="",
        max_retries=0,
        timeout=options.timeout_s,
        http_client=http,
    )
