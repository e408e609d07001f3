"""The way a viewer first shows a DICOM film: by its own window or table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from lite.image.rendering import check_stored, min_max, refusal

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_BLANK: Final = 0.98
"""A picture of which so much is one grey level shows nothing."""


def render_voi(
    stored: NDArray[Any],
    dataset: Dataset,
    name: str,
    *,
    monochrome1: bool,
) -> tuple[NDArray[np.uint8], str, str | None]:
    """Rescale to modality units, then apply the first VOI LUT or window.

    Returns:
        The picture, uint8 [H, W]; the rendering; and a remark, where there is nothing on it.

    Source: DICOM PS3.3 C.11.2.1.2 (LINEAR, LINEAR_EXACT and SIGMOID windows).
    """
    from pydicom.pixels.processing import apply_modality_lut

    values = np.asarray(apply_modality_lut(stored, dataset))
    used, by = "voi-lut", "the VOI LUT"
    if dataset.get("VOILUTSequence"):
        shown = _looked_up(values, dataset.VOILUTSequence[0], dataset.original_encoding[1] is not False)
    elif (window := _first_window(dataset)) is not None:
        shown = _windowed(values.astype(np.float64), *window, name)
        by = f"the window (centre {window[0]:g}, width {window[1]:g})"
    else:
        used = "min-max"
        check_stored(values, name)
        shown = min_max(values) / 255
    if monochrome1:
        shown = 1 - shown
    picture = np.rint(shown.clip(0, 1) * 255).astype(np.uint8)
    blank = used == "voi-lut" and np.bincount(picture.ravel()).max() >= _BLANK * picture.size
    extent = f"{values.min():g} to {values.max():g}"
    return picture, used, f"blank film: {by} holds hardly any of its values, {extent}" if blank else None


def _looked_up(values: NDArray[Any], item: Dataset, little_endian: bool) -> NDArray[np.float64]:
    """Map values through one item of a VOI LUT sequence, to 0..1.

    pydicom 3.0's apply_voi keeps the index in the type of the entries, so that an 8-bit table wraps around at 256.
    """
    num_entries, first, bits = (int(v) for v in item.LUTDescriptor)
    entries = item.LUTData
    if isinstance(entries, bytes):
        two_bytes = np.dtype("<u2" if little_endian else ">u2")
        entries = np.frombuffer(entries, np.uint8 if len(entries) <= num_entries + 1 else two_bytes)
    table = np.asarray(entries, dtype=np.float64)[: num_entries or 1 << 16] / ((1 << bits) - 1)
    return table[np.clip(values.astype(np.int64) - first, 0, len(table) - 1)]


def _first_window(dataset: Dataset) -> tuple[float, float, str] | None:
    centre, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if centre in (None, "") or width in (None, ""):
        return None
    # Several windows make a list; the first is the one to show.
    first_centre, first_width = (float(v[0]) if isinstance(v, Sequence) else float(v) for v in (centre, width))
    return first_centre, first_width, str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()


def _windowed(
    values: NDArray[np.float64], centre: float, width: float, function: str, name: str
) -> NDArray[np.float64]:
    """Map a window to 0..1."""
    narrowest = 1 if function == "LINEAR" else 0
    if not (np.isfinite(centre) and np.isfinite(width) and width >= narrowest and width > 0):
        got = f"window centre {centre}, width {width} ({function})"
        raise refusal(name, got, "a window of some width", 'use rendering="mimic-cxr-jpg", which needs none')
    if function == "LINEAR":
        if width == 1:
            return (values > centre - 0.5).astype(np.float64)
        return (values - (centre - 0.5)) / (width - 1) + 0.5
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    if function == "SIGMOID":
        return cast("NDArray[np.float64]", 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700))))
    do = 'use rendering="mimic-cxr-jpg", which needs none'
    raise refusal(name, f"VOI LUT function {function}", "LINEAR, LINEAR_EXACT or SIGMOID", do)
