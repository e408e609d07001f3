"""The façade: an artifact loaded, and the way of a study through it. No maths here.

    image ──image──▶ pixel_values ──vision──▶ image_features ─┐
    reason ──prompt─▶ input_ids ───────────────────────────── generate ──▶ token ids ──prompt──▶ text

A `FindingsModel` holds read-only weights; everything a request changes (its cache, its text) belongs to the request.
So one model may be used from several threads at once: the requests share the cores and the weights and nothing else.

With a GPU, another thread reads the films of a batch that come next, and sees to their features, while this one decodes
(`lite.session.feed`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lite.errors import LiteError, MemoryBudgetError, PromptError
from lite.image.files import load_image
from lite.image.preprocess import preprocess
from lite.memory.plan import REASON_TOKENS, STUDIES_AHEAD, Planner
from lite.memory.process import Peaks, peak_rss_bytes
from lite.prompt import PromptEncoder, TextStream, Tokenizer
from lite.session.feed import Feed
from lite.session.generate import Generation, Request

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence

    from lite.artifact.open import Artifact
    from lite.image.files import ImageSource
    from lite.image.rendering import Rendering
    from lite.session.generate import Engine, Requests
    from lite.vision import VisionEncoder
from lite.studies.results import Findings, Memory, StudyError, Timings
from lite.studies.study import Study, as_study


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Drafting(Request):
    """A study on its way."""

    index: int = 0
    rendering: str = ""
    image_s: float = 0.0
    vision_s: float = 0.0
    image_peaks: Peaks | None = None
    vision_peaks: Peaks | None = None


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
        decoder: Engine, planner: Planner | None = None, fallbacks: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.artifact = artifact
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.vision = vision
        self.decoder = decoder
        self.planner = planner
        """Says how many studies at a time fit; None: as many as are asked for."""
        self.fallbacks = fallbacks
        """What is slower than it has to be since it was loaded, each with its reason; requests may find more."""

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
            image: whatever `lite.image.files.load_image` takes: a path (PNG, JPEG, DICOM …), bytes, an array, or a
                PIL image.
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
        return FindingsStream(self._pieces(self._prepare(Study(image, reason, query), rendering, limit)))

    def findings_batch(
        self,
        studies: Iterable[Study | tuple[Any, ...] | ImageSource],
        *,
        batch_size: int = 8,
        max_new_tokens: int | None = None,
        rendering: Rendering = "mimic-cxr-jpg",
    ) -> Iterator[Findings | StudyError]:
        """Draft the findings of many films, several at a time: one that has ended makes room for the next.

        Args:
            studies: `Study`s, tuples like them, or images alone. Read lazily, so it may be a generator over more films
                than fit in memory.
            batch_size: how many go through the decoder together. More is faster and takes more memory: the cache
                grows with it. Where that many do not fit (`load`'s memory_limit) it is as many as do, which
                `Findings.timings.batch_size` tells.
            max_new_tokens: as for `findings`.
            rendering: as for `findings`.

        Yields:
            One result per study, in order. A study that cannot be used or computed, whatever is wrong with it, yields
            a `StudyError` in its place; the others are not affected.

        Raises:
            LiteError: batch_size or max_new_tokens is no count, or `studies` is one study and not several.
        """
        if isinstance(studies, str | bytes | bytearray | memoryview | os.PathLike | np.ndarray | Image.Image | Study):
            msg = f"got one study (a {type(studies).__name__}) · expected several · wrap it in a list: [study]"
            raise LiteError(msg)
        _check_count("batch_size", batch_size, "1 runs the studies one by one")
        limit = self._max_new_tokens(max_new_tokens)
        if isinstance(studies, Sized):  # rows that nobody will have would be allocated all the same
            batch_size = max(1, min(batch_size, len(studies)))
        return self._drafts(iter(studies), self._rows_that_fit(batch_size, limit), limit, rendering)

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
        study = self._prepare(Study(image, reason, query), rendering, 1)
        self._check_answer(token_ids, study.num_prompt_tokens)
        return np.asarray(self.decoder.score(study.input_ids, token_ids, study.image_features()))

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

    def _prepare(self, study: Study, rendering: Rendering, max_new_tokens: int, *, index: int = 0) -> _Drafting:
        """Check everything about a study, the cheap things first."""
        input_ids = self.prompt.encode(study.reason, query=study.query)
        started = time.perf_counter()
        loaded = load_image(study.image, rendering=rendering)
        pixel_values = preprocess(loaded.image, self.artifact.manifest.preprocessing)
        drafting = _Drafting(
            index=index,
            input_ids=input_ids,
            num_prompt_tokens=self.prompt.num_tokens(input_ids),
            image_features=_nothing,
            max_new_tokens=max_new_tokens,
            rendering=loaded.rendering,
            image_s=time.perf_counter() - started,
            image_peaks=self._peaks(),
        )
        drafting.image_features = functools.partial(self._see, drafting, pixel_values)
        return drafting

    def _see(self, drafting: _Drafting, pixel_values: np.ndarray) -> Any:  # noqa: ANN401 - the engine's own
        """Run the tower on a study's film: image_features [P, hidden_size], where the decoder computes if possible."""
        started = time.perf_counter()
        out = None
        if self.vision.writes_to(self.decoder.device):
            out = self.decoder.image_buffer(self.prompt.num_image_tokens)
        features = self.vision(pixel_values[None], out)[0]
        drafting.vision_s = time.perf_counter() - started
        drafting.vision_peaks = self._peaks()
        return features

    def _see_ahead(self, drafting: _Drafting) -> None:
        """Have the features ready before their turn. They are handed over, and made again if the prompt has to be."""
        again = drafting.image_features
        try:
            seen = [again()]
        except MemoryBudgetError:
            return  # in its turn it is found again, and the batch makes room
        drafting.image_features = lambda: seen.pop() if seen else again()

    def _peaks(self) -> Peaks:
        return Peaks(rss_bytes=peak_rss_bytes(), vram_bytes=self.decoder.peak_vram_bytes())

    def _rows_that_fit(self, batch_size: int, max_new_tokens: int) -> int:
        """Return how many studies at a time the memory limit allows, at most so many."""
        if self.planner is None:
            return batch_size
        return self.planner.rows_that_fit(batch_size, max_new_tokens)

    def row_len(self, max_new_tokens: int) -> int:
        """Return the places of a row that most studies fit into: the prompt, a reason, the text."""
        num_prompt_tokens: int = self.prompt.num_tokens(self.prompt.encode(None)) + REASON_TOKENS
        return min(num_prompt_tokens + max_new_tokens, self.prompt.max_seq_len)

    def _generation(self, feed: Requests, *, batch_size: int, max_seq_len: int) -> Generation:
        return Generation(
            self.decoder,
            feed,
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            context=self.prompt.max_seq_len,
            eos_token_id=self.artifact.manifest.decoding.eos_token_id,
            peaks=self._peaks,
        )

    def _result(self, drafting: _Drafting) -> Findings:
        """Put the result of a study that has ended together.

        Raises:
            LiteError: it has ended with that.
        """
        drafting.image_features = _nothing  # which held the film, and the study itself
        if drafting.error is not None:
            raise drafting.error
        peaks = self._peaks()
        return Findings(
            text=self.tokenizer.decode(drafting.token_ids),
            finish_reason=drafting.finish_reason or "length",
            token_ids=tuple(drafting.token_ids),
            num_prompt_tokens=drafting.num_prompt_tokens,
            timings=Timings(
                image_s=drafting.image_s,
                vision_s=drafting.vision_s,
                prefill_s=drafting.prefill_s,
                decode_steps_s=tuple(drafting.decode_steps_s),
                batch_size=drafting.batch_size,
            ),
            memory=Memory(
                image=drafting.image_peaks or peaks,
                vision=drafting.vision_peaks or peaks,
                prefill=drafting.prefill_peaks or peaks,
                decode=peaks,
                cache_bytes=drafting.cache_bytes,
            ),
            rendering=drafting.rendering,
            artifact_id=self.artifact.id,
            engine=self.decoder.engine,
            device=str(self.decoder.device),
            dtype=str(self.decoder.dtype).removeprefix("torch."),
            cache_dtype=self.decoder.cache_dtype,
            provider=self.vision.provider,
            backend=self.decoder.backend,
            fallbacks=self.fallbacks + self.decoder.fallbacks,
            notice=self.notice,
        )

    def _pieces(self, drafting: _Drafting) -> Generator[str, None, Findings]:
        feed = Feed(iter([drafting]), lambda study: study)
        text = TextStream(self.tokenizer)
        for _, token_id in self._generation(feed, batch_size=1, max_seq_len=1):
            if token_id is not None and (piece := text.push(token_id)):
                yield piece
        if drafting.error is None and (rest := text.finish()):
            yield rest
        return self._result(drafting)

    def _drafts(
        self, studies: Iterator[Any], batch_size: int, max_new_tokens: int, rendering: Rendering
    ) -> Iterator[Findings | StudyError]:
        def prepare(numbered: tuple[int, Any]) -> _Drafting:
            index, item = numbered
            try:
                drafting = self._prepare(as_study(item), rendering, max_new_tokens, index=index)
                if ahead:  # in the other thread, while this one decodes
                    self._see_ahead(drafting)
            except LiteError as error:
                return _Drafting(
                    index=index, input_ids=(), num_prompt_tokens=0, image_features=_nothing,
                    max_new_tokens=max_new_tokens, error=error,
                )  # fmt: skip
            return drafting

        # On a CPU the two would only share the cores.
        ahead = STUDIES_AHEAD if self.decoder.run_ahead else 0
        done: dict[int, Findings | StudyError] = {}
        index = 0
        with Feed(enumerate(studies), prepare, ahead=ahead) as feed:
            generation = self._generation(feed, batch_size=batch_size, max_seq_len=self.row_len(max_new_tokens))
            for drafting, token_id in generation:
                if token_id is not None or not isinstance(drafting, _Drafting):
                    continue
                try:
                    done[drafting.index] = self._result(drafting)
                except LiteError as error:
                    done[drafting.index] = StudyError(index=drafting.index, error=error)
                # What has ended before those that were asked for earlier waits for them.
                while index in done:
                    yield done.pop(index)
                    index += 1


def _nothing() -> None:
    """Stand in the place of image features that are not wanted any more."""


def _check_count(name: str, value: object, hint: str) -> None:
    if type(value) is not int or value < 1:
        msg = f"got {name}={value!r} · expected a whole number from 1 · {hint}"
        raise LiteError(msg)
