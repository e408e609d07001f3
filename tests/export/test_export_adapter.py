"""`python -m export adapter`: what is kept computes what the checkpoint with it does, and nothing else has changed."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import hospital
import pytest
import torch
from exported import folder_hash
from random_checkpoint import edit_tensors
from small_export import Folders, Small, settings_for

from export import AdapterSettings, add_adapter, export_artifact
from export.__main__ import main
from export.quantize import low_rank
from export.settings import TrainedOn
from export.source.checkpoint import Checkpoint
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import PUBLISHED, AdapterPart
from lite.errors import ArtifactError, CheckpointError

QUICK = AdapterSettings(verify_studies=2, verify_tokens=24, tolerance=5.0, device="cpu")


@pytest.fixture(scope="session")
def northside(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospital.write_folder(
        tmp_path_factory.mktemp("hospital") / "northside", hospital.random_factors(source.decoder)
    )


def added(
    folder: Path, artifact: Artifact, folders: Folders, out: Path, settings: AdapterSettings = QUICK
) -> tuple[Artifact, AdapterPart]:
    made = add_adapter(
        folder, artifact.path, "northside", base=folders[1], published=folders[0], settings=settings, out=out
    )
    return made, made.manifest.parts.adapters["northside"]


@pytest.mark.parametrize("on", ["base", "published"])
def test_beside_float_weights_nothing_is_lost(
    northside: Path, small: Small, folders: Folders, tmp_path: Path, on: TrainedOn
) -> None:
    settings = dataclasses.replace(QUICK, on=on)
    _, part = added(northside, small("fp16"), folders, tmp_path / "out", settings)
    found = part.fidelity
    assert found is not None
    assert found.divergence.mean_kl < 2e-5
    assert found.without.mean_kl > 100 * found.divergence.mean_kl
    assert found.texts == 2
    assert found.same_texts > 0  # random weights are near ties: one text may part from the float32 one
    # What was trained on the base has the published LoRA taken out; ranks add up.
    assert (part.on, part.rank) == (on, 4 + 8 * (on == "base"))
    assert (part.projector, part.correction, part.is_default) == (None, 0, False)


def test_scaled_channels_are_found_in_the_integers(small: Small, source: Checkpoint) -> None:
    artifact = small("gptq-int8")  # whose rounding hides nothing
    for index in range(source.decoder.num_hidden_layers):
        merged = source.read_layer(index).merged()
        layer = low_rank.read_stored(artifact, index, merged)
        plain, scaled = (
            [
                float((weight - of(linear, merged[f"{linear}.weight"])).norm() / weight.norm())
                for linear, weight in layer.weights.items()
            ]
            for of in (lambda _, weight: weight, layer.scaled)
        )
        assert max(scaled) < 0.02
        assert max(plain) > 0.2


def test_a_decoder_without_scales_is_taken_as_it_is(small: Small, source: Checkpoint) -> None:
    merged = source.read_layer(0).merged()
    layer = low_rank.read_stored(small("rtn-int4"), 0, merged)
    assert torch.equal(layer.rows["self_attn.v_proj"], torch.ones(len(layer.weights["self_attn.v_proj"])))
    assert torch.equal(layer.columns["mlp.down_proj"], torch.ones(layer.weights["mlp.down_proj"].shape[1]))


def test_beside_integers_a_correction_makes_up_for_rounding(
    northside: Path, small: Small, folders: Folders, tmp_path: Path
) -> None:
    artifact = small("rtn-int4")
    before = folder_hash(artifact.path)
    made, plain = added(northside, artifact, folders, tmp_path / "plain")
    _, corrected = added(
        northside, artifact, folders, tmp_path / "corrected", dataclasses.replace(QUICK, correction=24)
    )
    assert plain.fidelity is not None
    assert corrected.fidelity is not None
    assert corrected.fidelity.divergence.mean_kl < 0.7 * plain.fidelity.divergence.mean_kl
    assert (corrected.rank, corrected.correction) == (plain.rank + 24, 24)
    # Of what was there every byte is there still, in both.
    assert folder_hash(artifact.path) == before
    for name, record in artifact.manifest.files.items():
        assert made.manifest.files[name] == record
    assert made.id != artifact.id
    made.verify()


def test_what_loses_too_much_is_refused_with_what_a_correction_would_make_of_it(
    northside: Path, small: Small, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.adapter.OFFERED", (4, 24))
    strict = dataclasses.replace(QUICK, tolerance=1e-7)
    offer = r"expected at most 1e-07 · --correction 4 would make [\d.]+ of it; --correction 24 would make [\d.]+ of it"
    with pytest.raises(ArtifactError, match=rf"got an adapter that loses [\d.]+ nats a token .* {offer}"):
        added(northside, small("rtn-int4"), folders, tmp_path / "out", strict)
    assert list(tmp_path.iterdir()) == []
    kept = dataclasses.replace(strict, keep_anyway=True)
    assert added(northside, small("rtn-int4"), folders, tmp_path / "out", kept)[1].fidelity is not None


def test_a_projector_of_its_own_is_written_and_the_published_one_is_not(
    source: Checkpoint, small: Small, folders: Folders, tmp_path: Path
) -> None:
    published = source.projector.read(source.projector.entries)
    factors = hospital.random_factors(source.decoder)
    same = hospital.write_folder(tmp_path / "same", factors, projector=published)
    name = max(published)
    changed = published | {name: published[name] + 0.5}  # one tensor is enough
    other = hospital.write_folder(tmp_path / "other", factors, projector=changed)
    assert added(same, small("fp16"), folders, tmp_path / "a")[1].projector is None
    _, part = added(other, small("fp16"), folders, tmp_path / "b")
    assert part.projector == "adapters/northside/projector.onnx"
    assert part.fidelity is not None
    assert part.fidelity.divergence.mean_kl < 2e-5
    assert {*part.files} == {part.factors, part.projector}


def test_a_lora_that_is_kept_is_what_everybody_gets(
    northside: Path, folders: Folders, listed: Path, tmp_path: Path, small: Small
) -> None:
    settings = dataclasses.replace(settings_for(listed), keep_lora=True)
    kept = export_artifact(*folders, tmp_path / "kept", settings)
    assert kept.manifest.parts.default_adapter == PUBLISHED
    fidelity, merged = kept.manifest.parts.decoder.fidelity, small("gptq-int4").manifest.parts.decoder.fidelity
    assert fidelity is not None
    assert merged is not None
    assert fidelity.divergence.mean_kl < 2 * merged.divergence.mean_kl
    _, part = added(northside, kept, folders, tmp_path / "out")
    assert part.rank == 4  # nothing has to be taken out
    assert part.fidelity is not None
    assert part.fidelity.divergence.mean_kl < 0.5 * part.fidelity.without.mean_kl


def test_beside_a_lora_that_is_kept_one_on_top_of_it_is_what_it_is_beside_a_merged_one(
    northside: Path, folders: Folders, listed: Path, tmp_path: Path, small: Small
) -> None:
    kept = export_artifact(*folders, tmp_path / "kept", dataclasses.replace(settings_for(listed), keep_lora=True))
    on = dataclasses.replace(QUICK, on="published", correction=8, verify_data=listed)
    made = [added(northside, small("gptq-int4"), folders, tmp_path / "a", on)[1]]
    made.append(added(northside, kept, folders, tmp_path / "b", on)[1])
    assert [part.rank for part in made] == [4 + 8, 4 + 8 + 8]
    merged, beside = (part.fidelity for part in made)
    assert merged is not None
    assert beside is not None
    assert beside.divergence.mean_kl == pytest.approx(merged.divergence.mean_kl, rel=0.5)
    assert beside.without.mean_kl == pytest.approx(merged.without.mean_kl, rel=0.05)
    assert beside.label_f1_without is not None


# -- Refused, with everything as it was ------------------------------------------------------------------------------


def test_another_base_is_told_by_its_hash(northside: Path, small: Small, own: Folders, tmp_path: Path) -> None:
    shard = own[1] / "pytorch_model-00002-of-00002.bin"
    edit_tensors(shard, lambda state: {name: tensor * 1.001 for name, tensor in state.items()})
    with pytest.raises(CheckpointError, match="00002-of-00002.bin: got another file than the artifact was made of"):
        added(northside, small("fp16"), own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_published_lora_is_told_by_its_hash(
    northside: Path, small: Small, own: Folders, tmp_path: Path
) -> None:
    edit_tensors(own[0] / "adapter_model.bin", lambda state: {name: 2 * tensor for name, tensor in state.items()})
    with pytest.raises(CheckpointError, match="adapter_model.bin: got another file than the artifact was made of"):
        added(northside, small("fp16"), own, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["", "a b", "../a", "base", "off", PUBLISHED, "llava-rad-phantom", "n\n", "ſ", "x" * 65]
)
def test_a_name_that_clients_could_not_use_is_refused(
    northside: Path, small: Small, folders: Folders, name: str
) -> None:
    with pytest.raises(ArtifactError, match=re.escape(f"got the name {name!r} · expected at most 64 letters")):
        add_adapter(
            northside, small("fp16").path, name, base=folders[1], published=folders[0], settings=QUICK, out="unused"
        )


def test_what_it_was_trained_on_has_to_be_said_where_the_configuration_does_not(
    source: Checkpoint, small: Small, folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    factors = hospital.random_factors(source.decoder)
    folder = hospital.write_folder(tmp_path / "a", factors, base="/home/someone/llava-merged")
    with pytest.raises(CheckpointError, match="names '/home/someone/llava-merged' as its base .* --on base, or --on"):
        added(folder, small("fp16"), folders, tmp_path / "out")
    on = hospital.write_folder(tmp_path / "b", factors, base="somewhere/llava-rad-phantom")
    assert added(on, small("fp16"), folders, tmp_path / "out")[1].on == "published"
    assert "got --on" not in caplog.text
    other = dataclasses.replace(QUICK, on="base")
    assert added(on, small("fp16"), folders, tmp_path / "other", other)[1].on == "base"
    assert "got --on base of an adapter whose configuration names somewhere/llava-rad-phantom" in caplog.text


def test_an_adapter_is_replaced_only_where_that_is_asked_for(
    northside: Path, small: Small, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = Path(shutil.copytree(small("fp16").path, tmp_path / "artifact"))
    command = ["adapter", str(northside), "--artifact", str(artifact), "--name", "north", "--base", str(folders[1])]
    command += ["--published", str(folders[0]), "--verify-studies", "1", "--verify-tokens", "8", "--quiet"]
    assert main([*command, "--tolerance", "5"]) == 0
    out = capsys.readouterr().out
    assert "adapter north" in out
    assert f"python -m lite generate {artifact} FILM.png --adapter north" in out
    first = load_artifact(artifact)
    assert main(command) == 1
    assert "got an adapter north, which it has" in capsys.readouterr().err
    assert load_artifact(artifact).id == first.id
    assert main([*command, "--name", "North", "--replace"]) == 1
    assert "got an adapter North beside north · expected a name that is another in small" in capsys.readouterr().err
    (tmp_path / ".artifact.0123.partial").mkdir()
    assert main([*command, "--replace", "--correction", "2"]) == 0
    assert ".artifact.0123.partial is left from an export that was killed" in capsys.readouterr().err
    assert load_artifact(artifact).manifest.parts.adapters["north"].correction == 2
    assert main([*command[:1], str(tmp_path / "nowhere"), *command[2:], "--name", "other"]) == 1
    assert "got no folder · expected the folder of a LoRA" in capsys.readouterr().err
