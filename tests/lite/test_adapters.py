"""Adapters by the torch engine and in a session: each row with its own, and without one nothing changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import hospital
import numpy as np
import onnx
import pytest
import torch
from recording import record
from tiny import film, tiny_onnx_part

import lite
from lite.artifact.open import Artifact
from lite.artifact.parts import PUBLISHED, AdapterFidelity, DecoderFidelity, Divergence, FileRecord, unhashed
from lite.engines.adapters import Adapters
from lite.engines.machine import Machine
from lite.engines.options import LoadOptions
from lite.engines.protocol import NO_ADAPTER, Segment
from lite.engines.resolve import resolve
from lite.engines.segments import divide, score
from lite.engines.torch_engine.linear import linears_of
from lite.engines.torch_engine.load import load_decoder
from lite.errors import ArtifactError, LiteError
from lite.eval.calibration import beside, find_calibration
from lite.memory.counts import adapter_bytes, onnx_adapter_bytes
from lite.memory.plan import plan_memory
from lite.serve.models import model_names
from lite.vision import VisionEncoder

IDS = (1, 5, 9, 11, 30, 17)
TEXT = (40, 41, 42, 43)
NAMES = ("north", "south")
MACHINE = Machine(
    num_cores=1,
    memory_bytes=None,
    resident_bytes=0,
    gpus=(),
    has_torch=True,
    providers=("CPUExecutionProvider",),
    onnxruntime="1.32.0",
)


@pytest.fixture(scope="module")
def adapted(tiny_gptq_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two adapters: of rank 4 on all linears, and of rank 6 on those of the gated half."""
    config = tiny_gptq_artifact.decoder_config()
    north, south = hospital.stored_factors(config), hospital.stored_factors(config, rank=6, seed=2, only="mlp")
    out = tmp_path_factory.mktemp("adapted") / "artifact"
    return hospital.artifact_with_adapters(tiny_gptq_artifact, out, north=north, south=south)


def merged(artifact: Artifact, name: str) -> Any:
    """A decoder into whose weights an adapter was merged."""
    decoder = load_decoder(artifact, device="cpu")
    stacks = Adapters(artifact, [name])
    for owner, linear in linears_of(decoder.model).items():
        whole = [weight.dequantize(torch.float32) for weight in linear.weights]  # type: ignore[union-attr]
        parts = {f"model.{owner.rpartition('.')[0]}.{part}": width for part, width in linear.parts.items()}
        if (stack := stacks.stack(parts, linear.in_features)) is not None:
            begin = 0
            for place, width in enumerate(stack.parts):
                a, b = stack.a[0, place * stack.rank : (place + 1) * stack.rank], stack.b[0, begin : begin + width]
                whole[place] = whole[place] + torch.from_numpy(b.astype(np.float32) @ a.astype(np.float32))
                begin += width
        linear.weights = tuple(whole)
    return decoder


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_computes_what_merged_weights_do(adapted: Artifact, name: str, cache_dtype: Any) -> None:
    decoder = load_decoder(adapted, device="cpu", adapters=NAMES, cache_dtype=cache_dtype)
    whole = merged(adapted, name)
    whole.quantizes_cache = cache_dtype == "int8"
    got = score(decoder, IDS, TEXT, None, adapter=NAMES.index(name))
    expected, without = score(whole, IDS, TEXT, None), score(decoder, IDS, TEXT, None)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-3)
    assert np.abs(without - expected).max() > 0.1


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_what_is_loaded_and_not_used_changes_no_bit(adapted: Artifact, cache_dtype: Any) -> None:
    plain, loaded = (
        load_decoder(adapted, device="cpu", adapters=names, cache_dtype=cache_dtype) for names in ((), NAMES)
    )
    for adapters in ((NO_ADAPTER,) * 3, (NO_ADAPTER, 0, 1)):  # alone, and beside rows that do use one
        caches = []
        for decoder in (plain, loaded):
            cache = decoder.new_cache(3, 32)
            for row, adapter in enumerate(adapters):
                slot = adapter if decoder is loaded else NO_ADAPTER
                for part in divide(IDS, row=row, chunk_size=4, image_features=None, adapter=slot):
                    decoder.extend(part, cache)
            for _ in range(4):
                decoder.decode(cache)
            caches.append(cache)
        for mine, theirs in zip(caches[0]._tensors(), caches[1]._tensors(), strict=True):
            assert torch.equal(mine[:, 0], theirs[:, 0])
        assert torch.equal(caches[0].last_logits[0], caches[1].last_logits[0])


