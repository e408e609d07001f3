"""How much attention positions receive, layer by layer, on the float decoder: `python -m benchmarks quality attention`.

A position's share is the mean, over heads and queries, of the probability with which it is attended to; the shares of a
sequence sum to 1. Trained decoders give a third and more of it to a position that means nothing (an *attention sink*,
Xiao et al. 2023, arXiv 2309.17453), mostly the first: an error of its value vector is in every output.

    a decoder of text         first · next 3 · other
    a LLaVA-Rad checkpoint    first (BOS) · prompt · image · findings
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from tqdm import tqdm

from benchmarks.phantom.write import write_studies
from benchmarks.quality.real.command import BLOCK_TOKENS, open_decoder
from benchmarks.quality.real.decoder import EMBEDDINGS
from benchmarks.quality.real.texts import read_blocks
from export.quantize.calibration import KINDS, embed, token_kinds
from export.source import forward
from export.source.checkpoint import open_checkpoint
from export.studies import EncodedStudy
from lite.bench.table import markdown_table
from lite.config import PromptTemplate
from lite.errors import LiteError
from lite.prompt import PromptEncoder, Tokenizer
from lite.studies.sources.listed import read_studies

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from export.source.forward import Linear
    from lite.config import DecoderConfig

    Layer = tuple[Mapping[str, Tensor], Linear]  # norms and linears

NUM_SEQUENCES: Final = 8
FILMS_SEED: Final = 20_261_502  # used for nothing else
TEXT_KINDS: Final = ("first", "next 3", "other")
_COLOURS: Final = ("#102030", "#b06010", "#1060b0", "#60a070")


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """The embeddings of a sequence, float32 [T, C], and the kind of each position, an index [T]."""

    hidden: Tensor
    kinds: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Attention received, in the mean over sequences."""

    kinds: tuple[str, ...]
    by_kind: NDArray[np.float64]  # [layers, kinds]; a row sums to 1
    by_position: NDArray[np.float64]  # [layers, positions of the shortest sequence]
    positions_of_kind: NDArray[np.float64]  # [kinds], share of the positions


