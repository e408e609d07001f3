"""A bench of a 7B model on a 24 GB card, written by hand, for the tests of its report."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from benchmarks.phantom.write import write_studies
from lite.artifact.manifest import NOTICE
from lite.bench.report import render_report
from lite.bench.results import (
    Bench,
    Draft,
    FailedRow,
    Latency,
    MemoryUse,
    ModelledTable,
    NotRun,
    Provenance,
    RecordQuality,
    ReportQuality,
    Row,
    StudyShown,
    Throughput,
    Traffic,
)
from lite.eval.divergence import DivergenceSummary
from lite.eval.figures import Estimate, Missing, Quantiles
from lite.files import write_whole
from lite.memory.plan import MemoryPlan
from lite.studies.sources.listed import read_studies

SCRIPT = "<script>alert(1)</script>"
NOT_INSTALLED = Missing(why="not installed", todo="pip install radgraph, then run this again.")
NO_RECORD = Missing(why="other tokenizer", todo="Record a reference with this artifact's tokenizer.")
MODELLED = ModelledTable(
    caption="int4 at its best",
    header=("modelled on", "prefill", "token", "tokens/s", "memory", "fits"),
    rows=(
        ("RTX 3060 12GB", "~1.62 s", "~19.4 ms", "~51.5 tok/s", "~5.93 GiB", "yes"),
        ("V100 16GB", "~0.37 s", "~7.76 ms", "~129 tok/s", "~5.93 GiB", "yes"),
    ),
    note="Each stage at 60 % of the card's bandwidth or 50 % of its peak.",
    figures=[],
)


def about(seconds: float, count: int = 24) -> Quantiles:
    shares = {"p20": 0.97, "p50": 1.0, "p80": 1.06, "p90": 1.09, "p99": 1.31}
    return Quantiles(**{name: share * seconds for name, share in shares.items()}, count=count)


def estimate(value: float, spread: float = 0.1, count: int = 24) -> Estimate:
    return Estimate(value=value, low=max(0.0, value * (1 - spread)), high=value * (1 + spread), count=count)


def share(value: float, spread: float) -> Estimate:
    return Estimate(value=value, low=max(0.0, value - spread), high=min(1.0, value + spread), count=24)


PLACES = {"side_accuracy": 0.95, "zone_accuracy": 0.9, "size_accuracy": 0.8}


def record_quality(kl: float, *, same_top: float, ratio: float, same_text: float) -> RecordQuality:
    never = Estimate(value=math.nan, low=math.nan, high=math.nan, count=0)
    divergence = DivergenceSummary(
        num_studies=24,
        num_tokens=2311,
        mean_kl=estimate(kl, 0.3, 2311),
        median_kl=estimate(kl / 40, 0.5, 2311),
        p99_kl=estimate(kl * 25, 0.4, 2311),
        same_top=Estimate(value=same_top, low=same_top - 0.4 * (1 - same_top), high=1, count=2311),
        perplexity_ratio=estimate(ratio, 0.002, 2311),
        without_divergence=share(same_text, 0.2),
        first_divergent_token=never if same_text == 1 else Estimate(value=31, low=12, high=57, count=9),
    )
    texts = {"rouge_l": 0.5, "bleu_1": 0.5, "bleu_4": 0.4, "label_f1_micro": 0.9, "label_f1_macro": 0.88, **PLACES}
    figures = {name: share(least + (1 - least) * same_text, 0.03) for name, least in texts.items()}
    return RecordQuality(divergence=divergence, kl_gap_limit=kl / 20, same_text=share(same_text, 0.2), **figures)


def report_quality(f1: float) -> ReportQuality:
    texts = {
        "rouge_l": 0.306,
        "bleu_1": 0.381,
        "bleu_4": 0.154,
        "label_f1_micro": f1,
        "label_f1_macro": f1 - 0.18,
        **PLACES,
    }
    figures = {name: estimate(value, 0.08) for name, value in texts.items()}
    return ReportQuality(radgraph_f1=NOT_INSTALLED, chexbert=NOT_INSTALLED, **figures)


def memory(weights: int) -> dict[str, Any]:
    """What is planned, and what was taken, of weights of so many bytes."""
    plan = MemoryPlan(
        num_rows=1,
        max_seq_len=1632,
        resident_bytes=0,
        decoder_bytes=weights,
        vision_bytes=180_000_000,
        cache_bytes=856_000_000,
        load_work_bytes=0,
        vision_work_bytes=210_000_000,
        prefill_work_bytes=290_000_000,
    )
    loaded = weights + 182_000_000
    use = MemoryUse(
        kind="VRAM",
        before_bytes=0,
        load_bytes=loaded,
        image_bytes=loaded,
        vision_bytes=weights + 371_000_000,
        prefill_bytes=weights + 1_240_000_000,
        decode_bytes=weights + 1_262_000_000,
    )
    return {"plan": plan, "memory": use}


def times(weights: int, total_s: float, plan: MemoryPlan) -> dict[str, Any]:
    """How long a study takes that reads so many bytes for a token."""
    token_s, prefill_s = weights / 560e9, 0.35 + 0.05 * (weights < 10e9)
    stages = {"image": 0.041, "vision": 0.013, "prefill": prefill_s, "ttft": 0.054 + prefill_s, "total": total_s}
    four = Throughput(
        batch_size=4,
        num_studies=24,
        studies_per_min=Quantiles(p20=138 / total_s, p50=141 / total_s, p80=143 / total_s, p90=144, p99=144, count=5),
        plan=dataclasses.replace(plan, num_rows=4, cache_bytes=4 * plan.cache_bytes),
        peak_bytes=weights + 3_900_000_000,
    )
    one = dataclasses.replace(four, batch_size=1, studies_per_min=about(58 / total_s, 5), peak_bytes=plan.peak_bytes)
    not_run = NotRun(batch_size=4, why="Needs 19.3 GiB, the limit is 16 GiB.")
    return {
        "verify_s": weights / 1.25e9,
        "load_s": 2.1 + weights / 2.5e9,
        "first_total_s": total_s * 1.9,
        "latency": Latency(
            **{stage: about(seconds) for stage, seconds in stages.items()}, decode_token=about(token_s, 2311)
        ),
        "batches": (one, four if weights < 10e9 else not_run),
        "traffic": Traffic(
            weight_bytes=weights - 260_000_000, cache_bytes=390_000_000, bandwidth=812e9, achieved=weights / token_s
        ),
        "energy_j": about(total_s * 210),
    }


def row(
    name: str, decoder_format: str, *, weight_gb: float, total_s: float, quality: RecordQuality | Missing,
    f1: float, drafts: tuple[Draft, ...],
) -> Row:  # fmt: skip
    weights = int(weight_gb * 1e9)
    taken = memory(weights)
    return Row(
        name=name,
        path=f"build/llava-rad/{name}",
        artifact_id=f"{name}-3f9a0c52d1b87e64",
        model="llava-rad",
        decoder_format=decoder_format,
        vision_format="fp16",
        image_tokens="1369",
        engine="torch",
        device="cuda:0",
        dtype="float16",
        cache_dtype="float16",
        provider="CUDAExecutionProvider",
        prompt_weights="stored",
        backend="triton, CUDA graphs",
        fallbacks=(),
        disk_bytes=weights + 190_000_000,
        weight_bytes=weights + 180_000_000,
        num_runs=24,
        num_warmup=3,
        num_prompt_tokens=1405,
        tokens_per_study=96.3,
        record_quality=quality,
        report_quality=report_quality(f1),
        drafts=drafts,
        notice=NOTICE,
        **taken,
        **times(weights, total_s, taken["plan"]),
    )


TEXTS = (
    "Both lungs are clear.",
    "The heart is mildly enlarged. There is a small left pleural effusion. No pneumothorax.",
    "Right lower zone consolidation. Heart size and mediastinal contours are normal. No pleural effusion.",
    "The lungs are clear. Heart size is normal. No pleural effusion or pneumothorax is seen.",
    f"Endotracheal tube in place. {SCRIPT} Bibasilar atelectasis, 3.4 cm apart.",
)
CHANGES: dict[str, dict[int, tuple[str, str]]] = {
    "fp16": {},
    "int8": {},
    "other": {},
    "int4": {2: ("Right lower zone", "Left mid zone")},
    "nf4": {1: ("small left", "moderate right"), 2: (" No pleural effusion.", ""), 4: ("3.4 cm", "3.5 cm")},
}


def drafts_of(name: str) -> tuple[Draft, ...]:
    written = [text.replace(*CHANGES[name].get(index, ("", ""))) for index, text in enumerate(TEXTS)]
    drafts = [Draft(id=f"study-{index}", text=text) for index, text in enumerate(written)]
    if name == "nf4":
        drafts[3] = Draft(id="study-3", text="", error="films/none.png: got no such file · expected an image file")
    return tuple(drafts)


class Shown(NamedTuple):
    """A bench and its report."""

    films: list[Path]
    bench: Bench
    path: Path


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    folder = tmp_path_factory.mktemp("report")
    films = phantom_films(folder / "films")
    shown = Shown(films, the_bench(films), folder / "new folder" / "report.html")
    write_whole(shown.path, render_report(shown.bench, modelled=[MODELLED]))
    return shown


@pytest.fixture(scope="module")
def bench(shown: Shown) -> Bench:
    return shown.bench


def the_bench(films: list[Path]) -> Bench:
    same, near = record_quality(0, same_top=1, ratio=1, same_text=1), record_quality
    figures = (
        ("fp16", "fp16", 13.48, 3.06, 0.573, same),
        ("int8", "gptq-int8 (groups of 128)", 7.15, 1.94, 0.573, near(4.1e-5, same_top=0.9978, ratio=1, same_text=1)),
        ("int4", "gptq-int4 (groups of 128)", 3.89, 1.21, 0.569, near(0.0061, same_top=0.971, ratio=1, same_text=0.8)),
        ("nf4", "bnb-nf4", 3.87, 1.38, 0.561, near(0.0187, same_top=0.957, ratio=1.02, same_text=0.2)),
        ("other", "gptq-int4 (groups of 32)", 4.2, 1.3, 0.55, NO_RECORD),
    )
    rows = (
        *(
            row(name, stored, weight_gb=gb, total_s=total_s, quality=quality, f1=f1, drafts=drafts_of(name))
            for name, stored, gb, total_s, f1, quality in figures
        ),
        FailedRow(
            name="broken", path="build/broken", error="build/broken: got no manifest.json · expected an artifact"
        ),
    )
    studies = tuple(
        StudyShown(
            id=f"study-{index}",
            image=str(film),
            reason=None if index == 3 else f"Cough & {SCRIPT}" if index == 1 else "Fever for three days.",
            report=None if index == 0 else text.replace("small", "tiny"),
            reference_text=text,
        )
        for index, (film, text) in enumerate(zip(films, TEXTS, strict=True))
    )
    return Bench(
        provenance=Provenance(
            command="python -m lite.bench fp16 int8 int4 nf4 --data studies.json --reference v100 --html report.html",
            started="2026-11-24T02:17:09+00:00",
            machine="16 cores of an unnamed processor, 64 GB, Linux, one GPU of 24 GB",
            versions={"Python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.32.0", "llava-rad-lite": "0.1.0"},
            data="studies/studies.json",
            data_sha256="5d41402abc4b2a76b9719d911017c592ae24f1be9971b1db8c8e1f0b42d3a0c7",
            num_studies=5,
            reference="v100 (fp16-3f9a0c52d1b87e64, float16 on a V100 16GB, 2026-11-20)",
            seed=0,
            resamples=500,
        ),
        rows=rows,
        reference_report_quality=report_quality(0.573),
        studies=studies,
        notes=("RadGraph F1 and CheXbert F1 are missing: radgraph is not installed.", "5 studies are few."),
    )


def measured(bench: Bench) -> list[Row]:
    return [row for row in bench.rows if isinstance(row, Row)]


def no_record(bench: Bench) -> Bench:
    missing = Missing(why="no reference", todo="Pass --reference.")
    rows = tuple(dataclasses.replace(row, record_quality=missing) for row in measured(bench))
    studies = tuple(dataclasses.replace(study, reference_text=None) for study in bench.studies)
    provenance = dataclasses.replace(bench.provenance, reference=None)
    return dataclasses.replace(
        bench, rows=rows, studies=studies, provenance=provenance, reference_report_quality=missing
    )


def phantom_films(folder: Path) -> list[Path]:
    """Phantom films, the first one large, the second DICOM, and one that is not there."""
    listed = write_studies(folder / "studies", count=4, seed=90_004, dicom=True)
    films = [study.image for study in read_studies(listed)]
    Image.open(films[0]).resize((600, 750)).save(films[0])
    films[1] = films[1].with_suffix(".dcm")
    assert films[1].is_file()
    films.insert(3, films[0].with_name("none.png"))
    return films
