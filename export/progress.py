"""Progress of an export, on stderr."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(name: str, total: int, *, show: bool, **settings: Any) -> tqdm[Any]:
    """Return a bar, drawn if it is to be shown."""
    return tqdm(total=total, desc=f"{name:<20}", disable=not show, dynamic_ncols=True, **settings)
