"""OpenAI's chat completions over HTTP: how a request is understood, and what an answer and a stream look like."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from made_films import dicom
from made_films import film as stored_film
from serving import Gate, Served, events, png, serving, wait_until

from lite.artifact.open import Artifact
from lite.loading import load
from lite.serve.protocol import read_chat
from lite.serve.refusal import Refusal
from lite.serve.stops import Choice
from lite.session.request import Token

CHAT = "/v1/chat/completions"
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png()).decode()}"}}


@pytest.fixture(scope="module")
def served(tiny_onnx_artifact: Artifact) -> Iterator[Served]:
    with serving(lambda: load(tiny_onnx_artifact.path, device="cpu", rows=4)) as served:
        yield served


def user(text: str | None = None, *parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*([{"type": "text", "text": text}] if text is not None else []), *parts]}


def answer(served: Served, *messages: Any, **fields: Any) -> dict[str, Any]:
    body = {"messages": messages or [user(None, IMAGE)], "max_tokens": 20} | fields
    response = served.client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    value: dict[str, Any] = response.json()
    return value


def bytes_of(told: list[dict[str, Any]]) -> bytes:
    return b"".join(bytes(token["bytes"]) for token in told)


# -- What is asked -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        (None, {}, (None, None)),
        ("  \n", {}, (None, None)),
        ("Reason for the exam: Cough.", {}, ("Cough.", None)),
        ("reason for exam : Cough.", {}, ("Cough.", None)),
        ("Indication:\nCough.\nFever.", {}, ("Cough.\nFever.", None)),
        ("CLINICAL HISTORY: fall", {}, ("fall", None)),
        ("Reason:", {}, (None, None)),
        ("Describe the findings.", {}, (None, "Describe the findings.")),
        ("What is the reason: cough?", {}, (None, "What is the reason: cough?")),
        ("Describe the findings.", {"reason": "Cough."}, ("Cough.", None)),
        ("Reason: Cough.", {"query": "Is there an effusion?"}, (None, "Is there an effusion?")),
    ],
)
def test_a_text_is_a_reason_where_it_says_so_and_else_the_question(
    served: Served, text: str | None, fields: dict[str, Any], expected: tuple[str | None, str | None]
) -> None:
    chat = read_chat({"messages": [user(text, IMAGE)]} | fields, models=("m",), max_drafts=2)
    assert (chat.reason, chat.query) == expected
    value = answer(served, user(text, IMAGE), **fields)
    assert (
        value["choices"][0]["message"]["content"]
        == served.model.findings(png(), expected[0], query=expected[1], max_new_tokens=20).text
    )
    asked = "query" if expected[1] else "reason" if expected[0] else "question"
    assert value["llava_rad_lite"]["asked"] == asked
    assert len(value["llava_rad_lite"]["left_out"]) == bool(fields)


def test_system_messages_are_left_out_and_said_to_be(served: Served) -> None:
    plain = answer(served)
    value = answer(served, {"role": "system", "content": "Be brief."}, user(None, IMAGE))
    assert value["choices"] == plain["choices"]
    assert value["llava_rad_lite"]["left_out"] == ["a system message: the model has no place for one"]
    assert plain["llava_rad_lite"]["left_out"] == []


def test_text_and_film_may_be_two_messages_and_a_film_a_file(served: Served) -> None:
    pytest.importorskip("pydicom")
    together = answer(served, user("Reason: cough.", IMAGE))["choices"]
    assert answer(served, {"role": "user", "content": "Reason: cough."}, user(None, IMAGE))["choices"] == together
    film = dicom(stored_film(60, 50))
    data = f"data:application/dicom;base64,{base64.b64encode(film).decode()}"
    expected = served.model.findings(film, max_new_tokens=20).text
    for part in (
        {"type": "image_url", "image_url": {"url": data, "detail": "high"}},
        {"type": "image_url", "image_url": data.replace("application/dicom", "text/plain")},
        {"type": "file", "file": {"file_data": data, "filename": "film.dcm"}},
    ):
        value = answer(served, user(None, part), user="me", tools=None, metadata={"a": "b"})
        assert value["choices"][0]["message"]["content"] == expected
        assert value["llava_rad_lite"]["rendering"] == "mimic-cxr-jpg"


@pytest.mark.parametrize(
    ("fields", "code", "status"),
    [
        ({"messages": [{"role": "user", "content": "Write a title."}]}, "image_missing", 400),
        ({"messages": [user("Tags?")]}, "image_missing", 400),
        ({"messages": [user(None, IMAGE, IMAGE)]}, "image_count", 400),
        ({"messages": [user(None, IMAGE), {"role": "assistant", "content": "x"}, user("?")]}, "earlier_turns", 400),
        ({"messages": []}, "value", 400),
        ({"messages": "film"}, "value", 400),
        ({"messages": [None]}, "value", 400),
        ({"messages": [user(None, {"type": "input_audio", "input_audio": {}}, IMAGE)]}, "value", 400),
        ({"messages": [{"role": "user", "content": 5}]}, "value", 400),
        ({"messages": [user(None, {"type": "image_url", "image_url": {"url": "http://a.b/c"}})]}, "image_url", 400),
        ({"messages": [user(None, {"type": "image_url", "image_url": {"url": "file:///c"}})]}, "image_url", 400),
        ({"messages": [user("USER: hello", IMAGE)]}, "prompt", 400),
        ({"reason": "a", "query": "b"}, "prompt", 400),
        ({"reason": 7}, "value", 400),
        ({"model": "gpt-4o"}, "model_not_found", 404),
        ({"n": 0}, "value", 400),
        ({"n": 17}, "value", 400),
        ({"n": True}, "value", 400),
        ({"temperature": -1}, "value", 400),
        ({"temperature": "hot"}, "value", 400),
        ({"top_p": 2}, "value", 400),
        ({"seed": 1.5}, "value", 400),
        ({"max_tokens": 0}, "value", 400),
        ({"top_logprobs": 3}, "value", 400),
        ({"logprobs": True, "top_logprobs": 21}, "value", 400),
        ({"stop": ["a", "b", "c", "d", "e"]}, "value", 400),
        ({"stop": ""}, "value", 400),
        ({"stop": {"a": 1}}, "value", 400),
        ({"stream": "yes"}, "value", 400),
        ({"stream_options": []}, "value", 400),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(
    served: Served, fields: dict[str, Any], code: str, status: int
) -> None:
    response = served.client.post(CHAT, json={"messages": [user(None, IMAGE)]} | fields)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert " · expected " in response.json()["error"]["message"]


# -- What is answered --------------------------------------------------------------------------------------------------


def test_an_answer_is_a_completion_with_usage(served: Served) -> None:
    first = answer(served, user("Reason: first.", IMAGE), max_completion_tokens=7, max_tokens=3)
    assert (first["object"], first["model"]) == ("chat.completion", served.model.artifact.manifest.model)
    (choice,) = first["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "length", "assistant")
    assert choice["logprobs"] is None
    usage = first["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (7, usage["prompt_tokens"] + 7)
    second = answer(served, user("Reason: second.", IMAGE))
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 4
    about = first["llava_rad_lite"]
    assert (about["artifact_id"], about["notice"]) == (
        served.model.artifact.id,
        "Research draft, not for clinical use.",
    )


def test_a_stream_has_the_role_once_an_empty_end_and_the_same_text(served: Served) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "stop": ["zzz"], "max_tokens": 40}
    whole = answer(served, **fields)
    body = {"messages": [user(None, IMAGE)], "stream": True, "stream_options": {"include_usage": True}} | fields
    *chunks, usage, (_, done) = events(served.client.post(CHAT, json=body).text)
    assert done == "[DONE]"
    assert {chunk["object"] for _, chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for _, chunk in chunks}) == 1
    assert all(chunk["usage"] is None for _, chunk in chunks)
    (first, *inner, last) = [chunk["choices"][0] for _, chunk in chunks]
    assert (first["delta"], first["finish_reason"]) == ({"role": "assistant", "content": ""}, None)
    assert all(list(choice["delta"]) == ["content"] and choice["finish_reason"] is None for choice in inner)
    assert (last["delta"], last["finish_reason"]) == ({}, whole["choices"][0]["finish_reason"])
    assert chunks[-1][1]["llava_rad_lite"] == whole["llava_rad_lite"]
    assert "".join(choice["delta"]["content"] for choice in inner) == whole["choices"][0]["message"]["content"]
    told = [token for choice in inner if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert told == whole["choices"][0]["logprobs"]["content"]
    assert (usage[1]["choices"], usage[1]["usage"]["completion_tokens"]) == ([], whole["usage"]["completion_tokens"])


def test_logprobs_tell_each_token_and_its_bytes(served: Served) -> None:
    expected = served.model.findings(png(), max_new_tokens=20, top_logprobs=3)
    (choice,) = answer(served, logprobs=True, top_logprobs=3)["choices"]
    told = choice["logprobs"]["content"]
    assert [token["logprob"] for token in told] == list(expected.token_logprobs or ())
    assert bytes_of(told).decode(errors="replace").strip() == expected.text
    assert [[other["logprob"] for other in token["top_logprobs"]] for token in told] == [
        [logprob for _, logprob in top] for top in expected.top_logprobs or ()
    ]
    assert {len(token["top_logprobs"]) for token in told} == {3}


def test_drafts_are_drawn_each_with_its_seed_and_again(served: Served) -> None:
    drawn = {"temperature": 1.3, "top_p": 0.9, "max_tokens": 12}
    value = answer(served, n=3, seed=5, **drawn)
    texts = [choice["message"]["content"] for choice in value["choices"]]
    assert [choice["index"] for choice in value["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[2] == answer(served, seed=7, **drawn)["choices"][0]["message"]["content"]
    assert 12 < value["usage"]["completion_tokens"] <= 36
    unseeded = answer(served, **drawn)
    again = answer(served, seed=unseeded["llava_rad_lite"]["seed"], **drawn)
    assert again["choices"] == unseeded["choices"]
    assert answer(served)["llava_rad_lite"]["seed"] is None
    body = {"messages": [user(None, IMAGE)], "n": 2, "seed": 5, "stream": True} | drawn
    streamed = ["", ""]
    for _, chunk in events(served.client.post(CHAT, json=body).text)[:-1]:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts[:2]


def test_a_stop_string_cuts_the_text_and_ends_the_draft(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    text = served.model.findings(png(), max_new_tokens=200).text
    stop = text[len(text) // 4 :][:5]
    cut = text[: text.index(stop)]
    (choice,) = answer(served, stop=[stop, "never"], max_tokens=200, logprobs=True)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (cut, "stop")
    told = bytes_of(choice["logprobs"]["content"]).decode(errors="replace").strip()
    assert cut.startswith(told)
    assert len(told) > len(cut) - 20
    gate = Gate(served.model, monkeypatch)
    with served.client.stream(
        "POST", CHAT, json={"messages": [user(None, IMAGE)], "stop": stop, "stream": True, "max_tokens": 400}
    ) as response:
        lines = response.iter_lines()
        wait_until(lambda: gate.num_waiting > 0)
        wait_until(lambda: gate.step() or not served.model.session.loop.rows.taken())
        assert any('"finish_reason":"stop"' in line for line in lines)
    gate.open()
    served.wait_until_idle()


class Letters:
    """A tokenizer of which each token is a letter."""

    def bytes_of(self, token_id: int) -> bytes:
        return chr(token_id).encode()


@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1), (50,)])
@pytest.mark.parametrize(
    ("stops", "expected"),
    [((), "the cat catches"), (("cat",), "the "), (("catc",), "the cat "), (("xx", "t c", "t ca"), "the ca"),
     (("ches!",), "the cat catches"), (("s",), "the cat catche"), (("e cat x", "catches"), "the cat ")],
)  # fmt: skip
def test_a_stop_is_found_across_tokens(sizes: tuple[int, ...], stops: tuple[str, ...], expected: str) -> None:
    """Whatever the pieces: nothing of a stop string is given out, all before it is, and its tokens are those of it."""
    left, given, tokens, has_ended = "the cat catches", "", "", False
    white = [Token(ord(" "), -1.0, ())]  # as SentencePiece begins a text
    choice = Choice(stops, Letters())  # type: ignore[arg-type]
    turn = 0
    while not has_ended:
        size = sizes[turn % len(sizes)]
        part, left, turn = left[:size], left[size:], turn + 1
        spelt = [Token(ord(char), -1.0, ()) for char in part]
        piece, said, has_ended = choice.push(part, white * (turn == 1) + spelt, is_all=not left)
        given += piece
        tokens += "".join(chr(token.id) for token in said)
    assert given == expected
    assert choice.is_cut == (expected != "the cat catches")
    assert tokens == f" {expected}"


def test_more_than_one_kind_of_number_of_tokens_may_be_asked_for() -> None:
    chat = read_chat({"messages": [user(None, IMAGE)], "top_p": 0}, models=("m",), max_drafts=1)
    assert (chat.max_new_tokens, chat.temperature, chat.n, chat.top_logprobs) == (None, 0.0, 1, None)
    assert 0 < chat.top_p < 1e-6
    with pytest.raises(Refusal, match="whole number from 1 to 1"):
        read_chat({"messages": [user(None, IMAGE)], "n": 2}, models=("m",), max_drafts=1)


def test_models_are_listed(served: Served) -> None:
    listed = served.client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == [served.model.artifact.manifest.model]
