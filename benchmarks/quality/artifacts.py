"""What quantising costs: `python -m benchmarks quality artifacts LIST.json --reference FP16_ARTIFACT CANDIDATE...`.

The reference drafts every film freely; each candidate is then asked, token by token along that text (its end, EOS,
included), what it would have written (see `lite.eval.divergence`), and also drafts the films by itself:

    reference ─ drafts ─▶ texts ─▶ logits on them, kept on disk ─┐
                            └────▶ candidate's logits on them ───┴▶ KL, same top token, perplexity ratio
    candidate ─ drafts ─▶ texts ─▶ equal to the reference's? label F1 against what was drawn

Only one model is in memory at a time, and the logits of one study: the reference's go to a temporary folder, unrounded
(float16 would add a KL of its own of some 1e-5, more than some candidates lose). That is 4 bytes times tokens times
vocabulary: 50 MB for 600 films of the phantom model, 2.6 GB for 200 studies of 100 tokens of a 7B one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import lite
from benchmarks.phantom.score import read_truth
from lite.artifact.open import Artifact, load_artifact
from lite.bench.table import markdown_table, to_json
from lite.console import positive, run_command, short_names
from lite.errors import LiteError
from lite.eval.divergence import DivergenceSummary, StudyDivergence, compare_logits, summarise
from lite.eval.labels import read_labels
from lite.eval.metrics import Estimate, Readings, bootstrap_interval, label_f1
from lite.eval.record import check_belongs, settings_of
from lite.studies.readers import read_studies
from lite.studies.study import Study

BATCH_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """What an artifact writes about each study when it writes freely."""

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]  # with EOS, unless the text was cut


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFigures:
    """What can be said of an artifact alone."""

    name: str
    artifact_id: str
    decoder_format: str
    decoder_bytes: int  # of all files below decoder/
    micro_f1: Estimate  # of the labels read from its texts, against those drawn
    macro_f1: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What can be said of a candidate beside its reference."""

    figures: ArtifactFigures
    divergence: DivergenceSummary
    same_text: Estimate  # share of the studies whose text is the reference's, character for character


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A reference that has drafted and been scored: all that a candidate is compared with. Made by `take_reference`."""

    artifact: Artifact
    figures: ArtifactFigures
    studies: tuple[Study, ...]
    truth: tuple[Readings, ...]
    drafts: Drafts
    folder: Path  # holds the logits
    batch_size: int
    device: str

    def logits(self, index: int) -> NDArray[np.float32]:
        """Return the logits of a study's text, [T, V]."""
        logits: NDArray[np.float32] = np.load(_logits_file(self.folder, index))
        return logits


def _logits_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npy"


@contextlib.contextmanager
def take_reference(
    path: Path,
    listed: Path,
    *,
    name: str | None = None,
    image_folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
) -> Iterator[Reference]:
    """Draft and score the studies of a list with the reference; what is kept of it on disk goes when the block ends.

    Args:
        path: the reference's artifact.
        listed: a list of films with their drawn labels, as `python -m benchmarks.phantom write` makes it.
        name: what to call it; the folder's name when not given.
        image_folder: where the films are; beside the list when not given.
        limit: take only the first so many studies.
        batch_size: how many films are drafted at a time. Texts are scored one at a time.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        LiteError: the list or the artifact cannot be used, a film cannot be read, or the disk has no room.
    """
    studies = tuple(read_studies(listed, image_folder=image_folder)[:limit])
    drawn = read_truth(listed)
    truth = tuple(drawn[study.id] for study in studies)
    with tempfile.TemporaryDirectory(prefix="reference-logits-") as folder:
        model = lite.load(path, device=device)
        name = path.resolve().name if name is None else name
        drafts = _draft(model, studies, batch_size, name)
        _check_room(Path(folder), sum(map(len, drafts.token_ids)), model.decoder.config.vocab_size)
        for index, logits in enumerate(_scored(model, studies, drafts, name)):
            np.save(_logits_file(Path(folder), index), logits)
        reference = Reference(
            artifact=model.artifact,
            figures=_figures(name, model.artifact, drafts, truth),
            studies=studies,
            truth=truth,
            drafts=drafts,
            folder=Path(folder),
            batch_size=batch_size,
            device=device,
        )
        del model  # makes room for the candidates
        yield reference


