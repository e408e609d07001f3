"""A judge behind an endpoint: every way in which an answer can fail, what is paid for once, and what is never sent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import Server, Step, counts, cut, refuse, say, send, serving
from repository import ROOT

from lite.__main__ import main
from lite.errors import LiteError
from lite.eval.chexprompt import ERRORS, SEVERITIES, error_sums, parse_answer, read_prompt
from lite.eval.judge import ATTEMPTS, Judge, JudgeOptions

pytest.importorskip("openai")
NONE = ((0,) * 6, (0,) * 6)
TEXTS = ["Small left pleural effusion.", "The lungs are clear.", "Mild cardiomegaly."]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def judge(server: Server, **options: Any) -> Judge:
    given: dict[str, Any] = {
        "url": server.url,
        "model": "m",
        "prompt": read_prompt(),
        "backoff_s": 0.0,
        "concurrency": 1,
    }
    return Judge(JudgeOptions(**given | options))


def omissions(significant: int, insignificant: int = 0) -> tuple[tuple[int, ...], ...]:
    return ((0, significant, 0, 0, 0, 0), (0, insignificant, 0, 0, 0, 0))


def test_a_pair_is_asked_and_counted(server: Server) -> None:
    server.default = say(counts(2, 1))
    asked = judge(server, key="secret")
    assert asked.judge(["Reference {candidate}."], ["Candidate."]) == [omissions(2, 1)]
    (request,) = server.requests
    system, user = request["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert "Reference: Reference {candidate}.\nCandidate: Candidate.\n" in user["content"]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0, 512)
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["required"] == list(SEVERITIES)
    assert schema["properties"][SEVERITIES[0]]["required"] == list(ERRORS)
    assert {name.lower(): value for name, value in server.headers[0].items()}["authorization"] == "Bearer secret"


def changed(**values: object) -> dict[str, object]:
    answer: dict[str, Any] = counts()
    answer[SEVERITIES[1]] |= values
    return answer


def without(kind: str) -> dict[str, object]:
    answer = counts()
    del answer[SEVERITIES[0]][kind]
    return answer


LETTERS = ", ".join(f"({letter}, {number})" for number, letter in enumerate("ABCDEF"))
LINES = f"Number of clinically {{}}significant errors by type: [{LETTERS}]"
WRONG: dict[str, object] = {
    "prose": "There are two errors.",
    "nothing": "",
    "null": "null",
    "half": {SEVERITIES[0]: counts()[SEVERITIES[0]]},
    "five kinds": without("incorrect_severity"),
    "a seventh": changed(other=0),
    "a bool": changed(omission_finding=True),
    "a float": changed(omission_finding=1.0),
    "below 0": changed(omission_finding=-1),
    "text": changed(omission_finding="1"),
    "twice": json.dumps(counts()).replace('"omission_finding": 0', '"omission_finding": 0, "omission_finding": 0'),
    "prose around": f"Here: {json.dumps(counts())}",
    "one line": LINES.format(""),
    "one line twice": f"{LINES.format('')}\n{LINES.format('')}",
    "five letters": f"{LINES.format('')}\n{LINES.format('in')}".replace("(F, 5)", ""),
    "a negative letter": f"{LINES.format('')}\n{LINES.format('in')}".replace("(F, 5)", "(F, -5)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_six_kinds_twice_is_no_answer(name: str) -> None:
    text = WRONG[name]
    assert parse_answer(text if isinstance(text, str) else json.dumps(text)) is None


def test_answers_in_a_fence_and_in_the_published_form_are_read() -> None:
    assert parse_answer(f"```json\n{json.dumps(counts(3))}\n```") == omissions(3)
    in_order = (0, 1, 2, 3, 4, 5)
    assert parse_answer(f"{LINES.format('')}\n\n{LINES.format('in')}") == (in_order, in_order)
    swapped = LINES.format("in") + "\n" + LINES.format("").replace("(A, 0)", "(A, 9)")
    assert parse_answer(swapped) == ((9, *in_order[1:]), in_order)


FAILURES: dict[str, Step] = {
    "429": refuse(429),
    "500": refuse(500),
    "503": refuse(503),
    "cut": cut,
    "HTML": send("<html>busy</html>", kind="text/html"),
    "no JSON": send("{"),
    "no choices": send("{}"),
    "empty": say(None),
    **{name: say(WRONG[name]) for name in ("prose", "half", "a bool", "a float", "below 0")},
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_asked_again_and_then_never_0(server: Server, name: str) -> None:
    server.script = [FAILURES[name]]
    server.default = say(counts(1))
    asked = judge(server)
    assert asked.judge(TEXTS[:1], TEXTS[1:2]) == [omissions(1)]
    assert asked.num_requests == len(server.requests) == 2
    server.default = FAILURES[name]
    hopeless = judge(server)
    assert hopeless.judge(TEXTS[:1], TEXTS[1:2]) == [None]
    assert hopeless.num_requests == ATTEMPTS
    assert sum(hopeless.unscored.values()) == 1


def test_unscored_reports_are_counted_and_in_no_mean() -> None:
    figures = {name: sums.estimate() for name, sums in error_sums([omissions(2, 1), None, NONE]).items()}  # type: ignore[list-item]
    assert (figures["errors"].value, figures["errors"].count) == (1.5, 2)
    assert figures["significant errors"].value == figures["significant omission_finding"].value == 1.0
    assert figures["insignificant omission_finding"].value == 0.5
    assert figures["reports without errors"].value == 0.5
    assert figures["reports unscored"].value == pytest.approx(1 / 3)
    nothing = {name: sums.estimate().value for name, sums in error_sums([None]).items()}
    assert nothing.pop("reports unscored") == 1.0
    assert all(value != value for value in nothing.values())


def test_retry_after_holds_everybody(server: Server) -> None:
    server.script = [refuse(429, Retry_After="1")]
    assert judge(server).judge(TEXTS[:2], TEXTS[:2]) == [NONE, NONE]
    assert server.times[1] - server.times[0] >= 1.0
    server.default = refuse(429, Retry_After="9999")
    asked = judge(server)
    assert asked.judge(TEXTS[:1], TEXTS[:1]) == [None]
    assert asked.num_requests == 1
    assert "asked to wait longer" in next(iter(asked.unscored))


@pytest.mark.parametrize("status", [400, 422, 500])
def test_an_endpoint_that_refuses_the_schema_is_asked_for_it_otherwise_and_without(server: Server, status: int) -> None:
    """As llama-cpp-python's server does, with a 500."""
    server.script = [refuse(status, "Input should be 'text' or 'json_object' ('body', 'response_format', 'type')")]
    assert judge(server).judge(TEXTS, TEXTS[::-1]) == [NONE] * 3
    formats = [request.get("response_format", {}).get("type") for request in server.requests]
    assert formats == ["json_schema", *["json_object"] * 3]
    assert server.requests[1]["response_format"]["schema"]["required"] == list(SEVERITIES)
    server.requests.clear()
    server.script = [refuse(status, "unknown field json_schema"), refuse(status, "Invalid grammar")]
    assert judge(server).judge(TEXTS[:1], TEXTS[:1]) == [NONE]
    assert ["response_format" in request for request in server.requests] == [True, True, False]


