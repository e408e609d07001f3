"""GPTQModel beside the exporter: its own pipeline, in its own environment, on the same weights and token ids.

float weights ─▶ Hugging Face folder ─┐
calibration ids ──────────────────────┴─▶ gptqmodel_peer ─▶ its folder ─▶ read by `kernels.gptq` ─▶ judged as others
"""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.quality.real.decoder import write_folder
from benchmarks.quality.real.rounding import RoundedLayer, Rounding, Setup, Skipped, Way
from export.source.lora import LINEARS
from export.source.tensors import open_tensors
from kernels.gptq import TENSORS, GptqWeight
from lite.errors import CheckpointError, LiteError

if TYPE_CHECKING:
    from torch import Tensor

BITS: Final = 4
OPTIONS: Final[dict[str, dict[str, Any]]] = {"gptqmodel": {}, "gptqmodel-mse": {"mse": 2.0}}
"""What is asked of it, by row."""


class Peer:
    """A decoder that GPTQModel has rounded."""

    def __init__(self, setup: Setup, python: Path, group_size: int, options: dict[str, Any]) -> None:
        """Let it round all layers.

        Raises:
            Skipped: its environment is not there, or the group size does not fit the decoder.
            LiteError: it failed.
        """
        config = setup.decoder.config
        if not python.is_file():
            raise Skipped(f"no environment with GPTQModel at {python}: make it by `make interop`")
        if group_size > 0 and (config.hidden_size % group_size or config.intermediate_size % group_size):
            raise Skipped(f"its groups of {group_size} do not fill the inputs, and readers refuse what is left over")
        folder = setup.folder / "float32"
        folder.mkdir()
        write_folder(setup.decoder, folder)
        request = {
            "folder": str(folder),
            "input_ids": [list(block) for block in setup.blocks],
            "bits": BITS,
            "group_size": group_size,
            "options": options,
        }
        (setup.folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        script = Path(__file__).resolve().with_name("gptqmodel_peer.py")
        # absolute, not resolved: a link is how Python finds its environment. It leaves its logs where it runs.
        command = [str(python.absolute()), "-I", str(script), str(setup.folder)]
        done = subprocess.run(
            command, check=False, capture_output=True, encoding="utf-8", errors="replace", cwd=setup.folder
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise LiteError(
                f"{python}: got exit status {done.returncode} ({said}) · expected a folder · run it by itself"
            )
        answer = json.loads((setup.folder / "answer.json").read_text(encoding="utf-8"))
        self.seconds: float = answer["seconds"]
        self.errors: dict[str, float] = {}
        self._tensors = open_tensors(setup.folder / "quantised", "model", what="GPTQModel's decoder")

    def round(self, index: int, layer: dict[str, Tensor]) -> RoundedLayer:
        """Read a layer of its folder; its norms are the decoder's own."""
        read = {name: self._read(f"model.layers.{index}.{name}") for name in LINEARS}
        return RoundedLayer(
            norms={name: tensor for name, tensor in layer.items() if "layernorm" in name},
            linears={name: weight.dequantize(torch.float32) for name, weight in read.items()},
            bits={name: _stored_bits(weight) for name, weight in read.items()},
        )

    def _read(self, name: str) -> GptqWeight:
        found = self._tensors.read([f"{name}.{part}" for part in TENSORS])
        try:
            return GptqWeight.from_tensors({key.rpartition(".")[2]: t for key, t in found.items()}, bits=BITS)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error


def _stored_bits(weight: GptqWeight) -> float:
    bits: float = 32 * weight.qweight.numel() + (16 + weight.bits) * weight.scales.numel()
    return bits


def peers(group_size: int, python: Path) -> list[Way]:
    """Return GPTQModel's ways to round."""

    def make(options: dict[str, Any], setup: Setup) -> Rounding:
        return Peer(setup, python, group_size, options)

    return [Way(name=name, make=partial(make, options)) for name, options in OPTIONS.items()]
