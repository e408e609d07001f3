"""The Llama decoder, whole: from input_ids and image_features to logits, over a static cache.

    input_ids ──embed_tokens──▶ x ─┬─────────────────────────▶ + ─┬──────────────────▶ + ──▶ … ──norm──lm_head──▶ logits
       │                           └─norm─ q k v ─rope─ attention ┘└─norm─ down(silu(gate)·up) ┘
       └ IMAGE_TOKEN_ID is replaced by the P rows of image_features

The module tree has the names of a Hugging Face Llama, but that q, k and v are one linear and gate and up another (see
`torch_engine.linear`). Each operation is one of `kernels/`, which chooses its backend by the device: Triton's kernels
on an NVIDIA GPU, plain PyTorch elsewhere.

A prompt goes through once, in chunks (`prefill`), into a row of the cache; then one token per row at a time
(`decode_one_token`). The rows of a batch begin and end when they like: each has its own position, which is both the
rotary angle and the cache slot of its newest token (see `torch_engine.cache`). On a GPU decoding takes nothing from the
host and is one CUDA graph (`torch_engine.cuda_graph`); the token is chosen there, and the host learns of it while the
next is computed. Logits are computed where they are used only: behind a prompt, and at the scored tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import re
import threading
import weakref
from typing import TYPE_CHECKING, Final

from lite.config import IMAGE_TOKEN_ID, DecoderConfig
from lite.engines.choose import gpu_problem
from lite.engines.cores import available_cores
from lite.errors import ArtifactError, BackendUnavailable, ContextLengthError, LiteError, MemoryBudgetError

try:
    import torch
    from safetensors import SafetensorError, safe_open
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError as error:
    msg = f'got no torch and safetensors ({error}) · expected both here · pip install "llava-rad-lite[torch]"'
    raise BackendUnavailable(msg) from error

from kernels.add_rms_norm import add_rms_norm
from kernels.backend import Selection, select_backend
from kernels.bnb import import_bitsandbytes
from kernels.decode_attention import decode_attention
from kernels.reference import rotary_table
from kernels.rotary_and_cache import rotary_and_cache
from kernels.silu_mul import silu_mul
from lite.engines.torch_engine.cache import KVCache
from lite.engines.torch_engine.cuda_graph import GraphedStep, capture_cuda_graph
from lite.engines.torch_engine.linear import Linear, linears_of, parts_of
from lite.memory.counts import decoder_bytes
from lite.memory.plan import CHUNK_SIZES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from lite.artifact.open import Artifact
    from lite.artifact.parts import CacheDtype
    from lite.engines.choose import EngineName
    from lite.engines.torch_engine.cache import LayerCache
    from lite.engines.torch_engine.cuda_graph import Capture

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OUT_OF_MEMORY: Final = re.compile("out of memory|ALLOC_FAILED", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """Where the tokens of one forward lie, computed once for all layers."""

    rows: slice  # of the cache
    slots: Tensor  # int64 [B, T]
    cos: Tensor  # float32 [B, T, head_dim / 2]
    sin: Tensor
    lengths: Tensor | None  # int64 [B], what each row's one token sees; None: attend by torch, over kv_len slots
    kv_len: int  # slots that any of the tokens sees
    mask: Tensor | None  # bool [B, 1, T, kv_len]; None: a prompt's first chunk, or all of kv_len is seen
    reads_cache: bool  # the tokens see each other as the cache keeps them, as when each had been decoded by itself


class RMSNorm(nn.Module):
    """The learned scale of a root-mean-square normalisation, which the decoder fuses with the addition before it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))


