"""A server with a hospital's adapters: each is a model of its own name, and none changes what the others say."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import browsing
import httpx
import pytest
from adapted import NAMES
from browsing import ask, choose, text_of
from serving import Served, events, png, serving, wait_until
from test_serve_command import running

from lite.artifact.open import Artifact
from lite.eval.calibration import SETTINGS, Calibration, Scale, beside
from lite.loading import load
from lite.model import FindingsModel

browser, open_page = browsing.browser, browsing.open_page
LOADING: dict[str, Any] = {"engine": "torch", "device": "cpu", "rows": 4}


@pytest.fixture(scope="module")
def plain(adapted_artifact: Artifact) -> Iterator[Served]:
    """The same artifact, loaded without adapters."""
    with serving(lambda: load(adapted_artifact.path, **LOADING)) as plain:
        yield plain


@pytest.fixture(scope="module")
def served(adapted_artifact: Artifact) -> Iterator[Served]:
    with serving(lambda: load(adapted_artifact.path, adapters=NAMES, **LOADING)) as served:
        yield served


@pytest.fixture(scope="module")
def base(adapted_artifact: Artifact) -> str:
    return adapted_artifact.manifest.model


def chat(served: Served, seed: int, **fields: Any) -> httpx.Response:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png(seed)).decode()}"}}
    body = {"messages": [{"role": "user", "content": [image]}], "reason": "Cough."} | fields
    return served.client.post("/v1/chat/completions", json=body)


def findings(served: Served, seed: int, **fields: Any) -> httpx.Response:
    return served.client.post("/findings", files={"film": png(seed)}, data={"reason": "Cough."} | fields)


def expected(served: Served, seed: int, adapter: str | None) -> str:
    return served.model.findings(png(seed), "Cough.", adapter=adapter).text


def test_each_adapter_is_a_model_beside_the_base(served: Served, base: str) -> None:
    first, *adapters = served.client.get("/v1/models").json()["data"]
    assert first == {"id": base, "object": "model", "created": 0, "owned_by": "llava-rad-lite"}
    assert adapters == [first | {"id": name, "root": base, "parent": base} for name in NAMES]
    assert served.client.get("/about").json()["adapters"] == list(NAMES)


@pytest.mark.parametrize(("seed", "before"), [(8, ""), (9, "a"), (10, "aba")])
def test_the_base_is_bit_by_bit_what_it_is_without_adapters(
    served: Served, plain: Served, seed: int, before: str
) -> None:
    """Also where rows hold the film as an adapter has read it."""
    for name in before:
        assert findings(served, seed, model=name).json()["adapter"] == name
    made, alone = (findings(each, seed).json() for each in (served, plain))
    for name in ("prediction", "token_ids", "token_logprobs", "sentences", "num_reused_tokens", "adapter"):
        assert made[name] == alone[name]


def test_the_name_says_which_is_used(served: Served, base: str) -> None:
    texts = set()
    for name in (None, *NAMES, base, *NAMES):
        adapter, given = name if name in NAMES else None, {} if name is None else {"model": name}
        text = expected(served, 0, adapter)
        texts.add(text)
        body = {"film": base64.b64encode(png(0)).decode(), "reason": "Cough."} | given
        for made in (findings(served, 0, **given), served.client.post("/findings", json=body)):
            assert (made.json()["prediction"], made.json()["adapter"]) == (text, adapter)
        value = chat(served, 0, **given).json()
        assert value["choices"][0]["message"]["content"] == text
        assert (value["model"], value["llava_rad_lite"]["adapter"]) == (name or base, adapter)
        parts = [part for _, part in events(chat(served, 0, **given, stream=True).text) if part != "[DONE]"]
        assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == text
        assert {part["model"] for part in parts} == {name or base}
    assert len(texts) == 1 + len(NAMES)


@pytest.mark.parametrize("name", ["c", "A", "a,b", "base"])
def test_what_is_no_model_is_refused_by_the_names_that_there_are(served: Served, base: str, name: str) -> None:
    for answer in (chat(served, 0, model=name), findings(served, 0, model=name)):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert f"expected {base} or a or b ·" in error["message"]


def test_requests_of_all_models_at_a_time_are_not_mixed_up(served: Served) -> None:
    work = [(seed, name) for seed in range(4) for name in (None, *NAMES)]
    want = [expected(served, seed, name) for seed, name in work]
    with ThreadPoolExecutor(2 * len(work)) as pool:
        chats = [pool.submit(chat, served, seed, model=name) for seed, name in work]
        forms = [pool.submit(findings, served, seed, model=name or "") for seed, name in work]
        assert [one.result().json()["choices"][0]["message"]["content"] for one in chats] == want
        assert [one.result().json()["prediction"] for one in forms] == want


def test_log_and_metrics_name_the_models_that_there_are(adapted_artifact: Artifact, base: str) -> None:
    with running(adapted_artifact.path, "--engine", "torch", "--adapters", "a, b") as server:
        wait_until(lambda: server.printed)
        asked = [server.ask(model=name, max_new_tokens="4").status_code for name in ("a", "b", "", "no-such", "a")]
        assert asked == [200, 200, 200, 404, 200]
        counted = re.findall(r'model_requests_total\{model="(.*?)"\} (\S+)', httpx.get(f"{server.url}/metrics").text)
        assert dict(counted) == {"a": "2.0", "b": "1.0", base: "1.0"}
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert any(line.endswith("with a, b …\n") for line in server.said)
    lines = [json.loads(line) for line in server.said if '"/findings"' in line]
    assert [line.get("model") for line in lines] == ["a", "b", base, None, "a"]


def test_each_has_its_own_calibration(adapted_artifact: Artifact, base: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(adapted_artifact.path, tmp_path / "artifact"))
    scale, ids = Scale(with_samples=False, weights=(0.0,) * 7, levels=((0.0, 0.1), (1.0, 0.9))), {"b": None}

    def loaded() -> FindingsModel:
        model = load(copy, adapters=NAMES, **LOADING)
        own = {name: model.settings[name] for name in SETTINGS}
        for adapter in (None, "a"):
            one = Calibration(**own, adapter=adapter, data="", num_studies=1, rates={}, scales=(scale, scale))
            ids[adapter or base] = one.id
            beside(copy, adapter).write_text(one.to_json())
        return model

    with serving(loaded) as served:
        assert {name: findings(served, 0, model=name).json().get("calibration") for name in ids} == ids


@pytest.mark.full
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_lets_choose_where_there_are_several(
    open_page: Callable[..., Any], served: Served, plain: Served, base: str, tmp_path: Path, width: int
) -> None:
    film = tmp_path / "film.png"
    film.write_bytes(png())
    page = open_page(width)
    choice = page.get_by_label("Model", exact=True)
    choice.wait_for()
    assert choice.locator("option").all_inner_texts() == [base, *NAMES]
    choose(page, film)
    draft = ask(page, "Cough.")
    assert text_of(draft) == expected(served, 0, None)
    assert f"{base} · Cough." in draft.locator("header").inner_text()
    choice.focus()
    page.keyboard.press("b")
    draft = ask(page, "Cough.")
    assert text_of(draft) == expected(served, 0, "b")
    assert "b · Cough." in draft.locator("header").inner_text()
    draft.locator("summary").click()
    assert re.search(r"Adapter\s+b\s", draft.locator("dl").inner_text())
    assert page.evaluate("[document.documentElement.scrollWidth, Object.keys(localStorage).length]") == [width, 0]
    page.set_input_files("#files", film)  # the choice stands for the next film, too
    page.locator("#list .open").nth(1).click()
    page.wait_for_selector("#draft:not(:disabled)")
    assert choice.input_value() == "b"
    page = open_page(width, url=plain.url)
    page.wait_for_selector("#server:has-text('torch')")
    assert not page.get_by_label("Model", exact=True).is_visible()
