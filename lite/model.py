"""The façade: an artifact loaded, and the way of a study through it. No maths here.

    image ──image──▶ pixel_values ──vision──▶ image_features ─┐
    reason ──prompt─▶ input_ids ───────────────────────────── generate ──▶ token ids ──prompt──▶ text

A `FindingsModel` holds read-only weights; everything a request changes (its cache, its text) belongs to the request.
So one model may be used from several threads at once: the requests share the cores and the weights and nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from lite.artifact import TOKENIZER_NAME, load_artifact
from lite.engine import choose_engine
from lite.errors import ArtifactError, LiteError, PromptError
from lite.generate import Generation
from lite.image import load_image, preprocess
from lite.memory import MemoryPlan, Peaks, check_memory, parse_bytes, peak_rss_bytes, plan_memory, rss_bytes
from lite.prompt import PromptEncoder, TextStream, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence

    from lite.artifact import Artifact, CacheDtype
    from lite.generate import Engine, FinishReason
    from lite.image import ImageSource, Rendering
    from lite.vision import VisionEncoder


class Study(NamedTuple):
    """One exam: a film, and why it was made. Any tuple of this form will do."""

    image: ImageSource
    reason: str | None = None
    query: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went, in seconds. A batch goes through each stage together: its studies share these numbers."""

    image_s: float  # reading and preprocessing the film; this one is the study's own
    vision_s: float  # tower and projector
    prefill_s: float  # the prompt through the decoder, to the first token
    decode_steps_s: tuple[float, ...]  # each further token; of a batch, one for each row
    batch_size: int

    @property
    def decode_s(self) -> float:
        """All tokens but the first."""
        return sum(self.decode_steps_s)

    @property
    def ttft_s(self) -> float:
        """Time to the first token, from the file on."""
        return self.image_s + self.vision_s + self.prefill_s

    @property
    def total_s(self) -> float:
        """Time to the last token."""
        return self.ttft_s + self.decode_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The process's memory peaks until each stage of this request had ended, and this request's cache, in bytes.

    A peak is never less than the one before. In the first request of a process they tell what each stage takes.
    """

    image: Peaks
    vision: Peaks
    prefill: Peaks
    decode: Peaks
    cache_bytes: int

    @property
    def peak_rss_bytes(self) -> int | None:
        """The most that the process has had resident; None on Windows, where the standard library does not tell."""
        return self.decode.rss_bytes

    @property
    def peak_vram_bytes(self) -> int | None:
        """The most that torch's allocator has held on the GPU; None without one."""
        return self.decode.vram_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The drafted findings of one study, and how they were made."""

    text: str
    finish_reason: FinishReason  # "length": cut at max_new_tokens or at the end of the context
    token_ids: tuple[int, ...]  # generated, without EOS
    num_prompt_tokens: int  # places in the context, the image's included
    timings: Timings
    memory: Memory
    rendering: str  # how the film's values became grey levels: see lite.image
    artifact_id: str
    engine: str  # of the decoder: "torch" or "onnx"
    device: str  # of the decoder: "cpu", "cuda"
    dtype: str  # what the decoder computes in
    cache_dtype: str  # what keys and values are stored as
    provider: str  # ONNX Runtime's, for the vision tower, and for the decoder of the onnx engine
    notice: str

    @property
    def num_new_tokens(self) -> int:
        """The number of generated tokens, without EOS."""
        return len(self.token_ids)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudyError:
    """Stands in the place of a study's findings when it cannot be used or computed."""

    index: int  # of the study, from 0
    error: LiteError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A study that has passed every check and waits for the models."""

    input_ids: list[int]
    pixel_values: np.ndarray
    rendering: str
    image_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A batch whose images have been seen and whose text is to come."""

    generation: Generation
    vision_s: float
    image_peaks: Peaks
    vision_peaks: Peaks


class FindingsStream:
    """The text of one study as it is made: an iterator over pieces, which joined are `findings.text`."""

    def __init__(self, pieces: Generator[str, None, Findings]) -> None:
        self.findings: Findings | None = None  # there when the pieces have ended
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        """Return itself: the pieces come once."""
        return self

    def __next__(self) -> str:
        """Return the next piece."""
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.findings = self.findings or end.value
            raise

    def result(self) -> Findings:
        """Run to the end and return the findings."""
        for _ in self:
            pass
        if self.findings is None:
            msg = "got a stream that an error has ended · expected findings · start a new one"
            raise LiteError(msg)
        return self.findings


