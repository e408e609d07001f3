"""Quantised exports of a tiny random checkpoint: what is written, how it goes on after a stop, what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_checkpoint
import torch
from driving import score_text
from filelock import FileLock
from PIL import Image
from repository import ROOT
from safetensors.torch import load_file
from unpacked import unpacked

import export.pipeline
import export.quantize.calibration
import export.quantize.layerwise
import export.write.work
import lite
from export import ExportSettings, GptqSettings, TokenWeights, export_artifact
from export.__main__ import main
from export.quantize.calibration import HiddenStates, token_weights
from export.settings import DEFAULTS
from export.source.checkpoint import open_checkpoint
from export.studies import EncodedStudy
from export.write.decoder import DecoderFolder
from lite.__main__ import main as lite_main
from lite.artifact.open import load_artifact
from lite.errors import ArtifactError, BackendUnavailable, CheckpointError, LiteError
from lite.image.files import load_image
from lite.image.preprocess import preprocess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lite.artifact.open import Artifact

FINDINGS = [
    "The lungs are clear. No pleural effusion or pneumothorax.",
    "Heart size is normal. The lungs are clear.",
    "No pleural effusion. Heart size is normal.",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return random_checkpoint.write(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve studies to calibrate on."""
    folder = tmp_path_factory.mktemp("studies")
    entries = []
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 50)).save(folder / f"{number}.png")
        conversation = [{"from": "human", "value": "?"}, {"from": "gpt", "value": FINDINGS[number % 3]}]
        reason = "Cough." if number % 2 else None
        entries.append({"id": str(number), "image": f"{number}.png", "reason": reason, "conversations": conversation})
    (folder / "studies.json").write_text(json.dumps(entries))
    return folder / "studies.json"


