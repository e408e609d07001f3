"""The bench with adapters: a row for each, of what is drafted, scored and read with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bench_command import FAST, job_of, write_list

import lite
from lite.artifact.open import Artifact
from lite.bench.costs import disk_bytes, traffic_of
from lite.bench.measure import _Loop
from lite.bench.results import Traffic
from lite.bench.run import _runs
from lite.memory.counts import adapter_bytes


def test_each_adapter_is_a_row_of_what_is_computed_with_it(
    adapted_artifact: Artifact, films: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--data", write_list(tmp_path, films[:1]), *FAST, "--engine", "torch", "--adapters", "b,a")
    job = job_of(adapted_artifact.path, *given)
    (name, _), runs = job.artifacts[0], list(_runs(job))
    assert [(run, options.adapters) for run, _, options in runs] == [
        (name, ()),
        (f"{name} b", ("b",)),
        (f"{name} a", ("a",)),
    ]
    reference: Any = SimpleNamespace(token_ids=lambda _: [40, 41])
    with lite.load(adapted_artifact.path, engine="torch", device="cpu", adapters=("b",)) as model:
        loop = _Loop(model=model, job=job, on_progress=lambda *_: None, adapter="b")
        drafts = [loop.draft(job.studies[0]), *loop._drafted(job.studies, 1)]
        assert [draft.adapter for draft in drafts] == ["b", "b"]
        film, *rest = job.studies[0].image, [40, 41], job.studies[0].reason
        (scored,), expected = loop.scores(reference), model.score(film, *rest, adapter="b")
        np.testing.assert_array_equal(scored, expected)
    part, config = adapted_artifact.adapter_part("b"), adapted_artifact.decoder_config()
    sizes = [disk_bytes(adapted_artifact, "torch", names) for names in ((), ("b",))]
    assert sizes[1] - sizes[0] == part.nbytes
    monkeypatch.setattr("lite.bench.costs.streaming_read_bandwidth", lambda _: 1e9)
    read = [traffic_of(adapted_artifact, drafts, names) for names in (("b",), ("a", "b"))]
    read.append(traffic_of(adapted_artifact, [dataclasses.replace(drafts[0], adapter=None)], ("a", "b")))
    factors = adapter_bytes(config, [part.rank], itemsize=4)
    one, two, none = (traffic.weight_bytes for traffic in read if isinstance(traffic, Traffic))
    assert one - none == two - none == factors
