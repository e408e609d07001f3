"""How an artifact is run: what computes it, where, in which numbers, in how much memory, and why.

`lite.engines.resolve` makes the plan, of options, artifact and machine. `python -m lite plan` prints it, and
`lite.load` builds exactly that.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from lite.memory.plan import MemoryPlan, Shapes, Workload, plan_memory

if TYPE_CHECKING:
    from lite.engines.protocol import EngineName


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """How an artifact will be run on a machine, and why."""

    workload: Workload
    shapes: Shapes
    fp16_accumulation: bool
    drafts: str  # "off", "auto", or the path of a table
    provider: str | None  # of ONNX Runtime, for the decoder; None for torch's
    vision_provider: str
    memory: MemoryPlan
    limit: int | None  # bytes; None: nothing sets one
    limit_from: str
    losses: dict[str, float | None]  # mean KL in nats a token, as measured at export; None: not measured
    choices: dict[str, tuple[str, str]]  # what was chosen, and why
    fallbacks: tuple[str, ...] = ()  # what is slower than it has to be, each with its reason
    notes: tuple[str, ...] = ()

    @property
    def engine(self) -> EngineName:
        """What computes the decoder."""
        return self.workload.engine

    @property
    def device(self) -> str:
        """Where: "cpu", "cuda" or "cuda:N"."""
        return self.workload.device

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return self.choices["dtype"][0]

    @property
    def cache_dtype(self) -> str:
        """What keys and values are kept in."""
        return self.choices["cache"][0]

    @property
    def prompt_weights(self) -> str:
        """What prompts are read by: "int8", weights of their own, or "stored" ones."""
        return "int8" if self.workload.int8_prompts else "stored"

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that rows may use, in the order of their slots."""
        return self.workload.adapters

    @property
    def chunk_size(self) -> int:
        """How many tokens of a prompt go through torch's decoder together."""
        return self.workload.chunk_size

    @property
    def rows(self) -> int:
        """How many studies can be under way at a time."""
        return self.workload.num_rows

    @property
    def max_seq_len(self) -> int:
        """The places of a row: prompt, reason and text of most studies."""
        return self.memory.max_seq_len

    def with_rows(
        self, rows: int, *, num_prompt_tokens: int | None = None, max_new_tokens: int | None = None
    ) -> MemoryPlan:
        """Count the memory of other rows, perhaps with longer prompts or texts."""
        workload = dataclasses.replace(
            self.workload,
            num_rows=rows,
            num_prompt_tokens=num_prompt_tokens or self.workload.num_prompt_tokens,
            max_new_tokens=max_new_tokens or self.workload.max_new_tokens,
        )
        return plan_memory(self.shapes, workload)

    def fits(self, num_rows: int, max_seq_len: int) -> bool:
        """Say whether so many rows of that length stay within the limit: what a long reason or a long text needs."""
        prompt = max(max_seq_len - self.workload.max_new_tokens, 1)
        return self.limit is None or self.with_rows(num_rows, num_prompt_tokens=prompt).card_bytes <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Return what `python -m lite plan --json` prints."""
        memory = {"peak_bytes": self.memory.card_bytes, "row_bytes": self.memory.row_bytes}
        choices = {name: {"value": value, "why": why} for name, (value, why) in self.choices.items()}
        return {name: getattr(self, name) for name in _PRINTED} | {
            "memory": memory | dataclasses.asdict(self.memory),
            "choices": choices,
        }


_PRINTED: Final = (
    "engine", "device", "dtype", "cache_dtype", "prompt_weights", "provider", "vision_provider", "chunk_size", "rows",
    "max_seq_len", "fp16_accumulation", "drafts", "adapters", "limit", "limit_from", "losses", "fallbacks", "notes",
)  # fmt: skip
