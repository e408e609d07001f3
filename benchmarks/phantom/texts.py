"""What the decoder reads and learns to write about training films, as batches of ids."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.phantom.dataset import Films
from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.hospital import HOSPITALS, HospitalName
from benchmarks.phantom.network import LLAMA_CONFIG
from benchmarks.phantom.report import write_reason
from lite.config import IMAGE_TOKEN_ID, DecodingDefaults, PromptTemplate
from lite.errors import LiteError
from lite.prompt import PromptEncoder, Tokenizer

_POOLED_BATCHES = 8

# Film numbers, and for each the ids behind its image: (rest of the prompt, findings with EOS).
_WrittenBatch: TypeAlias = tuple[NDArray[np.intp], list[tuple[list[int], list[int]]]]


class Texts:
    """Batches of prompts and findings.

    They are a function of (seed, stage, step): an interrupted run continues with the very same ones.

    Attributes:
        before: the ids in front of every image.
    """

    def __init__(
        self,
        films: Films,
        tokenizer: Path,
        *,
        seed: int,
        batch_size: int,
        num_image_tokens: int,
        hospital: HospitalName = "home",
    ) -> None:
        """Take the films that a hospital writes texts about, and the SentencePiece model that spells them.

        Raises:
            LiteError: there are too few films.
        """
        if len(films.seeds) < _POOLED_BATCHES * batch_size:
            msg = f"got {len(films.seeds)} films · expected at least {_POOLED_BATCHES * batch_size}: {_POOLED_BATCHES}"
            raise LiteError(f"{msg} batches of {batch_size}, sorted by length · draw more")
        self._films, self._seed, self._batch_size = films, seed, batch_size
        self._write = HOSPITALS[hospital].write
        self._tokenizer = Tokenizer(tokenizer, DecodingDefaults())
        self._prompts = PromptEncoder(
            self._tokenizer,
            PromptTemplate(),
            num_image_tokens=num_image_tokens,
            max_seq_len=LLAMA_CONFIG["max_position_embeddings"],
        )
        self.before = torch.tensor(self._split_prompt(None)[0])
        self._pool = -1
        self._batches: list[_WrittenBatch] = []

    def rows(self, stage: str, index: int, count: int) -> tuple[NDArray[np.intp], np.random.Generator]:
        """Give the `index`-th run of `count` films of a stage, shuffled anew every epoch, and its random generator."""
        num_films = len(self._films.seeds)
        epoch, place = divmod(index, num_films // count)
        order = np.random.default_rng([self._seed, len(stage), epoch]).permutation(num_films)
        rng = np.random.default_rng([self._seed, len(stage), epoch, place])
        return order[place * count : (place + 1) * count], rng

    def batch(self, step: int) -> tuple[NDArray[np.intp], Tensor, Tensor]:
        """Give one batch with texts. Texts of like length go together: padding costs as much as words.

        Returns:
            The films' rows, the ids behind their images, padded on the right, [B, T], and where those are findings or
            their EOS, [B, T].
        """
        pool, index = divmod(step, _POOLED_BATCHES)
        if pool != self._pool:
            rows, rng = self.rows("write", pool, _POOLED_BATCHES * self._batch_size)
            texts = [self._text(int(row), rng) for row in rows]
            by_length = sorted(range(len(rows)), key=lambda place: sum(map(len, texts[place])))
            batches = np.array(by_length).reshape(_POOLED_BATCHES, -1)[rng.permutation(_POOLED_BATCHES)]
            self._pool = pool
            self._batches = [(rows[batch], [texts[place] for place in batch]) for batch in batches]
        rows, texts = self._batches[index]
        return rows, *_padded(texts)

    def _split_prompt(self, reason: str | None) -> tuple[list[int], list[int]]:
        input_ids = self._prompts.encode(reason)
        image = input_ids.index(IMAGE_TOKEN_ID)
        return input_ids[:image], input_ids[image + 1 :]

    def _text(self, row: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Write what stands behind the image: the rest of the prompt, and the findings with EOS, as ids."""
        study = sample_study(int(self._films.seeds[row]))
        _, behind = self._split_prompt(write_reason(study, rng))
        return behind, [*self._tokenizer.encode(self._write(study, rng).text), LLAMA_CONFIG["eos_token_id"]]


def _padded(texts: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    after = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        after[row, :end] = torch.tensor([*prompt, *answer])
        mask[row, len(prompt) : end] = True
    return after, mask
