"""The command line: `python -m lite generate ARTIFACT IMAGE...` and `python -m lite info ARTIFACT`.

Text goes to stdout and everything else to stderr. Exit status: 0 all went well, 1 something failed (each failure is
one line on stderr), 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from lite._version import __version__
from lite.artifact.open import load_artifact
from lite.artifact.parts import CacheDtype, Parts
from lite.console import EXIT_FAILED, positive, run_command, say
from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lite.artifact.open import Artifact
    from lite.model import FindingsModel
    from lite.session.draft import Draft
    from lite.studies.results import Findings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lite",
        description="Draft the findings of frontal chest X-rays with an exported LLaVA-Rad artifact. "
        "A research tool: not for clinical use.",
    )
    parser.add_argument("--version", action="version", version=f"llava-rad-lite {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_info(commands)
    return parser


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="draft the findings of one or more films",
        description="Draft the findings of one or more films. The text is printed as it is made.",
        epilog='example: python -m lite generate artifact film.dcm --reason "Cough and fever for three days."',
    )
    generate.set_defaults(run=_generate)
    generate.add_argument("artifact", metavar="ARTIFACT", help="the folder written by `python -m export`")
    generate.add_argument("images", metavar="IMAGE", nargs="+", help="frontal films: PNG, JPEG, DICOM …")
    question = generate.add_mutually_exclusive_group()
    question.add_argument("--reason", metavar="TEXT", help="the reason for the exam, used for every film")
    question.add_argument("--query", metavar="TEXT", help="ask this instead of the question the model was trained with")
    generate.add_argument("--json", action="store_true", help="print one JSON object per film, one per line")
    generate.add_argument(
        "--batch-size",
        metavar="N",
        type=positive,
        default=1,
        help="films that go through the decoder together: faster, more memory, text only when all are done (default 1)",
    )
    generate.add_argument(
        "--max-new-tokens", metavar="N", type=positive, help="stop after N tokens (default: the artifact's)"
    )
    generate.add_argument(
        "--engine",
        choices=["auto", "torch", "onnx"],
        default="auto",
        help="what computes the decoder: torch, or ONNX Runtime alone (default auto: onnx where the artifact has "
        "decoder.onnx and there is no GPU, or no torch)",
    )
    generate.add_argument(
        "--provider",
        metavar="NAME",
        help="what ONNX Runtime computes with: cpu, cuda or its own name for it (default: the CPU)",
    )
    generate.add_argument(
        "--cache-dtype",
        choices=get_args(CacheDtype),
        help="what keys and values are kept in: int8, or what the decoder computes in (default: the latter, unless "
        "only int8 fits the memory)",
    )
    generate.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="take no more than that, such as 12GiB, or refuse before anything is loaded (default: what a GPU has "
        "free; no limit on a CPU)",
    )
    generate.add_argument(
        "--fp16-accumulation",
        action="store_true",
        help="let a GPU add up in float16 where a prompt is read: faster on GeForce cards, and less exact",
    )
    generate.add_argument(
        "--device", metavar="DEVICE", default="auto", help="auto, cpu, cuda or cuda:N (default auto: a GPU if there is)"
    )
    generate.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="have torch compute the decoder in this (default: the stored one on a GPU, float32 on the CPU)",
    )
    generate.add_argument(
        "--rendering",
        choices=["mimic-cxr-jpg", "voi-lut"],
        default="mimic-cxr-jpg",
        help="how DICOM values become grey levels: the way of the training films, or the file's own window "
        "(default mimic-cxr-jpg)",
    )
    generate.add_argument(
        "--no-verify", action="store_true", help="do not compare the artifact's files with their hashes first"
    )


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    info = commands.add_parser("info", help="say what an artifact is", description="Say what an artifact is.")
    info.set_defaults(run=_info)
    info.add_argument("artifact", metavar="ARTIFACT", help="the folder written by `python -m export`")
    info.add_argument("--verify", action="store_true", help="compare every file with its hash")
    info.add_argument("--json", action="store_true", help="print the manifest and the id as one JSON object")


def _generate(arguments: argparse.Namespace) -> int:
    from lite.loading import load

    model = load(
        arguments.artifact,
        engine=arguments.engine,
        device=arguments.device,
        dtype=arguments.dtype,
        provider=arguments.provider,
        cache_dtype=arguments.cache_dtype,
        memory_limit=arguments.memory_limit,
        fp16_accumulation=arguments.fp16_accumulation,
        rows=arguments.batch_size,
        verify=not arguments.no_verify,
    )
    # One reason for all films: if it cannot be used, say so once and not for each film.
    model.prompt.encode(arguments.reason, query=arguments.query)
    if arguments.json:
        return _print_json(model, arguments)
    say(f"note: {model.notice}")
    if arguments.batch_size == 1:
        return _print_streams(model, arguments)
    return _print_texts(model, arguments)


def _print_streams(model: FindingsModel, arguments: argparse.Namespace) -> int:
    """Print the text of each film as it is made."""
    status, noted = 0, frozenset[str]()
    for image in arguments.images:
        try:
            stream = model.stream(
                image,
                arguments.reason,
                query=arguments.query,
                max_new_tokens=arguments.max_new_tokens,
                rendering=arguments.rendering,
            )
            _print_heading(image, arguments)
            _print_pieces(stream)
        except LiteError as error:
            status = _report(image, error)
            continue
        _note_cut(stream.findings)
        noted = _note_fallbacks(stream.findings, noted)
    return status


def _print_pieces(stream: Draft) -> None:
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:  # also when it fails or is interrupted: what follows begins on a line of its own
        _print("")


def _print_texts(model: FindingsModel, arguments: argparse.Namespace) -> int:
    """Print each film's text when it is done."""
    status, noted = 0, frozenset[str]()
    for image, result in _results(model, arguments):
        if isinstance(result, LiteError):
            status = _report(image, result)
            continue
        _print_heading(image, arguments)
        _print(result.text)
        _note_cut(result)
        noted = _note_fallbacks(result, noted)
    return status


