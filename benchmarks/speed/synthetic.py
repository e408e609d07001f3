"""A random checkpoint with the real 7B widths and any number of decoder layers: `python -m benchmarks synthetic`.

The published weights may not be passed on and their base takes 13 GB, yet how much memory an export needs, or how long
a token takes, depends on their *shapes*. This module writes a checkpoint of those shapes with random weights:

    OUT/llava-rad-synthetic/   config.json, adapter_config.json, adapter_model.bin, non_lora_trainables.bin,
                               biomedclipcxr_518.json, biomedclipcxr_518_checkpoint.pt, NOTICE
    OUT/base/                  config.json, generation_config.json, pytorch_model-*.bin and their index,
                               tokenizer.model, tokenizer_config.json, special_tokens_map.json
    OUT/studies/               with --studies: films and studies.json, for what an exporter calibrates or measures on

What can be measured on it, and what cannot:

* **Bytes and time are those of the real model.** Widths, dtypes, file formats, LoRA and the length of a prompt are the
  published ones, and every weight is a draw of its own: nothing repeats or compresses, no matrix has low rank. All
  layers cost the same, so two depths give the price of a layer (the difference) and of the rest (what is left at
  depth 0). A figure for 32 layers that was reached in this way is a model of one and has to be called that.
* **Text means nothing.** Drafts are pseudo-words. The end token and the byte pieces are never chosen, so every draft
  has exactly as many tokens as were asked for, all of them printable.
* **A quantiser's loss is not the real one.** Weights are Gaussian, with log-normal channel scales and a few heavy
  channels in the hidden state; a trained decoder has structure that a quantiser can exploit, and worse outliers. Shards
  are of about a GiB, where the published base has two of 10 and 3.5 GB; the tower's training checkpoint lacks most of
  the text tower and optimiser state that nobody reads.

Hidden states stay of order 1 to 10 through 32 layers, as every branch adds its share to the residual and norms divide
by the sum. A tensor's values depend on the seed and on its name only: the first layers of a deep checkpoint are those
of a shallow one with the same seed. They are the same on every run on the same machine and version of torch.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import secrets
import shlex
import shutil
import struct
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from benchmarks.phantom.layout import (
    GENERATION_CONFIG,
    LORA_TARGETS,
    SPECIAL_TOKENS_MAP,
    adapter_config_json,
    llama_config_json,
    llava_config_json,
    tokenizer_config_json,
    tower_config_json,
    training_checkpoint,
    write_json,
)
from benchmarks.phantom.publish import channel_scales, random_weights
from benchmarks.phantom.tokenizer import train_tokenizer
from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

NAME: Final = "llava-rad-synthetic"
MAX_LAYERS: Final = 32
SHARD_BYTES: Final = 1 << 30

SCALE_SIGMA: Final = 0.5
"""Sigma of the log channel scales (`benchmarks.phantom.publish.channel_scales`): they leave the function alone."""
HEAVY_CHANNELS: Final = 8
HEAVY_FACTOR: Final = 10.0
"""What those channels of the hidden state are larger by. Trained decoders have a few such, some far heavier."""
LORA_SHARE: Final = 0.3
"""Standard deviation of a linear's update over that of its base weight: a merge left out is seen at once."""
GAINS: Final = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 3.0}
"""Standard deviation of a linear's output for inputs of 1, where it is not 1: attention that picks some ten of 1,400
positions, and logits (in nats) neither flat nor one-hot."""

