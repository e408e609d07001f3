"""Export end to end on a tiny random checkpoint, against transformers' own tower and decoder."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest
import random_checkpoint
import torch
from PIL import Image
from safetensors.torch import load_file
from small_export import Folders, command_line, fails, tensors_of

import export.pipeline
import export.source.checkpoint
import export.studies
import export.write.vision_onnx
from export import ExportSettings, export_artifact
from export.__main__ import main
from export.write.decoder import DecoderFolder
from lite.artifact.open import load_artifact
from lite.errors import ArtifactError, CheckpointError, LiteError

if TYPE_CHECKING:
    from lite.artifact.open import Artifact


def test_decoder_opens_in_transformers_and_is_the_trained_one(artifact: Artifact) -> None:
    """Scales folded in, LoRA split off, rounded, published, read, merged, rounded: still what was trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = LlamaForCausalLM.from_pretrained(artifact.path / "decoder", dtype=torch.float32).eval()
    assert ours.config.eos_token_id == 2
    assert ours.generation_config.do_sample is False
    assert ours.generation_config.temperature in (None, 1.0)
    _, _, llama = random_checkpoint.weights()
    config = {**random_checkpoint.llama_config(), "rms_norm_eps": 1e-5, "max_position_embeddings": 512}
    trained = LlamaForCausalLM(LlamaConfig(**config, tie_word_embeddings=False)).eval()
    trained.load_state_dict(llama)
    input_ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        p, q = (torch.log_softmax(model(input_ids).logits.double(), -1) for model in (trained, ours))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1e-5
    assert torch.equal(p.argmax(-1), q.argmax(-1))


def test_decoder_folder_says_what_it_is(artifact: Artifact) -> None:
    config = json.loads(artifact.file("decoder/config.json").read_text())
    assert (config["torch_dtype"], config["model_type"]) == ("float16", "llama")
    assert "quantization_config" not in config
    assert artifact.manifest.notice in artifact.file("decoder/NOTICE").read_text()
    tensors = tensors_of(artifact)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert len(tensors) == random_checkpoint.LAYERS * 9 + 3


