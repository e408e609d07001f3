"""Loading a decoder: its files are mapped, checked tensor by tensor, and given to modules that had no memory before."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.bnb import Int8Weight, Nf4Weight, import_bitsandbytes
from kernels.gptq import GptqWeight
from kernels.quant_weight import GROUP_SIZES, QuantWeight
from lite.engines.adapters import Adapters
from lite.engines.cores import available_cores
from lite.engines.torch_engine.cuda_graph import capture_cuda_graph
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.device import DTYPES, memory_explained
from lite.engines.torch_engine.linear import Linear, linears_of
from lite.engines.torch_engine.lora import Lora
from lite.errors import ArtifactError, BackendUnavailable
from lite.memory.counts import decoder_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from kernels.backend import Backend
    from lite.artifact.open import Artifact
    from lite.artifact.parts import CacheDtype
    from lite.config import DecoderConfig
    from lite.engines.torch_engine.linear import Weight


def load_decoder(
    artifact: Artifact,
    *,
    device: str,
    dtype: str | None = None,
    cache_dtype: CacheDtype | None = None,
    chunk_size: int | None = None,
    fp16_accumulation: bool = False,
    positions: NDArray[np.float64] | None = None,
    layers: range | None = None,
    adapters: Sequence[str] = (),
) -> LlamaDecoder:
    """Load the decoder of an artifact.

    The modules are built without memory (on `meta`) and the tensors of the memory-mapped files are assigned to them,
    so the peak is the decoder itself and one linear. Quantised weights stay as they are stored on a CPU; for the GPU
    kernels they are repacked, a linear at a time.

    Args:
        artifact: a checked artifact.
        device: "cpu", "cuda" or "cuda:N".
        dtype: one of DTYPES. None: see `lite.engines.options` (on an AVX2 CPU products in float16 reached 1.4 GFLOP/s
            against 100 in float32; 2 cores, torch 2.13, November 2026).
        cache_dtype: "int8", or what the decoder computes in; None is the latter.
        chunk_size: tokens of a prompt that go through together: it bounds the memory of activations.
        fp16_accumulation: see `kernels.quant_matmul`.
        positions: see `lite.image_tokens.rotary_positions`.
        layers: which layers to load, for whoever computes a large decoder in parts; all by default.
        adapters: of the artifact, that rows may use.

    Raises:
        ArtifactError: a tensor is missing, unknown or misshapen, or the folder is not a plain Llama.
        BackendUnavailable: there is no such device, or bitsandbytes is needed for it and not installed.
        MemoryBudgetError: the GPU is too small.
    """
    whole = artifact.decoder_config()
    layers = layers if layers is not None else range(whole.num_hidden_layers)
    config = dataclasses.replace(whole, num_hidden_layers=len(layers))
    target = torch.device(device)
    _check_backend(config, target)
    wanted = DTYPES[dtype or ("float32" if target.type == "cpu" else config.dtype)]
    if target.type == "cpu" and torch.get_num_threads() > available_cores():
        torch.set_num_threads(available_cores())
    with torch.device("meta"):
        decoder = LlamaDecoder(config, cache_dtype=cache_dtype)
    with memory_explained("the decoder"):
        if target.type == "cuda":
            # Taken and given back, so that torch's allocator cuts the weights from one piece: of one for each tensor,
            # what is moved and repacked meanwhile would leave holes, 0.9 GB of them at 7B (by tests/fake_cuda.py).
            torch.empty(decoder_bytes(config, itemsize=wanted.itemsize), dtype=torch.uint8, device=target)
        _fill(decoder, artifact, _tensors(artifact, whole, layers), target, wanted)
        if adapters:
            _fill_adapters(decoder, Adapters(artifact, adapters), layers, wanted)
        if target.type == "cuda":
            torch.cuda.empty_cache()  # for the tower, which has another allocator, and for caches, which want one piece
    if target.type == "cuda" and decoder.selection.backend == "triton":
        decoder.capture = functools.partial(capture_cuda_graph, device=decoder.device)
    decoder.chunk_size = chunk_size or decoder.chunk_size
    decoder.positions = positions
    for linear in linears_of(decoder).values():
        linear.fp16_accumulation = fp16_accumulation
    return decoder.eval().requires_grad_(requires_grad=False)


def _fill(
    decoder: LlamaDecoder,
    artifact: Artifact,
    tensors: Iterator[tuple[Path, str, Callable[[], Tensor]]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give a decoder its weights.

    Raises:
        ArtifactError: one is missing, unknown or misshapen.
    """
    config, plain, linears = decoder.config, decoder.state_dict(), linears_of(decoder)
    if config.tie_word_embeddings:
        del linears["lm_head"]
    parts = parts_of(linears)
    state: dict[str, Tensor] = {}
    found: dict[str, dict[str, dict[str, Tensor]]] = {
        name: {part: {} for part in linear.parts} for name, linear in linears.items()
    }
    for file, name, read in tensors:
        owner, rest = _owner(name, parts)
        if owner:
            linear, part = parts[owner]
            found[linear][part][rest] = read()
            continue
        if name not in plain:
            msg = f"{file}: got an unknown tensor {name} · expected a plain Llama · export the artifact again"
            raise ArtifactError(msg)
        tensor = read()
        if tensor.shape != plain[name].shape:
            msg = (
                f"{file}: got {name} of shape {list(tensor.shape)} · expected {list(plain[name].shape)} by "
                "config.json · export the artifact again"
            )
            raise ArtifactError(msg)
        state[name] = tensor.to(device=device, dtype=dtype)
    empty = [part for part, (linear, name) in parts.items() if not found[linear][name]]
    if missing := sorted([*(plain.keys() - state.keys()), *empty]):
        msg = (
            f"{artifact.path / 'decoder'}: got no tensor {missing[0]} ({len(missing)} missing) · expected all "
            f"{len(plain) + len(parts)} of config.json's {config.num_hidden_layers} layers · export the artifact again"
        )
        raise ArtifactError(msg)
    decoder.load_state_dict(state, assign=True)
    for name, module in linears.items():
        try:
            fill_linear(module, found.pop(name), device=device, dtype=dtype, backend=decoder.selection.backend)
        except ValueError as error:
            msg = f"{artifact.path / 'decoder'}: {name}: {error} · export the artifact again"
            raise ArtifactError(msg) from error
    if config.tie_word_embeddings:
        decoder.lm_head.weights = (decoder.model.embed_tokens.weight.detach(),)


