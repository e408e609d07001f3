"""Work that must not count: in a process of its own, which is gone before anything is measured."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def run_apart(function: Callable[..., None], *arguments: Any, **named: Any) -> None:
    """Run a function of a module in a new process, and raise what it raises.

    Drawing and rounding weights takes more memory than running them, and leaves libraries and fragments behind.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(function, *arguments, **named).result()
