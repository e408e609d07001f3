"""Our own decoder, and the int4 linears of others in it: with these only the linears differ.

dense          nn.Linear                          float32 on a CPU, float16 on a GPU
gptq-int4      torch_engine.linear   groups of 128, kernels/gptq.py; on a GPU kernels/quant_matmul.py
tinygemm       torch's own int4 product           groups of 128, computes in bfloat16
gemlite        gemlite's Triton kernels           groups of 128, computes in float16
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from benchmarks.speed.peers.weights import GROUP_SIZE
from kernels.backend import select_backend
from kernels.gptq import to_tensors
from lite.config import IMAGE_TOKEN_ID, DecoderConfig
from lite.engines.torch_engine.cuda_graph import GraphedStep, capture_cuda_graph
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.linear import Linear, linears_of, parts_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.speed.peers.weights import Model

GPTQ: Final = {
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "bits": 4,
    "group_size": GROUP_SIZE,
    "sym": True,
    "desc_act": False,
}


class LiteEngine:
    """`LlamaDecoder` with the runtime's own cache, prefill and decode_one_token."""

    fewest_layers = 0
    fills = True
    last_token_only = ()
    load_s = None

    def __init__(self, decoder: LlamaDecoder, *, max_seq_len: int, computes_in: str) -> None:
        self.decoder = decoder
        self.layers = decoder.model.layers
        self.max_seq_len = max_seq_len
        self.cache = decoder.new_cache(1, max_seq_len)
        self.steps: dict[int, dict[int, GraphedStep]] = {}  # by depth
        self.computes_in = computes_in
        self.cache_bytes_per_token = self.cache.nbytes // max_seq_len
        self.weight_bytes = weight_bytes(decoder)

    def start(self, num_layers: int) -> None:
        """Keep the first layers, empty the cache."""
        self.decoder.model.layers = self.layers[:num_layers]
        is_new = num_layers not in self.steps
        self.cache.steps = self.steps.setdefault(num_layers, {})
        if is_new and self.decoder.capture is not None:
            # Captured on its second run, which is no token's time.
            self.fill(1)
            self.decode_one_token(0)
            self.decode_one_token(0)
        self.cache.release(0)

    def prefill(self, input_ids: list[int]) -> Tensor:
        """Run a prompt, the first token of which takes the place of the image."""
        self.cache.release(0)
        with torch.inference_mode():
            features = self.decoder.embed(input_ids[:1])  # [1, hidden_size]
        return self.decoder.prefill([IMAGE_TOKEN_ID, *input_ids[1:]], features, self.cache)[0].float()

    def decode_one_token(self, token_id: int) -> Tensor:
        """Run a token."""
        return self.decoder.decode_one_token(self.cache, [token_id])[0].float()

    def fill(self, num_tokens: int) -> None:
        """Draw keys and values."""
        for tensor in (self.cache.k_cache, self.cache.v_cache):
            tensor[..., :num_tokens, :].normal_()
        self.cache.num_cached_tokens[0] = num_tokens
        self.cache.position_ids.fill_(num_tokens)


