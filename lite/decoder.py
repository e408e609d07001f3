"""The Llama decoder, whole: from input_ids and image_features to logits, over a static cache.

    input_ids ──embed_tokens──▶ x ─┬─────────────────────────▶ + ─┬──────────────────▶ + ──▶ … ──norm──lm_head──▶ logits
       │                           └─norm─ q k v ─rope─ attention ┘└─norm─ down(silu(gate)·up) ┘
       └ IMAGE_TOKEN_ID is replaced by the P rows of image_features

The module tree has the names of a Hugging Face Llama, so the keys of the safetensors files are the keys of the state
dict and no table translates them.

A prompt goes through once (`prefill`), then one token per row at a time (`decode_one_token`). The rows of a batch have
their own lengths: each token carries its position, which is both its rotary angle and its cache slot (see
`lite.cache`). Logits are computed where they are used only: the last token of each prompt, and the scored ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Final

from lite.artifact import read_json_object
from lite.config import IMAGE_TOKEN_ID, DecoderConfig
from lite.cores import available_cores
from lite.errors import ArtifactError, BackendUnavailable, ContextLengthError, LiteError

try:
    import torch
    from safetensors import SafetensorError, safe_open
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError as error:
    msg = f'got no torch and safetensors ({error}) · expected both here · pip install "llava-rad-lite[torch]"'
    raise BackendUnavailable(msg) from error

from kernels.bnb import import_bitsandbytes
from kernels.reference import rms_norm, rotary, rotary_table
from lite.cache import KVCache
from lite.linear import QuantizedLinear, head_linear, layer_linear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from lite.artifact import Artifact
    from lite.engine import EngineName

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHTS_NAME: Final = "decoder/model.safetensors"
INDEX_NAME: Final = "decoder/model.safetensors.index.json"


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., hidden_size]."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention over the cache."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = layer_linear(config, config.hidden_size, q_size)
        self.k_proj = layer_linear(config, config.hidden_size, kv_size)
        self.v_proj = layer_linear(config, config.hidden_size, kv_size)
        self.o_proj = layer_linear(config, q_size, config.hidden_size)

    def forward(self, x: Tensor, positions: _Positions, cache: KVCache) -> Tensor:
        """Put the keys and values of x [B, T, hidden_size] into the cache, and let x attend over it."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotary(q, positions.cos, positions.sin), rotary(k, positions.cos, positions.sin)
        cache.write(self.layer, positions.position_ids, k, v)
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            cache.k_cache[self.layer, :, :, : positions.kv_len],
            cache.v_cache[self.layer, :, :, : positions.kv_len],
            attn_mask=positions.mask,
            enable_gqa=self.groups > 1,
        )
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(-2))
        return out


class MLP(nn.Module):
    """The gated feed-forward half of a layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = layer_linear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = layer_linear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = layer_linear(config, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each normed before and added after."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)

    def forward(self, x: Tensor, positions: _Positions, cache: KVCache) -> Tensor:
        """Run x [B, T, hidden_size] through the layer."""
        x = x + self.self_attn(self.input_layernorm(x), positions, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LlamaModel(nn.Module):
    """The decoder without its head; it exists because the checkpoint's keys begin with `model.`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)


class _Positions:
    """Where the tokens of one forward lie, computed once for all layers."""

    def __init__(self, config: DecoderConfig, position_ids: Tensor, *, kv_len: int, ragged: bool) -> None:
        self.position_ids = position_ids  # [B, T]
        self.kv_len = kv_len  # cache slots that any of the tokens sees
        self.cos, self.sin = rotary_table(position_ids, config.head_dim, config.rope_theta)
        # One new token per row and rows of one length: every query sees every slot, no mask is needed.
        self.mask: Tensor | None = None
        if ragged or position_ids.shape[1] > 1:
            slots = torch.arange(kv_len, device=position_ids.device)
            self.mask = slots <= position_ids[:, None, :, None]  # [B, 1, T, kv_len]


