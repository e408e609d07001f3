"""A GPU that is not there: the real decoder runs on tensors without memory, and what they would take is counted.

    lite/engines/torch_engine/decoder.py, lite/session/loop.py, kernels/*.py         as they are
    kernels/gpu/*.py                                    launch nothing; a launch allocates nothing
    torch on "cuda"                                     FakeTensorMode: shapes, dtypes and devices, no numbers
    attention                                           allocates what torch's kernel for it allocates: see `attend`
    the allocator                                       `fake_allocator.py`, after torch's own

Whatever waits for a number of the device's (`.item()`, `bool(tensor)`, `nonzero`) fails, as there are no numbers, and
so does an op on tensors of two devices. Copies between host and device are noted: see `FakeGpu.copies`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch
from fake_allocator import Allocator, Block
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import kernels.gpu
from export.source.shapes import base_shapes
from kernels.backend import Card, Selection
from lite.artifact.open import Artifact
from lite.config import IMAGE_TOKEN_ID, DecoderConfig
from lite.engines.protocol import NO_ADAPTER, ChosenTokens
from lite.engines.segments import expand_image
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.load import load_decoder
from lite.memory.plan import STUDIES_AHEAD, MemoryPlan, Shapes, Workload, plan_memory
from lite.memory.process import Peaks
from lite.session.loop import Loop
from lite.session.request import Progress, Request

if TYPE_CHECKING:
    from lite.engines.torch_engine.cuda_graph import Step

RTX_3060: Final = Card(capability=(8, 6), multiprocessors=28)
T4: Final = Card(capability=(7, 5), multiprocessors=40)
H100: Final = Card(capability=(9, 0), multiprocessors=132)
LAUNCHERS: Final = {
    "add_rms_norm": ("add_rms_norm",),
    "decode_attention": ("decode_attention",),
    "lora_add": ("lora_add",),
    "quant_matmul": ("decode", "dequantize"),
    "rotary_and_cache": ("rotary_and_cache",),
    "sample": ("sample",),
    "silu_mul": ("silu_mul",),
}
TOKEN: Final = 7
CHOSEN = ChosenTokens((TOKEN,), (0.0,))
"""The token that is always chosen."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """From one device to another."""

    source: str
    target: str
    nbytes: int
    waits: bool  # torch waits for the copy to end, and so for all that was launched before


_COMPOSITE: Final = torch._C.DispatchKey.CompositeImplicitAutograd


@functools.cache
def _is_composite(func: Any) -> bool:
    """Say whether an op is made of others, and not only for autograd."""
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)


class FakeGpu(TorchDispatchMode):
    """A card, and the count of what lies on it."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        self.allocator = Allocator()
        self._tensors = FakeTensorMode()
        self.copies: list[Copy] = []
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._workspaces: dict[bool, Block] = {}  # of cuBLAS, by whether it is the stream of captures
        self._is_capturing = False

    def capture(self, step: Step) -> Step:
        """Stand in for `torch_engine.cuda_graph.capture_cuda_graph`: what a step takes stays the graph's own."""
        self.allocator.release()
        self._is_capturing = True
        with self.allocator.private_pool():
            result = step()
        self._is_capturing = False
        return lambda: result

    def start_over(self, decoder: LlamaDecoder) -> None:
        """Forget the cache that a decoder keeps, and the peaks."""
        decoder._idle = None
        self.allocator.release()
        self.allocator.pop_peak()
        self.allocator.reserved_peak = self.allocator.reserved

    def plan(self, artifact: Artifact, **settings: Any) -> MemoryPlan:
        """Plan for this card."""
        workload = Workload(device="cuda:0", capability=self.card.capability, **settings)
        return plan_memory(Shapes.of(artifact), workload)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let "cuda" be this card meanwhile; what was made on it stays."""
        with contextlib.ExitStack() as stack:
            for name, launchers in LAUNCHERS.items():
                module = types.SimpleNamespace(**dict.fromkeys(launchers, _launch))
                stack.enter_context(mock.patch.object(kernels.gpu, name, module, create=True))
            selection = Selection(backend="triton", reason="a card that is not there")
            for name, value in {
                "kernels.backend.is_interpreted": lambda: False,
                "kernels.backend._select_cuda": lambda _: selection,
                "kernels.backend._card": lambda _: self.card,
                "torch.cuda.current_device": lambda: 0,
                "torch.cuda.device": lambda _: contextlib.nullcontext(),
                "torch.cuda.empty_cache": self.allocator.release,
                "torch.cuda.current_stream": mock.MagicMock(),
                "torch.Tensor.record_stream": mock.MagicMock(),  # what is allocated is counted all the same
                "torch.nn.functional.scaled_dot_product_attention": functools.partial(attend, self.card),
                "lite.engines.torch_engine.cache.TorchChosen.wait": lambda chosen: dict.fromkeys(chosen._rows, CHOSEN),
            }.items():
                stack.enter_context(mock.patch(name, value))
            stack.enter_context(self._tensors)
            stack.enter_context(self)
            stack.enter_context(_Indexing())
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # else what passes within it would not be seen
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm") and args[0].device.type == "cuda":
            self._need_workspace()
        out = func(*args, **kwargs)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                self._see(tensor.untyped_storage())
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            source = args[1] if func._schema.name == "aten::copy_" else args[0]
            if source.device != out.device:
                waits = not (kwargs.get("non_blocking") or args[2:] == (True,))
                self.copies.append(
                    Copy(source=source.device.type, target=out.device.type, nbytes=source.nbytes, waits=waits)
                )
        return out

    def _see(self, storage: Any) -> None:
        if storage in self._known or not storage.nbytes():
            return
        self._known.add(storage)
        weakref.finalize(storage, self.allocator.free, self.allocator.allocate(storage.nbytes()))

    def _need_workspace(self) -> None:
        """Take what cuBLAS has for good for each stream: at::cuda::parseChosenWorkspaceSize."""
        if self._is_capturing not in self._workspaces:
            nbytes = 32 << 20 if self.card.capability[0] in (9, 10, 12) else (8 << 20) + (128 << 10)
            self._workspaces[self._is_capturing] = self.allocator.allocate(nbytes)


# -- What of torch does not work without a GPU -----------------------------------------------------------------------


_BY_OP: Final = {
    Tensor.contiguous: torch.ops.aten.contiguous.default,
    Tensor.copy_: torch.ops.aten.copy_.default,
    Tensor.nonzero: torch.ops.aten.nonzero.default,
}


class _Indexing(TorchFunctionMode):
    """What asks the device's library, which a torch for CPUs lacks, done by ops: mainly tensor[…]."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _view(*args)
        if func is Tensor.__setitem__:
            return torch.ops.aten.copy_.default(_view(*args[:2]), args[2])
        if func in _BY_OP:
            return _BY_OP[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _view(x: Tensor, index: Any) -> Tensor:
    dim = 0
    for at in index if isinstance(index, tuple) else (index,):
        if at is None:
            x = x.unsqueeze(dim)
        elif isinstance(at, slice):
            x = torch.ops.aten.slice.Tensor(x, dim, at.start, at.stop)
        elif isinstance(at, Tensor):
            x = torch.ops.aten.index.Tensor(x, [None] * dim + [at])
        else:
            x = x.select(dim, at)
            continue
        dim += at.dim() if isinstance(at, Tensor) else 1
    return x


def _launch(*args: Any, **_: Any) -> None:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}


