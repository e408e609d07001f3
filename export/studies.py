"""Studies that an export looks at: to measure parity, and to calibrate.

An encoded study is a film, its prompt and a findings text, in the artifact's own tokenizer, template and preprocessing.
Lists are read by `lite.studies.sources.listed`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lite.config import IMAGE_TOKEN_ID
from lite.errors import ImageError, LiteError, PromptError
from lite.image.files import load_image
from lite.image.preprocess import preprocess
from lite.prompt import PromptEncoder, Tokenizer
from lite.studies.films import check_films
from lite.studies.sources.listed import read_studies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from export.settings import ParitySettings
    from lite.artifact.manifest import Manifest
    from lite.config import Preprocessing

    Array = np.ndarray[Any, np.dtype[np.float32]]

_LOG = logging.getLogger(__name__)
_BUILT_IN_TEXTS: Final = (
    (
        "Chest pain.",
        "The heart is normal in size. The mediastinal and hilar contours are unremarkable. The lungs are clear without "
        "focal consolidation. The pulmonary vasculature is normal. No pleural effusion or pneumothorax is seen. There "
        "is no acute osseous abnormality, and no free air is seen under the diaphragm.",
    ),
    (
        None,
        "There is a moderate left pleural effusion with adjacent atelectasis, and a small right pleural effusion. The "
        "right upper lung is clear. The left heart border is obscured, so that the size of the heart cannot be told. "
        "No pneumothorax. A right central venous catheter ends in the lower superior vena cava.",
    ),
    (
        "Shortness of breath, evaluate for pneumonia.",
        "There is a consolidation in the right lower zone, which is concerning for pneumonia. The left lung is clear. "
        "The heart is mildly enlarged, without signs of pulmonary edema. There is no large pleural effusion, and no "
        "pneumothorax. Multiple healed fractures of the left ribs are seen. The bones are otherwise intact.",
    ),
    (
        None,
        "Moderate cardiomegaly with mild pulmonary edema and small effusions on both sides. An endotracheal tube is in "
        "place, with its tip 4 cm above the carina, and an enteric tube ends in the stomach. A left pacemaker with two "
        "leads is in place. There is no pneumothorax. Lung volumes are low, with atelectasis at both bases.",
    ),
)
"""Reasons and findings that any model of this kind gives sensible probabilities to.

Each has 40 words or more, and no tokenizer takes less than a token for a word: the four are past
`verify.MIN_TOKENS_FOR_SAME_TOP` with any. The cost of a study is its film, not its text: so the four share one.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EncodedStudy:
    """One film with its prompt and the findings that follow. The film is read when it is asked for."""

    film: Path | Array  # a file, or grey levels [S, S, 3] made here
    preprocessing: Preprocessing
    input_ids: tuple[int, ...]  # with IMAGE_TOKEN_ID once
    target_ids: tuple[int, ...]
    findings: str = ""  # the text of which the targets are the first tokens

    @property
    def pixel_values(self) -> Array:
        """The film as the tower takes it, float32 [3, S, S]."""
        values: Array = preprocess(load_image(self.film).image, self.preprocessing)
        return values

    @property
    def film_sha256(self) -> str:
        """The hash of the film's bytes."""
        return hashlib.sha256(
            self.film.read_bytes() if isinstance(self.film, Path) else self.film.tobytes()
        ).hexdigest()

    def num_tokens(self, num_patches: int) -> int:
        """Return the tokens the decoder reads: prompt, image, and all targets but the last, which is only predicted."""
        return len(self.input_ids) - 1 + num_patches + len(self.target_ids) - 1

    @property
    def image_at(self) -> int:
        """The position of the first image token."""
        return self.input_ids.index(IMAGE_TOKEN_ID)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FilmStudies:
    """Studies that begin alike: one film, and the same words before it. What they share is computed once."""

    studies: tuple[EncodedStudy, ...]

    @property
    def pixel_values(self) -> Array:
        """The film as the tower takes it, float32 [3, S, S]."""
        return self.studies[0].pixel_values

    def num_shared(self, num_patches: int) -> int:
        """Return how many tokens they share: the film, and what comes before it."""
        return self.studies[0].image_at + num_patches


def by_film(studies: Sequence[EncodedStudy]) -> list[FilmStudies]:
    """Put those together that begin alike."""
    films: dict[tuple[str, tuple[int, ...]], list[EncodedStudy]] = {}
    for study in studies:
        films.setdefault((study.film_sha256, study.input_ids[: study.image_at]), []).append(study)
    return [FilmStudies(studies=tuple(together)) for together in films.values()]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NamedStudies:
    """Studies, and what the manifest calls them: the file name of their list, or "built-in"."""

    data: str
    studies: list[EncodedStudy]
    left_out: int = 0  # studies of the list that could not be used


def with_own_films(named: NamedStudies) -> NamedStudies:
    """Give each built-in study a film of its own, for who wants to see many films and not few."""
    studies = [
        study if isinstance(study.film, Path)
        else dataclasses.replace(study, film=_built_in_film(number, len(study.film)))
        for number, study in enumerate(named.studies)
    ]  # fmt: skip
    return dataclasses.replace(named, studies=studies)


