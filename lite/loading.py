"""Loading an artifact: its parts are checked, an engine is chosen, and memory is planned before anything is read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lite.artifact.open import load_artifact
from lite.engines.choose import choose_engine, gpu_problem
from lite.engines.onnx_session import CPU, CUDA
from lite.errors import ArtifactError, LiteError
from lite.memory.plan import REASON_TOKENS, Planner
from lite.memory.process import rss_bytes
from lite.memory.sizes import parse_bytes
from lite.prompt import PromptEncoder, Tokenizer

if TYPE_CHECKING:
    from lite.artifact.open import Artifact
    from lite.artifact.parts import CacheDtype
    from lite.engines.protocol import Engine
    from lite.vision import VisionEncoder
from lite.model import FindingsModel


def load(
    path: str | os.PathLike[str],
    *,
    engine: str = "auto",
    device: str = "auto",
    dtype: str | None = None,
    provider: str | None = None,
    cache_dtype: CacheDtype | None = None,
    memory_limit: int | str | None = None,
    fp16_accumulation: bool = False,
    rows: int = 8,
    verify: bool = True,
) -> FindingsModel:
    """Load an artifact.

    Args:
        path: the artifact's folder.
        engine: "torch" computes `decoder/`; "onnx" computes `decoder.onnx`, without torch. "auto" takes onnx where the
            artifact has it and there is no GPU for torch, or no torch (see `lite.engines.choose`).
        device: "auto" (an NVIDIA GPU if torch sees one, or the CPU), "cpu", "cuda" or "cuda:N".
        dtype: what torch computes the decoder in: "float32", "float16" or "bfloat16". None takes the stored dtype on a
            GPU and float32 on the CPU: twice the memory of float16, and far less time where 16-bit products are slow
            (see `lite.engines.torch_engine.decoder.load_decoder`).
        provider: what ONNX Runtime computes with, tower and decoder: a name of its own such as "CUDAExecutionProvider",
            or cpu, cuda; "cuda:1" for the second GPU. None takes the CPU for the decoder, and for the tower CUDA
            where `device` is a GPU and this ONNX Runtime has it.
        cache_dtype: what keys and values are kept in: "int8", or what the decoder computes in. None takes the latter,
            or int8 where only that fits the memory and loses no more than `MAX_CACHE_KL`, as measured at export.
        memory_limit: bytes, or text such as "12GiB": refuse, before anything is loaded, an artifact with which one
            study at a time would take more, and run as many at a time as fit. On a GPU all that the model has there
            counts, and None takes what is free; on a CPU what the process has resident, with all that it holds
            already, and None sets no limit. See `lite.memory`.
        fp16_accumulation: let a GPU add up in float16 where a prompt is read: faster on GeForce cards, and less exact.
        rows: studies that can be under way at a time, if they fit.
        verify: compare the sha256 of the files that will be read with the manifest first: 12 s for the 14 GB of a 7B
            model at the 1.2 GB/s that hashing alone reached (one core of an AMD EPYC, November 2026), longer where the
            disk is slower.

    Raises:
        ArtifactError: the artifact is missing, damaged, newer than this version or inconsistent.
        BackendUnavailable: a package, the device or the provider is not there.
        MemoryBudgetError: one study would take more than `memory_limit`.
        LiteError: there is no such engine, dtype or cache.
    """
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    artifact = load_artifact(path)
    chosen = choose_engine(artifact, engine, device=device, dtype=dtype, provider=provider)
    if fp16_accumulation and chosen != "torch":
        msg = "got fp16_accumulation for the onnx engine · expected it for torch on a GPU only · leave it out"
        raise LiteError(msg)
    if verify:
        artifact.verify(engine=chosen)
    manifest, config = artifact.manifest, artifact.decoder_config()
    tokenizer = Tokenizer(artifact.file(manifest.parts.tokenizer.file), manifest.decoding)
    _check_parts_fit(artifact, tokenizer.vocab_size)
    prompt = PromptEncoder(
        tokenizer,
        manifest.prompt,
        num_image_tokens=manifest.parts.vision.num_image_tokens,
        max_seq_len=config.max_position_embeddings,
    )
    loaded = (
        _load_onnx(artifact, provider, cache_dtype, limit)
        if chosen == "onnx"
        else _load_torch(artifact, device, dtype, cache_dtype, limit, fp16_accumulation=fp16_accumulation)
    )
    vision, decoder, planner = loaded
    fallbacks: list[str] = []
    if device == "auto" and provider is None and (problem := gpu_problem()) is not None:
        fallbacks.append(f"the CPU in place of the GPU that is there: {problem}")
    if str(decoder.device).startswith("cuda") and vision.provider == CPU:
        fallbacks.append("the tower on the CPU: this ONNX Runtime has no CUDA provider, or it does not start")
    return FindingsModel(
        artifact,
        tokenizer=tokenizer,
        prompt=prompt,
        vision=vision,
        decoder=decoder,
        num_rows=rows if planner is None else planner.rows_that_fit(rows, manifest.decoding.max_new_tokens),
        max_seq_len=_row_len(prompt, manifest.decoding.max_new_tokens),
        fits=lambda num_rows, max_seq_len: planner is None or planner.fits_rows(num_rows, max_seq_len),
        fallbacks=tuple(fallbacks),
    )


def _row_len(prompt: PromptEncoder, max_new_tokens: int) -> int:
    """Return the places of a row that most studies fit into: the prompt, a reason, the text."""
    num_prompt_tokens: int = prompt.num_tokens(prompt.encode(None)) + REASON_TOKENS
    return min(num_prompt_tokens + max_new_tokens, prompt.max_seq_len)


def _load_torch(
    artifact: Artifact,
    device: str,
    dtype: str | None,
    cache_dtype: CacheDtype | None,
    limit: int | None,
    *,
    fp16_accumulation: bool,
) -> tuple[VisionEncoder, Engine[Any, Any], Planner | None]:
    # torch first: onnxruntime then finds the CUDA libraries that torch has brought.
    from lite.engines.onnx_session import provider_of_device
    from lite.engines.torch_engine.device import check_cache_dtype, check_device, check_dtype, free_bytes
    from lite.engines.torch_engine.load import load_decoder
    from lite.vision import VisionEncoder

    check_dtype(dtype)
    target = check_device(device)
    check_cache_dtype(artifact, cache_dtype, device=target, dtype=dtype)
    on_gpu = target.startswith("cuda")
    if fp16_accumulation and not on_gpu:
        raise LiteError(f"got fp16_accumulation on {target} · expected it for a GPU only · leave it out")
    planner = None
    if on_gpu or limit is not None:
        planner = Planner.choose(
            artifact,
            device=target,
            dtype=dtype,
            cache_dtype=cache_dtype,
            limit=free_bytes(target) if limit is None else limit,
            tower_on_gpu=on_gpu and provider_of_device(target).startswith(CUDA),
            libraries_bytes=rss_bytes() or 0,
        )
    decoder = load_decoder(
        artifact,
        device=target,
        dtype=dtype,
        cache_dtype=cache_dtype if planner is None else planner.cache_dtype,
        chunk_size=None if planner is None else planner.chunk_size,
        fp16_accumulation=fp16_accumulation,
    )
    return VisionEncoder(artifact, device=target), decoder, planner


def _load_onnx(
    artifact: Artifact, provider: str | None, cache_dtype: CacheDtype | None, limit: int | None
) -> tuple[VisionEncoder, Engine[Any, Any], Planner | None]:
    from lite.engines.onnx_engine.decoder import OnnxDecoder, check_cache_dtype
    from lite.engines.onnx_session import check_provider
    from lite.vision import VisionEncoder

    check_cache_dtype(artifact, cache_dtype)
    chosen = check_provider("cpu" if provider is None else provider)
    if limit is not None and chosen != CPU:
        msg = f"got a memory limit with provider {provider!r} · expected the CPU, of whose memory alone there is a plan"
        raise LiteError(f"{msg} · leave the limit out")
    planner = None
    if limit is not None:
        planner = Planner.choose(
            artifact,
            device="cpu",
            engine="onnx",
            cache_dtype=cache_dtype,
            limit=limit,
            libraries_bytes=rss_bytes() or 0,
        )
        cache_dtype = planner.cache_dtype
    vision = VisionEncoder(artifact, provider=chosen)
    return vision, OnnxDecoder(artifact, provider=chosen, cache_dtype=cache_dtype), planner


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
