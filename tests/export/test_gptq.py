"""GPTQ's maths: the objective, its orders, clips and passes, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch

from export.quantize import folding
from export.quantize import gptq as module
from export.quantize.folding import fold, is_worth_it, propose, spread
from export.quantize.gptq import Grid, Hessian, gptq, relative_error, round_to_nearest
from export.settings import GptqSettings
from lite.errors import CheckpointError

INPUTS, OUTPUTS = 128, 24


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=generator()) * torch.rand(INPUTS, generator=generator(1)).exp()


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    """Correlated, as activations are, with a few large channels."""
    mixing = torch.randn(INPUTS, INPUTS, generator=generator(2)) / INPUTS**0.5
    scales = torch.ones(INPUTS)
    scales[::17] = 8
    return (torch.randn(1000, INPUTS, generator=generator(3)) @ (mixing + 0.3)) * scales


@pytest.fixture(scope="module")
def hessian(inputs: torch.Tensor) -> torch.Tensor:
    gathered = Hessian(INPUTS)
    gathered.add(inputs, torch.ones(len(inputs)))
    return gathered.take("test")


def loss(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = (weight - rounded).double()
    return float(((difference @ hessian.double()) * difference).sum())


def test_the_hessian_is_the_weighted_mean_of_outer_products(inputs: torch.Tensor) -> None:
    weights = torch.rand(len(inputs), generator=generator(4))
    gathered = Hessian(INPUTS)
    for part in range(0, len(inputs), 300):
        gathered.add(inputs[part : part + 300], weights[part : part + 300])
    expected = torch.einsum("t,tk,tl->kl", weights.double(), inputs.double(), inputs.double()) / weights.double().sum()
    torch.testing.assert_close(gathered.take("x").double(), expected, rtol=1e-4, atol=1e-3)


def test_relative_error_is_that_of_the_outputs(
    weight: torch.Tensor, inputs: torch.Tensor, hessian: torch.Tensor
) -> None:
    rounded = round_to_nearest(weight, Grid(bits=4, group_size=32)).dequantized()
    y, changed = inputs @ weight.T, inputs @ (rounded - weight).T
    expected = float(changed.square().mean().sqrt() / y.square().mean().sqrt())
    assert relative_error(weight, rounded, hessian) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_rounding_to_nearest_is_within_half_a_step(weight: torch.Tensor, bits: int, group_size: int) -> None:
    rounded = round_to_nearest(weight, Grid(bits=bits, group_size=group_size))
    assert rounded.scales.dtype == torch.float16
    assert rounded.scales.shape == (OUTPUTS, INPUTS // group_size)
    assert int(rounded.values.min()) >= -(2 ** (bits - 1))
    assert int(rounded.values.max()) <= 2 ** (bits - 1) - 1
    step = rounded.scales.float().repeat_interleave(group_size, dim=1)
    # A float16 scale a little too small leaves the largest weight a little out of reach.
    assert bool(((rounded.dequantized() - weight).abs() <= step * 0.5 + weight.abs() * 2**-10).all())


@pytest.mark.parametrize("order", ["none", "group"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_every_order_beats_rounding_to_nearest_by_far(
    weight: torch.Tensor, hessian: torch.Tensor, order: str, group_size: int
) -> None:
    grid = Grid(bits=4, group_size=group_size)
    nearest = loss(weight, round_to_nearest(weight, grid).dequantized(), hessian)
    before = weight.clone(), hessian.clone()
    ours = gptq(weight, hessian, grid, GptqSettings(activation_order=order, clip="none", refine=0))  # type: ignore[arg-type]
    assert loss(weight, ours.dequantized(), hessian) < 0.4 * nearest
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_each_trick_buys_something(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    grid = Grid(bits=4, group_size=32)
    losses = [
        loss(weight, gptq(weight, hessian, grid, options).dequantized(), hessian)
        for options in (
            GptqSettings(activation_order="none", clip="none", signs="positive", refine=0),
            GptqSettings(activation_order="none", clip="mse", signs="positive", refine=0),
            GptqSettings(activation_order="group", clip="mse", signs="positive", refine=0),
            GptqSettings(activation_order="group", clip="mse", refine=0),
            GptqSettings(activation_order="group", clip="mse", refine=1),
            GptqSettings(activation_order="group", clip="mse", refine=3),
        )
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.85 * losses[0]


def test_refining_never_makes_a_row_worse(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    grid = Grid(bits=4, group_size=32)
    rows = []
    for refine in range(4):
        difference = weight - gptq(weight, hessian, grid, GptqSettings(refine=refine)).dequantized()
        rows.append(((difference @ hessian) * difference).sum(1))
    for before, after in itertools.pairwise(rows):
        assert bool((after <= before * (1 + 1e-3)).all())


def test_refining_knows_the_gradient_all_along() -> None:
    """It is updated with each change instead of computed anew: over several blocks and groups it must not drift."""
    inputs, outputs = 320, 5
    x = torch.randn(900, inputs, generator=generator(16)) + 0.5
    H, W = x.T @ x / len(x), torch.randn(outputs, inputs, generator=generator(17))
    grid = Grid(bits=4, group_size=64)
    rounded = round_to_nearest(W, grid)
    values, scales = rounded.values.float().T.contiguous(), rounded.scales.float().T.contiguous()

    def exact() -> torch.Tensor:
        expanded = (values.view(-1, 64, outputs) * scales.unsqueeze(1)).flatten(0, 1)
        return H @ (W.T - expanded)

    gradient, before = exact(), values.clone()
    for group in range(len(scales)):
        module._fit_scale(values, scales, gradient, H, grid, group)
        torch.testing.assert_close(gradient, exact(), rtol=1e-3, atol=1e-3)
    for columns in torch.split(torch.randperm(inputs, generator=generator(18)), module.BLOCK_INPUTS):
        module._round_again(values, scales, gradient, H, grid, columns)
        torch.testing.assert_close(gradient, exact(), rtol=1e-3, atol=1e-3)
    assert int((values != before).sum()) > inputs // 4


def test_what_refining_ends_at_no_single_step_improves() -> None:
    """With many passes the integers are optimal one by one: checked by trying every neighbour."""
    W, x = torch.randn(3, 16, generator=generator(5)), torch.randn(200, 16, generator=generator(6))
    H = x.T @ x / len(x)
    grid = Grid(bits=4, group_size=16)
    rounded = gptq(W, H, grid, GptqSettings(refine=30))
    best = loss(W, rounded.dequantized(), H)
    for row, column, step in itertools.product(range(3), range(16), (-1, 1)):
        moved = rounded.values.clone()
        moved[row, column] = int((moved[row, column] + step).clamp(-8, 7))
        other = module.Quantized(values=moved, scales=rounded.scales, grid=grid)
        assert loss(W, other.dequantized(), H) >= best * (1 - 1e-5)


def test_the_factor_is_that_of_the_damped_inverse(hessian: torch.Tensor) -> None:
    order = torch.randperm(INPUTS, generator=generator(7))
    U = module._inverse_factor(hessian, order, "x").double()
    damped = hessian.double()[order][:, order]
    damped += torch.eye(INPUTS) * module.FIRST_DAMPING * hessian.diagonal().mean()
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(INPUTS, dtype=torch.float64), rtol=0, atol=1e-3)
    assert torch.equal(U, U.triu())


def test_damping_rises_until_the_factorisation_succeeds(weight: torch.Tensor) -> None:
    # Far from positive: the smallest eigenvalue is about -0.5 of the mean diagonal.
    H = torch.eye(INPUTS)
    H[0, 1] = H[1, 0] = 1.5
    rounded = gptq(weight, H, Grid(bits=4, group_size=32), GptqSettings(refine=0))
    assert bool(rounded.dequantized().isfinite().all())
    H[0, 1] = H[1, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"layer 3 q_proj: got a Hessian that cannot be factorised.*--method rtn"):
        gptq(weight, H, Grid(bits=4, group_size=32), GptqSettings(), name="layer 3 q_proj")


def test_inputs_that_are_never_seen_are_rounded_to_nearest_and_disturb_nothing(weight: torch.Tensor) -> None:
    x = torch.randn(400, INPUTS, generator=generator(8))
    x[:, 5] = 0
    H = x.T @ x / len(x)
    grid = Grid(bits=4, group_size=32)
    rounded = gptq(weight, H, grid, GptqSettings(activation_order="none", clip="none", refine=1))
    dead = rounded.dequantized()[:, 5] - weight[:, 5]
    assert bool((dead.abs() <= rounded.scales.float()[:, 0].abs() * 0.51 + weight[:, 5].abs() * 2**-10).all())
    other = weight.clone()
    other[:, 5] *= 0.5
    again = gptq(other, H, grid, GptqSettings(activation_order="none", clip="none", refine=0))
    once = gptq(weight, H, grid, GptqSettings(activation_order="none", clip="none", refine=0))
    # The group's scale may follow the changed weight; the other groups must not.
    assert torch.equal(again.values[:, 32:], once.values[:, 32:])


def test_zero_weights_and_zero_inputs_are_fine() -> None:
    rounded = gptq(torch.zeros(8, 32), torch.zeros(32, 32), Grid(bits=8, group_size=32), GptqSettings())
    assert not rounded.dequantized().any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_names_its_linear(poison: float) -> None:
    gathered = Hessian(4)
    gathered.add(torch.tensor([[1.0, poison, 0.0, 0.0]]), torch.ones(1))
    with pytest.raises(CheckpointError, match=r"^model.layers.7.mlp.down_proj: got a Hessian that is not finite"):
        gathered.take("model.layers.7.mlp.down_proj")
    with pytest.raises(CheckpointError, match="got no inputs but zeros"):
        Hessian(4).take("x")
    zeros = Hessian(4)
    zeros.add(torch.zeros(3, 4), torch.ones(3))
    with pytest.raises(CheckpointError, match="got no inputs but zeros"):
        zeros.take("x")


@pytest.mark.parametrize("heads", [None, (2, 16)])
def test_folding_leaves_the_product_and_lowers_the_error(heads: tuple[int, int] | None) -> None:
    channels = 64
    made_by = channels // (heads[0] if heads else 1)
    uneven = torch.randn(made_by, generator=generator(9)).exp()
    spread_in = uneven.view(-1, 1, heads[1]).expand(-1, heads[0], -1).flatten() if heads is not None else uneven
    layer = {
        "up": torch.randn(made_by, 32, generator=generator(10)) * uneven[:, None],
        "down": torch.randn(8, channels, generator=generator(11)) / spread_in,
    }
    grid = Grid(bits=4, group_size=32)
    mean_square = spread_in.square()
    s = propose([layer["down"]], mean_square, grid, heads=heads)
    assert s is not None
    folded = fold(layer, "up", ("down",), s, heads=heads)
    assert is_worth_it([layer["down"]], spread(s, heads), mean_square.diag(), GptqSettings(), grid)

    def whole(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        up = tensors["up"]
        if heads is not None:
            up = up.view(-1, 1, heads[1], 32).expand(-1, heads[0], -1, -1).reshape(channels, 32)
        return tensors["down"] @ up

    torch.testing.assert_close(whole(folded), whole(layer), rtol=1e-4, atol=1e-4)
    error = {
        name: float((round_to_nearest(down, grid).dequantized() - down).div(down.norm()).norm())
        for name, down in (("before", layer["down"]), ("after", folded["down"]))
    }
    rounded = {
        name: whole({**tensors, "down": round_to_nearest(tensors["down"], grid).dequantized()}) - whole(layer)
        for name, tensors in (("before", layer), ("after", folded))
    }
    assert float(rounded["after"].norm()) < 0.8 * float(rounded["before"].norm()), error


def test_folding_a_norm_scales_all_that_read_it() -> None:
    layer = {
        "norm": torch.rand(32, generator=generator(12)) + 0.5,
        "q": torch.randn(8, 32, generator=generator(13)),
        "k": torch.randn(8, 32, generator=generator(14)),
    }
    mean_square = torch.rand(32, generator=generator(15)) * 100
    s = mean_square.sqrt()
    folded = fold(layer, "norm", ("q", "k"), s)
    assert not torch.allclose(folded["norm"], layer["norm"], rtol=0.1)
    for name in "qk":
        torch.testing.assert_close(folded[name] * folded["norm"], layer[name] * layer["norm"])


def test_channels_that_round_well_already_are_left_alone() -> None:
    assert propose([torch.full((8, 32), 0.7)], torch.ones(32), Grid(bits=4, group_size=32)) is None


def test_a_fold_that_gptq_gains_little_by_is_not_taken(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    grid, columns = Grid(bits=4, group_size=32), torch.rand(INPUTS, generator=generator(19)) + 0.5
    assert not is_worth_it([weight], torch.ones(INPUTS), hessian, GptqSettings(), grid)
    assert not is_worth_it([weight], columns, hessian, GptqSettings(), grid)
    # Undoing what was done to a weight's columns is worth a lot, and only then.
    uneven = torch.ones(INPUTS)
    uneven[::9] = 40
    spoilt, seen = weight * uneven, hessian / uneven / uneven.unsqueeze(1)
    assert is_worth_it([spoilt], 1 / uneven, seen, GptqSettings(), grid)


@pytest.mark.parametrize("group_size", [32, INPUTS])
def test_a_scale_below_zero_serves_a_group_whose_largest_weight_is_positive(group_size: int) -> None:
    grid = Grid(bits=4, group_size=group_size)
    W = torch.rand(OUTPUTS, INPUTS, generator=generator(20)) - 0.5
    W[:, ::32] = 1.0  # in each group the largest, above zero
    W[: OUTPUTS // 2] *= -1
    either = round_to_nearest(W, grid, clip="none", signs="either")
    positive = round_to_nearest(W, grid, clip="none")
    assert bool((positive.scales > 0).all())
    # By chance the coarser grid fits a group better now and then.
    assert float((either.scales[: OUTPUTS // 2] > 0).float().mean()) > 0.7
    assert float((either.scales[OUTPUTS // 2 :] < 0).float().mean()) > 0.7
    assert float((either.values[:, ::32] == grid.lowest).float().mean()) > 0.7
    assert float((either.dequantized() - W).norm()) < 0.95 * float((positive.dequantized() - W).norm())


def test_scales_of_either_sign_buy_something_and_are_refined_with_their_sign(
    weight: torch.Tensor, hessian: torch.Tensor
) -> None:
    grid = Grid(bits=4, group_size=32)
    either, positive = (gptq(weight, hessian, grid, GptqSettings(signs=signs)) for signs in ("either", "positive"))  # type: ignore[arg-type]
    assert bool((positive.scales > 0).all())
    assert 0.2 < float((either.scales < 0).float().mean()) < 0.8
    assert loss(weight, either.dequantized(), hessian) < 0.95 * loss(weight, positive.dequantized(), hessian)


@pytest.mark.parametrize("sign", [1, -1])
def test_fitting_moves_a_scale_to_its_best_and_keeps_its_sign(sign: int, hessian: torch.Tensor) -> None:
    grid = Grid(bits=4, group_size=INPUTS)
    values = torch.randint(-8, 8, (INPUTS, 3), generator=generator(21)).float()
    W = values * 0.5 * sign
    scales = torch.full((1, 3), 0.4 * sign)
    module._fit_scale(values, scales, hessian @ (W - values * scales), hessian, grid, 0)
    torch.testing.assert_close(scales, torch.full((1, 3), 0.5 * sign), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("left", "worth"), [(0.7, True), (0.9, False)])
def test_a_fold_has_to_leave_much_less(left: float, worth: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives = iter([1.0, left])
    monkeypatch.setattr(folding, "_objective", lambda *_: next(objectives))
    W, ones = torch.ones(4, INPUTS), torch.ones(INPUTS)
    assert is_worth_it([W], ones, ones.diag(), GptqSettings(), Grid(bits=4, group_size=32)) is worth
