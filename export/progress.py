"""Progress of an export, on stderr, and what each of its stages has taken."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lite.console import say

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_LOG = logging.getLogger(__name__)


def progress_bar(name: str, items: Iterable[Any] | None = None, *, show: bool, **settings: Any) -> tqdm[Any]:
    """Return a bar, drawn if it is to be shown, that yields the items or, without any, waits for its `update`."""
    return tqdm(items, desc=f"{name:<20}", disable=not show, dynamic_ncols=True, **settings)


@contextlib.contextmanager
def stage(name: str, *, show: bool) -> Iterator[None]:
    """Say at the end of a block what it has taken: in the log, and on stderr if it is to be shown."""
    started = time.perf_counter()
    yield
    taken = f"{name}: {time.perf_counter() - started:.1f} s"
    _LOG.info("%s", taken)
    if show:
        say(taken)
