"""The committed demo model: it reads phantoms, it is as hard to quantise as a real decoder, and honestly so."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from exported import export_demo_gptq
from repository import CHECKPOINT
from safetensors.torch import load_file
from tiny import decoder_folder

from benchmarks.phantom.publish import fold_channel_scales
from benchmarks.phantom.write import write_studies
from benchmarks.quality.compare import decided_tokens, draft
from lite.artifact.open import Artifact
from lite.engines.torch_engine.load import load_decoder
from lite.eval.labels import read_labels
from lite.eval.metrics import label_f1
from lite.loading import load
from lite.model import FindingsModel
from lite.studies.sources.listed import read_studies
from lite.studies.study import Study

NUM_FILMS = 24
SEED = 77_001  # of films that training, the choice of sigma and the README's table never used
GROUP_SIZE = 128

State = dict[str, torch.Tensor]


class Scored(NamedTuple):
    """A film, what the model writes about it by itself, with EOS, and its log-probabilities there."""

    study: Study
    text: str
    token_ids: tuple[int, ...]
    log_probs: torch.Tensor


@pytest.fixture(scope="module")
def scored(demo_model: FindingsModel, tmp_path_factory: pytest.TempPathFactory) -> list[Scored]:
    folder = tmp_path_factory.mktemp("films") / "studies"
    studies = read_studies(write_studies(folder, count=NUM_FILMS, seed=SEED, dicom=False))
    scored = []
    for study, found in zip(studies, draft(demo_model, studies, name="demo"), strict=True):
        token_ids = decided_tokens(found, demo_model.artifact.manifest.decoding)
        scored.append(Scored(study, found.text, token_ids, log_probs(demo_model, study, token_ids)))
    return scored


def log_probs(model: FindingsModel, study: Study, token_ids: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(model.score(study.image, token_ids, study.reason)).double().log_softmax(-1)


def divergence(model: FindingsModel, scored: list[Scored]) -> tuple[float, float]:
    """Return the mean KL of a model from the demo's in nats per token, and the share of equal top tokens."""
    expected = torch.cat([entry.log_probs for entry in scored])
    got = torch.cat([log_probs(model, entry.study, entry.token_ids) for entry in scored])
    kl = (expected.exp() * (expected - got)).sum(-1).mean()
    return float(kl), float((expected.argmax(-1) == got.argmax(-1)).double().mean())


def stored(model: FindingsModel) -> State:
    """The decoder's weights as its files have them, in float32."""
    files = (model.artifact.path / "decoder").glob("*.safetensors")
    return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}


def kl_of(model: FindingsModel, scored: list[Scored], change: Callable[[State], State]) -> float:
    """Mean KL in nats per token of the model with changed decoder weights from the model as it is."""
    config = json.loads((model.artifact.path / "decoder" / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        decoder = load_decoder(decoder_folder(Path(folder), config, change(stored(model))), device="cpu")
    return divergence(dataclasses.replace(model, decoder=decoder), scored)[0]


def round_to_nearest_int4(state: State) -> State:
    """Symmetric 4-bit round-to-nearest of every decoder linear, groups of 128 along the input, fp16 scales."""

    def quantise(weight: torch.Tensor) -> torch.Tensor:
        groups = weight.float().unflatten(-1, (-1, GROUP_SIZE))
        scales = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
        return ((groups / scales).round().clamp(-8, 7) * scales).flatten(-2)

    return {name: quantise(weight).contiguous() if "_proj" in name else weight for name, weight in state.items()}


def test_round_to_nearest_int4_costs_what_it_costs_a_real_decoder(
    demo_model: FindingsModel, scored: list[Scored]
) -> None:
    assert 0.02 <= kl_of(demo_model, scored, round_to_nearest_int4) <= 0.06


def test_the_channel_scales_leave_the_function_unchanged(demo_model: FindingsModel, scored: list[Scored]) -> None:
    plan = json.loads((CHECKPOINT / "training.json").read_text(encoding="utf-8"))
    config = json.loads((CHECKPOINT / "base" / "config.json").read_text(encoding="utf-8"))

    def unfold(state: State) -> State:
        return fold_channel_scales(state, config, sigma=-plan["scale_sigma"], seed=plan["seed"])

    before = stored(demo_model)
    unfolded = unfold(before)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(unfolded[name], before[name], rtol=0.1)
    assert kl_of(demo_model, scored, unfold) <= 1e-6
    # Without the scales the same rounding hardly costs anything: they are what makes it hard.
    assert kl_of(demo_model, scored, lambda state: round_to_nearest_int4(unfold(state))) < 0.01


def test_it_reads_films_it_has_never_seen(scored: list[Scored]) -> None:
    drafts = [read_labels(entry.text) for entry in scored]
    truths = [read_labels(entry.study.reference) for entry in scored]
    # The table in benchmarks/phantom/README.md has the figures; these films only show that nothing is broken.
    assert label_f1(truths, drafts).micro.value >= 0.85


def test_the_layout_is_small_enough_to_commit() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) <= 16_000_000


def test_nothing_in_the_checkpoint_is_uniform() -> None:
    """A LoRA that is zero, or a projector that is, would let a wrong merge pass."""
    adapter = torch.load(CHECKPOINT / "llava-rad-phantom" / "adapter_model.bin", weights_only=True)
    assert all(float(np.abs(tensor.float().numpy()).max()) > 1e-3 for tensor in adapter.values())


@pytest.mark.full
def test_gptq_loses_no_more_than_it_may(
    demo_model: FindingsModel, scored: list[Scored], demo_int4_artifact: Artifact, calibration: Path, tmp_path: Path
) -> None:
    def export(name: str, decoder_format: str, **choices: bool) -> Artifact:
        return export_demo_gptq(tmp_path / name, decoder_format, calibration, calibration_studies=48, **choices)

    int4_kl = min(0.0127, 0.5 * kl_of(demo_model, scored, round_to_nearest_int4))
    for artifact, max_kl, min_same_top in (
        (export("int8", "gptq-int8"), 4e-4, 0.99),
        (demo_int4_artifact, int4_kl, 0.95),
        # Without folding, which undoes what makes this model hard, the bars must hold too.
        (export("unfolded", "gptq-int4", fold_scales=False), int4_kl, 0.95),
    ):
        kl, same_top = divergence(load(artifact.path, device="cpu"), scored)
        assert kl <= max_kl, artifact.path
        assert same_top >= min_same_top, artifact.path