class StudyReader:
    """Turn films and texts into studies of `max_tokens` findings tokens at most."""

    def __init__(self, tokenizer: Path, manifest: Manifest, *, max_seq_len: int, max_tokens: int) -> None:
        """Prepare the tokenizer."""
        self.tokenizer = Tokenizer(tokenizer, manifest.decoding)
        self.max_seq_len = max_seq_len
        self.max_tokens = max_tokens
        self.prompts = PromptEncoder(
            self.tokenizer,
            manifest.prompt,
            num_image_tokens=manifest.parts.vision.num_image_tokens,
            max_seq_len=max_seq_len,
        )
        self.preprocessing = manifest.preprocessing
        self.eos_token_id = manifest.decoding.eos_token_id

    def read(
        self, file: str | Path | None, image_folder: str | Path | None, count: int, *, option: str
    ) -> NamedStudies:
        """Return studies of a list, or made here where there is none; see `from_list` and `built_in`."""
        if file is None:
            return NamedStudies(data="built-in", studies=self.built_in(count))
        return self.from_list(Path(file), image_folder, count, option=option)

    def built_in(self, count: int) -> list[EncodedStudy]:
        """Return studies made here: smooth shaded fields with noise, and behind each of them all findings texts."""
        studies: list[EncodedStudy] = []
        for number in range(-(-count // len(_BUILT_IN_TEXTS))):
            film = _built_in_film(number, self.preprocessing.image_size)
            studies += [self._study(film, reason, findings) for reason, findings in _BUILT_IN_TEXTS]
        return studies[:count]

    def from_list(self, file: Path, image_folder: str | Path | None, count: int, *, option: str) -> NamedStudies:
        """Return studies of a list: all, or `count` spread evenly over it.

        Every film is read once, so that a missing one is found before hours of work and not after. A study that cannot
        be used (its film is damaged or lateral, it has no findings, its reason is too long) is left out with a warning.

        Args:
            file: The list.
            image_folder: What its images are relative to; its own folder when not given.
            count: How many, at most.
            option: The command line's name for that folder.

        Raises:
            LiteError: The list cannot be read, a film is not there, or none of the studies can be used.
        """
        entries = read_studies(file, image_folder=Path(image_folder) if image_folder else None)
        if entries.remark:
            _LOG.warning("%s: %s", file, entries.remark)
        count = min(count, len(entries))
        chosen = [entries[place * len(entries) // count] for place in range(count)]
        check_films(chosen, file, option=option, every=True)
        studies: list[EncodedStudy] = []
        problem: LiteError | None = None
        for entry in chosen:
            try:
                if not entry.reference.strip():
                    raise PromptError(f"{entry.id}: got no findings · expected some, to predict · add them to the list")
                load_image(entry.image)
                studies.append(self._study(entry.path, entry.reason, entry.reference))
            except (ImageError, PromptError) as error:
                problem = error
                _LOG.warning("%s: left out: %s", file, error)
        if not studies:
            msg = f"{file}: got {count} studies, none of which can be used ({problem}) · expected films with findings"
            raise LiteError(f"{msg} · correct the list") from problem
        return NamedStudies(
            data=file.name, studies=studies, left_out=entries.left_out.total() + len(chosen) - len(studies)
        )

    def _study(self, film: Path | Array, reason: str | None, findings: str) -> EncodedStudy:
        input_ids = self.prompts.encode(reason)
        room = self.max_seq_len - self.prompts.num_tokens(input_ids)
        target_ids = [*self.tokenizer.encode(findings), self.eos_token_id][: min(self.max_tokens, room)]
        return EncodedStudy(
            film=film,
            preprocessing=self.preprocessing,
            input_ids=tuple(input_ids),
            target_ids=tuple(target_ids),
            findings=findings,
        )


def _built_in_film(number: int, size: int) -> Array:
    rng = np.random.default_rng([0xF11, number])
    y, x = np.mgrid[0:size, 0:size] / size
    waves = sum(np.sin(2 * np.pi * (rng.uniform(0, 3) * x + rng.uniform(0, 3) * y + rng.uniform())) for _ in range(4))
    film = 128 + 25 * waves + rng.normal(0, 12, (size, size))
    return np.repeat(np.clip(film, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def read_judged(tokenizer: Path, manifest: Manifest, max_seq_len: int, settings: ParitySettings) -> NamedStudies:
    """Return the studies to measure parity on."""
    reader = StudyReader(tokenizer, manifest, max_seq_len=max_seq_len, max_tokens=settings.verify_tokens)
    return reader.read(settings.verify_data, settings.image_folder, settings.verify_studies, option="--image-folder")


def sha256_of_studies(studies: list[EncodedStudy]) -> str:
    """Hash what a calibration depends on: the films' bytes and the tokens."""
    digest = hashlib.sha256()
    for study in studies:
        digest.update(bytes.fromhex(study.film_sha256))
        digest.update(repr((study.input_ids, study.target_ids)).encode())
    return digest.hexdigest()
