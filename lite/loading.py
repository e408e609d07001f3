"""Loading an artifact: options, what there is, a plan of it, and then exactly that."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Unpack

from lite.artifact.judgement import warnings_of
from lite.artifact.open import load_artifact
from lite.config import IMAGE_TOKEN_ID
from lite.engines.machine import look
from lite.engines.onnx_session import CPU
from lite.engines.options import LoadArguments, LoadOptions, check_names
from lite.engines.plan import RunPlan
from lite.engines.resolve import resolve
from lite.errors import ArtifactError
from lite.image_tokens import check_image_tokens, rotary_positions
from lite.memory.process import release_free_memory
from lite.model import FindingsModel
from lite.prompt import PromptEncoder, Tokenizer
from lite.session.drafting import Drafting, measure_costs
from lite.session.ngrams import read_table, tokenizer_sha256
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lite.artifact.open import Artifact
    from lite.artifact.parts import CacheDtype
    from lite.engines.machine import Machine
    from lite.engines.protocol import Engine


_LOG: Final = logging.getLogger(__name__)


def load(path: str | os.PathLike[str], **options: Unpack[LoadArguments]) -> FindingsModel:
    """Load an artifact.

    Args:
        path: the artifact's folder.
        **options: those of `lite.engines.options.LoadOptions`, which says what each is: engine, device, dtype,
            provider, cache_dtype, prompt_weights, memory_limit, fp16_accumulation, rows, image_tokens,
            image_method, drafts, adapters and verify.

    Raises:
        ArtifactError: the artifact is missing, damaged, newer than this version or inconsistent.
        BackendUnavailable: a package, the device or the provider is not there.
        MemoryBudgetError: one study would take more than `memory_limit`.
        LiteError: there is no such engine, dtype or cache, two options exclude each other, or the table of drafts is of
            another tokenizer.
        TypeError: there is no such option.
    """
    started = time.perf_counter()
    check_names(options, LoadArguments.__annotations__)
    chosen = LoadOptions(**options)
    artifact = as_asked(load_artifact(path), chosen)
    for warning in warnings_of(artifact.manifest, chosen.adapters):
        _LOG.warning("%s: %s", artifact.path, warning)
    tokenizer, prompt = prompt_of(artifact)
    plan = plan_run(artifact, prompt, chosen, look(chosen, artifact))
    if chosen.verify:
        artifact.verify(engine=plan.engine, adapters=plan.adapters)
    texts = _texts(artifact, plan)
    # Before the tower: on a GPU it wants memory in one piece.
    decoder = _decoder(artifact, plan, _positions(artifact, prompt))
    vision = VisionEncoder(artifact, provider=plan.vision_provider, adapters=plan.adapters)
    fallbacks, drafting = plan.fallbacks, None
    if plan.drafts != "off":
        drafting = Drafting(measure_costs(decoder, plan.max_seq_len), eos_token_id=tokenizer.eos_token_id, texts=texts)
        _LOG.info("a step of so many tokens takes, of one token's time: %s", drafting.costs)
    release_free_memory()
    if vision.provider == CPU != plan.vision_provider:
        fallbacks += (f"the tower on the CPU: {plan.vision_provider} does not start",)
    choices = "; ".join(f"{name} {choice}, {why}" for name, (choice, why) in plan.choices.items())
    _LOG.info("loaded %s in %.1f s: %s", artifact.path, time.perf_counter() - started, choices)
    for fallback in fallbacks:
        _LOG.info("slower than it has to be: %s", fallback)
    return FindingsModel(
        artifact=artifact,
        tokenizer=tokenizer,
        prompt=prompt,
        vision=vision,
        decoder=decoder,
        plan=plan,
        drafting=drafting,
        fallbacks=fallbacks,
    )


def as_asked(artifact: Artifact, options: LoadOptions) -> Artifact:
    """Return the artifact with as many image tokens as were asked for: all that follows reads them there.

    Raises:
        LiteError: it cannot give as many.
    """
    part = check_image_tokens(artifact.manifest.parts.vision, options.image_tokens, options.image_method)
    return artifact.with_parts(vision=part)


def prompt_of(artifact: Artifact) -> tuple[Tokenizer, PromptEncoder]:
    """Load what makes a prompt.

    Raises:
        ArtifactError: it cannot be used, or the parts of the artifact do not fit together.
    """
    manifest, config = artifact.manifest, artifact.decoder_config()
    tokenizer = Tokenizer(artifact.file(manifest.parts.tokenizer.file), manifest.decoding)
    _check_parts_fit(artifact, tokenizer.vocab_size)
    prompt = PromptEncoder(
        tokenizer,
        manifest.prompt,
        num_image_tokens=manifest.parts.vision.num_image_tokens,
        max_seq_len=config.max_position_embeddings,
    )
    return tokenizer, prompt


def plan_run(artifact: Artifact, prompt: PromptEncoder, options: LoadOptions, machine: Machine) -> RunPlan:
    """Resolve for the artifact's own prompt."""
    return resolve(options, artifact, machine, num_prompt_tokens=prompt.num_tokens(prompt.encode(None)))


