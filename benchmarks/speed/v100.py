"""What is known of the 7B model in fp16 on a V100, the card its authors name: `python -m benchmarks v100`.

Nobody here has such a card and no latency was ever published, so no figure of this entry was measured: those of quality
are published, all others modelled by `lite.bench.roofline` from the model's shape. `--out` writes the entry to
`benchmarks/references/v100_fp16.json`, where `python -m lite.bench` finds it. Whoever has a V100 replaces figures by
measured ones, and says in their source with what, when and by which command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lite.artifact.parts import TowerShape, VisionPart
from lite.bench.cards import CARDS, V100_ENTRY, Figure, ReferenceCard
from lite.bench.roofline import SHARE_OF_BANDWIDTH, modelled
from lite.bench.table import to_json
from lite.config import DecoderConfig
from lite.console import run_command
from lite.files import write_whole
from lite.memory.plan import Shapes

DECODER: Final = DecoderConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    vocab_size=32000,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    dtype="float16",
)
"""Vicuna-7B v1.5."""
VISION: Final = VisionPart(
    format="fp16",
    image_size=518,
    num_image_tokens=1369,
    hidden_size=4096,
    # Features are those of the 11th of 12 blocks: the last is never run.
    tower=TowerShape(hidden_size=768, intermediate_size=3072, num_hidden_layers=11, num_attention_heads=12),
)
"""BiomedCLIP-CXR, a ViT-B/14 at 518 pixels."""
NUM_PROMPT_TOKENS: Final = 1420
NUM_NEW_TOKENS: Final = 100

_CITED: Final = (
    "LLaVA-Rad, fp16, MIMIC-CXR test, n = 2461; as quoted in tables of later papers, not checked in the original"
)
_CHEXBERT: Final = f"CheXbert F1, uncertain as negative. {_CITED}"
_RE_EVALUATED: Final = "A later paper's re-evaluation of LLaVA-Rad on MIMIC-CXR test, with its own tokenisation"
_PUBLISHED: Final = {
    "chexbert_f1_micro_14": (0.573, _CHEXBERT),
    "chexbert_f1_micro_5": (0.574, _CHEXBERT),
    "chexbert_f1_macro_14": (0.395, _CHEXBERT),
    "chexbert_f1_macro_5": (0.477, _CHEXBERT),
    "radgraph_f1": (0.294, f"F1-RadGraph. {_CITED}"),
    "bleu_4": (0.161, _RE_EVALUATED),
    "rouge_l": (0.308, _RE_EVALUATED),
}
_NOTES: Final = [
    "No figure here was measured. Single-V100 inference is the authors' claim; they published neither seconds nor "
    "gigabytes.",
    "Published figures come second-hand and were computed with others' tools: compare them with this instrument's "
    "only where definition and tokenisation are the same.",
    "Times leave out reading the film and starting kernels.",
]


def shapes() -> Shapes:
    """Return what the study is counted from: all in float16."""
    tower = VISION.tower
    width, tokens = tower.hidden_size, VISION.num_image_tokens + 1
    patch_values = 3 * VISION.image_size**2 // VISION.num_image_tokens
    weights = (
        tower.num_hidden_layers * (4 * width**2 + 2 * width * tower.intermediate_size)
        + (patch_values + tokens) * width
        + (width + VISION.hidden_size) * VISION.hidden_size
    )
    return Shapes(config=DECODER, vision=VISION, vision_bytes=2 * weights)


def entry() -> ReferenceCard:
    """Return the entry: modelled costs and published quality."""
    (card,) = (card for card in CARDS if card.name == "V100 16GB")
    model, roof = (
        modelled(
            card, shapes(), num_prompt_tokens=NUM_PROMPT_TOKENS, num_new_tokens=NUM_NEW_TOKENS, share_of_bandwidth=share
        )
        for share in (SHARE_OF_BANDWIDTH, 1.0)
    )
    figures = model.figures | {"decode_tokens_per_s_at_most": roof.figures["decode_tokens_per_s"]}
    for name, (value, source) in _PUBLISHED.items():
        figures[name] = Figure(value=value, unit="fraction", kind="published", source=source)
    return ReferenceCard(
        name="LLaVA-Rad (Vicuna-7B)",
        card=card.name,
        decoder_format="fp16",
        num_prompt_tokens=NUM_PROMPT_TOKENS,
        num_new_tokens=NUM_NEW_TOKENS,
        notes=[*_NOTES, f"The card: {card.source}"],
        figures=figures,
    )


def entry_text() -> str:
    """Return the entry as the file has it."""
    return json.dumps(to_json(entry()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks v100",
        description="Print what is known of the 7B model in fp16 on a V100, each figure measured, published or "
        "modelled, as JSON.",
        epilog="exit status: 0 done, 1 the file cannot be written, 2 wrong use.",
    )
    parser.add_argument(
        "--out", type=Path, nargs="?", const=V100_ENTRY, metavar="FILE",
        help="write it instead (without a name: to benchmarks/references/v100_fp16.json)",
    )  # fmt: skip
    out: Path | None = parser.parse_args(argv).out
    return run_command(lambda: _print_or_write(out))


def _print_or_write(out: Path | None) -> int:
    if out is None:
        sys.stdout.write(entry_text())
    else:
        write_whole(out, entry_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