def _fill_adapters(decoder: LlamaDecoder, adapters: Adapters, layers: range, dtype: torch.dtype) -> None:
    """Give the linears of some layers the factors of all adapters."""
    decoder.adapters = adapters.names
    for place, layer in enumerate(layers):
        for name, linear in linears_of(decoder.model.layers[place]).items():
            owner = f"model.layers.{layer}.{name.rpartition('.')[0]}"
            parts = {f"{owner}.{part}": width for part, width in linear.parts.items()}
            if (stack := adapters.stack(parts, linear.in_features)) is not None:
                a, b = (torch.from_numpy(factor).to(decoder.device, dtype) for factor in (stack.a, stack.b))
                linear.lora = Lora(a, b, stack.parts)


def fill_linear(
    linear: Linear,
    tensors: Mapping[str, Mapping[str, Tensor]],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    backend: Backend = "reference",
) -> None:
    """Give a linear its weights.

    Args:
        linear: without any.
        tensors: for each of its parts all tensors, by what their names have behind the part's.
        device: where to put them.
        dtype: of a weight that is not quantised.
        backend: what will compute with them there: for "triton" integers, not NF4, are repacked into tiles.

    Raises:
        ValueError: they are not weights of this form and shape.
    """
    weights = [_weight(linear, name, tensors[name], dtype).to(device) for name in linear.parts]
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(dense) > 1 and torch.device(device).type == "cuda":
        weights = [torch.cat(dense)]
    linear.weights = tuple(_in_tiles(linear, weights) if backend == "triton" else weights)


