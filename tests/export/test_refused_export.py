"""What an export refuses, before the work where that can be: settings, lists of studies, weights; and its options."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_checkpoint import edit_tensors
from small_export import RTN, Folders, fails, settings_for

import export.pipeline
import export.quantize.layerwise
from export import ExportSettings, GptqSettings, TokenWeights, export_artifact
from export.__main__ import main
from export.settings import DEFAULTS
from export.source.checkpoint import open_checkpoint
from lite.errors import ArtifactError, BackendUnavailable, CheckpointError, LiteError


@pytest.mark.parametrize(
    ("changes", "settings_of", "error", "match"),
    [
        (
            {"vocab_size": 401},
            lambda listed: settings_for(listed, lm_head="int8"),
            CheckpointError,
            r"lm_head\.weight: got 401 outputs .* of 4 · choose --lm-head fp16",
        ),
        (
            {"intermediate_size": 224},
            lambda listed: settings_for(listed, group_size=128),
            CheckpointError,
            r"down_proj\.weight: got 224 inputs .* whole groups of 128 .* choose --group-size 32, -1",
        ),
        (
            {"intermediate_size": 96},
            lambda _: ExportSettings(decoder_format="bnb-nf4"),
            CheckpointError,
            r"down_proj\.weight: got 96 inputs .* multiple of 64, the block of NF4 · choose bnb-int8 or fp16",
        ),
        (
            {"head_dim": 40},
            lambda listed: dataclasses.replace(settings_for(listed, **RTN, group_size=-1), onnx=True),
            ArtifactError,
            "head_dim=40 · expected a multiple of 16.*--engine onnx",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_the_work(
    folders: Folders, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, int], settings_of: Callable[[Path], ExportSettings], error: type[LiteError], match: str,
) -> None:  # fmt: skip
    source = open_checkpoint(*folders)
    odd = dataclasses.replace(source, decoder=dataclasses.replace(source.decoder, **changes))
    monkeypatch.setattr(export.pipeline, "open_checkpoint", lambda *_, **__: odd)
    fails(folders, tmp_path / "artifact", settings_of(listed), error, match)


def test_a_study_that_cannot_be_used_is_left_out_and_said(
    folders: Folders, listed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = json.loads(listed.read_text())
    (listed.parent / "damaged.png").write_bytes(b"not a film")
    broken = [
        entries[0] | {"id": "damaged", "image": "damaged.png"},
        entries[0] | {"id": "silent", "conversations": [{}, {"value": " "}]},
        entries[0] | {"id": "long", "reason": "long " * 9000},
    ]
    data = tmp_path / "studies.json"
    data.write_text(json.dumps([*broken, *entries]))
    settings = settings_for(data, calibration_images=listed.parent, calibration_studies=len(entries) + 3)
    calibration = export_artifact(*folders, tmp_path / "artifact", settings).manifest.parts.decoder.calibration
    assert calibration is not None
    assert (calibration.studies, calibration.left_out) == (len(entries), 3)
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    for line, said in zip(left_out, ("1 without findings", "damaged.png", "got a prompt"), strict=True):
        assert said in line


def test_films_that_are_calibrated_on_and_judged_are_told_by_their_bytes(
    folders: Folders, listed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = json.loads(listed.read_text())
    # One film under another name, beside one that the calibration does not have.
    (tmp_path / "copy.png").write_bytes((listed.parent / entries[0]["image"]).read_bytes())
    (tmp_path / "other.png").write_bytes((listed.parent / entries[1]["image"]).read_bytes())
    calibrated = tmp_path / "calibrated.json"
    calibrated.write_text(json.dumps([entries[0], *entries[2:]]))
    judged = tmp_path / "judged.json"
    judged.write_text(json.dumps([entries[0] | {"image": "copy.png"}, entries[1] | {"image": "other.png"}]))
    settings = dataclasses.replace(settings_for(calibrated, calibration_images=listed.parent), verify_data=judged)
    artifact = export_artifact(*folders, tmp_path / "artifact", settings)
    assert "judged.json: 1 of 2 films are those of the calibration" in caplog.text
    calibration = artifact.manifest.parts.decoder.calibration
    assert calibration is not None
    assert len(calibration.films) == len(entries) - 1


def test_calibration_data_that_cannot_be_used_is_named(folders: Folders, listed: Path, tmp_path: Path) -> None:
    entries = json.loads(listed.read_text())
    data, out = tmp_path / "studies.json", tmp_path / "out" / "artifact"
    out.parent.mkdir()

    def refused(content: Any, match: str, error: type[Exception] = LiteError, **gptq: Any) -> None:
        data.write_text(content if isinstance(content, str) else json.dumps(content))
        fails(folders, out, settings_for(data, calibration_images=listed.parent, **gptq), error, match)

    refused("", r"studies\.json: got a file that cannot be read")
    refused([], "got no list, or an empty one")
    refused([{"image": "0.png"}], "got 1 studies, none of which can be used .*got no findings")
    gone = [entry | {"id": f"gone{number}", "image": f"gone{number}.png"} for number, entry in enumerate(entries[:2])]
    refused([*entries, *gone], r"got 2 of 14 films that are not there, the first .*gone0\.png.*--calibration-images")
    (listed.parent / "broken.png").write_bytes(b"not a film")
    refused([entries[0] | {"image": "broken.png"}], "none of which can be used .*broken.png")
    refused([entries[0] | {"conversations": [{}, {"value": ""}]}], "got no study that can be used .*without findings")
    refused([entries[0] | {"conversations": [{}, {"value": 3}]}], "its value is 3, not text")
    refused([entries[0] | {"reason": 3}], "its reason is 3, not text")
    refused([entries[0] | {"reason": "long " * 9000}], "none of which can be used .*got a prompt")
    data.unlink()
    fails(folders, out, settings_for(data), LiteError, "got a file that cannot be read")


def test_a_non_finite_layer_is_named(
    folders: Folders, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export.quantize.layerwise.forward.attended

    def poisoned(*args: Any) -> torch.Tensor:
        out = right(*args)
        out[0, 0] = float("nan")
        return out

    monkeypatch.setattr(export.quantize.layerwise.forward, "attended", poisoned)
    for fold_scales in (True, False):
        fails(
            folders,
            tmp_path / "artifact",
            settings_for(listed, fold_scales=fold_scales),
            CheckpointError,
            r"^model\.layers\.0\.self_attn\.o_proj: got .*not finite",
        )


@pytest.mark.parametrize("decoder_format", ["fp16", "gptq-int4", "rtn", "bnb-nf4", "bnb-int8"])
def test_a_weight_beyond_float16_is_named(own: Folders, listed: Path, tmp_path: Path, decoder_format: Any) -> None:
    names = [f"base_model.model.model.layers.1.mlp.up_proj.lora_{factor}.weight" for factor in "AB"]
    edit_tensors(own[0] / "adapter_model.bin", lambda state: state | {name: state[name] + 1000 for name in names})
    calibrated = {"gptq-int4": settings_for(listed), "rtn": settings_for(listed, **RTN)}
    settings = calibrated.get(decoder_format) or ExportSettings(decoder_format=decoder_format)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: got .*fits float16"):
        export_artifact(*own, tmp_path / "artifact", settings)
    assert not (tmp_path / "artifact").exists()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[ExportSettings]:
    """What the command line hands over to an export that does nothing."""
    settings: list[ExportSettings] = []

    def take(*arguments: Any) -> None:
        settings.append(arguments[-1])
        raise ArtifactError("enough")

    monkeypatch.setattr(export.pipeline, "export_artifact", take)
    return settings


def test_the_command_line_has_the_defaults_of_the_settings(
    tmp_path: Path, taken: list[ExportSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", "a", "--base", "b", "--out", str(tmp_path / "artifact"), "--quiet"]) == 1
    assert capsys.readouterr().err == "error: enough\n"
    assert taken == [ExportSettings()]


def test_the_command_line_takes_every_setting(tmp_path: Path, taken: list[ExportSettings]) -> None:
    arguments = ["--checkpoint", "a", "--base", "b", "--out", str(tmp_path / "x"), "--quiet", "--decoder", "gptq-int8"]
    arguments += ["--calibration-data", "l.json", "--calibration-images", "d", "--calibration-studies", "7"]
    arguments += ["--group-size", "-1", "--token-weights", "0.5,2", "--activation-order", "none"]
    arguments += ["--clip", "none", "--refine", "0", "--no-fold-scales", "--lm-head", "int8", "--vision", "int8"]
    arguments += ["--signs", "positive", "--no-through-attention"]
    assert main(arguments) == 1
    gptq = GptqSettings(
        group_size=-1,
        calibration_data=Path("l.json"),
        calibration_images=Path("d"),
        calibration_studies=7,
        token_weights=TokenWeights(image=0.5, prompt=2.0),
        activation_order="none",
        clip="none",
        signs="positive",
        through_attention=False,
        refine=0,
        fold_scales=False,
        lm_head="int8",
    )
    assert taken == [ExportSettings(decoder_format="gptq-int8", vision_format="int8", gptq=gptq)]
    fields = [field.name for field in dataclasses.fields(gptq) if field.name != "method"]
    assert all(getattr(gptq, name) != getattr(DEFAULTS.gptq, name) for name in fields)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--checkpoint"),
        (["--decoder", "gguf"], "invalid choice: 'gguf'"),
        (["--verify-tokens", "0"], "got '0', expected a whole number from 1"),
        (["--verify-studies", "few"], "got 'few', expected a whole number from 1"),
        (["--group-size", "48"], "--group-size"),
        (["--token-weights", "1"], "--token-weights"),
        (["--token-weights", "1,-2"], "--token-weights"),
        (["--refine", "x"], "--refine"),
    ],
)
def test_wrong_use_exits_with_2(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = ["--checkpoint", "a", "--base", "b", "--out", "c"] if arguments else []
    with pytest.raises(SystemExit) as exit_info:
        main([*required, *arguments])
    assert exit_info.value.code == 2
    assert named in capsys.readouterr().err


def test_settings_that_exclude_each_other_are_refused(listed: Path) -> None:
    rounded = {"decoder_format": "gptq-int4"}
    for values, gptq, match in (
        (rounded, {}, r"got no calibration data .*--calibration-data LIST.json.*--method rtn"),
        ({"decoder_format": "bnb-nf4"}, {"group_size": 64}, "got group_size for bnb-nf4"),
        ({}, {"calibration_data": listed}, "got calibration_data for fp16"),
        *(
            (rounded, {"method": "rtn", **ignored}, f"got {next(iter(ignored))} .* expected it with --method gptq only")
            for ignored in ({"calibration_data": listed}, {"refine": 1}, {"fold_scales": False}, {"clip": "none"})
        ),
        (rounded, {"calibration_data": listed, "refine": -1}, "refine=-1 · expected 1 and 0 or more"),
        ({"onnx": True}, {}, "got the onnx engine for fp16"),
        ({"activations": "float16"}, {}, "got activations float16 without the onnx engine"),
        ({"image_folder": listed.parent}, {}, "got image_folder without verify_data"),
        ({"decoder_format": "int3"}, {}, "got decoder format 'int3'"),
        ({"verify_studies": 0}, {}, "verify_studies=0"),
        *(
            (rounded, {"calibration_data": listed, **wrong}, f"got .*{next(iter(wrong.values()))}.*expected one of")
            for wrong in (
                {"group_size": 48},
                {"method": "awq"},
                {"lm_head": "int4"},
                {"clip": "l1"},
                {"signs": "negative"},
            )
        ),
    ):
        with pytest.raises(ArtifactError, match=match):
            ExportSettings(gptq=GptqSettings(**gptq), **values)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="got token weights -1"):
        TokenWeights(image=-1, prompt=1)


@pytest.mark.parametrize("device", ["abacus", "gpu", "mps", "cuda:7"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_opened(tmp_path: Path, device: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"got device '{device}'"):
        export_artifact(
            tmp_path / "nowhere", tmp_path / "nowhere", tmp_path / "artifact", ExportSettings(device=device)
        )


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "export.pipeline")
    with pytest.raises(BackendUnavailable, match=r"got no package 'torch' .*llava-rad-lite\[export\]"):
        export.export_artifact  # noqa: B018