def decoded(decoder: Any, adapters: list[int], drafts: int = 0) -> list[list[int]]:
    """Decode a row with each adapter together; return their tokens."""
    cache = decoder.new_cache(len(adapters), 64)
    tokens: list[list[int]] = []
    for row, adapter in enumerate(adapters):
        chosen = None
        for part in divide((*IDS, 50 + row), row=row, chunk_size=4, image_features=None, adapter=adapter):
            chosen = decoder.extend(part, cache)
        assert chosen is not None
        tokens.append(list(chosen.wait()[row].token_ids))
    for _ in range(8):
        guess = {row: [7] * drafts for row in range(len(adapters))} if drafts else {}
        for row, found in decoder.decode(cache, guess).wait().items():
            tokens[row].append(found.token_ids[0])
            if drafts:  # all guesses are taken to be wrong
                cache.truncate(row, len(IDS) + len(tokens[row]), newest=found.token_ids[0])
    return tokens


@pytest.mark.parametrize("capture", [None, record])
@pytest.mark.parametrize("drafts", [0, 2])
def test_rows_of_one_batch_may_use_different_adapters(adapted: Artifact, drafts: int, capture: Any) -> None:
    decoder = load_decoder(adapted, device="cpu", adapters=NAMES)
    decoder.capture = capture
    slots = [0, NO_ADAPTER, 1, 0]
    together = decoded(decoder, slots, drafts)
    decoder.capture = None
    for row, slot in enumerate(slots):
        alone = decoded(decoder, [slot if place == row else NO_ADAPTER for place in range(len(slots))], drafts)
        assert together[row] == alone[row]
    assert len({tuple(tokens) for tokens in together}) == len(slots)


def test_a_row_that_another_study_gets_forgets_its_adapter(adapted: Artifact) -> None:
    decoder = load_decoder(adapted, device="cpu", adapters=NAMES)
    cache = decoder.new_cache(1, 32)
    found = []
    for adapter in (NO_ADAPTER, 0, NO_ADAPTER):
        segment: Segment[Any] = Segment(row=0, start=0, input_ids=IDS, num_logits=1, adapter=adapter)
        decoder.extend(segment, cache)
        decoder.decode(cache)
        found.append(cache.last_logits)
        cache.release(0)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_the_factors_take_what_the_plan_counts(adapted: Artifact) -> None:
    plain, loaded = (load_decoder(adapted, device="cpu", adapters=names) for names in ((), ("north",)))
    assert loaded.nbytes - plain.nbytes == adapter_bytes(adapted.decoder_config(), [4], itemsize=4)
    plan = resolve(LoadOptions(engine="torch", adapters=["north", "south"]), adapted, MACHINE)
    assert plan.adapters == NAMES
    assert plan.memory.adapter_bytes == adapter_bytes(adapted.decoder_config(), [4, 6], itemsize=4)
    assert plan.memory.items()["adapters"] == plan.memory.adapter_bytes
    assert plan.choices["adapters"] == ("north, south", "asked for")
    without = resolve(LoadOptions(engine="torch"), adapted, MACHINE).memory
    assert plan.memory.card_bytes - without.card_bytes == plan.memory.adapter_bytes


def test_a_default_adapter_is_loaded_unasked_and_used_where_none_is_named(adapted: Artifact) -> None:
    parts = adapted.manifest.parts
    kept = dataclasses.replace(parts.adapters["south"], is_default=True)
    artifact = adapted.with_parts(adapters=parts.adapters | {"south": kept})
    plan = resolve(LoadOptions(engine="torch", adapters=["north"]), artifact, MACHINE)
    assert plan.adapters == ("south", "north")
    assert plan.choices["adapters"][1] == "asked for; south is for requests that name none"


def divergence(mean: float) -> Divergence:
    return Divergence(studies=1, tokens=1, mean_kl=mean, max_kl=mean, same_top=1.0, perplexity_ratio=1.0,
                      first_divergent_token=None, studies_without_divergence=1.0)  # fmt: skip


