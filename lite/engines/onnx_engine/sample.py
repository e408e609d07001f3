"""The choice of the next token in NumPy, as `kernels.reference.sample` defines it: the same tokens, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GOLDEN: Final = np.uint32(0x9E3779B9)


class Sampled(NamedTuple):
    """What `sample` chose for each row, and how probable that was: NaN in a row that is not finite."""

    token_ids: NDArray[np.int64]  # [N]
    logprobs: NDArray[np.float32]  # [N]
    top_ids: NDArray[np.int64]  # [N, num_top]
    top_logprobs: NDArray[np.float32]  # [N, num_top]
    is_finite: NDArray[np.bool_]  # [N]


def sample(
    logits: NDArray[np.floating],
    *,
    temperature: NDArray[np.float32],
    top_p: NDArray[np.float32],
    seeds: NDArray[np.int64],
    positions: NDArray[np.int64],
    num_top: int = 0,
) -> Sampled:
    """Choose a token for each row: the most probable one, or one drawn from the nucleus by seed and position.

    Args:
        logits: [N, V], float16 or float32.
        temperature: [N]; 0 takes the most probable token, the first of equals.
        top_p: [N] in (0, 1]; 1 keeps all tokens.
        seeds: [N], any.
        positions: [N], of the tokens that are chosen, below 2^32.
        num_top: how many of the most probable tokens to return.

    Returns:
        The tokens, and the most probable ones in falling order. Log-probabilities are the model's own: at temperature
        1 over all tokens. A row with a NaN or an infinity has token 0, log-probabilities of NaN and `is_finite` false.
    """
    is_finite = np.isfinite(logits).all(-1)
    x = np.where(is_finite[:, None], logits, 0).astype(np.float32)
    token_ids = x.argmax(-1)
    for row in np.flatnonzero(is_finite & (temperature > 0)):
        token_ids[row] = _draw(x[row], temperature[row], top_p[row], seeds[row], positions[row])
    shifted = x - x.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    logprobs[~is_finite] = np.nan
    # Stable, so that the first of equals comes first.
    top_ids = np.argsort(-x, axis=-1, kind="stable")[:, :num_top] if num_top else np.empty((len(x), 0), np.int64)
    top_ids = top_ids * is_finite[:, None]
    chosen = np.take_along_axis(logprobs, token_ids[:, None], -1)[:, 0]
    return Sampled(token_ids, chosen, top_ids, np.take_along_axis(logprobs, top_ids, -1), is_finite)


def _draw(
    x: NDArray[np.float32], temperature: np.float32, top_p: np.float32, seed: np.int64, position: np.int64
) -> int:
    """Draw a token of the nucleus: the one that arrives first."""
    with np.errstate(over="ignore"):  # at a tiny temperature all but the most probable are infinitely far away
        weights = np.exp((x - x.max()) / temperature)
    if top_p < 1:
        falling = -np.sort(-weights)
        masses = falling.cumsum(dtype=np.float64)
        weights[weights < falling[(masses >= top_p * masses[-1]).argmax()]] = 0
    return int((weights / _exponentials(seed, position, len(x))).argmax())


def _exponentials(seed: np.int64, position: np.int64, vocab_size: int) -> NDArray[np.float32]:
    """Return an exponentially distributed number for each token; see `kernels.reference.exponentials`."""
    low, high, at = (np.array([number & 0xFFFFFFFF]).astype(np.uint32) for number in (seed, seed >> 32, position))
    first = _mix(low ^ _mix(at + _GOLDEN))
    second = _mix(high ^ _mix(first + _GOLDEN))
    bits = _mix(second ^ _mix(first + np.arange(vocab_size, dtype=np.uint32) * _GOLDEN))
    uniform = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)
    arrivals: NDArray[np.float32] = -np.log1p(-np.minimum(uniform, np.float32(1 - 2**-24)))
    return arrivals


def _mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Scramble 32 bits one to one: the last step of the hash MurmurHash3."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