def measure_loss(reference: Reference, path: Path, *, name: str | None = None) -> Loss:
    """Measure what the artifact at `path` loses against the reference.

    Raises:
        LiteError: the artifact cannot be loaded or does not belong to the reference, or a study of the list cannot be
            computed with it. There is no loss over the rest: it would not be comparable.
    """
    _check_belongs(load_artifact(path), reference.artifact)
    model = lite.load(path, device=reference.device)
    name = path.resolve().name if name is None else name
    compared: list[StudyDivergence] = [
        compare_logits(reference.logits(index), logits, token_ids)
        for index, (logits, token_ids) in enumerate(
            zip(
                _scored(model, reference.studies, reference.drafts, name),
                reference.drafts.token_ids,
                strict=True,
            )
        )
    ]
    drafts = _draft(model, reference.studies, reference.batch_size, name)
    same = [[ours == theirs] for ours, theirs in zip(drafts.texts, reference.drafts.texts, strict=True)]
    return Loss(
        figures=_figures(name, model.artifact, drafts, reference.truth),
        divergence=summarise(compared),
        same_text=bootstrap_interval(np.array(same, dtype=np.float64), lambda sums: sums[:, 0] / len(same)),
    )


def _check_belongs(candidate: Artifact, reference: Artifact) -> None:
    check_belongs(candidate, settings_of(reference), reference=str(reference.path))


def _draft(model: lite.FindingsModel, studies: Sequence[Study], batch_size: int, name: str) -> Drafts:
    results = model.findings_batch([(study.image, study.reason) for study in studies], batch_size=batch_size)
    eos_token_id = model.artifact.manifest.decoding.eos_token_id
    texts: list[str] = []
    token_ids: list[tuple[int, ...]] = []
    for result in tqdm(results, total=len(studies), desc=f"{name}: drafting", unit=" films", disable=None):
        if isinstance(result, lite.StudyError):
            raise result.error
        texts.append(result.text)
        # The decision to stop is one of the reference's tokens, too; a text that was cut has none.
        token_ids.append(result.token_ids if result.finish_reason == "length" else (*result.token_ids, eos_token_id))
    return Drafts(texts=tuple(texts), token_ids=tuple(token_ids))


def _scored(
    model: lite.FindingsModel, studies: Sequence[Study], drafts: Drafts, name: str
) -> Iterator[NDArray[np.float32]]:
    """Yield the model's logits on each drafted text."""
    pairs = zip(studies, drafts.token_ids, strict=True)
    for study, token_ids in tqdm(pairs, total=len(studies), desc=f"{name}: scoring", unit=" films", disable=None):
        yield model.score(study.image, token_ids, study.reason)


def _check_room(folder: Path, num_tokens: int, vocab_size: int) -> None:
    needed, free = num_tokens * vocab_size * 4, shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        msg = (
            f"{folder}: got {free / 1e9:.1f} GB of free disk · expected {needed / 1e9:.1f} GB for the reference's "
            "logits · take fewer studies with --limit, or name a larger disk in TMPDIR"
        )
        raise LiteError(msg)


def _figures(name: str, artifact: Artifact, drafts: Drafts, truth: Sequence[Readings]) -> ArtifactFigures:
    scores = label_f1(truth, [read_labels(text) for text in drafts.texts])
    files = artifact.manifest.files.items()
    return ArtifactFigures(
        name=name,
        artifact_id=artifact.id,
        decoder_format=artifact.manifest.decoder.format,
        decoder_bytes=sum(record.bytes for file, record in files if file.startswith("decoder/")),
        micro_f1=scores.micro,
        macro_f1=scores.macro,
    )


# -- Printing --------------------------------------------------------------------------------------------------------


def shown(value: float, digits: str = ".3f") -> str:
    """Return a number as text, a dash where there is none."""
    return "–" if math.isnan(value) else format(value, digits)


