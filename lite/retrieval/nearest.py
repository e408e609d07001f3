"""The rows of a matrix that are most similar to a query: exact, and the same on every machine.

A product in float32 is off by a few units in the last place, and by how many depends on the library, its threads and
where a row stands in its block: rows that are equal would come in any order. So the product only finds which rows can
be among the nearest; those are computed again in float64, each by itself, and equal ones come in the order of the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_ROWS: Final = 65_536
_SIMILARITIES: Final = 1 << 24  # float32 numbers of queries × rows that are held at a time
_EXACT_ROWS: Final = 4_096
_ROUNDING: Final = 2.0**-22  # twice what a float32 product of two vectors of length 1 may be off, each way, per number


def nearest(
    matrix: NDArray[np.float32], queries: NDArray[np.float32], top: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Find the rows with the largest dot products.

    Args:
        matrix: [N, dim], rows of length 1; it may be mapped from a file.
        queries: [Q, dim], rows of length 1.
        top: how many rows for each query, at least 1.

    Returns:
        Rows and similarities, [Q, min(top, N)] each: the most similar first, equal ones in the order of the matrix.
    """
    top = min(top, len(matrix))
    found = np.empty((len(queries), top), np.int64), np.empty((len(queries), top))
    if not top:
        return found
    at_a_time = max(1, _SIMILARITIES // len(matrix))
    for start in range(0, len(queries), at_a_time):
        some = np.ascontiguousarray(queries[start : start + at_a_time], dtype=np.float32)
        for number, similarities in enumerate(_products(matrix, some), start=start):
            found[0][number], found[1][number] = _best(matrix, queries[number], similarities, top)
    return found


def _products(matrix: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Multiply, a block of rows at a time: [Q, N]."""
    products = np.empty((len(queries), len(matrix)), np.float32)
    for start in range(0, len(matrix), BLOCK_ROWS):
        block = matrix[start : start + BLOCK_ROWS]
        products[:, start : start + len(block)] = (block @ queries[0])[None] if len(queries) == 1 else queries @ block.T
    return products


def _best(
    matrix: NDArray[np.float32], query: NDArray[np.float32], similarities: NDArray[np.float32], top: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    least = np.partition(similarities, len(similarities) - top)[len(similarities) - top]
    rows = np.flatnonzero(similarities >= least - matrix.shape[1] * _ROUNDING)
    exact = dot_products(matrix, rows, query)
    order = np.argsort(-exact, kind="stable")[:top]
    return rows[order], exact[order]


def dot_products(
    matrix: NDArray[np.float32], rows: NDArray[np.integer[Any]], query: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Multiply rows with a query in float64, each by itself: a row's product does not depend on the others."""
    products = np.empty(len(rows))
    for start in range(0, len(rows), _EXACT_ROWS):
        some = matrix[rows[start : start + _EXACT_ROWS]].astype(np.float64)
        some *= query
        products[start : start + len(some)] = some.sum(axis=1)
    return products
