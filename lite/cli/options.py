"""Options that several commands have, each described once."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from lite.artifact.parts import CacheDtype, PromptWeights
from lite.console import positive
from lite.engines.options import Dtype, EngineChoice, LoadOptions
from lite.errors import LiteError
from lite.image_tokens import METHODS
from lite.memory.sizes import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lite.model import FindingsModel
    from lite.retrieval.towers import Retrieval
    from lite.studies.results import Findings

ENGINES: Final = get_args(EngineChoice)
DEFAULTS: Final = LoadOptions()


def add_artifact(parser: argparse.ArgumentParser) -> None:
    """Add the artifact that a command is about."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="the folder written by `python -m export`")


def add_image_folder(parser: argparse._ActionsContainer) -> None:
    """Add where the films of a list are."""
    parser.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="where the films are (default: beside the list)"
    )


def add_engine(parser: argparse.ArgumentParser, engines: Sequence[str] = ENGINES) -> None:
    """Add what computes, where, and in which numbers."""
    parser.add_argument(
        "--engine",
        choices=engines,
        default=DEFAULTS.engine,
        help="what computes the decoder: torch, or ONNX Runtime alone (default %(default)s: onnx where the artifact "
        "has decoder.onnx and there is no GPU, or no torch)"
        + ("; both: a row for each, where there is one" if "both" in engines else ""),
    )
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        default=DEFAULTS.device,
        help="auto, cpu, cuda or cuda:N (default %(default)s: a GPU if there is)",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        help="have torch compute the decoder in this (default: the stored one on a GPU, float32 on the CPU)",
    )


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Add what ONNX Runtime computes with, and how much memory there is."""
    parser.add_argument(
        "--provider",
        metavar="NAME",
        help="what ONNX Runtime computes with: cpu, cuda or its own name for it (default: the CPU)",
    )
    parser.add_argument(
        "--cache-dtype",
        choices=get_args(CacheDtype),
        help="what keys and values are kept in: int8, or what the decoder computes in (default: int8 where it "
        "is faster or all that fits, and loses little as measured at export)",
    )
    parser.add_argument(
        "--prompt-weights",
        choices=get_args(PromptWeights),
        help="what onnx reads prompts by: int8, for which some artifacts have weights of their own, faster and a byte "
        "of memory for each; or the stored ones (default: int8 where there is all that it takes)",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="SIZE",
        type=size,
        help="take no more than that, such as 12GiB, or refuse before anything is loaded (default: what a GPU has "
        "free; no limit on a CPU)",
    )


def add_image_tokens(parser: argparse.ArgumentParser) -> None:
    """Add how many tokens the decoder reads of a film."""
    parser.add_argument(
        "--image-tokens",
        metavar="N",
        type=positive,
        help="have the decoder read N tokens of a film: faster, and it loses something (default: one a patch, as "
        "published)",
    )
    parser.add_argument(
        "--image-method",
        choices=METHODS,
        default=DEFAULTS.image_method,
        help="how patches become fewer: means of a grid, what the tower looks at, what is least alike, or any (default "
        "%(default)s)",
    )


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Add the adapter that a command uses for all films."""
    parser.add_argument(
        "--adapter", metavar="NAME", help="use this adapter of the artifact for all films (default: the artifact's)"
    )


def add_adapters(parser: argparse._ActionsContainer) -> None:
    """Add the adapters that a command loads."""
    parser.add_argument(
        "--adapters",
        metavar="NAME,NAME",
        type=_names,
        default=(),
        help="load these adapters of the artifact, too (default: none but the artifact's)",
    )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        msg = f"got {text!r}, expected names of adapters with commas between them"
        raise argparse.ArgumentTypeError(msg)
    return names


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add all that `lite.load` can be told, but for the rows."""
    add_engine(parser)
    add_memory(parser)
    parser.add_argument(
        "--fp16-accumulation",
        action="store_true",
        help="let a GPU add up in float16 where a prompt is read: faster on GeForce cards, and less exact",
    )
    add_image_tokens(parser)
    parser.add_argument(
        "--drafts",
        metavar="WHICH",
        default=DEFAULTS.drafts,
        help="auto: guess how a text goes on by the earlier ones of this run, and verify several tokens in one step "
        "where that pays; FILE: by a table of past reports, too, from `lite drafts build` (default %(default)s)",
    )
    add_verify(parser)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add whether the artifact's files are checked first."""
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not compare the artifact's files with their hashes first",
    )


