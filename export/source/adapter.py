"""A LoRA as PEFT or LLaVA's scripts have left it: a folder with its configuration, its factors, perhaps a projector.

adapter_config.json              see `export.source.lora.AdapterConfig`
adapter_model.safetensors, .bin  the factors, under the names of one PEFT version or another
non_lora_trainables.bin          the projector, if LLaVA's scripts have trained it (PEFT keeps it with the factors)
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Final, Protocol

from export.source.lora import AdapterConfig, LoraPair, side_by_side
from export.source.shapes import ADAPTER_PREFIX, adapter_shapes, linear_shapes
from export.source.tensors import TensorEntry, TensorFiles, open_tensors, read_json
from lite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lite.config import DecoderConfig

PROJECTOR_PREFIX: Final = "base_model.model.model.mm_projector."
_PROJECTOR_STEM: Final = "non_lora_trainables"
_FACTOR: Final = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?(?:language_model\.)?(?:model\.)?(layers\.\d+\.\w+\.\w+)\.lora_([AB])"
    r"(?:\.default)?(?:\.weight)?"
)
_PROJECTOR: Final = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?mm_projector\.(?:modules_to_save\.)?(?:default\.)?(\d\.(?:weight|bias))"
)


class HasPairs(Protocol):
    """What gives the LoRA pairs of a layer."""

    def pairs(self, layer: int) -> dict[str, LoraPair]:
        """Return them by the name of the linear: "self_attn.q_proj"."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """An open LoRA: its configuration read, its tensors indexed and checked, not yet read."""

    config: AdapterConfig
    factors: TensorFiles
    projector: TensorFiles | None  # under the names of `projector_shapes`
    files: tuple[Path, ...]

    def pairs(self, layer: int) -> dict[str, LoraPair]:
        """Read the pairs of a layer, in the dtype they are stored in."""
        prefix = f"{ADAPTER_PREFIX}model.layers.{layer}."
        keys = [key for key in self.factors.entries if key.startswith(prefix)]
        tensors = self.factors.read(keys)
        modules = {key.removeprefix(ADAPTER_PREFIX).rpartition(".lora_")[0] for key in keys}
        return {
            module.split(".", 3)[3]: LoraPair(
                a=tensors[f"{ADAPTER_PREFIX}{module}.lora_A.weight"],
                b=tensors[f"{ADAPTER_PREFIX}{module}.lora_B.weight"],
                scale=self.config.scale(module),
            )
            for module in sorted(modules)
        }

    def read_projector(self) -> dict[str, Tensor]:
        """Read the projector, as `projector.0.weight` and so on; nothing where there is none."""
        if self.projector is None:
            return {}
        tensors = self.projector.read(self.projector.entries)
        return {f"projector.{name.removeprefix(PROJECTOR_PREFIX)}": tensor for name, tensor in tensors.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Together:
    """Several LoRAs on one base, which add up: one trained on top of the others."""

    sources: Sequence[HasPairs]

    def pairs(self, layer: int) -> dict[str, LoraPair]:
        """Return the sums."""
        found: dict[str, list[LoraPair]] = {}
        for source in self.sources:
            for linear, pair in source.pairs(layer).items():
                found.setdefault(linear, []).append(pair)
        return {linear: side_by_side(pairs) for linear, pairs in found.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Undone:
    """What takes a LoRA out of weights into which it was merged."""

    source: HasPairs

    def pairs(self, layer: int) -> dict[str, LoraPair]:
        """Return the pairs, their signs turned."""
        return {name: dataclasses.replace(pair, scale=-pair.scale) for name, pair in self.source.pairs(layer).items()}


def open_adapter(folder: Path, decoder: DecoderConfig, projector: Mapping[str, tuple[int, ...]]) -> AdapterSource:
    """Open a LoRA, and check its tensors against its configuration and the decoder's shape.

    Args:
        folder: Of the LoRA.
        decoder: What it is for.
        projector: Name and shape of the projector's tensors, if it has them.

    Raises:
        CheckpointError: A file or tensor is not what it should be; the message says which, and what to do.
    """
    file = folder / "adapter_config.json"
    config = AdapterConfig.from_json(read_json(file, what="the LoRA"), where=str(file))
    stored = open_tensors(folder, "adapter_model", what="the LoRA adapter")
    factors, own = _named(stored)
    has = {key.removeprefix(ADAPTER_PREFIX).rpartition(".lora_")[0] for key in factors.entries}
    shapes = adapter_shapes(decoder, config, has)
    if not shapes:
        msg = (
            f"{folder}: got a LoRA without factors · expected some, of the linears {', '.join(linear_shapes(decoder))}"
        )
        raise CheckpointError(f"{msg[:200]} … · this is another model's adapter, or not one")
    factors.require(shapes)
    files = [file, *stored.files]
    trained = [suffix for suffix in (".bin", ".safetensors") if (folder / f"{_PROJECTOR_STEM}{suffix}").is_file()]
    if trained and own.entries:
        msg = f"{folder}: got a projector among the factors and one in {_PROJECTOR_STEM}{trained[0]} · expected one"
        raise CheckpointError(f"{msg} · remove the one that is not meant")
    if trained:
        rest, own = _named(open_tensors(folder, _PROJECTOR_STEM, what="the projector"))
        rest.require({})
        files += own.files
    if own.entries or config.saves_projector:
        own.require(projector)
    return AdapterSource(
        config=config, factors=factors, projector=own if own.entries else None, files=tuple(dict.fromkeys(files))
    )


def _named(stored: TensorFiles) -> tuple[TensorFiles, TensorFiles]:
    """Give factors, and the projector among them, one name each, whichever PEFT has written them."""
    factors: dict[str, TensorEntry] = {}
    projector: dict[str, TensorEntry] = {}
    for name, entry in stored.entries.items():
        named, own = factors, name
        if match := _FACTOR.fullmatch(name):
            own = f"{ADAPTER_PREFIX}model.{match[1]}.lora_{match[2]}.weight"
        elif match := _PROJECTOR.fullmatch(name):
            named, own = projector, f"{PROJECTOR_PREFIX}{match[1]}"
        if own in named:
            msg = f"{entry.file}: got {name!r} and another name of the same tensor · expected it once"
            raise CheckpointError(f"{msg} · the file holds two adapters: save the one that is meant")
        named[own] = entry
    return TensorFiles(factors, what=stored.what), TensorFiles(projector, what="the projector")
