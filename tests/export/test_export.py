"""Export end to end on a tiny random checkpoint, against transformers' own tower and decoder."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import random_checkpoint
import torch
from driving import score_text
from PIL import Image
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny import cache_fidelity
from torch.utils._python_dispatch import TorchDispatchMode

import export.pipeline
import export.source.checkpoint
import export.studies
import export.write.vision_onnx
from export import ExportSettings, export_artifact, verify
from export.__main__ import main
from export.source import forward
from export.source.checkpoint import open_checkpoint
from export.studies import StudyReader
from export.write.decoder import DecoderFolder
from lite.artifact.open import load_artifact
from lite.artifact.parts import CacheDtype, Divergence
from lite.console import EXIT_BROKEN_PIPE
from lite.engines.torch_engine.load import load_decoder
from lite.errors import ArtifactError, BackendUnavailable, CheckpointError, LiteError
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from export.source.checkpoint import Checkpoint
    from lite.artifact.open import Artifact


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return random_checkpoint.write(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def source(folders: tuple[Path, Path]) -> Checkpoint:
    return open_checkpoint(*folders)


@pytest.fixture(scope="module")
def artifact(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_artifact(*folders, tmp_path_factory.mktemp("out") / "artifact")


@pytest.fixture(scope="module")
def artifact_fp16(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_artifact(*folders, tmp_path_factory.mktemp("out") / "artifact", ExportSettings(vision_format="fp16"))


def _pixel_values(batch: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((batch, 3, 42, 42), dtype=np.float32)


def _transformers_tower(trunk: dict[str, torch.Tensor], folder: Path) -> Any:
    """Put the trunk's weights into transformers' DINOv2, which knows nothing of ours.

    Through a folder with the names of published DINOv2 checkpoints: the ones inside change between versions.
    """
    from transformers import Dinov2Config, Dinov2Model

    dim, depth = random_checkpoint.DIM, random_checkpoint.DEPTH
    config = Dinov2Config(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=dim // 64,
        mlp_ratio=4,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        image_size=42,
        patch_size=14,
        qkv_bias=True,
    )
    state = {
        "embeddings.cls_token": trunk["cls_token"],
        "embeddings.mask_token": torch.zeros(1, dim),
        "embeddings.position_embeddings": trunk["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": trunk["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": trunk["patch_embed.proj.bias"],
        "layernorm.weight": trunk["norm.weight"],
        "layernorm.bias": trunk["norm.bias"],
    }
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for block in range(depth):
        ours, theirs = f"blocks.{block}.", f"encoder.layer.{block}."
        for kind in ("weight", "bias"):
            for name, other in names.items():
                state[f"{theirs}{other}.{kind}"] = trunk[f"{ours}{name}.{kind}"]
            parts = trunk[f"{ours}attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                state[f"{theirs}attention.attention.{name}.{kind}"] = part
        state[f"{theirs}layer_scale1.lambda1"] = trunk[f"{ours}ls1.gamma"]
        state[f"{theirs}layer_scale2.lambda1"] = trunk[f"{ours}ls2.gamma"]
    config.save_pretrained(folder)
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    model, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def expected_features(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray[Any, Any]:
    """The features by transformers' tower, hidden state -2, CLS dropped, and the projector by hand."""
    trunk, projector, _ = random_checkpoint.weights()
    with torch.inference_mode():
        tower = _transformers_tower(trunk, tmp_path_factory.mktemp("dinov2"))
        hidden_states = tower(torch.from_numpy(_pixel_values()), output_hidden_states=True).hidden_states
        x = hidden_states[-2][:, 1:] @ projector["0.weight"].half().float().T + projector["0.bias"].half().float()
        x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        return (x @ projector["2.weight"].half().float().T + projector["2.bias"].half().float()).numpy()


def test_onnx_tower_is_transformers_dinov2(artifact: Artifact, expected_features: np.ndarray[Any, Any]) -> None:
    features = VisionEncoder(artifact)(_pixel_values())
    assert features.shape == (2, 9, 128)
    np.testing.assert_allclose(features, expected_features, atol=2e-5)


def test_plain_tower_is_transformers_dinov2(source: Checkpoint, expected_features: np.ndarray[Any, Any]) -> None:
    features = forward.image_features(source.read_tower(), source.tower, torch.from_numpy(_pixel_values()))
    np.testing.assert_allclose(features.numpy(), expected_features, atol=2e-5)


