"""Decoders speak their mind on stderr, in C and as Python's warnings. Here they are heard, and nobody else is."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from typing import Final

# What libjpeg, libtiff and OpenJPEG print, and nothing else does; of that, what says that pixels are wrong. (GDCM tries
# 8 bits before 12, and libjpeg minds unusual headers.)
_DECODERS: Final = re.compile(
    r"TIFF|tempfile\.tif|Decode:|JPEG|Premature end|Bogus|Huffman|[Mm]arker|Invalid|Unsupported|[Tt]ile|[Ss]tream"
)
_DAMAGE: Final = re.compile(
    r"Corrupt(?!.*extraneous bytes before marker 0xd9)|Premature end|Bogus|Unsupported marker|Not enough data"
    r"|Read error|Bad code word|not yet in table|Decoding error"
)
_ALONE: Final = threading.Lock()  # filters of warnings, and stderr, belong to the whole process


@contextlib.contextmanager
def quietly() -> Iterator[list[str]]:
    """Keep to itself what the decoding of a film prints; the list holds what decoders complained of in the end.

    They go on with damaged data, and say so only there. Lines of other threads are handed on, but where the decoder
    gave up: what it printed then is dropped with it.
    """
    with _ALONE, warnings.catch_warnings(), _stderr_caught() as complaints:
        warnings.simplefilter("ignore")
        yield complaints


@contextlib.contextmanager
def _stderr_caught() -> Iterator[list[str]]:
    complaints: list[str] = []
    gave_up = False
    try:
        stderr = os.dup(2)
    except OSError:  # a process without one
        yield complaints
        return
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield complaints
        except Exception:
            gave_up = True
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            for line in caught.read().splitlines(keepends=True):
                text = line.decode("utf-8", "replace").strip()
                if not gave_up and not _DECODERS.search(text):
                    os.write(2, line)
                elif _DAMAGE.search(text):
                    complaints.append(text)
