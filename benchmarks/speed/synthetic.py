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
  published ones, and every weight is a draw of its own: nothing repeats or compresses, no matrix has low rank.
* **Text means nothing.** Drafts are pseudo-words. The end token and the byte pieces are never chosen, so every draft
  has exactly as many tokens as were asked for, all of them printable.
* **A quantiser's loss is not the real one.** Weights are Gaussian, and all channels alike: any rounding passes the
  exporter's parity check. A trained decoder has structure that a quantiser can exploit, and outliers.

The draws are those of `benchmarks.speed.weights`: the first layers of a deep checkpoint are those of a shallow one.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.exports import measured_run
from benchmarks.phantom.layout import (
    GENERATION_CONFIG,
    SPECIAL_TOKENS_MAP,
    adapter_config_json,
    llava_config_json,
    tokenizer_config_json,
    tower_config_json,
    training_checkpoint,
    write_json,
)
from benchmarks.phantom.publish import random_weights
from benchmarks.speed.tokenizer import make_tokenizer
from benchmarks.speed.weights import Model, Shapes, gain_of
from lite.console import positive, run_command
from lite.errors import LiteError
from lite.files import staged_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


NAME: Final = "llava-rad-synthetic"
REAL_LAYERS: Final = 32
SHARD_TENSORS: Final = 12
"""Of a shard of the base: a GB of the real widths. As in the published one, a layer may lie in two of them."""

LORA_SHARE: Final = 0.3
"""Standard deviation of a linear's update over that of its base weight: a merge left out is seen at once."""

_QUIET_FACTOR: Final = 0.01
_FIRST_WORD_ID: Final = 259  # after unk, bos, eos and the 256 bytes
_NOTICE: Final = (
    "These are random weights in the shapes of LLaVA-Rad, written to measure time and memory. The text they give is "
    "random too."
)


def write_checkpoint(out: Path, *, layers: int, studies: int = 0, shapes: Shapes | None = None) -> int:
    """Write a random checkpoint to a new folder, whole or not at all.

    Memory holds one shard and the adapter (10 MB a layer), whatever the depth.

    Args:
        out: The folder; must not exist.
        layers: Decoder layers, at least 1.
        studies: How many synthetic studies to write beside it; 0 writes none.
        shapes: The other sizes; LLaVA-Rad's by default. Tests take small ones.

    Returns:
        Bytes written, all files together.

    Raises:
        LiteError: `out` exists or cannot be written, or the disk is full.
    """
    model = Model(shapes=Shapes() if shapes is None else shapes, num_layers=layers)
    out = out.absolute()
    with staged_folder(out) as staged:
        partial = staged.path
        (partial / NAME).mkdir()
        (partial / "base").mkdir()
        _write_small_files(partial, model)
        _write_tower(partial / NAME, model)
        _write_decoder(partial, model)
        if studies:
            # Drawing films takes OpenCV, which a checkpoint alone does not need.
            from benchmarks.phantom.write import write_studies

            write_studies(partial / "studies", count=studies, seed=0, dicom=False)
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        staged.finish()
    return written


def export_checkpoint(checkpoint: Path, out: Path, *options: str) -> None:
    """Export a written checkpoint, as a user would type it; what rounding makes of random weights is no matter.

    Raises:
        LiteError: it failed; the exporter's last words are the message.
    """
    measured_run(
        [sys.executable, *_export(checkpoint, out), "--verify-studies", "1", "--keep-anyway", "--quiet", *options]
    )


def _export(checkpoint: Path, out: Path) -> list[str]:
    command = ["-m", "export", "--checkpoint", checkpoint / NAME, "--base", checkpoint / "base", "--out", out]
    return [str(word) for word in command]


# -- Weights ---------------------------------------------------------------------------------------------------------


def base_tensor(model: Model, name: str) -> Tensor:
    """Return a tensor of the base model. The end token and the byte pieces are never chosen."""
    drawn = model.tensor(name)
    if name == "lm_head.weight":
        drawn[:_FIRST_WORD_ID] *= np.float16(_QUIET_FACTOR)
    return torch.from_numpy(drawn)


