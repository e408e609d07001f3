"""What a decoder reads here: documentation that this Python carries, and reports of the phantom's grammar.

    help topics · docstrings of the standard library, a module each · licences · reports, some joined
        each a document ──sha256──▶ half of them to calibrate on, half to judge by ──▶ blocks of tokens

No document is on both sides, and none gives more than a few blocks. Nothing is drawn at random: the same Python gives
the same tokens, and `Block`s are hashed so that two runs can be told to have read the same.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import pydoc_data.topics
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.report import write_findings, write_reason
from lite.errors import LiteError

REPORTS_SHARE: Final = 4
"""One block in so many is of reports."""
REPORTS_SEED: Final = 20_261_501  # of studies that are used for nothing else
_STUDIES_A_DOCUMENT: Final = 16
_REPORT_DOCUMENTS: Final = 120
_BLOCKS_A_DOCUMENT: Final = 2
_MOST_MODULES: Final = 120
Block = tuple[int, ...]
"""Token ids that are read together."""


@cache
def documentation() -> tuple[str, ...]:
    """Return documents of the Python installation: help topics, licence, the docstrings of some modules."""
    return tuple(_documentation())


def _documentation() -> Iterator[str]:
    yield from pydoc_data.topics.topics.values()
    library = Path(sysconfig.get_path("stdlib"))
    yield from (file.read_text(encoding="utf-8", errors="replace") for file in sorted(library.glob("LICENSE*")))
    files = [file for file in sorted(library.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(file.parts)]
    for file in files[:: max(1, len(files) // _MOST_MODULES)]:
        if text := docstrings(file.read_text(encoding="utf-8", errors="replace")):
            yield text


def docstrings(source: str) -> str:
    """Return all docstrings of a module, in order."""
    try:
        with warnings.catch_warnings():  # of escapes in old modules
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(inspect.cleandoc(text) for text in found if text)


def reports() -> Iterator[str]:
    """Yield documents of reasons and findings, each of studies of its own."""
    for document in range(_REPORT_DOCUMENTS):
        rng = np.random.default_rng([REPORTS_SEED, document])
        texts = []
        for _ in range(_STUDIES_A_DOCUMENT):
            study = sample_study(int(rng.integers(2**62)))
            reason = write_reason(study, rng)
            texts.append(f"Indication: {reason or 'None given.'}\nFindings: {write_findings(study, rng).text}")
        yield "\n\n".join(texts)


def read_blocks(
    encode: Callable[[str], Sequence[int]], *, prefix: Block, calibration: int, evaluation: int, length: int
) -> tuple[list[Block], list[Block]]:
    """Return blocks to calibrate on and blocks to judge by, a quarter of each reports.

    Args:
        encode: Tokenises a document.
        prefix: What each block begins with, such as BOS.
        calibration: How many blocks.
        evaluation: How many blocks.
        length: Tokens of a block, the prefix included.

    Raises:
        LiteError: The installation does not carry so much text.
    """
    sides: list[list[Block]] = [[], []]
    wanted = calibration, evaluation
    for documents, share in ((reports(), 1), (documentation(), REPORTS_SHARE)):
        hashed = sorted({(hashlib.sha256(text.encode()).digest(), text) for text in documents})
        for digest, text in hashed:
            side = sides[digest[-1] % 2]
            room = -(-wanted[digest[-1] % 2] * share // REPORTS_SHARE) - len(side)
            if room > 0:
                side += _cut(encode(text), prefix, length)[:room]
    for side, count, what in zip(sides, wanted, ("calibrate on", "judge by"), strict=True):
        if len(side) < count:
            msg = f"got {len(side)} blocks of {length} tokens to {what} in Python's documentation · expected {count}"
            raise LiteError(f"{msg} · ask for fewer, or use a Python that carries its documentation")
    return sides[0], sides[1]


def _cut(ids: Sequence[int], prefix: Block, length: int) -> list[Block]:
    """Cut a document's first tokens into whole blocks, a few at most."""
    step = length - len(prefix)
    starts = range(0, min(len(ids) // step, _BLOCKS_A_DOCUMENT) * step, step)
    return [(*prefix, *ids[start : start + step]) for start in starts]


def sha256_of_blocks(blocks: Sequence[Block]) -> str:
    """Return a hash of token ids, as int32 little-endian, each block's length before it."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(np.array([len(block), *block], "<i4").tobytes())
    return digest.hexdigest()