_QUIET_FACTOR: Final = 0.01
_FIRST_WORD_ID: Final = 259  # after unk, bos, eos and the 256 bytes
_CHUNK_VALUES: Final = 1 << 22
_FILM_BYTES: Final = 1 << 16  # of one study with its film, which takes 35 kB
_SLACK_BYTES: Final = 64 << 20  # names, indices, the tokenizer
_NOTICE: Final = (
    "These are random weights in the shapes of LLaVA-Rad, written to measure time and memory. The text they give is "
    "random too."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Every size of the model but its depth; the defaults are LLaVA-Rad's."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    vocab_size: int = 32000
    max_position_embeddings: int = 4096
    lora_rank: int = 64
    image_size: int = 518
    tower_dim: int = 768
    tower_depth: int = 12

    def llama_config(self, num_hidden_layers: int) -> dict[str, Any]:
        """Return the base's `config.json` at some depth."""
        return llama_config_json(
            {
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "num_hidden_layers": num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": self.num_attention_heads,
                "vocab_size": self.vocab_size,
                "max_position_embeddings": self.max_position_embeddings,
            }
        )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return the linears of one decoder layer, [out, in], in the order of the files."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        return {
            **{f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "o")},
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }

    def base_shapes(self, num_hidden_layers: int) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor of the base model, in the order of the files."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(num_hidden_layers):
            prefix = f"model.layers.{layer}"
            shapes |= {f"{prefix}.{name}.weight": shape for name, shape in self.linear_shapes().items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{prefix}.{norm}.weight"] = (self.hidden_size,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def lora_shapes(self, num_hidden_layers: int) -> dict[str, tuple[int, int]]:
        """Return name and shape of every LoRA factor, in the order of the file."""
        shapes: dict[str, tuple[int, int]] = {}
        for layer in range(num_hidden_layers):
            for name, (rows, columns) in self.linear_shapes().items():
                module = f"base_model.model.model.layers.{layer}.{name}"
                shapes[f"{module}.lora_A.weight"] = (self.lora_rank, columns)
                shapes[f"{module}.lora_B.weight"] = (rows, self.lora_rank)
        return shapes


def write_checkpoint(
    out: Path,
    *,
    layers: int,
    seed: int = 0,
    studies: int = 0,
    widths: Widths | None = None,
    shard_bytes: int = SHARD_BYTES,
    even: bool = False,
) -> int:
    """Write a random checkpoint to a new folder, whole or not at all.

    Memory holds one shard and the adapter (10 MB a layer), whatever the depth.

    Args:
        out: The folder; must not exist.
        layers: Decoder layers, 1 to 32.
        seed: Any non-negative integer.
        studies: How many synthetic studies to write beside it; 0 writes none.
        widths: The other sizes; LLaVA-Rad's by default. Tests take small ones.
        shard_bytes: The largest shard of the base; a tensor larger than it has a shard to itself.
        even: All channels alike, so that any rounding passes the exporter's parity check: to measure time and memory,
            and nothing of quality.

    Returns:
        Bytes written, all files together.

    Raises:
        LiteError: `out` exists or cannot be written, the disk is too small, or a number is out of its range.
    """
    widths = Widths() if widths is None else widths
    if not 1 <= layers <= MAX_LAYERS or seed < 0 or studies < 0:
        msg = (
            f"got {layers} layers, seed {seed}, {studies} studies · expected 1 to {MAX_LAYERS} layers and no negative "
            "numbers · choose others"
        )
        raise LiteError(msg)
    out = out.absolute()
    if os.path.lexists(out):
        msg = f"{out}: got a path that exists · expected a new one · name another folder, or remove it first"
        raise LiteError(msg)
    with _system_errors_explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _require_space(out, _bytes_needed(widths, layers=layers, studies=studies))
        partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
        try:
            (partial / NAME).mkdir(parents=True)
            (partial / "base").mkdir()
            _write_small_files(partial, widths, layers=layers)
            _write_tower(partial / NAME, widths, seed=seed)
            _write_decoder(partial, widths, layers=layers, seed=seed, shard_bytes=shard_bytes, even=even)
            if studies:
                # Drawing films takes OpenCV, which a checkpoint alone does not need.
                from benchmarks.phantom.write import write_studies

                write_studies(partial / "studies", count=studies, seed=seed, dicom=False)
            written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return written


def make_tokenizer(vocab_size: int) -> bytes:
    """Make a SentencePiece model of exactly `vocab_size` pieces, set up as Llama's is.

    The phantom's tokenizer, which knows the prompt and the findings grammar (about 1.2 tokens a word) and spells out
    other English, is filled up with pseudo-words. Its first pieces are Llama's: unk, bos, eos and the 256 bytes.

    The model is a protobuf message, and two such messages one after the other are read as one: repeated fields, the
    pieces among them, are appended, and of the others the last one counts. So what is missing is written behind it.

    Raises:
        LiteError: `vocab_size` is smaller than the phantom's vocabulary.

    Source: sentencepiece_model.proto; the merging rule is in the Protocol Buffers encoding guide.
    """
    learnt = _learnt_tokenizer()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=learnt)
    count = int(pieces.get_piece_size())
    if vocab_size < count:
        msg = f"got a vocabulary of {vocab_size} · expected at least the {count} learnt pieces · choose a larger one"
        raise LiteError(msg)
    taken = {pieces.id_to_piece(index) for index in range(count)}
    # Below all learnt scores: no pseudo-word is preferred to a learnt piece.
    score = min(float(pieces.get_score(index)) for index in range(count))
    message = bytearray(learnt)
    for word in _pseudo_words():
        if count == vocab_size:
            break
        if word in taken:
            continue
        count, score = count + 1, score - 1.0
        text = word.encode()
        # SentencePiece {piece = 1: string, score = 2: float}, ModelProto {pieces = 1}
        piece = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score)
        message += b"\x0a" + _varint(len(piece)) + piece
    # TrainerSpec {vocab_size = 4}, ModelProto {trainer_spec = 2}
    spec = b"\x20" + _varint(vocab_size)
    return bytes(message) + b"\x12" + _varint(len(spec)) + spec


