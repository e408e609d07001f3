"""The onnx engine: against torch, against itself (cached, chunked, batched), and artifacts that are damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from driving import NOT_FINITE, decode_token, newest_of, read_prompt, score_text
from repository import ROOT
from tiny import relist, write_tiny_gptq_artifact

import lite
from benchmarks.phantom.write import write_studies
from export import OnnxSettings, add_onnx
from export.__main__ import main as export_main
from lite.__main__ import main as lite_main
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import OnnxPart
from lite.config import IMAGE_TOKEN_ID
from lite.engines.cores import available_cores
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.segments import expand_image, num_prefix_tokens
from lite.errors import ArtifactError, ContextLengthError, LiteError
from lite.eval.divergence import compare_logits
from lite.eval.labels import read_labels
from lite.eval.metrics import label_f1
from lite.model import FindingsModel
from lite.studies.readers import read_studies
from lite.studies.results import Findings
from lite.studies.study import Study

PROMPTS = [
    [1, 30, 31, IMAGE_TOKEN_ID, 40, 41, 42],
    [1, IMAGE_TOKEN_ID, 50],
    [1, 60, 61, 62, 63, IMAGE_TOKEN_ID, 70, 71, 72, 73, 74],
]
TARGETS = [80, 81, 82, 83, 84, 85, 2]
IMAGES = np.random.default_rng(3).standard_normal((3, 4, 64)).astype(np.float32)
LENGTHS = [len(prompt) + 3 for prompt in PROMPTS]


@pytest.fixture(scope="module", params=[None, "int8"], ids=["float cache", "int8 cache"])
def decoder(request: pytest.FixtureRequest, tiny_onnx_artifact: Artifact) -> OnnxDecoder:
    return OnnxDecoder(tiny_onnx_artifact, cache_dtype=request.param)


@pytest.fixture(scope="module")
def onnx_model(tiny_onnx_artifact: Artifact) -> FindingsModel:
    return lite.load(tiny_onnx_artifact.path, engine="onnx")


def close(got: np.ndarray, expected: np.ndarray) -> None:
    """A product of one row and of many sum in another order, and what is then rounded to int8 may fall otherwise."""
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


# ---- against itself


def test_cached_is_uncached(decoder: OnnxDecoder) -> None:
    cache = decoder.new_cache(1, LENGTHS[0] + len(TARGETS))
    logits = [read_prompt(decoder, PROMPTS[0], IMAGES[0], cache)[0]]
    for index, token_id in enumerate(TARGETS[:-1]):
        assert cache.num_cached_tokens == [LENGTHS[0] + index]
        logits.append(decode_token(decoder, cache, [token_id])[0])
        assert newest_of(cache) == [logits[-1].argmax()]
    scored = score_text(decoder, PROMPTS[0], TARGETS, IMAGES[0])
    assert scored.shape == (len(TARGETS), decoder.config.vocab_size)
    close(np.stack(logits), scored)
    assert len({int(row.argmax()) for row in scored}) > 3, "rows that are all alike would prove nothing"


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64])
def test_chunked_is_whole(tiny_onnx_artifact: Artifact, chunk_size: int) -> None:
    whole, chunked = OnnxDecoder(tiny_onnx_artifact), OnnxDecoder(tiny_onnx_artifact)
    chunked.chunk_size = chunk_size
    assert whole.chunk_size > LENGTHS[2] + len(TARGETS)
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        # The logits wanted begin before, in and behind a chunk's border.
        for count in (1, 2, 3, len(TARGETS)):
            expected = score_text(whole, prompt, TARGETS[:count], image)
            got = score_text(chunked, prompt, TARGETS[:count], image)
            assert got.shape == expected.shape
            close(got, expected)
    caches = [decoder.new_cache(1, 20) for decoder in (whole, chunked)]
    first, second = (
        read_prompt(decoder, PROMPTS[2], IMAGES[2], cache)
        for decoder, cache in zip((whole, chunked), caches, strict=True)
    )
    close(second, first)
    for name, buffer in caches[0].buffers.items():
        other = caches[1].buffers[name].numpy()[:, :, : LENGTHS[2]]
        close(other, buffer.numpy()[:, :, : LENGTHS[2]])


def test_rows_of_a_batch_are_the_rows_alone(decoder: OnnxDecoder) -> None:
    """They are of other lengths and end at other times; and one begins where another has ended."""
    together = decoder.new_cache(3, max(LENGTHS) + 6)
    batch = [
        [read_prompt(decoder, *study, together, row)[0]] for row, study in enumerate(zip(PROMPTS, IMAGES, strict=True))
    ]
    assert together.num_cached_tokens == LENGTHS
    ends = [2, 5, 4]
    for step in range(max(ends)):
        logits = decode_token(decoder, together, [TARGETS[step]] * 3)
        # Those behind the last that is not free are not computed.
        assert len(logits) == (3 if step < 4 else 2)
        for row, end in enumerate(ends):
            if step < end:
                batch[row].append(logits[row])
            if step + 1 == end:
                together.release(row)
    assert together.num_cached_tokens == [length + end for length, end in zip(LENGTHS, ends, strict=True)]
    for row, (prompt, image, end) in enumerate(zip(PROMPTS, IMAGES, ends, strict=True)):
        alone = decoder.new_cache(1, LENGTHS[row] + 6)
        close(batch[row][0], read_prompt(decoder, prompt, image, alone)[0])
        for step in range(end):
            close(batch[row][step + 1], decode_token(decoder, alone, [TARGETS[step]])[0])


@pytest.mark.parametrize("left_behind", [1.0, np.nan])
def test_a_study_in_a_row_that_was_used_is_that_study_alone(decoder: OnnxDecoder, left_behind: float) -> None:
    """The longer one before it has left keys and values behind its prompt, numbers or not."""
    cache, alone = decoder.new_cache(2, 24), decoder.new_cache(1, 24)
    read_prompt(decoder, PROMPTS[2], IMAGES[2] * left_behind, cache, 0)
    read_prompt(decoder, PROMPTS[0], IMAGES[0], cache, 1)
    # The rounded keys of a film are numbers, whatever they were: that its features are is made sure of before.
    if decoder.cache_dtype != "int8":
        assert (newest_of(cache)[0] == NOT_FINITE) == (left_behind != 1.0)
    for _ in range(2):
        decode_token(decoder, cache)
    cache.release(0, damaged=left_behind != 1.0)
    decode_token(decoder, cache)  # while it is free
    assert cache.num_cached_tokens == [LENGTHS[2] + 2 if left_behind == 1.0 else 0, LENGTHS[0] + 3]
    close(read_prompt(decoder, PROMPTS[1], IMAGES[1], cache, 0), read_prompt(decoder, PROMPTS[1], IMAGES[1], alone))
    for token_id in TARGETS[:3]:
        got = decode_token(decoder, cache, [token_id, 91])[:1]
        close(got, decode_token(decoder, alone, [token_id]))
    assert cache.num_cached_tokens == [LENGTHS[1] + 3, LENGTHS[0] + 6]


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


def test_the_caches_size(tiny_onnx_artifact: Artifact) -> None:
    full, small = (OnnxDecoder(tiny_onnx_artifact, cache_dtype=dtype) for dtype in (None, "int8"))
    caches = full.new_cache(3, 50), small.new_cache(3, 50)
    assert [cache.nbytes for cache in caches] == [2 * 2 * 3 * 2 * 50 * 16 * size for size in (4, 1)]
    for cache in caches:
        assert cache.nbytes == sum(buffer.numpy().nbytes for buffer in cache.buffers.values())
        assert cache.max_seq_len == 50


def test_a_full_cache_is_refused_before_anything_is_written(decoder: OnnxDecoder) -> None:
    short = decoder.new_cache(1, LENGTHS[0] - 1)
    with pytest.raises(ContextLengthError, match=rf"position {LENGTHS[0]} · expected at most {LENGTHS[0] - 1}"):
        read_prompt(decoder, PROMPTS[0], IMAGES[0], short)
    assert short.num_cached_tokens == [num_prefix_tokens(expand_image(PROMPTS[0], len(IMAGES[0])))]
    exact = decoder.new_cache(2, LENGTHS[0] + 1)
    read_prompt(decoder, PROMPTS[0], IMAGES[0], exact, 0)
    decode_token(decoder, exact)
    read_prompt(decoder, PROMPTS[1], IMAGES[1], exact, 1)
    with pytest.raises(ContextLengthError, match="allocate a longer cache"):
        decode_token(decoder, exact)
    assert exact.num_cached_tokens == [LENGTHS[0] + 1, LENGTHS[1]]
    # A row that was full does not grow when it is free.
    exact.release(0)
    decode_token(decoder, exact)
    assert exact.num_cached_tokens == [LENGTHS[0] + 1, LENGTHS[1] + 1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_no_text(tiny_onnx_artifact: Artifact, value: float) -> None:
    decoder = OnnxDecoder(tiny_onnx_artifact)
    cache, image = decoder.new_cache(2, 30), np.full((4, 64), value, np.float32)
    read_prompt(decoder, PROMPTS[0], IMAGES[0], cache, 0)
    read_prompt(decoder, PROMPTS[0], image, cache, 1)
    for _ in range(2):
        newest = newest_of(cache)
        assert newest[0] >= 0
        assert newest[1] == NOT_FINITE
        decode_token(decoder, cache)
    assert decoder.overflow.startswith("got logits that are not finite in float32 · expected numbers")
    with pytest.raises(LiteError, match="got logits that are not finite in float32"):
        score_text(decoder, PROMPTS[0], TARGETS, image)


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


# ---- the façade with this engine


def test_stream_is_findings(onnx_model: FindingsModel, films: list[Path]) -> None:
    stream = onnx_model.stream(films[0], "cough")
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == stream.result().text == onnx_model.findings(films[0], "cough").text
    found = stream.result()
    assert found.memory.cache_bytes == 2 * 2 * 2 * onnx_model.session.loop.max_seq_len * 16 * 4
    assert found.memory.peak_vram_bytes is None
    json.dumps(dataclasses.asdict(found))


def test_batches_and_threads_say_what_each_says_alone(onnx_model: FindingsModel, films: list[Path]) -> None:
    reasons = [None, "cough", "Fever and shortness of breath for three days.", "", "chest pain"]
    studies = [Study(film, reason) for film, reason in zip(films, reasons, strict=True)]
    alone = [onnx_model.findings(study.image, study.reason) for study in studies]
    assert len({found.text for found in alone}) == len(films)
    for batch_size in (2, 5):
        for one, other in zip(alone, onnx_model.findings_batch(studies, batch_size=batch_size), strict=True):
            assert isinstance(other, Findings)
            # Products of several rows round otherwise: a random model's near-ties may fall to the other side.
            assert other.token_ids[:3] == one.token_ids[:3]
    got: dict[int, list[str]] = {}

    def run(thread: int) -> None:
        got[thread] = [onnx_model.findings(study.image, study.reason).text for study in studies]

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {thread: [found.text for found in alone] for thread in range(2)}


def test_the_command_line(
    tiny_onnx_artifact: Artifact, onnx_model: FindingsModel, films: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["generate", str(tiny_onnx_artifact.path), str(films[0]), "--max-new-tokens", "6"]
    assert lite_main([*start, "--engine", "onnx"]) == 0
    assert capsys.readouterr().out == onnx_model.findings(films[0], max_new_tokens=6).text + "\n"
    assert lite_main([*start, "--engine", "onnx", "--cache-dtype", "int8", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["engine"], line["cache_dtype"], line["provider"]) == ("onnx", "int8", "CPUExecutionProvider")
    for wrong in (["--provider", "abacus"], ["--engine", "onnx", "--dtype", "float16"]):
        assert lite_main([*start, *wrong]) == 1
        assert capsys.readouterr().err.startswith("error: got ")


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
    from export.studies import StudyReader
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
    for study in reader.built_in(16):
        image = encoder(study.pixel_values[None])[0]
        cache = decoder.new_cache(1, study.num_tokens(len(image)))
        score_text(decoder, study.input_ids, study.target_ids, image, cache=cache)
        for name, buffer in cache.buffers.items():
            layer, _, kind = name.partition(".")
            key = f"layers.{layer}.{kind[0]}_scale"
            largest[key] = np.maximum(largest[key], np.abs(buffer.numpy()[0]).max(axis=1))
    for name, found in largest.items():
        np.testing.assert_allclose(found, 127 * scales[name][0, :, 0], rtol=1e-5)


# ---- artifacts that are damaged


def damage(folder: Path, name: str, change: Callable[[Path], object], *, listed: bool = True) -> None:
    """Change a file; let the manifest agree, so that only what is in it can tell."""
    change(folder / name)
    if listed:
        relist(folder, name)


def edit_graph(edit: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    def change(file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        edit(model)
        file.write_bytes(model.SerializeToString())

    return change


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.onnx.data", "decoder.int8_cache.onnx", "embed_tokens.npy"])
def test_files_that_are_missing_truncated_or_changed(own_onnx_artifact: Path, name: str) -> None:
    file = own_onnx_artifact / name
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ArtifactError, match=rf"{name}: got sha256"):
        lite.load(own_onnx_artifact, engine="onnx")
    # The torch engine does not read it, and does not hash it.
    lite.load(own_onnx_artifact, engine="torch", device="cpu")
    file.write_bytes(content[:-1])
    for engine in ("onnx", "torch"):
        with pytest.raises(ArtifactError, match=rf"{name}: got {len(content) - 1} bytes .* truncated"):
            lite.load(own_onnx_artifact, engine=engine)
    file.unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: got no such file"):
        lite.load(own_onnx_artifact)


def test_data_shorter_than_the_graph_says(own_onnx_artifact: Path) -> None:
    """With a manifest that agrees: an artifact put together by hand."""
    damage(own_onnx_artifact, "decoder.onnx.data", lambda file: file.write_bytes(file.read_bytes()[:70_000]))
    with pytest.raises(ArtifactError, match=r"decoder\.onnx: got a graph that ONNX Runtime .* cannot load"):
        lite.load(own_onnx_artifact, engine="onnx")


@pytest.mark.parametrize("location", ["../outside.data", "absolute", "link"])
@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.int8_cache.onnx"])
def test_a_graph_that_reads_outside_of_the_artifact(own_onnx_artifact: Path, location: str, name: str) -> None:
    outside = own_onnx_artifact.parent / "outside.data"
    shutil.copyfile(own_onnx_artifact / "decoder.onnx.data", outside)
    place = str(outside) if location == "absolute" else location
    if location == "link":
        (own_onnx_artifact / "link").symlink_to(outside)

    def edit(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place

    damage(own_onnx_artifact, name, edit_graph(edit))
    cache_dtype: Any = "int8" if "int8" in name else None
    message = rf"{name}: got a graph that reads its weights from '.*' · expected them in decoder\.onnx\.data"
    with pytest.raises(ArtifactError, match=message):
        lite.load(own_onnx_artifact, engine="onnx", cache_dtype=cache_dtype)


def hidden_in_an_attribute(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    node = onnx.helper.make_node("Constant", [], ["unused"], value=tensor)
    inner = onnx.helper.make_graph([node], "inner", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))


def hidden_in_a_function(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    model.functions.append(onnx.helper.make_function("own", "f", [], ["y"], [node], model.opset_import))


@pytest.mark.parametrize(
    "hide",
    [lambda model, tensor: model.graph.initializer.append(tensor), hidden_in_an_attribute, hidden_in_a_function],
)
@pytest.mark.parametrize("name", ["decoder.onnx", "vision.onnx"])
def test_a_tensor_outside_is_found_wherever_it_hides(own_onnx_artifact: Path, name: str, hide: Any) -> None:
    tensor = onnx.TensorProto(name="hidden", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value="/etc/hostname")
    damage(own_onnx_artifact, name, edit_graph(lambda model: hide(model, tensor)))
    with pytest.raises(ArtifactError, match=rf"{name}: got a graph that reads its weights from '/etc/hostname'"):
        lite.load(own_onnx_artifact, engine="onnx")


def test_a_tag_that_hides_a_graph_from_us_and_not_from_onnx_runtime(own_onnx_artifact: Path) -> None:
    """Field 7, the graph, with a 33rd bit in its tag: ONNX Runtime's reader drops that."""

    def hide(file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "secret.bin"
        graph = model.graph.SerializeToString()
        model.ClearField("graph")
        length = bytes((len(graph) >> shift & 127) | (128 if shift < 21 else 0) for shift in (0, 7, 14, 21))
        file.write_bytes(model.SerializeToString() + b"\xba\x80\x80\x80\x10" + length + graph)

    damage(own_onnx_artifact, "decoder.onnx", hide)
    with pytest.raises(ArtifactError, match=r"cannot load \(a tag of more than 32 bits\)"):
        lite.load(own_onnx_artifact, engine="onnx")


@pytest.mark.parametrize("content", [b"", b"\x3a\xff\xff\xff\x7f", b"\x3a", b"\x0b", b"\xff" * 20, b"\x3a\x02\x0a\x05"])
def test_what_is_no_graph(own_onnx_artifact: Path, content: bytes) -> None:
    damage(own_onnx_artifact, "decoder.onnx", lambda file: file.write_bytes(content))
    with pytest.raises(ArtifactError, match=r"decoder\.onnx: got something that ONNX Runtime cannot load"):
        lite.load(own_onnx_artifact, engine="onnx")


class Trap:
    """Pickled code that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_embeddings_are_never_unpickled(own_onnx_artifact: Path, tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    array = np.array([Trap(trace)], dtype=object)

    def plain_pickle(file: Path) -> None:
        file.write_bytes(pickle.dumps(Trap(trace)))

    for change in (lambda file: np.save(file, array, allow_pickle=True), plain_pickle):
        damage(own_onnx_artifact, "embed_tokens.npy", change)
        with pytest.raises(ArtifactError, match=r"embed_tokens\.npy: got something unreadable"):
            lite.load(own_onnx_artifact, engine="onnx")
        assert not trace.exists()
    np.load(own_onnx_artifact / "embed_tokens.npy", allow_pickle=True)
    assert trace.exists(), "the trap is none"


def test_embeddings_of_another_model(own_onnx_artifact: Path) -> None:
    right = np.load(own_onnx_artifact / "embed_tokens.npy")
    for table in (right[:-1], right.T, right.astype(np.float32), right[None]):
        damage(own_onnx_artifact, "embed_tokens.npy", lambda file, table=table: np.save(file, table))
        with pytest.raises(ArtifactError, match=r"embed_tokens\.npy: got float\d+ .* expected float16 \[420, 64\]"):
            lite.load(own_onnx_artifact, engine="onnx")


def rename_input(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if value.name == "seqlens_k":
            value.name = "seqlens"
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "seqlens_k":
                node.input[index] = "seqlens"


def test_a_graph_with_other_inputs(own_onnx_artifact: Path) -> None:
    damage(own_onnx_artifact, "decoder.onnx", edit_graph(rename_input))
    with pytest.raises(ArtifactError, match=r"decoder\.onnx: got seqlens .* no such value"):
        lite.load(own_onnx_artifact, engine="onnx")


def test_the_graph_of_another_model(own_onnx_artifact: Path, tmp_path: Path, tokenizer_model: bytes) -> None:
    other = write_tiny_gptq_artifact(tmp_path / "other", tokenizer_model, num_hidden_layers=3, head_dim=32)
    add_onnx(other.path, OnnxSettings(verify_studies=1, verify_tokens=4, device="cpu"))
    for name in ("decoder.onnx", "decoder.onnx.data"):
        damage(own_onnx_artifact, name, lambda file, name=name: shutil.copyfile(other.path / name, file))
    with pytest.raises(ArtifactError, match=r"got past_key_values\.0\.key .*32.* expected .*16.* by the manifest"):
        lite.load(own_onnx_artifact, engine="onnx")


def test_a_graph_in_place_of_the_other(own_onnx_artifact: Path) -> None:
    float_graph = (own_onnx_artifact / "decoder.onnx").read_bytes()
    damage(own_onnx_artifact, "decoder.int8_cache.onnx", lambda file: file.write_bytes(float_graph))
    with pytest.raises(
        ArtifactError, match=r"int8_cache\.onnx: got is_prefill nowhere · expected .*bool.* by the manifest"
    ):
        lite.load(own_onnx_artifact, engine="onnx", cache_dtype="int8")


# ---- python -m export onnx


QUICK = ["--verify-studies", "1", "--verify-tokens", "4", "--device", "cpu", "--quiet"]


@pytest.fixture
def own_gptq_artifact(tmp_path: Path, tiny_gptq_artifact: Artifact) -> Path:
    return Path(shutil.copytree(tiny_gptq_artifact.path, tmp_path / "own-gptq"))


def siblings(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.parent.iterdir())


def test_it_is_added_in_place_and_again(
    own_gptq_artifact: Path, films: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_artifact(own_gptq_artifact)
    reader = lite.load(own_gptq_artifact, device="cpu")
    expected = reader.findings(films[0]).text
    beside = siblings(own_gptq_artifact)
    assert export_main(["onnx", str(own_gptq_artifact), *QUICK]) == 0
    out, err = capsys.readouterr()
    first = load_artifact(own_gptq_artifact)
    assert first.id != before.id
    assert first.id in out
    assert "--engine onnx" in out
    assert err == ""
    first.verify()
    assert first.manifest.parts.decoder_onnx is not None
    kept = {name: record for name, record in first.manifest.files.items() if name in before.manifest.files}
    assert kept == before.manifest.files
    assert siblings(own_gptq_artifact) == beside
    # Who had it open goes on, and reads the same.
    assert reader.findings(films[0]).text == expected
    opened = lite.load(own_gptq_artifact, engine="onnx")
    text = opened.findings(films[0]).text
    assert export_main(["onnx", str(own_gptq_artifact), *QUICK]) == 0
    again = load_artifact(own_gptq_artifact)
    assert again.id == first.id, "the same bytes, the same id"
    assert opened.findings(films[0]).text == lite.load(own_gptq_artifact, engine="onnx").findings(films[0]).text == text


def test_out_leaves_the_old_one(own_gptq_artifact: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in own_gptq_artifact.rglob("*") if path.is_file()}
    out = tmp_path / "other"
    assert export_main(["onnx", str(own_gptq_artifact), "--out", str(out), "--activations", "float16", *QUICK]) == 0
    assert {path: path.read_bytes() for path in own_gptq_artifact.rglob("*") if path.is_file()} == before
    part = load_artifact(out).manifest.parts.decoder_onnx
    assert part is not None
    assert part.cache_dtypes == ("float16", "int8")
    # A place that is taken is not overwritten.
    assert export_main(["onnx", str(own_gptq_artifact), "--out", str(out), *QUICK]) == 1


def test_what_cannot_be_done_leaves_everything(
    tiny_artifact: Artifact, own_gptq_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = siblings(tiny_artifact.path)
    for artifact, message in (
        (tiny_artifact.path, "got a decoder in fp16 · expected gptq-int4 or gptq-int8"),
        (tmp_path / "nowhere", "got a path that does not exist"),
    ):
        assert export_main(["onnx", str(artifact), *QUICK]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert message in err
    assert siblings(tiny_artifact.path) == beside
    file = own_gptq_artifact / "decoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    beside = siblings(own_gptq_artifact)
    assert export_main(["onnx", str(own_gptq_artifact), *QUICK]) == 1
    assert "got sha256" in capsys.readouterr().err
    assert siblings(own_gptq_artifact) == beside


@pytest.mark.parametrize("measured", ["divergence", "int8_cache"])
def test_a_graph_that_computes_something_else_is_not_kept(
    own_gptq_artifact: Path, monkeypatch: pytest.MonkeyPatch, measured: str
) -> None:
    from export import verify

    measure_onnx = verify.measure_onnx

    def worse(*arguments: Any, **settings: Any) -> OnnxPart:
        part = measure_onnx(*arguments, **settings)
        assert part.fidelity is not None
        found = dataclasses.replace(getattr(part.fidelity, measured), mean_kl=float("nan"))
        return dataclasses.replace(part, fidelity=dataclasses.replace(part.fidelity, **{measured: found}))

    monkeypatch.setattr(verify, "measure_onnx", worse)
    before, beside = load_artifact(own_gptq_artifact), siblings(own_gptq_artifact)
    with pytest.raises(ArtifactError, match=r"parity of decoder\..*onnx: got mean KL nan .*not kept"):
        add_onnx(own_gptq_artifact, OnnxSettings(verify_studies=1, verify_tokens=4, device="cpu"))
    assert load_artifact(own_gptq_artifact) == before
    assert siblings(own_gptq_artifact) == beside


@pytest.mark.parametrize(
    ("error", "said"), [(28, "got a full disk"), (5, "got an error from the system (Input/output")]
)
def test_a_full_disk_leaves_everything_and_is_told_in_words(
    own_gptq_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: int, said: str
) -> None:
    def full(*arguments: Any, **settings: Any) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("export.write.onnx_part.write_int8_cache_graph", full)
    before, beside = load_artifact(own_gptq_artifact), siblings(own_gptq_artifact)
    assert export_main(["onnx", str(own_gptq_artifact), *QUICK]) == 1
    assert capsys.readouterr().err.startswith(f"error: {own_gptq_artifact}: {said}")
    assert load_artifact(own_gptq_artifact) == before
    before.verify()
    assert siblings(own_gptq_artifact) == beside


def test_an_onnx_runtime_without_an_int8_cache_writes_the_float_one(
    own_gptq_artifact: Path, films: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")
    assert export_main(["onnx", str(own_gptq_artifact), *QUICK]) == 0
    assert "its int8 cache       none: it takes onnxruntime 1.27 or newer at export" in capsys.readouterr().out
    artifact = load_artifact(own_gptq_artifact)
    assert artifact.manifest.parts.decoder_onnx is not None
    assert artifact.manifest.parts.decoder_onnx.cache_dtypes == ("float32",)
    assert "decoder.int8_cache.onnx" not in artifact.manifest.files
    assert lite_main(["info", str(own_gptq_artifact)]) == 0
    assert lite.load(own_gptq_artifact, engine="onnx").findings(films[0]).cache_dtype == "float32"
    with pytest.raises(LiteError, match="got cache_dtype 'int8' · expected float32"):
        lite.load(own_gptq_artifact, engine="onnx", cache_dtype="int8")


def test_places_that_are_refused(
    own_gptq_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_artifact(own_gptq_artifact)
    assert export_main(["onnx", str(own_gptq_artifact), "--out", str(own_gptq_artifact / "sub"), *QUICK]) == 1
    assert "got a place inside the artifact" in capsys.readouterr().err
    monkeypatch.chdir(own_gptq_artifact)
    assert export_main(["onnx", ".", *QUICK]) == 1
    assert "got the folder you are in" in capsys.readouterr().err
    assert export_main(["onnx", ".", "--out", "../beside", *QUICK]) == 0
    assert load_artifact("../beside").manifest.parts.decoder_onnx is not None
    assert load_artifact(own_gptq_artifact) == before


def test_ctrl_c_leaves_everything(own_gptq_artifact: Path) -> None:
    before, beside = load_artifact(own_gptq_artifact), siblings(own_gptq_artifact)
    with subprocess.Popen(
        [sys.executable, "-m", "export", "onnx", own_gptq_artifact, "--verify-studies", "400", "--device", "cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(own_gptq_artifact.parent.glob(".*.partial/decoder.onnx.data")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=300)
    assert process.returncode == 130, told
    assert printed == ""
    assert told.splitlines()[-1] == f"interrupted: {own_gptq_artifact} is as it was"
    assert "Traceback" not in told
    assert load_artifact(own_gptq_artifact) == before
    before.verify()
    assert siblings(own_gptq_artifact) == beside
