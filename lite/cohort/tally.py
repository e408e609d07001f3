"""What a run says of itself: how far it is, and at the end what failed and why, and how long it took."""

from __future__ import annotations

import sys
import time
from array import array
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from lite.console import say
from lite.studies.results import Findings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lite.errors import LiteError
    from lite.studies.study import Study

STAGES: Final = {"film": "image_s", "tower": "vision_s", "prompt": "prefill_s", "text": "decode_s", "all": "total_s"}
"""What a study's time goes into: how it is called, and the field of `Timings`."""
_SECONDS_BETWEEN_LINES: Final = 30
_PLACE: Final = " · expected"


class Tally:
    """The counts and times of a run."""

    def __init__(self, total: int | None, *, quiet: bool = False) -> None:
        """Begin.

        Args:
            total: how many studies there are to do; None: that is not known.
            quiet: say nothing on the way.
        """
        self.done = 0
        self.failed: Counter[str] = Counter()  # by why
        self._total = total
        self._quiet = quiet
        self._seconds: dict[str, array[float]] = {stage: array("d") for stage in STAGES}
        self._started = self._said = time.monotonic()

    def add(self, study: Study, result: Findings | LiteError) -> None:
        """Count a study, and show how far the run is."""
        if isinstance(result, Findings):
            self.done += 1
            for stage, field in STAGES.items():
                self._seconds[stage].append(getattr(result.timings, field))
        else:
            self.failed[_why(study, result)] += 1
        self._show()

    @property
    def per_minute(self) -> float:
        """Studies a minute since the first was begun."""
        seconds = time.monotonic() - self._started
        return 60 * (self.done + self.failed.total()) / seconds if seconds else 0.0

    def _show(self) -> None:
        now, ended = time.monotonic(), self.done + self.failed.total()
        if self._quiet or ended == self._total:
            return
        text = f"drafting {ended}{f'/{self._total}' if self._total else ''}, {self.per_minute:.3g} studies/min"
        if self._total is not None:
            text += f", {_shown_time((now - self._started) / ended * (self._total - ended))} left"
        text += f", {self.failed.total()} failed" if self.failed else ""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
        elif now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            say(text)

    def summary(self) -> Iterator[str]:
        """Yield what to print at the end: why studies failed, and the seconds that a study took, by stage."""
        for why, count in self.failed.most_common():
            yield f"failed: {count} × {why}"
        if self.done:
            yield f"{'seconds a study':<18}{'p50':>10}{'p99':>10}"
            for stage, seconds in self._seconds.items():
                middle, high = np.percentile(seconds, [50, 99])
                yield f"  {stage:<16}{middle:>10.3f}{high:>10.3f}"


def _why(study: Study, error: LiteError) -> str:
    """Return what is wrong, without what is the study's own, so that the like are counted together."""
    got = str(error).partition(_PLACE)[0]
    for own in (f"{study.path}: ", f"{study.id}: "):
        got = got.removeprefix(own)
    return got


def _shown_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
