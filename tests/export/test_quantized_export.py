"""Quantised exports of a tiny random checkpoint: what is written, and what the runtime and others make of it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_checkpoint
import torch
from driving import score_text
from PIL import Image
from small_export import FORMS, Folders, Small, command_line, settings_for, tensors_of
from tiny import relist
from unpacked import unpacked

import export.quantize.calibration
import lite
from export import export_artifact
from export.__main__ import main
from export.quantize.calibration import KINDS, HiddenStates, token_kinds
from export.quantize.importance import token_weights, uniform
from export.studies import EncodedStudy
from lite.__main__ import main as lite_main
from lite.artifact.open import load_artifact
from lite.errors import ArtifactError
from lite.image.files import load_image
from lite.image.preprocess import preprocess

if TYPE_CHECKING:
    from lite.artifact.open import Artifact


def linear(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def log_probs(artifact: Artifact) -> torch.Tensor:
    film = Image.fromarray(np.random.default_rng(99).integers(0, 255, (50, 50), dtype=np.uint8))
    logits = lite.load(artifact.path, device="cpu").score(film, list(range(3, 40)))
    return torch.from_numpy(logits).double().log_softmax(-1)


@pytest.mark.full
def test_a_folder_of_version_1_is_what_the_runtime_computes_with(small: Small) -> None:
    """The independent unpacker's weights, in a plain transformers Llama, give the runtime's logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, bits in {"gptq-int4": 4, "gptq-int8": 8, "int8-head": 4, "whole-rows": 4}.items():
        artifact = small(name)
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
    [("gptq-int4", 32, 4, None), ("gptq-int8", 32, 8, None), ("whole-rows", -1, 4, None), ("int8-head", 32, 4, 8)],
)
def test_the_configuration_is_the_one_others_read(
    small: Small, name: str, group_size: int, bits: int, head: int | None
) -> None:
    artifact = small(name)
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
    assert part.calibration.token_weights == pytest.approx({"first": 0.1, "prompt": 0.1, "image": 0.3, "findings": 1})
    assert not part.calibration.measured
    errors = part.calibration.errors
    assert len(errors) == 7 * random_checkpoint.LAYERS
    assert all(0 < error < 0.5 for error in errors.values())


