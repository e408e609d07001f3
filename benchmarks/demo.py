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
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import lite
from benchmarks.exports import FP16, PHANTOM, ROOT, Recipe, Source
from benchmarks.phantom.write import write_studies
from benchmarks.quality.compare import draft
from lite.console import run_command
from lite.eval.labels import Label, Reading, read_labels
from lite.image.files import load_image
from lite.studies.readers import read_studies
from lite.studies.study import Study

OUT = Path("build", "demo")  # of where one is
ARTIFACT = OUT / "artifact"
NUM_FILMS = 6
# Neither training nor the figures in benchmarks/phantom/README.md use films of these seeds.
SEED = 20_261_123
NUM_CALIBRATION_FILMS = 64
CALIBRATION_SEED = 20_261_124
# The weights of tokens are what a search has found on such films; it would take longer than all the rest.
GPTQ_INT4 = Recipe(
    name="gptq-int4",
    options=("--decoder", "gptq-int4", "--engine", "onnx", "--token-weights", "0.3,0.1"),
    calibrated=True,
)

# The labeller knows three sizes of everything; of these, reports say how severe they are.
_BY_DEGREE: frozenset[Label] = frozenset({"Cardiomegaly", "Edema"})
_DEGREES = {"small": "mild", "large": "severe"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What draft and truth say of one label that at least one of them reports."""

    label: Label
    verdict: str  # "agrees", or what is wrong
    right: bool

    def __str__(self) -> str:
        """Return one short line."""
        return self.label if self.right else f"{self.label}: {self.verdict}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """A film with its drafted findings and how they agree with what was drawn."""

    study: Study
    findings: lite.Findings  # of the 4-bit artifact
    fp16: lite.Findings

    @property
    def agreements(self) -> tuple[Agreement, ...]:
        """What the 4-bit artifact has right."""
        return compare(self.study.reference, self.findings.text)

    @property
    def fp16_agreements(self) -> tuple[Agreement, ...]:
        """What the fp16 artifact has right."""
        return compare(self.study.reference, self.fp16.text)

    @property
    def beside(self) -> str:
        """What the fp16 artifact drafts, in as few words as that takes."""
        return "the same" if self.fp16.text == self.findings.text else self.fp16.text


def _say(text: str = "") -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _verdict(label: Label, truth: Reading, draft: Reading) -> str:
    if draft.status != "positive":
        return "missed"
    if truth.status != "positive":
        return "not there"
    for name in ("side", "zone", "size"):
        drawn, drafted = getattr(truth, name), getattr(draft, name)
        if drawn and drawn != drafted:
            words = _DEGREES if label in _BY_DEGREE else {}
            return f"{words.get(drafted, drafted) or f'no {name}'}, should be {words.get(drawn, drawn)}"
    return "agrees"


def compare(truth: str, draft: str) -> tuple[Agreement, ...]:
    """Compare two findings texts label by label, as far as either reports something."""
    expected, got = read_labels(truth), read_labels(draft)
    verdicts = {
        label: _verdict(label, expected[label], got[label])
        for label in expected
        if "positive" in (expected[label].status, got[label].status)
    }
    return tuple(
        Agreement(label=label, verdict=verdict, right=verdict == "agrees") for label, verdict in verdicts.items()
    )


def _side_by_side(left: str, right: str, width: int) -> Iterator[str]:
    """Yield lines with two texts in columns that fill `width` characters together."""
    column = max(24, (width - 5) // 2)
    columns = [textwrap.wrap(text, column) or [""] for text in (left, right)]
    for index in range(max(map(len, columns))):
        cells = [lines[index] if index < len(lines) else "" for lines in columns]
        yield f"  {cells[0]:<{column}} │ {cells[1]}".rstrip()


def _print_film(number: int, drafted: Drafted, width: int) -> None:
    study, findings = drafted.study, drafted.findings
    _say(f"Film {number}  {study.path.name}  reason: {study.reason or 'none given'}")
    for line in _side_by_side("DRAFTED in 4 bits", "TRUTH", width):
        _say(line)
    for line in _side_by_side(findings.text, study.reference, width):
        _say(line)
    for line in textwrap.wrap(f"fp16 drafts: {drafted.beside}", width - 2, subsequent_indent="  "):
        _say(f"  {line}")
    # A no-break space keeps a mark and its words on one line.
    marks = [f"{'✓' if agreement.right else '✗'} {agreement}".replace(" ", "\xa0") for agreement in drafted.agreements]
    for line in textwrap.wrap("   ".join(marks), width - 2, break_long_words=False):
        _say(f"  {line}".replace("\xa0", " "))
    _say()


# The picture: cards in two columns, each a film with its texts to the right.
_FILM = 300
_TEXT = 420
_GAP = 24
_CARD = _FILM + _GAP + _TEXT
_COLUMNS = 2
_INK, _PAPER, _QUIET = (28, 30, 34), (250, 249, 246), (110, 112, 118)
_RIGHT, _WRONG = (22, 110, 60), (176, 32, 32)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class _Column:
    """Text set from the top down in a column of fixed width."""

    def __init__(self, draw: ImageDraw.ImageDraw, x: int, y: int, width: int) -> None:
        self.draw = draw
        self.x = x
        self.y = y
        self.width = width

    def write(self, text: str, *, size: int = 16, colour: tuple[int, int, int] = _INK, after: int = 4) -> None:
        """Set a paragraph, broken between words where the column ends."""
        font = _font(size)
        line = ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and self.draw.textlength(longer, font=font) > self.width:
                self._line(line, font, size, colour)
                longer = word
            line = longer
        self._line(line, font, size, colour)
        self.y += after

    def _line(
        self,
        text: str,
        font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
        size: int,
        colour: tuple[int, int, int],
    ) -> None:
        self.draw.text((self.x, self.y), text, font=font, fill=colour)
        self.y += round(size * 1.3)


def _draw_card(number: int, drafted: Drafted) -> Image.Image:
    """Draw one film and its texts, as high as they need."""
    card = Image.new("RGB", (_CARD, 4 * _FILM), _PAPER)
    film = load_image(drafted.study.image).image
    card.paste(film.resize((_FILM, _FILM), Image.Resampling.LANCZOS), (0, 0))
    column = _Column(ImageDraw.Draw(card), _FILM + _GAP, 0, _TEXT)
    column.write(f"Film {number} · {drafted.study.reason or 'no reason given'}", size=15, colour=_QUIET, after=8)
    column.write("DRAFTED IN 4 BITS", size=12, colour=_QUIET, after=0)
    column.write(drafted.findings.text, after=4)
    column.write(f"fp16: {drafted.beside}", size=14, colour=_QUIET, after=8)
    column.write("TRUTH", size=12, colour=_QUIET, after=0)
    column.write(drafted.study.reference, after=8)
    for agreement in drafted.agreements:
        colour = _RIGHT if agreement.right else _WRONG
        column.write(f"{agreement.label}: {agreement.verdict}", size=14, colour=colour, after=0)
    return card.crop((0, 0, _CARD, max(_FILM, column.y)))


def _score(drafted: Sequence[Drafted]) -> str:
    right = [agreement.right for film in drafted for agreement in film.agreements]
    fp16_right = [agreement.right for film in drafted for agreement in film.fp16_agreements]
    same = sum(film.fp16.text == film.findings.text for film in drafted)
    return (
        f"{sum(right)} of {len(right)} findings agree in label, side, zone and size, "
        f"{sum(fp16_right)} of {len(fp16_right)} in fp16; {same} of {len(drafted)} texts are the same."
    )


def draw_picture(drafted: Sequence[Drafted], notice: str) -> Image.Image:
    """Draw the films in a grid with drafted text, truth and agreement beside each."""
    cards = [_draw_card(number, film) for number, film in enumerate(drafted, start=1)]
    rows = [cards[start : start + _COLUMNS] for start in range(0, len(cards), _COLUMNS)]
    heights = [max(card.height for card in row) for row in rows]
    width = _COLUMNS * _CARD + (_COLUMNS + 1) * 2 * _GAP
    # Room for any heading and notice; what is left over is cut off.
    picture = Image.new("RGB", (width, sum(heights) + len(rows) * 2 * _GAP + width), _PAPER)
    text = _Column(ImageDraw.Draw(picture), 2 * _GAP, _GAP, width - 4 * _GAP)
    text.write("Findings drafted for synthetic chest films by the phantom model", size=26, after=4)
    text.write(
        f"DRAFTED by the model in 4 bits, and in fp16 · TRUTH that the film was drawn from · {_score(drafted)}",
        colour=_QUIET,
        after=_GAP,
    )
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            picture.paste(card, (2 * _GAP + column * (_CARD + 2 * _GAP), text.y))
        text.y += height + 2 * _GAP
    text.write(notice, size=14, colour=_QUIET)
    return picture.crop((0, 0, width, text.y + _GAP))


@contextmanager
def _step(number: int, what: str) -> Iterator[None]:
    """Announce a step, and say how long it took."""
    _say(f"[{number}/5] {what} ...")
    started = time.perf_counter()
    yield
    _say(f"      done in {time.perf_counter() - started:.1f} s\n")


def _require_checkpoint() -> None:
    for folder in (PHANTOM / "llava-rad-phantom", PHANTOM / "base"):
        if not folder.is_dir():
            msg = f"{folder}: got no such folder · expected the phantom checkpoint · check out the whole repository"
            raise lite.CheckpointError(msg)


def _export(recipe: Recipe, source: Source, artifact: Path) -> None:
    """Export the phantom checkpoint by the command that a user would type."""
    command = [*source.command(recipe, artifact), "--verify-studies", str(NUM_FILMS), "--overwrite"]
    _say(f"      {_python()} " + " ".join(_shown(Path(text)) for text in command[1:]))
    artifact.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        msg = f"got exit code {done.returncode} from the export · expected an artifact in {artifact} · see above"
        raise lite.LiteError(msg)
    # Sizes and parity; the terms and what to type next come once, at the end.
    _say(textwrap.indent(done.stdout.partition("\n\n")[0], 6 * " "))


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
    commands = {
        "one of these films again, as DICOM": f"-m lite generate {_shown(artifact)} {_shown(film)}",
        "a film of your own (nonsense: the phantom model knows synthetic films only)": (
            f"-m lite generate {_shown(artifact)} FILM"
        ),
        "hundreds of films": "-m benchmarks.phantom write build/films --count 300 --seed 7",
        "findings for all films of a list": (
            f"-m lite predict {_shown(artifact)} {_shown(listed)} --out {predictions}"
        ),
        "how good they are": f"-m benchmarks.phantom score {predictions}",
        "what each format loses, on 240 films (half an hour)": "-m benchmarks quality formats",
        "the real checkpoint, from your own download": "-m export --help",
    }
    _say("Next:")
    for what, command in commands.items():
        _say(f"  # {what}\n  {python} {command}")
    if (ROOT / "Makefile").is_file():
        _say("  # all tests\n  make test")


def _run(out: Path) -> int:
    started = time.perf_counter()
    width = min(shutil.get_terminal_size((110, 40)).columns, 160)
    artifact, fp16, picture = out / ARTIFACT.name, out / "artifact-fp16", out / "findings.png"
    _require_checkpoint()
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
        _say(f"      {_who_drafted(drafted)}")
    for number, film in enumerate(drafted, start=1):
        _print_film(number, film, width)
    _say(_score(drafted))
    _say(f"{textwrap.fill(notice, width)}\n")
    with _step(5, f"Saving films and texts as {_shown(picture)}"):
        draw_picture(drafted, notice).save(picture)
    _say_what_next(artifact, drafted[0].study.path.with_suffix(".dcm"), listed)
    _say(f"\nThe demo took {time.perf_counter() - started:.0f} s.")
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


if __name__ == "__main__":
    sys.exit(main())
