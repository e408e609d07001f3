"""Graphics cards by their vendors' figures, and figures that nobody measured here.

A `Figure` says where it comes from: measured, published or modelled. A modelled one is printed with a "~", so
that it cannot be taken for a measurement.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final, Literal, NamedTuple

from lite.artifact.open import read_json_object
from lite.bench.columns import duration, number
from lite.config import from_json
from lite.engines.machine import Gpu, Machine
from lite.engines.onnx_session import CPU, CUDA
from lite.memory.sizes import shown_bytes

V100_ENTRY: Final = Path(__file__).resolve().parents[2] / "benchmarks" / "references" / "v100_fp16.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure with its origin. Printed, it shows what it is: `~12.3 ms` is modelled, `57.3 % (published)` is not."""

    value: float
    unit: Literal["s", "tokens/s", "bytes", "fraction"]
    kind: Literal["measured", "published", "modelled"]
    source: str  # where it stands; of what is modelled: its formula

    def __str__(self) -> str:
        shown = {
            "s": duration(self.value),
            "tokens/s": f"{number(self.value)} tok/s",
            "bytes": shown_bytes(self.value),
            "fraction": f"{100 * self.value:.1f} %",
        }[self.unit]
        return {"measured": shown, "published": f"{shown} (published)", "modelled": f"~{shown}"}[self.kind]


class Card(NamedTuple):
    """What its vendor says of a GPU."""

    name: str
    memory_bytes: int
    bandwidth: float  # bytes per second
    peak_flops: float  # float16 in, float32 sums, dense, tensor cores: what torch asks for unless told otherwise
    capability: tuple[int, int]
    source: str

    def machine(self) -> Machine:
        """Return a machine with such a card, all of it free."""
        gpu = Gpu(
            name=self.name, capability=self.capability, total_bytes=self.memory_bytes, free_bytes=self.memory_bytes
        )  # fmt: skip
        return Machine(gpus=(gpu,), has_torch=True, onnxruntime="1.32.0", providers=(CUDA, CPU))


_CONSUMER: Final = "512 float16 operations with float32 sums a multiprocessor and clock. Twice that with float16 sums."
CARDS: Final = (
    Card("RTX 3060 12GB", 12 << 30, 360e9, 25.5e12, (8, 6), "NVIDIA: 28 multiprocessors, 1.78 GHz, 192 bit of GDDR6 at "
         f"15 Gbit/s; GA102 whitepaper: {_CONSUMER}"),
    Card("RTX 4060 Ti 16GB", 16 << 30, 288e9, 44.1e12, (8, 9), "NVIDIA: 34 multiprocessors, 2.54 GHz, 128 bit of GDDR6 "
         f"at 18 Gbit/s; Ada whitepaper: {_CONSUMER}"),
    Card("T4", 15 << 30, 320e9, 65e12, (7, 5), "NVIDIA's T4 datasheet: 65 TFLOP/s mixed precision, 320 GB/s, 16 GB of "
         "which error correction takes a sixteenth. 70 W: it throttles."),
    Card("V100 16GB", 16 << 30, 900e9, 112e12, (7, 0), "NVIDIA's V100 datasheet, PCIe: 112 TFLOP/s tensor, 900 GB/s. "
         "SXM2: 125 TFLOP/s."),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceCard:
    """What is known of a model on a card, from wherever: `benchmarks/references/v100_fp16.json`."""

    name: str
    card: str
    decoder_format: str
    num_prompt_tokens: int  # of the study that the modelled figures are about
    num_new_tokens: int
    notes: list[str]
    figures: dict[str, Figure]


def read_reference_card(path: Path) -> ReferenceCard:
    """Read the entry of a card.

    Raises:
        ArtifactError: the file is not one.
    """
    return from_json(ReferenceCard, read_json_object(path), where=str(path))
