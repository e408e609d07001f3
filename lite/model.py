"""The façade: an artifact loaded, and the way of a study through it. No maths here.

    image ──image──▶ pixel_values ──vision──▶ image_features ─┐
    reason ──prompt─▶ input_ids ──────────────────────────── session ──▶ token ids ──prompt──▶ text

A `FindingsModel` owns one `Session`: however many threads ask, there is one cache of as many rows as were planned, and
one thread that decodes. `submit` is the way in; all else here is a few lines around it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lite.engines.options import check_names
from lite.errors import LiteError, PromptError
from lite.memory.plan import STUDIES_AHEAD
from lite.session.draft import Draft, in_order, submit_drafts
from lite.session.loop import Loop
from lite.session.prepare import Asked, Options, Preparer, check_count
from lite.session.request import Lot
from lite.session.session import Session
from lite.studies.study import Study, as_study

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Unpack

    from lite.artifact.open import Artifact
    from lite.engines.plan import RunPlan
    from lite.engines.protocol import Engine, Sampling
    from lite.image.files import ImageSource
    from lite.image.film import Rendering
    from lite.prompt import PromptEncoder, Tokenizer
    from lite.session.drafting import Drafting
    from lite.studies.results import Findings, StudyError
    from lite.vision import VisionEncoder


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FindingsModel:
    """An artifact ready to draft findings. Made by `load`. Safe to use from several threads at once.

    It is a context manager: leaving the block closes it.
    """

    artifact: Artifact
    tokenizer: Tokenizer
    prompt: PromptEncoder
    vision: VisionEncoder
    decoder: Engine[Any, Any]
    plan: RunPlan  # what was loaded by: it says how many rows of how many places there are
    drafting: Drafting | None = None  # guesses how texts go on; None: each token is decoded by itself
    fallbacks: tuple[str, ...] = ()  # what is slower than it has to be, each with its reason
    session: Session[Any, Any] = dataclasses.field(init=False)
    _preparer: Preparer = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Open a session."""
        preparer = Preparer(
            artifact=self.artifact,
            tokenizer=self.tokenizer,
            prompt=self.prompt,
            vision=self.vision,
            decoder=self.decoder,
            fallbacks=self.fallbacks,
        )
        loop = Loop(
            self.decoder,
            num_rows=self.plan.rows,
            max_seq_len=self.plan.max_seq_len,
            context=self.prompt.max_seq_len,
            eos_token_id=self.artifact.manifest.decoding.eos_token_id,
            fits=self.plan.fits,
            peaks=preparer.peaks,
            drafting=self.drafting,
        )
        object.__setattr__(self, "_preparer", preparer)
        object.__setattr__(self, "session", Session(loop, num_ahead=self._num_ahead))

    @property
    def _num_ahead(self) -> int:
        """How many films may be seen before there is a row for them."""
        return STUDIES_AHEAD if self.decoder.run_ahead else 1

    def window(self, batch_size: int) -> int:
        """How many studies are worth submitting at a time: those that decode, and those that are read meanwhile."""
        return batch_size + (self._num_ahead if batch_size > 1 or self.decoder.run_ahead else 0)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What all findings of this model share: fields of `lite.studies.results.Findings`."""
        return self._preparer.settings

    @property
    def notice(self) -> str:
        """What every reader of the text must know."""
        return self.artifact.manifest.notice

    def close(self) -> None:
        """Cancel what is under way, end the threads, and give the cache's memory back."""
        self.session.close()

    def __enter__(self) -> FindingsModel:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def submit(
        self, image: ImageSource, reason: str | None = None, *, query: str | None = None, **options: Unpack[Options]
    ) -> Draft:
        """Ask for the findings of one film, and go on: the draft has them when they are done.

        Args:
            image: whatever `lite.image.files.load_image` takes: a path (PNG, JPEG, DICOM …), bytes, an array, or a
                PIL image. It is read before this returns.
            reason: the reason for the exam, in a sentence or two; None or blank if unknown.
            query: ask this instead of the question that the model was trained with; excludes a reason.
            options: the fields of `lite.session.prepare.Asked`.

        Raises:
            ImageError: the image cannot be read or is not a frontal film.
            BackendUnavailable: it is a DICOM file and pydicom is not installed.
            PromptError: the reason cannot be used; ContextLengthError if it is too long. Found before any work.
            QueueFull: too many requests wait already.
            LiteError: a number is out of its range, or the model is closed.
            TypeError: there is no such option.
        """
        check_names(options, Options.__annotations__)
        return self._submit(Study(image, reason, query), Asked(**options))

    stream = submit
    """The same, for whoever iterates over the draft: it gives the text a piece at a time."""

    def submit_each(
        self,
        image: ImageSource,
        reason: str | None = None,
        *,
        query: str | None = None,
        samplings: Sequence[Sampling],
        **options: Unpack[Options],
    ) -> list[Draft]:
        """Ask for several findings of one film, each drawn in its own way: `submit`, but the film is read once."""
        check_names(options, Options.__annotations__)
        prepared = self._preparer.request(Study(image, reason, query), Asked(**options))
        return submit_drafts(self.session, self._preparer, [prepared.drawn(how) for how in samplings])

    def findings(
        self, image: ImageSource, reason: str | None = None, *, query: str | None = None, **options: Unpack[Options]
    ) -> Findings:
        """Draft the findings of one film, and wait for them: `submit`, with its arguments and its errors.

        Raises:
            LiteError: also if the decoder's numbers overflow, or the time is over.
        """
        draft = self.submit(image, reason, query=query, **options)
        try:
            return draft.result()
        finally:
            draft.cancel()  # where an interrupt came

    def findings_batch(
        self,
        studies: Iterable[Study | tuple[Any, ...] | ImageSource],
        *,
        batch_size: int = 8,
        **options: Unpack[Options],
    ) -> Iterator[Findings | StudyError]:
        """Draft the findings of many films, several at a time: one that has ended makes room for the next.

        Args:
            studies: `Study`s, tuples like them, or images alone. Read lazily, so it may be a generator over more films
                than fit in memory. What has ended is handed out before the next study is asked for; where studies come
                slowly, `submit` each.
            batch_size: how many go through the decoder together, if there are as many rows (see `load`).
            options: as for `submit`.

        Yields:
            One result per study, in order; a `StudyError` for one that cannot be used or computed.

        Raises:
            LiteError: batch_size or max_new_tokens is not a count, or `studies` is one study and not several.
        """
        file_or_dataset = hasattr(studies, "read") or hasattr(studies, "PixelData")
        if file_or_dataset or isinstance(
            studies, str | bytes | bytearray | memoryview | os.PathLike | np.ndarray | Image.Image | Study
        ):
            msg = f"got one study (a {type(studies).__name__}) · expected several · wrap it in a list: [study]"
            raise LiteError(msg)
        check_count("batch_size", batch_size, "1 runs the studies one by one")
        check_names(options, Options.__annotations__)
        asked = Asked(**options)
        asked.check()
        if isinstance(studies, Sized):
            batch_size = max(1, min(batch_size, len(studies)))
        lot = Lot(batch_size)
        window = self.window(batch_size)
        return in_order(studies, lambda item: self._submit(as_study(item), asked, lot=lot), window=window)

    def score(
        self,
        image: ImageSource,
        token_ids: Sequence[int],
        reason: str | None = None,
        *,
        query: str | None = None,
        rendering: Rendering = "mimic-cxr-jpg",
        adapter: str | None = None,
    ) -> np.ndarray:
        """Return the logits with which the model predicts each of the given tokens, one after the other.

        This is teacher forcing: what a comparison of two artifacts on the same text needs.

        Args:
            image: this, and what is not described here, as for `submit`.
            token_ids: an answer, such as `Findings.token_ids` of a reference, with EOS if its end counts too.

        Returns:
            logits, float32 [len(token_ids), vocab_size].

        Raises:
            PromptError: there are no tokens, or one is not in the vocabulary.
            ContextLengthError: prompt and answer together are longer than the context.
        """
        if not token_ids:
            raise PromptError("got no token_ids · expected at least one · give the answer that is to be scored")
        asked = Asked(rendering=rendering, adapter=adapter)
        prepared = self._preparer.request(Study(image, reason, query), asked, target_ids=token_ids)
        outcome = self.session.submit(prepared.request)
        try:
            outcome.wait()
        finally:
            self.session.cancel(outcome)
        if outcome.error is not None:
            raise outcome.error
        return np.concatenate(outcome.logits)

    def _submit(self, study: Study, asked: Asked, *, lot: Lot | None = None) -> Draft:
        return submit_drafts(self.session, self._preparer, [self._preparer.request(study, asked, lot=lot)])[0]