@torch.inference_mode()
def attention_received(config: DecoderConfig, linear: Linear, x: Tensor) -> Tensor:
    """Return the attention that each position of the normed sequence x [T, C] receives, [T]; it sums to 1."""
    q, k, _ = forward.heads(config, linear, x)
    sharing = len(q) // len(k)
    future = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
    total = torch.zeros(len(x), device=x.device)
    for head, queries in enumerate(q):  # one at a time: all of them would be gigabytes
        scores = (queries @ k[head // sharing].T / math.sqrt(config.head_dim)).masked_fill(future, -torch.inf)
        total += scores.softmax(-1).mean(0)
    return total / len(q)


@torch.inference_mode()
def measure_shares(
    config: DecoderConfig, read_layer: Callable[[int], Layer], sequences: Sequence[Embedded], kinds: tuple[str, ...]
) -> Shares:
    """Let sequences go through a decoder, and measure the attention their positions receive.

    Args:
        config: The decoder's shape.
        read_layer: Returns norms and linears of a layer.
        sequences: What it reads.
        kinds: The names of the kinds of position.
    """
    shortest = min(len(sequence.kinds) for sequence in sequences)
    layers = config.num_hidden_layers
    by_kind, by_position = np.zeros((layers, len(kinds))), np.zeros((layers, shortest))
    states = [sequence.hidden for sequence in sequences]
    for index in tqdm(range(layers), desc="attention", unit=" layers", disable=None):
        norms, linear = read_layer(index)
        for place, sequence in enumerate(sequences):
            x = forward.rms_norm(states[place], norms["input_layernorm.weight"], config.rms_norm_eps)
            received = attention_received(config, linear, x).double()
            summed = torch.zeros(len(kinds), dtype=torch.float64).index_add_(0, sequence.kinds, received.cpu())
            by_kind[index] += summed.numpy() / len(sequences)
            by_position[index] += received[:shortest].cpu().numpy() / len(sequences)
            states[place] = forward.decoder_layer(config, norms, linear, states[place])
    counts = [torch.bincount(sequence.kinds, minlength=len(kinds)) / len(sequence.kinds) for sequence in sequences]
    positions = torch.stack(counts).double().mean(0).numpy()
    return Shares(kinds=kinds, by_kind=by_kind, by_position=by_position, positions_of_kind=positions)


# -- What is read ------------------------------------------------------------------------------------------------------


def of_text(model: Path | None) -> tuple[str, Shares]:
    """Measure a decoder of text: see `open_decoder`. Returns its name, too.

    Raises:
        LiteError: it cannot be read.
    """
    decoder = open_decoder(model)
    _, blocks = read_blocks(
        decoder.encode, prefix=decoder.prefix, calibration=1, evaluation=NUM_SEQUENCES, length=BLOCK_TOKENS
    )
    embeddings = decoder.read(EMBEDDINGS)
    kinds = torch.tensor([0, 1, 1, 1, *[2] * (BLOCK_TOKENS - 4)])
    sequences = [Embedded(hidden=embeddings[torch.tensor(block)], kinds=kinds) for block in blocks]

    def read_layer(index: int) -> Layer:
        layer = decoder.read_layer(index)
        return layer, lambda name, x: functional.linear(x, layer[f"{name}.weight"])

    return decoder.name, measure_shares(decoder.config, read_layer, sequences, TEXT_KINDS)


def of_studies(checkpoint: Path, base: Path, data: Path | None) -> tuple[str, Shares]:
    """Measure a LLaVA-Rad checkpoint on studies of a list, or on phantom films. Returns its name, too.

    Raises:
        LiteError: checkpoint or list cannot be read.
    """
    source = open_checkpoint(checkpoint, base)
    tokenizer, P = Tokenizer(source.tokenizer, source.decoding), source.tower.num_patches
    prompts = PromptEncoder(
        tokenizer, PromptTemplate(), num_image_tokens=P, max_seq_len=source.decoder.max_position_embeddings
    )
    tower, embeddings = source.read_tower(), source.read_base(EMBEDDINGS)
    sequences = []
    with tempfile.TemporaryDirectory(prefix="attention-") as folder:
        listed = data or write_studies(Path(folder) / "films", count=NUM_SEQUENCES, seed=FILMS_SEED, dicom=False)
        for entry in read_studies(listed)[:NUM_SEQUENCES]:
            study = EncodedStudy(
                film=entry.path,
                preprocessing=source.preprocessing,
                input_ids=tuple(prompts.encode(entry.reason)),
                target_ids=(*tokenizer.encode(entry.reference), source.decoding.eos_token_id),
            )
            pixel_values = torch.from_numpy(study.pixel_values[None])
            hidden = embed(study, forward.image_features(tower, source.tower, pixel_values)[0], embeddings)
            sequences.append(Embedded(hidden=hidden, kinds=token_kinds(study, P)))

    def read_layer(index: int) -> Layer:
        layer = source.read_layer(index)
        return layer.weights, forward.source_linear(layer)

    return source.name, measure_shares(source.decoder, read_layer, sequences, KINDS)


# -- What is shown -----------------------------------------------------------------------------------------------------


def format_shares(shares: Shares) -> str:
    """Return a table: a line for each layer, and above them each kind's share of the positions."""
    lines = [("of positions", *(f"{share:.1%}" for share in shares.positions_of_kind))]
    lines += [(f"layer {i}", *(f"{share:.1%}" for share in row)) for i, row in enumerate(shares.by_kind)]
    return markdown_table(("", *shares.kinds), lines)


def draw(shares: Shares, title: str, file: Path) -> None:
    """Draw the shares: of kinds, stacked, and of positions, on a scale of logarithms.

    Raises:
        LiteError: matplotlib is not installed.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        msg = f'got no matplotlib ({error}) · expected it to draw with · pip install "llava-rad-lite[bench]"'
        raise LiteError(msg) from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(f"{title}: attention received")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    layers = np.arange(len(shares.by_kind))
    below = np.zeros(len(layers))
    for kind, of_kind, colour in zip(shares.kinds, shares.by_kind.T, _COLOURS, strict=False):
        left.bar(layers, of_kind, bottom=below, label=kind, color=colour, width=0.9)
        below = below + of_kind
    left.set(xlabel="layer", ylabel="share of attention", ylim=(0, 1), title="share of each kind")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(shares.kinds), frameon=False)
    even = 1 / shares.by_position.shape[1]
    scale = LogNorm(vmin=even / 10, vmax=1)
    picture = right.imshow(
        shares.by_position, aspect="auto", origin="lower", norm=scale, cmap="cividis", interpolation="nearest"
    )
    right.set(xlabel="position", ylabel="layer", title="share of each position")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(picture, ax=right)
    figure.savefig(file, dpi=110)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and draw.

    Raises:
        LiteError: something cannot be read, or options do not belong together.
    """
    if (arguments.checkpoint is None) != (arguments.base is None):
        raise LiteError("got one of --checkpoint and --base · expected both, or none · name the other")
    if arguments.checkpoint is not None:
        name, shares = of_studies(arguments.checkpoint, arguments.base, arguments.data)
    else:
        name, shares = of_text(arguments.model)
    sys.stdout.write(f"{name}: share of the attention that positions receive\n\n{format_shares(shares)}\n")
    if arguments.plot is not None:
        draw(shares, name, arguments.plot)
    return 0
