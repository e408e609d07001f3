"""`python -m lite`, as somebody at a terminal meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_tiny_artifact

from lite.__main__ import main
from lite.artifact import Artifact
from lite.model import FindingsModel

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


def test_text(
    generate: list[str], films: list[Path], tiny_model: FindingsModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*generate, films[0], "--reason", "cough") == 0
    out, err = capsys.readouterr()
    assert out == tiny_model.findings(films[0], "cough").text + "\n"
    assert err.count(NOTICE) == 1


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_several_films_are_named(
    generate: list[str],
    films: list[Path],
    tiny_model: FindingsModel,
    capsys: pytest.CaptureFixture[str],
    batch_size: str,
) -> None:
    assert run(*generate, *films[:4], "--batch-size", batch_size) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"== {image}\n{tiny_model.findings(image).text}\n" for image in films[:4])
    assert err.count(NOTICE) == 1


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_json(
    generate: list[str],
    films: list[Path],
    tiny_model: FindingsModel,
    capsys: pytest.CaptureFixture[str],
    batch_size: str,
) -> None:
    assert run(*generate, *films[:3], "--json", "--batch-size", batch_size, "--max-new-tokens", "5") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == [str(image) for image in films[:3]]
    for line, image in zip(lines, films, strict=False):
        assert line["text"] == tiny_model.findings(image, max_new_tokens=5).text
        assert line["finish_reason"] == "length"
        assert line["num_new_tokens"] == 5
        stages = {"image_s", "vision_s", "prefill_s", "decode_s", "ttft_s", "total_s", "batch_size"}
        assert set(line["timings"]) == stages
        assert line["memory"]["peak_rss_bytes"] > 10_000_000
        assert line["artifact"] == tiny_model.artifact.id
        assert line["notice"] == NOTICE


@pytest.mark.parametrize("mode", [[], ["--json"], ["--batch-size", "2"]])
def test_a_bad_file_is_reported_skipped_and_remembered(
    generate: list[str], films: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: list[str]
) -> None:
    bad = tmp_path / "notes.png"
    bad.write_text("no image")
    assert run(*generate, films[0], bad, tmp_path / "nowhere.png", tmp_path, films[1], *mode) == 1
    out, err = capsys.readouterr()
    reported = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(reported) == 3
    for line, name in zip(reported, (bad, tmp_path / "nowhere.png", tmp_path), strict=True):
        assert str(name) in line
        assert line.count(" · ") == 2
    if mode == ["--json"]:
        lines = [json.loads(line) for line in out.splitlines()]
        assert [sorted(line) for line in lines[1:4]] == [["error", "image", "notice"]] * 3
        assert [line["image"] for line in lines] == [str(p) for p in (films[0], *reported_paths(tmp_path), films[1])]
    else:
        assert out.count("== ") == 2


def reported_paths(tmp_path: Path) -> list[Path]:
    return [tmp_path / "notes.png", tmp_path / "nowhere.png", tmp_path]


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
        ["info"],
    ],
)
def test_wrong_use_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert "usage: python -m lite" in capsys.readouterr().err


def test_help_is_for_newcomers(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["generate", "--help"], ["info", "--help"]):
        assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert "not for clinical use" in out
    assert "example: python -m lite generate" in out


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


def test_a_cut_text_says_so(generate: list[str], films: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*generate, films[0], "--max-new-tokens", "2") == 0
    assert "cut after 2 tokens" in capsys.readouterr().err


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


def test_info_verify_names_the_damaged_file(own_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = own_artifact / "vision.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    assert run("info", own_artifact, "--verify") == 1
    assert "vision.onnx: got sha256" in capsys.readouterr().err


def test_verification_can_be_left_out(
    own_artifact: Path, films: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_artifact / "decoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run("generate", own_artifact, films[0]) == 1
    assert run("generate", own_artifact, films[0], "--no-verify") == 0
    capsys.readouterr()


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "lite", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Path:
    """An artifact with room to talk for many seconds."""
    return write_tiny_artifact(
        tmp_path_factory.mktemp("talkative") / "artifact",
        tokenizer_model,
        llama_changes={"max_position_embeddings": 100_000},
    ).path


def test_text_streams_and_ctrl_c_ends_it_cleanly(talkative: Path, films: list[Path]) -> None:
    process = start("generate", talkative, films[0], "--max-new-tokens", "50000")
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        first = os.read(process.stdout.fileno(), 16384)
        assert 0 < len(first) < 4096, "text must come in pieces, not when a buffer of 8192 bytes is full"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert err.splitlines()[-1] == b"interrupted"
    assert (first + out).endswith(b"\n")


def test_a_reader_that_leaves_is_no_drama(talkative: Path, films: list[Path]) -> None:
    process = start("generate", talkative, films[0], "--max-new-tokens", "50000")
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        os.read(process.stdout.fileno(), 8)
        process.stdout.close()
        with process.stderr:
            err = process.stderr.read()
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.kill()
    assert process.returncode == 141
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


def test_module_runs_as_a_program(tiny_artifact: Artifact) -> None:
    process = start("info", tiny_artifact.path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert tiny_artifact.id.encode() in out
    assert err == b""
