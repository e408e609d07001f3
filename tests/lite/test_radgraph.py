"""F1-RadGraph, with a stand-in in the package's place.

`radgraph` is none of this project's test packages: it wants transformers 4 and fetches its weights. The stand-in has
its signature (0.1.18) and proves the plumbing only: what is passed on, what is made of the answer and of errors.
"""

from __future__ import annotations

import importlib.metadata
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lite.errors import BackendUnavailable, LiteError
from lite.eval import radgraph
from lite.eval.figures import Missing, Sums
from lite.eval.radgraph import radgraph_f1


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put a package in radgraph's place, whose reward is the share of the reference's words in the prediction."""
    seen = SimpleNamespace(error=None, arguments={})

    class F1RadGraph:
        def __init__(self, reward_level: str, model_type: str | None = None, **options: Any) -> None:
            seen.arguments = {"reward_level": reward_level, "model_type": model_type, **options}
            sys.stdout.write("Using device: cpu\n")
            if seen.error:
                raise seen.error

        def __call__(self, refs: list[str], hyps: list[str]) -> tuple[Any, list[float], list[Any], list[Any]]:
            assert all(text == "" or text.split() for text in (*refs, *hyps))
            rewards = [
                len({*ref.split()} & {*hyp.split()}) / len({*ref.split()}) if ref and hyp else 0.0
                for ref, hyp in zip(refs, hyps, strict=True)
            ]
            return np.mean(rewards), rewards, [], []

    def version(name: str) -> str:
        return {"radgraph": "0.1.18", "transformers": "4.57.6"}[name]

    monkeypatch.setitem(sys.modules, "radgraph", SimpleNamespace(F1RadGraph=F1RadGraph))
    monkeypatch.setattr(radgraph, "version", version)
    return seen


def test_the_rewards_of_radgraph_become_a_mean_with_an_interval(
    stand_in: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    sums = radgraph_f1(["small effusion", "edema", "clear", "x"], ["small", "edema", " \n", ""], device="cpu")
    assert isinstance(sums, Sums)
    estimate = sums.estimate()
    assert (estimate.value, estimate.count) == (pytest.approx(1.5 / 4), 4)
    assert 0 <= estimate.low < estimate.value < estimate.high <= 1
    assert stand_in.arguments == {"reward_level": "partial", "model_type": "radgraph", "cuda": -1}
    assert capsys.readouterr().out == ""


def test_a_gpu_is_passed_on_by_its_number(stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, number in (("auto", 0), ("cuda", 0), ("cuda:1", 1), ("cpu", -1)):
        radgraph_f1(["a"], ["a"], device=device)
        assert stand_in.arguments["cuda"] == number
    with pytest.raises(BackendUnavailable, match="cuda:2"):
        radgraph_f1(["a"], ["a"], device="cuda:2")


@pytest.mark.parametrize("error", [Exception("Cannot download the file"), OSError("We couldn't connect\nto the hub")])
def test_weights_that_cannot_be_fetched_are_missing(stand_in: SimpleNamespace, error: Exception) -> None:
    """Raise what radgraph itself and transformers do without a network, as seen with the real packages."""
    stand_in.error = error
    missing = radgraph_f1(["a"], ["b"], device="cpu")
    assert isinstance(missing, Missing)
    assert missing.why == "no weights"
    assert str(error).partition("\n")[0] in missing.todo


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), OSError(22, "truncated"), KeyError("0")])
def test_any_other_failure_of_radgraph_is_an_error(stand_in: SimpleNamespace, error: Exception) -> None:
    stand_in.error = error
    with pytest.raises(LiteError, match=r"got an error from radgraph 0\.1\.18 \(" + type(error).__name__):
        radgraph_f1(["a"], ["b"], device="cpu")


def test_radgraph_beside_a_transformers_that_it_cannot_use_is_missing(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(radgraph, "version", lambda _: "5.23.0")
    missing = radgraph_f1(["a"], ["b"], device="cpu")
    assert isinstance(missing, Missing)
    assert missing.why == "needs transformers 4"
    assert "5.23.0" in missing.todo
    assert not stand_in.arguments


def test_radgraph_that_is_not_installed_is_missing() -> None:
    if any(name == "radgraph" for name in importlib.metadata.packages_distributions()):
        pytest.skip("radgraph is installed here")
    missing = radgraph_f1(["a"], ["b"], device="cpu")
    assert isinstance(missing, Missing)
    assert missing.why == "not installed"
    assert "llava-rad-lite[clinical]" in missing.todo