class LlamaDecoder(nn.Module):
    """A Llama decoder that reads images."""

    engine: EngineName = "torch"

    def __init__(self, config: DecoderConfig) -> None:
        """Build the modules; `load_decoder` fills them."""
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = head_linear(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in."""
        return self.model.embed_tokens.weight.dtype

    @property
    def cache_dtype(self) -> str:
        """What keys and values are stored as."""
        return str(self.dtype).removeprefix("torch.")

    def peak_vram_bytes(self) -> int | None:
        """Return the most memory torch's allocator has held on the GPU since the process began; None on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def new_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """Allocate a cache for `batch_size` studies of up to `max_seq_len` tokens each."""
        return KVCache(
            self.config, batch_size=batch_size, max_seq_len=max_seq_len, device=self.device, dtype=self.dtype
        )

    def embed(self, input_ids: Sequence[int], image_features: Tensor | None = None) -> Tensor:
        """Look the tokens up and put the image in place of IMAGE_TOKEN_ID.

        Args:
            input_ids: with IMAGE_TOKEN_ID once, or not at all when there is no image.
            image_features: [P, hidden_size], or None.

        Returns:
            inputs_embeds [T, hidden_size], where T counts P tokens for the image.
        """
        if image_features is None:
            return self._look_up(input_ids)
        at = list(input_ids).index(IMAGE_TOKEN_ID)
        before, after = self._look_up(input_ids[:at]), self._look_up(input_ids[at + 1 :])
        return torch.cat((before, image_features.to(before), after))

    def _look_up(self, input_ids: Sequence[int]) -> Tensor:
        embedded: Tensor = self.model.embed_tokens(torch.tensor(input_ids, dtype=torch.long, device=self.device))
        return embedded

    def forward(self, inputs_embeds: Tensor, cache: KVCache, start: Sequence[int]) -> Tensor:
        """Run tokens through the layers and put their keys and values into the cache.

        Args:
            inputs_embeds: [B, T, hidden_size].
            cache: with B rows. Its num_cached_tokens is the caller's to set: only the caller knows what is padding.
            start: the position of each row's first token.

        Returns:
            The last layer's output [B, T, hidden_size], before the final norm.
        """
        length = inputs_embeds.shape[1]
        if max(start) + length > cache.max_seq_len:
            msg = (
                f"got tokens up to position {max(start) + length} · expected at most {cache.max_seq_len}, the cache's "
                "max_seq_len · allocate a longer cache"
            )
            raise ContextLengthError(msg)
        first = torch.tensor(start, device=self.device)
        position_ids = first[:, None] + torch.arange(length, device=self.device)
        positions = _Positions(
            self.config, position_ids, kv_len=max(start) + length, ragged=any(at != start[0] for at in start)
        )
        x = inputs_embeds
        for layer in self.model.layers:
            x = layer(x, positions, cache)
        return x

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Turn the last layer's output [..., hidden_size] into float32 logits [..., vocab_size].

        Raises:
            LiteError: the logits are not finite, as when activations overflow float16. The most probable of them
                would be a token all the same, and the text garbage.
        """
        scores: Tensor = self.lm_head(self.model.norm(hidden_states))
        logits = scores.float()
        if not bool(logits.isfinite().all()):
            msg = (
                f"got logits that are not finite in {self.dtype} · expected numbers · the computation overflowed: "
                "load with dtype='float32' (or 'bfloat16' on a GPU that has it)"
            )
            raise LiteError(msg)
        return logits

    @torch.inference_mode()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        image_features: np.ndarray | Tensor,
        cache: KVCache,
        *,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Fill the cache with the prompts; return the logits after the last token of each.

        Args:
            prompts: the input_ids of each row, each with IMAGE_TOKEN_ID once; their lengths may differ.
            image_features: [B, P, hidden_size].
            cache: empty, with B rows.
            chunk_size: run this many positions at a time, which bounds the memory of activations; None runs all at
                once. The result is the same.

        Returns:
            logits float32 [B, vocab_size].

        Raises:
            LiteError: see `logits`.
        """
        features = torch.as_tensor(image_features, device=self.device)
        rows = [self.embed(ids, image) for ids, image in zip(prompts, features, strict=True)]
        lengths = [len(row) for row in rows]
        inputs_embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right: see lite.cache
        last = torch.empty(len(rows), self.config.hidden_size, device=self.device, dtype=self.dtype)
        step = chunk_size or max(lengths)
        for begin in range(0, max(lengths), step):
            hidden_states = self(inputs_embeds[:, begin : begin + step], cache, [begin] * len(rows))
            for row, length in enumerate(lengths):
                if begin < length <= begin + step:
                    last[row] = hidden_states[row, length - 1 - begin]
        cache.num_cached_tokens = lengths
        return self.logits(last)

    @torch.inference_mode()
    def decode_one_token(
        self, input_ids: Sequence[int], cache: KVCache, active: Sequence[bool] | None = None
    ) -> Tensor:
        """Run one token per row; return the logits of the next.

        Args:
            input_ids: the newest token of each row.
            cache: after `prefill`.
            active: which rows go on. A row that has ended is computed, as the batch is rectangular, but does not
                grow; its logits mean nothing.

        Returns:
            logits float32 [B, vocab_size].

        Raises:
            LiteError: see `logits`.
        """
        grows = active if active is not None else [True] * len(input_ids)
        # A row that has ended writes into its last slot, which nobody reads any more.
        start = [n if grow else n - 1 for n, grow in zip(cache.num_cached_tokens, grows, strict=True)]
        hidden_states = self(self._look_up(input_ids).unsqueeze(1), cache, start)
        cache.num_cached_tokens = [n + grow for n, grow in zip(cache.num_cached_tokens, grows, strict=True)]
        return self.logits(hidden_states[:, -1])

    @torch.inference_mode()
    def score(
        self, input_ids: Sequence[int], target_ids: Sequence[int], image_features: np.ndarray | Tensor | None
    ) -> Tensor:
        """Return the logits from which each target token is predicted, all given the ones before it (teacher forcing).

        Args:
            input_ids: one prompt, with IMAGE_TOKEN_ID once if there is an image.
            target_ids: the tokens that follow it, at least one.
            image_features: [P, hidden_size], or None.

        Returns:
            logits float32 [len(target_ids), vocab_size] on the CPU; row i belongs to target_ids[i].

        Raises:
            LiteError: see `logits`.
        """
        features = None if image_features is None else torch.as_tensor(image_features, device=self.device)
        inputs_embeds = self.embed([*input_ids, *target_ids[:-1]], features)
        cache = self.new_cache(1, len(inputs_embeds))
        hidden_states = self(inputs_embeds.unsqueeze(0), cache, [0])
        return self.logits(hidden_states[0, -len(target_ids) :]).cpu()


def load_decoder(
    artifact: Artifact, *, device: str, dtype: str | None = None, layers: range | None = None
) -> LlamaDecoder:
    """Load the decoder of an artifact.

    The modules are built without memory (on `meta`) and the tensors of the memory-mapped files are assigned to them,
    so the peak is the decoder itself and one tensor. Quantised weights stay as they are stored.

    Args:
        artifact: a checked artifact.
        device: "cpu", "cuda" or "cuda:N".
        dtype: one of DTYPES. None takes the stored dtype on a GPU, and float32 on the CPU: 16-bit matrix products
            run on few CPUs at speed (on an AVX2 CPU float16 reached 1.4 GFLOP/s against 100 in float32; 2 cores,
            torch 2.13, November 2026).
        layers: which layers to load, for whoever computes a large decoder in parts; all by default.

    Raises:
        ArtifactError: a tensor is missing, unknown or misshapen, or the folder is not a plain Llama.
        BackendUnavailable: there is no such device, or bitsandbytes is needed for it and not installed.
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
        decoder = LlamaDecoder(config)
    plain = dict(decoder.state_dict())
    if config.tie_word_embeddings:
        del plain["lm_head.weight"]
    quantized = {name: module for name, module in decoder.named_modules() if isinstance(module, QuantizedLinear)}
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in quantized}
    for file, name, read in _tensors(artifact, whole, layers):
        owner, part = _owner(name, quantized)
        if owner:
            parts[owner][part] = read()
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
        state[name] = tensor.to(device=target, dtype=wanted)
    if missing := sorted([*(plain.keys() - state.keys()), *(name for name, found in parts.items() if not found)]):
        msg = (
            f"{artifact.path / 'decoder'}: got no tensor {missing[0]} ({len(missing)} missing) · expected all "
            f"{len(plain) + len(parts)} of config.json's {config.num_hidden_layers} layers · export the artifact again"
        )
        raise ArtifactError(msg)
    for name, module in quantized.items():
        try:
            module.take(parts.pop(name), device=target)
        except ValueError as error:
            msg = f"{artifact.path / 'decoder'}: {name}: {error} · export the artifact again"
            raise ArtifactError(msg) from error
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    decoder.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(requires_grad=False)


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


def _owner(name: str, quantized: Mapping[str, QuantizedLinear]) -> tuple[str, str]:
    """Split a tensor's name into its quantised linear and the rest; two empty texts where there is none."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (owner := ".".join(parts[:end])) in quantized:
            return owner, ".".join(parts[end:])
    return "", ""


def _tensors(
    artifact: Artifact, config: DecoderConfig, layers: range
) -> Iterator[tuple[Path, str, Callable[[], Tensor]]]:
    """Yield the tensors of the decoder's files, the layers numbered from 0, each with a function that reads it."""
    places = {f"model.layers.{layer}.": f"model.layers.{place}." for place, layer in enumerate(layers)}
    others = {f"model.layers.{layer}." for layer in range(config.num_hidden_layers)} - places.keys()
    for file in _weight_files(artifact):
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


def _weight_files(artifact: Artifact) -> list[Path]:
    if INDEX_NAME not in artifact.manifest.files:
        return [artifact.file(WEIGHTS_NAME)]
    index = artifact.file(INDEX_NAME)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        msg = f"{index}: got no weight_map of names · expected one · export the artifact again"
        raise ArtifactError(msg)
    return [artifact.file(f"decoder/{shard}") for shard in sorted(set(weight_map.values()))]


def check_device(device: str) -> str:
    """Return the device to use.

    Args:
        device: "auto" (a GPU if torch sees one), "cpu", "cuda" or "cuda:N".

    Raises:
        BackendUnavailable: torch does not see that device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = None
    if parsed is None or parsed.type not in ("cpu", "cuda"):
        msg = f"got device {device!r} · expected auto, cpu, cuda or cuda:N · choose one of them"
        raise BackendUnavailable(msg)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if parsed.type == "cuda" and (parsed.index or 0) >= count:
        msg = (
            f"got device {device!r} · expected one of the {count} GPUs that torch {torch.__version__} sees · use the "
            "CPU, or install a torch built for CUDA and the driver it needs"
        )
        raise BackendUnavailable(msg)
    return device
