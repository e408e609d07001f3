"""Scales of the int8 cache: what one step of a channel of the keys, or of the values, stands for.

They are constants of the graph, so they are found before, on studies: the largest magnitude that a channel takes on
anything the decoder reads, image, prompt and findings, divided by 127. A channel of the keys keeps its own scale: a
rotary embedding turns pairs of channels, and those of a low frequency hold large values that hardly turn at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from export.logits import read_film
from lite.engines.protocol import NO_ADAPTER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from export.studies import FilmStudies
    from lite.engines.onnx_engine.decoder import OnnxDecoder

    Array = np.ndarray[Any, np.dtype[Any]]

STEPS: Final = 127
_SMALLEST: Final = 1e-8
"""Of a channel that is always zero."""


def find_cache_scales(
    decoder: OnnxDecoder, films: Iterable[FilmStudies], features: Callable[[FilmStudies], Array]
) -> tuple[Array, Array]:
    """Return the scales of keys and values, each float32 [num_hidden_layers, kv_heads, head_dim].

    `decoder` has a float cache, and perhaps the adapter of whoever names none; `films` are one at least; `features`
    runs the tower on a film: [P, hidden_size].
    """
    config = decoder.config
    shape = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    largest = {kind: np.full(shape, _SMALLEST, np.float32) for kind in ("key", "value")}
    for film in films:
        image = features(film)
        for study, cache, _ in read_film(decoder, film, image, 0 if decoder.adapters else NO_ADAPTER):
            length = study.num_tokens(len(image))
            for name, buffer in cache.buffers.items():
                layer, _, kind = name.partition(".")
                found = np.abs(buffer.numpy()[0, :, :length].astype(np.float32)).max(axis=1)
                np.maximum(largest[kind][int(layer)], found, out=largest[kind][int(layer)])
    return largest["key"] / STEPS, largest["value"] / STEPS