class FindingsModel:
    """An artifact ready to draft findings. Made by `load`. Safe to use from several threads at once."""

    def __init__(
        self, artifact: Artifact, *, tokenizer: Tokenizer, prompt: PromptEncoder, vision: VisionEncoder,
        decoder: Engine,
    ) -> None:  # fmt: skip
        self.artifact = artifact
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.vision = vision
        self.decoder = decoder

    @property
    def notice(self) -> str:
        """What every reader of the text must know."""
        return self.artifact.manifest.notice

    def findings(
        self,
        image: ImageSource,
        reason: str | None = None,
        *,
        query: str | None = None,
        max_new_tokens: int | None = None,
        rendering: Rendering = "mimic-cxr-jpg",
    ) -> Findings:
        """Draft the findings of one film.

        Args:
            image: whatever `lite.image.load_image` takes: a path (PNG, JPEG, DICOM …), bytes, an array, a PIL image.
            reason: the reason for the exam, in a sentence or two; None or blank if unknown.
            query: ask this instead of the question the model was trained with; excludes a reason.
            max_new_tokens: stop after so many tokens; None takes the artifact's default.
            rendering: how DICOM and 16-bit values become grey levels.

        Raises:
            ImageError: the image cannot be read or is not a frontal film.
            BackendUnavailable: it is a DICOM file and pydicom is not installed.
            PromptError: the reason cannot be used; ContextLengthError if it is too long. Found before any work.
            LiteError: max_new_tokens is no count, or the decoder's numbers overflow.
        """
        stream = self.stream(image, reason, query=query, max_new_tokens=max_new_tokens, rendering=rendering)
        return stream.result()

    def stream(
        self,
        image: ImageSource,
        reason: str | None = None,
        *,
        query: str | None = None,
        max_new_tokens: int | None = None,
        rendering: Rendering = "mimic-cxr-jpg",
    ) -> FindingsStream:
        """Draft the findings of one film, a piece of text at a time.

        The arguments and the errors are those of `findings`. The errors are raised here and not at the first piece,
        but for an overflow, which only the piece it happens in can tell.
        """
        limit = self._max_new_tokens(max_new_tokens)
        return FindingsStream(self._pieces(self._prepare(Study(image, reason, query), rendering), limit))

    def findings_batch(
        self,
        studies: Iterable[Study | tuple[Any, ...] | ImageSource],
        *,
        batch_size: int = 8,
        max_new_tokens: int | None = None,
        rendering: Rendering = "mimic-cxr-jpg",
    ) -> Iterator[Findings | StudyError]:
        """Draft the findings of many films, a batch at a time.

        Args:
            studies: `Study`s, tuples like them, or images alone. Read lazily, `batch_size` at a time, so it may be a
                generator over more films than fit in memory.
            batch_size: how many go through the decoder together. More is faster and takes more memory: the cache
                grows with it.
            max_new_tokens: as for `findings`.
            rendering: as for `findings`.

        Yields:
            One result per study, in order. A study that cannot be used or computed, whatever is wrong with it, yields
            a `StudyError` in its place; the others of its batch are not affected.

        Raises:
            LiteError: batch_size or max_new_tokens is no count, or `studies` is one study and not several.
        """
        if isinstance(studies, str | bytes | bytearray | memoryview | os.PathLike | np.ndarray | Image.Image | Study):
            msg = f"got one study (a {type(studies).__name__}) · expected several · wrap it in a list: [study]"
            raise LiteError(msg)
        _check_count("batch_size", batch_size, "1 runs the studies one by one")
        limit = self._max_new_tokens(max_new_tokens)
        return self._batches(iter(studies), batch_size, limit, rendering)

    def score(
        self,
        image: ImageSource,
        token_ids: Sequence[int],
        reason: str | None = None,
        *,
        query: str | None = None,
        rendering: Rendering = "mimic-cxr-jpg",
    ) -> np.ndarray:
        """Return the logits with which the model predicts each of the given tokens, one after the other.

        This is teacher forcing: what a comparison of two artifacts on the same text needs.

        Args:
            image: as for `findings`.
            token_ids: an answer, such as `Findings.token_ids` of a reference, with EOS if its end counts too.
            reason: as for `findings`.
            query: as for `findings`.
            rendering: as for `findings`.

        Returns:
            logits, float32 [len(token_ids), vocab_size].

        Raises:
            PromptError: there are no tokens, or one is not in the vocabulary.
            ContextLengthError: prompt and answer together are longer than the context.
        """
        prepared = self._prepare(Study(image, reason, query), rendering)
        self._check_answer(token_ids, self.prompt.num_tokens(prepared.input_ids))
        features = self.vision(prepared.pixel_values[None])[0]
        return np.asarray(self.decoder.score(prepared.input_ids, token_ids, features))

    def _check_answer(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        vocab_size = self.decoder.config.vocab_size
        if not token_ids or not all(0 <= token_id < vocab_size for token_id in token_ids):
            msg = f"got token_ids {list(token_ids)[:8]} · expected ids from 0 to {vocab_size - 1}, at least one · check"
            msg += " that they come from the same tokenizer"
            raise PromptError(msg)
        self.prompt.check_length(num_prompt_tokens + len(token_ids) - 1, what="prompt and answer", shorten="answer")

    def _max_new_tokens(self, max_new_tokens: int | None) -> int:
        if max_new_tokens is None:
            return self.artifact.manifest.decoding.max_new_tokens
        _check_count("max_new_tokens", max_new_tokens, "leave it out for the default")
        return max_new_tokens

    def _prepare(self, study: Study, rendering: Rendering) -> _Prepared:
        """Check everything about a study, the cheap things first."""
        input_ids = self.prompt.encode(study.reason, query=study.query)
        started = time.perf_counter()
        loaded = load_image(study.image, rendering=rendering)
        pixel_values = preprocess(loaded.image, self.artifact.manifest.preprocessing)
        image_s = time.perf_counter() - started
        return _Prepared(input_ids=input_ids, pixel_values=pixel_values, rendering=loaded.rendering, image_s=image_s)

    def _start(self, batch: Sequence[_Prepared], max_new_tokens: int) -> _Begun:
        """Run the tower over a batch, up to where its generation begins."""
        image_peaks = self._peaks()
        started = time.perf_counter()
        image_features = self.vision(np.stack([prepared.pixel_values for prepared in batch]))
        vision_s = time.perf_counter() - started
        generation = Generation(
            self.decoder,
            [prepared.input_ids for prepared in batch],
            image_features,
            num_prompt_tokens=[self.prompt.num_tokens(prepared.input_ids) for prepared in batch],
            max_new_tokens=max_new_tokens,
            max_seq_len=self.prompt.max_seq_len,
            eos_token_id=self.artifact.manifest.decoding.eos_token_id,
            peaks=self._peaks,
        )
        return _Begun(generation=generation, vision_s=vision_s, image_peaks=image_peaks, vision_peaks=self._peaks())

    def _peaks(self) -> Peaks:
        return Peaks(rss_bytes=peak_rss_bytes(), vram_bytes=self.decoder.peak_vram_bytes())

    def _finish(self, batch: Sequence[_Prepared], begun: _Begun) -> list[Findings]:
        """Put the results of a finished generation together."""
        generation, peaks = begun.generation, self._peaks()
        memory = Memory(
            image=begun.image_peaks,
            vision=begun.vision_peaks,
            prefill=generation.prefill_peaks or peaks,
            decode=peaks,
            cache_bytes=generation.cache_bytes,
        )
        return [
            Findings(
                text=self.tokenizer.decode(row.token_ids),
                finish_reason=row.finish_reason or "length",
                token_ids=tuple(row.token_ids),
                num_prompt_tokens=row.num_prompt_tokens,
                timings=Timings(
                    image_s=prepared.image_s,
                    vision_s=begun.vision_s,
                    prefill_s=generation.prefill_s,
                    decode_steps_s=tuple(generation.decode_steps_s),
                    batch_size=len(batch),
                ),
                memory=memory,
                rendering=prepared.rendering,
                artifact_id=self.artifact.id,
                engine=self.decoder.engine,
                device=str(self.decoder.device),
                dtype=str(self.decoder.dtype).removeprefix("torch."),
                cache_dtype=self.decoder.cache_dtype,
                provider=self.vision.provider,
                notice=self.notice,
            )
            for prepared, row in zip(batch, generation.rows, strict=True)
        ]

    def _pieces(self, prepared: _Prepared, max_new_tokens: int) -> Generator[str, None, Findings]:
        begun = self._start([prepared], max_new_tokens)
        text = TextStream(self.tokenizer)
        for (token_id,) in begun.generation:
            if token_id is not None and (piece := text.push(token_id)):
                yield piece
        if rest := text.finish():
            yield rest
        return self._finish([prepared], begun)[0]

    def _batches(
        self, studies: Iterator[Any], batch_size: int, max_new_tokens: int, rendering: Rendering
    ) -> Iterator[Findings | StudyError]:
        index = 0
        while chunk := list(itertools.islice(studies, batch_size)):
            ready: list[_Prepared | LiteError] = []
            for item in chunk:
                try:
                    ready.append(self._prepare(_study(item), rendering))
                except LiteError as error:
                    ready.append(error)
            batch = [entry for entry in ready if isinstance(entry, _Prepared)]
            results = iter(self._run_batch(batch, max_new_tokens) if batch else [])
            for entry in ready:
                result = next(results) if isinstance(entry, _Prepared) else entry
                yield StudyError(index=index, error=result) if isinstance(result, LiteError) else result
                index += 1

    def _run_batch(self, batch: Sequence[_Prepared], max_new_tokens: int) -> list[Findings | LiteError]:
        try:
            begun = self._start(batch, max_new_tokens)
            for _ in begun.generation:
                pass
            return [*self._finish(batch, begun)]
        except LiteError as error:
            if len(batch) == 1:
                return [error]
        # The error does not say which study it comes from: one by one, only that one has it.
        return [result for prepared in batch for result in self._run_batch([prepared], max_new_tokens)]


def _study(item: Any) -> Study:  # noqa: ANN401 - anything a caller may put into the list
    """Read what `findings_batch` takes for a study."""
    if not isinstance(item, tuple):
        return Study(item)
    if not 1 <= len(item) <= len(Study._fields):
        msg = (
            f"got a study of {len(item)} values · expected (image,), (image, reason) or (image, reason, query) · "
            "put None in the place of a reason that is not known"
        )
        raise LiteError(msg)
    return Study(*item)


def _check_count(name: str, value: object, hint: str) -> None:
    if type(value) is not int or value < 1:
        msg = f"got {name}={value!r} · expected a whole number from 1 · {hint}"
        raise LiteError(msg)


def load(
    path: str | os.PathLike[str],
    *,
    engine: str = "auto",
    device: str = "auto",
    dtype: str | None = None,
    provider: str | None = None,
    cache_dtype: CacheDtype | None = None,
    memory_limit: int | str | None = None,
    verify: bool = True,
) -> FindingsModel:
    """Load an artifact.

    Args:
        path: the artifact's folder.
        engine: "torch" computes `decoder/`; "onnx" computes `decoder.onnx`, without torch. "auto" takes onnx where the
            artifact has it and there is no GPU for torch, or no torch (see `lite.engine`).
        device: "auto" (an NVIDIA GPU if torch sees one, or the CPU), "cpu", "cuda" or "cuda:N".
        dtype: what torch computes the decoder in: "float32", "float16" or "bfloat16". None takes the stored dtype on a
            GPU and float32 on the CPU: twice the memory of float16, and far less time where 16-bit products are slow
            (see `lite.decoder.load_decoder`).
        provider: what ONNX Runtime computes with, tower and decoder: a name of its own such as "CUDAExecutionProvider",
            or cpu, cuda; "cuda:1" for the second GPU. None takes the CPU for the decoder, and for the tower CUDA
            where `device` is a GPU and this ONNX Runtime has it.
        cache_dtype: what the onnx engine keeps keys and values in: "float32" or "int8", a quarter of it. None takes
            float32, or int8 where only that fits `memory_limit` and loses no more than `MAX_CACHE_KL`, as measured at
            export.
        memory_limit: refuse, before anything is loaded, an artifact with which one study at a time would take more:
            bytes, or text such as "12GiB". On a GPU torch's allocator counts, on a CPU what the process has resident,
            with all that it holds already. See `lite.memory`.
        verify: compare the sha256 of the files that will be read with the manifest first: 12 s for the 14 GB of a 7B
            model at the 1.2 GB/s that hashing alone reached (one core of an AMD EPYC, November 2026), longer where the
            disk is slower.

    Raises:
        ArtifactError: the artifact is missing, damaged, newer than this version or inconsistent.
        BackendUnavailable: a package, the device or the provider is not there.
        MemoryBudgetError: one study would take more than `memory_limit`.
        LiteError: there is no such engine, dtype or cache.
    """
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    artifact = load_artifact(path)
    chosen = choose_engine(artifact, engine, device=device, dtype=dtype, provider=provider)
    if chosen == "torch" and cache_dtype is not None:
        msg = f"got cache_dtype {cache_dtype!r} for the torch engine · expected it for onnx only, which computes "
        todo = "leave it out" if artifact.manifest.onnx else f"make it with `python -m export onnx {artifact.path}`"
        raise LiteError(f"{msg}decoder.onnx · {todo}")
    if verify:
        artifact.verify(engine=chosen)
    manifest, config = artifact.manifest, artifact.decoder_config()
    tokenizer = Tokenizer(artifact.file(TOKENIZER_NAME), manifest.decoding)
    _check_parts_fit(artifact, tokenizer.vocab_size)
    prompt = PromptEncoder(
        tokenizer,
        manifest.prompt,
        num_image_tokens=manifest.vision.num_image_tokens,
        max_seq_len=config.max_position_embeddings,
    )
    if chosen == "onnx":
        vision, decoder = _load_onnx(artifact, provider, cache_dtype, limit)
    else:
        vision, decoder = _load_torch(artifact, device, dtype, limit)
    return FindingsModel(artifact, tokenizer=tokenizer, prompt=prompt, vision=vision, decoder=decoder)


def _load_torch(artifact: Artifact, device: str, dtype: str | None, limit: int | None) -> tuple[VisionEncoder, Engine]:
    # torch first: onnxruntime then finds the CUDA libraries that torch has brought.
    from lite.decoder import DTYPES, check_device, load_decoder
    from lite.vision import VisionEncoder

    if dtype is not None and dtype not in DTYPES:
        msg = f"got dtype {dtype!r} · expected {', '.join(DTYPES)} or None · choose one of them"
        raise LiteError(msg)
    target = check_device(device)
    if limit is not None:
        plan = plan_memory(artifact, device=target, dtype=dtype, libraries_bytes=rss_bytes() or 0)
        check_memory(plan, limit, what=str(artifact.path))
    return VisionEncoder(artifact, device=target), load_decoder(artifact, device=target, dtype=dtype)


def _load_onnx(
    artifact: Artifact, provider: str | None, cache_dtype: CacheDtype | None, limit: int | None
) -> tuple[VisionEncoder, Engine]:
    from lite.onnx_decoder import OnnxDecoder, check_cache_dtype, smaller_cache
    from lite.onnx_session import CPU, check_provider
    from lite.vision import VisionEncoder

    check_cache_dtype(artifact, cache_dtype)
    chosen = check_provider("cpu" if provider is None else provider)
    if limit is not None and chosen != CPU:
        msg = f"got a memory limit with provider {provider!r} · expected the CPU, of whose memory alone there is a plan"
        raise LiteError(f"{msg} · leave the limit out")
    if limit is not None:
        libraries = rss_bytes() or 0

        def plan(dtype: CacheDtype | None) -> MemoryPlan:
            return plan_memory(artifact, device="cpu", engine="onnx", cache_dtype=dtype, libraries_bytes=libraries)

        hint = ""
        if cache_dtype is None and plan(None).peak_bytes > limit:
            cache_dtype = smaller_cache(artifact)
            if cache_dtype is None and plan("int8").peak_bytes <= limit:
                hint = "; cache_dtype='int8' would fit, but lost too much at export to be taken without being asked for"
        check_memory(plan(cache_dtype), limit, what=str(artifact.path), hint=hint)
    vision = VisionEncoder(artifact, provider=chosen)
    return vision, OnnxDecoder(artifact, provider=chosen, cache_dtype=cache_dtype)


def _check_parts_fit(artifact: Artifact, tokenizer_vocab_size: int) -> None:
    """Refuse an artifact whose parts do not belong together, now rather than at some token."""
    manifest, config = artifact.manifest, artifact.decoder_config()
    vision = manifest.vision
    stored_as = config.quantization.format if config.quantization else "fp16"
    for got, fits, expected in (
        (f"a decoder of {manifest.decoder.format} by the manifest", manifest.decoder.format == stored_as,
         f"{stored_as}, as its config.json says"),
        (f"image features of width {vision.hidden_size}", vision.hidden_size == config.hidden_size,
         f"the decoder's hidden_size {config.hidden_size}"),
        (f"preprocessing to {manifest.preprocessing.image_size} pixels",
         manifest.preprocessing.image_size == vision.image_size, f"the tower's image_size {vision.image_size}"),
        (f"a tokenizer of {tokenizer_vocab_size} pieces", tokenizer_vocab_size <= config.vocab_size,
         f"at most the decoder's vocab_size {config.vocab_size}"),
        (f"{vision.num_image_tokens} image tokens", 0 < vision.num_image_tokens < config.max_position_embeddings,
         f"fewer than the decoder's max_position_embeddings {config.max_position_embeddings}"),
    ):  # fmt: skip
        if not fits:
            msg = f"{artifact.path}: got {got} · expected {expected} · the parts do not belong together: export again"
            raise ArtifactError(msg)
