"""The graphs of `decoder.onnx` with adapters: each row of a batch computes with its own, or with none.

    x ─ layers.I.qkv ─▶ y.own ─────────────────────────────────────── + ─▶ y
    x ─ A of all adapters ─▶ h ─ Where(it is the row's) ─ B of all ───┘
                                       ▲
    adapter [batch,1,1] ─ Equal ───────┘   to the adapter that a column of h belongs to

q, k and v are one linear of three parts, whose B are different: they stand side by side, and a row of h becomes three,
of which each has the columns of its own part, and 0 elsewhere. So one product reads all of B once, and what it gives,
one part behind the other, is in place. (A product for each, and what puts them together, took half as long again.)

An artifact holds no such graph. Where adapters are loaded, nodes are put behind the bytes of one, in memory, and the
outputs that they add to get other names. They stand behind their readers: ONNX Runtime sorts the nodes of a graph.

The columns of h that are another adapter's are 0, whatever they were, and each block of them is rounded by itself: they
add exactly 0. So a row without an adapter is what it would be with none loaded, to the last bit. One with an adapter is
what it would be with no other, but for the order of sums, which the rounding of activations to 8 bits may make larger.

In float32 the factors are rounded to 8 bits. A token waits for memory: those of rank 64 are 4 % of a 7B model's 4 bits,
and would be 17 % in float32; float16 has no fast product on a CPU. In float16, on a GPU, they are what they are.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lite.engines.onnx_session import import_onnxruntime
from lite.engines.protobuf import fields, message
from lite.errors import ArtifactError, LiteError
from lite.memory.counts import layer_linear_shapes, onnx_adapter_block, onnx_block_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lite.config import DecoderConfig
    from lite.engines.adapters import Adapters, Stack

    Array = np.ndarray[Any, np.dtype[Any]]
    Place = slice[int, int, None]

ADAPTER_INPUT: Final = "adapter"
"""The slot of each row's adapter, `NO_ADAPTER` for none: int64 [batch, 1, 1]."""
_LINEARS: Final = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""What each linear of a layer is made of."""
_LEVELS: Final = 127
_ZERO: Final = 128
"""What stands for 0 in the 8 bits of MatMulNBits."""
_ALIGNMENT: Final = 64
_NOBODY: Final = -2
"""No slot, and not `NO_ADAPTER`."""
_TINY: Final = np.finfo(np.float32).tiny
_OUT, _OWN = b".out", b".own"
"""How the name of a linear's output ends, and of what it is without adapters: of one length."""

# Fields and numbers of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_GRAPH: Final = 7  # of a model
_NODE, _CONSTANT, _GRAPH_INPUT = 1, 5, 11  # of a graph
_INPUT, _OUTPUT, _NAME, _OPERATOR, _ATTRIBUTE, _DOMAIN = 1, 2, 3, 4, 5, 7  # of a node
_TYPES: Final = {"float32": 1, "uint8": 2, "int64": 7, "float16": 10}


