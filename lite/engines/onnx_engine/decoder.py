"""The decoder by ONNX Runtime: `decoder.onnx` and its cache, without torch.

    input_ids ─embed_tokens.npy─▶ inputs_embeds ─┐                        ┌─▶ logits
    image_features ──────────────────────────────┴─▶ decoder.onnx ────────┤
                                past_key_values ─▶ (one buffer) ◀─ present┘

`export.write.decoder_onnx` draws the graph, and `export.write.int8_cache_graph` the one with an int8 cache. Keys and
values lie in buffers of this module's, of which the graph is told the addresses (IO binding): it writes what is new
into them, and nothing is copied from one token to the next.

A prompt goes through a chunk at a time, which bounds the memory of activations.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lite.config import IMAGE_TOKEN_ID
from lite.engines.onnx_session import (
    CPU,
    CUDA,
    DML,
    errors_explained,
    import_onnxruntime,
    open_session,
    require_onnxruntime,
)
from lite.errors import ArtifactError, BackendUnavailable, ContextLengthError, LiteError
from lite.memory.counts import ONNX_CHUNK_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lite.artifact.open import Artifact
    from lite.artifact.parts import CacheDtype, OnnxPart
    from lite.config import DecoderConfig
    from lite.engines.choose import EngineName

    Array = np.ndarray[Any, np.dtype[Any]]

PREFILL_INPUT: Final = "is_prefill"
"""Of a graph in float32 with an int8 cache: whether a prompt is read (see `export.write.int8_cache_graph`)."""
NOT_FINITE: Final = -1
"""In the place of a token whose logits are not finite."""
_OLDEST: Final = (1, 22), "8-bit MatMulNBits"
OLDEST_INT8_CACHE: Final = (1, 27)
_OLDEST_INT8_CACHE: Final = OLDEST_INT8_CACHE, "an int8 cache in GroupQueryAttention"
_NUMPY: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}
_DEVICES: Final = {CPU: "cpu", CUDA: "cuda"}


class OnnxCache:
    """Keys and values of every token so far, for a batch of studies: for each layer two buffers.

    key, value   [B, num_key_value_heads, max_seq_len, head_dim]
    """

    def __init__(
        self, config: DecoderConfig, *, batch_size: int, max_seq_len: int, dtype: CacheDtype, device: tuple[str, int]
    ) -> None:
        """Allocate room for `batch_size` rows of `max_seq_len` tokens."""
        ort_value = import_onnxruntime().OrtValue
        self.shape = (batch_size, config.num_key_value_heads, max_seq_len, config.head_dim)
        self.dtype = _NUMPY[dtype]
        self.device = device
        self.num_cached_tokens = [0] * batch_size
        self.input_ids = [0] * batch_size
        """The newest token of each row; NOT_FINITE where its logits were not."""
        self.buffers = {
            f"{layer}.{kind}": ort_value.ortvalue_from_shape_and_type(self.shape, self.dtype, *device)
            for layer in range(config.num_hidden_layers)
            for kind in ("key", "value")
        }
        self.bindings: dict[int, Any] = {}  # of the first n rows; `OnnxDecoder` makes them when they are decoded

    @property
    def batch_size(self) -> int:
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

    def bind(self, binding: Any, first: int, count: int) -> None:  # noqa: ANN401 - of ONNX Runtime
        """Tell a binding where the buffers of some rows are."""
        shape = (count, *self.shape[1:])
        offset = first * math.prod(self.shape[1:]) * self.dtype.itemsize
        for name, buffer in self.buffers.items():
            place = (*self.device, self.dtype, shape, buffer.data_ptr() + offset)
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)

    def newest(self) -> NewestTokens:
        """Return the newest token of each row."""
        return NewestTokens(list(self.input_ids))

    def release(self, row: int, *, damaged: bool = False) -> None:  # noqa: ARG002 - no slot is read that is not its study's
        """Free a row."""
        self.num_cached_tokens[row] = 0

    def sample(self, first: int, logits: Array) -> None:
        """Take the most probable token of some rows: logits [rows, vocab_size]."""
        finite = np.isfinite(logits).all(-1)
        self.input_ids[first : first + len(logits)] = np.where(finite, logits.argmax(-1), NOT_FINITE).tolist()


@dataclasses.dataclass(frozen=True, slots=True)
class NewestTokens:
    """Token ids, which are here already."""

    token_ids: list[int]

    def tolist(self) -> list[int]:
        """Return them; NOT_FINITE where the logits were not finite."""
        return self.token_ids


class OnnxDecoder:
    """A Llama decoder that reads images, computed by ONNX Runtime."""

    engine: EngineName = "onnx"
    backend = "onnxruntime"
    fallbacks: tuple[str, ...] = ()
    run_ahead = 0

    def __init__(
        self,
        artifact: Artifact,
        *,
        provider: str = CPU,
        cache_dtype: CacheDtype | None = None,
        profile: Path | None = None,
    ) -> None:
        """Load the graph.

        Args:
            artifact: a checked artifact with `decoder.onnx`.
            provider: from `lite.engines.onnx_session.check_provider`.
            cache_dtype: what keys and values are stored as; None: as what the activations are. int8 is a quarter of
                the memory of float32; what it loses is in the manifest.
            profile: for `end_profile`, how the name of its file begins; None writes none.

        Raises:
            ArtifactError: there is no `decoder.onnx`, or it is not what the manifest says.
            BackendUnavailable: ONNX Runtime is missing or too old, or the provider lacks an operator.
            LiteError: there is no such cache.
        """
        self._part = _part(artifact)
        self.config = artifact.decoder_config()
        check_cache_dtype(artifact, cache_dtype)
        self.cache_dtype: CacheDtype = cache_dtype or self._part.dtype
        self.dtype: str = self._part.dtype
        self.chunk_size = ONNX_CHUNK_SIZE
        int8 = self.cache_dtype == "int8"
        version, what = _OLDEST_INT8_CACHE if int8 else _OLDEST
        require_onnxruntime(version, what=what)
        self.provider, _, index = provider.partition(":")
        if self.provider == DML:
            msg = (
                f"got provider {DML} for the decoder · expected cpu or cuda: DirectML's GroupQueryAttention takes "
                "neither packed queries, keys and values nor a rotary embedding · use another provider"
            )
            raise BackendUnavailable(msg)
        # What ONNX Runtime calls the place of a provider's memory.
        self._place = _DEVICES.get(self.provider, "cpu"), int(index or 0)
        file = artifact.file(self._part.int8_cache.graph if int8 and self._part.int8_cache else self._part.graph)
        self._two_ways = int8 and self.dtype == "float32"
        self._session = open_session(
            file, provider=provider, data=self._part.data, patterns=False, whole=True, profile=profile
        )
        self._check_signature(str(file))
        self._embeddings = _embeddings(artifact, self.config)

    @property
    def device(self) -> str:
        """Where it computes: "cpu", "cuda", "cuda:N", or by its provider's name."""
        name, index = _DEVICES.get(self.provider, self.provider), self._place[1]
        return f"{name}:{index}" if index else name

    @property
    def overflow(self) -> str:
        """What to say where logits are not finite."""
        todo = "the artifact may be damaged: load it with verify=True"
        if self.dtype != "float32":
            todo = "the computation overflowed: export decoder.onnx with --activations float32, or use torch"
        return f"got logits that are not finite in {self.dtype} · expected numbers · {todo}"

    def peak_vram_bytes(self) -> None:
        """Say that ONNX Runtime does not tell."""

    def image_buffer(self, num_image_tokens: int) -> None:
        """Say that features are taken from the host."""

    def give_back(self, cache: OnnxCache) -> None:
        """Forget a cache."""

    def new_cache(self, batch_size: int, max_seq_len: int) -> OnnxCache:
        """Allocate a cache for `batch_size` studies of up to `max_seq_len` tokens each."""
        return OnnxCache(
            self.config, batch_size=batch_size, max_seq_len=max_seq_len, dtype=self.cache_dtype, device=self._place
        )

    def embed(self, input_ids: Sequence[int], image_features: Array | None = None) -> Array:
        """Look the tokens up and put the image in place of IMAGE_TOKEN_ID.

        Args:
            input_ids: with IMAGE_TOKEN_ID once, or not at all when there is no image.
            image_features: [P, hidden_size], or None.

        Returns:
            inputs_embeds [T, hidden_size] in the dtype of the activations, where T counts P tokens for the image.
        """
        dtype = _NUMPY[self.dtype]
        if image_features is None:
            looked_up: Array = self._embeddings[list(input_ids)].astype(dtype)
            return looked_up
        at = list(input_ids).index(IMAGE_TOKEN_ID)
        before, after = (self._embeddings[list(part)].astype(dtype) for part in (input_ids[:at], input_ids[at + 1 :]))
        return np.concatenate((before, np.asarray(image_features).astype(dtype), after))

    def prefill(self, input_ids: Sequence[int], image_features: Array, cache: OnnxCache, row: int = 0) -> Array:
        """Fill a free row of the cache with a prompt, and choose its first token.

        Args:
            input_ids: of the prompt, with IMAGE_TOKEN_ID once.
            image_features: [P, hidden_size].
            cache: from `new_cache`.
            row: of the cache.

        Returns:
            logits float32 [1, vocab_size] behind the prompt.

        Raises:
            ContextLengthError: the prompt is longer than the cache.
            LiteError: ONNX Runtime fails.
        """
        logits = self._run_row(self.embed(input_ids, image_features), cache, row)
        cache.sample(row, logits)
        return logits

    def decode_one_token(self, cache: OnnxCache, input_ids: Sequence[int] | None = None) -> Array:
        """Run the newest token of each row, and choose the next.

        Args:
            cache: after `prefill` of at least one row. Rows that are free stay so.
            input_ids: for each row, instead of the token that was chosen.

        Returns:
            logits float32 [rows, vocab_size], of the rows up to the last that is not free; those of free rows mean
            nothing.

        Raises:
            ContextLengthError: the cache is full.
            LiteError: ONNX Runtime fails.
        """
        counts = cache.num_cached_tokens
        rows = max(row for row, count in enumerate(counts) if count) + 1
        # A free row writes its first slot, which its next study will write again.
        totals = [count + 1 for count in counts[:rows]]
        if rows not in cache.bindings:
            cache.bindings[rows] = self._session.io_binding()
            cache.bind(cache.bindings[rows], 0, rows)
        inputs_embeds = self.embed(cache.input_ids[:rows] if input_ids is None else input_ids[:rows])[:, None]
        logits = self._run(cache.bindings[rows], cache, inputs_embeds, totals, logits_at=[0], is_prefill=False)[:, 0]
        cache.num_cached_tokens = [count + 1 if count else 0 for count in counts]
        cache.sample(0, logits)
        return logits

    def score(
        self,
        input_ids: Sequence[int],
        target_ids: Sequence[int],
        image_features: Array | None,
        *,
        cache: OnnxCache | None = None,
    ) -> Array:
        """Return the logits from which each target token is predicted, all given the ones before it (teacher forcing).

        Args:
            input_ids: one prompt, with IMAGE_TOKEN_ID once if there is an image.
            target_ids: the tokens that follow it, at least one.
            image_features: [P, hidden_size], or None.
            cache: empty, with one row that is long enough; for who wants to see what is written into it.

        Returns:
            logits float32 [len(target_ids), vocab_size]; row i belongs to target_ids[i].

        Raises:
            LiteError: the logits are not finite.
        """
        inputs_embeds = self.embed([*input_ids, *target_ids[:-1]], image_features)
        cache = cache or self.new_cache(1, len(inputs_embeds))
        logits = self._run_row(inputs_embeds, cache, 0, num_decoded=len(target_ids) - 1)
        if not np.isfinite(logits).all():
            raise LiteError(self.overflow)
        return logits

    def end_profile(self) -> Path:
        """End the profile that was asked for, and return its file: what each operator of each run has taken."""
        return Path(self._session.end_profiling())

    def _run_row(self, inputs_embeds: Array, cache: OnnxCache, row: int, *, num_decoded: int = 0) -> Array:
        """Run a row's tokens through an empty cache.

        Args:
            inputs_embeds: [T, hidden_size], a prompt, and what was decoded after it.
            cache: the batch's.
            row: which one.
            num_decoded: tokens behind the prompt, which see the cache as if each had been decoded by itself.

        Returns:
            logits float32 [1 + num_decoded, vocab_size], of the prompt's last token and all behind it.
        """
        length = len(inputs_embeds)
        num_prompt_tokens = length - num_decoded
        binding = self._session.io_binding()
        cache.bind(binding, row, 1)
        scored: list[Array] = []
        for begin, end in self._chunks(num_prompt_tokens, length):
            # Of a chunk that no logits are wanted of those of its last token are computed all the same, and dropped.
            first = max(begin, num_prompt_tokens - 1)
            logits_at = range(min(first, end - 1) - begin, end - begin)
            is_prefill = begin < num_prompt_tokens
            chunk = inputs_embeds[None, begin:end]
            logits = self._run(binding, cache, chunk, [end], logits_at=logits_at, is_prefill=is_prefill)
            if first < end:
                scored.append(logits[0])
        cache.num_cached_tokens[row] = length
        return np.concatenate(scored)

    def _chunks(self, num_prompt_tokens: int, length: int) -> Iterator[tuple[int, int]]:
        """Divide a row: no chunk holds tokens of the prompt and tokens behind it."""
        for start, stop in ((0, num_prompt_tokens), (num_prompt_tokens, length)):
            for begin in range(start, stop, self.chunk_size):
                yield begin, min(begin + self.chunk_size, stop)

    def _run(
        self,
        binding: Any,  # noqa: ANN401 - of ONNX Runtime
        cache: OnnxCache,
        inputs_embeds: Array,
        totals: Sequence[int],
        *,
        logits_at: Sequence[int],
        is_prefill: bool,
    ) -> Array:
        """Run the graph on inputs_embeds [B, T, hidden_size], behind which each row has `totals` tokens."""
        if max(totals) > cache.max_seq_len:
            msg = (
                f"got tokens up to position {max(totals)} · expected at most {cache.max_seq_len}, the cache's "
                "max_seq_len · allocate a longer cache"
            )
            raise ContextLengthError(msg)
        # Bound by address, so they have to live until the run has ended.
        inputs = {
            "inputs_embeds": np.ascontiguousarray(inputs_embeds),
            "seqlens_k": np.array(totals, np.int32) - 1,
            "total_sequence_length": np.array(max(totals), np.int32),
            "logits_at": np.array(logits_at, np.int64),
        }
        if self._two_ways:
            inputs[PREFILL_INPUT] = np.array(is_prefill)
        for name, values in inputs.items():
            binding.bind_cpu_input(name, values)
        logits = np.empty((len(totals), len(logits_at), self.config.vocab_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        with errors_explained(self.provider):
            self._session.run_with_iobinding(binding)
        return logits

    def _check_signature(self, file: str) -> None:
        """Compare the graph's inputs and outputs with the manifest and config.json."""
        config, kinds = self.config, {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
        cache = (config.num_key_value_heads, config.head_dim), kinds[self.cache_dtype]
        expected = {
            "inputs_embeds": ((config.hidden_size,), kinds[self.dtype]),
            "logits": ((config.vocab_size,), "tensor(float)"),
            "seqlens_k": ((), "tensor(int32)"),
            "total_sequence_length": ((), "tensor(int32)"),
            "logits_at": ((), "tensor(int64)"),
        }
        if self._two_ways:
            expected[PREFILL_INPUT] = (), "tensor(bool)"
        for layer in range(config.num_hidden_layers):
            for kind in ("key", "value"):
                expected |= {f"past_key_values.{layer}.{kind}": cache, f"present.{layer}.{kind}": cache}
        values = [*self._session.get_inputs(), *self._session.get_outputs()]
        got = {value.name: (tuple(n for n in value.shape if isinstance(n, int)), value.type) for value in values}
        if got != expected:
            name = min(name for name in {*got, *expected} if got.get(name) != expected.get(name))
            msg = (
                f"{file}: got {name} {got.get(name, 'nowhere')} · expected {expected.get(name, 'no such value')} by "
                "the manifest and config.json · export the artifact again"
            )
            raise ArtifactError(msg)


def check_cache_dtype(artifact: Artifact, cache_dtype: str | None) -> None:
    """Refuse a cache that `decoder.onnx` has no graph for.

    Raises:
        LiteError: there is none.
    """
    known = _part(artifact).cache_dtypes
    if cache_dtype is not None and cache_dtype not in known:
        msg = (
            f"{artifact.path}: got cache_dtype {cache_dtype!r} · expected {' or '.join(known)}, which decoder.onnx was "
        )
        raise LiteError(f"{msg}exported with · choose one of them")


def _part(artifact: Artifact) -> OnnxPart:
    part = artifact.manifest.parts.decoder_onnx
    if part is None:
        msg = (
            f"{artifact.path}: got an artifact without decoder.onnx · expected one, for the onnx engine · make it with "
        )
        raise ArtifactError(f"{msg}`python -m export onnx {artifact.path}`")
    return part


def _embeddings(artifact: Artifact, config: DecoderConfig) -> Array:
    """Map the embeddings into memory: what is not looked up is never read."""
    file = artifact.file(_part(artifact).embeddings)
    try:
        table: Array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        msg = f"{file}: got something unreadable ({error}) · expected an array · export the artifact again"
        raise ArtifactError(msg) from error
    expected = (config.vocab_size, config.hidden_size)
    if table.shape != expected or table.dtype != np.float16:
        msg = f"{file}: got {table.dtype} {list(table.shape)} · expected float16 {list(expected)} by config.json · "
        raise ArtifactError(f"{msg}export the artifact again")
    return table