class Attention(nn.Module):
    """Grouped-query attention over the cache."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        q, kv = self.heads * config.head_dim, self.kv_heads * config.head_dim
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = Linear(config.hidden_size, parts, config.quantization)
        self.o_proj = Linear(q, {"o_proj": config.hidden_size}, config.quantization)

    def forward(self, x: Tensor, tokens: _Tokens, cache: KVCache) -> Tensor:
        """Put the keys and values of x [B, T, hidden_size] into the cache, and let x attend over it."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)
        here = cache.layer(self.layer, tokens.rows)
        q, k = rotary_and_cache(q, k, v, tokens.cos, tokens.sin, tokens.slots, **here._asdict())
        if tokens.lengths is not None:
            attended = decode_attention(q[:, 0], lengths=tokens.lengths, **here._asdict()).unsqueeze(1)
        else:
            attended = self._attend(q, k, v, tokens, here)
        out: Tensor = self.o_proj(attended.flatten(-2))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: _Tokens, here: LayerCache) -> Tensor:
        """Attend by torch: q [B, T, heads, head_dim] over the slots before kv_len."""
        # Of a prompt's own chunk nothing needs to be lost.
        keeps_own = here.k_scales is not None and not tokens.reads_cache
        keys, values = here.read(tokens.kv_len - k.shape[1] if keeps_own else tokens.kv_len, q.dtype)
        if keeps_own:
            keys = torch.cat((keys, k.transpose(1, 2)), dim=2)
            values = torch.cat((values, v.transpose(1, 2)), dim=2)
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            attn_mask=tokens.mask,
            is_causal=tokens.mask is None and q.shape[1] > 1,
            enable_gqa=self.heads > self.kv_heads,
        )
        return attended.transpose(1, 2)


class MLP(nn.Module):
    """The gated feed-forward half of a layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = Linear(config.hidden_size, parts, config.quantization)
        self.down_proj = Linear(config.intermediate_size, {"down_proj": config.hidden_size}, config.quantization)

    def forward(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x))."""
        out: Tensor = self.down_proj(silu_mul(self.gate_up_proj(x)))
        return out


class DecoderLayer(nn.Module):
    """Attention, then feed-forward; between them the decoder adds and norms."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config)
        self.post_attention_layernorm = RMSNorm(config)


class LlamaModel(nn.Module):
    """The decoder without its head; it exists because the checkpoint's keys begin with `model.`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)


