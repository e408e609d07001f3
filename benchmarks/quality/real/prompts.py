"""What int8 weights for prompts lose on a decoder with trained weights: `python -m benchmarks quality prompts`.

The decoder is rounded as the exporter does by default, and every block is a prompt with a text behind it. The text's
tokens are computed as MatMulNBits does, whose inputs are int8 with a scale for each group; the prompt's in one way for
each row:

    exact     by inputs in float32
    stored    as the text's tokens
    int8      weights once more in 8 bits, a scale for each output; inputs with a scale for each token

and the text's tokens are compared with the float decoder's (see `export.write.prompt_graphs`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional
from tqdm import tqdm

from benchmarks.quality.compare import shown
from benchmarks.quality.real.command import BLOCK_TOKENS, open_decoder
from benchmarks.quality.real.measure import Judge, States, kl_ratio
from benchmarks.quality.real.rounding import Setup
from benchmarks.quality.real.rows import DEFAULT, ways
from benchmarks.quality.real.table import tell
from benchmarks.quality.real.texts import read_blocks
from export.quantize.layerwise import PASSES
from lite.bench.table import markdown_table
from lite.engines.machine import check_device
from lite.eval.divergence import summarise

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from torch import Tensor

    from benchmarks.quality.real.texts import Block

    Product = Callable[[Tensor, Tensor], Tensor]

PROMPT_TOKENS: Final = BLOCK_TOKENS * 3 // 4
_LEVELS: Final = 127


def _rounded(x: Tensor) -> Tensor:
    """Round vectors [..., K] to 8 bits, a scale for each."""
    scale = (x.abs().amax(-1, keepdim=True) / _LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale).round() * scale


def _stored(x: Tensor, weight: Tensor, group_size: int) -> Tensor:
    return functional.linear(_rounded(x.view(*x.shape[:-1], -1, group_size)).view(x.shape), weight)


def _int8(x: Tensor, weight: Tensor) -> Tensor:
    return functional.linear(_rounded(x), _rounded(weight))


def _both(of_prompt: Product, of_text: Product, x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((of_prompt(x[:PROMPT_TOKENS], weight), of_text(x[PROMPT_TOKENS:], weight)))


def run(arguments: argparse.Namespace, command: str) -> int:
    """Measure and print; return the exit status."""
    decoder = open_decoder(arguments.model)
    calibration, evaluation = read_blocks(
        decoder.encode,
        prefix=decoder.prefix,
        calibration=arguments.blocks,
        evaluation=arguments.blocks,
        length=BLOCK_TOKENS,
    )
    judge = Judge(decoder, evaluation, check_device(arguments.device))
    states = _read(judge, calibration, arguments.group_size)
    found = {name: judge.compare(each, PROMPT_TOKENS) for name, each in states.items()}
    rows = []
    for name, blocks in found.items():
        ours, ratio = summarise(blocks), kl_ratio(blocks, found["stored"])
        beside = summarise(judge.compare(states[name], PROMPT_TOKENS, states["stored"]))
        kl, interval = shown(ours.mean_kl.value, "#.3g"), [shown(end, "#.3g") for end in (ratio.low, ratio.high)]
        times = f"{shown(ratio.value, '#.3g')} [{', '.join(interval)}]"
        apart = shown(beside.mean_kl.value, "#.2g"), f"{beside.same_top.value:.1%}"
        rows.append((name, kl, f"{ours.same_top.value:.1%}", times, *apart))
    header = ("prompts by", "KL mean, nats/token", "same top", "KL × stored", "KL from stored", "same top as stored")
    about = {
        "decoder": f"{decoder.name}, GPTQ in 4 bits, groups of {arguments.group_size}",
        "blocks": f"{len(evaluation)}, {PROMPT_TOKENS} of a prompt and {BLOCK_TOKENS - PROMPT_TOKENS} of a text each",
    }
    as_json = [dict(zip(header, row, strict=True)) for row in rows]
    tell(as_json, markdown_table(header, rows, left=1), about, command=command, as_json=arguments.json)
    return 0


def _read(judge: Judge, calibration: Sequence[Block], group_size: int) -> dict[str, States]:
    """Round the decoder, and have it read the blocks in each way."""
    stored = partial(_stored, group_size=group_size)
    products: dict[str, Product] = {"exact": functional.linear, "stored": stored, "int8": _int8}
    states = {name: judge.start() for name in products}
    layers = judge.decoder.config.num_hidden_layers
    with (
        tempfile.TemporaryDirectory(prefix="real-") as folder,
        tqdm(total=layers * PASSES, desc=DEFAULT, unit=" passes", disable=None) as bar,
    ):
        setup = Setup(
            decoder=judge.decoder,
            blocks=calibration,
            folder=Path(folder),
            device=judge.device,
            default_errors={},
            advance=bar.update,
        )
        rounding = ways(group_size, Path())[0].make(setup)
        for index in range(layers):
            layer = rounding.round(index, judge.decoder.read_layer(index))
            for name, product in products.items():
                states[name].through(layer.norms, layer.linears, partial(_both, product, stored))
            bar.update((index + 1) * PASSES - bar.n)
    return states
