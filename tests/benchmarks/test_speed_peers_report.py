"""What follows from the times of `benchmarks speed peers`: models of the real depth, costs, ratios, tables."""

from __future__ import annotations

import dataclasses

import pytest
from test_speed_peers import cells_of, tiny_setting

from benchmarks.speed.peers.measure import Measured, NotMeasured, Times
from benchmarks.speed.peers.report import Modelled, costs, modelled_decode, modelled_prefill, ratios, reports
from benchmarks.speed.peers.specs import THEIRS
from lite.eval.figures import quantiles


def found(
    *,
    decode: dict[int, float],
    prefill: dict[int, float] | None = None,
    name: str = "engine",
    peak: int | None = None,
    turns: tuple[str, ...] = ("engine",),
) -> Measured:
    about = {
        "versions": {}, "computes_in": "float32", "weight_bytes": 3_000_000_000, "cache_bytes_per_token": 1_000_000,
        "last_token_only": (), "load_s": None,
    }  # fmt: skip
    times = {
        depth: Times(decode=quantiles([seconds] * 10), prefill=None if prefill is None else quantiles([prefill[depth]]))
        for depth, seconds in decode.items()
    }
    return Measured(
        name=name, about=about, difference=0.0, times=times, slow=None if prefill else "too slow", context=1000,
        bandwidth=80e9, peak_bytes=peak, turns=turns,
    )  # fmt: skip


def line_of(model: Modelled | str) -> Modelled:
    assert isinstance(model, Modelled)
    return model


def test_the_model_of_32_layers_is_a_straight_line() -> None:
    one = found(decode={3: 0.07, 1: 0.03}, prefill={3: 1.0, 1: 0.4})
    decode = line_of(modelled_decode(one))
    assert (decode.layer_s, decode.rest_s) == (pytest.approx(0.02), pytest.approx(0.01))
    for seconds in (decode.at_s, decode.low_s, decode.high_s):
        assert seconds == pytest.approx(0.01 + 32 * 0.02)
    assert line_of(modelled_prefill(one)).at_s == pytest.approx(0.1 + 32 * 0.3)
    # llama.cpp's last layer costs less than the others: a negative rest is no noise.
    cheap_last = found(decode={3: 0.07, 1: 0.03}, prefill={3: 1.7, 1: 0.3})
    assert line_of(modelled_prefill(cheap_last)).at_s == pytest.approx(0.3 + 31 * 0.7)
    assert "noise" in str(modelled_decode(found(decode={3: 0.02, 1: 0.03})))
    assert modelled_prefill(found(decode={3: 0.07, 1: 0.03})) == "no prefill was timed"
    assert "one depth only" in str(modelled_decode(found(decode={1: 0.07})))


def test_the_model_shows_how_much_noise_it_amplifies() -> None:
    spread = {2: [0.04, 0.05, 0.06], 1: [0.03, 0.04, 0.05]}
    times = {depth: Times(decode=quantiles(seconds), prefill=None) for depth, seconds in spread.items()}
    model = line_of(modelled_decode(dataclasses.replace(found(decode={1: 1.0}), times=times)))
    # p20 and p80 are 6 ms from the medians: 10 ms a layer may be none, or 22.
    assert model.at_s == pytest.approx(0.05 + 30 * 0.01)
    assert model.low_s == pytest.approx(0.044)
    assert model.high_s == pytest.approx(0.056 + 30 * 0.022)