def _positions(artifact: Artifact, prompt: PromptEncoder) -> NDArray[np.float64] | None:
    """Return what positions the places of a row stand for: all prompts have the same words before the image."""
    image_start = prompt.encode(None).index(IMAGE_TOKEN_ID)
    places = artifact.decoder_config().max_position_embeddings
    return rotary_positions(artifact.manifest.parts.vision, image_start, places)


def _texts(artifact: Artifact, plan: RunPlan) -> NDArray[np.uint16] | None:
    """Read the table that drafts are made from, if there is one, before anything large is loaded."""
    if plan.drafts in ("off", "auto"):
        return None
    manifest = artifact.manifest
    return read_table(
        Path(plan.drafts),
        tokenizer_sha256=tokenizer_sha256(artifact),
        vocab_size=artifact.decoder_config().vocab_size,
        eos_token_id=manifest.decoding.eos_token_id,
    )


def _decoder(artifact: Artifact, plan: RunPlan, positions: NDArray[np.float64] | None) -> Engine[Any, Any]:
    """Load the decoder as planned."""
    cache_dtype: CacheDtype | None = "int8" if plan.cache_dtype == "int8" else None
    if plan.engine == "onnx":
        from lite.engines.onnx_engine.decoder import OnnxDecoder

        return OnnxDecoder(
            artifact,
            provider=plan.provider or CPU,
            cache_dtype=cache_dtype,
            positions=positions,
            two_rows=plan.drafts != "off",
            int8_prompts=plan.workload.int8_prompts,
            adapters=plan.adapters,
        )
    from lite.engines.torch_engine.load import load_decoder

    return load_decoder(
        artifact,
        device=plan.device,
        dtype=plan.dtype,
        cache_dtype=cache_dtype,
        chunk_size=plan.chunk_size,
        fp16_accumulation=plan.fp16_accumulation,
        positions=positions,
        adapters=plan.adapters,
    )


def _check_parts_fit(artifact: Artifact, tokenizer_vocab_size: int) -> None:
    """Refuse an artifact whose parts do not belong together, now rather than at some token."""
    manifest, config = artifact.manifest, artifact.decoder_config()
    vision = manifest.parts.vision
    stored_as = config.quantization.format if config.quantization else "fp16"
    for got, fits, expected in (
        (f"a decoder of {manifest.parts.decoder.format} by the manifest", manifest.parts.decoder.format == stored_as,
         f"{stored_as}, as its config.json says"),
        (f"image features of width {vision.hidden_size}", vision.hidden_size == config.hidden_size,
         f"the decoder's hidden_size {config.hidden_size}"),
        (f"preprocessing to {manifest.preprocessing.image_size} pixels",
         manifest.preprocessing.image_size == vision.image_size, f"the tower's image_size {vision.image_size}"),
        (f"a tokenizer of {tokenizer_vocab_size} pieces", tokenizer_vocab_size <= config.vocab_size,
         f"at most the decoder's vocab_size {config.vocab_size}"),
        (f"{vision.num_image_tokens} image tokens", 0 < vision.num_image_tokens < config.max_position_embeddings,
         f"fewer than the decoder's max_position_embeddings {config.max_position_embeddings}"),
    ):  # fmt: skip
        if not fits:
            msg = f"{artifact.path}: got {got} · expected {expected} · the parts do not belong together: export again"
            raise ArtifactError(msg)
