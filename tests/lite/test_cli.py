"""`python -m lite`, as somebody at a terminal meets it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repository import ROOT

from lite.__main__ import main
from lite.artifact.open import Artifact
from lite.cli.notes import report
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.errors import LiteError
from lite.model import FindingsModel
from lite.studies.results import SHORT_NOTICE
from lite.vision import VisionEncoder

NOTICE = "For tests. Not for clinical use."


def run(*arguments: str | Path) -> int:
    """Run the command line in this process; argparse leaves with SystemExit."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else -1


@pytest.fixture
def generate(tiny_artifact: Artifact) -> list[str]:
    return ["generate", str(tiny_artifact.path), "--device", "cpu"]


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_several_films_are_named(
    generate: list[str], films: list[Path], tiny_model: FindingsModel, capsys: pytest.CaptureFixture[str],
    batch_size: str,
) -> None:  # fmt: skip
    assert run(*generate, *films[:4], "--batch-size", batch_size) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"== {image}\n{tiny_model.findings(image).text}\n" for image in films[:4])
    assert err.count(NOTICE) == 1


def test_what_drafts_many_studies_moves_to_large_pages_and_what_drafts_one_does_not(
    generate: list[str], films: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    monkeypatch.setattr("lite.memory.process.use_large_pages", lambda: moved.append("moved"))
    assert run(*generate, films[0], "--max-new-tokens", "2") == 0
    assert moved == []
    command = ("run", *generate[1:], films[0].parent, "--out", tmp_path / "out.jsonl", "--max-new-tokens", "2")
    run(*command)
    assert moved == ["moved"]


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_json(
    generate: list[str], films: list[Path], tiny_model: FindingsModel, capsys: pytest.CaptureFixture[str],
    batch_size: str,
) -> None:  # fmt: skip
    assert run(*generate, *films[:3], "--json", "--batch-size", batch_size, "--max-new-tokens", "5") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == [str(image) for image in films[:3]]
    for line, image in zip(lines, films, strict=False):
        assert (line["id"], line["reason"], line["query"], line["reference"]) == (str(image), None, None, None)
        assert line["prediction"] == tiny_model.findings(image, max_new_tokens=5).text
        assert line["finish_reason"] == "length"
        assert len(line["token_ids"]) == 5
        stages = {"image_s", "vision_s", "prefill_s", "decode_s", "decode_steps_s", "ttft_s", "total_s"}
        assert set(line["timings"]) == stages | {"queued_s", "batch_size"}
        assert line["memory"]["decode"]["rss_bytes"] > 10_000_000
        assert line["artifact_id"] == tiny_model.artifact.id
        assert line["notice"] == SHORT_NOTICE


MODES = pytest.mark.parametrize("mode", [[], ["--json"], ["--batch-size", "2"], ["--json", "--batch-size", "4"]])


@MODES
def test_a_bad_file_is_reported_skipped_and_remembered(
    generate: list[str], films: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: list[str]
) -> None:
    bad = tmp_path / "notes.png"
    bad.write_text("no image")
    wrong = [bad, tmp_path / "nowhere.png", tmp_path]
    assert run(*generate, films[0], *wrong, films[1], *mode) == 1
    out, err = capsys.readouterr()
    reported = [line for line in err.splitlines() if line.startswith("error: ")]
    for line, name in zip(reported, wrong, strict=True):
        assert str(name) in line
        assert line.count(" · ") == 2
    if "--json" in mode:
        lines = [json.loads(line) for line in out.splitlines()]
        assert [sorted(line) for line in lines[1:4]] == [
            ["error", "id", "image", "notice", "query", "reason", "reference"]
        ] * 3
        assert [line["image"] for line in lines] == [str(path) for path in (films[0], *wrong, films[1])]
    else:
        assert out.count("== ") == 2


def test_a_dicom_without_pydicom_is_reported_and_the_rest_goes_on(
    generate: list[str], films: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "pydicom", None)
    dicom = tmp_path / "film.dcm"
    dicom.write_bytes(b"\0" * 128 + b"DICM")
    assert run(*generate, films[0], dicom, films[1], "--max-new-tokens", "2") == 1
    out, err = capsys.readouterr()
    assert f"\nerror: {dicom}: got a DICOM file and no pydicom" in err
    assert re.findall("^== .*$", out, re.MULTILINE) == [f"== {films[0]}", f"== {films[1]}"]


def test_an_overflow_ends_its_line_and_the_rest_goes_on(
    generate: list[str], films: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tower, seen = VisionEncoder.__call__, []

    def blind_for_the_second(self: VisionEncoder, pixel_values: np.ndarray, out: Any, **about: Any) -> Any:
        seen.append(pixel_values)
        return run_tower(self, pixel_values, out, **about) * (np.nan if len(seen) == 2 else 1.0)

    monkeypatch.setattr(VisionEncoder, "__call__", blind_for_the_second)
    assert run(*generate, *films[:3], "--max-new-tokens", "2") == 1
    out, err = capsys.readouterr()
    assert err.count("error: ") == 1
    assert f"error: {films[1]}: got logits that are not finite" in err
    # The film was named before it failed: an empty line stands for its text.
    assert re.search(rf"^== {films[0]}\n.+\n== {films[1]}\n\n== {films[2]}\n.+\n$", out)


def test_a_short_name_is_not_mistaken_for_a_word_of_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lite.cli.notes.say", said.append)
    report("a", LiteError("got a cat · expected a film · take one"))
    report("./a", LiteError("a: got a cat · expected a film · take one"))
    report("a", LiteError("a: got a cat · expected a film · take one"))
    assert said == ["error: a: got a cat · expected a film · take one"] * 3


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate"],
        ["generate", "artifact"],
        ["unknown"],
        ["generate", "artifact", "film.png", "--surprise"],
        ["generate", "artifact", "film.png", "--batch-size", "0"],
        ["generate", "artifact", "film.png", "--max-new-tokens", "many"],
        ["generate", "artifact", "film.png", "--rendering", "pretty"],
        ["generate", "artifact", "film.png", "--reason", "a", "--query", "b"],
        ["generate", "artifact", "film.png", "--memory-limit", "much"],
        ["run", "artifact", "studies.json"],
        ["info"],
    ],
)
def test_wrong_use_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert "usage: python -m lite" in capsys.readouterr().err


