"""The onnx engine beside torch on one artifact: `python -m benchmarks quality engines ARTIFACT`.

Both compute the same integers; what they round on the way differs. They draft the same films in turns, film by film, so
that whatever slows the machine slows all of them. Then each candidate is asked, token by token along the text of its
yardstick (its end, EOS, included), what it would have written (see `lite.eval.divergence`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import lite
from benchmarks.phantom.score import read_truth
from benchmarks.phantom.write import write_studies
from benchmarks.quality.artifacts import shown, shown_interval
from lite.bench.machine import machine, versions
from lite.bench.table import markdown_table, to_json
from lite.console import positive, run_command, show_progress
from lite.eval.divergence import DivergenceSummary, StudyDivergence, compare_logits, summarise
from lite.eval.labels import read_labels
from lite.eval.metrics import Estimate, Readings, label_f1, rouge_l, same_text
from lite.files import write_whole
from lite.studies.readers import read_studies
from lite.studies.study import Study

NUM_FILMS: Final = 100
# Films of this seed are used for nothing else.
SEED: Final = 20_261_401

ENGINES: Final[dict[str, dict[str, Any]]] = {
    "torch": {"engine": "torch", "device": "cpu"},
    "torch-int8-cache": {"engine": "torch", "device": "cpu", "cache_dtype": "int8"},
    "onnx": {"engine": "onnx"},
    "onnx-int8-cache": {"engine": "onnx", "cache_dtype": "int8"},
}
"""What is compared, by how it is loaded."""
PAIRS: Final = (
    ("torch-int8-cache", "torch"),
    ("onnx", "torch"),
    ("onnx-int8-cache", "torch"),
    ("onnx-int8-cache", "onnx"),
)
"""Candidate and yardstick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFigures:
    """What can be said of an engine alone. Times are medians."""

    name: str
    label_f1: Estimate  # micro, of the labels read from its texts
    decode_tokens_per_s: float
    prefill_s: float
    total_s: float  # of a study, from the file to the last token


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What can be said of a candidate beside its yardstick."""

    candidate: str
    yardstick: str
    same_text: Estimate  # share of the studies, character for character
    divergence: DivergenceSummary  # along the yardstick's texts
    rouge_l: Estimate  # between the two texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Everything measured on one artifact: `ENGINES` and `PAIRS`, in their order."""

    artifact_id: str
    decoder: str
    engines: tuple[EngineFigures, ...]
    pairs: tuple[Comparison, ...]

    def engine(self, name: str) -> EngineFigures:
        """Return one of the engines."""
        return next(engine for engine in self.engines if engine.name == name)

    def pair(self, candidate: str, yardstick: str) -> Comparison:
        """Return one of the comparisons."""
        return next(pair for pair in self.pairs if (pair.candidate, pair.yardstick) == (candidate, yardstick))


def compare_engines(path: Path, studies: Sequence[Study], truth: Sequence[Readings]) -> Compared:
    """Measure both engines on the CPU.

    Args:
        path: an artifact with `decoder.onnx`.
        studies: the films, at least one.
        truth: the labels of each.

    Raises:
        LiteError: the artifact has no `decoder.onnx`, or one of the engines cannot draft.
    """
    models = load_engines(path)
    return compare_drafts(models, draft_in_turns(models, studies), studies, truth)


def load_engines(path: Path) -> dict[str, lite.FindingsModel]:
    """Load an artifact with each of `ENGINES`."""
    return {name: lite.load(path, **options) for name, options in ENGINES.items()}


def compare_drafts(
    models: Mapping[str, lite.FindingsModel],
    drafts: Mapping[str, Sequence[lite.Findings]],
    studies: Sequence[Study],
    truth: Sequence[Readings],
) -> Compared:
    """Compare what each of `ENGINES` has drafted, and score the candidates along their yardsticks' texts."""
    divergences = _divergences(models, drafts, studies)
    texts = {name: [draft.text for draft in found] for name, found in drafts.items()}
    artifact = models["onnx"].artifact
    return Compared(
        artifact_id=artifact.id,
        decoder=artifact.manifest.decoder.describe(),
        engines=tuple(_figures(name, found, truth) for name, found in drafts.items()),
        pairs=tuple(
            Comparison(
                candidate=candidate,
                yardstick=yardstick,
                same_text=same_text(texts[yardstick], texts[candidate]),
                divergence=summarise(divergences[candidate, yardstick]),
                rouge_l=rouge_l(texts[yardstick], texts[candidate]),
            )
            for candidate, yardstick in PAIRS
        ),
    )


def draft_in_turns(
    models: Mapping[str, lite.FindingsModel], studies: Sequence[Study]
) -> dict[str, list[lite.Findings]]:
    """Draft each film with each model before the next film; the first film comes twice, and once does not count."""
    drafts: dict[str, list[lite.Findings]] = {name: [] for name in models}
    for number, study in enumerate((studies[0], *studies)):
        show_progress("drafting", number, len(studies))
        for name, model in models.items():
            drafts[name].append(model.findings(study.image, study.reason))
    return {name: found[1:] for name, found in drafts.items()}