def test_embeddings_norms_and_head_stay_16_bit(small: Small) -> None:
    source = tensors_of(small("fp16"))
    for name in FORMS:
        tensors = tensors_of(small(name))
        assert torch.equal(tensors["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
        assert torch.equal(tensors["model.norm.weight"], source["model.norm.weight"])
        assert ("lm_head.weight" in tensors) is (name != "int8-head")
        assert tensors["model.layers.0.input_layernorm.weight"].dtype == torch.float16
    assert (
        sum(t.nbytes for t in linear(tensors_of(small("int8-head")), "lm_head").values())
        < 0.6 * source["lm_head.weight"].nbytes
    )


def test_each_form_loses_what_its_bits_say(small: Small) -> None:
    p = log_probs(small("fp16"))
    names = ["fp16", "gptq-int4", "gptq-int8", "rtn-int4", "int8-head", "bnb-nf4", "bnb-int8"]
    losses = {name: float((p.exp() * (p - log_probs(small(name)))).sum(-1).mean()) for name in names}
    assert losses["fp16"] == 0
    assert losses["gptq-int8"] < 0.1 * losses["gptq-int4"]
    assert losses["gptq-int4"] < 0.5 * losses["rtn-int4"]
    assert losses["bnb-int8"] < 0.2 * losses["bnb-nf4"]
    assert losses["int8-head"] < 2 * losses["gptq-int4"]
    sizes = {name: sum(tensor.nbytes for tensor in tensors_of(small(name)).values()) for name in names}
    assert sizes["gptq-int4"] < sizes["gptq-int8"] < sizes["fp16"]
    assert sizes["bnb-nf4"] < sizes["bnb-int8"] < sizes["fp16"]


@pytest.mark.parametrize("name", ["gptq-int4", "bnb-nf4", "bnb-int8"])
def test_the_runtime_drafts_with_each_form(small: Small, name: str, listed: Path) -> None:
    model = lite.load(small(name).path, device="cpu")
    films = [(listed.parent / f"{number}.png", "Cough.") for number in range(3)]
    alone = [model.findings(*film, max_new_tokens=8).token_ids for film in films]
    together = [result.token_ids for result in model.findings_batch(films, batch_size=3, max_new_tokens=8)]
    assert alone == together
    assert all(1 <= len(token_ids) <= 8 for token_ids in alone)


def test_info_says_how_the_decoder_is_stored(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    for name, stored in {
        "gptq-int4": "gptq-int4 (groups of 32, calibrated on 12 studies of studies.json), 2 layers",
        "rtn-int4": "gptq-int4 (groups of 32, rounded to nearest), 2 layers",
        "int8-head": "gptq-int4 (groups of 32, int8 head, calibrated on 12 studies of studies.json), 2 layers",
        "whole-rows": "gptq-int4 (one group, calibrated",
        "bnb-nf4": "bnb-nf4, 2 layers",
    }.items():
        assert lite_main(["info", str(small(name).path)]) == 0
        told = capsys.readouterr().out
        assert stored in told
        assert ("on average" in told) is ("calibrated" in stored)
        assert max(map(len, told.splitlines())) < 400


@pytest.mark.parametrize(
    ("file", "keys", "value", "match"),
    [
        (
            "decoder/config.json",
            ("quantization_config", "group_size"),
            64,
            "got groups of 32 inputs · expected 64 by config.json",
        ),
        (
            "manifest.json",
            ("parts", "decoder", "format"),
            "gptq-int8",
            "got a decoder of gptq-int8 by the manifest · expected gptq-int4",
        ),
    ],
)
def test_what_does_not_fit_the_decoder_is_refused(
    gptq_artifact: Artifact, tmp_path: Path, file: str, keys: tuple[str, ...], value: object, match: str
) -> None:
    copied = Path(shutil.copytree(gptq_artifact.path, tmp_path / "copy"))
    content = inner = json.loads((copied / file).read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (copied / file).write_text(json.dumps(content))
    if file != "manifest.json":
        relist(copied, file)
    with pytest.raises(ArtifactError, match=match):
        lite.load(copied, device="cpu", verify=False)


def test_decoder_onnx_is_written_along(
    folders: Folders, listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By the command line: the scales of its cache are found on the studies that the decoder is calibrated on."""
    out = tmp_path / "artifact"
    arguments = command_line(folders, out, "--quiet", "--device", "cpu", "--decoder", "gptq-int4", "--engine", "onnx")
    arguments += ["--group-size", "32", "--token-weights", "1,1", "--calibration-data", str(listed)]
    with caplog.at_level("INFO", "export"):
        assert main(arguments) == 0
    stages = [message.rpartition(":")[0] for message in caplog.messages]
    assert [stage for stage in stages if "onnx" in stage or "scales" in stage] == [
        "writing vision.onnx", "writing decoder.onnx", "finding cache scales", "parity, decoder.onnx"
    ]  # fmt: skip
    printed, said = capsys.readouterr()
    assert not said
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
    assert re.search(r"that is  +\w+", told[first + 1])
    assert re.search(r"its int8 cache +KL .* more$", told[first + 2])


def test_tokens_are_of_four_kinds() -> None:
    study = EncodedStudy(film=Path("x"), preprocessing=None, input_ids=(1, 5, -200, 6, 7), target_ids=(8, 9, 2))  # type: ignore[arg-type]
    kinds = token_kinds(study, 3)
    # prompt 1 5, image ×3, prompt 6; then 7, which predicts the first target, and the targets that are read.
    named = [KINDS[kind] for kind in kinds.tolist()]
    assert named == ["first", "prompt", *["image"] * 3, "prompt", *["findings"] * 3]
    assert len(kinds) == study.num_tokens(3)
    importance = uniform(0.5, 0.25)
    for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert token_weights(importance, linear, kinds).tolist() == [0.25, 0.25, 0.5, 0.5, 0.5, 0.25, 1.0, 1.0, 1.0]


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
    folders: Folders, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's inputs are spliced from the exported tower's features, in 8 bits here, as the runtime does it."""
    seen: list[torch.Tensor] = []
    right = export.quantize.calibration.embed

    def watch(*args: Any) -> torch.Tensor:
        seen.append(right(*args))
        return seen[-1]

    monkeypatch.setattr(export.quantize.calibration, "embed", watch)
    settings = dataclasses.replace(settings_for(listed), vision_format="int8")
    artifact = export_artifact(*folders, tmp_path / "artifact", settings)
    vision = artifact.manifest.parts.vision
    assert vision.format == "int8"
    assert vision.fidelity is not None
    assert 1e-4 < vision.fidelity.relative_error < 0.5
    assert 0.99 < vision.fidelity.min_cosine < 0.999999
    model = lite.load(artifact.path, device="cpu")
    entry = json.loads(listed.read_text())[5]
    ids = [*model.prompt.encode(entry["reason"]), *model.tokenizer.encode(entry["conversations"][1]["value"])]
    film = preprocess(load_image(listed.parent / entry["image"]).image, artifact.manifest.preprocessing)
    expected = model.decoder.embed(ids, torch.from_numpy(model.vision(film[None])[0]))
    torch.testing.assert_close(seen[5], expected, rtol=0, atol=1e-6)
    assert 1 <= len(model.findings(listed.parent / "0.png", max_new_tokens=4).token_ids) <= 4
