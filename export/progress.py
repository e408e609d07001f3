"""Progress of an export, on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterable


def progress_bar(name: str, items: Iterable[Any] | None = None, *, show: bool, **settings: Any) -> tqdm[Any]:
    """Return a bar, drawn if it is to be shown, that yields the items or, without any, waits for its `update`."""
    return tqdm(items, desc=f"{name:<20}", disable=not show, dynamic_ncols=True, **settings)
