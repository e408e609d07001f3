"""Low-rank factors beside a rounded decoder: a LoRA as its linears want it, and what makes up for their rounding.

The integers of `decoder/` are those of the base with the published LoRA merged, and of scaled channels
(`export.quantize.folding`): W' = rows · W · columns. So what an adapter adds is scaled alike,

    + B A   ▶   + (rows · B) (A · columns)

Norms tell the scales that they took. Those between v and o, and between up and down, are in no file: they are found by
comparing the rounded weights with the checkpoint's. Each is the mean of some thousand weights whose rounding errors
have nothing to do with one another: it is right to a thousandth, as is a factor in bfloat16.

What rounding took, W' - Q, has no low rank, but some directions of it count more than others: those in which the inputs
are large. `correction` takes the largest of (W' - Q) · |x|, as LQER (arXiv 2402.02446) and EoRA (arXiv 2410.21271) do.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from export.quantize.folding import spread
from lite.engines.torch_engine.linear import linears_of
from lite.engines.torch_engine.load import load_decoder
from lite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from export.source.lora import LoraPair
    from lite.artifact.open import Artifact
    from lite.config import DecoderConfig

_NOT_FOLDED: Final = 0.02
"""Where the scales that were found are less apart than that, in the median of |log s|, they are noise around 1."""
_OVERSAMPLED: Final = 8
_ITERATIONS: Final = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayer:
    """A layer of an artifact's decoder, and how its channels were scaled."""

    weights: dict[str, Tensor]  # as they are computed with, float32 [out, in], by "self_attn.q_proj"
    rows: dict[str, Tensor]  # [out], of those whose outputs were scaled
    columns: dict[str, Tensor]  # [in]

    def scaled(self, linear: str, weight: Tensor) -> Tensor:
        """Scale a weight of the checkpoint as the artifact's are."""
        return self._rows(linear, weight) * self.columns[linear] if linear in self.columns else weight

    def factors(self, linear: str, pair: LoraPair) -> tuple[Tensor, Tensor]:
        """Return A [rank, in] and B [out, rank] of a pair, float32, scaled as the weights are, its own scale in B."""
        a, b = pair.a.float(), self._rows(linear, pair.scale * pair.b.float())
        return a * self.columns[linear] if linear in self.columns else a, b

    def _rows(self, linear: str, values: Tensor) -> Tensor:
        return values * self.rows[linear].unsqueeze(1) if linear in self.rows else values


def read_stored(artifact: Artifact, index: int, source: Mapping[str, Tensor]) -> StoredLayer:
    """Read a layer of an artifact, and find its scales.

    Args:
        artifact: With a decoder.
        index: Of the layer.
        source: What the artifact was made of, float32: "self_attn.q_proj.weight", "input_layernorm.weight" and so on.
    """
    decoder = load_decoder(artifact, device="cpu", layers=range(index, index + 1))
    layer, weights = decoder.model.layers[0], {}
    for name, linear in linears_of(layer).items():
        for part, weight in zip(linear.parts, linear.weights, strict=True):
            values = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)
            weights[f"{name.rpartition('.')[0]}.{part}"] = values.float()
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    if artifact.manifest.parts.decoder.format.startswith("gptq"):
        stored = dict(layer.named_parameters())
        rows, columns = _scales(artifact.decoder_config(), source, weights, stored)
    return StoredLayer(weights=weights, rows=rows, columns=columns)


def _scales(
    config: DecoderConfig, source: Mapping[str, Tensor], weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return by linear what its rows and its columns were multiplied by."""
    heads = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for norm, readers, made, last in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.v_proj",
         "self_attn.o_proj"),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.up_proj", "mlp.down_proj"),
    ):  # fmt: skip
        before, after = source[f"{norm}.weight"], stored[f"{norm}.weight"].float()
        read = torch.where(after == 0, torch.ones_like(after), before / after)
        columns |= dict.fromkeys(readers, read)
        divided = _ratio(weights[made], source[f"{made}.weight"] * read, dim=1)  # 1 / s, of each row
        times = _ratio(weights[last], source[f"{last}.weight"], dim=0)  # s, of each column
        shared = heads if made == "self_attn.v_proj" else None
        if shared is not None:  # heads that read one value head share its scales
            times = times.log().view(-1, *shared).mean(1).flatten().exp()
        s = (times / divided).sqrt()
        if float(s.log().abs().median()) < _NOT_FOLDED:
            s = torch.ones_like(s)
        rows[made], columns[last] = 1 / s, spread(s, shared)
    return rows, columns


def _ratio(weight: Tensor, source: Tensor, *, dim: int) -> Tensor:
    """Return by how much a rounded weight is larger than what it was made of, as least squares see it."""
    square = source.square().sum(dim)
    ratio = (weight * source).sum(dim) / square.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where((square > 0) & (ratio > 0), ratio, torch.ones_like(ratio))


def correction(wanted: Tensor, stored: Tensor, sizes: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank] that make up for most of what rounding took.

    Args:
        wanted: The weight, scaled as the stored one, float32 [out, in].
        stored: The rounded one.
        sizes: The root mean square of each input, [in].
        rank: Directions that are kept.
    """
    # An input that never came counts little, but something: none is infinitely unimportant.
    d = sizes.clamp_min(1e-3 * float(sizes.square().mean().sqrt()) + torch.finfo(torch.float32).tiny)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        q = min(rank + _OVERSAMPLED, *wanted.shape)
        u, s, v = torch.svd_lowrank((wanted - stored) * d, q=q, niter=_ITERATIONS)
    root = s[:rank].sqrt()
    return (v[:, :rank] * root).T / d, u[:, :rank] * root


def stored_as(name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return the factors of a linear as a file has them: float16, each direction's A and B alike in size.

    Raises:
        CheckpointError: They do not fit float16.
    """
    largest = [factor.abs().amax(dim).clamp_min(torch.finfo(torch.float32).tiny) for factor, dim in ((a, 1), (b, 0))]
    t = (0.5 * (largest[1].log2() - largest[0].log2())).round().exp2()  # a power of two rounds nothing
    half = {f"{name}.lora_A": (a * t.unsqueeze(1)).half(), f"{name}.lora_B": (b / t).half()}
    if not all(bool(factor.isfinite().all()) for factor in half.values()):
        msg = f"{name}: got factors that float16 cannot hold · expected a LoRA · the adapter is damaged"
        raise CheckpointError(f"{msg}, or its training has diverged")
    return {key: factor.contiguous() for key, factor in half.items()}