def _print_json(model: FindingsModel, arguments: argparse.Namespace) -> int:
    """Print one JSON object per film."""
    status = 0
    for image, result in _results(model, arguments):
        if isinstance(result, LiteError):
            status = _report(image, result)
            _print(json.dumps({"image": image, "error": str(result), "notice": model.notice}))
        else:
            _print(json.dumps({"image": image, **_findings_json(result)}))
    return status


def _results(model: FindingsModel, arguments: argparse.Namespace) -> Iterator[tuple[str, Findings | LiteError]]:
    """Yield each film's path with its findings or what is wrong with it, in order."""
    from lite.studies.results import StudyError
    from lite.studies.study import Study

    results = model.findings_batch(
        [Study(image, arguments.reason, arguments.query) for image in arguments.images],
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        rendering=arguments.rendering,
    )
    for image, result in zip(arguments.images, results, strict=True):
        yield image, result.error if isinstance(result, StudyError) else result


def _findings_json(findings: Findings) -> dict[str, Any]:
    """Return what `--json` prints of a study, beside its path."""
    names = ("image_s", "vision_s", "prefill_s", "decode_s", "ttft_s", "total_s", "batch_size")
    timings = {name: getattr(findings.timings, name) for name in names}
    memory = {name: getattr(findings.memory, name) for name in ("peak_rss_bytes", "peak_vram_bytes", "cache_bytes")}
    return {
        "text": findings.text,
        "finish_reason": findings.finish_reason,
        "num_prompt_tokens": findings.num_prompt_tokens,
        "num_new_tokens": findings.num_new_tokens,
        "timings": {name: round(value, 6) for name, value in timings.items()},
        "memory": memory,
        "artifact": findings.artifact_id,
        "engine": findings.engine,
        "device": findings.device,
        "dtype": findings.dtype,
        "cache_dtype": findings.cache_dtype,
        "provider": findings.provider,
        "backend": findings.backend,
        "fallbacks": list(findings.fallbacks),
        "rendering": findings.rendering,
        "notice": findings.notice,
    }