def _divergences(
    models: Mapping[str, lite.FindingsModel],
    drafts: Mapping[str, Sequence[lite.Findings]],
    studies: Sequence[Study],
) -> dict[tuple[str, str], list[StudyDivergence]]:
    """Score each pair's candidate and yardstick along the yardstick's texts."""
    divergences: dict[tuple[str, str], list[StudyDivergence]] = {pair: [] for pair in PAIRS}
    for index, study in enumerate(studies):
        show_progress("scoring", index, len(studies))
        for yardstick in dict.fromkeys(yardstick for _, yardstick in PAIRS):
            token_ids = _answer(models[yardstick], drafts[yardstick][index])
            reference = models[yardstick].score(study.image, token_ids, study.reason)
            for candidate, beside in PAIRS:
                if beside == yardstick:
                    logits = models[candidate].score(study.image, token_ids, study.reason)
                    divergences[candidate, yardstick].append(compare_logits(reference, logits, token_ids))
    return divergences


def _answer(model: lite.FindingsModel, draft: lite.Findings) -> tuple[int, ...]:
    """Return a draft's tokens with EOS: to stop is a decision too. A text that was cut has none."""
    eos_token_id = model.artifact.manifest.decoding.eos_token_id
    return draft.token_ids if draft.finish_reason == "length" else (*draft.token_ids, eos_token_id)


def _figures(name: str, drafts: Sequence[lite.Findings], truth: Sequence[Readings]) -> EngineFigures:
    timings = [draft.timings for draft in drafts]
    steps = [step for timing in timings for step in timing.decode_steps_s]
    return EngineFigures(
        name=name,
        label_f1=label_f1(truth, [read_labels(draft.text) for draft in drafts]).micro,
        # A text of one token decodes nothing.
        decode_tokens_per_s=1 / statistics.median(steps) if steps else np.nan,
        prefill_s=statistics.median(timing.prefill_s for timing in timings),
        total_s=statistics.median(timing.total_s for timing in timings),
    )


# -- Command line ----------------------------------------------------------------------------------------------------

COLUMNS_NOTE: Final = """\
"equal texts": drafted freely, the studies whose texts are equal, character for character. "first difference": the
median token, from 0, at which a text leaves its yardstick's, of those that do. KL(yardstick ‖ candidate) and the share
of equal top tokens are taken along the yardstick's texts. F1: the labels of the texts against what was drawn. Times are
medians, taken film by film in turns. [95 % interval]."""


def format_tables(compared: Compared) -> str:
    """Return the comparisons and the engines as two markdown tables, and what their columns are."""
    pairs = markdown_table(
        ("candidate", "yardstick", "equal texts", "first difference", "KL, nats/token", "same top", "ROUGE-L"),
        [_pair_cells(pair) for pair in compared.pairs],
        left=2,
    )
    engines = markdown_table(
        ("engine", "label F1 micro", "decode tokens/s", "prefill ms", "study s"),
        [
            (
                engine.name,
                shown_interval(engine.label_f1, ".4f"),
                shown(engine.decode_tokens_per_s, ".0f"),
                shown(engine.prefill_s * 1e3, ".1f"),
                shown(engine.total_s, ".3f"),
            )
            for engine in compared.engines
        ],
    )
    return f"{pairs}\n\n{engines}\n\n{COLUMNS_NOTE}"


def _pair_cells(pair: Comparison) -> tuple[str, ...]:
    same, first, divergence = pair.same_text, pair.divergence.first_divergent_token, pair.divergence
    return (
        pair.candidate,
        pair.yardstick,
        f"{same.value:.1%} ({round(same.value * same.count)} of {same.count})",
        f"{shown(first.value, '.0f')} (of {first.count})",
        shown_interval(divergence.mean_kl, ".2g"),
        shown(divergence.same_top.value, ".4f"),
        shown(pair.rouge_l.value, ".4f"),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality engines",
        description="Draft the same synthetic films with torch and with ONNX Runtime, on the CPU, and print how far "
        "their texts agree, as markdown.",
        epilog="exit status: 0 done, 1 nothing could be measured, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="one of the phantom model with decoder.onnx")
    parser.add_argument(
        "--films", type=positive, default=NUM_FILMS, metavar="N", help="films to measure on (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED, metavar="S", help="which ones (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="also write the figures to a file")
    return parser


def _run(arguments: argparse.Namespace, command: str) -> int:
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        listed = write_studies(Path(folder) / "films", count=arguments.films, seed=arguments.seed, dicom=False)
        studies, drawn = read_studies(listed), read_truth(listed)
        compared = compare_engines(arguments.artifact, studies, [drawn[study.id] for study in studies])
    about = {
        "films": f"{arguments.films} of seed {arguments.seed}",
        "artifact": f"{compared.artifact_id} ({compared.decoder})",
        "machine": machine(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "command": command,
    }
    if arguments.json is not None:
        document = to_json(compared) | about
        write_whole(arguments.json, f"{json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)}\n")
    lines = "".join(f"- {name.capitalize()}: {value}.\n" for name, value in about.items())
    sys.stdout.write(f"{format_tables(compared)}\n\n{lines}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    command = shlex.join(
        ["python", "-m", "benchmarks", "quality", "engines", *(sys.argv[1:] if argv is None else argv)]
    )
    return run_command(lambda: _run(arguments, command))


if __name__ == "__main__":
    sys.exit(main())
