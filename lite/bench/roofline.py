"""What an artifact has to move and to compute, and what that would take at best on cards that are not here.

    time of a stage = max( bytes / (share × bandwidth),  FLOP / (share × peak) )

Decoding one token reads every weight once and multiplies it with one vector: the bytes decide. A prompt takes every
weight to some 1,400 vectors at once: the FLOP decide. Bytes are those of the weights as they are stored, cached keys
and values included; an engine that expands weights in memory before it multiplies moves more. Of attention only the
pairs that a token may see are counted. Nothing is said of the image's reading, of starting kernels (which is all that
a model as small as the demo's does on a GPU), nor of a tower in another arithmetic than float16.

What comes out are `Figure`s of the kind "modelled".
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from lite.artifact.open import load_artifact
from lite.bench.cards import CARDS, Card, Figure, ReferenceCard, v100_entry, with_prefix
from lite.bench.results import Bench, ModelledTable, Row
from lite.memory.counts import cache_bytes_per_token, head_bytes, layer_bytes, layer_linear_shapes
from lite.memory.plan import Shapes, Workload, plan_memory

if TYPE_CHECKING:
    from lite.artifact.open import Artifact
    from lite.artifact.parts import VisionPart
    from lite.config import DecoderConfig

SHARE_OF_BANDWIDTH: Final = 0.6
"""Reached by good kernels that decode a 7 to 8 B model in 4 bits, one study at a time: 0.74 LMDeploy and ExLlamaV2 (RTX
4090), 0.56 to 0.77 llama.cpp, 0.42 to 0.51 gpt-fast (A100), 0.41 AutoAWQ (T4), 0.33 bitsandbytes NF4 (RTX 4090)."""
SHARE_OF_PEAK: Final = 0.5
"""TinyChat and ExLlamaV2 take 0.132 and 0.139 s for 2,048 tokens of a 7B model on an RTX 4090: 0.6 of its rate with
float16 sums. Here sums are float32 and weights are expanded first, and small cards throttle."""
GPU_ITEMSIZE: Final = 2
"""Bytes of a weight that is not quantised and of a cached value, on a GPU: float16."""
SMALLEST_MODELLED: Final = 1 << 28
"""Bytes of a decoder from which on bytes and FLOP tell its time on a GPU."""


# -- Counting --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What one study takes: prompt and image, and a text of `num_new_tokens`."""

    num_prompt_tokens: int  # the image's included
    num_new_tokens: int
    vision_bytes: int  # of `vision.onnx`
    vision_flop: int
    weight_bytes: int  # what a token reads of the decoder
    cache_bytes: int  # what a token in the middle of the text reads of the cache
    prefill_flop: int
    decode_flop: int  # of a token in the middle of the text


def count_study(shapes: Shapes, *, num_prompt_tokens: int, num_new_tokens: int) -> Counts:
    """Count what one study takes on a GPU.

    Args:
        shapes: the artifact's.
        num_prompt_tokens: the image's included.
        num_new_tokens: the length of the text, at least 1.
    """
    config, middle = shapes.config, num_prompt_tokens + num_new_tokens // 2
    return Counts(
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=num_new_tokens,
        vision_bytes=shapes.vision_bytes,
        vision_flop=vision_flop(shapes.vision),
        weight_bytes=decode_weight_bytes(config, itemsize=GPU_ITEMSIZE),
        cache_bytes=middle * cache_bytes_per_token(config, itemsize=GPU_ITEMSIZE),
        prefill_flop=prefill_flop(config, num_prompt_tokens),
        decode_flop=decode_flop(config, middle),
    )


def decode_weight_bytes(config: DecoderConfig, *, itemsize: int) -> int:
    """Return what decoding one token reads of the weights: every linear and the head, once.

    Of the embeddings it reads one row, and the norms are small: some ten-thousandths of the whole.

    Args:
        config: the decoder's shape.
        itemsize: bytes of a weight that is not quantised as the engine holds it: 4 where it computes in float32.
    """
    return config.num_hidden_layers * layer_bytes(config, itemsize=itemsize) + head_bytes(config, itemsize=itemsize)


def num_linear_weights(config: DecoderConfig) -> int:
    """Return how many weights the linears of all layers have."""
    shapes = layer_linear_shapes(config).values()
    return config.num_hidden_layers * sum(out_features * in_features for out_features, in_features in shapes)