@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_for_another_reason_leaves_the_schema_on(server: Server, status: int) -> None:
    server.script = [refuse(status, "this text is too long for the context")]
    asked = judge(server)
    assert asked.judge(TEXTS, TEXTS[::-1]) == [None, NONE, NONE]
    assert dict(asked.unscored) == {f"refused with status {status}": 1}
    assert [request["response_format"]["type"] for request in server.requests] == ["json_schema"] * 3


@pytest.mark.parametrize("status", [401, 404])
def test_a_key_or_a_model_that_is_not_known_ends_it(server: Server, status: int) -> None:
    server.default = refuse(status)
    with pytest.raises(
        LiteError, match=rf"scripted {status}.* · check --judge-url, --judge-model and --judge-key-file"
    ):
        judge(server, concurrency=2).judge(TEXTS, TEXTS)


def test_votes_are_taken_kind_by_kind_and_their_median_counts(server: Server) -> None:
    server.script = [say(counts(0, 3)), say(counts(5, 2)), say(counts(1, 1))]
    assert judge(server, votes=3).judge(TEXTS[:1], TEXTS[1:2]) == [omissions(1, 2)]
    server.script = [say(counts(1)), say(counts(1)), *[refuse(500)] * ATTEMPTS]
    assert judge(server, votes=3).judge(TEXTS[:1], TEXTS[1:2]) == [None]
    with pytest.raises(LiteError, match="got 2 votes · expected an odd number"):
        judge(server, votes=2)


