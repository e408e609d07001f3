"""The torch engine: a Llama decoder over a static cache.

    Segment ──embed──▶ x ──layers──▶ norm ──lm_head──▶ logits ──sample──▶ Chosen

A prompt goes through a segment at a time (`extend`); then one token per row (`decode`), or drafted ones behind it, too.
The rows begin and end when they like: each has its own position, which is both the rotary angle and the cache slot of
its newest token (see `torch_engine.cache`). On a GPU a step takes nothing from the host and is one CUDA graph
(`torch_engine.cuda_graph`); the tokens are chosen there, and the host learns of them while the next are computed.
Logits are computed where they are used only.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kernels.add_rms_norm import add_rms_norm
from kernels.backend import Selection, select_backend
from kernels.reference import rotary_table
from lite.config import IMAGE_TOKEN_ID, DecoderConfig
from lite.engines.protocol import MAX_TOP, NO_ADAPTER, NO_DRAFTS
from lite.engines.torch_engine.cache import KVCache, TorchChosen
from lite.engines.torch_engine.cuda_graph import GraphedStep
from lite.engines.torch_engine.device import memory_explained
from lite.engines.torch_engine.layers import DecoderLayer, LlamaModel, Tokens
from lite.engines.torch_engine.linear import Linear, linears_of
from lite.errors import LiteError
from lite.memory.plan import CHUNK_SIZES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lite.artifact.parts import CacheDtype
    from lite.engines.protocol import EngineName, Segment
    from lite.engines.torch_engine.cuda_graph import Capture

    ImageFeatures = Tensor | NDArray[np.float32]


class LlamaDecoder(nn.Module):
    """A Llama decoder that reads images."""

    engine: EngineName = "torch"
    prompt_weights = "stored"
    verifies_together = True

    def __init__(self, config: DecoderConfig, *, cache_dtype: CacheDtype | None = None) -> None:
        """Build the modules; `load_decoder` fills them. The cache is int8, or None: of what the decoder computes in."""
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = _head(config)
        self.quantizes_cache = cache_dtype == "int8"
        self.chunk_size = CHUNK_SIZES[0]
        self.capture: Capture | None = None
        """How a step of decoding is captured; None runs it launch by launch."""
        self.adapters: tuple[str, ...] = ()
        self.positions: NDArray[np.float64] | None = None  # that the places of a row stand for; None: each its own
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._graph_problem: str | None = None

    # -- What it is --------------------------------------------------------------------------------------------------

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
        uses_kernels = [linear.uses_kernels for linear in linears_of(self).values()]
        if self.selection.is_fallback:
            found.append(f"plain torch in place of the GPU kernels: {self.selection.reason}")
        elif self.selection.backend == "triton" and not all(uses_kernels):
            why = "the kernels do not know groups, or scales, of their size"
            found.append(f"plain torch for {uses_kernels.count(False)} linears: {why}")
        if self._graph_problem is not None:
            found.append(f"no CUDA graph: {self._graph_problem}")
        return tuple(found)

    @property
    def overflow(self) -> str:
        """What to say where logits are not finite."""
        todo = "the artifact may be damaged: load it with verify=True"
        if self.dtype != torch.float32:
            todo = "the computation overflowed: load with dtype='float32' (or 'bfloat16' on a GPU that has it)"
        return f"got logits that are not finite in {self.dtype} · expected numbers · {todo}"

    @property
    def run_ahead(self) -> int:
        """How many steps may be under way: 1 where the device works by itself."""
        return 1 if self.device.type == "cuda" else 0

    def peak_vram_bytes(self) -> int | None:
        """Return the most memory torch's allocator has held on the GPU since the process began; None on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    # -- The engine's verb: see `lite.engines.protocol`, also for errors ---------------------------------------------

    def new_cache(self, num_rows: int, max_seq_len: int) -> KVCache:
        """Return an empty cache."""
        # Not in inference mode, whoever asks: its tensors could be changed there only.
        with torch.inference_mode(mode=False), memory_explained("the cache"):
            return KVCache(
                self.config,
                num_rows=num_rows,
                max_seq_len=max_seq_len,
                device=self.device,
                dtype=self.dtype,
                quantized=self.quantizes_cache,
            )

    def image_buffer(self, num_image_tokens: int) -> Tensor:
        """Return memory for the features of one image, that another library may write."""
        shape = 1, num_image_tokens, self.config.hidden_size
        with memory_explained("the features of a film"):
            buffer = torch.empty(shape, dtype=torch.float32, device=self.device)
        if self.device.type == "cuda":
            # What lay there before may still be in use, by work that only this stream waits for.
            torch.cuda.current_stream(self.device).synchronize()
        return buffer

    def extend(self, segment: Segment[ImageFeatures], cache: KVCache) -> TorchChosen | None:
        """Read some tokens of one row, and choose behind the last `num_logits`; wait for nothing."""
        with torch.inference_mode(), memory_explained("a prompt"):
            logits = self._read(segment, cache)
            return cache.begin(segment, logits) if segment.num_logits else None

    def logits(self, segment: Segment[ImageFeatures], cache: KVCache) -> NDArray[np.float32]:
        """Read some tokens of one row, and return the logits of the last `num_logits`."""
        with torch.inference_mode(), memory_explained("a text"):
            found: NDArray[np.float32] = self._read(segment, cache).float().cpu().numpy()
            return found

    @torch.inference_mode()
    def decode(self, cache: KVCache, drafts: Mapping[int, Sequence[int]] = NO_DRAFTS) -> TorchChosen:
        """Read the newest token of each active row, drafted ones behind it, as many in all rows; wait for nothing."""
        num_drafts = max(map(len, drafts.values()), default=0)
        if num_drafts:
            if self.capture is not None:  # few graphs: of 1, 3, 7 and 15 drafts, where there is room
                room = cache.max_seq_len - cache.longest_active - 1
                num_drafts = max(num_drafts, min((1 << num_drafts.bit_length()) - 1, room))
            cache.draft(drafts, num_drafts)
        return self._step(cache, num_drafts=num_drafts)

    # -- How it computes ---------------------------------------------------------------------------------------------

    def embed(self, input_ids: Sequence[int], image_features: ImageFeatures | None = None) -> Tensor:
        """Look the tokens up: inputs_embeds [T, hidden_size].

        Image features [P, hidden_size] take the place of the IMAGE_TOKEN_IDs, which lie side by side.
        """
        ids = list(input_ids)
        if image_features is None:
            return self._look_up(ids)
        if isinstance(image_features, torch.Tensor) and image_features.is_cuda:
            # Allocated in another thread, perhaps, which does not know the stream of this one.
            image_features.record_stream(torch.cuda.current_stream(self.device))
        at = ids.index(IMAGE_TOKEN_ID)
        before, after = self._look_up(ids[:at]), self._look_up(ids[at + ids.count(IMAGE_TOKEN_ID) :])
        image = torch.as_tensor(image_features, device=self.device).to(before)
        return torch.cat((before, image, after))

    def _look_up(self, input_ids: Sequence[int]) -> Tensor:
        on_host = torch.tensor(input_ids, dtype=torch.long)
        embedded: Tensor = self.model.embed_tokens(on_host.to(self.device, non_blocking=True))
        return embedded

    def head_logits(self, normed: Tensor) -> Tensor:
        """Turn normed states [..., hidden_size], the second of `forward`, into float32 logits [..., vocab_size].

        Raises:
            LiteError: the logits are not finite, as when activations overflow float16.
        """
        logits: Tensor = self.lm_head(normed).float()
        if not bool(logits.isfinite().all()):
            raise LiteError(self.overflow)
        return logits

    def _read(self, segment: Segment[ImageFeatures], cache: KVCache) -> Tensor:
        """Return the logits behind the last tokens, [num_logits, vocab_size], in the dtype of the decoder."""
        image = segment.image_features
        inputs_embeds = self.embed(segment.input_ids, None if image is None else image[segment.image_part])[None]
        del image
        cache.release(segment.row)
        where = {"row": segment.row, "start": segment.start, "adapter": segment.adapter}
        _, normed = self(inputs_embeds, cache, reads_cache=not segment.is_prompt, **where)
        cache.num_cached_tokens[segment.row] = segment.end
        # A copy, as a view would keep all of the segment.
        newest = normed[0, normed.shape[1] - segment.num_logits :].clone()
        del normed
        logits: Tensor = self.lm_head(newest)
        return logits

    def forward(
        self,
        inputs_embeds: Tensor,
        cache: KVCache,
        *,
        row: int = 0,
        start: int = 0,
        reads_cache: bool = False,
        adapter: int = NO_ADAPTER,
    ) -> tuple[Tensor, Tensor]:
        """Run some tokens of one study through the layers, and put their keys and values into the cache.

        Args:
            inputs_embeds: [1, T, hidden_size].
            cache: its num_cached_tokens is the caller's to set.
            row: of the cache.
            start: the position of the first token.
            reads_cache: let the tokens see each other as the cache keeps them, as when each is decoded by itself.
            adapter: of the study.

        Returns:
            The last layer's output [1, T, hidden_size], before the final norm and behind it.

        Raises:
            ContextLengthError: the cache is shorter.
        """
        end = start + inputs_embeds.shape[1]
        cache.check_room(end)
        slots = torch.arange(start, end, device=self.device)[None]
        mask = None
        if 0 < start < end - 1:
            mask = torch.arange(end, device=self.device) <= slots[:, None, :, None]
        tokens = Tokens(rows=slice(row, row + 1), slots=slots, angles=self._angles(slots), lengths=None, kv_len=end,
                        mask=mask, reads_cache=reads_cache, adapters=None if adapter < 0 else adapter)  # fmt: skip
        return self._layers(inputs_embeds, cache, tokens)

    def _layers(self, x: Tensor, cache: KVCache, tokens: Tokens) -> tuple[Tensor, Tensor]:
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
            x, normed = add_rms_norm(layer.mlp(normed, tokens.adapters), x, following, eps)
        return x, normed

    def _angles(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of slots [B, T], float32 [B, T, head_dim / 2]."""
        if self._rotary is None or self._rotary[0].device != self.device:
            positions = torch.arange(self.config.max_position_embeddings, device=self.device)
            if self.positions is not None:
                positions = torch.from_numpy(self.positions).float().to(self.device)
            self._rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        cos, sin = self._rotary
        # The slot of a free row is -1, and that of a row that runs ahead may be one too many: neither is used.
        places = slots.clamp(0, cos.shape[0] - 1)
        return cos[places], sin[places]

    def _step(self, cache: KVCache, *, num_drafts: int) -> TorchChosen:
        """Decode all active rows by a step that serves every token, captured if it can be."""
        kv_len = cache.longest_active + 1 + num_drafts
        cache.check_room(kv_len)
        num_top = MAX_TOP if cache.tells_top else 0
        with memory_explained("a token"):
            if self.selection.backend == "triton" or self.capture is not None:
                rows = _step_rows(cache.num_spanned, cache.num_rows)
                cache.last_logits = self._captured(cache, (rows, num_drafts, num_top, cache.uses_adapters))
            else:
                step = cache.num_spanned, num_drafts, num_top, cache.uses_adapters
                cache.last_logits = self._decode(cache, *step, kv_len=kv_len)
        return cache.advance(1 + num_drafts)

    def _captured(self, cache: KVCache, key: tuple[int, int, int, bool]) -> Tensor:
        """Run the step for so many rows, drafts and top tokens, with adapters or without."""
        if (step := cache.steps.get(key)) is None:
            # Not the cache itself, which holds the step, and not the decoder, which may hold the cache: they would keep
            # each other, and the GPU's memory.
            decoder, held = weakref.proxy(self), weakref.proxy(cache)
            step = cache.steps[key] = GraphedStep(lambda: decoder._decode(held, *key), self.capture)  # noqa: SLF001
        logits = step()
        if step.problem is not None:
            self._graph_problem = step.problem
        return logits

    def _decode(
        self, cache: KVCache, rows: int, num_drafts: int, num_top: int, uses_adapters: bool, kv_len: int | None = None
    ) -> Tensor:
        """Read and choose the newest tokens of the first rows: nothing here depends on a token, if kv_len is None."""
        first = slice(0, rows)
        newest, slots = cache.newest(first, num_drafts)
        adapters = cache.adapters[first].repeat_interleave(1 + num_drafts) if uses_adapters else None
        lengths = mask = None
        if kv_len is None:
            lengths = slots + 1
        elif num_drafts or any(cache.num_cached_tokens[row] + 1 != kv_len for row in range(rows)):
            # A free row sees slot 0, as a row that sees none has no softmax.
            mask = torch.arange(kv_len, device=self.device) <= slots.clamp(min=0)[:, None, :, None]
        tokens = Tokens(rows=first, slots=slots, angles=self._angles(slots), lengths=lengths, kv_len=kv_len or 0,
                        mask=mask, reads_cache=kv_len is not None, adapters=adapters)  # fmt: skip
        _, normed = self._layers(self.model.embed_tokens(newest), cache, tokens)
        logits: Tensor = self.lm_head(normed)
        cache.choose(logits, first, num_top)
        return logits


def _head(config: DecoderConfig) -> Linear:
    stored = config.quantization.lm_head if config.quantization is not None else None
    return Linear(config.hidden_size, {"lm_head": config.vocab_size}, stored)


def _step_rows(spanned: int, num_rows: int) -> int:
    """Return how many rows to decode: a power of two, so that few graphs are captured, or all of them."""
    return min(1 << (spanned - 1).bit_length(), num_rows)
