"""A server with a hospital's adapters: each is a model of its own name, and none changes what the others say."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import browsing
import pytest
from adapted import NAMES
from browsing import ask, choose, text_of
from serving import Served, events, png, serving, wait_until
from test_serve_command import running

from lite.artifact.open import Artifact
from lite.eval.calibration import SETTINGS, Calibration, Scale, beside
from lite.loading import load
from lite.model import FindingsModel
from lite.serve.models import model_names
from lite.studies.results import Findings

browser, open_page = browsing.browser, browsing.open_page
LOADING: dict[str, Any] = {"engine": "torch", "device": "cpu", "rows": 4}
REASON = "Cough."


@pytest.fixture(scope="module")
def plain(adapted_artifact: Artifact) -> Iterator[Served]:
    """The same artifact, loaded without adapters."""
    with serving(lambda: load(adapted_artifact.path, **LOADING)) as plain:
        yield plain


@pytest.fixture(scope="module")
def served(adapted_artifact: Artifact) -> Iterator[Served]:
    with serving(lambda: load(adapted_artifact.path, adapters=NAMES, **LOADING)) as served:
        yield served


def base_of(served: Served) -> str:
    return served.model.artifact.manifest.model


def chat(served: Served, film: bytes, **fields: Any) -> Any:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(film).decode()}"}}
    body = {"messages": [{"role": "user", "content": [image]}], "reason": REASON} | fields
    return served.client.post("/v1/chat/completions", json=body)


def findings(served: Served, film: bytes, **fields: Any) -> Any:
    return served.client.post("/findings", files={"film": film}, data={"reason": REASON} | fields)


def expected(served: Served, seed: int, adapter: str | None) -> Findings:
    return served.model.findings(png(seed), REASON, adapter=adapter, top_logprobs=0)


def test_each_adapter_is_a_model_beside_the_base(served: Served) -> None:
    base, *adapters = served.client.get("/v1/models").json()["data"]
    same = {"object": "model", "created": 0, "owned_by": "llava-rad-lite"}
    assert base == same | {"id": base_of(served)}
    assert adapters == [same | {"id": name, "root": base["id"], "parent": base["id"]} for name in NAMES]
    about = served.client.get("/about").json()
    assert (about["model"], about["adapters"]) == (base["id"], list(NAMES))


@pytest.mark.parametrize(("seed", "before"), [(8, []), (9, ["a"]), (10, ["a", "b", "a"])])
def test_the_base_is_bit_by_bit_what_it_is_without_adapters(
    served: Served, plain: Served, seed: int, before: list[str]
) -> None:
    """Also where rows hold the film as an adapter has read it."""
    for name in before:
        assert findings(served, png(seed), model=name).json()["adapter"] == name
    made, alone = (findings(each, png(seed)).json() for each in (served, plain))
    for name in ("prediction", "token_ids", "token_logprobs", "sentences", "num_reused_tokens"):
        assert made[name] == alone[name]


def test_the_name_says_which_is_used(served: Served) -> None:
    for seed in range(2):
        texts = [expected(served, seed, None).text]
        for name in (None, *NAMES, base_of(served), *NAMES):
            adapter = name if name in NAMES else None
            want = expected(served, seed, adapter)
            made = findings(served, png(seed), **({} if name is None else {"model": name})).json()
            assert (made["prediction"], made["adapter"]) == (want.text, adapter)
            value = chat(served, png(seed), model=name).json()
            assert value["choices"][0]["message"]["content"] == want.text
            assert (value["model"], value["llava_rad_lite"]["adapter"]) == (name or base_of(served), adapter)
            texts += [want.text] if adapter else []
        assert len(set(texts)) == 1 + len(NAMES)


def test_streams_and_json_know_the_names_too(served: Served) -> None:
    parts = [value for _, value in events(chat(served, png(), model="b", stream=True).text) if value != "[DONE]"]
    want = expected(served, 0, "b").text
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == want
    assert ({part["model"] for part in parts}, parts[-1]["llava_rad_lite"]["adapter"]) == ({"b"}, "b")
    body = {"film": base64.b64encode(png()).decode(), "reason": REASON, "model": "b"}
    assert served.client.post("/findings", json=body).json()["prediction"] == want
    assert events(findings(served, png(), model="b", stream="1").text)[-1][1]["adapter"] == "b"


@pytest.mark.parametrize("name", ["c", "A", f"{NAMES[0]},{NAMES[1]}", "base"])
def test_what_is_no_model_is_refused_by_the_names_that_there_are(served: Served, name: str) -> None:
    for answer in (chat(served, png(), model=name), findings(served, png(), model=name)):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert f"expected {base_of(served)} or a or b ·" in error["message"]
    assert chat(served, png(), model=["a"]).status_code == 404


def test_requests_of_all_models_at_a_time_are_not_mixed_up(served: Served) -> None:
    work = [(seed, name, route) for seed in range(4) for name in (None, *NAMES) for route in (chat, findings)]
    want = {(seed, name): expected(served, seed, name).text for seed, name, _ in work}

    def text(seed: int, name: str | None, route: Callable[..., Any]) -> str:
        value = route(served, png(seed), **({} if name is None else {"model": name})).json()
        return str(value["prediction"] if route is findings else value["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(len(work)) as pool:
        texts = list(pool.map(lambda each: text(*each), work))
    assert texts == [want[seed, name] for seed, name, _ in work]


def test_metrics_count_by_the_names_that_there_are(served: Served) -> None:
    def counts() -> dict[str, float]:
        found = re.findall(r'model_requests_total\{model="(.*?)"\} (\S+)', served.client.get("/metrics").text)
        return {name: float(value) for name, value in found}

    before = counts()
    for name in ("a", "a", "b", "no-such"):
        findings(served, png(), model=name, max_new_tokens="2")
    findings(served, png(), max_new_tokens="2")
    served.wait_until_idle()
    added = {name: count - before.get(name, 0) for name, count in counts().items()}
    assert added == {"a": 2, "b": 1, base_of(served): 1}


def test_the_command_loads_them_and_its_log_names_them(adapted_artifact: Artifact) -> None:
    with running(adapted_artifact.path, "--engine", "torch", "--adapters", "a, b", "--log-texts") as server:
        wait_until(lambda: server.printed)
        texts = {name: server.ask(model=name, max_new_tokens="8").json()["prediction"] for name in NAMES}
        assert server.ask(model="c").status_code == 404
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert any(line.endswith("with a, b …\n") for line in server.said)
    lines = [json.loads(line) for line in server.said if '"/findings"' in line]
    assert [(line.get("model"), line.get("text")) for line in lines] == [*texts.items(), (None, None)]


def test_each_has_its_own_calibration(adapted_artifact: Artifact, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapted_artifact.path, tmp_path / "artifact"))
    scale = Scale(with_samples=False, weights=(0.0,) * 7, levels=((0.0, 0.1), (1.0, 0.9)))
    made: dict[str | None, Calibration] = {}

    def loaded() -> FindingsModel:
        model = load(copy, adapters=NAMES, **LOADING)
        for adapter in (None, "a"):
            own = {name: model.settings[name] for name in SETTINGS}
            one = Calibration(**own, adapter=adapter, data=f"{adapter}", num_studies=1, rates={}, scales=(scale, scale))
            made[adapter] = one
            beside(copy, adapter).write_text(one.to_json())
        return model

    with serving(loaded) as served:
        for name, calibration in ((base_of(served), made[None].id), ("a", made["a"].id), ("b", None)):
            assert findings(served, png(), model=name, max_new_tokens="2").json().get("calibration") == calibration
    with serving(loaded, confidence=str(beside(copy, "a"))) as served:
        for name, calibration in ((base_of(served), None), ("a", made["a"].id), ("b", None)):
            assert findings(served, png(), model=name, max_new_tokens="2").json().get("calibration") == calibration


def test_the_published_adapter_is_the_model_itself(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    part = dataclasses.replace(served.model.artifact.manifest.parts.adapters["a"], is_default=True)
    artifact = served.model.artifact.with_parts(adapters={"published": part})
    model = dataclasses.replace(served.model, artifact=artifact)
    monkeypatch.setattr(model.decoder, "adapters", ("published", "a"))
    assert model_names(model) == (base_of(served), "a")


# -- The page ----------------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_lets_choose_where_there_are_several(
    open_page: Callable[..., Any], served: Served, tmp_path: Path, width: int
) -> None:
    film = tmp_path / "film.png"
    film.write_bytes(png())
    page = open_page(width)
    choice = page.get_by_label("Model", exact=True)
    choice.wait_for()
    assert choice.locator("option").all_inner_texts() == [base_of(served), *NAMES]
    choose(page, film)
    assert text_of(ask(page, REASON)) == expected(served, 0, None).text
    choice.focus()
    page.keyboard.press("b")
    draft = ask(page, REASON)
    assert text_of(draft) == expected(served, 0, "b").text
    assert "b · Cough." in draft.locator("header").inner_text()
    draft.locator("summary").click()
    assert re.search(r"Adapter\s+b\s", draft.locator("dl").inner_text())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.set_input_files("#files", film)  # another film: the choice stands in the form, and nowhere else
    page.locator("#list .open").nth(1).click()
    page.wait_for_selector("#draft:not(:disabled)")
    assert choice.input_value() == "b"
    assert page.evaluate("Object.keys(localStorage).length") == 0


@pytest.mark.full
def test_the_page_shows_no_choice_of_one(open_page: Callable[..., Any], plain: Served) -> None:
    page = open_page(url=plain.url)
    page.wait_for_selector("#server:has-text('torch')")
    assert not page.get_by_label("Model", exact=True).is_visible()
