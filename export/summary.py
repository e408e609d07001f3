"""What the command line says of a finished export: sizes, parity, the terms, and what to type next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lite.artifact.judgement import judge, judged, warnings_of

if TYPE_CHECKING:
    from lite.artifact.open import Artifact
    from lite.artifact.parts import DecoderPart, OnnxPart, RetrievalPart


def export_summary(artifact: Artifact) -> str:
    """Return what a user wants to know at the end: sizes, parity, the terms, and what to type next."""
    parts = artifact.manifest.parts
    rows = [
        (f"vision.onnx ({parts.vision.format})", _megabytes(parts.vision.nbytes)),
        (f"decoder/ ({parts.decoder.format})", _megabytes(parts.decoder.nbytes + parts.decoder_config.nbytes)),
    ]
    if (vision := parts.vision.fidelity) is not None:
        shown = f"smallest cosine {vision.min_cosine:.6f}, largest difference {vision.max_abs:.2g}"
        rows.append(("features", shown))
    if (fidelity := parts.decoder.fidelity) is not None:
        rows.append(("decoder", str(fidelity.divergence)))
        rows.append(("that is", judged(fidelity).text))
        rows.append(("int8 cache", f"{fidelity.int8_cache} more"))
        tokens = fidelity.divergence.tokens
        rows.append(("measured on", f"{fidelity.divergence.studies} studies ({fidelity.data}), {tokens} tokens"))
    rows += _calibration_rows(parts.decoder)
    if (merge := parts.decoder.merge) is not None:
        rows.append(("merge", f"LoRA scale {merge.lora_scale:g}, largest rounding {merge.max_abs_rounding:.2g}"))
    rows += [*_onnx_rows(parts.decoder_onnx), *_retrieval_rows(parts.retrieval)]
    return _lines(artifact, rows)


def onnx_summary(artifact: Artifact) -> str:
    """Return the same of a `decoder.onnx` that was added."""
    return _lines(artifact, _onnx_rows(artifact.manifest.parts.decoder_onnx), " --engine onnx")


def adapter_summary(artifact: Artifact, name: str) -> str:
    """Return the same of an adapter that was added."""
    part, decoder = artifact.manifest.parts.adapters[name], artifact.manifest.parts.decoder
    own = ", a projector of its own" if part.projector is not None else ""
    corrected = f", {part.correction} of it a correction of the decoder's rounding" if part.correction else ""
    rows = [
        (f"adapter {name}", f"{_megabytes(part.nbytes)}, rank {part.rank}{corrected}{own}"),
        ("trained on", "the base model" if part.on == "base" else "the published model"),
    ]
    if (found := part.fidelity) is not None:
        rows += [
            ("with it", f"{found.divergence}, from the checkpoint with it"),
            ("that is", judge(found.divergence.mean_kl, found.divergence.same_top).text),
            ("without it", f"{found.without}, from the same"),
        ]
        if decoder.fidelity is not None:
            rows.append(("the decoder", f"{decoder.fidelity.divergence}, from the checkpoint as published"))
        rows += [("decoder.onnx", f"{found.onnx}, from decoder/ with it")] if found.onnx is not None else []
        if found.int8_cache is not None:
            rows.append(("its int8 cache", f"{found.int8_cache}, from its float cache"))
        said = f"{found.same_texts:.0%} of {found.texts} are the checkpoint's with it, token for token"
        rows.append(("texts", said if found.texts else "none drafted: on a CPU it takes decoder.onnx"))
        if found.label_f1 is not None:
            without = f", {found.label_f1_without:.3f} without it" if found.label_f1_without is not None else ""
            rows.append(("label F1", f"{found.label_f1:.3f} against the reports{without}"))
        tokens = found.divergence.tokens
        rows.append(("measured on", f"{found.divergence.studies} studies ({found.data}), {tokens} tokens"))
    return _lines(artifact, rows, f" --adapter {name}")


def _lines(artifact: Artifact, rows: list[tuple[str, str]], flags: str = "") -> str:
    lines = [f"{artifact.path}: artifact {artifact.id} of {artifact.manifest.model}"]
    lines += [f"  {name:<20} {value}" for name, value in rows]
    manifest = artifact.manifest
    warnings = [f"warning: {warning}" for warning in warnings_of(manifest, manifest.parts.adapters)]
    lines += ["", *warnings] if warnings else []
    lines += ["", manifest.notice, "", "next:", f"  python -m lite generate {artifact.path} FILM.png{flags}"]
    return "\n".join(lines)


def _calibration_rows(part: DecoderPart) -> list[tuple[str, str]]:
    calibration = part.calibration
    if calibration is None:
        return []
    errors = calibration.errors
    worst = max(errors, key=errors.__getitem__)
    return [
        (
            "calibrated on",
            f"{calibration.studies} studies ({calibration.data}), {calibration.tokens} tokens; an image token counts "
            f"{calibration.token_weights['image']:.2g}, a prompt token {calibration.token_weights['prompt']:.2g}",
        ),
        ("outputs change by", f"{sum(errors.values()) / len(errors):.2%} on average, {errors[worst]:.2%} in {worst}"),
    ]


def _onnx_rows(part: OnnxPart | None) -> list[tuple[str, str]]:
    if part is None:
        return []
    rows = [("decoder.onnx", _megabytes(part.nbytes))]
    if (fidelity := part.fidelity) is not None:
        rows.append(("engine", f"{fidelity.divergence}, from decoder/"))
        rows.append(("that is", judged(fidelity).text))
        cache = fidelity.int8_cache and f"{fidelity.int8_cache}, from its float cache"
        rows.append(("its int8 cache", cache or "none: it takes onnxruntime 1.27 or newer at export"))
        if part.prompts is not None:
            lost = part.prompts.divergence
            what = (
                f"{lost}, from prompts by the stored weights" if lost else "not measured: this CPU adds up too little"
            )
            rows.append(("its int8 prompts", what))
        studies, tokens = fidelity.divergence.studies, fidelity.divergence.tokens
        rows.append(("along", f"the reports of {studies} studies ({fidelity.data}), {tokens} tokens"))
    return rows


def _retrieval_rows(part: RetrievalPart | None) -> list[tuple[str, str]]:
    if part is None:
        return []
    rows = [(f"retrieval ({part.text_format})", f"{_megabytes(part.nbytes)}, beside vision.onnx")]
    if (fidelity := part.fidelity) is not None:
        shown = f"smallest cosine of a film {fidelity.film_cosine:.6f}, of a text {fidelity.text_cosine:.6f}"
        rows.append(("embeddings", f"{shown} ({fidelity.films} films, {fidelity.texts} texts, {fidelity.data})"))
        changed = {
            name: f"{fidelity.source_recall[name]:.3f} to {value:.3f}"
            for name, value in fidelity.recall.items()
            if value != fidelity.source_recall[name]
        }
        shown = ", ".join(f"{name} from {change}" for name, change in changed.items())
        if fidelity.recall:
            rows.append(("recall among these", f"changed: {shown}" if changed else "the checkpoint's"))
    return rows


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
