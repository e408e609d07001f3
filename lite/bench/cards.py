"""Graphics cards by their vendors' figures, and figures that nobody measured here.

A `Figure` says where it comes from: measured, published or modelled. It is no number and prints a modelled one with a
"~", so that none of them can be taken for a measurement.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from lite.artifact.open import read_json_object
from lite.config import from_json
from lite.engines.machine import Gpu, Machine
from lite.engines.onnx_session import CPU, CUDA
from lite.errors import LiteError
from lite.eval.figures import Missing
from lite.memory.sizes import shown_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

V100_ENTRY: Final = Path(__file__).resolve().parents[2] / "benchmarks" / "references" / "v100_fp16.json"


# -- Figures that nobody measured here -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure with its origin. Printed, it shows what it is: `~12.3 ms` is modelled, `57.3 % (published)` is not."""

    value: float
    unit: Literal["s", "tokens/s", "bytes", "fraction"]
    kind: Literal["measured", "published", "modelled"]
    source: str | None = None  # of what was measured or published: where it stands
    formula: str | None = None  # of what is modelled

    def __post_init__(self) -> None:
        """Refuse a figure that does not say where it comes from."""
        origin = "formula" if self.kind == "modelled" else "source"
        if not getattr(self, origin):
            msg = f"got a {self.kind} figure, {self.value:g} {self.unit}, without a {origin} · expected one · add it"
            raise LiteError(msg)

    def __str__(self) -> str:
        written: dict[str, Callable[[float], str]] = {
            "s": _seconds, "tokens/s": _rate, "bytes": shown_bytes, "fraction": _percent
        }  # fmt: skip
        shown = written[self.unit](self.value)
        return {"measured": shown, "published": f"{shown} (published)", "modelled": f"~{shown}"}[self.kind]

    def to_json(self) -> dict[str, Any]:
        """Return value, unit, kind, and the source or the formula; four digits of what is modelled."""
        value = float(f"{self.value:.4g}") if self.kind == "modelled" else self.value
        fields = dataclasses.asdict(self) | {"value": value}
        return {key: value for key, value in fields.items() if value is not None}


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{_three_digits(value * 1e3)} ms"


def _rate(value: float) -> str:
    return f"{_three_digits(value)} tok/s"


def _percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def with_prefix(value: float, unit: str) -> str:
    """Return a quantity as text, such as "3.63 GB"; three digits."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{_three_digits(value / size)} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


# -- Cards -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Card:
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


_AMPERE_AND_ADA: Final = "512 float16 operations with float32 sums a multiprocessor and clock"

CARDS: Final = (
    Card(
        name="RTX 3060 12GB",
        memory_bytes=12 << 30,
        bandwidth=360e9,
        peak_flops=25.5e12,
        capability=(8, 6),
        source="NVIDIA: 28 multiprocessors, 1.78 GHz, 192 bit of GDDR6 at 15 Gbit/s; GA102 whitepaper: "
        f"{_AMPERE_AND_ADA}. Twice that with float16 sums.",
    ),
    Card(
        name="RTX 4060 Ti 16GB",
        memory_bytes=16 << 30,
        bandwidth=288e9,
        peak_flops=44.1e12,
        capability=(8, 9),
        source="NVIDIA: 34 multiprocessors, 2.54 GHz, 128 bit of GDDR6 at 18 Gbit/s; Ada whitepaper: "
        f"{_AMPERE_AND_ADA}. Twice that with float16 sums.",
    ),
    Card(
        name="T4",
        memory_bytes=15 << 30,
        bandwidth=320e9,
        peak_flops=65e12,
        capability=(7, 5),
        source="NVIDIA's T4 datasheet: 65 TFLOP/s mixed precision, 320 GB/s, 16 GB of which error correction takes a "
        "sixteenth. 70 W: it throttles.",
    ),
    Card(
        name="V100 16GB",
        memory_bytes=16 << 30,
        bandwidth=900e9,
        peak_flops=112e12,
        capability=(7, 0),
        source="NVIDIA's V100 datasheet, PCIe: 112 TFLOP/s tensor, 900 GB/s. SXM2: 125 TFLOP/s.",
    ),
)


# -- The entry of a card that is not here ----------------------------------------------------------------------------


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

    def to_json(self) -> dict[str, Any]:
        """Return what `read_reference_card` reads."""
        figures = {name: figure.to_json() for name, figure in self.figures.items()}
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {"figures": figures}


def read_reference_card(path: Path) -> ReferenceCard:
    """Read the entry of a card.

    Raises:
        ArtifactError: the file is not one.
    """
    return from_json(ReferenceCard, read_json_object(path), where=str(path))


def v100_entry() -> ReferenceCard | Missing:
    """Return what is known of the 7B model in fp16 on a V100."""
    if not V100_ENTRY.is_file():
        return Missing(why="not installed", todo="The V100's entry lies in the repository, benchmarks/references/.")
    return read_reference_card(V100_ENTRY)