def prefill_flop(config: DecoderConfig, num_tokens: int) -> int:
    """Count the operations of a prompt: linears, attention of each token to those before it, the last token's logits.

    A product and its addition are two. An attention kernel that computes masked pairs too takes up to twice as many.
    """
    pairs = num_tokens * (num_tokens + 1) // 2
    return 2 * num_linear_weights(config) * num_tokens + _attention_flop(config, pairs) + _head_flop(config)


def decode_flop(config: DecoderConfig, context: int) -> int:
    """Count the operations of one token that sees `context` tokens, itself included."""
    return 2 * num_linear_weights(config) + _attention_flop(config, context) + _head_flop(config)


def _attention_flop(config: DecoderConfig, pairs: int) -> int:
    """Two products over the head's width for each pair of tokens: the score, and the sum of values."""
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs


def _head_flop(config: DecoderConfig) -> int:
    return 2 * config.vocab_size * config.hidden_size


def vision_flop(part: VisionPart) -> int:
    """Count the operations of tower and projector on one image."""
    tower, patches = part.tower, part.num_image_tokens
    width, tokens = tower.hidden_size, patches + 1
    linears = tokens * (4 * width**2 + 2 * width * tower.intermediate_size)
    attention = 2 * tokens**2 * width
    embedding = 3 * part.image_size**2 * width
    projector = patches * (width * part.hidden_size + part.hidden_size**2)
    return 2 * (tower.num_hidden_layers * (linears + attention) + embedding + projector)