class Adapted:
    """What some adapters add to each graph of an artifact."""

    def __init__(self, adapters: Adapters, config: DecoderConfig, dtype: str) -> None:
        """Read their factors.

        Args:
            adapters: their files.
            config: the decoder's.
            dtype: of its activations.

        Raises:
            LiteError: there is no room for the factors.
        """
        self._dtype, self._constants = dtype, _Constants()
        self._nodes: dict[str, bytes] = {}  # by the name of their output
        self._linears: list[str] = []
        self._zero = self._constants.add("adapters.zero", np.zeros(1, dtype))
        shapes = layer_linear_shapes(config)
        for layer in range(config.num_hidden_layers):
            for name, parts in _LINEARS.items():
                sizes = [shapes[part.rpartition(".")[2]] for part in parts]
                widths = {f"model.layers.{layer}.{part}": n for part, (n, _) in zip(parts, sizes, strict=True)}
                stack = adapters.stack(widths, sizes[0][1])
                if stack is not None:
                    self._add_linear(f"layers.{layer}.{name}", stack)
        self.values = self._constants.values()

    def change(self, graph: bytes) -> bytes:
        """Return a graph with the adapters. What it reads beside its own is in `values`.

        Raises:
            ArtifactError: it lacks a linear that one of them changes.
        """
        found, changed = dict(_ports(graph)), bytearray(graph)
        nodes = dict(self._nodes)
        for name in self._linears:
            # In a graph for prompts a linear is several nodes: this is the first, and the last has the linear's name.
            first, last = found.get(f"{name}.magnitudes", found.get(name)), found.get(name)
            if first is None or last is None or not graph[last[1]].endswith(_OUT):
                msg = f"decoder.onnx: got no {name} · expected it, as an adapter changes it · export the artifact again"
                raise ArtifactError(msg)
            x, y = first[0], last[1]
            changed[y.stop - len(_OUT) : y.stop] = _OWN
            own, output = changed[y].decode(), graph[y].decode()
            nodes[f"{name}.x"] = _node("Identity", [graph[x].decode()], [f"{name}.x"])
            nodes[output] = _node("Add", [own, f"{name}.b"], [output])
        shape = message((1, message((2, "batch"))), *[(1, message((1, 1)))] * 2)
        slots = message((1, message((1, _TYPES["int64"]), (2, shape))))
        return bytes(changed) + message(
            (
                _GRAPH,
                message(
                    (_GRAPH_INPUT, message((1, ADAPTER_INPUT), (2, slots))),
                    *((_CONSTANT, constant) for constant in self._constants.entries),
                    *((_NODE, node) for node in nodes.values()),
                ),
            )
        )

    def forget(self) -> None:
        """Give the memory of the factors back, where ONNX Runtime has repacked them."""
        self._constants.forget()

    def _add_linear(self, name: str, stack: Stack) -> None:
        """Add the factors of a linear, and the nodes from `name`.x to what is added to its output, `name`.b."""
        self._linears.append(name)
        slots, num_parts, block = len(stack.a), len(stack.parts), onnx_adapter_block(stack.rank)
        rank = -(-stack.rank // block) * block
        a = np.zeros((num_parts, slots, rank, stack.a.shape[2]), np.float16)
        a[:, :, : stack.rank] = stack.a.reshape(slots, num_parts, stack.rank, -1).swapaxes(0, 1)
        h = self._product(f"{name}.x", a.reshape(-1, a.shape[-1]), f"{name}.a")
        # The output in pieces of one width, each of one part: one product has them all, the pieces as its rows.
        width = math.gcd(*stack.parts)
        part_of = np.repeat(np.arange(num_parts), np.array(stack.parts) // width)
        pieces = len(part_of)
        b = np.zeros((width, pieces, slots, rank), np.float16)
        b[..., : stack.rank] = stack.b.reshape(slots, pieces, width, -1).transpose(2, 1, 0, 3)
        if pieces > num_parts:
            columns = np.arange(num_parts * slots * rank).reshape(num_parts, -1)[part_of].reshape(-1)
            h = self._add("Gather", h, self._constants.add(f"{name}.columns", columns), output=f"{name}.each", axis=2)
        h = self._add("Reshape", h, self._constants.shape(0, 0, 1, -1), output=f"{name}.h")
        h = self._add("Where", self._mine(pieces, slots, rank), h, self._zero, output=f"{name}.mine")
        pieces_of_b = self._product(h, b.reshape(width, -1), f"{name}.pieces", block)
        self._add("Reshape", pieces_of_b, self._constants.shape(0, 0, -1), output=f"{name}.b")

    def _mine(self, pieces: int, slots: int, rank: int) -> str:
        """Add what says which columns of h a piece of a row reads: bool [batch, 1, pieces, pieces * slots * rank]."""
        owners = np.full((pieces, pieces, slots, rank), _NOBODY)
        owners[range(pieces), range(pieces)] = np.arange(slots)[:, None]
        name = f"adapters.{pieces}x{rank}"
        constant = self._constants.add(name, owners.reshape(pieces, -1))
        adapter = self._add("Reshape", ADAPTER_INPUT, self._constants.shape(0, 1, 1, 1), output="adapters.of")
        return self._add("Equal", constant, adapter, output=f"{name}.mine")

    def _product(self, x: str, weight: Array, output: str, block: int | None = None) -> str:
        """Add x Wᵀ, of a weight float16 [N, K]; a scale in 8 bits is of `block` inputs, None: of as many as fit."""
        if self._dtype == "float16":
            self._constants.add(f"{output}.values", weight.T)
            return self._add("MatMul", x, f"{output}.values", output=output)
        n, k = weight.shape
        block = block or onnx_block_size(k, None) or 16
        blocks = np.pad(weight.astype(np.float32), ((0, 0), (0, -k % block))).reshape(n, -1, block)
        scales = np.maximum(np.abs(blocks).max(-1), _TINY) / _LEVELS
        self._constants.add(f"{output}.values", (np.rint(blocks / scales[..., None]) + _ZERO).astype(np.uint8))
        self._constants.add(f"{output}.scales", scales.reshape(-1))
        of = {"K": k, "N": n, "bits": 8, "block_size": block, "accuracy_level": 4}
        return self._add("MatMulNBits", x, f"{output}.values", f"{output}.scales", output=output, **of)

    def _add(self, operator: str, *inputs: str, output: str, **attributes: int) -> str:
        self._nodes[output] = _node(operator, inputs, [output], **attributes)
        return output


class _Constants:
    """Arrays that graphs name and do not hold: in a file without a name, mapped into memory.

    ONNX Runtime repacks most of them, and does not tell which ones it goes on to read. Pages of a file can be given
    back all the same: those that are read come again.
    """

    def __init__(self) -> None:
        self.entries: list[bytes] = []  # in a graph
        self._shapes: set[str] = set()
        self._places: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed when it is mapped
        except OSError as error:
            raise _no_room(error) from error

    def shape(self, *sizes: int) -> str:
        """Add a shape for Reshape, which a graph holds itself; return its name."""
        name = "adapters.shape." + ".".join(map(str, sizes))
        if name not in self._shapes:
            self._shapes.add(name)
            raw = np.array(sizes, "<i8").tobytes()
            self.entries.append(message((1, len(sizes)), (2, _TYPES["int64"]), (8, name), (9, raw)))
        return name

    def add(self, name: str, values: Array) -> str:
        """Add an array, unless it is there; return its name."""
        if name in self._places:
            return name
        try:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._places[name] = self._file.tell(), values.shape, values.dtype
            self._file.write(np.ascontiguousarray(values).data)
        except OSError as error:
            raise _no_room(error) from error
        dims = ((1, size) for size in values.shape)
        place = message((1, "location"), (2, "adapters"))
        self.entries.append(message(*dims, (2, _TYPES[values.dtype.name]), (8, name), (13, place), (14, 1)))
        return name

    def values(self) -> dict[str, Any]:
        """Return all as values of ONNX Runtime's."""
        try:
            self._file.flush()
        except OSError as error:
            raise _no_room(error) from error
        self._mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._file.close()
        make = import_onnxruntime().OrtValue.ortvalue_from_numpy
        return {
            name: make(np.frombuffer(self._mapped, dtype, math.prod(shape), at).reshape(shape))
            for name, (at, shape, dtype) in self._places.items()
        }

    def forget(self) -> None:
        """Give the memory back, where the system can be asked to."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


def _no_room(error: OSError) -> LiteError:
    msg = f"got no file for the factors of adapters ({error}) · expected one in {tempfile.gettempdir()}"
    return LiteError(f"{msg} · free some space there, or set TMPDIR")


def _node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int) -> bytes:
    """Return a node, called as its first output."""
    return message(
        *((_INPUT, name) for name in inputs),
        *((_OUTPUT, name) for name in outputs),
        (_NAME, outputs[0]),
        (_OPERATOR, operator),
        *((_ATTRIBUTE, message((1, name), (3, value), (20, 2))) for name, value in attributes.items()),
        (_DOMAIN, "com.microsoft" if operator == "MatMulNBits" else ""),
    )


def _ports(graph: bytes) -> Iterator[tuple[str, tuple[Place, Place]]]:
    """Yield where the names of each node's first input and first output stand, by its name."""
    for part in _within(graph, slice(0, len(graph)), _GRAPH):
        for node in _within(graph, part, _NODE):
            of = {field: slice(at, to) for field, at, to in reversed([*fields(graph, node.start, node.stop)])}
            if {_INPUT, _OUTPUT, _NAME} <= of.keys():
                yield graph[of[_NAME]].decode(), (of[_INPUT], of[_OUTPUT])


def _within(content: bytes, where: Place, wanted: int) -> Iterator[Place]:
    """Yield where the fields of one number stand in a message."""
    return (slice(at, to) for field, at, to in fields(content, where.start, where.stop) if field == wanted)
