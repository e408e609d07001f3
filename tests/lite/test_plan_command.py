"""`python -m lite plan`: what it prints is what would be done."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from lite.__main__ import main
from lite.artifact.open import Artifact
from lite.loading import load


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_it_says_what_load_does(tiny_onnx_artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    for given, options in (
        ((), {}),
        (("--cache-dtype", "int8", "--rows", "3"), {"cache_dtype": "int8", "rows": 3}),
        (("--engine", "torch", "--memory-limit", "4GiB"), {"engine": "torch", "memory_limit": "4GiB"}),
    ):
        told: dict[str, Any] = json.loads(printed(capsys, tiny_onnx_artifact.path, "--json", *given))
        plan = load(tiny_onnx_artifact.path, **options).plan  # type: ignore[arg-type]
        for name in ("engine", "device", "dtype", "cache_dtype", "rows", "max_seq_len", "vision_provider", "limit"):
            assert told[name] == getattr(plan, name)
        assert told["memory"]["cache_bytes"] == plan.memory.cache_bytes
        assert told["memory"]["decoder_bytes"] == plan.memory.decoder_bytes
        assert told["artifact"] == tiny_onnx_artifact.id


def test_a_table_of_items_and_reasons(tiny_onnx_artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, tiny_onnx_artifact.path, "--rows", 2, "--cache-dtype", "float32")
    assert re.search(r"engine +onnx +the artifact has decoder\.onnx", out)
    assert re.search(r"cache of 2 x \d+ tokens +[\d.]+ [KM]iB +[\d.,]+ \w+ a row", out)
    assert re.search(r"at most +[\d.]+ [MG]iB +no limit is set", out)
    assert re.search(r"decoder\.onnx, from decoder +\d", out)
    assert re.search(r"--cache-dtype int8 +[\d.]+ [MG]iB +2 rows, int8 cache, loses \S+ nats a token more", out)


def test_a_card_that_is_not_here(tiny_onnx_artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, tiny_onnx_artifact.path, "--card", "t4")
    assert "one with the card T4, which is not this one" in out
    assert re.search(r"device +cuda +there is a GPU: T4", out)
    assert "memory on the GPU" in out
    for name in ("abacus", "RTX"):
        assert main(["plan", str(tiny_onnx_artifact.path), "--card", name]) == 1
        assert f"got the card '{name}' · expected one of RTX 3060 12GB, " in capsys.readouterr().err


def test_what_does_not_fit_is_an_error(tiny_onnx_artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny_onnx_artifact.path), "--memory-limit", "1MiB"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert "got a memory limit of 1.0 MiB · expected at least" in captured.err
    with pytest.raises(SystemExit) as wrong:
        main(["plan", str(tiny_onnx_artifact.path), "--rows", "0"])
    assert wrong.value.code == 2


def test_loading_logs_the_plan(tiny_onnx_artifact: Artifact, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lite"):
        load(tiny_onnx_artifact.path, rows=2, cache_dtype="float32").close()
    logged = [record.getMessage() for record in caplog.records if record.name == "lite.loading"]
    assert logged[0].startswith(f"loaded {tiny_onnx_artifact.path} in ")
    assert "engine onnx, the artifact has decoder.onnx" in logged[0]
