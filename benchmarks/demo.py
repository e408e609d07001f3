"""The demo behind `make demo`: export the phantom model in 4 bits, draft findings for a few films, show the truth.

It takes the way of the real checkpoint, with nothing left out: the published layout (LoRA and all) through the exporter
to an artifact, calibrated on other films and measured against its checkpoint on the films that are then drafted. The
fp16 artifact is made too, and what it drafts stands beside. The 4-bit one has `decoder.onnx` as well: without a GPU
ONNX Runtime drafts with it, and torch with fp16. Only the model is small, and reads synthetic films only.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

import lite
from benchmarks.exports import FP16, ROOT, Recipe, Source
from benchmarks.phantom.write import write_studies
from benchmarks.quality.compare import draft
from lite.console import print_line, run_command
from lite.eval.agreement import Verdict, compare_findings
from lite.image.files import load_image
from lite.studies.sources.listed import read_studies
from lite.studies.study import Study

OUT = Path("build", "demo")  # of where one is
ARTIFACT = OUT / "artifact"
NUM_FILMS = 6
# Neither training nor the figures in benchmarks/phantom/README.md use films of these seeds.
SEED = 20_261_123
NUM_CALIBRATION_FILMS = 64
CALIBRATION_SEED = 20_261_124
# Given, not measured: on phantoms that is as good, and the demo is to be quick.
GPTQ_INT4 = Recipe(
    name="gptq-int4",
    options=("--decoder", "gptq-int4", "--engine", "onnx", "--token-weights", "0.3,0.1"),
    calibrated=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """A film with the findings that both artifacts have drafted."""

    study: Study
    findings: lite.Findings  # of the 4-bit artifact
    fp16: lite.Findings

    @property
    def verdicts(self) -> list[Verdict]:
        """What the 4-bit artifact has right."""
        return compare_findings(self.study.reference, self.findings.text)

    @property
    def beside(self) -> str:
        """What the fp16 artifact drafts, in as few words as that takes."""
        return "the same" if self.fp16.text == self.findings.text else self.fp16.text


def _score(drafted: Sequence[Drafted]) -> str:
    ours = [verdict for film in drafted for verdict in film.verdicts]
    theirs = [verdict for film in drafted for verdict in compare_findings(film.study.reference, film.fp16.text)]
    same = sum(film.fp16.text == film.findings.text for film in drafted)
    return (
        f"{_num_right(ours)} of {len(ours)} findings agree in label, side, zone and size, "
        f"{_num_right(theirs)} of {len(theirs)} in fp16; {same} of {len(drafted)} texts are the same."
    )


def _num_right(verdicts: Sequence[Verdict]) -> int:
    return sum(not verdict.wrong for verdict in verdicts)


# -- On the terminal -------------------------------------------------------------------------------------------------


def _side_by_side(left: str, right: str, width: int) -> Iterator[str]:
    """Yield lines with two texts in columns that fill `width` characters together."""
    column = max(24, (width - 5) // 2)
    for one, other in zip_longest(textwrap.wrap(left, column), textwrap.wrap(right, column), fillvalue=""):
        yield f"  {one:<{column}} │ {other}".rstrip()


def _print_film(number: int, drafted: Drafted, width: int) -> None:
    study = drafted.study
    print_line(f"Film {number}  {study.path.name}  reason: {study.reason or 'none given'}")
    for columns in (("DRAFTED in 4 bits", "TRUTH"), (drafted.findings.text, study.reference)):
        for line in _side_by_side(*columns, width):
            print_line(line)
    # A no-break space keeps a mark and its words on one line.
    marks = "   ".join(str(verdict).replace(" ", "\xa0") for verdict in drafted.verdicts)
    for text in (f"fp16 drafts: {drafted.beside}", marks):
        for line in textwrap.wrap(text, width - 2, break_long_words=False):
            print_line(f"  {line}".replace("\xa0", " "))
    print_line("")


# -- As a picture: cards in two columns, each a film with its texts to the right -------------------------------------

_FILM, _TEXT, _GAP = 300, 420, 24
_CARD = _FILM + _GAP + _TEXT
_WIDTH = 2 * _CARD + 6 * _GAP
_INK, _PAPER, _QUIET = (28, 30, 34), (250, 249, 246), (110, 112, 118)
_RIGHT, _WRONG = (22, 110, 60), (176, 32, 32)
_CHARACTER = 0.5  # the width of one in the mean, in sizes


class Paragraph(NamedTuple):
    """Text to be set."""

    text: str
    size: int = 16
    colour: tuple[int, int, int] = _INK


def _set(paragraphs: Sequence[Paragraph], width: int) -> Image.Image:
    """Set paragraphs one below the other, on paper as high as they need."""
    wrapped = [textwrap.wrap(text, int(width / (_CHARACTER * size))) for text, size, _ in paragraphs]
    heights = [round(1.3 * entry.size) * len(lines) + 4 for entry, lines in zip(paragraphs, wrapped, strict=True)]
    paper = Image.new("RGB", (width, sum(heights)), _PAPER)
    pen, y = ImageDraw.Draw(paper), 0
    for (_, size, colour), lines, height in zip(paragraphs, wrapped, heights, strict=True):
        for number, line in enumerate(lines):
            pen.text((0, y + number * round(1.3 * size)), line, fill=colour, font_size=size)
        y += height
    return paper


def _draw_card(number: int, drafted: Drafted) -> Image.Image:
    verdicts = [
        Paragraph(f"{verdict.label}: {verdict.wrong or 'agrees'}", 14, _WRONG if verdict.wrong else _RIGHT)
        for verdict in drafted.verdicts
    ]
    text = _set(
        [
            Paragraph(f"Film {number} · {drafted.study.reason or 'no reason given'}", 15, _QUIET),
            Paragraph("DRAFTED IN 4 BITS", 12, _QUIET),
            Paragraph(drafted.findings.text),
            Paragraph(f"fp16: {drafted.beside}", 14, _QUIET),
            Paragraph("TRUTH", 12, _QUIET),
            Paragraph(drafted.study.reference),
            *verdicts,
        ],
        _TEXT,
    )
    card = Image.new("RGB", (_CARD, max(_FILM, text.height)), _PAPER)
    card.paste(load_image(drafted.study.image).image.resize((_FILM, _FILM), Image.Resampling.LANCZOS), (0, 0))
    card.paste(text, (_FILM + _GAP, 0))
    return card


def draw_picture(drafted: Sequence[Drafted], notice: str) -> Image.Image:
    """Draw the films in a grid with drafted text, truth and agreement beside each."""
    about = f"DRAFTED by the model in 4 bits, and in fp16 · TRUTH that the film was drawn from · {_score(drafted)}"
    heading = (Paragraph("Findings drafted for synthetic chest films by the phantom model", 26), Paragraph(about))
    cards = [_draw_card(number, film) for number, film in enumerate(drafted, start=1)]
    rows = [
        [_set(heading, _WIDTH - 4 * _GAP)],
        *([left, *right] for left, *right in (cards[start : start + 2] for start in range(0, len(cards), 2))),
        [_set([Paragraph(notice, 14, _QUIET)], _WIDTH - 4 * _GAP)],
    ]
    heights = [max(card.height for card in row) + 2 * _GAP for row in rows]
    picture = Image.new("RGB", (_WIDTH, sum(heights)), _PAPER)
    y = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            picture.paste(card, (2 * _GAP + column * (_CARD + 2 * _GAP), y))
        y += height
    return picture


# -- Step by step ----------------------------------------------------------------------------------------------------


@contextmanager
def _step(number: int, what: str) -> Iterator[None]:
    """Announce a step, and say how long it took."""
    print_line(f"[{number}/5] {what} ...")
    started = time.perf_counter()
    yield
    print_line(f"      done in {time.perf_counter() - started:.1f} s\n")


def _export(recipe: Recipe, source: Source, artifact: Path) -> None:
    """Export the phantom checkpoint by the command that a user would type."""
    command = [*source.command(recipe, artifact), "--verify-studies", str(NUM_FILMS), "--overwrite"]
    print_line(f"      {_python()} " + " ".join(_shown(Path(text)) for text in command[1:]))
    artifact.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        msg = f"got exit code {done.returncode} from the export · expected an artifact in {artifact} · see above"
        raise lite.LiteError(msg)
    # Sizes and parity; the terms and what to type next come once, at the end.
    print_line(textwrap.indent(done.stdout.partition("\n\n")[0], 6 * " "))


def _write_films(folder: Path, *, count: int, seed: int, dicom: bool) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return write_studies(folder, count=count, seed=seed, dicom=dicom)


def _draft(artifact: Path, fp16: Path, studies: Sequence[Study]) -> tuple[list[Drafted], str]:
    models = [lite.load(path) for path in (artifact, fp16)]
    ours, theirs = (draft(model, studies, name=model.artifact.path.name) for model in models)
    drafted = [Drafted(study=s, findings=f, fp16=b) for s, f, b in zip(studies, ours, theirs, strict=True)]
    return drafted, models[0].notice


def _who_drafted(drafted: Sequence[Drafted]) -> str:
    """Say which engine has drafted in each format, and how long a film took."""
    formats = {"4 bits": [film.findings for film in drafted], "fp16": [film.fp16 for film in drafted]}
    return ", ".join(
        f"{name} by {found[0].engine} ({found[0].timings.total_s / len(found):.2f} s a film)"
        for name, found in formats.items()
    )


def _shown(path: Path) -> str:
    """Return a path as one would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _python() -> str:
    return _shown(ROOT / ".venv/bin/python") if Path(sys.prefix) == ROOT / ".venv" else "python"


