"""The onnx engine: what only it has, and the demo model by it and by torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from driving import IMAGES, LENGTHS, PROMPTS, TARGETS, decode_token, read_prompt, score_text

import lite
from benchmarks.phantom.write import write_studies
from lite.artifact.open import Artifact
from lite.engines.cores import available_cores
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.errors import LiteError
from lite.eval.divergence import compare_logits
from lite.eval.labels import read_labels
from lite.eval.metrics import label_f1
from lite.model import FindingsModel
from lite.studies.sources.listed import read_studies


@pytest.fixture(scope="module", params=[None, "int8"], ids=["float cache", "int8 cache"])
def decoder(request: pytest.FixtureRequest, tiny_onnx_artifact: Artifact) -> OnnxDecoder:
    return OnnxDecoder(tiny_onnx_artifact, cache_dtype=request.param)


def test_the_cache_is_written_in_place(decoder: OnnxDecoder) -> None:
    cache = decoder.new_cache(2, 30)
    addresses = {name: buffer.data_ptr() for name, buffer in cache.buffers.items()}
    for buffer in cache.buffers.values():
        buffer.numpy()[...] = 99
    for row in range(2):
        read_prompt(decoder, PROMPTS[row], IMAGES[row], cache, row)
    for step in range(4):
        decode_token(decoder, cache, [90, 91])
        assert {name: buffer.data_ptr() for name, buffer in cache.buffers.items()} == addresses
        for buffer in cache.buffers.values():
            for row, length in enumerate(LENGTHS[:2]):
                values = buffer.numpy()[row]
                written, rest = values[:, : length + step + 1], values[:, length + step + 1 :]
                assert (written != 99).any(axis=-1).all(), "a token has left no key or value"
                assert (rest == 99).all(), "something was written behind the last token"


def test_an_error_of_onnx_runtime_is_ours(tiny_onnx_artifact: Artifact) -> None:
    decoder = OnnxDecoder(tiny_onnx_artifact)
    decoder._embeddings = decoder._embeddings[:, :63]
    with pytest.raises(LiteError, match="got an error of ONNX Runtime .* expected CPUExecutionProvider"):
        score_text(decoder, [1, 2, 3], TARGETS, None)


def test_threads_of_the_session_are_the_cores(tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    assert OnnxDecoder(tiny_onnx_artifact)._session.get_session_options().intra_op_num_threads == available_cores()
    monkeypatch.setattr("lite.engines.onnx_session.available_cores", lambda: 3)
    assert OnnxDecoder(tiny_onnx_artifact)._session.get_session_options().intra_op_num_threads == 3


def test_decoding_takes_no_more_memory_with_each_token(tiny_onnx_artifact: Artifact) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    from lite.memory.process import rss_bytes

    decoder = OnnxDecoder(tiny_onnx_artifact)
    cache = decoder.new_cache(8, 600)
    for row in range(8):
        read_prompt(decoder, PROMPTS[0], IMAGES[0], cache, row)
    for _ in range(50):
        decode_token(decoder, cache)
    before = rss_bytes() or 0
    for _ in range(400):
        decode_token(decoder, cache)
    # A copy of the cache for each token would be 400 x 2 MB.
    assert (rss_bytes() or 0) - before < 8e6


# ---- the demo model: text and labels


@pytest.fixture(scope="module")
def demo_pair(demo_onnx_artifact: Artifact) -> tuple[FindingsModel, FindingsModel]:
    return (
        lite.load(demo_onnx_artifact.path, engine="torch", device="cpu"),
        lite.load(demo_onnx_artifact.path, engine="onnx", cache_dtype="float32"),
    )


@pytest.mark.full
def test_the_demo_says_the_same(demo_pair: tuple[FindingsModel, FindingsModel], tmp_path: Path) -> None:
    listed = write_studies(tmp_path / "films", count=12, seed=20261124, dicom=False)
    studies = read_studies(listed)
    texts = [[model.findings(study.image, study.reason).text for study in studies] for model in demo_pair]
    assert len(set(texts[0])) > 8
    assert sum(one == other for one, other in zip(*texts, strict=True)) >= 11
    drawn = [read_labels(study.reference) for study in studies]
    f1 = [label_f1(drawn, [read_labels(text) for text in found]).micro.value for found in texts]
    assert abs(f1[0] - f1[1]) <= 0.005
    small = lite.load(demo_pair[1].artifact.path, engine="onnx", cache_dtype="int8")
    losses, cache_losses = [], []
    for study, text in zip(studies[:6], texts[0], strict=False):
        token_ids = demo_pair[0].tokenizer.encode(text)
        by_torch, by_onnx, by_int8 = (m.score(study.image, token_ids, study.reason) for m in (*demo_pair, small))
        losses.append(compare_logits(by_torch, by_onnx, token_ids).kl.mean())
        cache_losses.append(compare_logits(by_onnx, by_int8, token_ids).kl.mean())
    assert np.mean(losses) <= 2e-3
    assert 0 < np.mean(cache_losses) <= 1e-3


def test_what_the_manifest_says_was_measured(demo_onnx_artifact: Artifact) -> None:
    part = demo_onnx_artifact.manifest.parts.decoder_onnx
    assert part is not None
    assert part.fidelity is not None
    assert part.fidelity.data == "studies.json"
    assert 0 < part.fidelity.divergence.mean_kl <= 2e-3
    assert part.fidelity.int8_cache is not None
    assert 0 < part.fidelity.int8_cache.mean_kl <= 1e-3
    assert (part.dtype, part.accuracy_level, part.cache_dtypes) == ("float32", 4, ("float32", "int8"))
    assert part.int8_cache is not None
    assert (part.int8_cache.data, part.int8_cache.studies) == ("studies.json", 16)


def test_the_scales_cover_what_they_were_found_on(tiny_onnx_artifact: Artifact) -> None:
    """On the built-in studies no value of the cache is clipped, and each channel reaches its last step."""
    from export.studies import StudyReader, with_own_films
    from lite.vision import VisionEncoder

    artifact = tiny_onnx_artifact
    model = onnx.load(artifact.path / "decoder.int8_cache.onnx", load_external_data=False)
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_scale")}
    reader = StudyReader(
        artifact.file("tokenizer.model"),
        artifact.manifest,
        max_seq_len=artifact.decoder_config().max_position_embeddings,
        max_tokens=256,
    )
    decoder, encoder = OnnxDecoder(artifact), VisionEncoder(artifact)
    largest = {name: np.zeros_like(array[0, :, 0]) for name, array in scales.items()}
    studies = with_own_films(reader.read(None, None, 16, option="")).studies
    assert len({study.film_sha256 for study in studies}) == 16, "scales found on fewer films lose more"
    for study in studies:
        image = encoder(study.pixel_values[None])[0]
        cache = decoder.new_cache(1, study.num_tokens(len(image)))
        score_text(decoder, study.input_ids, study.target_ids, image, cache=cache)
        for name, buffer in cache.buffers.items():
            layer, _, kind = name.partition(".")
            key = f"layers.{layer}.{kind[0]}_scale"
            largest[key] = np.maximum(largest[key], np.abs(buffer.numpy()[0]).max(axis=1))
    for name, found in largest.items():
        np.testing.assert_allclose(found, 127 * scales[name][0, :, 0], rtol=1e-5)
