"""A hospital's LoRA as it is found: whichever PEFT wrote it, each factor is read, or what is wrong is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import hospital
import pytest
import torch
from torch import Tensor

from export.source.adapter import AdapterSource, Together, Undone, open_adapter
from export.source.checkpoint import Checkpoint, projector_shapes
from lite.errors import CheckpointError

Factors = dict[str, Tensor]


@pytest.fixture(scope="module")
def factors(source: Checkpoint) -> Factors:
    return hospital.random_factors(source.decoder)


def opened(source: Checkpoint, folder: Path) -> AdapterSource:
    return open_adapter(folder, source.decoder, projector_shapes(source.decoder, source.tower))


def renamed(factors: Factors, change: Callable[[str], str]) -> Factors:
    return {change(name): factor for name, factor in factors.items()}


def copied(factors: Factors) -> Factors:
    return {name: factor.clone() for name, factor in factors.items()}


FORMS: dict[str, Callable[[str], str]] = {
    "as published": lambda name: name,
    "PEFT in memory": lambda name: name.replace(".weight", ".default.weight"),
    "without the prefix": lambda name: name.removeprefix(hospital.PREFIX),
    "of a LLaVA in transformers": lambda name: name.replace("model.model.model.", "model.model.language_model.model."),
    "of a newer one": lambda name: name.replace("model.model.model.", "model.model.model.language_model."),
    "a parameter": lambda name: name.removesuffix(".weight"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_every_naming_gives_the_same_pairs(
    source: Checkpoint, factors: Factors, tmp_path: Path, name: str, form: str
) -> None:
    adapter = opened(source, hospital.write_folder(tmp_path / "a", renamed(factors, FORMS[name]), form=form))
    for layer in range(source.decoder.num_hidden_layers):
        pairs = adapter.pairs(layer)
        assert len(pairs) == 7
        for linear, pair in pairs.items():
            module = f"{hospital.PREFIX}model.layers.{layer}.{linear}"
            assert torch.equal(pair.a, factors[f"{module}.lora_A.weight"])
            assert torch.equal(pair.b, factors[f"{module}.lora_B.weight"])
            assert pair.scale == 2.0
    assert adapter.projector is None


def test_some_linears_of_some_layers_are_taken_where_the_configuration_allows_it(
    source: Checkpoint, factors: Factors, tmp_path: Path
) -> None:
    some = {name: factor for name, factor in factors.items() if "layers.1.mlp.up_proj" in name}
    adapter = opened(source, hospital.write_folder(tmp_path / "a", some, target_modules="all-linear"))
    assert adapter.pairs(0) == {}
    assert list(adapter.pairs(1)) == ["mlp.up_proj"]
    with pytest.raises(CheckpointError, match=r"got no tensor '.*layers\.0\..*' \(and \d+ more\)"):
        opened(source, hospital.write_folder(tmp_path / "b", some))


def test_a_rank_of_its_own_is_that_of_its_tensors(source: Checkpoint, factors: Factors, tmp_path: Path) -> None:
    changed = dict(factors)
    for name in factors:
        if ".q_proj.lora_A" in name:
            changed[name] = factors[name][:2].contiguous()
        elif ".q_proj.lora_B" in name:
            changed[name] = factors[name][:, :2].contiguous()
    adapter = opened(
        source, hospital.write_folder(tmp_path / "a", changed, r=4, lora_alpha=8, rank_pattern={"q_proj": 2})
    )
    pairs = adapter.pairs(0)
    assert (len(pairs["self_attn.q_proj"].a), pairs["self_attn.q_proj"].scale) == (2, 4.0)
    assert (len(pairs["self_attn.k_proj"].a), pairs["self_attn.k_proj"].scale) == (4, 2.0)
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.weight' of shape \[2, \d+\] · expected \[4,"):
        opened(source, hospital.write_folder(tmp_path / "b", changed, r=4))


@pytest.mark.parametrize("inside", [True, False])
def test_a_projector_is_found_wherever_it_lies(
    source: Checkpoint, factors: Factors, tmp_path: Path, *, inside: bool
) -> None:
    shapes = projector_shapes(source.decoder, source.tower)
    projector = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
    whole = factors | projector if inside else factors
    folder = hospital.write_folder(tmp_path / "a", whole, projector=None if inside else projector)
    adapter = opened(source, folder)
    assert adapter.read_projector().keys() == {f"projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert len(adapter.files) == (2 if inside else 3)
    torch.save(projector, folder / "non_lora_trainables.bin")
    if inside:
        with pytest.raises(CheckpointError, match="a projector among the factors and one in non_lora_trainables"):
            opened(source, folder)
    twice = projector | {name.removeprefix(hospital.PREFIX): tensor for name, tensor in projector.items()}
    with pytest.raises(CheckpointError, match=r"'model.mm_projector.0.weight' and another name of the same tensor"):
        opened(source, hospital.write_folder(tmp_path / "b", factors, projector=copied(twice)))


def test_a_projector_that_was_trained_and_is_not_there_is_missed(
    source: Checkpoint, factors: Factors, tmp_path: Path
) -> None:
    folder = hospital.write_folder(tmp_path / "a", factors, modules_to_save=["mm_projector"])
    with pytest.raises(CheckpointError, match=r"the projector: got no tensor '.*mm_projector.0.weight' \(and 3 more\)"):
        opened(source, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {**f, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, "'base_model.model.lm_head.weight' "),
        (lambda f: {**f, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 2)}, "layers.9"),
        (lambda f: {k: v for k, v in f.items() if "0.mlp.up_proj.lora_B" not in k}, "got no tensor .*up_proj.lora_B"),
        (lambda f: f | renamed(copied(f), FORMS["PEFT in memory"]), "another name of the same tensor .* two adapters"),
        (lambda f: {k: v.int() for k, v in f.items()}, "as I32 · expected floating point"),
        (lambda f: {k: v[:, :3].contiguous() for k, v in f.items()}, r"expected \["),
    ],
)
def test_other_tensors_are_refused_by_name(
    source: Checkpoint, factors: Factors, tmp_path: Path, change: Callable[[Factors], Factors], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(source, hospital.write_folder(tmp_path / "a", change(dict(factors)), r=4))


def test_a_damaged_factor_is_named_when_it_is_read(source: Checkpoint, factors: Factors, tmp_path: Path) -> None:
    broken = dict(factors)
    name = f"{hospital.PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"
    broken[name] = torch.full_like(factors[name], torch.inf)
    adapter = opened(source, hospital.write_folder(tmp_path / "a", broken))
    with pytest.raises(CheckpointError, match=f"NaN or infinity in '{re.escape(name)}'"):
        adapter.pairs(1)


def test_together_adds_and_undone_takes_away(source: Checkpoint, factors: Factors, tmp_path: Path) -> None:
    adapter = opened(source, hospital.write_folder(tmp_path / "a", factors))
    x = torch.randn(3, source.decoder.hidden_size, generator=torch.Generator().manual_seed(0))
    ours, theirs = (of.pairs(0)["self_attn.q_proj"] for of in (adapter, source.adapter))
    products = [pair.scale * (x @ pair.a.float().T) @ pair.b.float().T for pair in (ours, theirs)]
    expected = products[0] - products[1]
    both = Together((adapter, Undone(source.adapter))).pairs(0)["self_attn.q_proj"]
    assert len(both.a) == len(ours.a) + len(theirs.a)
    torch.testing.assert_close(both.apply(x), expected, rtol=1e-4, atol=1e-4)
    assert Together(()).pairs(0) == {}