@pytest.mark.parametrize(("kl", "cache"), [(1e-5, "int8"), (0.5, "float32"), (None, "float32")])
def test_an_int8_cache_is_taken_unasked_where_it_loses_little_with_the_adapter_too(
    adapted: Artifact, kl: float | None, cache: str
) -> None:
    onnx = dataclasses.replace(
        tiny_onnx_part(int8_cache=True),
        fidelity=DecoderFidelity(data="", divergence=divergence(0.0), int8_cache=divergence(1e-5)),
    )
    fidelity = AdapterFidelity(data="", divergence=divergence(0.1), without=divergence(0.1),
                               int8_cache=None if kl is None else divergence(kl))  # fmt: skip
    part = dataclasses.replace(adapted.manifest.parts.adapters["north"], fidelity=fidelity)
    artifact = adapted.with_parts(decoder_onnx=onnx, adapters={"north": part})
    plan = resolve(LoadOptions(engine="onnx", adapters=["north"]), artifact, MACHINE)
    assert plan.cache_dtype == cache
    assert resolve(LoadOptions(engine="onnx"), artifact, MACHINE).cache_dtype == "int8"
    assert plan.losses["with north, from the checkpoint"] == 0.1
    # The decoder's own figures are those of the default one, asked for or not.
    default = artifact.with_parts(adapters={"north": dataclasses.replace(part, fidelity=None, is_default=True)})
    plan = resolve(LoadOptions(engine="onnx", adapters=["north"]), default, MACHINE)
    assert plan.cache_dtype == "int8"
    assert "with north, from the checkpoint" not in plan.losses