def test_fp16_tower_is_close_and_takes_float32(
    artifact_fp16: Artifact, expected_features: np.ndarray[Any, Any]
) -> None:
    features = VisionEncoder(artifact_fp16)(_pixel_values())
    assert features.dtype == np.float32
    error = np.abs(features - expected_features).max()
    assert 1e-6 < error < 0.02
    assert artifact_fp16.manifest.parts.vision.format == "fp16"


def test_batch_is_free_and_rows_do_not_mix(artifact: Artifact) -> None:
    encoder, pixel_values = VisionEncoder(artifact), _pixel_values(3)
    together = encoder(pixel_values)
    for row in range(3):
        np.testing.assert_allclose(encoder(pixel_values[row : row + 1])[0], together[row], atol=1e-5)


def test_onnx_holds_only_what_is_run(artifact: Artifact, artifact_fp16: Artifact) -> None:
    for exported, dtype in ((artifact, onnx.TensorProto.FLOAT), (artifact_fp16, onnx.TensorProto.FLOAT16)):
        model = onnx.load(exported.file("vision.onnx"))
        names = {tensor.name for tensor in model.graph.initializer}
        assert not [name for name in names if name.startswith(("blocks.2.", "norm."))]
        assert "blocks.1.attn.qkv.weight" in names
        assert {tensor.data_type for tensor in model.graph.initializer if tensor.dims != []} <= {
            dtype,
            onnx.TensorProto.INT64,
        }
        assert {opset.domain for opset in model.opset_import} == {""}


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
    tensors = _decoder_tensors(artifact)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert len(tensors) == random_checkpoint.LAYERS * 9 + 3


def test_manifest_records_sources_parity_and_terms(artifact: Artifact, folders: tuple[Path, Path]) -> None:
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


def test_export_is_reproducible(folders: tuple[Path, Path], artifact: Artifact, tmp_path: Path) -> None:
    again = export_artifact(*folders, tmp_path / "again")
    assert again.manifest.files == artifact.manifest.files


def _decoder_tensors(artifact: Artifact) -> dict[str, torch.Tensor]:
    files = sorted((artifact.path / "decoder").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_parity_layer_by_layer_is_that_of_the_whole_decoder(source: Checkpoint, artifact: Artifact) -> None:
    studies = StudyReader(
        source.tokenizer, artifact.manifest, max_seq_len=source.decoder.max_position_embeddings, max_tokens=16
    ).built_in(2)
    features = [torch.from_numpy(VisionEncoder(artifact)(study.pixel_values[None])[0]) for study in studies]
    caches: tuple[CacheDtype | None, ...] = (None, "int8")
    found = verify._artifact_logits(artifact, studies, features, "cpu", show=False, cache_dtypes=caches)
    for cache_dtype, layered in zip(caches, found, strict=True):
        decoder = load_decoder(artifact, device="cpu", cache_dtype=cache_dtype)
        for study, image, logits in zip(studies, features, layered, strict=True):
            whole = score_text(decoder, study.input_ids, study.target_ids, image)
            assert whole.shape == logits.shape == (16, decoder.config.vocab_size)
            torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)
    for exact, rounded in zip(*found, strict=True):
        assert not torch.equal(exact[0], rounded[0]), "the question is read behind a rounded film"
        assert not torch.equal(exact[1:], rounded[1:])


def _fails(folders: tuple[Path, Path], out: Path, match: str) -> None:
    with pytest.raises(ArtifactError, match=match):
        export_artifact(*folders, out)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0])
def test_a_wrong_merge_fails_and_leaves_nothing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    right = export.source.checkpoint.merge

    def wrong(weight: torch.Tensor, pair: Any) -> torch.Tensor:
        if pair is None:
            return right(weight, pair)
        return weight.float() + factor * (right(weight, pair) - weight.float())

    monkeypatch.setattr(export.source.checkpoint, "merge", wrong)
    _fails(folders, tmp_path / "artifact", "parity of decoder fp16: got mean KL")


@pytest.mark.parametrize("fault", ["eps", "layer scale", "position"])
def test_a_wrong_tower_fails_and_leaves_nothing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    graph = export.write.vision_onnx._Graph
    right = graph.source
    if fault == "eps":
        monkeypatch.setattr(export.write.vision_onnx, "LAYER_NORM_EPS", 1e-2)
    else:
        part = {"layer scale": "ls2.gamma", "position": "pos_embed"}[fault]
        monkeypatch.setattr(graph, "source", lambda self, name: right(self, name) * (1 - 0.05 * (part in name)))
    _fails(folders, tmp_path / "artifact", "parity of vision fp32")


