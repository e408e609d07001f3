"""Two systems on the same studies, against the definitions written out and figures known beforehand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lite.eval.figures import Floats, Sums, f1, mean_sums, ratio
from lite.eval.paired import EXACT_STUDIES, compare


def f1_sums(*rows: tuple[float, float, float]) -> Sums:
    return Sums(per_study=np.array(rows), statistic=f1)


OURS = f1_sums((2, 0, 0), (1, 1, 0), (1, 0, 1), (3, 0, 0), (0, 0, 0))
THEIRS = f1_sums((1, 0, 1), (1, 1, 0), (0, 1, 2), (1, 1, 2), (0, 1, 0))


def by_definition(ours: Floats, theirs: Floats) -> float:
    """Exchange whose study it is in all ways, and count how often the pooled F1s are as far apart."""

    def apart(first: Floats, second: Floats) -> float:
        (a, b), (_, fp_a, fn_a), (_, fp_b, fn_b) = (first[0], second[0]), first, second
        return abs(2 * a / (2 * a + fp_a + fn_a) - 2 * b / (2 * b + fp_b + fn_b))

    ways = []
    for swaps in itertools.product((False, True), repeat=len(ours)):
        rows = [(b, a) if swap else (a, b) for a, b, swap in zip(ours, theirs, swaps, strict=True)]
        ways.append(apart(sum(a for a, _ in rows), sum(b for _, b in rows)))  # type: ignore[arg-type]
    return sum(way >= ways[0] - 1e-9 for way in ways) / len(ways)


def test_p_of_a_pooled_figure_is_that_of_all_exchanges() -> None:
    comparison = compare(OURS, THEIRS)
    assert comparison.p_value == pytest.approx(by_definition(OURS.per_study, THEIRS.per_study))
    assert 0.1 < comparison.p_value < 0.5
    assert comparison.difference.value == pytest.approx(14 / 16 - 6 / 15)
    assert (comparison.better, comparison.worse, comparison.same, comparison.undefined) == (3, 0, 1, 1)
    assert comparison.verdict == "no difference"
    # The other way round everything turns but p.
    turned = compare(THEIRS, OURS)
    assert (turned.better, turned.worse, turned.p_value) == (0, 3, comparison.p_value)
    assert turned.difference.value == -comparison.difference.value


def test_p_of_a_mean_is_that_of_the_sign_flip_test() -> None:
    """Six differences of one sign: of the 64 ways only that and its mirror image are as far apart."""
    ours, theirs = mean_sums([0.9, 0.8, 0.7, 0.9, 0.6, 0.8]), mean_sums([0.5, 0.6, 0.3, 0.8, 0.5, 0.2])
    assert compare(ours, theirs).p_value == 2 / 64
    assert compare(ours, theirs).verdict == "better"
    assert compare(theirs, ours).verdict == "worse"


def test_what_is_better_when_lower_is() -> None:
    ours, theirs = (
        Sums(per_study=mean_sums(values).per_study, statistic=mean_sums(values).statistic, lower_is_better=True)
        for values in ([0, 1, 0, 0, 0, 0], [2, 2, 2, 3, 1, 1])
    )
    comparison = compare(ours, theirs)
    assert (comparison.better, comparison.worse, comparison.verdict) == (6, 0, "better")
    assert comparison.difference.value < 0


def test_drawn_exchanges_agree_with_all_of_them_and_with_the_t_test() -> None:
    """On as many studies as are still done in all ways, and on hundreds, where the mean's p is known."""
    rng = np.random.default_rng(0)
    gains = rng.normal(0.1, 1.0, size=300)
    p = compare(mean_sums(gains.tolist()), mean_sums([0.0] * 300)).p_value
    z = gains.mean() / (gains.std(ddof=1) / math.sqrt(300))
    assert p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.02)
    few = gains[:EXACT_STUDIES].tolist()
    exact = compare(mean_sums(few), mean_sums([0.0] * len(few))).p_value
    # A study on which both are alike changes nothing, and makes the exchanges too many to do all.
    drawn = compare(mean_sums([*few, 0.0]), mean_sums([0.0] * (len(few) + 1))).p_value
    assert drawn == pytest.approx(exact, abs=0.03)
    assert drawn != exact


def test_alike_systems_have_p_1_and_far_ones_never_0() -> None:
    assert compare(OURS, OURS).p_value == 1.0
    assert compare(OURS, OURS).same == 4
    far = compare(mean_sums([1.0] * 200), mean_sums([0.0] * 200))
    assert far.p_value == 1 / 5000
    assert (far.difference.low, far.difference.high) == (1.0, 1.0)


def test_the_interval_of_the_difference_is_paired() -> None:
    """Studies differ far more than systems do: drawn apart, the interval would be ten times as wide."""
    rng = np.random.default_rng(1)
    hard = rng.normal(0.0, 10.0, size=200)
    ours = hard + rng.normal(0.5, 1.0, size=200)
    difference = compare(mean_sums(ours.tolist()), mean_sums(hard.tolist())).difference
    half = 1.96 * (ours - hard).std() / math.sqrt(200)
    assert difference.value == pytest.approx((ours - hard).mean())
    assert difference.high - difference.low == pytest.approx(2 * half, rel=0.15)


def test_findings_that_only_one_system_has_do_not_decide_about_sides() -> None:
    """Both get the sides of what they find right as often; that the one finds twice as much is no question of side."""

    def sides(rows: list[tuple[int, int]]) -> Sums:
        return Sums(
            per_study=np.array(rows, dtype=float), statistic=lambda sums: ratio(sums[:, 0], sums[:, 1]), own_cases=True
        )

    ours = sides([(1, 1)] * 30)
    theirs = sides([(0, 1), (0, 1)] + [(1, 1)] * 8 + [(0, 0)] * 20)
    comparison = compare(ours, theirs)
    assert comparison.undefined == 20
    assert comparison.p_value == 0.5  # of the ten studies that both have, two differ
    assert math.isnan(compare(theirs, sides([(0, 0)] * 30)).p_value)