def _info(arguments: argparse.Namespace) -> int:
    artifact = load_artifact(arguments.artifact)
    if arguments.verify:
        artifact.verify()
    if arguments.json:
        manifest = json.loads(artifact.manifest.to_json())
        _print(json.dumps({"artifact": artifact.id, "verified": arguments.verify, "manifest": manifest}))
        return 0
    for name, value in _summary(artifact):
        _print(f"{name:<24}{value}")
    if arguments.verify:
        _print(f"{'verified':<24}all {len(artifact.manifest.files)} files match their hashes")
    return 0


def _summary(artifact: Artifact) -> Iterator[tuple[str, str]]:
    manifest, config = artifact.manifest, artifact.decoder_config()
    vision = manifest.parts.vision
    yield "model", manifest.model
    yield "artifact", f"{artifact.id} (format {manifest.format_version}, by {manifest.created_by})"
    yield "vision", f"{vision.format}, {vision.image_size} px, {vision.num_image_tokens} image tokens"
    yield (
        "decoder",
        f"{manifest.parts.decoder.describe()}, {config.num_hidden_layers} layers, hidden_size {config.hidden_size}, "
        f"vocab_size {config.vocab_size}, context {config.max_position_embeddings}",
    )
    if manifest.parts.decoder_onnx is not None:
        part = manifest.parts.decoder_onnx
        caches = " or ".join(part.cache_dtypes)
        yield "decoder.onnx", f"{part.dtype} activations, {part.lm_head_bits}-bit head, cache in {caches}"
    yield "size", f"{artifact.nbytes / 2**20:,.1f} MiB in {len(artifact.manifest.files)} files"
    for name, record in manifest.files.items():
        yield "", f"{record.bytes:>14,} bytes  {record.sha256[:16]}…  {name}"
    yield from _fidelity(manifest.parts)
    yield "notice", manifest.notice


def _fidelity(parts: Parts) -> Iterator[tuple[str, str]]:
    """Say what was measured at export, of the parts that have been."""
    if (vision := parts.vision.fidelity) is not None:
        yield "fidelity vision", f"smallest cosine {vision.min_cosine:.6f} on {vision.films} films ({vision.data})"
    for name, part, source in (
        ("decoder", parts.decoder, "the checkpoint"),
        ("decoder.onnx", parts.decoder_onnx, "decoder/"),
    ):
        if part is None or (fidelity := part.fidelity) is None:
            continue
        along = f"along the reports of {fidelity.divergence.studies} studies ({fidelity.data})"
        yield f"fidelity {name}", f"{fidelity.divergence} from {source}, {along}"
        if fidelity.int8_cache is not None:
            yield "  its int8 cache", f"{fidelity.int8_cache} more"
    if (calibration := parts.decoder.calibration) is not None and (errors := calibration.errors):
        worst = max(errors, key=errors.__getitem__)  # seven for each layer: the manifest has them all
        yield "layers", f"{sum(errors.values()) / len(errors):.2%} on average, {errors[worst]:.2%} in {worst}"


def _print_heading(image: str, arguments: argparse.Namespace) -> None:
    """Name the film when there are several."""
    if len(arguments.images) > 1:
        _print(f"== {image}")


def _note_cut(findings: Findings | None) -> None:
    if findings is not None and findings.finish_reason == "length":
        say(f"note: the text was cut after {findings.num_new_tokens} tokens (--max-new-tokens, or the context is full)")


def _note_fallbacks(findings: Findings | None, noted: frozenset[str]) -> frozenset[str]:
    """Say what is slower than it has to be, each thing once; return what has been said."""
    found = findings.fallbacks if findings is not None else ()
    for fallback in found:
        if fallback not in noted:
            say(f"note: {fallback}")
    return noted.union(found)


def _report(image: str, error: LiteError) -> int:
    """Say on one line what is wrong with a film; return the exit status it leads to."""
    text = str(error)
    named = text.startswith((f"{image}:", f"{Path(image)}:"))
    say(f"error: {text if named else f'{image}: {text}'}")
    return EXIT_FAILED


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
