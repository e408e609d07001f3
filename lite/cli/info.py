"""`python -m lite info ARTIFACT`: say what an artifact is."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Final

from lite.artifact.judgement import judged, warnings_of
from lite.artifact.open import load_artifact
from lite.cli.options import add_artifact
from lite.console import print_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lite.artifact.open import Artifact
    from lite.artifact.parts import Parts

HELP: Final = "say what an artifact is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_artifact(parser)
    parser.add_argument("--verify", action="store_true", help="compare every file with its hash")
    parser.add_argument("--json", action="store_true", help="print the manifest and the id as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    artifact = load_artifact(arguments.artifact)
    if arguments.verify:
        artifact.verify()
    if arguments.json:
        manifest = json.loads(artifact.manifest.to_json())
        print_line(
            json.dumps(
                {"artifact": artifact.id, "verified": arguments.verify, "manifest": manifest}, ensure_ascii=False
            )
        )
        return 0
    for name, value in _summary(artifact):
        print_line(f"{name:<24}{value}")
    if arguments.verify:
        print_line(f"{'verified':<24}all {len(artifact.manifest.files)} files match their hashes")
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
        prompts = "" if part.prompts is None else ", int8 weights for prompts"
        yield "decoder.onnx", f"{part.dtype} activations, {part.lm_head_bits}-bit head, cache in {caches}{prompts}"
    if (towers := manifest.parts.retrieval) is not None:
        yield "retrieval", f"{towers.text_format} text tower, {towers.dim} numbers, {towers.max_tokens} tokens at most"
    yield "size", f"{artifact.nbytes / 2**20:,.1f} MiB in {len(artifact.manifest.files)} files"
    for name, record in manifest.files.items():
        yield "", f"{record.bytes:>14,} bytes  {record.sha256[:16]}…  {name}"
    yield from _adapters(manifest.parts)
    yield from _fidelity(manifest.parts)
    for warning in warnings_of(manifest, manifest.parts.adapters):
        yield "warning", warning
    yield "notice", manifest.notice


def _adapters(parts: Parts) -> Iterator[tuple[str, str]]:
    """Say of each adapter what it is, and what was measured with it."""
    for name, part in parts.adapters.items():
        default = ", used where none is named" if part.is_default else ""
        own = ", a projector of its own" if part.projector is not None else ""
        yield f"adapter {name}", f"rank {part.rank}, trained on the {part.on} model{own}{default}"
        if (found := part.fidelity) is None:
            continue
        along = f"along the reports of {found.divergence.studies} studies ({found.data})"
        yield "  with it", f"{found.divergence} from the checkpoint with it, {along}"
        others = {"  decoder.onnx": found.onnx, "  int8 cache": found.int8_cache}
        yield from ((what, f"{lost} more, with it") for what, lost in others.items() if lost is not None)
        if found.label_f1 is not None:
            without = "" if found.label_f1_without is None else f", {found.label_f1_without:.3f} without it"
            yield "  its texts", f"label F1 {found.label_f1:.3f}{without}"


def _fidelity(parts: Parts) -> Iterator[tuple[str, str]]:
    """Say what was measured at export, of the parts that have been."""
    if (vision := parts.vision.fidelity) is not None:
        yield "fidelity vision", f"smallest cosine {vision.min_cosine:.6f} on {vision.films} films ({vision.data})"
    if parts.retrieval is not None and (found := parts.retrieval.fidelity) is not None:
        cosines = f"smallest cosine {found.film_cosine:.6f} of films, {found.text_cosine:.6f} of texts"
        yield "fidelity retrieval", f"{cosines} ({found.films} films, {found.texts} texts, {found.data})"
    for name, part, source in (
        ("decoder", parts.decoder, "the checkpoint"),
        ("decoder.onnx", parts.decoder_onnx, "decoder/"),
    ):
        if part is None or (fidelity := part.fidelity) is None:
            continue
        along = f"along the reports of {fidelity.divergence.studies} studies ({fidelity.data})"
        yield f"fidelity {name}", f"{fidelity.divergence} from {source}, {along}"
        yield "  that is", judged(fidelity).text
        if fidelity.int8_cache is not None:
            yield "  its int8 cache", f"{fidelity.int8_cache} more"
    if (calibration := parts.decoder.calibration) is not None and (errors := calibration.errors):
        worst = max(errors, key=errors.__getitem__)  # seven for each layer: the manifest has them all
        yield "layers", f"{sum(errors.values()) / len(errors):.2%} on average, {errors[worst]:.2%} in {worst}"