def test_requests_go_out_together(server: Server) -> None:
    """Two meet at the server before either is answered."""
    meeting = threading.Barrier(2, timeout=60)

    def meet(handler: Any) -> None:
        meeting.wait()
        say(counts(1))(handler)

    server.default = meet
    assert judge(server, concurrency=2).judge(TEXTS[:2], TEXTS[1:]) == [omissions(1)] * 2


# -- What is paid for ------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice(server: Server, tmp_path: Path) -> None:
    server.default = say(counts(1))
    cache = tmp_path / "judged.jsonl"
    first = judge(server, cache=cache, max_requests=2)
    assert first.judge(TEXTS, TEXTS) == [omissions(1)] * 2 + [None]
    assert dict(first.unscored) == {"not asked, as 2 requests were allowed": 1}
    with cache.open("ab") as file:
        file.write(b'{"key": "torn')
    again = judge(server, cache=cache)
    assert (again.cost(TEXTS, TEXTS).requests, again.cost(TEXTS, TEXTS).cached) == (1, 2)
    assert again.judge(TEXTS, TEXTS) == [omissions(1)] * 3
    assert judge(server, cache=cache).judge(TEXTS, TEXTS) == [omissions(1)] * 3
    assert len(server.requests) == 3
    assert all(text not in cache.read_text(encoding="utf-8") for text in TEXTS)
    others: list[dict[str, Any]] = [{"model": "n"}, {"votes": 3}, {"options": {"temperature": 1}}]
    others.append({"url": server.url.replace("127.0.0.1", "localhost")})
    for other in others:
        assert judge(server, cache=cache, **other).cost(TEXTS, TEXTS).requests >= 3, other
    assert judge(server, cache=cache).cost(TEXTS[:1], TEXTS[1:2]).requests == 1
    assert judge(server).judge([TEXTS[0]] * 5, [TEXTS[1]] * 5) == [omissions(1)] * 5  # five studies, one question
    assert len(server.requests) == 4


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    rows = [{"id": str(i), "reference": text, "prediction": "Heart size is normal."} for i, text in enumerate(TEXTS)]
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def command(server: Server, predictions: Path, *more: str) -> list[str]:
    asked = ["--judge-url", server.url, "--judge-model", "m", "--concurrency", "1"]
    return ["score", str(predictions), "--metrics", "chexprompt", *asked, *more]