class LlamaDecoder(nn.Module):
    """A Llama decoder that reads images. One request's work does not touch another's; see `lite.model`."""

    engine: EngineName = "torch"

    def __init__(self, config: DecoderConfig, *, cache_dtype: CacheDtype | None = None) -> None:
        """Build the modules; `load_decoder` fills them.

        Args:
            config: the decoder's shape.
            cache_dtype: "int8", or None for what the decoder computes in.
        """
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = _head(config)
        self.quantizes_cache = cache_dtype == "int8"
        self.chunk_size = CHUNK_SIZES[0]
        self.capture: Capture | None = None
        """How a step of decoding is captured; None runs it launch by launch."""
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._idle: KVCache | None = None
        self._graph_problem: str | None = None
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the decoder computes in."""
        return self.model.embed_tokens.weight.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of all weights in memory; a head that is the embeddings counts once."""
        tied = self.lm_head if self.config.tie_word_embeddings else None
        linears = [linear for linear in linears_of(self).values() if linear is not tied]
        return sum(weight.nbytes for weight in self.parameters()) + sum(linear.nbytes for linear in linears)

    @property
    def cache_dtype(self) -> str:
        """What keys and values are stored as."""
        return "int8" if self.quantizes_cache else str(self.dtype).removeprefix("torch.")

    @property
    def selection(self) -> Selection:
        """What computes here, and why."""
        return select_backend(self.device)

    @property
    def backend(self) -> str:
        """What computes, for people: "triton", perhaps with its CUDA graphs, or "torch"."""
        if self.selection.backend != "triton":
            return "torch"
        return "triton, CUDA graphs" if self.capture is not None and self._graph_problem is None else "triton"

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What is slower here than it has to be, each with its reason."""
        found = []
        if self.selection.is_fallback:
            found.append(f"plain torch in place of the GPU kernels: {self.selection.reason}")
        elif self.selection.backend == "triton":
            plain = sum(not linear.uses_kernels for linear in linears_of(self).values())
            if plain:
                found.append(
                    f"plain torch for {plain} linears: the kernels do not know groups, or scales, of their size"
                )
        if self._graph_problem is not None:
            found.append(f"no CUDA graph: {self._graph_problem}")
        return tuple(found)

    @property
    def run_ahead(self) -> int:
        """How many steps may be under way before the host looks at a token: 1 where the device works by itself."""
        return 1 if self.device.type == "cuda" else 0

    def peak_vram_bytes(self) -> int | None:
        """Return the most memory torch's allocator has held on the GPU since the process began; None on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def new_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """Return an empty cache for `batch_size` studies of up to `max_seq_len` tokens each.

        On a GPU a cache that was given back serves again if it is large enough: with its memory, and its CUDA graphs.

        Raises:
            MemoryBudgetError: there is no memory for it.
        """
        if self.device.type == "cuda":
            # So that the next request, a few words longer, can have it.
            max_seq_len = min(-(-max_seq_len // 64) * 64, max(self.config.max_position_embeddings, max_seq_len))
        with self._lock:
            idle, self._idle = self._idle, None
        if idle is not None and idle.batch_size == batch_size and idle.max_seq_len >= max_seq_len:
            return idle
        del idle  # before there is another one
        # Not in inference mode, whoever asks: its tensors could be changed there only.
        with torch.inference_mode(mode=False), _memory_explained("the cache"):
            return KVCache(
                self.config,
                batch_size=batch_size,
                max_seq_len=max_seq_len,
                device=self.device,
                dtype=self.dtype,
                quantized=self.quantizes_cache,
            )

    def give_back(self, cache: KVCache) -> None:
        """Take a cache back that nobody uses any more. One that is not given back is just forgotten."""
        if self.device.type != "cuda":
            return
        for row, count in enumerate(cache.num_cached_tokens):
            if count:
                cache.release(row)
        with self._lock:
            self._idle = cache

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
        on_host = torch.tensor(input_ids, dtype=torch.long)
        embedded: Tensor = self.model.embed_tokens(on_host.to(self.device, non_blocking=True))
        return embedded

    def image_buffer(self, num_image_tokens: int) -> Tensor:
        """Return memory for the features of one image, float32 [1, P, hidden_size], that another library may write.

        Raises:
            MemoryBudgetError: there is none.
        """
        shape = 1, num_image_tokens, self.config.hidden_size
        with _memory_explained("the features of a film"):
            buffer = torch.empty(shape, dtype=torch.float32, device=self.device)
        if self.device.type == "cuda":
            # What lay there before may still be in use, by work that only this stream waits for.
            torch.cuda.current_stream(self.device).synchronize()
        return buffer

    def forward(
        self, inputs_embeds: Tensor, cache: KVCache, *, row: int = 0, start: int = 0, reads_cache: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run some tokens of one study through the layers, and put their keys and values into the cache.

        Args:
            inputs_embeds: [1, T, hidden_size].
            cache: its num_cached_tokens is the caller's to set.
            row: of the cache.
            start: the position of the first token.
            reads_cache: let the tokens see each other as the cache keeps them: see `score`.

        Returns:
            The last layer's output [1, T, hidden_size], before the final norm and behind it.

        Raises:
            ContextLengthError: the cache is shorter.
        """
        length = inputs_embeds.shape[1]
        end = start + length
        _check_room(end, cache)
        slots = torch.arange(start, end, device=self.device)[None]
        mask = None
        if start and length > 1:
            mask = torch.arange(end, device=self.device) <= slots[:, None, :, None]
        return self._layers(inputs_embeds, cache, slots, slice(row, row + 1), kv_len=end, mask=mask,
                            reads_cache=reads_cache)  # fmt: skip

    def _layers(
        self,
        x: Tensor,
        cache: KVCache,
        slots: Tensor,
        rows: slice,
        *,
        lengths: Tensor | None = None,
        kv_len: int = 0,
        mask: Tensor | None = None,
        reads_cache: bool = False,
    ) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary_table()
        # The slot of a free row is -1, and that of a row that runs ahead may be one too many: neither is used.
        angles = slots.clamp(0, cos.shape[0] - 1)
        tokens = _Tokens(rows=rows, slots=slots, cos=cos[angles], sin=sin[angles], lengths=lengths, kv_len=kv_len,
                         mask=mask, reads_cache=reads_cache)  # fmt: skip
        eps = self.config.rms_norm_eps
        layers = [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]
        norms = [*(layer.input_layernorm.weight for layer in layers), self.model.norm.weight]
        # Nothing is added to what comes in, so that one kernel norms it here, too.
        x, normed = add_rms_norm(x.contiguous(), torch.zeros_like(x), norms[0], eps)
        for layer, following in zip(layers, norms[1:], strict=True):
            # Nested, so that what attention gives is not kept while the MLP, which takes the most, runs.
            x, normed = add_rms_norm(
                layer.self_attn(normed, tokens, cache), x, layer.post_attention_layernorm.weight, eps
            )
            x, normed = add_rms_norm(layer.mlp(normed), x, following, eps)
        return x, normed

    def _rotary_table(self) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of every position, float32 [max_position_embeddings, head_dim / 2]."""
        if self._rotary is None or self._rotary[0].device != self.device:
            positions = torch.arange(self.config.max_position_embeddings, device=self.device)
            self._rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        return self._rotary

    def logits(self, normed: Tensor) -> Tensor:
        """Turn normed states [..., hidden_size], the second of `forward`, into float32 logits [..., vocab_size].

        Raises:
            LiteError: the logits are not finite, as when activations overflow float16. The most probable of them
                would be a token all the same, and the text garbage.
        """
        scores: Tensor = self.lm_head(normed)
        logits = scores.float()
        if not bool(logits.isfinite().all()):
            raise LiteError(self.overflow)
        return logits

    @property
    def overflow(self) -> str:
        """What to say where logits are not finite."""
        return (
            f"got logits that are not finite in {self.dtype} · expected numbers · the computation overflowed: "
            "load with dtype='float32' (or 'bfloat16' on a GPU that has it)"
        )

    def prefill(
        self, input_ids: Sequence[int], image_features: np.ndarray | Tensor, cache: KVCache, row: int = 0
    ) -> Tensor:
        """Fill a free row of the cache with a prompt, and choose its first token; wait for nothing.

        Args:
            input_ids: of the prompt, with IMAGE_TOKEN_ID once.
            image_features: [P, hidden_size]. They are let go before the layers run.
            cache: from `new_cache`.
            row: of the cache.

        Returns:
            logits [1, vocab_size] behind the prompt, in the dtype of the decoder.

        Raises:
            ContextLengthError: the prompt is longer than the cache.
            MemoryBudgetError: there is no memory for its activations.
        """
        # A decorator would hold the arguments.
        with torch.inference_mode(), _memory_explained("a prompt"):
            if isinstance(image_features, torch.Tensor) and image_features.is_cuda:
                # Allocated in another thread, perhaps, which does not know the stream of this one.
                image_features.record_stream(torch.cuda.current_stream(self.device))
            inputs_embeds = self.embed(input_ids, torch.as_tensor(image_features, device=self.device)).unsqueeze(0)
            del image_features
            length = inputs_embeds.shape[1]
            _check_room(length, cache)
            for begin in range(0, length, self.chunk_size):
                chunk = inputs_embeds[:, begin : begin + self.chunk_size]
                # A copy, as a view would keep all of a chunk while the next one runs.
                newest = self(chunk, cache, row=row, start=begin)[1][:, -1].clone()
            logits: Tensor = self.lm_head(newest)
            cache.start(row, length, logits)
        return logits

    @torch.inference_mode()
    def decode_one_token(self, cache: KVCache, input_ids: Sequence[int] | None = None) -> Tensor:
        """Run the newest token of each row, and choose the next; wait for nothing.

        Args:
            cache: after `prefill` of at least one row. Rows that are free stay so.
            input_ids: for each row, instead of the token that was chosen.

        Returns:
            logits [rows, vocab_size] in the dtype of the decoder, of the rows up to the last that is not free or more;
            those of free rows mean nothing. The next call may overwrite them.

        Raises:
            ContextLengthError: the cache is full.
            MemoryBudgetError: there is no memory for it.
        """
        counts = cache.num_cached_tokens
        _check_room(max(counts) + 1, cache)
        if input_ids is not None:
            cache.input_ids.copy_(torch.tensor(input_ids, dtype=torch.long))
        occupied = max(row for row, count in enumerate(counts) if count) + 1
        with _memory_explained("a token"):
            if self.selection.backend == "triton" or self.capture is not None:
                logits = self._captured(cache, _step_rows(occupied, cache.batch_size))
            else:
                logits = self._decode(cache, occupied, kv_len=max(counts) + 1)
        cache.num_cached_tokens = [count + 1 if count else 0 for count in counts]
        return logits

    def _captured(self, cache: KVCache, rows: int) -> Tensor:
        """Decode by a step that serves every token, captured if it can be."""
        step = cache.steps.get(rows)
        if step is None:
            # Not the cache itself, which holds the step, and not the decoder, which may hold the cache: they would keep
            # each other, and the GPU's memory.
            decoder, held = weakref.proxy(self), weakref.proxy(cache)
            step = cache.steps[rows] = GraphedStep(lambda: decoder._decode(held, rows), self.capture)  # noqa: SLF001
        logits = step()
        if step.problem is not None:
            self._graph_problem = step.problem
        return logits

    def _decode(self, cache: KVCache, rows: int, kv_len: int | None = None) -> Tensor:
        """Run and choose the newest tokens of the first rows: nothing here depends on the token, if kv_len is None."""
        first = slice(0, rows)
        slots = cache.position_ids[first, None].contiguous()
        x = self.model.embed_tokens(cache.input_ids[first]).unsqueeze(1)
        if kv_len is None:
            _, normed = self._layers(x, cache, slots, first, lengths=slots[:, 0] + 1)
        else:
            counts = cache.num_cached_tokens[first]
            mask = None
            if any(count + 1 != kv_len for count in counts):
                # A free row sees slot 0, as a row that sees none has no softmax.
                mask = torch.arange(kv_len, device=self.device) <= slots.clamp(min=0)[:, None, :, None]
            _, normed = self._layers(x, cache, slots, first, kv_len=kv_len, mask=mask, reads_cache=True)
        logits: Tensor = self.lm_head(normed[:, -1])
        cache.sample(logits, first)
        cache.position_ids[first] += (cache.position_ids[first] >= 0).long()
        return logits

    @torch.inference_mode()
    def score(
        self, input_ids: Sequence[int], target_ids: Sequence[int], image_features: np.ndarray | Tensor | None
    ) -> Tensor:
        """Return the logits from which each target token is predicted, all given the ones before it (teacher forcing).

        Args:
            input_ids: one prompt, with IMAGE_TOKEN_ID once if there is an image.
            target_ids: the tokens that follow it, at least one. They see the cache as if each had been decoded.
            image_features: [P, hidden_size], or None.

        Returns:
            logits float32 [len(target_ids), vocab_size] on the CPU; row i belongs to target_ids[i].

        Raises:
            LiteError: see `logits`.
            MemoryBudgetError: there is no memory for it.
        """
        features = None if image_features is None else torch.as_tensor(image_features, device=self.device)
        inputs_embeds = self.embed([*input_ids, *target_ids[:-1]], features).unsqueeze(0)
        length = inputs_embeds.shape[1]
        num_prompt_tokens = length - len(target_ids) + 1
        with _memory_explained("a text"):
            cache = self.new_cache(1, length)
            scored: list[Tensor] = []
            for start, stop in ((0, num_prompt_tokens), (num_prompt_tokens, length)):
                for begin in range(start, stop, self.chunk_size):
                    chunk = inputs_embeds[:, begin : min(begin + self.chunk_size, stop)]
                    _, normed = self(chunk, cache, start=begin, reads_cache=start > 0)
                    scored = [normed[0, -1:]] if start == 0 else [*scored, normed[0]]
            logits = self.logits(torch.cat(scored)).cpu()
        self.give_back(cache)
        return logits


def _head(config: DecoderConfig) -> Linear:
    stored = config.quantization.lm_head if config.quantization is not None else None
    return Linear(config.hidden_size, {"lm_head": config.vocab_size}, stored)


def _step_rows(occupied: int, batch_size: int) -> int:
    """Return how many rows to decode: a power of two, so that few graphs are captured, or all of them."""
    return min(1 << (occupied - 1).bit_length(), batch_size)


def _check_room(end: int, cache: KVCache) -> None:
    if end > cache.max_seq_len:
        msg = (
            f"got tokens up to position {end} · expected at most {cache.max_seq_len}, the cache's max_seq_len · "
            "allocate a longer cache"
        )
        raise ContextLengthError(msg)


@contextlib.contextmanager
def _memory_explained(what: str) -> Iterator[None]:
    """Say in this project's words that a GPU's memory is full."""
    try:
        yield
    except RuntimeError as error:
        # torch's own error, and those of CUDA, cuBLAS and Triton, which are of several kinds.
        if not isinstance(error, torch.OutOfMemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        reason = str(error).partition("\n")[0]
        msg = f"got no memory for {what} ({reason}) · expected some free on the GPU · take a smaller batch, "
        msg += "cache_dtype='int8', fewer bits, or end what else runs there"
        raise MemoryBudgetError(msg) from error


def load_decoder(
    artifact: Artifact,
    *,
    device: str,
    dtype: str | None = None,
    cache_dtype: CacheDtype | None = None,
    chunk_size: int | None = None,
    fp16_accumulation: bool = False,
    layers: range | None = None,
) -> LlamaDecoder:
    """Load the decoder of an artifact.

    The modules are built without memory (on `meta`) and the tensors of the memory-mapped files are assigned to them,
    so the peak is the decoder itself and one linear. Quantised weights stay as they are stored on a CPU; for the GPU
    kernels they are repacked, a linear at a time.

    Args:
        artifact: a checked artifact.
        device: "cpu", "cuda" or "cuda:N".
        dtype: one of DTYPES. None takes the stored dtype on a GPU, and float32 on the CPU: 16-bit matrix products
            run on few CPUs at speed (on an AVX2 CPU float16 reached 1.4 GFLOP/s against 100 in float32; 2 cores,
            torch 2.13, November 2026).
        cache_dtype: "int8", or what the decoder computes in; None is the latter.
        chunk_size: tokens of a prompt that go through together: it bounds the memory of activations.
        fp16_accumulation: see `kernels.quant_matmul`.
        layers: which layers to load, for whoever computes a large decoder in parts; all by default.

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
    with _memory_explained("the decoder"):
        if target.type == "cuda":
            # Taken and given back, so that torch's allocator cuts the weights from one piece: of one for each tensor,
            # what is moved and repacked meanwhile would leave holes, 0.9 GB of them at 7B (by tests/fake_cuda.py).
            torch.empty(decoder_bytes(config, itemsize=wanted.itemsize), dtype=torch.uint8, device=target)
        _fill(decoder, artifact, _tensors(artifact, whole, layers), target, wanted)
        if target.type == "cuda":
            torch.cuda.empty_cache()  # for the tower, which has another allocator, and for caches, which want one piece
    if target.type == "cuda" and decoder.selection.backend == "triton":
        decoder.capture = functools.partial(capture_cuda_graph, device=decoder.device)
    decoder.chunk_size = chunk_size or decoder.chunk_size
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
            module.take(found.pop(name), device=device, dtype=dtype, backend=decoder.selection.backend)
        except ValueError as error:
            msg = f"{artifact.path / 'decoder'}: {name}: {error} · export the artifact again"
            raise ArtifactError(msg) from error
    if config.tie_word_embeddings:
        decoder.lm_head.weights = (decoder.model.embed_tokens.weight.detach(),)


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
    return [artifact.file(name) for name in artifact.manifest.parts.decoder.weights]


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
        problem = gpu_problem()
        msg = (
            f"got device {device!r} · expected one of the {count} GPUs that torch {torch.__version__} sees"
            f"{f' ({problem})' if problem else ''} · use the CPU, or install a torch built for CUDA and the driver it "
            "needs"
        )
        raise BackendUnavailable(msg)
    return device


def check_dtype(dtype: str | None) -> None:
    """Refuse what the decoder does not compute in.

    Raises:
        LiteError: it is none of DTYPES.
    """
    if dtype is not None and dtype not in DTYPES:
        msg = f"got dtype {dtype!r} · expected {', '.join(DTYPES)} or None · choose one of them"
        raise LiteError(msg)


def check_cache_dtype(artifact: Artifact, cache_dtype: str | None, *, device: str, dtype: str | None) -> None:
    """Refuse a cache that is neither int8 nor what the decoder computes in.

    Raises:
        LiteError: it is something else.
    """
    computed = dtype or ("float32" if device == "cpu" else artifact.decoder_config().dtype)
    if cache_dtype not in (None, "int8", computed):
        msg = f"got cache_dtype {cache_dtype!r} · expected int8, or {computed}, which the decoder computes in · choose "
        raise LiteError(f"{msg}one of them")


def free_bytes(device: str) -> int:
    """Return the bytes that are free on a GPU."""
    gc.collect()  # a model that was let go of, and what torch has kept of its memory
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return free