def test_an_unknown_option_is_answered_by_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "artifact", "film.png", "--reson", "a") == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: python -m lite generate")
    assert "--reason TEXT" in err
    assert err.endswith("python -m lite generate: error: unrecognized arguments: --reson a\n")


def test_help_is_for_newcomers(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["generate", "--help"], ["run", "--help"], ["info", "--help"]):
        assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert "not for clinical use" in out
    assert "example: python -m lite generate" in out
    assert "example: python -m lite run" in out


@pytest.mark.parametrize(("door", "program"), [("bench", "python -m lite.bench"), ("export", "python -m export")])
def test_doors_lead_to_command_lines_of_their_own(door: str, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(door, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: {program}")
    assert run(door, "--surprise") == 2


def test_a_bad_artifact_is_one_line(films: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate", tmp_path, films[0]], ["info", tmp_path], ["info", tmp_path / "nowhere"]):
        assert run(*command) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"error: {tmp_path}")
        assert err.count("\n") == 1


def test_a_bad_reason_is_said_once(generate: list[str], films: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for reason in ("<image>", "long " * 1000):
        assert run(*generate, *films[:3], "--reason", reason) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: got ")
        assert err.count("\n") == 1


def test_letters_stay_letters_in_json(
    generate: list[str], films: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*generate, films[0], "--json", "--reason", "Müdigkeit", "--max-new-tokens", "1") == 0
    out = capsys.readouterr().out
    assert '"reason": "Müdigkeit"' in out
    assert json.loads(out)["reason"] == "Müdigkeit"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_full_disk_is_one_line(tiny_onnx_artifact: Artifact, films: list[Path], flags: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        process = subprocess.run(
            [sys.executable, "-m", "lite", "generate", tiny_onnx_artifact.path, films[0], films[1], *flags,
             "--max-new-tokens", "2"],
            cwd=ROOT, env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            stdout=full, stderr=subprocess.PIPE, encoding="utf-8", check=False,
        )  # fmt: skip
    assert process.returncode == 1
    *notes, error = process.stderr.splitlines()
    assert (
        error == "error: output: got No space left on device · expected to read or write it · check the disk and "
        "its permissions"
    )
    assert all(line.startswith("note: ") for line in notes)


def test_a_cut_text_says_so(generate: list[str], films: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*generate, films[0], "--max-new-tokens", "2") == 0
    assert "cut after 2 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [[], ["--batch-size", "2"]])
def test_what_is_slower_than_it_has_to_be_is_said_once(
    generate: list[str], films: list[Path], mode: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(LlamaDecoder, "fallbacks", ("no CUDA graph: the driver is too old",))
    assert run(*generate, *films[:3], *mode) == 0
    assert capsys.readouterr().err.count("note: no CUDA graph: the driver is too old\n") == 1
    assert run(*generate, films[0], "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["backend"], shown["fallbacks"]) == ("torch", ["no CUDA graph: the driver is too old"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory-limit", "1MiB"], "got a memory limit of 1.0 MiB · expected at least "),
        (["--fp16-accumulation"], "got fp16_accumulation for torch on cpu · expected it for torch on a GPU only"),
        (["--cache-dtype", "float16"], "got cache_dtype 'float16' · expected int8, or float32"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(
    generate: list[str], films: list[Path], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*generate, films[0], *flags) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_info(tiny_artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", tiny_artifact.path) == 0
    out = capsys.readouterr().out
    for expected in (tiny_artifact.id, "28 px, 4 image tokens", "2 layers", "context 640", "vision.onnx", NOTICE):
        assert expected in out
    assert "verified" not in out
    assert run("info", tiny_artifact.path, "--verify", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["artifact"] == tiny_artifact.id
    assert value["verified"] is True
    assert value["manifest"]["notice"] == NOTICE


def test_a_damaged_file_is_named_and_verification_can_be_left_out(
    own_artifact: Path, films: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_artifact / "decoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for command in (("info", own_artifact, "--verify"), ("generate", own_artifact, films[0])):
        assert run(*command) == 1
        assert "decoder/model.safetensors: got sha256" in capsys.readouterr().err
    assert run("generate", own_artifact, films[0], "--no-verify") == 0


@contextlib.contextmanager
def talking(artifact: Artifact, film: Path) -> Iterator[tuple[subprocess.Popen[bytes], bytes]]:
    """Yield a process that has said its first word about films that it would take minutes for, and that word."""
    command = [sys.executable, "-m", "lite", "generate", artifact.path, *[film] * 2_000]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Who runs the tests in the background ignores Ctrl-C, and so would the child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip
    try:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 8)
        assert first, "it ended before its first word"
        yield process, first
    finally:
        process.kill()


class Written(io.RawIOBase):
    """A file that remembers what reached it, write by write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.writes.append(bytes(data))
        return len(data)


def test_text_leaves_piece_by_piece(
    generate: list[str], films: list[Path], tiny_model: FindingsModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Written()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(written), encoding="utf-8"))
    assert run(*generate, films[0]) == 0
    assert [piece.decode() for piece in written.writes] == [*tiny_model.stream(films[0]), "\n"]


def test_ctrl_c_ends_it_cleanly(tiny_onnx_artifact: Artifact, films: list[Path]) -> None:
    with talking(tiny_onnx_artifact, films[0]) as (process, first):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert err.splitlines()[-1] == b"interrupted"
    assert (first + out).endswith(b"\n")


def test_a_reader_that_leaves_is_no_drama(tiny_onnx_artifact: Artifact, films: list[Path]) -> None:
    with talking(tiny_onnx_artifact, films[0]) as (process, _):
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=300)
    assert process.returncode == 141
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err
