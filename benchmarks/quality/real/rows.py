"""The ways to round that are compared, by name. Tricks are those of `benchmarks.quality.recipes.TRICKS`, nowhere else.

Most are command lines of the exporter, read by its own parser. To add one: a recipe in `_exported`, a function of a
weight in `_others`, or a rounding by the Hessian in `experiments.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from benchmarks.exports import Recipe
from benchmarks.quality.real.experiments import EXPERIMENTS, rounded_beyond
from benchmarks.quality.real.peer import peers
from benchmarks.quality.real.rounding import Calibrated, Plain, Rounding, Setup, Skipped, Way, by_settings
from benchmarks.quality.real.smollm2 import import_gguf
from benchmarks.quality.recipes import ablation, alone, gptq_recipe
from export.__main__ import read_settings
from export.source.shapes import layer_shapes
from export.write.decoder import require_divisible
from lite.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from export.quantize.layerwise import RoundsLinear
    from export.settings import ExportSettings

DEFAULT: Final = "default"
"""The row that the others are set beside: what the exporter does by itself in 4 bits."""


def ways(group_size: int, interop_python: Path) -> list[Way]:
    """Return all ways, `DEFAULT` first; those without a group size in their name have this one.

    `interop_python` is that of the environment of `make interop`.
    """
    found = [*_exported(group_size), *_others(), *peers(group_size, interop_python)]
    for name, (options, rounds) in EXPERIMENTS.items():
        settings = _settings(
            Recipe(name=name, options=(*gptq_recipe(4, group_size).options, *options), calibrated=True)
        )
        found.append(Way(name=name, make=partial(_beyond, settings, rounds)))
    return found


def _settings(recipe: Recipe) -> ExportSettings:
    return read_settings([*recipe.options, *(("--calibration-data", "text") if recipe.calibrated else ())])


def _beyond(settings: ExportSettings, rounds: Callable[[Setup], RoundsLinear], setup: Setup) -> Rounding:
    _require_fits(setup, settings)
    return rounded_beyond(setup, settings, rounds(setup))


def _exported(group_size: int) -> Iterator[Way]:
    """Yield what the exporter can do, none twice under two names."""
    rest = ablation(group_size)
    recipes: list[Recipe] = [_named(DEFAULT, gptq_recipe(4, group_size))]
    recipes += [_named("rtn", gptq_recipe(4, group_size, "rtn")), *rest, *alone(group_size)]
    recipes += [gptq_recipe(4, size) for size in (32, 64, 128)]
    recipes += [_named("int8", gptq_recipe(8, group_size)), _named("int8-rtn", gptq_recipe(8, group_size, "rtn"))]
    recipes += [Recipe(name=f"bnb-{kind}", options=("--decoder", f"bnb-{kind}")) for kind in ("nf4", "int8")]
    seen: list[ExportSettings] = []
    for recipe in recipes:
        settings = _settings(recipe)
        if settings not in seen:
            seen.append(settings)
            yield _way(recipe, settings)


def _named(name: str, recipe: Recipe) -> Recipe:
    return Recipe(name=name, options=recipe.options, calibrated=recipe.calibrated)


def _way(recipe: Recipe, settings: ExportSettings) -> Way:
    def make(setup: Setup) -> Rounding:
        _require_fits(setup, settings)
        return Calibrated(setup, settings) if recipe.calibrated else Plain(by_settings(settings), setup.device)

    return Way(name=recipe.name, make=make, usual=not recipe.name.startswith("full-without"))


def _require_fits(setup: Setup, settings: ExportSettings) -> None:
    try:
        require_divisible(layer_shapes(setup.decoder.config), settings)
    except CheckpointError as error:
        raise Skipped(str(error)) from error


def _others() -> Iterator[Way]:
    """Yield grids of other programs, by these programs' own functions."""
    yield Way(name="q4_0", make=lambda setup: Plain(_q4_0, setup.device))


def _q4_0(weight: Tensor) -> tuple[Tensor, float]:
    """Round as llama.cpp does to Q4_0: blocks of 32, a float16 scale of the sign of the largest weight."""
    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType.Q4_0
    stored = gguf.quantize(weight.cpu().numpy(), kind)
    return torch.from_numpy(gguf.dequantize(stored, kind)).to(weight.device), 8 * stored.nbytes
