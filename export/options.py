"""The options of the exporter's command lines, each described once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final, get_args

from export.settings import (
    DEFAULTS,
    ActivationOrder,
    AdapterSettings,
    Clip,
    GroupSize,
    HeadFormat,
    Method,
    Signs,
    TokenWeights,
    TrainedOn,
)
from lite.artifact.parts import OnnxFloat, PromptWeights
from lite.config import DecoderFormat, VisionFormat
from lite.console import positive
from lite.errors import LiteError

_DESCRIPTION = """\
Turn a LLaVA-Rad checkpoint, as downloaded, into an artifact: the folder that `python -m lite` runs.

Two downloads are needed. Both stay as they are and are only read:
  --checkpoint   microsoft/llava-rad: LoRA adapter, projector, vision tower
  --base         lmsys/vicuna-7b-v1.5: the language model it was trained from
With --retrieval the tokenizer of its text tower is a third, of which two small files are read.

The LoRA is merged in float32, the vision tower becomes one ONNX file, and both are measured against the
checkpoint before anything is kept. The decoder goes one layer at a time: 7B takes a few GiB of memory, whatever its
depth. Finished layers are kept: an export that was stopped goes on behind them when the command is repeated.

4-bit GPTQ makes 7B an artifact of 4 GB. It needs studies to calibrate on: films with reasons and findings, in the JSON
list of LLaVA-Rad's evaluation, of the kind that will be read. They are not kept in the artifact.
"""
_EPILOG = """\
examples:
  python -m export check --checkpoint llava-rad --base vicuna-7b-v1.5     (whether both are whole, in seconds)
  python -m export --checkpoint llava-rad --base vicuna-7b-v1.5 --out artifact
  python -m export --checkpoint llava-rad --base vicuna-7b-v1.5 --out artifact --vision fp16 \\
                   --decoder gptq-int4 --calibration-data studies/studies.json
  python -m export --checkpoint llava-rad --base vicuna-7b-v1.5 --out artifact --decoder bnb-nf4
  python -m export --checkpoint llava-rad --base vicuna-7b-v1.5 --out artifact --retrieval --text-vocab biomedbert
  python -m export adapter northside --artifact artifact --name northside --base vicuna-7b-v1.5 \\
                   --published llava-rad     (add a hospital's own LoRA: `python -m export adapter --help`)
  python -m export onnx artifact             (add decoder.onnx to an artifact in GPTQ: `python -m export onnx --help`)
  python -m export --checkpoint llava-rad --base vicuna-7b-v1.5 --out artifact \\
                   --verify-data studies/studies.json

The images named in such a list lie relative to its folder, here studies/; --image-folder says where else.

exit status: 0 done, 1 the export failed (no artifact was written), 2 wrong use, 130 interrupted.
"""


def _token_weights(text: str) -> TokenWeights | None:
    if text == "measure":
        return None
    try:
        return TokenWeights.parse(text)
    except (ValueError, LiteError):
        msg = f"got {text!r}, expected two numbers such as 0.3,0.1, or measure"
        raise argparse.ArgumentTypeError(msg) from None


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


_Options = dict[str, dict[str, Any]]  # flag to what argparse is told of it
_JSON_LIST: Final = "a JSON list in LLaVA-Rad's evaluation format"
_LIST: Final[dict[str, Any]] = {"type": Path, "metavar": "LIST.json"}
_FOLDER: Final[dict[str, Any]] = {"type": Path, "metavar": "DIR"}
_NUMBER: Final[dict[str, Any]] = {"type": positive, "metavar": "N"}
_IMAGES: Final = _FOLDER | {"help": "where its images are (default: beside the list)"}
_SOURCES: Final[_Options] = {
    "--checkpoint": _FOLDER | {"required": True, "help": "the LLaVA-Rad download"},
    "--base": _FOLDER | {"required": True, "help": "its base language model"},
    "--other-base": {
        "action": "store_true",
        "help": "take a base whose name is not the one that the adapter asks for",
    },
}
_REQUIRED: Final[_Options] = {
    **_SOURCES,
    "--out": _FOLDER | {"required": True, "help": "the artifact to make; must not exist"},
    "--overwrite": {"action": "store_true", "help": "replace an artifact that is at --out"},
}
_ACTIVATIONS: Final[_Options] = {
    "--activations": {
        "choices": get_args(OnnxFloat),
        "help": "what decoder.onnx computes in beside its integers: float32 for CPUs, float16 for the providers of "
        "GPUs (default: %(default)s)",
    },
    "--prompt-weights": {
        "choices": get_args(PromptWeights),
        "help": "what prompts are read by: int8 writes weights of their own, a byte for each, with which a CPU with "
        "VNNI takes 0.6 of the time; or the stored ones (default: %(default)s)",
    },
}
_FORMATS: Final[_Options] = {
    "--decoder": {
        "choices": get_args(DecoderFormat),
        "default": DEFAULTS.decoder_format,
        "help": "the decoder's weights (default: %(default)s)",
    },
    "--vision": {
        "choices": get_args(VisionFormat),
        "default": DEFAULTS.vision_format,
        "help": "the vision tower: fp32 for CPUs, fp16 for GPUs, half the bytes; int8 is faster on CPUs and loses a "
        "little, its projector stays 16-bit (default: %(default)s)",
    },
    "--engine": {
        "choices": ["torch", "onnx"],
        "default": "torch",
        "help": "what will compute the decoder: onnx writes decoder.onnx too, with which a gptq decoder runs without "
        "torch, and faster on a CPU (default: %(default)s)",
    },
    **_ACTIVATIONS,
    "--keep-lora": {
        "action": "store_true",
        "help": "round the base alone, and keep the published LoRA beside it in 16 bits: for hospitals' own adapters "
        "(docs/adapters.md)",
    },
}
_RETRIEVAL: Final[_Options] = {
    "--retrieval": {
        "action": "store_true",
        "help": "write the towers of cross-modal retrieval too: text.onnx, and film.onnx, which goes on where "
        "vision.onnx ends (docs/retrieval.md)",
    },
    "--text-vocab": _FOLDER
    | {
        "help": "with --retrieval: the folder with vocab.txt and config.json of its text tower's BERT, "
        "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
    },
    "--text": {
        "choices": get_args(VisionFormat),
        "default": DEFAULTS.text_format,
        "help": "the text tower: fp32, or fp16, half the bytes, or int8, a third; that of the film is --vision's "
        "(default: %(default)s)",
    },
}
_PARITY: Final[_Options] = {
    "--verify-data": _LIST | {"help": f"studies to measure on, {_JSON_LIST} (default: a few built-in ones)"},
    "--image-folder": _IMAGES,
    "--verify-studies": _NUMBER | {"help": "how many (default: %(default)s)"},
    "--verify-tokens": _NUMBER | {"help": "findings tokens scored in each (default: %(default)s)"},
}
_KEEP: Final[_Options] = {
    "--keep-anyway": {
        "action": "store_true",
        "help": "make the artifact even if it measures worse than is tolerated; it will say so whenever it is loaded",
    },
}
_GPTQ: Final[_Options] = {
    "--calibration-data": _LIST | {"help": f"studies to calibrate on, {_JSON_LIST}"},
    "--calibration-images": _IMAGES,
    "--calibration-studies": _NUMBER | {"help": "how many, spread over the list (default: %(default)s)"},
    "--group-size": {
        "type": int,
        "choices": get_args(GroupSize),
        "help": "inputs that share a scale, -1 for all: smaller is more faithful and larger (default: %(default)s)",
    },
    "--method": {
        "choices": get_args(Method),
        "help": "rtn rounds to nearest, without calibration: the yardstick (default: %(default)s)",
    },
    "--token-weights": {
        "type": _token_weights,
        "metavar": "IMAGE,PROMPT",
        "help": "what image and prompt tokens count against a findings token, or measure (default: measure)",
    },
    "--activation-order": {
        "choices": get_args(ActivationOrder),
        "help": "the order in which columns are rounded (default: %(default)s)",
    },
    "--clip": {"choices": get_args(Clip), "help": "how scales are chosen (default: %(default)s)"},
    "--signs": {"choices": get_args(Signs), "help": "of the scales (default: %(default)s)"},
    "--through-attention": {
        "action": argparse.BooleanOptionalAction,
        "help": "count for q, k and v what the attention makes of them (default: yes)",
    },
    "--refine": {
        "type": _count,
        "metavar": "N",
        "help": "passes over the rounded columns to round them better (default: %(default)s)",
    },
    "--fold-scales": {
        "action": argparse.BooleanOptionalAction,
        "help": "balance the channels of neighbouring linears first (default: yes)",
    },
    "--lm-head": {
        "choices": get_args(HeadFormat),
        "help": "the head's weights; int8 saves 3 %% of 7B's bytes, but transformers does not read such a head "
        "(default: %(default)s)",
    },
}
_MACHINE: Final[_Options] = {
    "--device": {"help": "where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N (default: %(default)s)"},
    "--quiet": {"dest": "show_progress", "action": "store_false", "help": "no progress bars"},
}


_ADAPTER: Final[_Options] = {
    "--artifact": _FOLDER | {"required": True, "help": "the artifact that it is added to"},
    "--name": {"required": True, "metavar": "NAME", "help": "what requests will call it"},
    "--base": _FOLDER | {"required": True, "help": "the base language model that the artifact was exported from"},
    "--published": _FOLDER | {"required": True, "help": "the LLaVA-Rad download that it was exported from"},
    "--on": {
        "choices": get_args(TrainedOn),
        "help": "what it was trained on: the base model, or the published LLaVA-Rad, merged (default: as its "
        "configuration says)",
    },
    "--correction": {
        "type": _count,
        "metavar": "RANK",
        "help": "add so many directions that make up for the rounding of the decoder (default: none)",
    },
    "--tolerance": {
        "type": float,
        "metavar": "KL",
        "help": "refuse it if it loses more, in nats a token (default: 0.1, or twice what the decoder itself lost)",
    },
    "--replace": {"action": "store_true", "help": "take the place of an adapter of that name"},
    "--out": _FOLDER | {"help": "make another artifact there (default: the new one replaces the old)"},
}


def export_parser() -> argparse.ArgumentParser:
    """Return the command line of `python -m export`."""
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add(parser.add_argument_group("what to read and write"), _REQUIRED)
    _add(parser.add_argument_group("formats"), _FORMATS, DEFAULTS)
    _add(parser.add_argument_group("GPTQ (--decoder gptq-int4, gptq-int8)"), _GPTQ, DEFAULTS.gptq)
    _add(parser.add_argument_group("retrieval of films and reports"), _RETRIEVAL, DEFAULTS)
    _add(parser.add_argument_group("measuring parity with the checkpoint"), _PARITY | _KEEP, DEFAULTS)
    _add(parser, _MACHINE, DEFAULTS)
    return parser


def check_parser() -> argparse.ArgumentParser:
    """Return the command line of `python -m export check`."""
    parser = argparse.ArgumentParser(
        prog="python -m export check",
        description="Say whether a checkpoint and its base are whole and can be exported: every file that an export "
        "reads is opened, and the names, shapes and types of all tensors are checked. Nothing is written.",
        epilog="exit status: 0 they can be exported, 1 they cannot, 2 wrong use.",
    )
    _add(parser, _SOURCES)
    return parser


def onnx_parser() -> argparse.ArgumentParser:
    """Return the command line of `python -m export onnx`."""
    parser = argparse.ArgumentParser(
        prog="python -m export onnx",
        description="Write decoder.onnx into an artifact whose decoder is GPTQ: the same integers, for ONNX Runtime. "
        "With it the artifact runs on a CPU without torch, and faster. It is measured against decoder/ before it is "
        "kept; the artifact is replaced at the very end, or stays as it is.",
        epilog="exit status: 0 done, 1 it failed (the artifact is as it was), 2 wrong use, 130 interrupted.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="the folder written by `python -m export`")
    parser.add_argument("--out", **_FOLDER, help="make another artifact there (default: the new one replaces the old)")
    _add(parser, _ACTIVATIONS, DEFAULTS)
    calibration = f"studies to find the scales of the int8 cache on, {_JSON_LIST} (default: a few built-in ones)"
    parser.add_argument("--calibration-data", **_LIST, help=calibration)
    parser.add_argument("--calibration-images", **_IMAGES)
    _add(parser.add_argument_group("measuring parity with decoder/"), _PARITY, DEFAULTS)
    _add(parser, _MACHINE, DEFAULTS)
    return parser


def adapter_parser() -> argparse.ArgumentParser:
    """Return the command line of `python -m export adapter`."""
    parser = argparse.ArgumentParser(
        prog="python -m export adapter",
        description="Add a hospital's own LoRA to an artifact: a folder as PEFT or LLaVA's training scripts leave it.\n"
        "It lies beside the decoder, in 16 bits, and requests name it; what is drafted without it stays as it was.\n"
        "It is measured before it is kept. The artifact is replaced at the very end, or stays as it is.",
        epilog="example: python -m export adapter northside --artifact artifact --name northside \\\n"
        "             --base vicuna-7b-v1.5 --published llava-rad --verify-data studies/studies.json\n\n"
        "exit status: 0 done, 1 it failed (the artifact is as it was), 2 wrong use, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the folder with adapter_config.json")
    _add(parser, _ADAPTER, AdapterSettings())
    _add(parser.add_argument_group("measuring it beside the decoder"), _PARITY | _KEEP, AdapterSettings())
    _add(parser, _MACHINE, AdapterSettings())
    return parser


def _add(group: argparse._ActionsContainer, options: _Options, settings: object = None) -> None:
    """Add options. One without a default takes that of the settings' field of its name."""
    for flag, given in options.items():
        field = flag.removeprefix("--").replace("-", "_")
        default = {"default": getattr(settings, field)} if hasattr(settings, field) else {}
        group.add_argument(flag, **default, **given)
