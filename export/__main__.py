"""The command line of the exporter: `python -m export --help`."""

from __future__ import annotations

import argparse
import glob
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from export.settings import DEFAULTS, DecoderFormat, ExportSettings, VisionFormat
from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.artifact import Artifact

_DESCRIPTION = """\
Turn a LLaVA-Rad checkpoint, as downloaded, into an artifact: the folder that `python -m lite` runs.

Two downloads are needed. Both stay as they are and are only read:
  --checkpoint   microsoft/llava-rad: LoRA adapter, projector, vision tower
  --base         lmsys/vicuna-7b-v1.5: the language model it was trained from

The LoRA is merged in float32, the vision tower becomes one ONNX file, and both are measured against the
checkpoint before anything is kept. Memory: about one decoder layer and the embeddings (a few GiB for 7B).
"""
_EPILOG = """\
examples:
  python -m export --checkpoint llava-rad --base vicuna-7b-v1.5 --out artifact
  python -m export --checkpoint llava-rad --base vicuna-7b-v1.5 --out artifact --vision fp16
  python -m export --checkpoint llava-rad --base vicuna-7b-v1.5 --out artifact \\
                   --verify-data studies/studies.json

The images named in such a list lie relative to its folder, here studies/; --image-folder says where else.

exit status: 0 done, 1 the export failed (nothing was written), 2 wrong use, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        from export import export_artifact

        settings = ExportSettings(
            decoder_format=options.decoder,
            vision_format=options.vision,
            verify_data=options.verify_data,
            image_folder=options.image_folder,
            verify_studies=options.verify_studies,
            verify_tokens=options.verify_tokens,
            device=options.device,
            overwrite=options.overwrite,
            show_progress=not options.quiet,
        )
        artifact = export_artifact(options.checkpoint, options.base, options.out, settings)
    except LiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: nothing was written to {options.out}", file=sys.stderr)
        return 130
    print(_summary(artifact))
    for left in sorted(options.out.absolute().parent.glob(f".{glob.escape(options.out.name)}.*.partial")):
        print(f"note: {left} is left from an export that was killed: remove it, unless one is running", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    required = parser.add_argument_group("what to read and write")
    required.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the LLaVA-Rad download")
    required.add_argument("--base", type=Path, required=True, metavar="DIR", help="its base language model")
    required.add_argument("--out", type=Path, required=True, metavar="DIR", help="the artifact to make; must not exist")
    required.add_argument("--overwrite", action="store_true", help="replace an artifact that is at --out")
    formats = parser.add_argument_group("formats")
    formats.add_argument(
        "--decoder",
        choices=get_args(DecoderFormat),
        default=DEFAULTS.decoder_format,
        help="the decoder's weights (default: %(default)s)",
    )
    formats.add_argument(
        "--vision",
        choices=get_args(VisionFormat),
        default=DEFAULTS.vision_format,
        help="the vision tower and projector: fp32 for CPUs, fp16 for GPUs, half the bytes (default: %(default)s)",
    )
    parity = parser.add_argument_group("measuring parity with the checkpoint")
    parity.add_argument(
        "--verify-data",
        type=Path,
        metavar="LIST.json",
        help="studies to measure on, a JSON list in LLaVA-Rad's evaluation format (default: a few built-in ones)",
    )
    parity.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="where its images are (default: beside the list)"
    )
    parity.add_argument(
        "--verify-studies",
        type=_positive,
        default=DEFAULTS.verify_studies,
        metavar="N",
        help="how many (default: %(default)s)",
    )
    parity.add_argument(
        "--verify-tokens",
        type=_positive,
        default=DEFAULTS.verify_tokens,
        metavar="N",
        help="findings tokens scored in each (default: %(default)s)",
    )
    parity.add_argument(
        "--device",
        default=DEFAULTS.device,
        help="where to measure: auto (a GPU if there is one), cpu, cuda or cuda:N (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _positive(text: str) -> int:
    """Read an argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        msg = f"got {text!r}, expected a whole number from 1"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _summary(artifact: Artifact) -> str:
    """Return what a user wants to know at the end: sizes, parity, the terms, and what to type next."""
    manifest = artifact.manifest
    vision, decoder, merge = (manifest.fidelity[part] for part in ("vision", "decoder", "merge"))
    sizes: dict[str, int] = {}
    for name, record in manifest.files.items():
        part = name.partition("/")[0]
        sizes[part] = sizes.get(part, 0) + record.bytes
    rows: list[tuple[str, Any]] = [
        (f"vision.onnx ({manifest.vision.format})", _megabytes(sizes["vision.onnx"])),
        (f"decoder/ ({manifest.decoder.format})", _megabytes(sizes["decoder"])),
        ("features", f"smallest cosine {vision['min_cosine']:.6f}, largest difference {vision['max_abs']:.2g}"),
        ("decoder", f"KL {decoder['mean_kl']:.2g} nats/token, same top token {decoder['same_top']:.2%}"),
        (
            "measured on",
            f"{decoder['studies']} studies ({manifest.fidelity['verify_data']}), {decoder['tokens']} tokens",
        ),
        ("merge", f"LoRA scale {merge['lora_scale']:g}, largest rounding {merge['max_abs_rounding']:.2g}"),
    ]
    lines = [f"{artifact.path}: artifact {artifact.id} of {manifest.model}"]
    lines += [f"  {name:<20} {value}" for name, value in rows]
    lines += ["", manifest.notice, "", "next:", f"  python -m lite generate {artifact.path} FILM.png"]
    return "\n".join(lines)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
