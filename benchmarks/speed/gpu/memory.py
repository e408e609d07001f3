"""The memory plan beside what torch's allocator has held: does `lite.memory` foretell it?

The plan is that of an artifact with the same decoder; what loading takes is left out, as nothing is loaded here.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from benchmarks.speed.gpu import model
from lite.artifact.manifest import Manifest
from lite.artifact.open import Artifact
from lite.artifact.parts import (
    UNHASHED,
    DecoderConfigPart,
    DecoderPart,
    FileRecord,
    Parts,
    TokenizerPart,
    TowerShape,
    VisionPart,
    unhashed,
)
from lite.config import Preprocessing
from lite.errors import MemoryBudgetError
from lite.memory.plan import plan_memory

if TYPE_CHECKING:
    from benchmarks.speed.gpu.rig import Report, Rig
    from lite.artifact.parts import CacheDtype
    from lite.memory.plan import MemoryPlan

HEADER: Final = ("rows", "cache", "planned GB", "held GB", "plan is off by")
_ROWS: Final = (1, 8)
_NEW_TOKENS: Final = 100
_DECODED: Final = 4
_TOWER_BYTES: Final = 400_000_000  # of a file that is not there; on a GPU the tower is not in the plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Planned and held."""

    rows: int
    cache: str
    planned_bytes: int
    held_bytes: int

    @property
    def error(self) -> float:
        """How much larger the plan is than what was held, as a share of it."""
        return self.planned_bytes / self.held_bytes - 1

    def cells(self) -> tuple[str, ...]:
        """Return a line of the table."""
        return (
            str(self.rows),
            self.cache,
            f"{self.planned_bytes / 1e9:.3f}",
            f"{self.held_bytes / 1e9:.3f}",
            f"{self.error:+.1%}",
        )


def measure(rig: Rig, report: Report) -> None:
    """Draft with one row and with eight, with either cache, and read the allocator's peak."""
    report.header, report.left = HEADER, 2
    report.figures |= {"rows": []}
    report.notes.append(
        f"Prompts of {rig.setting.prompt_tokens} tokens and room for {_NEW_TOKENS} more, int4. Peaks of torch's "
        "allocator: what CUDA and the kernels' code take is not in them."
    )
    cache_dtypes: tuple[CacheDtype | None, ...] = (None, "int8")
    for rows in _ROWS:
        for cache_dtype in cache_dtypes:
            planned = plan(rig, rows, cache_dtype)
            expected = planned.weight_bytes + planned.study_bytes
            name = cache_dtype or "float16"
            try:
                held = held_bytes(rig, rows, cache_dtype)
            except MemoryBudgetError as error:
                report.cells.append((str(rows), name, f"{expected / 1e9:.3f}", "–", "–"))
                report.notes.append(f"{rows} rows, {name} cache: {error}.")
                continue
            row = Row(rows=rows, cache=name, planned_bytes=expected, held_bytes=held)
            report.cells.append(row.cells())
            report.figures["rows"].append(asdict(row) | {"error": row.error, "plan": asdict(planned)})


def plan(rig: Rig, rows: int, cache_dtype: CacheDtype | None) -> MemoryPlan:
    """Plan the memory of an artifact with the int4 decoder: of it only what a plan reads is there, for a moment."""
    setting, shapes = rig.setting, rig.setting.shapes
    manifest = Manifest(
        model="random weights, for a measurement",
        created_by="benchmarks speed gpu",
        sources={},
        preprocessing=Preprocessing(image_size=518),
        parts=Parts(
            tokenizer=TokenizerPart(files=unhashed("tokenizer.model")),
            vision=VisionPart(
                files={"vision.onnx": FileRecord(bytes=_TOWER_BYTES, sha256=UNHASHED)},
                format="fp32",
                image_size=518,
                num_image_tokens=1369,
                hidden_size=shapes.hidden_size,
                tower=TowerShape(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
            ),
            decoder_config=DecoderConfigPart(files=unhashed("decoder/config.json")),
            decoder=DecoderPart(files={}, weights=(), format="gptq-int4", group_size=128, method="rtn"),
        ),
    )
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        (Path(folder) / "decoder").mkdir()
        text = json.dumps(model.config_json(shapes, setting.layers, 4))
        (Path(folder) / "decoder" / "config.json").write_text(text, encoding="utf-8")
        return plan_memory(
            Artifact(path=Path(folder), manifest=manifest, id="0" * 16),
            device=str(rig.device),
            cache_dtype=cache_dtype,
            batch_size=rows,
            num_prompt_tokens=setting.prompt_tokens,
            max_new_tokens=_NEW_TOKENS,
            chunk_size=max(setting.chunk_sizes),
        )


def held_bytes(rig: Rig, rows: int, cache_dtype: CacheDtype | None) -> int:
    """Prefill and decode; return the peak of torch's allocator, or on a CPU what the tensors take that stay.

    Raises:
        MemoryBudgetError: it does not fit.
    """
    decoder = model.part_of(rig.decoder(), cache_dtype=cache_dtype, capture=rig.capture)
    decoder.chunk_size = max(rig.setting.chunk_sizes)
    prompt = model.random_prompt(decoder.config, rig.setting.prompt_tokens, rig.device)
    rig.tidy()
    on_gpu = rig.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(rig.device)
        torch.cuda.reset_peak_memory_stats(rig.device)
    cache = decoder.new_cache(rows, prompt.num_tokens + _NEW_TOKENS)
    for row in range(rows):
        decoder.prefill(prompt.input_ids, prompt.features, cache, row)
    for _ in range(_DECODED):
        decoder.decode_one_token(cache)
    cache.newest().tolist()
    if on_gpu:
        return torch.cuda.max_memory_allocated(rig.device)
    return decoder.nbytes + cache.nbytes
