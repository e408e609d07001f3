"""The command line of the exporter: `python -m export --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
                   --verify-data studies.json --image-folder films

exit status: 0 done, 1 the export failed (nothing was written), 2 wrong use, 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        from export import export_artifact

        artifact = export_artifact(
            options.checkpoint,
            options.base,
            options.out,
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
    except LiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted: nothing was written to {options.out}", file=sys.stderr)
        return 130
    print(_summary(artifact))
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
    formats.add_argument("--decoder", choices=["fp16"], default="fp16", help="the decoder's weights (default: fp16)")
    formats.add_argument(
        "--vision",
        choices=["fp32", "fp16"],
        default="fp32",
        help="the vision tower and projector: fp32 for CPUs, fp16 for GPUs, half the bytes (default: fp32)",
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
    parity.add_argument("--verify-studies", type=_positive, default=4, metavar="N", help="how many (default: 4)")
    parity.add_argument(
        "--verify-tokens", type=_positive, default=64, metavar="N", help="findings tokens scored in each (default: 64)"
    )
    parity.add_argument("--device", default="auto", help="where to measure: auto, cpu or cuda (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        message = f"got {value} · expected at least 1"
        raise argparse.ArgumentTypeError(message)
    return value


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
        ("features", f"cosine {vision['min_cosine']:.6f} or better, largest difference {vision['max_abs']:.2g}"),
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
