"""Fewer image tokens: the tower's patches become `count` vectors before the projector.

The tower makes a vector of each patch, 1,369 of a film, and the decoder reads as many tokens: four fifths of a prompt.
Each method here returns means of patches, in the order in which a film is read:

    mean       of the cells of a coarser grid (37 × 37 patches to 19 × 19, 10 × 10, … 1)
    attention  those that the tower's class token looks at most; the rest are merged into a few means (after VisionZip,
               arXiv 2412.04467)
    diverse    those that are least alike, one after the other (after DivPrune, arXiv 2503.02175)
    random     any: what the others have to beat

They take and return numpy arrays: on a GPU the patches of a film, 4 MB, pass through the host.

The decoder was trained with as many positions as patches. So fewer tokens are spread evenly over the positions of all
patches, and the text keeps its own (`rotary_positions`). Side by side they lose more: on phantoms 16 of 64 diverse
patches cost 0.018 nats a token spread, and 0.029 side by side (`benchmarks/LOG.md`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, get_args

import numpy as np

from lite.artifact.parts import ImageMethod, VisionPart
from lite.errors import LiteError

if TYPE_CHECKING:
    from numpy.typing import NDArray

METHODS: Final = get_args(ImageMethod)
SHARE_MERGED: Final = 10 / 64
"""Of the tokens of "attention", those that are means of what is left: VisionZip's own share."""
_SEED: Final = 0


def check_image_tokens(part: VisionPart, count: int | None, method: ImageMethod) -> VisionPart:
    """Return the vision part as it gives that many tokens; None: as many as it has patches.

    Raises:
        LiteError: there is no such method, there are fewer patches, or the means of a grid cannot be as many.
    """
    patches = part.num_patches
    if method not in METHODS:
        raise LiteError(f"got image_method {method!r} · expected {', '.join(METHODS)} · choose one of them")
    if count is None:
        count = patches
    if type(count) is not int or not 1 <= count <= patches:
        msg = f"got image_tokens {count!r} · expected 1 to {patches}, the patches of a film · choose fewer"
        raise LiteError(msg)
    if method == "mean" and round(count**0.5) ** 2 != count:
        near = [side**2 for side in range(1, int(patches**0.5) + 1)]
        msg = f"got image_tokens {count} by means of a grid · expected a square: {', '.join(map(str, near))}"
        raise LiteError(f"{msg} · choose one of them, or another image_method")
    return dataclasses.replace(part, num_image_tokens=count, image_method=method)


def reduce_patches(
    patches: NDArray[np.float32], attention: NDArray[np.float32], count: int, method: ImageMethod
) -> NDArray[np.float32]:
    """Reduce the patches of one film.

    Args:
        patches: [P, D], of a square grid, row by row.
        attention: [P], how much the class token looks at each.
        count: how many vectors to return, at most P.
        method: how.

    Returns:
        [count, D].
    """
    if count == len(patches):
        return patches
    if method == "mean":
        weights = mean_weights(len(patches), count)
    elif method == "attention":
        weights = attention_weights(patches, attention, count)
    elif method == "diverse":
        weights = diverse_weights(patches, count)
    else:
        weights = random_weights(len(patches), count)
    return weights @ patches


def mean_weights(num_patches: int, count: int) -> NDArray[np.float32]:
    """Return the weights [count, P] of the cells of a coarser grid; a patch between two cells belongs to both."""
    fine, coarse = round(num_patches**0.5), round(count**0.5)
    edges = np.arange(coarse + 1) * fine / coarse
    along = np.zeros((coarse, fine), np.float32)
    for cell in range(coarse):
        first, last = int(np.floor(edges[cell])), int(np.ceil(edges[cell + 1]))
        along[cell, first:last] = 1 / (last - first)
    weights: NDArray[np.float32] = np.einsum("ai,bj->abij", along, along).reshape(count, num_patches)
    return weights


def random_weights(num_patches: int, count: int) -> NDArray[np.float32]:
    """Return the weights [count, P] that choose patches at random, the same of every film."""
    return _chosen(np.random.default_rng(_SEED).permutation(num_patches)[:count], num_patches)


def attention_weights(patches: NDArray[np.float32], attention: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Return the weights [count, P] that keep what is looked at most, and merge the rest.

    The merged ones are every so manieth of the rest, each the mean of itself and of what is most like it.
    """
    num_merged = round(SHARE_MERGED * count)
    order = np.argsort(-attention, kind="stable")
    kept, rest = order[: count - num_merged], np.sort(order[count - num_merged :])
    weights = _chosen(kept, len(patches))
    if not num_merged:
        return weights
    centres = np.linspace(0, len(rest) - 1, num_merged).astype(int)
    unit = _unit(patches[rest])
    nearest = (unit @ unit[centres].T).argmax(1)
    nearest[centres] = np.arange(num_merged)
    merged = np.zeros((num_merged, len(patches)), np.float32)
    merged[nearest, rest] = 1
    merged /= merged.sum(1, keepdims=True)
    together = np.concatenate([weights, merged])
    place = np.concatenate([np.sort(kept), rest[centres]])
    return together[np.argsort(place, kind="stable")]


def diverse_weights(patches: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Return the weights [count, P] that choose patches one by one, each the least like all before it."""
    unit = _unit(patches)
    likeness = unit @ unit.T
    nearest = likeness.mean(0)  # the first is the least like the film as a whole
    chosen: list[int] = []
    for _ in range(count):
        index = int(nearest.argmin())
        nearest = np.maximum(nearest, likeness[index]) if chosen else likeness[index].copy()
        chosen.append(index)
        nearest[chosen] = np.inf
    return _chosen(np.array(chosen), len(patches))


def rotary_positions(part: VisionPart, image_start: int, num_places: int) -> NDArray[np.float64] | None:
    """Return the position that each place of a row stands for, [num_places]; None: each its own.

    Args:
        part: how many tokens there are of how many patches.
        image_start: the places of a prompt before the image, the same of every prompt.
        num_places: of a row.
    """
    count, patches = part.num_image_tokens, part.num_patches
    if count == patches:
        return None
    positions = np.arange(num_places, dtype=np.float64)
    positions[image_start:] += patches - count
    image = positions[image_start : image_start + count]
    image[:] = image_start + (np.arange(len(image)) + 0.5) * patches / count - 0.5
    return positions


def _chosen(indices: NDArray[np.int64], num_patches: int) -> NDArray[np.float32]:
    weights = np.zeros((len(indices), num_patches), np.float32)
    weights[np.arange(len(indices)), np.sort(indices)] = 1
    return weights


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = vectors / np.maximum(length, np.finfo(np.float32).tiny)
    return unit