def test_an_interrupted_run_goes_on_where_it_was(server: Server, predictions: Path) -> None:
    stalled, go_on = threading.Event(), threading.Event()

    def stall(_: Any) -> None:
        stalled.set()
        go_on.wait(60)

    server.script = [say(counts(1)), say(counts(1)), stall]
    words = [sys.executable, "-m", "lite", *command(server, predictions)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert stalled.wait(240)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    go_on.set()
    assert (process.returncode, said.strip()) == (130, "interrupted")
    assert main(command(server, predictions)) == 0
    assert len(server.requests) == 4


def test_the_command_labels_its_scores(
    server: Server, predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.default = say(counts(2, 1))
    server.script = [say(counts()), *[say("no")] * ATTEMPTS]
    assert main(command(server, predictions, "--json", str(tmp_path / "s.json"), "--judge-option", "seed=7")) == 0
    out = capsys.readouterr().out
    assert "| chexprompt: errors" in out
    assert "| 0.667 – 1.000 |" not in out
    scores = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert (scores["figures"]["chexprompt: errors"]["value"], scores["spreads"]["chexprompt: errors"]) == (1.5, 2.12132)
    label = f"m at 127.0.0.1:{server.port}, own prompt (sha256 {read_prompt().sha256[:12]}), temperature 0"
    assert label in scores["notes"][0]
    assert scores["notes"][1].startswith("Unscored reports, in no mean (1: an answer without all counts)")
    assert server.requests[0]["seed"] == 7


def test_a_dry_run_says_what_it_would_cost_and_sends_nothing(
    server: Server, predictions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(server, predictions, "--dry-run", "--price", "1000000,0", "--votes", "3")) == 0
    out = capsys.readouterr().out
    characters = sum(len(m["content"]) for text in TEXTS for m in read_prompt().messages(text, "Heart size is normal."))
    tokens = -(-3 * characters // 4)
    assert f"9 requests (0 answers are there already), about {tokens:,} tokens in" in out
    assert f"out: {tokens:.2f}. Nothing was sent." in out
    assert server.requests == []


def test_another_prompt_is_another_score(server: Server, predictions: Path, tmp_path: Path) -> None:
    file = tmp_path / "published.txt"
    file.write_text("Count.\n---\nR: {reference}\nC: {candidate}\nErrors:", encoding="utf-8")
    server.default = say(f"{LINES.format('')}\n{LINES.format('in')}")
    options = command(server, predictions, "--prompt-file", str(file), "--judge-option", "max_tokens=null")
    assert main(options) == 0
    assert server.requests[0]["messages"] == [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": f"R: {TEXTS[0]}\nC: Heart size is normal.\nErrors:"},
    ]
    assert not {"response_format", "max_tokens"} & server.requests[0].keys()
    assert read_prompt(file).sha256 != read_prompt().sha256
    file.write_text("Only {reference}", encoding="utf-8")
    with pytest.raises(LiteError, match=r"got no \{candidate\}"):
        read_prompt(file)


# -- What is never sent ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://api.example.org/v1", "http://localhost.example.org/v1", "http://10.0.0.7:8080/v1",
        "http://127.0.0.1.example.org", "http://0.0.0.0:1/v1",
    ],
)  # fmt: skip
def test_reports_go_to_no_machine_that_is_not_named(url: str) -> None:
    host = url.split("/")[2].split(":", maxsplit=1)[0]
    options: dict[str, Any] = {"url": url, "model": "m", "prompt": read_prompt()}
    for wrong in (None, "", "example.org", "api"):
        with pytest.raises(LiteError, match=f"add --send-reports-to {host}"):
            JudgeOptions(**options, send_reports_to=wrong)
    assert not JudgeOptions(**options, send_reports_to=host.upper()).is_local


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "http://localhost@example.org/", "http://a\\@localhost/", "no"])
def test_no_address_hides_another(url: str) -> None:
    with pytest.raises(LiteError, match="got --judge-url"):
        JudgeOptions(url=url, model="m", prompt=read_prompt(), send_reports_to="example.org")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.8.8.8"])
def test_this_machine_needs_no_leave(host: str) -> None:
    assert JudgeOptions(url=f"http://{host}:8080/v1", model="m", prompt=read_prompt()).is_local


def test_neither_a_redirect_nor_a_proxy_takes_reports_elsewhere(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as elsewhere:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setitem(os.environ, name, elsewhere.url)
        monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
        server.script = [say(counts())]
        server.default = refuse(307, Location=f"{elsewhere.url}/chat/completions")
        assert judge(server).judge(TEXTS[:1], TEXTS[:1]) == [NONE]
        assert "of the environment" not in str(server.headers)
        with pytest.raises(LiteError):
            judge(server).judge(TEXTS[:1], TEXTS[1:2])
        assert elsewhere.requests == []
