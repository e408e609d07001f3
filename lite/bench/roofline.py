"""What an artifact has to move and to compute, and what that would take at best on cards that are not here.

    time of a stage = max( bytes / (share × bandwidth),  FLOP / (share × peak) )

Decoding one token reads every weight once and multiplies it with one vector: the bytes decide. A prompt takes every
weight to some 1,400 vectors at once: the FLOP decide. Bytes are those of the memory plan; an engine that expands
weights in memory before it multiplies moves more. Nothing is said of the image's reading, of starting kernels (which is
all that a model as small as the demo's does on a GPU), nor of a tower in another arithmetic than float16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from lite.artifact.open import load_artifact
from lite.bench.cards import CARDS, V100_ENTRY, Card, Figure, read_reference_card
from lite.bench.columns import number
from lite.bench.results import Bench, ModelledTable, Row
from lite.memory.counts import cache_bytes_per_token, decode_weight_bytes, layer_linear_shapes
from lite.memory.plan import Shapes, Workload, plan_memory

if TYPE_CHECKING:
    from lite.artifact.parts import VisionPart
    from lite.config import DecoderConfig

SHARE_OF_BANDWIDTH: Final = 0.6
"""Reached by good kernels that decode a 7 to 8 B model in 4 bits, one study at a time: 0.74 LMDeploy and ExLlamaV2 (RTX
4090), 0.56 to 0.77 llama.cpp, 0.42 to 0.51 gpt-fast (A100), 0.41 AutoAWQ (T4), 0.33 bitsandbytes NF4 (RTX 4090)."""
SHARE_OF_PEAK: Final = 0.5
"""TinyChat and ExLlamaV2 take 0.132 and 0.139 s for 2,048 tokens of a 7B model on an RTX 4090: 0.6 of its rate with
float16 sums. Here sums are float32 and weights are expanded first, and small cards throttle."""
SMALLEST_MODELLED: Final = 1 << 28
"""Bytes of a decoder from which on bytes and FLOP tell its time on a GPU."""


# -- Counting --------------------------------------------------------------------------------------------------------


def prefill_flop(config: DecoderConfig, num_tokens: int) -> int:
    """Count the operations of a prompt: linears, attention of each token to those before it, the last token's logits.

    A product and its addition are two. An attention kernel that computes masked pairs too takes up to twice as many.
    """
    return _decoder_flop(config, num_tokens, pairs=num_tokens * (num_tokens + 1) // 2)


def decode_flop(config: DecoderConfig, context: int) -> int:
    """Count the operations of one token that sees `context` tokens, itself included."""
    return _decoder_flop(config, 1, pairs=context)


def _decoder_flop(config: DecoderConfig, num_tokens: int, *, pairs: int) -> int:
    weights = sum(out_features * in_features for out_features, in_features in layer_linear_shapes(config).values())
    # Two products over the head's width for each pair of tokens: the score, and the sum of values.
    attention = 4 * config.num_attention_heads * config.head_dim * pairs
    head = 2 * config.vocab_size * config.hidden_size
    return config.num_hidden_layers * (2 * weights * num_tokens + attention) + head


def vision_flop(part: VisionPart) -> int:
    """Count the operations of tower and projector on one image."""
    tower, patches = part.tower, part.num_patches
    width, tokens = tower.hidden_size, patches + 1
    linears = tokens * (4 * width**2 + 2 * width * tower.intermediate_size)
    attention = 2 * tokens**2 * width
    embedding = 3 * part.image_size**2 * width
    projector = part.num_image_tokens * (width * part.hidden_size + part.hidden_size**2)
    return 2 * (tower.num_hidden_layers * (linears + attention) + embedding + projector)


# -- Models of a card ------------------------------------------------------------------------------------------------


class Modelled(NamedTuple):
    """What one study would take on a card."""

    card: str
    fits: bool
    figures: dict[str, Figure]  # all modelled; decoding in the middle of the text


def modelled(
    card: Card,
    shapes: Shapes,
    *,
    num_prompt_tokens: int,
    num_new_tokens: int,
    share_of_bandwidth: float = SHARE_OF_BANDWIDTH,
) -> Modelled:
    """Model one study on a card, all in float16 that is not quantised.

    Args:
        card: the card.
        shapes: the artifact's.
        num_prompt_tokens: the image's included.
        num_new_tokens: the length of the text, at least 1.
        share_of_bandwidth: how much of the card's bandwidth is reached.
    """
    config, middle = shapes.config, num_prompt_tokens + num_new_tokens // 2
    weights = decode_weight_bytes(config, itemsize=2)
    cache = middle * cache_bytes_per_token(config, itemsize=2)

    def figure(value: float, unit: str, formula: str) -> Figure:
        return Figure(value=value, unit=unit, kind="modelled", source=formula)  # type: ignore[arg-type]

    def stage(flop: int, **parts: int) -> Figure:
        reading = sum(parts.values()) / (share_of_bandwidth * card.bandwidth)
        computing = flop / (SHARE_OF_PEAK * card.peak_flops)
        if reading > computing:
            read = " + ".join(f"{_with_prefix(count, 'B')} of {name}" for name, count in parts.items())
            formula = f"({read}) / ({share_of_bandwidth:g} × {_with_prefix(card.bandwidth, 'B/s')})"
        else:
            formula = f"{_with_prefix(flop, 'FLOP')} / ({SHARE_OF_PEAK:g} × {_with_prefix(card.peak_flops, 'FLOP/s')})"
        return figure(max(reading, computing), "s", formula)

    vision = stage(vision_flop(shapes.vision), weights=shapes.vision_bytes)
    prefill = stage(prefill_flop(config, num_prompt_tokens), weights=weights)
    token = stage(decode_flop(config, middle), weights=weights, cache=cache)
    # The prompt gives the first token. Over the others the cache's bytes are in the mean those of the middle.
    further = num_new_tokens - 1
    total = vision.value + prefill.value + further * token.value
    workload = Workload(
        device="cuda",
        num_prompt_tokens=num_prompt_tokens,
        max_new_tokens=num_new_tokens,
        tower_on_gpu=True,
        capability=card.capability,
    )
    plan = plan_memory(shapes, workload)
    planned = " + ".join(f"{name} {_with_prefix(nbytes, 'B')}" for name, nbytes in plan.items().items())
    figures = {
        "vision_s": vision,
        "prefill_s": prefill,
        "decode_token_s": token,
        "decode_tokens_per_s": figure(1 / token.value, "tokens/s", f"1 / [{token.source}]"),
        "total_s": figure(total, "s", f"vision + prefill + {further} × one token"),
        "memory_bytes": figure(plan.card_bytes, "bytes", planned),
    }
    return Modelled(card.name, plan.card_bytes <= card.memory_bytes, figures)


def _with_prefix(value: float, unit: str) -> str:
    """Return a quantity as text, such as "3.63 GB"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{number(value / size)} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