def build(form: str, model: Model, *, device: str, threads: int, folder: Path) -> LiteEngine:  # noqa: ARG001 - no files
    """Build the decoder and give it its weights, one tensor at a time."""
    torch.set_num_threads(threads)
    on_gpu = torch.device(device).type == "cuda"
    dtype = {False: torch.float32, True: torch.bfloat16 if form == "tinygemm" else torch.float16}[on_gpu]
    swapped: dict[str, Callable[[Tensor], nn.Module]] = {"tinygemm": TinygemmLinear, "gemlite": gemlite_linear}
    quantization = {"quantization_config": GPTQ} if form == "gptq-int4" else {}
    with torch.device("meta"):
        decoder = LlamaDecoder(DecoderConfig.from_hf({**model.config, **quantization}))
    linears = linears_of(decoder)
    owners = parts_of(linears)
    waiting: dict[str, dict[str, Tensor]] = {name: {} for name in linears}
    state = {}
    for name, values in model.tensors():
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
        if form in swapped and owner != "lm_head":
            # Side by side, as ours are: one product.
            decoder.set_submodule(owner, swapped[form](torch.cat([parts[name] for name in linear.parts])))
        else:
            tensors = {name: _stored(linear, weight) for name, weight in parts.items()}
            linear.take(tensors, device=device, dtype=dtype, backend=select_backend(torch.device(device)).backend)
        parts.clear()
    # Not strict: what a linear holds is not in the state.
    decoder.load_state_dict(state, strict=False, assign=True)
    decoder.eval().requires_grad_(requires_grad=False)
    if on_gpu and decoder.selection.backend == "triton":
        decoder.capture = functools.partial(capture_cuda_graph, device=decoder.device)
    rest = str(dtype).removeprefix("torch.")
    computes_in = f"bfloat16, rest {rest}" if form == "tinygemm" and not on_gpu else rest
    return LiteEngine(decoder, max_seq_len=model.max_seq_len, computes_in=computes_in)


def round_to_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] to the nearest of 4 bits, symmetric.

    Returns:
        Integers −8 … 7 [out, in], and their scales, float16 [out, groups].
    """
    groups = weight.float().view(weight.shape[0], -1, GROUP_SIZE)
    scales = (groups.abs().amax(-1) / 7).to(torch.float16)
    values = (groups / scales.float().unsqueeze(-1)).round_().clamp_(-8, 7)
    return values.flatten(1).to(torch.int8), scales


def _stored(linear: Linear, weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a weight as a checkpoint has them."""
    if linear.quantization is None:
        return {"weight": weight}
    values, scales = round_to_groups(weight)
    return to_tensors(values, scales, bits=4)


class TinygemmLinear(nn.Module):
    """A linear by torch's int4 product, which takes and gives bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        values, scales = round_to_groups(weight)
        self.out_features = weight.shape[0]
        unsigned = values.to(torch.int32) + 8
        # w = (q − 8) · scale + zero, and the zero is 0 here. Both as bfloat16 [groups, out, 2].
        scale = scales.t().to(torch.bfloat16)
        scales_and_zeros = torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()
        # torch has no public names for these.
        if weight.is_cuda:
            pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)
            packed = torch._convert_weight_to_int4pack(pairs, 8)  # noqa: SLF001
            self.product = torch._weight_int4pack_mm  # noqa: SLF001
        else:
            packed = torch._convert_weight_to_int4pack_for_cpu(unsigned, 2)  # noqa: SLF001
            self.product = torch._weight_int4pack_mm_for_cpu  # noqa: SLF001
        self.packed = nn.Buffer(packed)
        self.scales_and_zeros = nn.Buffer(scales_and_zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the linear to x [..., in_features]."""
        rows = x.flatten(0, -2).to(torch.bfloat16)
        product: Tensor = self.product(rows, self.packed, GROUP_SIZE, self.scales_and_zeros)
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)


def gemlite_linear(weight: Tensor) -> Any:  # noqa: ANN401 - gemlite's linear
    """Make a linear of gemlite's, which takes and gives float16."""
    helper: Any = importlib.import_module("gemlite.helper")
    values, scales = round_to_groups(weight)
    processor = helper.A16Wn(device=str(weight.device), dtype=torch.float16)
    unsigned = (values + 8).to(torch.uint8)
    return processor.from_weights(unsigned, scales, torch.full_like(scales, 8), 4, GROUP_SIZE)


def weight_bytes(decoder: LlamaDecoder) -> int:
    """Add up what decoding a token reads."""
    state: dict[str, Tensor] = decoder.state_dict()
    plain = sum(tensor.nbytes for name, tensor in state.items() if "embed_tokens" not in name)
    return plain + sum(linear.nbytes for linear in linears_of(decoder).values())
