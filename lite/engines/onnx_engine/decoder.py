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

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lite.config import IMAGE_TOKEN_ID
from lite.engines.adapters import Adapters
from lite.engines.onnx_engine.adapted import ADAPTER_INPUT, Adapted
from lite.engines.onnx_engine.cache import DTYPES, OnnxCache, OnnxChosen
from lite.engines.onnx_session import CPU, CUDA, DML, errors_explained, open_session, require_onnxruntime
from lite.engines.protocol import NO_DRAFTS, Segment
from lite.errors import ArtifactError, BackendUnavailable, ContextLengthError, LiteError
from lite.memory.counts import ONNX_CHUNK_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lite.artifact.open import Artifact
    from lite.artifact.parts import CacheDtype, PromptWeights
    from lite.config import DecoderConfig
    from lite.engines.protocol import ChosenTokens, EngineName

    Array = np.ndarray[Any, np.dtype[Any]]

PREFILL_INPUT: Final = "is_prefill"
"""Of a graph in float32 with an int8 cache: whether a prompt is read (see `export.write.int8_cache_graph`)."""
_DEVICES: Final = {CPU: "cpu", CUDA: "cuda"}


class OnnxDecoder:
    """A Llama decoder that reads images, computed by ONNX Runtime: an `Engine`, whose methods `protocol` describes."""

    engine: EngineName = "onnx"
    backend = "onnxruntime"
    fallbacks: tuple[str, ...] = ()
    run_ahead = 0
    verifies_together = False

    def __init__(
        self,
        artifact: Artifact,
        *,
        provider: str = CPU,
        cache_dtype: CacheDtype | None = None,
        positions: NDArray[np.float64] | None = None,
        two_rows: bool = False,
        int8_prompts: bool = False,
        adapters: Sequence[str] = (),
        profile: Path | None = None,
    ) -> None:
        """Load the graph.

        Args:
            artifact: a checked artifact with `decoder.onnx`.
            provider: from `lite.engines.onnx_session.check_provider`.
            cache_dtype: what keys and values are stored as; None: as what the activations are. int8 is a quarter of
                the memory of float32; what it loses is in the manifest.
            positions: see `lite.image_tokens.rotary_positions`.
            two_rows: decode a token by itself as one of two, so that it is what it is behind drafts: MatMulNBits in 4
                bits rounds one row otherwise than two or more, which are all alike. It takes 9 % longer (int4 and int8
                cache at 7B widths, 1,450 tokens, AVX2, November 2026).
            int8_prompts: read prompts by the artifact's int8 weights for them (see `export.write.prompt_graphs`), on a
                CPU that adds them up exactly (`adds_int8_exactly`).
            adapters: of the artifact, by name: those that rows may use. Without any the graphs are as exported.
            profile: for `end_profile`, how the name of its file begins; None writes none.

        Raises:
            ArtifactError: there is no `decoder.onnx`, or it or an adapter is not what the manifest says.
            BackendUnavailable: ONNX Runtime is missing or too old, or the provider lacks an operator.
            LiteError: there is no such cache or adapter, or there are no such prompts.
        """
        self.adapters = tuple(adapters)
        self._part = artifact.onnx_part(cache_dtype)
        self.config = artifact.decoder_config()
        self.cache_dtype: CacheDtype = cache_dtype or self._part.dtype
        self.dtype: str = self._part.dtype
        self.chunk_size = ONNX_CHUNK_SIZE
        self.two_rows = two_rows
        int8 = self.cache_dtype == "int8"
        require_onnxruntime(int8_cache=int8)
        self.provider, _, index = provider.partition(":")
        if self.provider == DML:
            msg = (
                f"got provider {DML} for the decoder · expected cpu or cuda: DirectML's GroupQueryAttention takes "
                "neither packed queries, keys and values nor a rotary embedding · use another provider"
            )
            raise BackendUnavailable(msg)
        # What ONNX Runtime calls the place of a provider's memory.
        self._place = _DEVICES.get(self.provider, "cpu"), int(index or 0)
        self._two_ways = int8 and self.dtype == "float32"
        self.prompt_weights: PromptWeights = "int8" if int8_prompts else "stored"

        added = Adapted(Adapters(artifact, adapters), self.config, self.dtype) if adapters else None
        opened = functools.partial(self._opened, artifact, provider, positions, profile, added)
        cached, prompts = self._part.int8_cache, self._part.prompts
        self._session = opened(cached.graph if int8 and cached else self._part.graph, self._part.data)
        self._prompt_session = self._session
        if int8_prompts:
            graph = prompts and (prompts.int8_cache if int8 else prompts.graph)
            if not prompts or not graph:
                msg = f"{artifact.path}: got int8_prompts · expected a graph for them, with an {self.cache_dtype} cache"
                raise LiteError(f"{msg} · export with --prompt-weights int8, or leave it out")
            self._prompt_session = opened(graph, self._part.data, prompts.data)
        if added is not None:
            added.forget()
        self._embeddings = _embeddings(artifact, self.config)

    def _opened(
        self,
        artifact: Artifact,
        provider: str,
        positions: Array | None,
        profile: Path | None,
        added: Adapted | None,
        graph: str,
        *data: str,
    ) -> Any:  # noqa: ANN401 - of ONNX Runtime
        """Load a graph that reads its weights from some files."""
        session = open_session(
            artifact.file(graph),
            provider=provider,
            data=data,
            patterns=False,
            whole=True,
            profile=profile,
            constants={} if positions is None else _rotary_tables(self.config, positions, self.dtype),
            change=None if added is None else added.change,
            added={} if added is None else added.values,
        )
        self._check_signature(session, str(artifact.file(graph)))
        return session

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

    def new_cache(self, num_rows: int, max_seq_len: int) -> OnnxCache:
        """Return an empty cache."""
        return OnnxCache(
            self.config, num_rows=num_rows, max_seq_len=max_seq_len, dtype=self.cache_dtype, device=self._place
        )

    def embed(self, input_ids: Sequence[int], image_features: Array | None = None) -> Array:
        """Look the tokens up: inputs_embeds [T, hidden_size], in the dtype of the activations.

        Image features [P, hidden_size] take the place of the IMAGE_TOKEN_IDs, which lie side by side.
        """
        dtype, ids = DTYPES[self.dtype], list(input_ids)
        if image_features is None:
            looked_up: Array = self._embeddings[ids].astype(dtype)
            return looked_up
        at = ids.index(IMAGE_TOKEN_ID)
        behind = at + ids.count(IMAGE_TOKEN_ID)
        before, after = (self._embeddings[part].astype(dtype) for part in (ids[:at], ids[behind:]))
        return np.concatenate((before, np.asarray(image_features).astype(dtype), after))

    def extend(self, segment: Segment[Array], cache: OnnxCache) -> OnnxChosen | None:
        """Read some tokens of one row, and choose behind the last `num_logits`."""
        logits = self.logits(segment, cache)
        if not segment.num_logits:
            return None
        row, end = segment.row, segment.end
        cache.sampling[row], cache.is_active[row], cache.last_logits = segment.sampling, True, logits[None]
        positions = range(end - segment.num_logits + 1, end + 1)
        return OnnxChosen(cache.choose([row] * segment.num_logits, logits, positions))

    def logits(self, segment: Segment[Array], cache: OnnxCache) -> Array:
        """Read some tokens of one row, and return the logits of the last `num_logits`."""
        row, length = segment.row, len(segment.input_ids)
        image = segment.image_features
        inputs_embeds = self.embed(segment.input_ids, None if image is None else image[segment.image_part])[None]
        cache.is_active[row], cache.adapters[row] = False, segment.adapter
        # The graph computes logits of one token at least.
        logits_at = range(length - max(1, segment.num_logits), length)
        session = self._prompt_session if segment.is_prompt else self._session
        binding = session.io_binding()
        cache.bind(binding, row, 1)
        found = self._run(
            session,
            binding,
            cache,
            inputs_embeds,
            range(row, row + 1),
            [segment.end],
            logits_at=logits_at,
            is_prefill=segment.is_prompt,
        )
        cache.num_cached_tokens[row] = segment.end
        return found[0, len(logits_at) - segment.num_logits :]

    def decode(self, cache: OnnxCache, drafts: Mapping[int, Sequence[int]] = NO_DRAFTS) -> OnnxChosen:
        """Read the newest token of each active row, and choose the next; then those with drafts, in a step for each.

        GroupQueryAttention takes several tokens of one row, or one token of several rows.
        """
        for row in drafts:
            cache.is_active[row] = False
        tokens = self._decode_active(cache) if any(cache.is_active) else {}
        for row, drafted in drafts.items():
            segment: Segment[Array] = Segment(
                row=row,
                start=cache.num_cached_tokens[row],
                input_ids=(cache.input_ids[row], *drafted),
                num_logits=1 + len(drafted),
                is_prompt=False,
                sampling=cache.sampling[row],
                adapter=cache.adapters[row],
            )
            chosen = self.extend(segment, cache)
            tokens |= chosen.tokens if chosen is not None else {}
        return OnnxChosen(tokens)

    def _decode_active(self, cache: OnnxCache) -> dict[int, ChosenTokens]:
        rows = cache.active
        first, count = rows.start, len(rows)
        # A row between them that is not active writes the slot behind what it holds, which it will write again.
        totals = [min(cache.num_cached_tokens[row] + 1, cache.max_seq_len + cache.is_active[row]) for row in rows]
        input_ids, length = cache.input_ids[first : rows.stop], 1
        if count == 1 and self.two_rows and totals[0] < cache.max_seq_len:
            # The slot of the second one is written again by whatever follows.
            totals, input_ids, length = [totals[0] + 1], input_ids * 2, 2
        if (first, count) not in cache.bindings:
            cache.bindings[first, count] = self._session.io_binding()
            cache.bind(cache.bindings[first, count], first, count)
        inputs_embeds = self.embed(input_ids).reshape(count, length, -1)
        logits = self._run(
            self._session,
            cache.bindings[first, count],
            cache,
            inputs_embeds,
            rows,
            totals,
            logits_at=range(length),
            is_prefill=False,
        )
        cache.last_logits, logits = logits[:, :1], logits[:, 0]
        active = [row for row in rows if cache.is_active[row]]
        for row in active:
            cache.num_cached_tokens[row] += 1
        positions = [cache.num_cached_tokens[row] for row in active]
        return cache.choose(active, logits[[row - first for row in active]], positions)

    def end_profile(self) -> Path:
        """End the profile that was asked for, and return its file: what each operator of each run has taken."""
        if self._prompt_session is not self._session:
            Path(self._prompt_session.end_profiling()).unlink()
        return Path(self._session.end_profiling())

    def _run(
        self,
        session: Any,  # noqa: ANN401 - of ONNX Runtime
        binding: Any,  # noqa: ANN401 - of ONNX Runtime
        cache: OnnxCache,
        inputs_embeds: Array,
        rows: range,
        totals: Sequence[int],
        *,
        logits_at: Sequence[int],
        is_prefill: bool,
    ) -> Array:
        """Run the graph on inputs_embeds [B, T, hidden_size] of B rows, behind which each has `totals` tokens."""
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
        if self.adapters:
            inputs[ADAPTER_INPUT] = np.array(cache.adapters[rows.start : rows.stop]).reshape(-1, 1, 1)
        for name, values in inputs.items():
            binding.bind_cpu_input(name, values)
        logits = np.empty((len(totals), len(logits_at), self.config.vocab_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        with errors_explained(self.provider):
            session.run_with_iobinding(binding)
        return logits

    def _check_signature(self, session: Any, file: str) -> None:  # noqa: ANN401 - of ONNX Runtime
        """Compare a graph's inputs and outputs with the manifest and config.json."""
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
        if self.adapters:
            expected[ADAPTER_INPUT] = (1, 1), "tensor(int64)"
        for layer in range(config.num_hidden_layers):
            for kind in ("key", "value"):
                expected |= {f"past_key_values.{layer}.{kind}": cache, f"present.{layer}.{kind}": cache}
        values = [*session.get_inputs(), *session.get_outputs()]
        got = {value.name: (tuple(n for n in value.shape if isinstance(n, int)), value.type) for value in values}
        if got != expected:
            name = min(name for name in {*got, *expected} if got.get(name) != expected.get(name))
            msg = (
                f"{file}: got {name} {got.get(name, 'nowhere')} · expected {expected.get(name, 'no such value')} by "
                "the manifest and config.json · export the artifact again"
            )
            raise ArtifactError(msg)


def _embeddings(artifact: Artifact, config: DecoderConfig) -> Array:
    """Map the embeddings into memory: what is not looked up is never read."""
    file = artifact.file(artifact.onnx_part().embeddings)
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


def _rotary_tables(config: DecoderConfig, positions: NDArray[np.float64], dtype: str) -> dict[str, Array]:
    """Return the graph's tables of cosines and sines, for places that stand for other positions than their own."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    angles = positions[:, None] * config.rope_theta**-exponents
    return {"cos_cache": np.cos(angles).astype(dtype), "sin_cache": np.sin(angles).astype(dtype)}
