"""A study made ready for the session, and its findings put together afterwards."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any, Final, TypedDict

import numpy as np

from lite.engines.protocol import GREEDY, MAX_TOP, NO_ADAPTER, Sampling
from lite.engines.segments import expand_image
from lite.errors import LiteError, PromptError
from lite.image.files import load_image
from lite.image.preprocess import preprocess
from lite.memory.process import Peaks, peak_rss_bytes
from lite.session.request import Lot, Request
from lite.studies.results import Findings, Memory, Sample, Timings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from lite.artifact.open import Artifact
    from lite.engines.protocol import Engine
    from lite.image.film import FilmInfo, Rendering
    from lite.prompt import PromptEncoder, Tokenizer
    from lite.session.request import Outcome
    from lite.studies.study import Study
    from lite.vision import VisionEncoder

MAX_SAMPLES: Final = 16
SAMPLE_TEMPERATURE: Final = 1.0
"""What samples are drawn at: the model's own distribution. Sample i has the seed i, from 1."""
_FILMS_AT_A_TIME: Final = 2
"""Films that are read at a time, whatever the number of threads: a large one takes some hundred MB meanwhile."""


class Options(TypedDict, total=False):
    """`Asked` as keyword arguments: what `submit`, `stream` and `findings` of a model take by name."""

    max_new_tokens: int | None
    rendering: Rendering
    any_film: bool
    sampling: Sampling
    top_logprobs: int | None
    samples: int
    timeout_s: float | None
    request_id: str | None
    reuse: bool
    adapter: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How a study is to be drafted."""

    max_new_tokens: int | None = None  # None takes the artifact's
    rendering: Rendering = "mimic-cxr-jpg"  # how DICOM and 16-bit values become grey levels
    any_film: bool = False  # draft also what the rules take for another film than a frontal one of the chest
    sampling: Sampling = GREEDY  # how tokens are chosen
    top_logprobs: int | None = None  # tell each token's log-probability, and the most probable ones beside it
    samples: int = (
        0  # so many more drafts of the film, drawn at random: they read nothing of the prompt but its question
    )
    timeout_s: float | None = None  # end it with DeadlineExceeded when so much time has passed
    request_id: str | None = None  # what it is called; None numbers it
    reuse: bool = True  # take up what a row still holds of the same film; a measurement wants all of it computed
    adapter: str | None = None  # one of those that were loaded; None: the decoder as it is, or the artifact's default

    def check(self) -> None:
        """Refuse numbers out of their range.

        Raises:
            LiteError: one is.
        """
        check_count("max_new_tokens", self.max_new_tokens, "leave it out for the default")
        how = self.sampling
        for name, value, fits, expected in (
            ("temperature", how.temperature, 0 <= how.temperature < np.inf, "0 (the most probable token) or more"),
            ("top_p", how.top_p, 0 < how.top_p <= 1, "more than 0, at most 1"),
            ("seed", how.seed, type(how.seed) is int and -(2**63) <= how.seed < 2**63, "a whole number of 64 bits"),
            ("top_logprobs", self.top_logprobs, self.top_logprobs in (None, *range(MAX_TOP + 1)), f"0 to {MAX_TOP}"),
            ("samples", self.samples, self.samples in range(MAX_SAMPLES + 1), f"0 to {MAX_SAMPLES}"),
            ("timeout_s", self.timeout_s, self.timeout_s is None or self.timeout_s > 0, "more than 0, or None"),
        ):
            if not fits:
                raise LiteError(f"got {name}={value!r} · expected {expected} · leave it out for the default")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A study whose film has been read, and what its findings will say of that."""

    request: Request[Any]
    rendering: str
    film: FilmInfo
    image_s: float
    image_peaks: Peaks
    adapter: str | None
    tells_logprobs: bool
    samples: tuple[Request[Any], ...]  # of the same prompt: they take up the film where its row holds it

    def drawn(self, how: Sampling) -> Prepared:
        """Return the same study, to be drawn in another way; as many of the most probable tokens are told."""
        sampling = dataclasses.replace(how, num_top=self.request.sampling.num_top)
        return dataclasses.replace(self, request=dataclasses.replace(self.request, sampling=sampling))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preparer:
    """What stands between a study and the session: prompt, film and tower, and the words of the result."""

    artifact: Artifact
    tokenizer: Tokenizer
    prompt: PromptEncoder
    vision: VisionEncoder
    decoder: Engine[Any, Any]
    fallbacks: tuple[str, ...]
    _ids: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))
    _films: threading.Semaphore = dataclasses.field(
        default_factory=lambda: threading.BoundedSemaphore(_FILMS_AT_A_TIME)
    )

    def peaks(self) -> Peaks:
        """Return the memory peaks of the process so far."""
        return Peaks(rss_bytes=peak_rss_bytes(), vram_bytes=self.decoder.peak_vram_bytes())

    def request(
        self, study: Study, asked: Asked, *, target_ids: Sequence[int] = (), lot: Lot | None = None
    ) -> Prepared:
        """Check everything about a study, the cheap things first, and read its film.

        Raises:
            PromptError: the reason or the query cannot be used; ContextLengthError if it is too long.
            ImageError: the film cannot be read, or is not a frontal one.
        """
        asked.check()
        adapter = asked.adapter or self.artifact.manifest.parts.default_adapter
        slot = self._slot(adapter)
        deadline = None if asked.timeout_s is None else time.monotonic() + asked.timeout_s
        input_ids = expand_image(self.prompt.encode(study.reason, query=study.query), self.prompt.num_image_tokens)
        if target_ids:
            self._check_answer(target_ids, len(input_ids))
        started = time.perf_counter()
        with self._films:
            loaded = load_image(study.image, rendering=asked.rendering, any_film=asked.any_film)
            pixel_values = preprocess(loaded.image, self.artifact.manifest.preprocessing)
        sampling = asked.sampling
        if asked.top_logprobs is not None:
            sampling = dataclasses.replace(sampling, num_top=asked.top_logprobs)
        own = object() if asked.samples else None  # what the samples share, and no other request does
        request: Request[Any] = Request(
            id=asked.request_id or study.id or str(next(self._ids)),
            input_ids=input_ids,
            film=(hashlib.sha256(pixel_values.tobytes()).digest(), slot) if asked.reuse else own,
            see=functools.partial(self._see, pixel_values, slot),
            max_new_tokens=asked.max_new_tokens or self.artifact.manifest.decoding.max_new_tokens,
            sampling=sampling,
            adapter=slot,
            target_ids=tuple(target_ids),
            deadline=deadline,
            lot=lot,
        )
        return Prepared(
            request=request,
            rendering=loaded.rendering,
            film=loaded.film,
            image_s=time.perf_counter() - started,
            image_peaks=self.peaks(),
            adapter=adapter,
            tells_logprobs=asked.top_logprobs is not None,
            samples=tuple(
                dataclasses.replace(request, id=f"{request.id}/{seed}", sampling=_sampled(seed))
                for seed in range(1, asked.samples + 1)
            ),
        )

    def _slot(self, adapter: str | None) -> int:
        """Return the place of an adapter among those that were loaded."""
        loaded = list(self.decoder.adapters)
        if adapter is None:
            return NO_ADAPTER
        if adapter not in loaded:
            known = f"one of {', '.join(loaded)}, which are loaded" if loaded else "none, as none is loaded"
            raise LiteError(f"got the adapter {adapter!r} · expected {known} · load it, too: adapters=[{adapter!r}]")
        return loaded.index(adapter)

    def _check_answer(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        vocab_size = self.decoder.config.vocab_size
        if not all(0 <= token_id < vocab_size for token_id in token_ids):
            msg = f"got token_ids {list(token_ids)[:8]} · expected ids from 0 to {vocab_size - 1}, at least one · check"
            raise PromptError(f"{msg} that they come from the same tokenizer")
        self.prompt.check_length(num_prompt_tokens + len(token_ids) - 1, what="prompt and answer", shorten="answer")

    def _see(self, pixel_values: NDArray[np.float32], slot: int) -> Any:  # noqa: ANN401 - the engine's own
        """Run the tower on a film: image_features [P, hidden_size], where the decoder computes if possible."""
        out = None
        if self.vision.writes_to(self.decoder.device):
            out = self.decoder.image_buffer(self.prompt.num_image_tokens)
        features = self.vision(pixel_values[None], out, adapter=slot)[0]
        # An int8 cache of ONNX Runtime's would make numbers of them. torch keeps what is none, up to the logits.
        if isinstance(features, np.ndarray) and not np.isfinite(features).all():
            msg = "got image features that are not finite · expected numbers · the tower overflowed: export it in fp32"
            raise LiteError(msg)
        return features

    @property
    def settings(self) -> dict[str, Any]:
        """What all findings share: fields of `Findings`."""
        decoder = self.decoder
        return {
            "artifact_id": self.artifact.id,
            "engine": decoder.engine,
            "device": str(decoder.device),
            "dtype": str(decoder.dtype).removeprefix("torch."),
            "cache_dtype": decoder.cache_dtype,
            "prompt_weights": decoder.prompt_weights,
            "provider": self.vision.provider,
            "num_image_tokens": self.prompt.num_image_tokens,
            "image_method": self.artifact.manifest.parts.vision.reduction,
        }

    def findings(self, prepared: Prepared, outcome: Outcome, samples: Sequence[Outcome]) -> Findings:
        """Put the findings of a study that has ended together, with those that were drawn beside it."""
        decoder, peaks = self.decoder, outcome.decode_peaks or self.peaks()
        return Findings(
            text=self.tokenizer.decode(outcome.token_ids),
            finish_reason=outcome.finish_reason or "length",
            token_ids=tuple(outcome.token_ids),
            token_logprobs=tuple(outcome.logprobs) if prepared.tells_logprobs else None,
            top_logprobs=tuple(outcome.top) if outcome.top else None,
            samples=tuple(self._sample(drawn) for drawn in samples) or None,
            num_prompt_tokens=len(prepared.request.input_ids),
            num_reused_tokens=outcome.num_reused_tokens,
            num_drafted_tokens=outcome.num_drafted_tokens,
            num_accepted_tokens=outcome.num_accepted_tokens,
            timings=Timings(
                image_s=prepared.image_s,
                queued_s=outcome.queued_s,
                vision_s=outcome.vision_s,
                prefill_s=outcome.prefill_s,
                decode_steps_s=tuple(outcome.decode_steps_s),
                batch_size=outcome.num_together,
            ),
            memory=Memory(
                image=prepared.image_peaks,
                vision=outcome.vision_peaks or prepared.image_peaks,
                prefill=outcome.prefill_peaks or peaks,
                decode=peaks,
                cache_bytes=outcome.cache_bytes,
            ),
            rendering=prepared.rendering,
            film=prepared.film,
            adapter=prepared.adapter,
            **self.settings,
            backend=decoder.backend,
            fallbacks=self.fallbacks + decoder.fallbacks,
            notice=self.artifact.manifest.notice,
        )

    def _sample(self, drawn: Outcome) -> Sample:
        return Sample(
            text=self.tokenizer.decode(drawn.token_ids),
            num_reused_tokens=drawn.num_reused_tokens,
            vision_s=drawn.vision_s,
            prefill_s=drawn.prefill_s,
            decode_s=sum(drawn.decode_steps_s),
        )


def _sampled(seed: int) -> Sampling:
    return Sampling(temperature=SAMPLE_TEMPERATURE, seed=seed)


def check_count(name: str, value: object, hint: str) -> None:
    """Refuse what is not a count; None stands for the default, and fits.

    Raises:
        LiteError: it is not a whole number from 1.
    """
    if value is not None and (type(value) is not int or value < 1):
        raise LiteError(f"got {name}={value!r} · expected a whole number from 1 · {hint}")