def _say_what_next(artifact: Path, film: Path, listed: Path) -> None:
    python = _python()
    predictions = _shown(artifact.with_name("predictions.jsonl"))
    more = _shown(artifact.with_name("more-films"))
    commands = {
        "one of these films again, as DICOM": f"-m lite generate {_shown(artifact)} {_shown(film)}",
        "a film of your own (nonsense: the phantom model knows synthetic films only)": (
            f"-m lite generate {_shown(artifact)} FILM"
        ),
        "hundreds of films": f"-m benchmarks.phantom write {more} --count 300 --seed 7",
        "findings for all films of a list": (f"-m lite run {_shown(artifact)} {_shown(listed)} --out {predictions}"),
        "how good they are": f"-m lite score {predictions}",
        "what each format loses, on 240 films (half an hour)": "-m benchmarks quality formats",
        "the real checkpoint, from your own download": "-m export --help",
    }
    print_line("Next:")
    for what, command in commands.items():
        print_line(f"  # {what}\n  {python} {command}")
    if (ROOT / "Makefile").is_file():
        print_line("  # all tests\n  make test")


def _run(out: Path) -> int:
    started = time.perf_counter()
    width = min(shutil.get_terminal_size((110, 40)).columns, 160)
    artifact, fp16, picture = out / ARTIFACT.name, out / "artifact-fp16", out / "findings.png"
    with _step(1, f"Drawing {NUM_FILMS} synthetic films that the model has never seen, and others to calibrate on"):
        listed = _write_films(out / "films", count=NUM_FILMS, seed=SEED, dicom=True)
        others = _write_films(out / "calibration", count=NUM_CALIBRATION_FILMS, seed=CALIBRATION_SEED, dicom=False)
        source = Source(verify=listed, calibration=others)
    with _step(2, "Exporting the phantom checkpoint in 4 bits, measured on these films"):
        _export(GPTQ_INT4, source, artifact)
    with _step(3, "Exporting it in fp16, to compare"):
        _export(FP16, source, fp16)
    with _step(4, "Drafting the films' findings with both"):
        drafted, notice = _draft(artifact, fp16, read_studies(listed))
        print_line(f"      {_who_drafted(drafted)}")
    for number, film in enumerate(drafted, start=1):
        _print_film(number, film, width)
    print_line(_score(drafted))
    print_line(f"{textwrap.fill(notice, width)}\n")
    with _step(5, f"Saving films and texts as {_shown(picture)}"):
        draw_picture(drafted, notice).save(picture)
    _say_what_next(artifact, drafted[0].study.path.with_suffix(".dcm"), listed)
    print_line(f"\nThe demo took {time.perf_counter() - started:.0f} s.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks demo",
        description="Export the phantom model in 4 bits and in fp16, draft findings for a few films with both, show "
        "the truth beside, and save a picture.",
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR", help="where everything goes (default: %(default)s)"
    )
    out: Path = parser.parse_args(argv).out
    return run_command(lambda: _run(out))
