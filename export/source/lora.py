"""LoRA: what an adapter may be, and how it is merged.

The published model is base + LoRA: each decoder linear computes `W x + s · B (A x)` with s = lora_alpha / r. Merging
writes `W + s · B A` once, in float32, and rounds once. (Merging in 16 bit, or merging into quantised weights, is how
other loaders of this model go wrong.) A hospital's own adapter is not merged: see `export.adapter`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import torch

from lite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

LINEARS: Final = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The linear maps of one Llama layer, in the order they are run."""

_HARMLESS: Final = frozenset({
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "task_type"),
})  # fmt: skip
"""Settings of PEFT that change no merge, whatever they say; any other must be off: null, false or empty."""
_LAYERS: Final = ("exclude_modules", "layers_pattern", "layers_to_transform")
"""Settings that leave linears out. Which are adapted is told by the tensors, too."""
_READ: Final = frozenset({
    *("peft_type", "bias", "r", "lora_alpha", "target_modules", "init_lora_weights", "modules_to_save", "use_rslora"),
    *("rank_pattern", "alpha_pattern", *_LAYERS),
})  # fmt: skip
_INITS: Final = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin a training that leave the base as it is.

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take out of it what they put into the factors: the adapter is wrong on the base
as published.
"""
_PROJECTORS: Final[tuple[Any, ...]] = (None, [], ["mm_projector"])
"""What may be trained whole beside the LoRA."""
_MODULE: Final = re.compile(r"\^?((?:\w|\\?\.)+)\$?")
"""A key of a pattern: the end of a module's name. Other regular expressions are not run: some never end."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The part of `adapter_config.json` that a merge depends on."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | None  # None: those that there are tensors for
    base_model_name_or_path: str
    saves_projector: bool = False  # beside the factors
    use_rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)

    def rank(self, module: str) -> int:
        """Return the rank of a module such as `model.layers.0.self_attn.q_proj`."""
        return int(_of_module(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """Return the factor in front of B·A."""
        rank, alpha = self.rank(module), _of_module(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def linears(self) -> tuple[str, ...] | None:
        """The adapted linears of each layer, named as in `LINEARS`; None: those that there are tensors for."""
        targets = self.target_modules
        return targets and tuple(name for name in LINEARS if name.rpartition(".")[2] in targets)

    @property
    def base_name(self) -> str:
        """What the base calls itself, without the folder or the account before it; "" where that is not said."""
        return self.base_model_name_or_path.rstrip("/").rpartition("/")[2]

    @classmethod
    def from_json(cls, config: dict[str, Any], *, where: str) -> AdapterConfig:
        """Read a PEFT configuration.

        Raises:
            CheckpointError: It is no LoRA, or uses a feature whose merge is not implemented here.
        """
        peft_type, bias = config.get("peft_type"), config.get("bias", "none")
        if peft_type != "LORA" or bias != "none":
            msg = f"{where}: got {peft_type=} {bias=} · expected peft_type 'LORA' and bias 'none' · merge it with PEFT"
            raise CheckpointError(msg)
        _refuse_features(config, where)
        r, lora_alpha = config.get("r"), config.get("lora_alpha")
        if type(r) is not int or r < 1 or not _is_alpha(lora_alpha):
            msg = f"{where}: got {r=} {lora_alpha=} · expected two positive numbers · fetch the file again"
            raise CheckpointError(msg)
        ranks, alphas = (_pattern(config, name, where) for name in ("rank_pattern", "alpha_pattern"))
        if not all(float(rank).is_integer() for rank in ranks.values()):
            raise CheckpointError(f"{where}: got rank_pattern={ranks} · expected whole numbers · fetch the file again")
        return cls(
            r=r,
            lora_alpha=float(lora_alpha),
            target_modules=_targets(config, where),
            base_model_name_or_path=str(config.get("base_model_name_or_path") or ""),
            saves_projector=bool(config.get("modules_to_save")),
            use_rslora=bool(config.get("use_rslora")),
            rank_pattern={name: int(rank) for name, rank in ranks.items()},
            alpha_pattern=alphas,
        )


def _refuse_features(config: dict[str, Any], where: str) -> None:
    """Refuse whatever makes it more than a plain LoRA."""
    for name in sorted(config.keys() - _HARMLESS - _READ):
        if config[name] not in (None, False, "", [], {}):
            msg = f"{where}: got {name}={config[name]!r} · expected a plain LoRA: beside what it is made of, only "
            msg += f"{', '.join(sorted(_HARMLESS))} may be set"
            raise CheckpointError(f"{msg} · merging it as a plain one would be wrong: merge it with PEFT first")
    if (rslora := config.get("use_rslora")) not in (None, True, False):
        raise CheckpointError(f"{where}: got use_rslora={rslora!r} · expected true or false · fetch the file again")
    if (saved := config.get("modules_to_save")) not in _PROJECTORS:
        msg = f"{where}: got modules_to_save={saved!r} · expected none, or mm_projector alone · other weights than"
        raise CheckpointError(f"{msg} the projector's are not taken from an adapter: merge it with PEFT first")
    if (init := config.get("init_lora_weights")) not in _INITS:
        msg = f"{where}: got init_lora_weights={init!r}, which has changed the base it was trained on · expected "
        msg += f"one of {', '.join(map(str, _INITS))} · convert it with PEFT (save_pretrained with "
        raise CheckpointError(f"{msg}path_initial_model_for_weight_conversion), or merge it with PEFT first")


def _is_alpha(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31


def _targets(config: dict[str, Any], where: str) -> tuple[str, ...] | None:
    """Return the names that each layer's adapted linears end with; None where the tensors have to tell."""
    known = {name.rpartition(".")[2] for name in LINEARS}
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets:
        return None  # a regular expression, or "all-linear"
    names = [str(target).rpartition(".")[2] for target in targets] if isinstance(targets, list) else []
    if not names or not known.issuperset(names):
        msg = f"{where}: got target_modules={targets!r} · expected a list out of {sorted(known)}"
        raise CheckpointError(f"{msg} · this adapter is for another architecture")
    is_restricted = any(config.get(name) not in (None, "", []) for name in _LAYERS)
    return None if is_restricted or any("." in target for target in targets or ()) else tuple(names)


def _pattern(config: dict[str, Any], name: str, where: str) -> dict[str, float]:
    """Read what holds for modules whose names end in some way."""
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict) or not all(_is_alpha(value) for value in pattern.values()):
        msg = f"{where}: got {name}={pattern!r} · expected positive numbers by module · fetch the file again"
        raise CheckpointError(msg)
    if odd := [key for key in pattern if not _MODULE.fullmatch(key)]:
        msg = f"{where}: got {name} for {odd[0]!r} · expected names of modules, as regular expressions are not run"
        raise CheckpointError(f"{msg} · name each module, or merge it with PEFT first")
    return {key.rstrip("$").replace("\\.", "."): float(value) for key, value in pattern.items()}


def _of_module(pattern: Mapping[str, float], module: str, otherwise: float) -> float:
    """Return the first value whose key is the end of the module's name, or behind a ^ all of it; so does PEFT."""
    keys = (key for key in pattern if f".{module}".endswith(f".{key}") or key == f"^{module}")
    return next((pattern[key] for key in keys), otherwise)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoraPair:
    """The two factors of one linear's update, and the factor in front."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float

    def apply(self, x: Tensor) -> Tensor:
        """Compute the update's output without merging: s · B (A x)."""
        return self.scale * torch.nn.functional.linear(torch.nn.functional.linear(x, self.a), self.b)


def side_by_side(pairs: Sequence[LoraPair]) -> LoraPair:
    """Return the sum of several updates of one linear as one, float32, its scale in B."""
    a = torch.cat([pair.a.float() for pair in pairs])
    return LoraPair(a=a, b=torch.cat([pair.scale * pair.b.float() for pair in pairs], dim=1), scale=1.0)


def merge(weight: Tensor, pair: LoraPair | None) -> Tensor:
    """Merge a LoRA pair into a linear weight, in float32.

    Args:
        weight: [out, in], any floating dtype.
        pair: The update, or None for a linear that has none. (Its shapes are those of `export.source.shapes`.)

    Returns:
        A new float32 tensor `W + s · B A`; rounding it is up to the caller, once.
    """
    merged = weight.to(torch.float32, copy=True)
    if pair is None:
        return merged
    return merged.addmm_(pair.b.to(torch.float32), pair.a.to(torch.float32), alpha=pair.scale)