def test_modelled_figures_look_different_from_measured_ones() -> None:
    gone = NotMeasured(name="gone", why="not installed", failed=False)
    done = found(decode={2: 0.05, 0: 0.01}, prefill={2: 2.0, 0: 0.0})
    tables = {name: one.markdown() for name, one in reports([done, gone], None, tiny_setting(rounds=1)).items()}
    # 4 GB in 50 ms are 80 GB/s, all that there is; 24 tokens in 2 s.
    assert cells_of(tables["measured"], "gone")["ms"] == "–"
    row = next(line for line in tables["measured"].splitlines() if line.startswith("| engine | float32"))
    assert [cell.strip() for cell in row.strip("|").split("|")][2:9] == [
        "50", "50–50", "4,000", "80", "100%", "0.0e+00", "12 (12–12)",
    ]  # fmt: skip
    assert "~" not in row
    row = next(line for line in tables["modelled"].splitlines() if "~650" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [
        "20", "10", "~650 (650–650)", "~1.538", "1", "0", "~32 (32–32)",
    ]  # fmt: skip


def test_end_to_end_is_the_tower_and_the_prefill_and_a_hundred_tokens() -> None:
    done, vision = found(decode={2: 0.05, 0: 0.01}, prefill={2: 2.5, 0: 0.5}), quantiles([0.5])
    assert costs(done, vision)["end to end"] == 0.5 + 2.5 + 5
    # 20 ms and 1 s a layer.
    expected = 0.5 + (0.5 + 32) + 100 * (0.01 + 32 * 0.02)
    assert costs(done, vision, real_depth=True)["end to end"] == pytest.approx(expected)
    slow = found(decode={2: 0.05, 0: 0.01}, name="slow")
    assert costs(slow, vision)["end to end"] is costs(done, None)["end to end"] is None
    tables = reports([done, slow], vision, tiny_setting())
    assert cells_of(tables["measured"].markdown(), "slow")["end to end s"] == "–"
    assert "~98" in tables["modelled"].markdown()
    assert "end to end" not in reports([done], None, tiny_setting())["measured"].markdown()


def test_we_stand_against_the_better_of_llama_cpp() -> None:
    """Each figure against the better one, whichever setting has it, and only where there is one."""

    def engine(name: str, decode: float, prefill: float | None, peak: int, *turns: str) -> Measured:
        """Make one of two layers, each of which takes 40 % of it all."""
        prefills = None if prefill is None else {2: prefill, 1: 0.6 * prefill}
        return found(decode={2: decode, 1: 0.6 * decode}, prefill=prefills, name=name, peak=peak, turns=turns)

    ours = engine("lite onnx int4", 0.02, 3.0, 900)
    plain, flash = engine(THEIRS[0], 0.03, 6.0, 1200), engine(THEIRS[1], 0.04, 4.5, 1000)
    vision, three = quantiles([1.0]), [ours, plain, flash]
    # End to end: 1 + 3 + 2 seconds against 1 + 6 + 3, and 1 + 4.5 + 4 with flash attention.
    here = ratios(three, vision, real_depth=False)[ours.name]
    assert here == pytest.approx({"decode": 1.5, "prefill": 1.5, "end to end": 9.5 / 6, "peak memory": 0.9})
    # 32 layers take 0.2 + 32 × 0.4 = 13 times as long, but for the tower.
    real = ratios(three, vision, real_depth=True)[ours.name]
    assert (real["decode"], real["prefill"]) == (pytest.approx(1.5), pytest.approx(1.5))
    assert (real["end to end"], real["peak memory"]) == (pytest.approx((1 + 13 * 8.5) / (1 + 13 * 5)), None)
    text = reports(three, vision, tiny_setting())["ratios"].markdown()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "×" in line]
    assert [line for line in lines if line[0] == ours.name] == [
        [ours.name, "2", "1.50×", "1.50×", "1.58×", "0.90×"],
        [ours.name, "~32", "~1.50×", "~1.50×", "~1.69×", "–"],
    ]
    elsewhere = engine(THEIRS[1], 0.04, 4.5, 1000, "alone")
    assert "no turns with each other" in reports([ours, elsewhere], vision, tiny_setting())["ratios"].markdown()
    slow = engine("lite onnx int4", 0.02, None, 900)
    assert ratios([slow, plain], None, real_depth=False)[ours.name]["prefill"] is None
    assert ratios([ours], None, real_depth=False) == ratios([plain], None, real_depth=False) == {}