def test_parts_have_an_index_that_says_what_they_hold(artifact: Artifact) -> None:
    tensors = tensors_of(artifact)
    parts = sorted((artifact.path / "decoder").glob("*.safetensors"))
    assert [part.name for part in parts] == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    for part in parts:
        # What follows the header is aligned, for whoever maps the file.
        assert int.from_bytes(part.read_bytes()[:8], "little") % 8 == 0
    index = json.loads(artifact.file("decoder/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name, part in index["weight_map"].items():
        assert name in load_file(artifact.path / "decoder" / part)


def test_manifest_records_sources_parity_and_terms(artifact: Artifact, folders: Folders) -> None:
    manifest = artifact.manifest
    adapter = (folders[0] / "adapter_model.bin").read_bytes()
    assert manifest.sources["checkpoint/adapter_model.bin"] == hashlib.sha256(adapter).hexdigest()
    assert len(manifest.sources) == 11
    assert "reads those and nothing else" in manifest.notice  # of the phantom's NOTICE
    assert "not for clinical use" in manifest.notice
    vision, decoder, merge = (
        manifest.parts.vision.fidelity,
        manifest.parts.decoder.fidelity,
        manifest.parts.decoder.merge,
    )
    assert vision is not None
    assert vision.min_cosine > 0.999999
    assert 0 < vision.max_abs < 1e-4
    assert decoder is not None
    assert decoder.divergence.tokens > 100
    assert 0 <= decoder.divergence.mean_kl < 1e-5
    assert decoder.divergence.same_top > 0.99
    assert merge is not None
    assert merge.lora_scale == 2.0
    assert 0 < merge.relative_rms_rounding < 5e-4
    artifact.verify()


def test_command_line(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".artifact.0123abcd.partial").mkdir()
    (tmp_path / ".another.0123abcd.partial").mkdir()
    arguments = command_line(folders, tmp_path / "artifact")
    assert main([*arguments, "--decoder", "fp16", "--vision", "fp32"]) == 0
    printed = capsys.readouterr()
    for part in ("KL", "that is", "cosine", "not for clinical use", "phantom model", "python -m lite generate"):
        assert part in printed.out
    stages = ["hashing the sources", "writing vision.onnx", "writing the decoder"]
    stages += [f"parity, {part}" for part in ("features", "the source", "the artifact")]
    assert re.findall(r"^([a-z][\w ,.]+): [\d.]+ s$", printed.err, re.MULTILINE) == stages
    # What a killed export has left there is mentioned.
    (note,) = (line for line in printed.err.splitlines() if line.startswith("note: "))
    assert f"{tmp_path}/.artifact.0123abcd.partial" in note
    assert main([*arguments, "--quiet"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "exists" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "nothing is left behind"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "got a full disk"),
    ],
)
def test_an_end_before_the_first_part_leaves_nothing(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: BaseException, status: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(DecoderFolder, "write", Mock(side_effect=error))
    assert main(command_line(folders, tmp_path / "artifact", "--quiet")) == status
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_cannot_be_read_is_named_and_no_full_disk_is_blamed(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/tokenizer.model")

    monkeypatch.setattr(export.pipeline.shutil, "copyfile", unreadable)
    with pytest.raises(ArtifactError, match=r"^/somewhere/tokenizer.model: got .*Permission denied") as error:
        export_artifact(*folders, tmp_path / "artifact")
    assert "room" not in str(error.value)
    # With the decoder done, the next export only has to do the rest.
    assert [path.name for path in tmp_path.iterdir()] == [".artifact.export"]
    monkeypatch.undo()
    export_artifact(*folders, tmp_path / "artifact").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize("fault", ["operator", "shape"])
def test_a_graph_that_onnx_refuses_is_an_error_of_ours(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    graph = export.write.vision_onnx.TowerGraph
    right = graph.constant
    if fault == "operator":
        monkeypatch.setattr("export.write.onnx_graph.OPSET", 17)  # from before Gelu

    def turned(self: Any, name: str, values: np.ndarray[Any, Any]) -> str:
        return right(self, name, values.T if fault == "shape" and "fc1.weight" in name else values)

    monkeypatch.setattr(graph, "constant", turned)
    fails(folders, tmp_path / "artifact", ExportSettings(), CheckpointError, "ONNX's checker refuses .*report this")


def test_a_disk_too_small_is_refused_before_the_work(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(export.pipeline.shutil, "disk_usage", lambda _: usage)
    fails(folders, tmp_path / "artifact", ExportSettings(), ArtifactError, "GiB free · expected at least")


def test_an_existing_artifact_is_kept_unless_told(folders: Folders, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    first = export_artifact(*folders, out)
    with pytest.raises(ArtifactError, match="exists"):
        export_artifact(*folders, out, ExportSettings(vision_format="fp16"))
    assert load_artifact(out).id == first.id
    second = export_artifact(*folders, out, ExportSettings(vision_format="fp16", overwrite=True))
    assert load_artifact(out).id == second.id != first.id


def test_verification_reads_the_evaluation_format(folders: Folders, tmp_path: Path) -> None:
    films = tmp_path / "films"
    films.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 50), dtype=np.uint8)).save(films / "a.png")
    conversation = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "The lungs are clear."}]
    entry = {"id": "1", "image": "a.png", "view": "PA", "reason": "Cough.", "conversations": conversation}
    studies = tmp_path / "studies.json"
    studies.write_text(json.dumps([entry, entry | {"id": "2"}, {"id": "3", "image": "never.png"}]))
    settings = ExportSettings(verify_data=studies, image_folder=films, verify_studies=2)
    artifact = export_artifact(*folders, tmp_path / "artifact", settings)
    fidelity = artifact.manifest.parts.decoder.fidelity
    assert fidelity is not None
    assert (fidelity.data, fidelity.divergence.studies) == ("studies.json", 2)
    with pytest.raises(LiteError, match=r"got 1 of 3 films that are not there, the first .*never\.png"):
        export_artifact(*folders, tmp_path / "other", dataclasses.replace(settings, verify_studies=3))
    for content, named in {
        "[]": "got no list, or an empty one",
        "[" * 100_000: "got a file that cannot be read",
    }.items():
        studies.write_text(content)
        with pytest.raises(LiteError, match=named):
            export_artifact(*folders, tmp_path / "other", settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "films", "studies.json"]


def test_without_a_notice_the_terms_of_the_published_weights_are_told(own: Folders, tmp_path: Path) -> None:
    (own[0] / "NOTICE").unlink()
    notice = export_artifact(*own, tmp_path / "artifact").manifest.notice
    assert "Microsoft Research License" in notice
    assert "not for clinical use" in notice
