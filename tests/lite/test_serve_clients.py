"""The clients that others use, unchanged, against a server of the demo's size: openai, LiteLLM, LangChain."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from repository import run_python
from serving import KEY, Served, png, serving

from lite.artifact.open import Artifact
from lite.loading import load

URI = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
PARTS = [
    {"type": "text", "text": "Reason for the exam: cough."},
    {"type": "image_url", "image_url": {"url": URI, "detail": "high"}},
]
MESSAGES: Any = [{"role": "system", "content": "You are a radiologist."}, {"role": "user", "content": PARTS}]


@pytest.fixture(scope="module")
def served(tiny_onnx_artifact: Artifact) -> Iterator[Served]:
    with serving(lambda: load(tiny_onnx_artifact.path, device="cpu", rows=4), key=KEY) as served:
        yield served


@pytest.fixture(scope="module")
def expected(served: Served) -> str:
    return served.model.findings(png(), "cough.", max_new_tokens=30).text


def test_openai(served: Served, expected: str) -> None:
    openai = pytest.importorskip("openai")
    named = {"base_url": f"{served.url}/v1", "api_key": KEY, "max_retries": 0}
    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 30}
    with openai.OpenAI(**named) as client:
        asked["model"] = client.models.list().data[0].id
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=1, seed=1)
        assert whole.choices[0].message.content == expected
        assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
        assert whole.usage.prompt_tokens_details.cached_tokens >= 0
        assert whole.llava_rad_lite["left_out"] != []
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
        assert chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        other = client.chat.completions.create(**asked, extra_body={"reason": "Fever."})
        assert other.choices[0].message.content == served.model.findings(png(), "Fever.", max_new_tokens=30).text
        stop = expected[10:13]  # its helper takes a text that is cut by its length for a failure
        with client.chat.completions.stream(**asked, stop=stop) as stream:
            assert stream.get_final_completion().choices[0].message.content == expected[: expected.index(stop)]
        with pytest.raises(openai.BadRequestError, match="got no film"):
            client.chat.completions.create(model=asked["model"], messages=[{"role": "user", "content": "A title?"}])
    with openai.OpenAI(**named | {"api_key": "wrong"}) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_openai_asynchronously(served: Served, expected: str) -> None:
    openai = pytest.importorskip("openai")

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0) as client:
            name = (await client.models.list()).data[0].id

            async def ask(*, stream: bool) -> str:
                answer = await client.chat.completions.create(
                    model=name, messages=MESSAGES, max_tokens=30, stream=stream
                )
                if not stream:
                    return str(answer.choices[0].message.content)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            return list(await asyncio.gather(*(ask(stream=number % 2 == 0) for number in range(8))))

    assert asyncio.run(ask_all()) == [expected] * 8
    served.wait_until_idle()


LITELLM = """
import json, os, sys
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
url, key, name, messages = json.loads(sys.argv[1])
asked = {"model": f"hosted_vllm/{name}", "api_base": url, "api_key": key, "messages": messages, "max_tokens": 30}
print(json.dumps([
    litellm.completion(**asked).choices[0].message.content,
    "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)),
]))
"""
LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI
url, key, name, messages = json.loads(sys.argv[1])
chat = ChatOpenAI(model=name, base_url=url, api_key=key, max_tokens=30, max_retries=0)
print(json.dumps([chat.invoke(messages).content, "".join(piece.content for piece in chat.stream(messages))]))
"""


@pytest.mark.full
@pytest.mark.parametrize(("package", "code"), [("litellm", LITELLM), ("langchain_openai", LANGCHAIN)])
def test_what_is_built_on_it(served: Served, expected: str, package: str, code: str) -> None:
    """Each in a process of its own: they take seconds to import, and warn of themselves."""
    pytest.importorskip(package, exc_type=ImportError)
    asked = json.dumps([f"{served.url}/v1", KEY, served.model.artifact.manifest.model, MESSAGES])
    printed = run_python("-W", "ignore", "-c", code, asked).splitlines()
    assert json.loads(printed[-1]) == [expected, expected]