@functools.cache
def _learnt_tokenizer() -> bytes:
    # One for every seed, so that a text has the same length on all checkpoints. A thousand studies hold every word.
    return train_tokenizer(seed=0, sentence_count=1000)


def _pseudo_words() -> Iterator[str]:
    """Yield the 614,125 words of three open syllables, a space before each, in an order that goes to and fro."""
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvz" for vowel in "aeiou"]
    base = len(syllables)
    for index in range(base**3):
        # The factor is prime, and the number of words is made of 5 and 17: every word comes once.
        word = index * 224_743 % base**3
        yield f"▁{syllables[word // base**2]}{syllables[word // base % base]}{syllables[word % base]}"


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


# -- Weights ---------------------------------------------------------------------------------------------------------


class _Weights:
    """Draws any decoder tensor by its name, in float16 and without ever holding it in float32."""

    def __init__(self, widths: Widths, *, layers: int, seed: int, even: bool = False) -> None:
        self.widths = widths
        self.seed = seed
        scales = channel_scales(widths.llama_config(layers), sigma=0.0 if even else SCALE_SIGMA, seed=seed)
        self.scales = {place: scale.float() for place, scale in scales.items()}
        heavy = self._rng("heavy channels").choice(widths.hidden_size, HEAVY_CHANNELS, replace=False)
        self.residual = torch.ones(widths.hidden_size)
        self.residual[torch.from_numpy(heavy)] = 1.0 if even else HEAVY_FACTOR
        self.chosen = torch.ones(widths.vocab_size)
        self.chosen[:_FIRST_WORD_ID] = _QUIET_FACTOR
        self.chunk = torch.empty(_CHUNK_VALUES)

    def base(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor of the base model."""
        if len(shape) == 1:
            weight = 1.0 + 0.1 * torch.randn(shape, generator=self._generator(name))
            if "layernorm" in name:
                weight *= self._scale(name, "attention_input" if "input_" in name else "mlp_input")
            return weight.to(torch.float16)
        if name == "model.embed_tokens.weight":
            return self._matrix(name, shape, std=1.0, columns=self.residual)
        linear = name.removesuffix(".weight").rpartition(".")[2]
        std = GAINS.get(linear, 1.0) * shape[1] ** -0.5
        if name == "lm_head.weight":
            return self._matrix(name, shape, std=std, rows=self.chosen)
        rows, columns = self._channels(name)
        return self._matrix(name, shape, std=std, rows=rows, columns=columns)

    def lora(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Return a LoRA factor: B·A has the same channel scales as the weight it is added to."""
        rows, columns = self._channels(name)
        if name.endswith("lora_A.weight"):
            return self._matrix(name, shape, std=shape[1] ** -0.5, columns=columns)
        gain = GAINS.get(name.split(".")[-3], 1.0)
        # An entry of B·A is a sum of r products, and s = lora_alpha / r = 2 stands in front of it.
        return self._matrix(name, shape, std=LORA_SHARE * gain / (2.0 * self.widths.lora_rank**0.5), rows=rows)

    def _channels(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Return what the outputs and the inputs of a decoder linear are multiplied by."""
        linear = next(target for target in LORA_TARGETS if target in name)
        if linear in ("q_proj", "k_proj"):
            return None, 1.0 / self._scale(name, "attention_input")
        if linear == "v_proj":
            return self._scale(name, "value"), 1.0 / self._scale(name, "attention_input")
        if linear == "o_proj":
            return self.residual, 1.0 / self._scale(name, "value")
        if linear == "down_proj":
            return self.residual, 1.0 / self._scale(name, "up")
        return self._scale(name, "up") if linear == "up_proj" else None, 1.0 / self._scale(name, "mlp_input")

    def _scale(self, name: str, place: str) -> Tensor:
        layer = name.partition("layers.")[2].partition(".")[0]
        return self.scales[f"{layer}.{place}"]

    def _matrix(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        std: float,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Draw a matrix a few rows at a time: in the processor's cache, which is twice as quick, too."""
        height, width = shape
        step = max(1, _CHUNK_VALUES // width)
        matrix = torch.empty(shape, dtype=torch.float16)
        factor = std * (torch.ones(width) if columns is None else columns)
        generator = self._generator(name)
        for start in range(0, height, step):
            part = matrix[start : start + step]
            chunk = self.chunk[: part.numel()].view(part.shape).normal_(generator=generator)
            chunk *= factor
            if rows is not None:
                chunk *= rows[start : start + step, None]
            part.copy_(chunk)
        return matrix

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(int(self._rng(name).integers(2**63)))

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *name.encode()])


# -- Files -----------------------------------------------------------------------------------------------------------


def _write_small_files(folder: Path, widths: Widths, *, layers: int) -> None:
    checkpoint, base = folder / NAME, folder / "base"
    base_name = f"{NAME}/base"
    config = widths.llama_config(layers)
    llava = llava_config_json(
        config,
        image_size=widths.image_size,
        mm_hidden_size=widths.tower_dim,
        rank=widths.lora_rank,
        base_name=base_name,
    )
    write_json(checkpoint / "config.json", llava)
    write_json(checkpoint / "adapter_config.json", adapter_config_json(widths.lora_rank, base_name))
    write_json(checkpoint / f"biomedclipcxr_{widths.image_size}.json", tower_config_json(widths.image_size))
    (checkpoint / "NOTICE").write_text(f"{_NOTICE}\n", encoding="utf-8")
    write_json(base / "config.json", {**config, "_name_or_path": base_name})
    write_json(base / "generation_config.json", GENERATION_CONFIG)
    write_json(base / "tokenizer_config.json", tokenizer_config_json(widths.max_position_embeddings))
    write_json(base / "special_tokens_map.json", SPECIAL_TOKENS_MAP)
    (base / "tokenizer.model").write_bytes(make_tokenizer(widths.vocab_size))


def _write_tower(checkpoint: Path, widths: Widths, *, seed: int) -> None:
    # A decoder of no layers and one word: only the tower and the projector are wanted.
    config = {**widths.llama_config(0), "vocab_size": 1}
    trunk, projector, _ = random_weights(
        config, image_size=widths.image_size, dim=widths.tower_dim, depth=widths.tower_depth, seed=seed
    )
    prefix = "base_model.model.model.mm_projector."
    _save({prefix + key: t.to(torch.float16) for key, t in projector.items()}, checkpoint / "non_lora_trainables.bin")
    _save(training_checkpoint(trunk), checkpoint / f"biomedclipcxr_{widths.image_size}_checkpoint.pt")


def _write_decoder(folder: Path, widths: Widths, *, layers: int, seed: int, shard_bytes: int, even: bool) -> None:
    weights = _Weights(widths, layers=layers, seed=seed, even=even)
    base_shapes, lora_shapes = widths.base_shapes(layers), widths.lora_shapes(layers)
    total = sum(map(_fp16_bytes, (*base_shapes.values(), *lora_shapes.values())))
    with tqdm(total=total, desc="writing the decoder", unit="B", unit_scale=True, disable=None) as progress:
        weight_map: dict[str, str] = {}
        shards = _shards(base_shapes, shard_bytes)
        for number, names in enumerate(shards, start=1):
            file_name = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
            state = {}
            for name in names:
                state[name] = weights.base(name, base_shapes[name])
                progress.update(_fp16_bytes(base_shapes[name]))
            _save(state, folder / "base" / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": sum(map(_fp16_bytes, base_shapes.values()))}, "weight_map": weight_map}
        write_json(folder / "base" / "pytorch_model.bin.index.json", index)
        adapter = {}
        for name, shape in lora_shapes.items():
            adapter[name] = weights.lora(name, shape)
            progress.update(_fp16_bytes(shape))
        _save(adapter, folder / NAME / "adapter_model.bin")


def _shards(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    """Fill shards in the order of the network; as in the published base, a layer may lie in two of them."""
    shards: list[list[str]] = []
    free = 0
    for name, shape in shapes.items():
        if not shards or _fp16_bytes(shape) > free:
            shards.append([])
            free = shard_bytes
        shards[-1].append(name)
        free -= _fp16_bytes(shape)
    return shards


def _fp16_bytes(shape: tuple[int, ...]) -> int:
    return 2 * prod(shape)


def _save(content: dict[str, Any], path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:
        # torch's own writer reports a full disk in this way, over several lines and without the system's reason.
        reason = str(error).splitlines()[0]
        msg = f"{path}: got a write that failed ({reason}) · expected room for the file · free some space on this disk"
        raise LiteError(msg) from error


def _bytes_needed(widths: Widths, *, layers: int, studies: int) -> int:
    shapes = (*widths.base_shapes(layers).values(), *widths.lora_shapes(layers).values())
    hidden, dim = widths.hidden_size, widths.tower_dim
    projector = 2 * (hidden * dim + hidden * hidden + 2 * hidden)
    # A block holds 12 dim² weights and some vectors; then there are the embeddings of patches and of positions.
    tower = 4 * dim * (widths.tower_depth * (12 * dim + 16) + (widths.image_size // 14) ** 2 + 14 * 14 * 3 + 8)
    return sum(map(_fp16_bytes, shapes)) + projector + tower + studies * _FILM_BYTES + _SLACK_BYTES


def _require_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        msg = (
            f"{out.parent}: got {free / 2**30:.2f} GiB free · expected at least {needed / 2**30:.2f} GiB for the "
            "checkpoint · free some space, name a folder on another disk, or take fewer layers"
        )
        raise LiteError(msg)


@contextlib.contextmanager
def _system_errors_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "free some space" if error.errno == errno.ENOSPC else "check the disk and its permissions"
        msg = (
            f"{error.filename or out}: got an error from the system ({error.strerror or error}) · expected a place "
            f"that can be written · {what}, or name another folder"
        )
        raise LiteError(msg) from error


# -- Command line ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks synthetic",
        description="Write a checkpoint of LLaVA-Rad's shapes with random weights, to measure time and memory on.",
        epilog=(
            "Two depths tell what a layer costs: try 3 and 6. A layer takes 0.42 GB of disk, the rest 1 GB.\n\n"
            "exit status: 0 done, 1 it failed (nothing was written), 2 wrong use, 130 interrupted."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help=f"a new folder; receives {NAME}/ and base/")
    parser.add_argument(
        "--layers",
        type=int,
        required=True,
        metavar="N",
        choices=range(1, MAX_LAYERS + 1),
        help=f"decoder layers, 1 to {MAX_LAYERS}; the published model has {MAX_LAYERS}",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of every weight (default: %(default)s)")
    parser.add_argument(
        "--studies",
        type=int,
        default=0,
        metavar="N",
        help="also write OUT/studies/: N synthetic films and a JSON list, for calibration (default: none)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    try:
        written = write_checkpoint(out, layers=arguments.layers, seed=arguments.seed, studies=arguments.studies)
    except LiteError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\ninterrupted: nothing was written to {out}\n")
        return 130
    layers = f"{arguments.layers} decoder layer{'s' if arguments.layers > 1 else ''}"
    contents = f"random weights in LLaVA-Rad's layout, {layers} of the published {MAX_LAYERS}"
    command = ["python", "-m", "export", "--checkpoint", str(out / NAME), "--base", str(out / "base")]
    command += ["--out", f"{out}-artifact"]
    if arguments.studies:
        contents += f", {arguments.studies} studies"
        command += ["--verify-data", str(out / "studies" / "studies.json")]
    sys.stdout.write(f"{out}: {written:,} bytes: {contents}\n\nnext:\n  {shlex.join(command)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