def test_an_adapter_that_loses_much_is_warned_of_where_it_is_loaded(
    adapted: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    factors = hospital.stored_factors(adapted.decoder_config())
    artifact = hospital.artifact_with_adapters(adapted.with_parts(adapters={}), tmp_path / "a", north=factors)
    spoilt = AdapterFidelity(data="list.json", divergence=divergence(0.3), without=divergence(0.3), label_f1=0.6,
                             label_f1_without=0.8)  # fmt: skip
    north = dataclasses.replace(artifact.manifest.parts.adapters["north"], fidelity=spoilt)
    (artifact.path / "manifest.json").write_text(artifact.manifest.with_parts(adapters={"north": north}).to_json())
    for names, times in (([], 0), (["north"], 1)):
        with lite.load(artifact.path, engine="torch", device="cpu", adapters=names):
            assert caplog.text.count("the decoder with north has lost 0.3 nats a token, more than 4 bits") == times
            assert caplog.text.count("with north texts had label F1 0.600 at the export, without it 0.800") == times


def test_what_onnx_takes_for_adapters_is_in_the_plan(adapted: Artifact) -> None:
    config, parts = adapted.decoder_config(), adapted.manifest.parts
    own = parts.adapters["north"]
    own = dataclasses.replace(own, projector="own", files=own.files | {"own": FileRecord(bytes=1 << 20, sha256="")})
    artifact = adapted.with_parts(decoder_onnx=tiny_onnx_part(), adapters=parts.adapters | {"own": own})
    asked = ((), NAMES, ("own", "south"))
    none, both, projected = (resolve(LoadOptions(engine="onnx", adapters=names), artifact, MACHINE) for names in asked)
    taken = onnx_adapter_bytes(config, [4, 6])
    assert none.memory.adapter_bytes == 0
    assert both.memory.adapter_bytes == projected.memory.adapter_bytes == taken == 2 * onnx_adapter_bytes(config, [6])
    # They are in the graph for prompts once more.
    twice = plan_memory(both.shapes, dataclasses.replace(both.workload, int8_prompts=True))
    assert twice.adapter_bytes == 2 * taken
    assert both.memory.prefill_work_bytes > none.memory.prefill_work_bytes
    assert projected.memory.vision_bytes - both.memory.vision_bytes >= 1 << 20


# -- By the façade ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(adapted: Artifact) -> Any:
    with lite.load(adapted.path, engine="torch", device="cpu", rows=3, adapters=NAMES[::-1]) as loaded:
        yield loaded


def test_each_request_names_its_adapter(model: Any, adapted: Artifact) -> None:
    asked = [None, "north", "south", "north", None]
    with lite.load(adapted.path, engine="torch", device="cpu") as plain:
        base = [plain.findings(film(seed), max_new_tokens=6, reuse=False) for seed in range(5)]
    alone = [model.findings(film(seed), max_new_tokens=6, adapter=name, reuse=False) for seed, name in enumerate(asked)]
    drafts = [model.submit(film(seed), max_new_tokens=6, adapter=name) for seed, name in enumerate(asked)]
    together = [draft.result() for draft in drafts]
    assert [found.token_ids for found in together] == [found.token_ids for found in alone]
    assert [found.adapter for found in together] == asked
    assert max(found.timings.batch_size for found in together) > 1
    same = [found.token_ids == other.token_ids for found, other in zip(together, base, strict=True)]
    assert same == [True, False, False, False, True]
    assert base[0].adapter is None


def test_a_film_is_taken_up_for_the_same_adapter_alone(model: Any) -> None:
    def reused(name: str | None, reason: str) -> int:
        count: int = model.findings(film(77), reason, max_new_tokens=2, adapter=name).num_reused_tokens
        return count

    assert [reused(name, "Cough.") for name in ("north", None, "south")] == [0, 0, 0]
    assert all(reused(name, "Fever.") > 0 for name in ("north", None, "south"))


def test_scoring_takes_an_adapter(model: Any) -> None:
    plain, north = (model.score(film(3), [40, 41], adapter=name) for name in (None, "north"))
    assert plain.shape == north.shape
    assert np.abs(plain - north).max() > 0.1


def test_a_film_is_seen_by_the_projector_of_its_adapter(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, see = [], VisionEncoder.__call__

    def noted(self: VisionEncoder, *given: Any, adapter: int) -> Any:
        seen.append(adapter)
        return see(self, *given, adapter=adapter)

    monkeypatch.setattr(VisionEncoder, "__call__", noted)
    for name in (None, "south", "north"):
        model.findings(film(78), max_new_tokens=1, adapter=name)
    assert seen == [NO_ADAPTER, 0, 1]  # by the order in which they were asked for


def test_whoever_names_none_gets_the_lora_that_was_kept(
    adapted: Artifact, tiny_gptq_artifact: Artifact, tmp_path: Path
) -> None:
    north, published = (hospital.stored_factors(adapted.decoder_config(), seed=seed) for seed in (1, 2))
    out = tmp_path / "kept"
    hospital.artifact_with_adapters(tiny_gptq_artifact, out, north=north, published=published)
    with lite.load(out, engine="torch", device="cpu", adapters=["north"]) as model:
        asked = (None, PUBLISHED, "north")
        found = [model.findings(film(79), max_new_tokens=6, reuse=False, adapter=name) for name in asked]
        assert [one.adapter for one in found] == [PUBLISHED, PUBLISHED, "north"]
        assert found[0].token_ids == found[1].token_ids != found[2].token_ids
        assert model_names(model) == (model.artifact.manifest.model, "north")
        beside(out, PUBLISHED).write_text("{}")
        with pytest.raises(LiteError, match=r"kept\.published\.confidence\.json"):
            find_calibration("auto", model)
        assert find_calibration("auto", model, "north") is None
    file = out / "adapters/published/factors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(ArtifactError, match="factors.safetensors: got sha256"):
        lite.load(out, engine="torch", device="cpu")


def test_what_is_not_loaded_and_what_is_not_there_are_named(model: Any, adapted: Artifact) -> None:
    with pytest.raises(LiteError, match="got the adapter 'east' · expected one of south, north, which are loaded"):
        model.submit(film(1), adapter="east")
    with pytest.raises(LiteError, match="got the adapter 'east' · expected one of north, south · choose one"):
        lite.load(adapted.path, adapters=["east"])
    for wrong in ("north", ["north", "north"]):
        with pytest.raises(LiteError, match=r"got adapters .* · expected a list of names, each once"):
            lite.load(adapted.path, adapters=wrong)


def test_features_go_through_the_projector_of_the_adapter(
    tiny_gptq_artifact: Artifact, adapted: Artifact, tmp_path: Path
) -> None:
    factors = hospital.stored_factors(adapted.decoder_config())
    artifact = hospital.artifact_with_adapters(tiny_gptq_artifact, tmp_path / "a", plain=factors, own=factors)
    graph, file = onnx.load(artifact.path / "projector.onnx"), "adapters/own/projector.onnx"
    graph.graph.node[-1].op_type = "Neg"  # it was Identity
    onnx.save(graph, artifact.path / file)
    parts = artifact.manifest.parts
    own = dataclasses.replace(parts.adapters["own"], projector=file, files=parts.adapters["own"].files | unhashed(file))
    artifact = artifact.with_parts(adapters=parts.adapters | {"own": own})
    encoder, pixels = VisionEncoder(artifact, adapters=("plain", "own")), np.ones((1, 3, 28, 28), np.float32)
    vision = dataclasses.replace(parts.vision, projector=file, files=parts.vision.files | unhashed(file))
    expected = VisionEncoder(artifact.with_parts(vision=vision))(pixels)
    np.testing.assert_array_equal(encoder(pixels, adapter=1), expected)
    np.testing.assert_array_equal(encoder(pixels, adapter=0), encoder(pixels))
    assert np.abs(expected - encoder(pixels)).max() > 1e-3