def shown_interval(estimate: Estimate, digits: str) -> str:
    """Return a figure with its interval as text."""
    return f"{shown(estimate.value, digits)} [{shown(estimate.low, digits)}, {shown(estimate.high, digits)}]"


LOSS_COLUMNS = (
    "decoder MB",
    "KL, nats/token",
    "same top",
    "perplexity ratio",
    "leaves at",
    "same text",
    "F1 micro",
    "F1 macro",
)
COLUMNS_NOTE = """\
KL(reference ‖ candidate), the share of equal top tokens and the ratio of perplexities are taken along the reference's
texts. "leaves at": the median token, from 0, at which the candidate first disagrees, where it does at all. "same text":
drafted freely, the share of equal texts. F1: the labels of those texts against what was drawn. [95 % interval]."""


def loss_cells(figures: ArtifactFigures, loss: Loss | None) -> tuple[str, ...]:
    """Return the cells of an artifact below `LOSS_COLUMNS`; the reference has no loss."""
    beside = ("–",) * 5
    if loss is not None:
        divergence = loss.divergence
        beside = (
            shown_interval(divergence.mean_kl, ".3g"),
            shown(divergence.same_top.value, ".4f"),
            shown(divergence.perplexity_ratio.value, ".4f"),
            shown(divergence.first_divergent_token.value, ".0f"),
            shown(loss.same_text.value),
        )
    return (
        f"{figures.decoder_bytes / 1e6:,.2f}",
        *beside,
        shown(figures.micro_f1.value),
        shown(figures.macro_f1.value),
    )


def format_table(reference: Reference, losses: Sequence[Loss]) -> str:
    """Return the reference and its candidates as a table, and what its columns are."""
    rows = [(reference.figures, None), *((loss.figures, loss) for loss in losses)]
    cells = [(figures.name, figures.decoder_format, *loss_cells(figures, loss)) for figures, loss in rows]
    table = markdown_table(("artifact", "decoder", *LOSS_COLUMNS), cells, left=2)
    num_tokens = sum(map(len, reference.drafts.token_ids))
    return f"{table}\n\n{len(reference.studies)} films, {num_tokens} tokens. {COLUMNS_NOTE}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality artifacts",
        description="Measure what artifacts lose against a reference, along what that writes, and print a table.",
        epilog="exit status: 0 done, 1 something could not be measured, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument(
        "list", type=Path, metavar="LIST.json", help="the list that python -m benchmarks.phantom write made"
    )
    parser.add_argument(
        "candidates", type=Path, nargs="+", metavar="CANDIDATE", help="artifacts to compare with the reference"
    )
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="ARTIFACT", help="the artifact to lose nothing against: fp16"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="where the films are (default: beside the list)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N films")
    parser.add_argument(
        "--batch-size", type=positive, default=BATCH_SIZE, metavar="N", help="films at a time (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _run(arguments))


def _run(args: argparse.Namespace) -> int:
    """Print the losses; returns 0, or 1 when a candidate could not be measured.

    Raises:
        LiteError: the list or the reference cannot be used, or a candidate does not belong to the reference. That is
            found before anything is computed.
    """
    artifact = load_artifact(args.reference)
    for path in args.candidates:
        _check_belongs(load_artifact(path), artifact)
    names = short_names([args.reference, *args.candidates])
    losses: list[Loss] = []
    with take_reference(
        args.reference,
        args.list,
        name=names[0],
        image_folder=args.image_folder,
        limit=args.limit,
        batch_size=args.batch_size,
        device=args.device,
    ) as reference:
        for path, name in zip(args.candidates, names[1:], strict=True):
            try:
                losses.append(measure_loss(reference, path, name=name))
            except LiteError as error:
                tqdm.write(f"error: {name}: {error}", file=sys.stderr)
    if args.json:
        values = {
            "num_studies": len(reference.studies),
            "reference": to_json(reference.figures),
            "candidates": [to_json(loss) for loss in losses],
        }
        sys.stdout.write(f"{json.dumps(values, ensure_ascii=False, allow_nan=False)}\n")
    else:
        sys.stdout.write(f"{format_table(reference, losses)}\n")
    return 0 if len(losses) == len(args.candidates) else 1