def settings_for(listed: Path, decoder_format: str = "gptq-int4", **gptq: Any) -> ExportSettings:
    values: dict[str, Any] = {
        "calibration_data": listed,
        "group_size": 32,
        "token_weights": TokenWeights(image=0.3, prompt=0.1),
        **gptq,
    }
    return ExportSettings(decoder_format=decoder_format, gptq=GptqSettings(**values))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def gptq_artifact(folders: tuple[Path, Path], listed: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export_artifact(*folders, tmp_path_factory.mktemp("gptq") / "artifact", settings_for(listed))


@pytest.fixture(scope="module")
def artifacts(
    folders: tuple[Path, Path], listed: Path, gptq_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    out = tmp_path_factory.mktemp("all")
    settings = {
        "fp16": ExportSettings(),
        "bnb-nf4": ExportSettings(decoder_format="bnb-nf4"),
        "bnb-int8": ExportSettings(decoder_format="bnb-int8"),
        "gptq-int8": settings_for(listed, "gptq-int8"),
        "rtn-int4": settings_for(listed, method="rtn", calibration_data=None, token_weights=None),
        "int8 head": settings_for(listed, lm_head="int8"),
        "whole rows": settings_for(listed, group_size=-1),
    }
    made = {name: export_artifact(*folders, out / name, chosen) for name, chosen in settings.items()}
    return {**made, "gptq-int4": gptq_artifact}


def tensors_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    files = sorted((artifact.path / "decoder").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def linear(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def logits_of(artifact: Artifact) -> torch.Tensor:
    model = lite.load(artifact.path, device="cpu")
    film = Image.fromarray(np.random.default_rng(99).integers(0, 255, (50, 50), dtype=np.uint8))
    return torch.from_numpy(model.score(film, list(range(3, 40))))


@pytest.mark.full
def test_a_folder_of_version_1_is_what_the_runtime_computes_with(artifacts: dict[str, Artifact]) -> None:
    """The independent unpacker's weights, in a plain transformers Llama, give the runtime's logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, bits in {"gptq-int4": 4, "gptq-int8": 8, "int8 head": 4, "whole rows": 4}.items():
        artifact = artifacts[name]
        tensors = tensors_of(artifact)
        plain = {key: tensor.float() for key, tensor in tensors.items() if key.endswith(".weight")}
        for key in [key for key in tensors if key.endswith(".qweight")]:
            owner = key.removesuffix(".qweight")
            width = 8 if owner == "lm_head" else bits
            plain[f"{owner}.weight"] = torch.from_numpy(unpacked(linear(tensors, owner), width)).float()
        config = json.loads(artifact.file("decoder/config.json").read_text())
        del config["quantization_config"]
        peer = LlamaForCausalLM(LlamaConfig(**config)).eval()
        peer.load_state_dict(plain)
        decoder = lite.load(artifact.path, device="cpu").decoder
        ids = list(range(3, 60))
        with torch.inference_mode():
            expected = peer(torch.tensor([ids])).logits[0]
        got = score_text(decoder, ids[:1], ids[1:], None)
        torch.testing.assert_close(got, expected[:-1], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "group_size", "bits", "head"),
    [("gptq-int4", 32, 4, None), ("gptq-int8", 32, 8, None), ("whole rows", -1, 4, None), ("int8 head", 32, 4, 8)],
)
def test_the_configuration_is_the_one_others_read(
    artifacts: dict[str, Artifact], name: str, group_size: int, bits: int, head: int | None
) -> None:
    artifact = artifacts[name]
    config = json.loads(artifact.file("decoder/config.json").read_text())["quantization_config"]
    expected = {"bits": bits, "group_size": group_size, "desc_act": False, "sym": True, "quant_method": "gptq"}
    assert {key: config[key] for key in expected} == expected
    assert config["checkpoint_format"] == "gptq"
    assert config["lm_head"] is (head is not None)
    if head:
        assert config["dynamic"]["lm_head"]["bits"] == head
    assert json.loads(artifact.file("decoder/quantize_config.json").read_text()) == config
    part = artifact.manifest.parts.decoder
    assert (part.format, part.group_size, part.method) == (f"gptq-int{bits}", group_size, "gptq")
    assert part.calibration is not None
    assert (part.calibration.studies, part.calibration.data) == (12, "studies.json")
    assert (part.calibration.image_weight, part.calibration.prompt_weight) == (0.3, 0.1)
    errors = part.calibration.errors
    assert len(errors) == 7 * random_checkpoint.LAYERS
    assert all(0 < error < 0.5 for error in errors.values())


def test_embeddings_norms_and_head_stay_16_bit(artifacts: dict[str, Artifact]) -> None:
    source = tensors_of(artifacts["fp16"])
    for name, artifact in artifacts.items():
        tensors = tensors_of(artifact)
        assert torch.equal(tensors["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
        assert torch.equal(tensors["model.norm.weight"], source["model.norm.weight"])
        assert ("lm_head.weight" in tensors) is (name != "int8 head")
        assert tensors["model.layers.0.input_layernorm.weight"].dtype == torch.float16
    assert (
        sum(t.nbytes for t in linear(tensors_of(artifacts["int8 head"]), "lm_head").values())
        < 0.6 * source["lm_head.weight"].nbytes
    )


def test_each_form_loses_what_its_bits_say(artifacts: dict[str, Artifact]) -> None:
    p = logits_of(artifacts["fp16"]).double().log_softmax(-1)

    def kl(name: str) -> float:
        q = logits_of(artifacts[name]).double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    losses = {name: kl(name) for name in artifacts}
    assert losses["fp16"] == 0
    assert losses["gptq-int8"] < 0.1 * losses["gptq-int4"]
    assert losses["gptq-int4"] < 0.5 * losses["rtn-int4"]
    assert losses["bnb-int8"] < 0.2 * losses["bnb-nf4"]
    assert losses["int8 head"] < 2 * losses["gptq-int4"]
    sizes = {name: sum(t.nbytes for t in tensors_of(artifacts[name]).values()) for name in artifacts}
    assert sizes["gptq-int4"] < sizes["gptq-int8"] < sizes["fp16"]
    assert sizes["bnb-nf4"] < sizes["bnb-int8"] < sizes["fp16"]


@pytest.mark.parametrize("name", ["gptq-int4", "bnb-nf4", "bnb-int8"])
def test_the_runtime_drafts_with_each_form(artifacts: dict[str, Artifact], name: str, listed: Path) -> None:
    model = lite.load(artifacts[name].path, device="cpu")
    films = [(listed.parent / f"{number}.png", "Cough.") for number in range(3)]
    alone = [model.findings(*film, max_new_tokens=8).token_ids for film in films]
    together = [result.token_ids for result in model.findings_batch(films, batch_size=3, max_new_tokens=8)]
    assert alone == together
    assert all(1 <= len(token_ids) <= 8 for token_ids in alone)


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-int8"])
def test_transformers_opens_a_bitsandbytes_folder(artifacts: dict[str, Artifact], name: str) -> None:
    pytest.importorskip("accelerate", reason="transformers loads quantised weights through accelerate")
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(artifacts[name].path / "decoder", dtype=torch.float32).eval()
    ids = list(range(3, 60))
    with torch.inference_mode():
        expected = peer(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    got = (
        score_text(lite.load(artifacts[name].path, device="cpu").decoder, ids[:1], ids[1:], None)
        .double()
        .log_softmax(-1)
    )
    # int8: the library rounds activations too, ours does not.
    assert float((expected.exp() * (expected - got)).sum(-1).mean()) < {"bnb-nf4": 1e-4, "bnb-int8": 2e-2}[name]


def test_the_same_arguments_give_the_same_bytes(
    folders: tuple[Path, Path], listed: Path, gptq_artifact: Artifact, tmp_path: Path
) -> None:
    assert export_artifact(*folders, tmp_path / "again", settings_for(listed)).id == gptq_artifact.id


def test_info_says_how_the_decoder_is_stored(
    artifacts: dict[str, Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, stored in {
        "gptq-int4": "gptq-int4 (groups of 32, calibrated on 12 studies of studies.json), 2 layers",
        "rtn-int4": "gptq-int4 (groups of 32, rounded to nearest), 2 layers",
        "int8 head": "gptq-int4 (groups of 32, int8 head, calibrated on 12 studies of studies.json), 2 layers",
        "whole rows": "gptq-int4 (one group, calibrated",
        "bnb-nf4": "bnb-nf4, 2 layers",
    }.items():
        assert lite_main(["info", str(artifacts[name].path)]) == 0
        told = capsys.readouterr().out
        assert stored in told
        assert ("on average" in told) is ("calibrated" in stored)
        assert max(map(len, told.splitlines())) < 400


class _Stopped(BaseException):
    """As a power cut is: nothing of ours catches it."""


@contextlib.contextmanager
def stopped_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> Iterator[None]:
    """Stop at the given call of a method, before it does anything."""
    right, calls = getattr(owner, name), iter(range(1000))

    def stop(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise _Stopped
        return right(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        try:
            yield
        except _Stopped:
            return
    pytest.fail(f"{name} was not called {call + 1} times")


@pytest.mark.parametrize(
    ("owner", "name", "call", "finished"),
    [
        (DecoderFolder, "write", 1, 1),  # the first layer is rounded, and not yet written
        (export.quantize.layerwise.LayerQuantizer, "quantize", 1, 2),
        (HiddenStates, "write", 40, 2),  # in the middle of the second layer
        (DecoderFolder, "write", 3, 3),
        (export.pipeline.verify, "measure", 0, 4),
    ],
)
def test_a_stopped_export_goes_on_to_the_same_bytes(
    folders: tuple[Path, Path],
    listed: Path,
    gptq_artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    finished: int,
) -> None:
    out, settings = tmp_path / "artifact", settings_for(listed)
    with stopped_at(monkeypatch, owner, name, call):
        export_artifact(*folders, out, settings)
    work = tmp_path / ".artifact.export"
    parts = {part: part.stat().st_mtime_ns for part in (work / "decoder").glob("*.safetensors")}
    assert len(parts) == finished
    assert not out.exists()
    # The finished parts are those of the artifact: they are not made again.
    written: list[int] = []
    right = DecoderFolder.write
    monkeypatch.setattr(DecoderFolder, "write", lambda s, part, t: (written.append(part), right(s, part, t))[1])
    artifact = export_artifact(*folders, out, settings)
    assert written == list(range(finished, random_checkpoint.LAYERS + 2))
    assert artifact.id == gptq_artifact.id
    assert {path.name for path in tmp_path.iterdir()} == {"artifact"}


def test_a_search_is_not_done_twice(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(listed, token_weights=None)
    whole = export_artifact(*folders, tmp_path / "whole", settings)
    with stopped_at(monkeypatch, DecoderFolder, "write", 2):
        export_artifact(*folders, tmp_path / "artifact", settings)
    monkeypatch.setattr(export.write.layers, "search_token_weights", None)
    artifact = export_artifact(*folders, tmp_path / "artifact", settings)
    assert artifact.id == whole.id
    calibration = artifact.manifest.parts.decoder.calibration
    assert calibration is not None
    assert calibration.studies == 9
    search = calibration.search
    assert search is not None
    assert search.held_out_studies == 3
    best = TokenWeights.parse(min(search.mean_kl, key=search.mean_kl.__getitem__))
    assert (best.image, best.prompt) == (calibration.image_weight, calibration.prompt_weight)
    assert len(set(search.mean_kl.values())) == len(search.mean_kl) >= 4


def test_other_arguments_are_refused_by_name_and_nothing_is_lost(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "artifact", settings_for(listed)
    with stopped_at(monkeypatch, DecoderFolder, "write", 2):
        export_artifact(*folders, out, settings)
    kept = sorted(path.name for path in (tmp_path / ".artifact.export").rglob("*"))
    other_list = listed.with_name("fewer.json")
    other_list.write_text(json.dumps(json.loads(listed.read_text())[:8]))
    others = {
        r"group_size 64 \(was 32\)": settings_for(listed, group_size=64),
        r"decoder_format 'gptq-int8' \(was 'gptq-int4'\)": settings_for(listed, "gptq-int8"),
        r"token_weights '1,1' \(was '0.3,0.1'\)": settings_for(listed, token_weights=TokenWeights(image=1, prompt=1)),
        r"vision_format 'fp16' \(was 'fp32'\)": dataclasses.replace(settings, vision_format="fp16"),
        r"calibration_data 'fewer.json \(": settings_for(other_list),
    }
    for named, other in others.items():
        with pytest.raises(ArtifactError, match=rf"got {named}.*2 parts of its decoder finished.*remove the folder"):
            export_artifact(*folders, out, other)
    assert sorted(path.name for path in (tmp_path / ".artifact.export").rglob("*")) == kept
    # How it is measured is another matter.
    artifact = export_artifact(*folders, out, dataclasses.replace(settings, verify_studies=3))
    part = artifact.manifest.parts.decoder
    assert part.fidelity is not None
    assert (part.group_size, part.fidelity.divergence.studies) == (32, 3)


def test_ctrl_c_keeps_the_finished_layers_and_says_so(folders: tuple[Path, Path], listed: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    command = [sys.executable, "-m", "export", "--checkpoint", folders[0], "--base", folders[1], "--out", out]
    command += ["--decoder", "gptq-int4", "--group-size", "32", "--calibration-data", listed, "--refine", "40"]
    command += ["--token-weights", "1,1"]
    with subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        decoder = tmp_path / ".artifact.export" / "decoder"
        deadline = time.monotonic() + 120
        while not list(decoder.glob("model-00002*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=300)
    if process.returncode == 0:
        pytest.skip("the export was done before the interrupt came")
    assert process.returncode == 130, told
    assert printed == ""
    assert "the same command goes on with the finished parts in" in told
    assert "Traceback" not in told
    assert list(decoder.glob("model-0000*"))
    assert not out.exists()


def test_what_an_export_has_left_is_kept_through_the_failures_of_others(
    folders: tuple[Path, Path],
    listed: Path,
    gptq_artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong path, another checkpoint, something in the way: none of them costs the finished layers."""
    out, settings = tmp_path / "artifact", settings_for(listed)
    with stopped_at(monkeypatch, DecoderFolder, "write", 3):
        export_artifact(*folders, out, settings)
    parts = sorted((tmp_path / ".artifact.export" / "decoder").glob("model-*"))
    assert len(parts) == 3
    source = open_checkpoint(*folders)
    deeper = dataclasses.replace(source, decoder=dataclasses.replace(source.decoder, num_hidden_layers=9))
    with monkeypatch.context() as patch:
        patch.setattr(export.pipeline, "open_checkpoint", lambda *_: deeper)
        patch.setattr(export.pipeline, "_require_space", lambda *_: None)
        with pytest.raises(ArtifactError, match="3 parts of its decoder finished"):
            export_artifact(*folders, out, dataclasses.replace(settings, vision_format="fp16"))
    assert all(part.is_file() for part in parts)
    with pytest.raises(LiteError, match="got a file that cannot be read"):
        export_artifact(*folders, out, settings_for(tmp_path / "nowhere.json"))
    assert all(part.is_file() for part in parts)
    right = export.pipeline.finish_decoder

    def meanwhile(*args: Any) -> None:
        right(*args)
        out.mkdir()
        (out / "mine.txt").write_text("precious")

    with monkeypatch.context() as patch:
        patch.setattr(export.pipeline, "finish_decoder", meanwhile)
        with pytest.raises(ArtifactError, match="got a path that exists"):
            export_artifact(*folders, out, settings)
    shutil.rmtree(out)
    assert all(part.is_file() for part in parts)
    assert export_artifact(*folders, out, settings).id == gptq_artifact.id


def test_going_on_does_not_write_into_an_artifact_that_shares_its_files(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the artifact is in place and before the folder is gone, the two hold the same files."""
    out, settings = tmp_path / "artifact", settings_for(listed)
    with stopped_at(monkeypatch, export.write.work.shutil, "rmtree", 0):
        export_artifact(*folders, out, settings)
    first = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    work = tmp_path / ".artifact.export" / "decoder" / "config.json"
    assert work.samefile(out / "decoder" / "config.json")
    with stopped_at(monkeypatch, export.pipeline, "staged_artifact", 0):
        export_artifact(*folders, out, dataclasses.replace(settings, overwrite=True))
    assert not work.samefile(out / "decoder" / "config.json")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == first


@pytest.mark.full
def test_a_search_survives_an_interrupt_before_the_first_part(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "artifact", settings_for(listed, token_weights=None)
    with stopped_at(monkeypatch, DecoderFolder, "write", 0):
        export_artifact(*folders, out, settings)
    monkeypatch.setattr(export.write.layers, "search_token_weights", None)
    calibration = export_artifact(*folders, out, settings).manifest.parts.decoder.calibration
    assert calibration is not None
    assert calibration.search is not None


def test_hidden_states_lost_to_a_power_cut_are_noticed(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, settings = tmp_path / "artifact", settings_for(listed)
    with stopped_at(monkeypatch, DecoderFolder, "write", 2):
        export_artifact(*folders, out, settings)
    states = tmp_path / ".artifact.export" / "hidden-0001"
    states.write_bytes(bytes(states.stat().st_size))
    with pytest.raises(CheckpointError, match=r"layers\.1\..*got no inputs but zeros"):
        export_artifact(*folders, out, settings)
    states.unlink()
    with pytest.raises(ArtifactError, match="hidden-0001: got no hidden states to go on from"):
        export_artifact(*folders, out, settings)


def test_a_head_that_does_not_fit_is_refused_with_what_helps(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(*folders)
    odd = dataclasses.replace(source, decoder=dataclasses.replace(source.decoder, vocab_size=401))
    monkeypatch.setattr(export.pipeline, "open_checkpoint", lambda *_: odd)
    match = r"lm_head\.weight: got 401 outputs · expected a multiple of 4 · choose --lm-head fp16"
    fails(folders, tmp_path / "artifact", settings_for(listed, lm_head="int8"), CheckpointError, match)


def test_a_gpu_that_is_too_small_is_an_error_that_says_what_to_do(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(export.quantize.layerwise, "gptq", full)
    with pytest.raises(BackendUnavailable, match=r"CUDA out of memory.*repeat the command.*--device cpu"):
        export_artifact(*folders, tmp_path / "artifact", settings_for(listed))
    assert (tmp_path / ".artifact.export").is_dir()


def test_two_exports_to_one_place_do_not_meet(folders: tuple[Path, Path], tmp_path: Path) -> None:
    work = tmp_path / ".artifact.export"
    work.mkdir()
    with FileLock(work / "lock"), pytest.raises(ArtifactError, match="another export is working in"):
        export_artifact(*folders, tmp_path / "artifact")
    assert export_artifact(*folders, tmp_path / "artifact").manifest.parts.decoder.format == "fp16"


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_disk_that_fills_up_leaves_no_artifact_and_the_rest_goes_on(
    folders: tuple[Path, Path], listed: Path, gptq_artifact: Artifact, tmp_path: Path
) -> None:
    """The system refuses to let a file grow, in a process of its own, as a full disk does."""
    out = tmp_path / "artifact"
    largest = max(file.stat().st_size for file in (gptq_artifact.path / "decoder").iterdir())
    code = (
        "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from export import *\nfrom export.__main__ import main\nimport export.pipeline\n"
        "right = export.pipeline.write_calibrated_layers\n"
        "def limited(*a):\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({largest - 1}, resource.RLIM_INFINITY))\n"
        "    return right(*a)\n"
        "export.pipeline.write_calibrated_layers = limited\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--checkpoint", folders[0], "--base", folders[1], "--out", out, "--decoder", "gptq-int4"]
    arguments += ["--group-size", "32", "--calibration-data", listed, "--token-weights", "0.3,0.1", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "error: " in done.stderr
    assert "check the disk" in done.stderr
    assert not out.exists()
    for part in (tmp_path / ".artifact.export" / "decoder").glob("*.safetensors"):
        assert part.read_bytes() == (gptq_artifact.path / "decoder" / part.name).read_bytes()
    assert export_artifact(*folders, out, settings_for(listed)).id == gptq_artifact.id


def fails(folders: tuple[Path, Path], out: Path, settings: ExportSettings, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        export_artifact(*folders, out, settings)
    assert not list(out.parent.glob(".*"))
    assert not out.exists()


def test_a_study_that_cannot_be_used_is_left_out_and_said(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
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
    assert calibration.studies == len(entries)
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(left_out) == 3
    for line, said in zip(left_out, ("damaged.png", "silent: got no findings", "got a prompt"), strict=True):
        assert said in line


def test_calibration_data_that_cannot_be_used_is_named(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path
) -> None:
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
    refused([entries[0] | {"conversations": [{}, {"value": ""}]}], "none of which can be used .*got no findings")
    refused([entries[0] | {"conversations": [{}, {"value": 3}]}], "its value is 3, not text")
    refused([entries[0] | {"reason": 3}], "its reason is 3, not text")
    refused([entries[0] | {"reason": "long " * 9000}], "none of which can be used .*got a prompt")
    refused(entries[:3], "got 3 studies · expected at least 4.*--token-weights", token_weights=None)
    data.unlink()
    fails(folders, out, settings_for(data), LiteError, "got a file that cannot be read")


def test_a_group_size_that_does_not_fit_is_refused_before_the_work(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(*folders)
    odd = dataclasses.replace(source, decoder=dataclasses.replace(source.decoder, intermediate_size=224))
    monkeypatch.setattr(export.pipeline, "open_checkpoint", lambda *_: odd)
    match = r"down_proj\.weight: got 224 inputs .* whole groups of 128 .* choose --group-size 32, -1"
    fails(folders, tmp_path / "artifact", settings_for(listed, group_size=128), CheckpointError, match)


def test_a_non_finite_layer_is_named(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.parametrize("decoder_format", ["gptq-int4", "rtn", "bnb-nf4", "bnb-int8"])
def test_a_weight_beyond_float16_is_named(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, decoder_format: str
) -> None:
    copied = Path(shutil.copytree(folders[0].parent, tmp_path / "copy"))
    file = copied / folders[0].name / "adapter_model.bin"
    adapter = random_checkpoint.load(file)
    for factor in "AB":
        adapter[f"base_model.model.model.layers.1.mlp.up_proj.lora_{factor}.weight"] += 1000
    torch.save(adapter, file)
    settings = {
        "gptq-int4": settings_for(listed),
        "rtn": settings_for(listed, method="rtn", calibration_data=None, token_weights=None),
    }.get(decoder_format) or ExportSettings(decoder_format=decoder_format)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: got "):
        export_artifact(copied / folders[0].name, copied / folders[1].name, tmp_path / "artifact", settings)


def test_groups_of_another_size_than_the_configuration_says_are_refused(
    gptq_artifact: Artifact, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(gptq_artifact.path, tmp_path / "copy"))
    config = json.loads((copied / "decoder" / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (copied / "decoder" / "config.json").write_text(json.dumps(config))
    manifest = json.loads((copied / "manifest.json").read_text())
    record = manifest["parts"]["decoder_config"]["files"]["decoder/config.json"]
    record["bytes"] = (copied / "decoder" / "config.json").stat().st_size
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="got groups of 32 inputs · expected 64 by config.json"):
        lite.load(copied, device="cpu", verify=False)


def test_decoder_onnx_is_written_along(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line: the scales of its cache are found on the studies that the decoder is calibrated on."""
    out = tmp_path / "artifact"
    arguments = ["--checkpoint", str(folders[0]), "--base", str(folders[1]), "--out", str(out), "--quiet"]
    arguments += ["--decoder", "gptq-int4", "--group-size", "32", "--token-weights", "1,1", "--device", "cpu"]
    assert main([*arguments, "--calibration-data", str(listed), "--engine", "onnx"]) == 0
    printed = capsys.readouterr().out
    artifact = load_artifact(out)
    part, decoder = artifact.manifest.parts.decoder_onnx, artifact.manifest.parts.decoder
    assert part is not None
    assert part.fidelity is not None
    assert decoder.fidelity is not None
    assert part.fidelity.data == decoder.fidelity.data == "built-in"
    assert re.search(r"engine +KL \S+ nats/token, same top token \S+, from decoder/", printed)
    studies, tokens = part.fidelity.divergence.studies, part.fidelity.divergence.tokens
    assert f"the reports of {studies} studies (built-in), {tokens} tokens" in printed
    assert part.int8_cache is not None
    assert part.int8_cache.data == "studies.json"
    assert lite_main(["info", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(told) if line.startswith("fidelity decoder.onnx"))
    assert re.search(r"KL \S+ nats/token, same top token .* from decoder/, along the reports of \d+", told[first])
    assert re.search(r"its int8 cache +KL .* more$", told[first + 1])


def test_an_8_bit_tower_goes_the_whole_way(folders: tuple[Path, Path], listed: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(settings_for(listed), vision_format="int8")
    artifact = export_artifact(*folders, tmp_path / "artifact", settings)
    assert artifact.manifest.parts.vision.format == "int8"
    fidelity = artifact.manifest.parts.vision.fidelity
    assert fidelity is not None
    assert 1e-4 < fidelity.relative_error < 0.5
    assert 0.99 < fidelity.min_cosine < 0.999999
    findings = lite.load(artifact.path, device="cpu").findings(listed.parent / "0.png", max_new_tokens=4)
    assert 1 <= len(findings.token_ids) <= 4


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("decoder_format", ["gptq-int4", "bnb-nf4"])
def test_a_checkpoint_that_is_quantised_already_is_refused(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, where: int, decoder_format: str
) -> None:
    copied = Path(shutil.copytree(folders[0].parent, tmp_path / "copy"))
    changed = copied / folders[where].name / "config.json"
    random_checkpoint.edit_json(changed, quantization_config={"quant_method": "gptq", "bits": 4})
    settings = settings_for(listed) if decoder_format == "gptq-int4" else ExportSettings(decoder_format="bnb-nf4")
    with pytest.raises(CheckpointError, match="got a quantization_config .* stale: delete it"):
        export_artifact(copied / folders[0].name, copied / folders[1].name, tmp_path / "artifact", settings)


def test_settings_that_exclude_each_other_are_refused(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArtifactError, match=r"got no calibration data .*--calibration-data LIST.json.*--method rtn"):
        ExportSettings(decoder_format="gptq-int4")
    with pytest.raises(ArtifactError, match="got group_size for bnb-nf4"):
        ExportSettings(decoder_format="bnb-nf4", gptq=GptqSettings(group_size=64))
    with pytest.raises(ArtifactError, match="got calibration_data for fp16"):
        ExportSettings(gptq=GptqSettings(calibration_data=listed))
    for ignored in ({"calibration_data": listed}, {"refine": 1}, {"fold_scales": False}, {"clip": "none"}):
        with pytest.raises(ArtifactError, match=f"got {next(iter(ignored))} .* expected it with --method gptq only"):
            ExportSettings(decoder_format="gptq-int4", gptq=GptqSettings(method="rtn", **ignored))
    with pytest.raises(ArtifactError, match="got image_folder without verify_data"):
        ExportSettings(image_folder=listed.parent)
    with pytest.raises(ArtifactError, match="got token weights -1"):
        TokenWeights(image=-1, prompt=1)
    for wrong in ({"group_size": 48}, {"method": "awq"}, {"lm_head": "int4"}, {"clip": "l1"}):
        with pytest.raises(ArtifactError, match=f"got .*{next(iter(wrong.values()))}.*expected one of"):
            settings_for(listed, **wrong)
    for arguments in (["--group-size", "48"], ["--token-weights", "1"], ["--token-weights", "1,-2"], ["--refine", "x"]):
        with pytest.raises(SystemExit) as exit_info:
            main(["--checkpoint", "a", "--base", "b", "--out", "c", *arguments])
        assert exit_info.value.code == 2
        assert arguments[0] in capsys.readouterr().err


def test_the_command_line_takes_every_setting(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[ExportSettings] = []

    def take(*arguments: Any) -> None:
        taken.append(arguments[-1])
        raise ArtifactError("enough")

    monkeypatch.setattr(export.pipeline, "export_artifact", take)
    arguments = ["--checkpoint", "a", "--base", "b", "--out", str(tmp_path / "x"), "--quiet", "--decoder", "gptq-int8"]
    arguments += ["--calibration-data", "l.json", "--calibration-images", "d", "--calibration-studies", "7"]
    arguments += ["--group-size", "-1", "--token-weights", "0.5,2", "--activation-order", "none"]
    arguments += ["--clip", "none", "--refine", "0", "--no-fold-scales", "--lm-head", "int8", "--vision", "int8"]
    assert main(arguments) == 1
    assert taken == [
        ExportSettings(
            decoder_format="gptq-int8",
            vision_format="int8",
            gptq=GptqSettings(
                group_size=-1,
                calibration_data=Path("l.json"),
                calibration_images=Path("d"),
                calibration_studies=7,
                token_weights=TokenWeights(image=0.5, prompt=2.0),
                activation_order="none",
                clip="none",
                refine=0,
                fold_scales=False,
                lm_head="int8",
            ),
        )
    ]
    assert all(
        getattr(taken[0].gptq, field.name) != getattr(DEFAULTS.gptq, field.name)
        for field in dataclasses.fields(DEFAULTS.gptq)
        if field.name != "method"
    )


def test_a_manifest_that_does_not_fit_its_decoder_is_refused(gptq_artifact: Artifact, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(gptq_artifact.path, tmp_path / "copy"))
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["parts"]["decoder"]["format"] = "gptq-int8"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="got a decoder of gptq-int8 by the manifest · expected gptq-int4"):
        lite.load(copied, device="cpu")


def test_token_weights_are_by_modality() -> None:
    study = EncodedStudy(film=Path("x"), preprocessing=None, input_ids=(1, 5, -200, 6, 7), target_ids=(8, 9, 2))  # type: ignore[arg-type]
    weights = token_weights(study, 3, TokenWeights(image=0.5, prompt=0.25))
    # prompt 1 5, image ×3, prompt 6; then 7, which predicts the first target, and the targets that are read.
    assert weights.tolist() == [0.25, 0.25, 0.5, 0.5, 0.5, 0.25, 1.0, 1.0, 1.0]
    assert len(weights) == study.num_tokens(3)


def test_hidden_states_are_kept_on_disk_and_complete_or_not_there(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "h", [3, 1, 2], 4)
    assert not states.complete
    sequences = [torch.full((length, 4), float(length)) for length in (3, 1, 2)]
    states.fill(sequences)
    assert states.complete
    assert states.nbytes == (tmp_path / "h").stat().st_size == 6 * 4 * 4
    other = states.beside(tmp_path / "o")
    other.write(1, torch.full((1, 4), 9.0))
    assert [states.read(place).tolist() for place in range(3)] == [sequence.tolist() for sequence in sequences]
    assert other.read(1).tolist() == [[9.0] * 4]
    assert not other.read(0).any()
    os.truncate(tmp_path / "h", 10)
    assert not states.complete


def test_calibration_sees_what_the_runtime_will_see(
    folders: tuple[Path, Path], listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's inputs are spliced from the exported tower's features, as the runtime splices them."""
    seen: list[torch.Tensor] = []
    right = export.quantize.calibration.embed

    def watch(*args: Any) -> torch.Tensor:
        seen.append(right(*args))
        return seen[-1]

    monkeypatch.setattr(export.quantize.calibration, "embed", watch)
    settings = dataclasses.replace(settings_for(listed), vision_format="fp16")
    artifact = export_artifact(*folders, tmp_path / "artifact", settings)
    model = lite.load(artifact.path, device="cpu")
    entry = json.loads(listed.read_text())[5]
    ids = [*model.prompt.encode(entry["reason"]), *model.tokenizer.encode(entry["conversations"][1]["value"])]
    film = preprocess(load_image(listed.parent / entry["image"]).image, artifact.manifest.preprocessing)
    expected = model.decoder.embed(ids, torch.from_numpy(model.vision(film[None])[0]))
    torch.testing.assert_close(seen[5], expected, rtol=0, atol=1e-6)
    assert load_artifact(artifact.path).manifest.parts.vision.format == "fp16"