def test_parity_that_is_not_a_number_fails(artifact: Artifact) -> None:
    parts = artifact.manifest.parts
    verify.require_parity(parts)
    decoder = dataclasses.replace(parts.decoder, fidelity=cache_fidelity(float("nan")))
    with pytest.raises(ArtifactError, match="got mean KL nan"):
        verify.require_parity(dataclasses.replace(parts, decoder=decoder))


class _OneTokenPerWord(export.studies.Tokenizer):
    """The least that any tokenizer gives: one token per word, a short one."""

    def encode(self, text: str) -> list[int]:
        return [3 + len(word) for word in text.split()]


def test_the_same_top_token_is_required_of_a_default_export(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = verify._compare_logits
    tokens: list[int] = []

    def worse(*logits: Any) -> Divergence:
        compared = right(*logits)
        tokens.append(compared.tokens)
        return dataclasses.replace(compared, same_top=0.95)

    monkeypatch.setattr(verify, "_compare_logits", worse)
    monkeypatch.setattr(export.studies, "Tokenizer", _OneTokenPerWord)
    _fails(folders, tmp_path / "artifact", "parity of decoder fp16: got same top token 0.95")
    assert tokens[0] >= 1.5 * verify.MIN_TOKENS_FOR_SAME_TOP


def test_the_yardstick_has_no_convolution(source: Checkpoint) -> None:
    """Where cuDNN computes one, it does so in TF32 unless told otherwise."""
    operators: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        forward.image_features(source.read_tower(), source.tower, torch.from_numpy(_pixel_values(1)))
    assert [name for name in operators if "mm" in name]
    assert not [name for name in operators if "conv" in name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_yardstick_is_float32_on_a_gpu(source: Checkpoint) -> None:
    tensors, pixel_values = source.read_tower(), torch.from_numpy(_pixel_values())
    expected = forward.image_features(tensors, source.tower, pixel_values)
    on_gpu = {name: tensor.cuda() for name, tensor in tensors.items()}
    got = forward.image_features(on_gpu, source.tower, pixel_values.cuda())
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=2e-5)


def test_interruption_leaves_nothing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DecoderFolder, "write", interrupt)
    arguments = ["--checkpoint", str(folders[0]), "--base", str(folders[1]), "--out", str(tmp_path / "artifact")]
    assert main([*arguments, "--quiet"]) == 130
    assert "nothing is left behind" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_explained_and_leaves_nothing(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DecoderFolder, "write", full)
    _fails(folders, tmp_path / "artifact", "got a full disk .* free some space")


