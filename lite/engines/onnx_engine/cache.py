"""The static key/value cache of the onnx engine: for each layer two buffers, of whose addresses the graph is told.

key, value   [B, num_key_value_heads, max_seq_len, head_dim]
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lite.engines.onnx_engine.sample import sample
from lite.engines.onnx_session import import_onnxruntime
from lite.engines.protocol import GREEDY, NO_ADAPTER, ChosenTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.artifact.parts import CacheDtype
    from lite.config import DecoderConfig

    Array = np.ndarray[Any, np.dtype[Any]]

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}


@dataclasses.dataclass(frozen=True, slots=True)
class OnnxChosen:
    """Chosen tokens, which are here already."""

    tokens: dict[int, ChosenTokens]

    def wait(self) -> dict[int, ChosenTokens]:
        """Return them by row."""
        return self.tokens


def _memory(shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[str, int]) -> Any:  # noqa: ANN401 - OrtValue
    """Return memory that holds anything, on a CPU by NumPy, which asks for large pages: see `use_large_pages`."""
    ort_value = import_onnxruntime().OrtValue
    if device[0] == "cpu":
        return ort_value.ortvalue_from_numpy(np.empty(shape, dtype))
    return ort_value.ortvalue_from_shape_and_type(shape, dtype, *device)


class OnnxCache:
    """Keys and values of every token so far, for several studies."""

    def __init__(
        self, config: DecoderConfig, *, num_rows: int, max_seq_len: int, dtype: CacheDtype, device: tuple[str, int]
    ) -> None:
        """Allocate room for `num_rows` rows of `max_seq_len` tokens."""
        self.shape = (num_rows, config.num_key_value_heads, max_seq_len, config.head_dim)
        self.dtype = DTYPES[dtype]
        self.device = device
        self.num_cached_tokens = [0] * num_rows
        self.is_active = [False] * num_rows
        self.input_ids = [0] * num_rows  # the newest token of each row
        self.sampling = [GREEDY] * num_rows
        self.adapters = [NO_ADAPTER] * num_rows  # what each row computes with
        self.last_logits: Array | None = None  # what the newest tokens were chosen from, [rows, T, vocab_size]
        self.buffers = {
            f"{layer}.{kind}": _memory(self.shape, self.dtype, device)
            for layer in range(config.num_hidden_layers)
            for kind in ("key", "value")
        }
        self.bindings: dict[tuple[int, int], Any] = {}  # of some rows from one on; `OnnxDecoder` makes them

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self.shape[0]

    @property
    def max_seq_len(self) -> int:
        """The number of slots of a row."""
        return self.shape[2]

    @property
    def nbytes(self) -> int:
        """2 (keys, values) x layers x rows x kv_heads x max_seq_len x head_dim x bytes of an element."""
        return len(self.buffers) * math.prod(self.shape) * self.dtype.itemsize

    @property
    def active(self) -> range:
        """The rows from the first to the last that is active."""
        rows = [row for row, active in enumerate(self.is_active) if active]
        return range(min(rows, default=0), max(rows, default=-1) + 1)

    def bind(self, binding: Any, first: int, count: int) -> None:  # noqa: ANN401 - of ONNX Runtime
        """Tell a binding where the buffers of some rows are."""
        shape = (count, *self.shape[1:])
        offset = first * math.prod(self.shape[1:]) * self.dtype.itemsize
        for name, buffer in self.buffers.items():
            place = (*self.device, self.dtype, shape, buffer.data_ptr() + offset)
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)

    def truncate(self, row: int, length: int, *, newest: int | None = None) -> None:
        """Cut a row back to its first `length` tokens; an active row goes on with `newest`."""
        self.num_cached_tokens[row] = length
        if newest is not None:
            self.input_ids[row] = newest

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give a row that is not active the first `length` tokens of another."""
        for buffer in self.buffers.values():
            values = buffer.numpy()  # a view on a CPU, or else a copy on the host
            values[target, :, :length] = values[source, :, :length]
            if self.device[0] != "cpu":
                buffer.update_inplace(values)
        self.num_cached_tokens[target] = length

    def release(self, row: int, *, damaged: bool = False) -> None:
        """Let `decode` leave a row out. It keeps what it holds, as no slot is read that is not its study's."""
        self.is_active[row] = False
        if damaged:
            self.num_cached_tokens[row] = 0

    def choose(self, rows: Sequence[int], logits: Array, positions: Sequence[int]) -> dict[int, ChosenTokens]:
        """Choose behind tokens of some rows: logits [len(rows), vocab_size]. A row may come several times, in order."""
        how = [self.sampling[row] for row in rows]
        num_top = max((each.num_top for each in how), default=0)
        chosen = sample(
            logits,
            temperature=np.array([each.temperature for each in how], np.float32),
            top_p=np.array([each.top_p for each in how], np.float32),
            seeds=np.array([each.seed for each in how], np.int64),
            positions=np.array(positions, np.int64),
            num_top=num_top,
        )
        tokens: dict[int, ChosenTokens] = {}
        for row in dict.fromkeys(rows):
            at = [place for place, other in enumerate(rows) if other == row]
            pairs = (zip(chosen.top_ids[i].tolist(), chosen.top_logprobs[i].tolist(), strict=True) for i in at)
            tokens[row] = ChosenTokens(
                token_ids=tuple(chosen.token_ids[at].tolist()),
                logprobs=tuple(chosen.logprobs[at].tolist()),
                top=tuple(tuple(each) for each in pairs) if num_top else (),
                is_finite=bool(chosen.is_finite[at].all()),
            )
            self.input_ids[row] = tokens[row].token_ids[-1]
        return tokens
