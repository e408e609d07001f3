"""The films that the phantom model learns from: drawn once, kept in shards, as the model sees them.

Apart from training itself because the processes that draw need neither torch nor the network.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmarks.phantom.film import draw_film
from benchmarks.phantom.findings import DRAWN_LABELS, sample_study
from benchmarks.phantom.hospital import HOSPITALS, HospitalName
from lite.engines.cores import available_cores
from lite.errors import LiteError
from lite.files import whole_file
from lite.image.rendering import mimic_cxr_jpg

IMAGE_SIZE: Final = 112
PATCH_SIZE: Final = 14
GRID: Final = IMAGE_SIZE // PATCH_SIZE
_SHARD: Final = 250


@dataclass(frozen=True, slots=True)
class Films:
    """Training films as the model sees them, with what is on them.

    Attributes:
        seeds: study seeds, int64 [N].
        pixels: grey levels, uint8 [N, S, S].
        regions: where each drawn label shows, bool [N, labels, GRID, GRID].
    """

    seeds: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    regions: NDArray[np.bool_]


def _draw_shard(path: Path, seeds: NDArray[np.int64], hospital: HospitalName) -> None:
    cv2.setNumThreads(1)  # one process per core is enough
    pixels = np.empty((len(seeds), IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    regions = np.empty((len(seeds), len(DRAWN_LABELS), GRID, GRID), np.bool_)
    for row, seed in enumerate(seeds):
        film = draw_film(sample_study(int(seed)))
        grey = Image.fromarray(mimic_cxr_jpg(HOSPITALS[hospital].develop(film.stored), monochrome1=False))
        pixels[row] = np.asarray(grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
        fine = film.regions.shape[-1] // GRID
        regions[row] = film.regions.reshape(-1, GRID, fine, GRID, fine).any(axis=(2, 4))
    with whole_file(path) as partial, partial.open("wb") as stream:
        np.savez(stream, seeds=seeds, pixels=pixels, regions=regions)


def training_seeds(count: int, seed: int) -> NDArray[np.int64]:
    """Return the seeds of the first studies to train on; `write` makes none of them."""
    return np.random.default_rng([seed, 0, 0x7EAC4]).integers(2**62, size=count)


def draw_films(folder: Path, *, count: int, seed: int, hospital: HospitalName = "home") -> Films:
    """Draw `count` training films of a hospital, in parallel, in shards that are kept in `folder` and not drawn twice.

    Raises:
        LiteError: the folder holds films of another count or seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seeds = training_seeds(count, seed)
    shards = [(folder / f"films-{start:06d}.npz", seeds[start : start + _SHARD]) for start in range(0, count, _SHARD)]
    missing = [shard for shard in shards if not shard[0].exists()]
    if missing:
        with multiprocessing.get_context("spawn").Pool(min(available_cores(), len(missing))) as pool:
            tasks = [pool.apply_async(_draw_shard, (*shard, hospital)) for shard in missing]
            for task in tqdm(tasks, desc="drawing films", unit_scale=_SHARD, unit="film"):
                task.get()
    loaded = [np.load(path) for path, _ in shards]
    films = Films(*(np.concatenate([shard[name] for shard in loaded]) for name in ("seeds", "pixels", "regions")))
    if not np.array_equal(films.seeds, seeds):
        msg = f"{folder}: got films of another run · expected {count} of seed {seed} · use another --work folder"
        raise LiteError(msg)
    return films
