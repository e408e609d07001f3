"""F1-RadGraph, by the `radgraph` package and its model "radgraph" (RadGraph 1.0), as LLaVA-Rad's evaluation uses it.

It is the package's "partial" reward: the F1 of two sets of entities, each an entity's words, its label and whether it
has a relation, averaged over the studies. A study with an empty text, or with a text in which the model finds no
entity, has 0, even if the two are alike. Published values of that evaluation (`llava/eval/rrg_eval`) are medians over
resamples; here the value is that of the studies themselves.

No text leaves the machine. The package does all work here, but it fetches its own weights from Hugging Face when it
does not find them: `radgraph_f1` is for those who asked for it.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, Final

from lite.errors import LiteError
from lite.eval.figures import Missing, Sums, check_paired, mean_sums

_INSTALL: Final = 'install it with: pip install "llava-rad-lite[clinical]", in an environment without the extra "bench"'


def radgraph_f1(references: Sequence[str], predictions: Sequence[str], *, device: str) -> Sums | Missing:
    """Average the F1-RadGraph ("partial") of each study.

    The model is loaded, used and let go; the package reads one text at a time.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        The figure; or why it is missing: the package is not installed or does not work with the transformers that is,
        or its weights are not on this machine and could not be fetched.

    Raises:
        LiteError: the package failed for another reason: damaged weights, no such device, not enough memory.
    """
    check_paired(references, predictions)
    try:
        # Its import changes which warnings are shown, for the whole process.
        with warnings.catch_warnings():
            radgraph = import_module("radgraph")
        transformers_version = version("transformers")
    except ImportError as error:
        return Missing(why="not installed", todo=f"F1-RadGraph needs radgraph ({error}): {_INSTALL}.")
    if int(transformers_version.partition(".")[0]) > 4:
        todo = f"radgraph does not run with transformers {transformers_version}: {_INSTALL}."
        return Missing(why="needs transformers 4", todo=todo)
    cuda = _cuda_index(device)
    try:
        return mean_sums(_rewards(radgraph, references, predictions, cuda))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        # For files neither here nor to be had, the package raises this very type, and transformers a bare OSError.
        if type(error) is Exception or (type(error) is OSError and error.errno is None):
            todo = f"radgraph's weights are not here and could not be fetched: try again with a network ({reason})."
            return Missing(why="no weights", todo=todo)
        msg = (
            f"got an error from radgraph {version('radgraph')} ({reason}) · expected its F1 · if its weights are "
            "damaged, delete its folder in the user's cache (~/.cache/radgraph) and have them fetched again"
        )
        raise LiteError(msg) from error


def _rewards(radgraph: Any, references: Sequence[str], predictions: Sequence[str], cuda: int) -> list[float]:  # noqa: ANN401
    # The package takes a text of blanks only for one with words, and fails.
    refs, hyps = ([text.strip() for text in texts] for texts in (references, predictions))
    # It prints what it does, which is no part of our output.
    with contextlib.redirect_stdout(sys.stderr):
        scorer = radgraph.F1RadGraph(reward_level="partial", model_type="radgraph", cuda=cuda)
        _, rewards, _, _ = scorer(refs=refs, hyps=hyps)
    return list(rewards)


def _cuda_index(device: str) -> int:
    """Return a device as radgraph takes it: the GPU's number, -1 for the CPU."""
    import torch

    from lite.engines.machine import check_device

    chosen = torch.device(check_device(device))
    return (chosen.index or 0) if chosen.type == "cuda" else -1
