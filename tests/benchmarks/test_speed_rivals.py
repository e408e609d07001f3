"""`speed rivals` and `speed products`: a film added up, and the whole way at small shapes with what is installed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_checkpoint import SMALL

from benchmarks.speed import products, rivals
from benchmarks.speed.harness import Row
from benchmarks.speed.peers import products as engines
from benchmarks.speed.peers import worker
from benchmarks.speed.peers.specs import PEERS_PYTHON, SPECS
from benchmarks.speed.peers.worker import Order
from benchmarks.speed.rivals import OURS, Rival, row_of
from lite.errors import LiteError

SHAPES = dataclasses.replace(SMALL, intermediate_size=512, max_position_embeddings=2048)
GEMMA = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 1200, "sliding_window": 8, "query_pre_attn_scalar": 64,
}  # fmt: skip


class Told:
    """A process that says what it holds."""

    def __init__(self, peak_bytes: int) -> None:
        self.peak_bytes = peak_bytes

    def ask(self, what: str) -> dict[str, int]:
        return {"peak": {"bytes": self.peak_bytes}}[what]


def film(**changes: Any) -> tuple[Row, list[list[float]]]:
    loaded: Any = {1: Told(10**9), 3: Told(3 * 10**9)}
    tower: Any = {1: "first", 3: "third"}
    rival = Rival(**{"name": "r", "image_tokens": 256, "bench": None, "loaded": loaded, "tower": tower} | changes)
    found: dict[Any, Any] = {
        ("r", 256, 1): [{"prefill": [1.0], "decode": [0.1, 0.1, 9.0], "watts": [20.0]}],
        ("r", 256, 3): [{"prefill": [2.0], "decode": [0.2, 0.2, 9.0], "watts": [20.0]}],
        "first": [{"seconds": 1.0}],
        "third": [{"seconds": 2.0}],
    }
    return row_of(rival, found, [[120.0]])


def test_a_film_is_its_tower_a_prompt_and_a_hundred_tokens_at_full_depth() -> None:
    row, seconds = film()
    decode, prefill, tower = 0.1 + 31 * 0.05, 1 + 31 * 0.5, 1 + 26 * 0.5
    assert seconds == [[pytest.approx(tower + prefill + 100 * decode)]]
    assert row.ratio is not None
    assert row.ratio.p50 == pytest.approx(seconds[0][0] / 120)
    assert row.cells == {
        "~tower, s": "14", "~prefill, s": "16.5", "~decode, ms/token": "1,650", "~peak GB": "32", "~J": "3,910",
    }  # fmt: skip
    # All of a tower is not computed from anything.
    whole: Any = {27: "third"}
    assert film(tower=whole)[1] == [[pytest.approx(2 + prefill + 100 * decode)]]


def test_what_fails_in_a_round_is_told() -> None:
    found: Any = {("r", 256, 1): "its process ended"}
    rival: Any = Rival(name="r", image_tokens=256, bench=None, loaded={1: None}, tower={})
    with pytest.raises(LiteError, match="its process ended"):
        row_of(rival, found, None)


def test_energy_is_what_all_processors_have_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, microjoules in enumerate(("1500000", "2000000")):
        (tmp_path / f"{number}").write_text(f"{microjoules}\n", encoding="ascii")
    monkeypatch.setattr(worker, "_COUNTERS", sorted(tmp_path.iterdir()))
    assert worker.joules() == 3.5
    monkeypatch.setattr(worker, "_COUNTERS", [tmp_path / "none"])
    assert worker.joules() is None


def order(form: str) -> Order:
    about: Any = {"packages": (), "install": "", "folder": Path(), "vocab_size": 1, "max_seq_len": 1, "device": "cpu"}
    return Order(module="products", form=form, threads=1, **about)


def test_a_product_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "COPIES_BYTES", 40_000)
    ours = engines.build(order("onnxruntime"))
    for num_rows in (1, 3):
        assert 1e-4 < ours.far((128, 256), num_rows)["off"] < 0.02
    assert len(ours.multiply((128, 256), 2, calls=3)["seconds"]) == 3
    drawn = engines._draw
    monkeypatch.setattr(engines, "_draw", lambda N, K, copy: (np.roll(drawn(N, K, copy)[0], 1), drawn(N, K, copy)[1]))
    assert ours.far((128, 256), 1)["off"] > 1


@pytest.mark.full
def test_products_in_turns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "products.json"
    status = products.main(["--rows", "2", "24", "--rounds", "2", "--threads", "1", "--json", str(out)], SHAPES)
    report = json.loads(out.read_text(encoding="utf-8"))["sections"]["products"]
    if not PEERS_PYTHON.exists():
        assert report["why"].endswith("not installed: make peers")
        return
    assert status == 0, capsys.readouterr().out
    assert len(report["rows"]) == 2 * 5 * len(products.LIBRARIES)
    layer = [row for row in report["rows"] if row["product"] == "a layer" and row["rows"] == "2"]
    assert {row["library"] for row in layer} == {*products.LIBRARIES}
    assert layer[0]["nbytes"] == (4 * 256**2 + 3 * 256 * 512) * (4 + 16 / 128) / 8


@pytest.mark.full
def test_rivals_at_small_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.environ", dict(os.environ))
    monkeypatch.setattr(rivals, "Shapes", lambda: SHAPES)
    monkeypatch.setattr(rivals, "GEMMA", GEMMA)
    monkeypatch.setattr(rivals.GemmaBench, "config", GEMMA)
    monkeypatch.setattr(rivals, "IMAGE_TOKENS", (40, 9))
    towers = {layers: dataclasses.replace(spec, form=f"siglip {layers} 28") for layers, spec in rivals.SIGLIP.items()}
    monkeypatch.setattr(rivals, "SIGLIP", towers)
    out, models = tmp_path / "rivals.json", tmp_path / "models"
    arguments = ["--layers", "1", "2", "--rounds", "2", "--new-tokens", "3", "--threads", "1", "--models", str(models)]
    assert rivals.main([*arguments, "--json", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["sections"]["rivals"]["rows"]
    assert [row["image tokens"] for row in rows if row[""] == OURS.name] == ["40", "9"]
    apart = ["llama.cpp Q4_0", "llama.cpp Q4_0 flash", "OpenVINO int4 u8-cache", rivals.MEDGEMMA]
    told = {row[""]: row["why"] for row in rows}
    assert {*told} == {OURS.name, rivals.STORED.name, *apart}
    for name in apart:
        why = told[name] or ""
        # At such sizes a line through two depths may fall.
        assert why.startswith("noise") or not why if PEERS_PYTHON.exists() else why.endswith("make peers")
    assert {path.name for path in models.glob("*/*") if path.is_dir()} == {"1", "2", "6"}
    assert SPECS["transformers float32"] == rivals.GemmaBench.exact