def load_options(arguments: argparse.Namespace) -> LoadOptions:
    """Return what the options above ask for. As many studies can be under way as go through the decoder together."""
    given = vars(arguments)
    names = {field.name for field in dataclasses.fields(LoadOptions)} & given.keys()
    asked: dict[str, Any] = {name: given[name] for name in names}
    if given.get("adapter") is not None:
        asked["adapters"] = (given["adapter"],)
    if "batch_size" in given:
        asked["rows"] = max(given["batch_size"], 1 + (given.get("samples") or 0))
    return LoadOptions(**asked)


def load_model(arguments: argparse.Namespace, *, for_many: bool = False) -> FindingsModel:
    """Load the artifact as the options say; `for_many` studies it may take longer, where these are faster then."""
    from lite.loading import load
    from lite.memory.process import use_large_pages

    options: dict[str, Any] = dataclasses.asdict(load_options(arguments))
    model = load(arguments.artifact, **options)
    if for_many:
        use_large_pages()
    return model


def add_drafting(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Add how films are read and texts are made, and by which adapter."""
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=positive,
        default=batch_size,
        help="films that go through the decoder together: faster, and more memory (default %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=positive, help="stop after N tokens (default: the artifact's)"
    )
    add_adapter(parser)
    add_films(parser, "also draft findings for what, by its file, is not a frontal chest film; a remark says so")


def add_films(parser: argparse.ArgumentParser, any_film: str) -> None:
    """Add how films are read.

    Args:
        parser: of the command.
        any_film: what that option does there.
    """
    parser.add_argument(
        "--rendering",
        choices=["mimic-cxr-jpg", "voi-lut"],
        default="mimic-cxr-jpg",
        help="how DICOM values become grey levels: the way of the training films, or the file's own window "
        "(default %(default)s)",
    )
    parser.add_argument("--any-film", action="store_true", help=any_film)


def add_towers(parser: argparse.ArgumentParser) -> None:
    """Add all that `lite.load_retrieval` can be told."""
    parser.add_argument(
        "--provider", metavar="NAME", default="cpu", help="what ONNX Runtime computes with (default: the CPU)"
    )
    parser.add_argument("--threads", metavar="N", type=positive, help="threads that compute (default: one a core)")
    add_verify(parser)


def load_towers(arguments: argparse.Namespace, artifact: Path | str) -> Retrieval:
    """Load the towers of an artifact; its text is cut without a word: the commands say of what."""
    from lite.retrieval.towers import load_retrieval

    logging.getLogger("lite.retrieval.towers").setLevel(logging.ERROR)
    given = {name: value for name, value in vars(arguments).items() if name in ("threads", "verify")}
    return load_retrieval(artifact, provider=arguments.provider or "cpu", **given)


def add_confidence(parser: argparse.ArgumentParser) -> None:
    """Add how sure the model is to say it was."""
    parser.add_argument(
        "--confidence",
        metavar="WHICH",
        default="off",
        help="say how sure the model was of each sentence: by FILE, from `lite confidence`; auto: by the one beside "
        "the artifact, and without one uncalibrated (default %(default)s)",
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=positive,
        help="draw N more drafts of each film and say how many agree with each sentence; with --confidence auto, "
        "unless another is named",
    )


def request_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a command asks for beside its studies: options of `submit`, which the lines of `run` say, too."""
    from lite.cohort.run import DRAFTING

    request = {name: getattr(arguments, name) for name in DRAFTING}
    samples = getattr(arguments, "samples", None) or 0
    if not samples and getattr(arguments, "confidence", "off") == "off":
        return request
    from lite.eval.confidence import TOP

    return request | {"top_logprobs": TOP, "samples": samples}


def confident(arguments: argparse.Namespace, model: FindingsModel) -> Callable[[Findings], Findings]:
    """Return what adds sentences to findings, where that was asked for.

    Raises:
        LiteError: the calibration cannot be used.
    """
    if "samples" not in request_of(arguments):
        return lambda findings: findings
    from lite.eval.calibration import find_calibration, with_sentences

    which = "auto" if arguments.confidence == "off" else arguments.confidence
    calibration = find_calibration(which, model, arguments.adapter)
    return lambda findings: with_sentences(findings, model.tokenizer, calibration)


def size(text: str) -> int:
    """Read an argument that is a size in bytes: 12GiB."""
    try:
        return parse_bytes(text)
    except LiteError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