def lora_tensor(model: Model, name: str, shape: tuple[int, int]) -> Tensor:
    """Return a LoRA factor. An entry of B·A is a sum of r products, and lora_alpha / r = 2 stands in front of it."""
    std = shape[1] ** -0.5
    if name.endswith("lora_B.weight"):
        std = LORA_SHARE * gain_of(name) / (2.0 * shape[1] ** 0.5)
    return torch.from_numpy(model.matrix(name, shape, std))


# -- Files -----------------------------------------------------------------------------------------------------------


def _write_small_files(folder: Path, model: Model) -> None:
    checkpoint, base, shapes, config = folder / NAME, folder / "base", model.shapes, model.config
    base_name, size = f"{NAME}/base", model.shapes.image_size
    llava = llava_config_json(
        config, image_size=size, mm_hidden_size=shapes.tower_dim, rank=shapes.lora_rank, base_name=base_name
    )
    for path, content in {
        checkpoint / "config.json": llava,
        checkpoint / "adapter_config.json": adapter_config_json(shapes.lora_rank, base_name),
        checkpoint / f"biomedclipcxr_{size}.json": tower_config_json(size),
        base / "config.json": {**config, "_name_or_path": base_name},
        base / "generation_config.json": GENERATION_CONFIG,
        base / "tokenizer_config.json": tokenizer_config_json(shapes.max_position_embeddings),
        base / "special_tokens_map.json": SPECIAL_TOKENS_MAP,
    }.items():
        write_json(path, content)
    (checkpoint / "NOTICE").write_text(f"{_NOTICE}\n", encoding="utf-8")
    (base / "tokenizer.model").write_bytes(make_tokenizer(shapes.vocab_size))


def _write_tower(checkpoint: Path, model: Model) -> None:
    # A decoder of no layers and one word: only the tower and the projector are wanted.
    shapes = model.shapes
    trunk, projector, _ = random_weights(
        {**shapes.config(0), "vocab_size": 1},
        image_size=shapes.image_size,
        dim=shapes.tower_dim,
        depth=shapes.tower_depth,
    )
    prefix = "base_model.model.model.mm_projector."
    _save({prefix + key: t.to(torch.float16) for key, t in projector.items()}, checkpoint / "non_lora_trainables.bin")
    _save(training_checkpoint(trunk), checkpoint / f"biomedclipcxr_{shapes.image_size}_checkpoint.pt")


def _write_decoder(folder: Path, model: Model) -> None:
    names, weight_map = list(model.tensor_shapes), dict[str, str]()
    starts = range(0, len(names), SHARD_TENSORS)
    for number, start in enumerate(tqdm(starts, desc="writing the decoder", disable=None), start=1):
        file_name, shard = f"pytorch_model-{number:05d}-of-{len(starts):05d}.bin", names[start : start + SHARD_TENSORS]
        _save({name: base_tensor(model, name) for name in shard}, folder / "base" / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(2 * prod(shape) for shape in model.tensor_shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "base" / "pytorch_model.bin.index.json", index)
    adapter = {name: lora_tensor(model, name, shape) for name, shape in model.shapes.lora(model.num_layers).items()}
    _save(adapter, folder / NAME / "adapter_model.bin")


def _save(content: dict[str, Any], path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:
        # torch's own writer reports a full disk in this way, over several lines and without the system's reason.
        reason = str(error).splitlines()[0]
        msg = f"{path}: got a write that failed ({reason}) · expected room for the file · free some space on this disk"
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
        choices=range(1, REAL_LAYERS + 1),
        help=f"decoder layers, 1 to {REAL_LAYERS}; the published model has {REAL_LAYERS}",
    )
    parser.add_argument(
        "--studies",
        type=positive,
        default=0,
        metavar="N",
        help="also write OUT/studies/: N synthetic films and a JSON list, for calibration (default: none)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    written = write_checkpoint(out, layers=arguments.layers, studies=arguments.studies)
    layers = f"{arguments.layers} decoder layer{'s' if arguments.layers > 1 else ''}"
    contents = f"random weights in LLaVA-Rad's layout, {layers} of the published {REAL_LAYERS}"
    command = ["python", *_export(out, Path(f"{out}-artifact"))]
    if arguments.studies:
        contents += f", {arguments.studies} studies"
        command += ["--verify-data", str(out / "studies" / "studies.json")]
    sys.stdout.write(f"{out}: {written:,} bytes: {contents}\n\nnext:\n  {shlex.join(command)}\n")
    return 0