# -- Tables ----------------------------------------------------------------------------------------------------------

MODELLED_COLUMNS: Final = ("modelled on", "vision", "prefill", "token", "tokens/s", "study", "memory", "fits")
_NOTE: Final = (
    f"Modelled, not measured: each stage at {SHARE_OF_BANDWIDTH:.0%} of the card's bandwidth or {SHARE_OF_PEAK:.0%} of "
    "its float16 peak, whichever takes longer. No figure with a ~ was measured."
)


def modelled_cells(model: Modelled) -> tuple[str, ...]:
    """Return a row under `MODELLED_COLUMNS`; no times for a card whose memory is too small."""
    *times, memory = model.figures.values()
    shown = map(str, times) if model.fits else ["–"] * len(times)
    return (model.card, *shown, str(memory), "yes" if model.fits else "no")


def is_modelled(decoder_bytes: int) -> bool:
    """Say whether bytes and FLOP decide how long a decoder of this size takes on a card."""
    return decoder_bytes >= SMALLEST_MODELLED


def modelled_tables(bench: Bench) -> tuple[ModelledTable, ...]:
    """Return what other cards may do with each artifact, and for 7B what is known of the V100.

    Not for a decoder as small as the demo's: what a card needs to start its kernels is all that such a one takes. Nor
    for the onnx engine: what is modelled is torch's kernels, and its bytes are theirs.
    """
    tables: list[ModelledTable] = []
    seven_billion = False
    for row in bench.rows:
        if isinstance(row, Row) and row.engine == "torch" and is_modelled(row.plan.decoder_bytes):
            shapes, prompt, text = Shapes.of(load_artifact(row.path)), row.num_prompt_tokens, row.tokens_per_study
            text = max(1, round(text))
            models = [modelled(card, shapes, num_prompt_tokens=prompt, num_new_tokens=text) for card in CARDS]
            tables.append(
                ModelledTable(
                    caption=f"{row.name} on other cards, modelled: {prompt} + {text} tokens",
                    header=MODELLED_COLUMNS,
                    rows=tuple(map(modelled_cells, models)),
                    note=_NOTE,
                    figures=[{"card": card, "fits": fits, **figures} for card, fits, figures in models],
                )
            )
            seven_billion |= (shapes.config.hidden_size, shapes.config.num_hidden_layers) == (4096, 32)
    if seven_billion and V100_ENTRY.is_file():  # it lies in the repository, not in an installed package
        entry = read_reference_card(V100_ENTRY)
        tables.append(
            ModelledTable(
                caption=f"{entry.name} on {entry.card}: nothing here was measured by us",
                header=("figure", "value", "kind", "source or formula"),
                rows=tuple((name, str(figure), figure.kind, figure.source) for name, figure in entry.figures.items()),
                note=" ".join(entry.notes),
                figures=entry,
            )
        )
    return tuple(tables)