def _weight(linear: Linear, part: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Weight:
    stored, shape = linear.quantization, (linear.parts[part], linear.in_features)
    weight: Weight
    if stored is None:
        if set(tensors) != {"weight"}:
            raise ValueError(f"got the tensors {', '.join(sorted(tensors))} · expected weight")
        weight = tensors["weight"].to(dtype)
    elif stored.format == "bnb-nf4":
        weight = Nf4Weight.from_tensors(tensors)
    elif stored.format == "bnb-int8":
        weight = Int8Weight.from_tensors(tensors)
    else:
        weight = GptqWeight.from_tensors(tensors, bits=stored.bits)
        group_size = linear.in_features if stored.group_size == -1 else stored.group_size
        if weight.group_size != group_size:
            raise ValueError(f"got groups of {weight.group_size} inputs · expected {group_size} by config.json")
    if tuple(weight.shape) != shape:
        raise ValueError(f"got a weight {list(weight.shape)} · expected {list(shape)} by config.json")
    return weight


def _in_tiles(linear: Linear, weights: list[Weight]) -> list[Weight]:
    """Put integers side by side in the tiles of the GPU kernels, where these know their form."""
    gptq = [weight for weight in weights if isinstance(weight, GptqWeight)]
    int8 = [weight for weight in weights if isinstance(weight, Int8Weight)]
    # Groups of another size, and rows that the kernels cannot scale, stay as they are: right, and slower.
    if gptq and gptq[0].group_size in (linear.in_features, *GROUP_SIZES):
        return [QuantWeight.from_gptq(*gptq)]
    if int8:
        with contextlib.suppress(ValueError):
            return [QuantWeight.from_int8(*int8)]
    return weights


def parts_of(linears: Mapping[str, Linear]) -> dict[str, tuple[str, str]]:
    """Return what a checkpoint calls each part, in the place of its linear's name, with that name and the part's."""
    return {
        f"{name.rpartition('.')[0]}.{part}".removeprefix("."): (name, part)
        for name, linear in linears.items()
        for part in linear.parts
    }


def _check_backend(config: DecoderConfig, device: torch.device) -> None:
    """Find out now, not at the first token, that the kernels of a format are not installed."""
    if config.quantization is None or config.quantization.format != "bnb-nf4" or device.type == "cpu":
        return
    try:
        import_bitsandbytes()
    except ImportError as error:
        msg = (
            f"got no bitsandbytes ({error}) · expected it for NF4 weights on a GPU · "
            'pip install "llava-rad-lite[bnb]", or use the CPU'
        )
        raise BackendUnavailable(msg) from error


def _owner(name: str, parts: Mapping[str, object]) -> tuple[str, str]:
    """Split a tensor's name into the part of a linear and the rest; two empty texts where there is none."""
    words = name.split(".")
    for end in range(len(words) - 1, 0, -1):
        if (owner := ".".join(words[:end])) in parts:
            return owner, ".".join(words[end:])
    return "", ""


def _tensors(
    artifact: Artifact, config: DecoderConfig, layers: range
) -> Iterator[tuple[Path, str, Callable[[], Tensor]]]:
    """Yield the tensors of the decoder's files, the layers numbered from 0, each with a function that reads it."""
    places = {f"model.layers.{layer}.": f"model.layers.{place}." for place, layer in enumerate(layers)}
    others = {f"model.layers.{layer}." for layer in range(config.num_hidden_layers)} - places.keys()
    for file in map(artifact.file, artifact.manifest.parts.decoder.weights):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                    prefix = ".".join(name.split(".", 3)[:3]) + "."
                    if prefix not in others:
                        placed = name.replace(prefix, places[prefix], 1) if prefix in places else name
                        yield file, placed, functools.partial(tensors.get_tensor, name)
        except (SafetensorError, OSError) as error:
            msg = f"{file}: got something unreadable ({error}) · expected safetensors · export the artifact again"
            raise ArtifactError(msg) from error
