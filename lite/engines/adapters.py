"""Adapters as the engines take them: the low-rank factors of several, side by side for each linear.

    y += B[slot] (A[slot] x)        slot: which adapter a row uses, `NO_ADAPTER` for none

A file has float16 tensors such as `model.layers.0.self_attn.q_proj.lora_A` [rank, in] and `….lora_B` [out, rank]; the
scale is in B. An engine computes q, k and v as one linear, and gate and up as another: a `Stack` has the factors of all
parts of such a linear, of all adapters, padded with zeros to one rank.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lite.errors import ArtifactError, BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lite.artifact.open import Artifact
    from lite.config import DecoderConfig

    Array = np.ndarray[Any, np.dtype[Any]]

FACTORS: Final = ("lora_A", "lora_B")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The factors of all adapters for one linear, perhaps of several parts."""

    a: Array  # float16 [S, P * rank, in]: of each adapter the A of each part, one below the other
    b: Array  # float16 [S, out, rank]: of each adapter the B of each part, one below the other
    parts: tuple[int, ...]  # the outputs of each part: P numbers, their sum is out

    @property
    def rank(self) -> int:
        """The rank of each part."""
        return int(self.b.shape[2])


class Adapters:
    """Some adapters of an artifact. Their files are read when an engine asks for a linear."""

    def __init__(self, artifact: Artifact, names: Sequence[str]) -> None:
        """Look at their files.

        Raises:
            ArtifactError: a file cannot be read, or its tensors do not belong to this decoder, or are of another rank
                than the manifest says.
            BackendUnavailable: safetensors is not installed.
            LiteError: there is no such adapter.
        """
        self.names = tuple(names)
        parts = [artifact.adapter_part(name) for name in names]
        self._files = [artifact.file(part.factors) for part in parts]
        linears = dict(_linears(artifact.decoder_config()))
        self._has = [_check(file, linears, part.rank) for file, part in zip(self._files, parts, strict=True)]

    def stack(self, parts: Mapping[str, int], in_features: int) -> Stack | None:
        """Return the factors of a linear.

        Args:
            parts: the outputs of each part, by its full name: `model.layers.0.self_attn.q_proj`.
            in_features: the inputs.

        Returns:
            The stack; None where no adapter changes the linear.

        Raises:
            ArtifactError: a factor has NaN or infinity.
        """
        found: dict[tuple[int, int], tuple[Array, Array]] = {}
        for slot, (file, has) in enumerate(zip(self._files, self._has, strict=True)):
            if wanted := [(place, part) for place, part in enumerate(parts) if part in has]:
                with _opened(file) as tensors:
                    for place, part in wanted:
                        a, b = (tensors.get_tensor(f"{part}.{factor}") for factor in FACTORS)
                        if not (np.isfinite(a).all() and np.isfinite(b).all()):
                            raise _damaged(file, f"NaN or infinity in the factors of {part}", "numbers")
                        found[slot, place] = a, b
        if not found:
            return None
        widths, rank = list(parts.values()), max(len(a) for a, _ in found.values())
        stacked_a = np.zeros((len(self.names), len(widths), rank, in_features), np.float16)
        stacked_b = np.zeros((len(self.names), sum(widths), rank), np.float16)
        for (slot, place), (a, b) in found.items():
            begin = sum(widths[:place])
            stacked_a[slot, place, : len(a)] = a
            stacked_b[slot, begin : begin + widths[place], : len(a)] = b
        return Stack(a=stacked_a.reshape(len(self.names), -1, in_features), b=stacked_b, parts=tuple(widths))


def adapters_to_load(asked: Sequence[str], artifact: Artifact) -> tuple[tuple[str, ...], str]:
    """Return the adapters to load, and why: those asked for, and what requests get that name none.

    Raises:
        LiteError: there is none of a name.
    """
    default = artifact.manifest.parts.default_adapter
    names = tuple(dict.fromkeys((*([] if default is None else [default]), *asked)))
    for name in names:
        artifact.adapter_part(name)
    whys = (["asked for"] if asked else []) + ([] if default is None else [f"{default} is for requests that name none"])
    return names, "; ".join(whys)


def _linears(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (out, in) of each linear that an adapter may change."""
    from lite.memory.counts import layer_linear_shapes

    for layer in range(config.num_hidden_layers):
        for name, shape in layer_linear_shapes(config).items():
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            yield f"model.layers.{layer}.{block}.{name}", shape


def _check(file: Path, linears: Mapping[str, tuple[int, int]], rank: int) -> frozenset[str]:
    """Return the linears that a file has factors for, or refuse it."""
    shapes: dict[str, tuple[int, ...]] = {}
    with _opened(file) as tensors:
        for key in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
            part = tensors.get_slice(key)
            if part.get_dtype() != "F16":
                raise _damaged(file, f"{key} as {part.get_dtype()}", "float16")
            shapes[key] = tuple(part.get_shape())
    owners = {key.rpartition(".")[0] for key in shapes}
    for owner in sorted(owners):
        a, b = (shapes.get(f"{owner}.{factor}", ()) for factor in FACTORS)
        out_features, in_features = linears.get(owner, (0, 0))
        if len(a) != 2 or not a[0] or (a[1:], b) != ((in_features,), (out_features, a[0])):
            raise _damaged(file, f"{owner} with factors {list(a)} and {list(b)}", f"[rank, {in_features}] and "
                           f"[{out_features}, rank]" if in_features else "a linear of the decoder")  # fmt: skip
    if len(shapes) != 2 * len(owners) or not owners:
        raise _damaged(file, f"{len(shapes)} tensors", "lora_A and lora_B of some linears")
    if rank != (largest := max(shapes[f"{owner}.lora_A"][0] for owner in owners)):  # memory is planned by it
        raise _damaged(file, f"factors of rank {largest}", f"rank {rank}, as the manifest says")
    return frozenset(owners)


def _damaged(file: Path, got: str, expected: str) -> ArtifactError:
    return ArtifactError(f"{file}: got {got} · expected {expected} · export the adapter again")


def _opened(file: Path) -> Any:  # noqa: ANN401 - of safetensors
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        msg = f'got no safetensors ({error}) · expected it for adapters · pip install "llava-rad-lite[cpu]"'
        raise BackendUnavailable(msg) from error
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise _damaged(file, f"something unreadable ({error})", "safetensors") from error
