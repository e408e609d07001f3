"""What a run of an artifact takes: time by stage, memory by stage, bytes on disk and bytes for a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lite.bench.machine import streaming_read_bandwidth
from lite.bench.results import Latency, MemoryUse, Traffic
from lite.engines.protocol import EngineName
from lite.errors import BackendUnavailable
from lite.eval.figures import Missing, quantiles
from lite.memory.counts import (
    ITEMSIZE,
    adapter_bytes,
    cache_bytes_per_token,
    decode_weight_bytes,
    onnx_adapter_bytes,
    onnx_read_bytes,
)
from lite.memory.process import Peaks, peak_rss_bytes

if TYPE_CHECKING:
    from lite.artifact.open import Artifact
    from lite.model import FindingsModel
    from lite.studies.results import Findings


def latency_of(runs: Sequence[Findings]) -> Latency:
    """Summarise the stages of studies that were run one at a time."""
    timings = [findings.timings for findings in runs]
    stages = {
        stage: quantiles([getattr(timing, f"{stage}_s") for timing in timings])
        for stage in ("image", "vision", "prefill", "ttft", "total")
    }
    # A text of one token has no further one: then nothing was decoded, in no time.
    steps = [step for timing in timings for step in timing.decode_steps_s] or [0.0]
    return Latency(**stages, decode_token=quantiles(steps))


def disk_bytes(artifact: Artifact, engine: EngineName, adapters: Sequence[str] = ()) -> int:
    """Add up the files that an engine reads, which are those that `Artifact.verify` hashes for it."""
    return sum(part.nbytes for part in artifact.manifest.parts.read_by(engine, adapters))


def peak_now(model: FindingsModel) -> Peaks:
    """Return the most memory that the process has taken so far."""
    return Peaks(rss_bytes=peak_rss_bytes(), vram_bytes=model.decoder.peak_vram_bytes())


def counted(peaks: Peaks) -> int:
    """Return what counts: the memory of torch's allocator on a GPU, and else what is resident."""
    return (peaks.rss_bytes if peaks.vram_bytes is None else peaks.vram_bytes) or 0


def memory_use(before: int, loaded: Peaks, first: Findings) -> MemoryUse:
    """Put together what loading and the stages of the first study took."""
    resident, memory = loaded.vram_bytes is None, first.memory
    stages = {f"{stage}_bytes": counted(getattr(memory, stage)) for stage in ("image", "vision", "prefill", "decode")}
    return MemoryUse(
        kind="RSS" if resident else "VRAM",
        before_bytes=before if resident else 0,
        load_bytes=counted(loaded),
        **stages,
    )


def traffic_of(artifact: Artifact, runs: Sequence[Findings], adapters: Sequence[str] = ()) -> Traffic | Missing:
    """Count what a token reads with these adapters loaded, and measure what the memory it is in can deliver."""
    config, part, first = artifact.decoder_config(), artifact.manifest.parts.decoder_onnx, runs[0]
    try:
        # Of a GPU torch asks it, for the onnx engine too: by now no figure is left that torch would change.
        bandwidth = streaming_read_bandwidth(first.device)
    except BackendUnavailable as error:
        return Missing(why="not measured", todo=str(error))
    ranks = [artifact.adapter_part(name).rank for name in adapters]
    if first.engine == "onnx" and part is not None:
        weights = onnx_read_bytes(config, part) + onnx_adapter_bytes(config, ranks, itemsize=ITEMSIZE[part.dtype])
    else:
        itemsize = ITEMSIZE[first.dtype]
        used = [] if first.adapter is None else [max(ranks)]  # of all that are stacked a row reads its own
        weights = decode_weight_bytes(config, itemsize=itemsize) + adapter_bytes(config, used, itemsize=itemsize)
    context = np.median([findings.num_prompt_tokens + findings.num_new_tokens / 2 for findings in runs])
    cache = int(context * cache_bytes_per_token(config, itemsize=ITEMSIZE[first.cache_dtype]))
    token_s = latency_of(runs).decode_token.p50
    achieved = (weights + cache) / token_s if token_s else 0.0
    return Traffic(weight_bytes=weights, cache_bytes=cache, bandwidth=bandwidth, achieved=achieved)


def out_of_memory(error: MemoryError | RuntimeError) -> str:
    """Return what an error says of the memory that there was not; raise it again if it is about something else.

    torch's own error for a full GPU is a RuntimeError, and that for a full CPU nothing but one.
    """
    if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
        raise error
    return str(error).partition("\n")[0] or "out of memory"