def attend(
    card: Card, q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> Tensor:
    """Allocate what torch's `scaled_dot_product_attention` takes: [B, heads, T, head_dim] in 16 bits.

    Without a mask flash attention from Ampere on: the result and the logarithms of the sums. Else memory-efficient
    attention, for which a mask is made into numbers, and its rows padded to a multiple of 8. Neither has grouped
    queries with a mask: then the scores are there, in float32. (Of flash attention the few megabytes are left out that
    it takes for itself where a chunk is too short to fill the card.)

    Source: aten/src/ATen/native/transformers/{attention.cpp,cuda/sdp_utils.cpp}
    """
    B, heads, T, head_dim = q.shape
    has_flash = card.capability >= (8, 0)
    if enable_gqa and (attn_mask is not None or not has_flash):
        return torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, attn_mask, 0.0, is_causal, enable_gqa=enable_gqa
        )[0]
    if attn_mask is not None:
        bias = torch.empty(attn_mask.shape, dtype=q.dtype, device=q.device)
        if bias.shape[-1] % 8:
            bias = torch.nn.functional.pad(bias, (0, 8 - bias.shape[-1] % 8))
    attended = torch.empty(B, T, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    _sums = torch.empty(B, heads, T, dtype=torch.float32, device=q.device)
    return attended


# -- What is computed ------------------------------------------------------------------------------------------------


def all_true() -> Any:
    """Take whatever is asked of numbers for true."""
    return mock.patch.object(Tensor, "__bool__", return_value=True)


def load_on(gpu: FakeGpu, artifact: Artifact, **settings: Any) -> LlamaDecoder:
    """Load a decoder of whose weights there are the shapes only."""
    stored = [
        (Path("decoder"), name, lambda shape=shape, dtype=dtype: torch.empty(shape, dtype=dtype))
        for name, (shape, dtype) in stored_tensors(artifact.decoder_config()).items()
    ]
    # There are no numbers to check: all are taken for right.
    with (
        mock.patch("lite.engines.torch_engine.load._tensors", return_value=iter(stored)),
        mock.patch("torch.equal", return_value=True),
        all_true(),
    ):
        decoder = load_decoder(artifact, device="cuda:0", **settings)
    assert decoder.capture is not None
    decoder.capture = gpu.capture
    return decoder


def stored_tensors(config: DecoderConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of the tensors of a decoder's files."""
    shapes, stored = base_shapes(config), config.quantization
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in shapes.items():
        linear = name.removesuffix(".weight")
        if stored is None or "_proj." not in name:
            tensors[name] = shape, torch.float16
        elif stored.format == "bnb-int8":
            tensors[name] = shape, torch.int8
            tensors[f"{linear}.SCB"] = shape[:1], torch.float32
        else:
            (outputs, inputs), factor = shape, 32 // stored.bits
            groups = inputs // (inputs if stored.group_size in (-1, None) else stored.group_size)
            tensors[f"{linear}.qweight"] = (inputs // factor, outputs), torch.int32
            tensors[f"{linear}.qzeros"] = (groups, outputs // factor), torch.int32
            tensors[f"{linear}.scales"] = (groups, outputs), torch.float16
            tensors[f"{linear}.g_idx"] = (inputs,), torch.int32
    return tensors


def prompt_of(num_prompt_tokens: int, num_image_tokens: int) -> list[int]:
    """Return input_ids that take so many places, the image's among them."""
    return [1, IMAGE_TOKEN_ID, *[TOKEN] * (num_prompt_tokens - num_image_tokens - 1)]


def draft(
    decoder: LlamaDecoder, *, num_rows: int, num_prompt_tokens: int, max_seq_len: int, num_image_tokens: int = 1369,
    max_new_tokens: int = 3, tower_on_gpu: bool = True, adapter: int = NO_ADAPTER,
) -> None:  # fmt: skip
    """Draft as a session does, in this thread: all rows, and the features of the studies that come next.

    A text is short; the rows have room for a longer one.
    """
    input_ids = expand_image(prompt_of(num_prompt_tokens, num_image_tokens), num_image_tokens)
    ahead = STUDIES_AHEAD if num_rows > 1 else 0

    def see() -> Any:
        if tower_on_gpu:
            return decoder.image_buffer(num_image_tokens)[0]
        return torch.empty(num_image_tokens, decoder.config.hidden_size)

    loop = Loop(
        decoder,
        num_rows=num_rows,
        max_seq_len=max_seq_len,
        context=decoder.config.max_position_embeddings,
        eos_token_id=2,
        fits=lambda *_: True,
        peaks=lambda: Peaks(rss_bytes=None, vram_bytes=None),
    )
    asked = Request(
        id="", input_ids=input_ids, film=None, see=see,
        max_new_tokens=max_new_tokens, adapter=adapter,
    )  # fmt: skip
    studies = [Progress(asked) for _ in range(num_rows + ahead)]
    waiting = list(studies)
    while waiting or loop.is_busy:
        waiting[:0], loop.lost = loop.lost, []
        for study in waiting[: max(1, ahead)]:
            study.features = see() if study.features is None else study.features
        if waiting and loop.admit(waiting[0]):
            waiting.pop(0)
        loop.turn()
    assert [study.error for study in studies] == [None] * len(studies)
    assert [study.token_ids for study in studies] == [[TOKEN] * max_new_tokens] * len(studies)
