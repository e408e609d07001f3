"""LoRA: what an adapter may be, and how it is merged.

The published model is base + LoRA: each decoder linear computes `W x + s · B (A x)` with s = lora_alpha / r. Merging
writes `W + s · B A` once, in float32, and rounds once. (Merging in 16 bit, or merging into quantised weights, is how
other loaders of this model go wrong.)
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import torch

from lite.errors import CheckpointError

if TYPE_CHECKING:
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
_READ: Final = frozenset({"peft_type", "bias", "r", "lora_alpha", "target_modules", "init_lora_weights"})
_INITS: Final = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin a training that leave the base as it is.

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take out of it what they put into the factors: the adapter is wrong on the base
as published.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The part of `adapter_config.json` that a merge depends on."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    base_model_name_or_path: str

    @property
    def scale(self) -> float:
        """The factor in front of B·A."""
        return self.lora_alpha / self.r

    @property
    def linears(self) -> tuple[str, ...]:
        """The adapted linears of each layer, named as in `LINEARS`."""
        return tuple(name for name in LINEARS if name.rpartition(".")[2] in self.target_modules)

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
        for name in sorted(config.keys() - _HARMLESS - _READ):
            if config[name] not in (None, False, "", [], {}):
                msg = f"{where}: got {name}={config[name]!r} · expected a plain LoRA: beside what it is made of, only "
                msg += f"{', '.join(sorted(_HARMLESS))} may be set"
                raise CheckpointError(f"{msg} · merging it as a plain one would be wrong: merge it with PEFT first")
        if (init := config.get("init_lora_weights")) not in _INITS:
            msg = f"{where}: got init_lora_weights={init!r}, which has changed the base it was trained on · expected "
            msg += f"one of {', '.join(map(str, _INITS))} · convert it with PEFT (save_pretrained with "
            raise CheckpointError(f"{msg}path_initial_model_for_weight_conversion), or merge it with PEFT first")
        r, lora_alpha = config.get("r"), config.get("lora_alpha")
        if (
            type(r) is not int
            or r < 1
            or isinstance(lora_alpha, bool)
            or not isinstance(lora_alpha, int | float)
            or not 0 < lora_alpha < 2**31
        ):
            msg = f"{where}: got {r=} {lora_alpha=} · expected two positive numbers · fetch the file again"
            raise CheckpointError(msg)
        known = {name.rpartition(".")[2] for name in LINEARS}
        targets = config.get("target_modules")
        if not isinstance(targets, list) or not targets or any(target not in known for target in map(str, targets)):
            msg = f"{where}: got target_modules={targets!r} · expected a list out of {sorted(known)}"
            raise CheckpointError(f"{msg} · this adapter is for another architecture")
        return cls(
            r=r,
            lora_alpha=float(lora_alpha),
            target_modules=tuple(targets),
            base_model_name_or_path=str(config.get("base_model_name_or_path", "")),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoraPair:
    """The two factors of one linear's update, and the factor in front."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float

    def apply(self, x: Tensor) -> Tensor:
        """Compute the update's output without merging: s · B (A x)."""
        return self.scale * torch.nn.functional.linear(torch.nn.functional.linear(x, self.a), self.b)


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
