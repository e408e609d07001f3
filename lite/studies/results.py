"""What comes of a study: its findings, how they were made, and the one JSON object that says so.

    {"id": "s1", "image": "film.png", "reason": "Cough.", "query": null, "reference": null,
     "prediction": "The lungs are clear.", "finish_reason": "eos", …, "notice": …}

A study that could not be used has "error" in place of all from "prediction" on. The reference evaluation's own lines,
{"id", "query", "reference", "prediction"}, are such objects, too.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any, Final, Literal

from lite.config import from_json, to_json
from lite.errors import ArtifactError, LiteError
from lite.image.film import FilmInfo
from lite.memory.process import Peaks
from lite.studies.study import Study

if TYPE_CHECKING:
    from pathlib import Path

FinishReason = Literal["eos", "length"]
SHORT_NOTICE: Final = "Research draft, not for clinical use."
"""What each JSON object says; `Findings.notice` has all of it."""
_DERIVED: Final = ("decode_s", "ttft_s", "total_s")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of a study went, in seconds.

    In a batch a token takes as long as one of all rows, and as the prompt of another study that began in between.
    """

    image_s: float  # reading and preprocessing the film
    queued_s: float = 0.0  # waiting for a row, beside others' studies
    vision_s: float  # tower and projector; 0 where a row still held the film
    prefill_s: float  # the prompt through the decoder, to the first token
    decode_steps_s: tuple[float, ...]  # each further token
    batch_size: int  # the most studies that were decoded together with it, itself included

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
    """The process's memory peaks until each stage of this study had ended, and the cache of its batch, in bytes.

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
class Sample:
    """A draft of the same film and question, drawn at random beside the findings: see `lite.session.prepare.Asked`."""

    text: str
    num_reused_tokens: int  # of the prompt, what a row still held: the film
    vision_s: float  # 0 where a row still held the film
    prefill_s: float
    decode_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """A part of a text, with the white space behind it, and how sure the model was of it: see `lite.eval.confidence`.

    Joined, the parts are the text.
    """

    text: str
    mean_probability: float | None  # of its tokens; None: it has no token of its own
    score: float | None = None  # the signal, from 0 to 1: uncalibrated
    probability: float | None = None  # that nothing in it is false; None: uncalibrated
    agreement: float | None = None  # the share of the samples that do not contradict it; None: there are none


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The drafted findings of one study, and how they were made."""

    text: str
    finish_reason: FinishReason  # "length": cut at max_new_tokens or at the end of the context
    token_ids: tuple[int, ...]  # generated, without EOS
    token_logprobs: tuple[float, ...] | None = None  # of each, on request
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None  # token ids beside each, the likeliest first
    samples: tuple[Sample, ...] | None = None  # on request
    sentences: tuple[Sentence, ...] | None = None  # how sure the model was of each, where that was asked for
    calibration: str | None = None  # the id of what their probabilities are from
    num_prompt_tokens: int  # places in the context, the image's included
    num_reused_tokens: int = 0  # of these, what a row still held: the film, for another question
    num_drafted_tokens: int = 0  # guesses that the decoder verified beside the tokens that it chose
    num_accepted_tokens: int = 0  # of these, what it would have chosen: each saved a step
    timings: Timings
    memory: Memory
    rendering: str  # how the film's values became grey levels: see lite.image.files
    film: FilmInfo | None = None  # what its file says of it, and what was noted; None: written by an older version
    artifact_id: str
    engine: str  # of the decoder: "torch" or "onnx"
    device: str  # of the decoder: "cpu", "cuda"
    dtype: str  # what the decoder computes in
    cache_dtype: str  # what keys and values are stored as
    prompt_weights: str | None = None  # what the prompt was read by: "int8" or "stored"; None: by an older version
    num_image_tokens: int | None = None  # of these places, the image's; None: written by an older version
    image_method: str | None = None  # how the film's patches became fewer tokens; None: they did not
    adapter: str | None = None  # what was beside the decoder; None: nothing
    provider: str  # ONNX Runtime's, for the vision tower, and for the decoder of the onnx engine
    backend: str  # what the decoder's operations ran on: "triton, CUDA graphs", "triton", "torch" or "onnxruntime"
    fallbacks: tuple[str, ...]  # what was slower than it has to be on such a machine, each with its reason
    notice: str

    @property
    def num_new_tokens(self) -> int:
        """The number of generated tokens, without EOS."""
        return len(self.token_ids)

    def to_dict(self) -> dict[str, Any]:
        """Return what `json.dumps` takes: all fields, and the sums of the timings; times to a microsecond."""
        value: dict[str, Any] = to_json(self)
        times = {name: getattr(self.timings, name) for name in _DERIVED} | value["timings"]
        times["decode_steps_s"] = [round(step, 6) for step in times["decode_steps_s"]]
        value["timings"] = {name: round(time, 6) if isinstance(time, float) else time for name, time in times.items()}
        for name in ("token_logprobs", "top_logprobs", "samples", "sentences", "calibration"):
            if value[name] is None:
                del value[name]
        return value | {"notice": SHORT_NOTICE}

    @classmethod
    def from_dict(cls, value: dict[str, Any], *, where: str = "findings") -> Findings:
        """Read what `to_dict` has returned.

        Raises:
            LiteError: it is something else; the key is named.
        """
        times = value.get("timings")
        if isinstance(times, dict):
            value = value | {"timings": {name: time for name, time in times.items() if name not in _DERIVED}}
        try:
            return from_json(cls, value, where=where)
        except ArtifactError as error:  # which speaks of files that an export has written
            got_and_expected, _, _ = str(error).rpartition(" · ")
            raise LiteError(f"{got_and_expected} · draft the study again") from error


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudyError:
    """Stands in the place of a study's findings when it cannot be used or computed."""

    index: int  # of the study, from 0
    error: LiteError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A study and what came of it: a line of a file of results."""

    study: Study
    prediction: str | None  # the drafted text; None: there is an error
    findings: Findings | None = None  # how it was drafted, where that is known
    error: str | None = None
    request: dict[str, Any] | None = None  # what was asked for beside the study, if the file is to be gone on with

    @classmethod
    def of(cls, study: Study, result: Findings | LiteError, *, request: dict[str, Any] | None = None) -> Result:
        """Put a study and its result together."""
        if isinstance(result, LiteError):
            return cls(study=study, prediction=None, error=str(result), request=request)
        return cls(study=study, prediction=result.text, findings=result, request=request)

    def to_json(self) -> str:
        """Return the object as a line, without its end. Letters stay letters."""
        study = self.study
        value: dict[str, Any] = {
            "id": study.id,
            "image": str(study.path) if isinstance(study.image, str | os.PathLike) else None,
            "reason": study.reason,
            "query": study.query or study.question or None,
            "reference": study.reference or None,
        }
        if study.row:
            value |= {"row": dict(study.row)}
        if self.error is not None:
            value |= {"error": self.error, "notice": SHORT_NOTICE}
        else:
            value |= {"prediction": self.prediction}
            if self.findings is not None:
                value |= {name: item for name, item in self.findings.to_dict().items() if name != "text"}
        if self.request is not None:
            value |= {"request": self.request}
        # Half a surrogate pair, from a file's name, is no reason to write nothing.
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")

    @classmethod
    def from_json(cls, line: str, *, where: str) -> Result:
        """Read a line; what is not known of the study may be missing or null, and other keys are passed over.

        Raises:
            LiteError: it is no such object; what is wrong is named.
        """
        value = _object(line, where)
        name = value.get("id") if value.get("id") is not None else value.get("image")
        texts = {key: value.get(key) for key in ("image", "reason", "query", "reference", "prediction", "error")}
        wrong = [key for key, text in texts.items() if not isinstance(text, str | None)]
        if wrong or not isinstance(name, str | int):
            msg = f"{where}: got {', '.join(wrong) or 'an id'} that is not text · expected text · write the line again"
            raise LiteError(msg)
        if texts["prediction"] is None and texts["error"] is None:
            msg = f"{where}: got no prediction · expected id, prediction and reference · write the line again"
            raise LiteError(msg)
        study = Study(
            texts["image"] or "",
            texts["reason"],
            id=str(name),
            question=texts["query"] or "",
            reference=texts["reference"] or "",
            row=value["row"] if isinstance(value.get("row"), dict) else {},
        )
        findings = None
        if texts["error"] is None and "token_ids" in value:
            fields = {field.name for field in dataclasses.fields(Findings)}
            drafted = {key: item for key, item in value.items() if key in fields} | {"text": texts["prediction"]}
            findings = Findings.from_dict(drafted, where=where)
        return cls(
            study=study,
            prediction=texts["prediction"] if texts["error"] is None else None,
            findings=findings,
            error=texts["error"],
            request=value.get("request"),
        )


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        msg = f"{where}: got a line that is not JSON ({error}) · expected one JSON object per line · write it again"
        raise LiteError(msg) from error
    if not isinstance(value, dict):
        msg = f"{where}: got {type(value).__name__} · expected an object with id and prediction · write it again"
        raise LiteError(msg)
    return value


def read_results(path: Path) -> list[Result]:
    """Read a file of results, one object per line.

    Raises:
        LiteError: no such file, no line in it, or a line that is malformed or repeats an id (its number is named).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: got a file that cannot be read ({error}) · expected a result on each line · check the path"
        raise LiteError(msg) from error
    results: dict[str, Result] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        result = Result.from_json(line, where=f"{path}:{number}")
        name = result.study.id
        if name in results:
            msg = (
                f"{path}:{number}: got id {name!r} again, as on line {lines[name]} · expected "
                "each study once · remove one of them"
            )
            raise LiteError(msg)
        results[name], lines[name] = result, number
    if not results:
        msg = f"{path}: got an empty file · expected a line per study · see: python -m lite run --help"
        raise LiteError(msg)
    return list(results.values())