def test_a_source_that_cannot_be_read_is_named_and_no_full_disk_is_blamed(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    graph = export.write.vision_onnx._Graph
    right = graph.constant
    if fault == "operator":
        monkeypatch.setattr("export.write.onnx_graph.OPSET", 17)  # from before Gelu

    def turned(self: Any, name: str, values: np.ndarray[Any, Any]) -> str:
        return right(self, name, values.T if fault == "shape" and "fc1.weight" in name else values)

    monkeypatch.setattr(graph, "constant", turned)
    with pytest.raises(CheckpointError, match="ONNX's checker refuses .*report this"):
        export_artifact(*folders, tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_the_work(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(export.pipeline.shutil, "disk_usage", lambda _: usage)
    _fails(folders, tmp_path / "artifact", "GiB free · expected at least")


def test_an_existing_artifact_is_kept_unless_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    first = export_artifact(*folders, out)
    with pytest.raises(ArtifactError, match="exists"):
        export_artifact(*folders, out, ExportSettings(vision_format="fp16"))
    assert load_artifact(out).id == first.id
    second = export_artifact(*folders, out, ExportSettings(vision_format="fp16", overwrite=True))
    assert load_artifact(out).id == second.id != first.id


def test_verification_reads_the_evaluation_format(folders: tuple[Path, Path], tmp_path: Path) -> None:
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


def test_a_decoder_that_overflows_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders[0].parent, copy)
    file = copy / "llava-rad-phantom/adapter_model.bin"
    adapter = random_checkpoint.load(file)
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_"
    adapter[f"{name}A.weight"] += 1000
    adapter[f"{name}B.weight"] += 1000
    torch.save(adapter, file)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight: .*fits float16"):
        export_artifact(copy / "llava-rad-phantom", copy / "base", tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_parts_have_an_index_that_says_what_they_hold(artifact: Artifact) -> None:
    tensors = _decoder_tensors(artifact)
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


def test_command_line(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(folders[0]), "--base", str(folders[1]), "--out", str(tmp_path / "artifact")]
    assert main([*arguments, "--decoder", "fp16", "--vision", "fp32"]) == 0
    printed = capsys.readouterr()
    for part in ("KL", "cosine", "not for clinical use", "phantom model", "python -m lite generate"):
        assert part in printed.out
    assert "writing the decoder" in printed.err
    assert main([*arguments, "--quiet"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "exists" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--checkpoint"),
        (["--checkpoint", "a", "--base", "b", "--out", "c", "--decoder", "gguf"], "invalid choice: 'gguf'"),
        (["--verify-tokens", "0"], "got '0', expected a whole number from 1"),
        (["--verify-studies", "few"], "got 'few', expected a whole number from 1"),
    ],
)
def test_wrong_use_exits_with_2(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert named in capsys.readouterr().err


def test_wrong_choices_are_refused_by_the_settings_too(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="got decoder format 'int3'"):
        ExportSettings(decoder_format="int3")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="verify_studies=0"):
        ExportSettings(verify_studies=0)
    with pytest.raises(CheckpointError, match="does not exist"):
        export_artifact(tmp_path / "nowhere", folders[1], tmp_path / "artifact")


@pytest.mark.parametrize("device", ["abacus", "gpu", "mps", "cuda:7"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_opened(tmp_path: Path, device: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"got device '{device}'"):
        export_artifact(
            tmp_path / "nowhere", tmp_path / "nowhere", tmp_path / "artifact", ExportSettings(device=device)
        )


def test_the_command_line_has_the_defaults_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[ExportSettings] = []

    def take(*arguments: Any) -> None:
        taken.append(arguments[-1])
        raise ArtifactError("enough")

    monkeypatch.setattr(export.pipeline, "export_artifact", take)
    assert main(["--checkpoint", "a", "--base", "b", "--out", str(tmp_path / "artifact"), "--quiet"]) == 1
    assert capsys.readouterr().err == "error: enough\n"
    assert taken == [ExportSettings()]


def test_what_a_killed_export_left_is_mentioned(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".artifact.0123abcd.partial").mkdir()
    (tmp_path / ".another.0123abcd.partial").mkdir()
    arguments = ["--checkpoint", str(folders[0]), "--base", str(folders[1]), "--out", str(tmp_path / "artifact")]
    assert main([*arguments, "--quiet"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert f"{tmp_path}/.artifact.0123abcd.partial" in notes[0]


def test_a_reader_that_has_gone_is_no_failure_of_the_export(folders: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(folders[0]), "--base", str(folders[1]), "--out", str(tmp_path / "artifact")]
    command = [sys.executable, "-m", "export", *arguments, "--quiet"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read().decode()
    assert (process.returncode, told) == (EXIT_BROKEN_PIPE, "")
    load_artifact(tmp_path / "artifact").verify()


def test_help_and_import_load_nothing_heavy() -> None:
    code = (
        "import sys, export, export.__main__ as m\n"
        "try:\n    m.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--verify-data" in done.stdout


def test_a_missing_package_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import export\n"
        "from lite.errors import BackendUnavailable\n"
        "try:\n    export.export_artifact\nexcept BackendUnavailable as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert 'pip install "llava-rad-lite[export]"' in done.stdout, done.stderr


def test_without_a_notice_the_terms_of_the_published_weights_are_told(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(folders[0], tmp_path / "checkpoint"))
    (checkpoint / "NOTICE").unlink()
    notice = export_artifact(checkpoint, folders[1], tmp_path / "artifact").manifest.notice
    assert "Microsoft Research License" in notice
    assert "not for clinical use" in notice


@pytest.mark.parametrize("content", [b"", b"x" * 1001, b"\xff\xfe"])
def test_a_notice_that_is_no_short_text_is_refused(folders: tuple[Path, Path], tmp_path: Path, content: bytes) -> None:
    checkpoint = Path(shutil.copytree(folders[0], tmp_path / "checkpoint"))
    (checkpoint / "NOTICE").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"NOTICE: got .* remove it"):
        open_checkpoint(checkpoint, folders[1])
