"""Our own decoder, and the int4 linears of others in it: with these only the linears differ.

dense          nn.Linear             float32 on a CPU, float16 on a GPU
gptq-int4      torch_engine.linear   groups of 128, kernels/gptq.py; on a GPU kernels/quant_matmul.py
others         benchmarks.speed.linears
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.speed.decoders import weight_bytes
from benchmarks.speed.engine import Rows, prompt_of
from benchmarks.speed.linears import PEERS, round_to_groups
from benchmarks.speed.peers.engine import Engine
from benchmarks.speed.weights import gptq_config
from kernels.backend import select_backend
from kernels.gptq import to_tensors
from lite.config import DecoderConfig
from lite.engines.torch_engine.cuda_graph import capture_cuda_graph
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.linear import Linear, linears_of
from lite.engines.torch_engine.load import fill_linear, parts_of

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.speed.peers.worker import Order


class LiteEngine(Engine):
    """`LlamaDecoder` with the runtime's own cache."""

    fills = True

    def __init__(self, decoder: LlamaDecoder, *, max_seq_len: int, computes_in: str) -> None:
        self.decoder = decoder
        self.layers = decoder.model.layers
        self.rows = Rows(decoder, 1, max_seq_len)
        self.steps: dict[int, dict[Any, Any]] = {}  # by depth
        self.computes_in = computes_in
        self.cache_bytes_per_token = round(self.rows.bytes_per_token)
        self.weight_bytes = weight_bytes(decoder)

    def start(self, num_layers: int) -> None:
        """Keep the first layers, empty the cache."""
        self.decoder.model.layers = self.layers[:num_layers]
        is_new = num_layers not in self.steps
        self.rows.cache.steps = self.steps.setdefault(num_layers, {})
        if is_new and self.decoder.capture is not None:
            # Captured on its second run, which is no token's time.
            self.rows.fill(1)
            self.rows.warm_up(1)
        self.is_empty = True

    def read(self, input_ids: list[int]) -> Tensor:
        """Run a prompt, the first token of which takes the place of the image, or a token."""
        if self.is_empty:
            self.is_empty = False
            with torch.inference_mode():
                logits: Tensor = self.rows.read(prompt_of(self.decoder, input_ids))
        else:
            logits = self.rows.decode_given(input_ids[0])[0]
        return logits.float()

    def fill(self, num_tokens: int) -> None:
        """Draw keys and values."""
        self.rows.fill(num_tokens)
        self.is_empty = False


def build(order: Order) -> LiteEngine:
    """Build the decoder and give it its weights, one tensor at a time."""
    torch.set_num_threads(order.threads)
    form, device, on_gpu = order.form, torch.device(order.device), order.device != "cpu"
    make, computed = PEERS.get(form, (None, torch.float16))
    dtype = computed if on_gpu else torch.float32
    quantization = {"quantization_config": gptq_config(4)} if form == "gptq-int4" else {}
    with torch.device("meta"):
        decoder = LlamaDecoder(DecoderConfig.from_hf({**order.model.config, **quantization}))
    linears = linears_of(decoder)
    owners = parts_of(linears)
    waiting: dict[str, dict[str, Tensor]] = {name: {} for name in linears}
    state = {}
    for name, values in order.model.tensors():
        drawn = torch.from_numpy(values).to(device)
        module = name.removesuffix(".weight")
        if module not in owners:
            state[name] = drawn.to(dtype)
            continue
        owner, part = owners[module]
        linear, parts = linears[owner], waiting[owner]
        parts[part] = drawn
        if len(parts) < len(linear.parts):
            continue
        if make is not None and owner != "lm_head":
            # Side by side, as ours are: one product.
            decoder.set_submodule(owner, make(torch.cat([parts[name] for name in linear.parts])))
        else:
            tensors = {name: _stored(linear, weight) for name, weight in parts.items()}
            fill_linear(linear, tensors, device=device, dtype=dtype, backend=select_backend(device).backend)
        parts.clear()
    # Not strict: what a linear holds is not in the state.
    decoder.load_state_dict(state, strict=False, assign=True)
    decoder.eval().requires_grad_(requires_grad=False)
    if on_gpu and decoder.selection.backend == "triton":
        decoder.capture = functools.partial(capture_cuda_graph, device=decoder.device)
    rest = str(dtype).removeprefix("torch.")
    computes_in = f"bfloat16, rest {rest}" if form == "tinygemm int4" and not on_gpu else rest
    return LiteEngine(decoder, max_seq_len=order.max_seq_len, computes_in=computes_in)


def _stored(linear: Linear, weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a weight as a checkpoint has them."""
    if linear.quantization is None:
        return {"weight": weight}
    values, scales = round_to_groups(weight)
    return to_tensors(values, scales, bits=4)