# -- Models of a card ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Modelled:
    """What one study would take on a card, by its bytes and FLOP."""

    card: Card
    counts: Counts
    vision_s: Figure
    prefill_s: Figure
    decode_token_s: Figure  # in the middle of the text
    decode_tokens_per_s: Figure
    total_s: Figure  # tower, prompt and text
    memory_bytes: Figure
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """Return the card's name, what was counted, and the figures with their formulas."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        figures = {name: value.to_json() for name, value in fields.items() if isinstance(value, Figure)}
        counts = dataclasses.asdict(self.counts)
        return {"card": self.card.name, "kind": "modelled", "counts": counts, **figures, "fits": self.fits}


def modelled(
    card: Card,
    shapes: Shapes,
    *,
    num_prompt_tokens: int,
    num_new_tokens: int,
    share_of_bandwidth: float = SHARE_OF_BANDWIDTH,
    share_of_peak: float = SHARE_OF_PEAK,
) -> Modelled:
    """Model one study on a card.

    Args:
        card: the card.
        shapes: the artifact's.
        num_prompt_tokens: the image's included.
        num_new_tokens: the length of the text, at least 1.
        share_of_bandwidth: how much of the card's bandwidth is reached.
        share_of_peak: how much of its peak.
    """
    counts = count_study(shapes, num_prompt_tokens=num_prompt_tokens, num_new_tokens=num_new_tokens)

    def stage(parts: dict[str, int], flop: int) -> Figure:
        nbytes = sum(parts.values())
        reading = nbytes / (share_of_bandwidth * card.bandwidth)
        computing = flop / (share_of_peak * card.peak_flops)
        if reading > computing:
            read = " + ".join(f"{with_prefix(count, 'B')} of {name}" for name, count in parts.items())
            formula = f"({read}) / ({share_of_bandwidth:g} × {with_prefix(card.bandwidth, 'B/s')})"
        else:
            formula = f"{with_prefix(flop, 'FLOP')} / ({share_of_peak:g} × {with_prefix(card.peak_flops, 'FLOP/s')})"
        return Figure(value=max(reading, computing), unit="s", kind="modelled", formula=formula)

    vision = stage({"weights": counts.vision_bytes}, counts.vision_flop)
    prefill = stage({"weights": counts.weight_bytes}, counts.prefill_flop)
    token = stage({"weights": counts.weight_bytes, "cache": counts.cache_bytes}, counts.decode_flop)
    # The prompt gives the first token. Over the others the cache's bytes are in the mean those of the middle.
    further = counts.num_new_tokens - 1
    memory = _memory(card, shapes, counts)
    return Modelled(
        card=card,
        counts=counts,
        vision_s=vision,
        prefill_s=prefill,
        decode_token_s=token,
        decode_tokens_per_s=Figure(
            value=1 / token.value, unit="tokens/s", kind="modelled", formula=f"1 / [{token.formula}]"
        ),
        total_s=Figure(
            value=vision.value + prefill.value + further * token.value,
            unit="s",
            kind="modelled",
            formula=f"vision + prefill + {further} × one token",
        ),
        memory_bytes=memory,
        fits=memory.value <= card.memory_bytes,
    )


def _memory(card: Card, shapes: Shapes, counts: Counts) -> Figure:
    """Return what `lite.load` plans for one study there."""
    workload = Workload(
        device="cuda",
        num_prompt_tokens=counts.num_prompt_tokens,
        max_new_tokens=counts.num_new_tokens,
        tower_on_gpu=True,
        capability=card.capability,
    )
    plan = plan_memory(shapes, workload)
    formula = " + ".join(f"{name} {with_prefix(nbytes, 'B')}" for name, nbytes in plan.items().items())
    return Figure(value=plan.card_bytes, unit="bytes", kind="modelled", formula=formula)


def is_modelled(decoder_bytes: int) -> bool:
    """Say whether bytes and FLOP decide how long a decoder of this size takes on a card."""
    return decoder_bytes >= SMALLEST_MODELLED


def modelled_rows(artifact: Artifact, *, num_prompt_tokens: int, num_new_tokens: int) -> tuple[Modelled, ...]:
    """Model an artifact on each of `CARDS`.

    Args:
        artifact: a checked artifact; nothing of it is loaded.
        num_prompt_tokens: of a typical study, the image's included.
        num_new_tokens: of a typical text, at least 1.
    """
    shapes, study = Shapes.of(artifact), {"num_prompt_tokens": num_prompt_tokens, "num_new_tokens": num_new_tokens}
    return tuple(modelled(card, shapes, **study) for card in CARDS)


MODELLED_NOTE: Final = (
    f"Modelled, not measured: each stage at {SHARE_OF_BANDWIDTH:.0%} of the card's bandwidth or {SHARE_OF_PEAK:.0%} of "
    "its float16 peak, whichever takes longer. No figure with a ~ was measured."
)
MODELLED_COLUMNS: Final = ("modelled on", "vision", "prefill", "token", "tokens/s", "study", "memory", "fits")


def modelled_cells(model: Modelled) -> tuple[str, ...]:
    """Return a row under `MODELLED_COLUMNS`; no times for a card whose memory is too small."""
    if not model.fits:
        return (model.card.name, "–", "–", "–", "–", "–", str(model.memory_bytes), "no")
    times = model.vision_s, model.prefill_s, model.decode_token_s, model.decode_tokens_per_s, model.total_s
    return (model.card.name, *map(str, times), str(model.memory_bytes), "yes")


# -- Tables ----------------------------------------------------------------------------------------------------------


def modelled_tables(bench: Bench) -> tuple[ModelledTable, ...]:
    """Return what other cards may do with each artifact, and for 7B what is known of the V100.

    Not for a decoder as small as the demo's: what a card needs to start its kernels is all that such a one takes. Nor
    for the onnx engine: what is modelled is torch's kernels, and its bytes are theirs.
    """
    tables: list[ModelledTable] = []
    seven_billion = False
    for row in bench.rows:
        if isinstance(row, Row) and row.engine == "torch" and is_modelled(row.plan.decoder_bytes):
            artifact = load_artifact(row.path)
            tokens = max(1, round(row.tokens_per_study))
            models = modelled_rows(artifact, num_prompt_tokens=row.num_prompt_tokens, num_new_tokens=tokens)
            caption = f"{row.name} on other cards, modelled: {row.num_prompt_tokens} + {tokens} tokens"
            tables.append(
                ModelledTable(
                    caption=caption,
                    header=MODELLED_COLUMNS,
                    rows=tuple(map(modelled_cells, models)),
                    note=MODELLED_NOTE,
                    figures=[model.to_json() for model in models],
                )
            )
            config = artifact.decoder_config()
            seven_billion |= (config.hidden_size, config.num_hidden_layers) == (4096, 32)
    if seven_billion and isinstance(entry := v100_entry(), ReferenceCard):
        tables.append(_reference_card(entry))
    return tuple(tables)


def _reference_card(entry: ReferenceCard) -> ModelledTable:
    lines = [
        (name, str(figure), figure.kind, figure.source or figure.formula or "")
        for name, figure in entry.figures.items()
    ]
    return ModelledTable(
        caption=f"{entry.name} on {entry.card}: nothing here was measured by us",
        header=("figure", "value", "kind", "source or formula"),
        rows=tuple(lines),
        note=" ".join(entry.notes),
        figures=entry.to_json(),
    )
