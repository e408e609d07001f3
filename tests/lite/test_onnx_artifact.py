"""What belongs to decoder.onnx, damaged or made to do harm."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny import relist, write_tiny_gptq_artifact

import lite
from export import OnnxSettings, add_onnx
from lite.errors import ArtifactError


def damage(folder: Path, name: str, change: Callable[[Path], object]) -> None:
    """Change a file; let the manifest agree, so that only what is in it can tell."""
    change(folder / name)
    relist(folder, name)


def edit_graph(edit: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    def change(file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        edit(model)
        file.write_bytes(model.SerializeToString())

    return change


def refused(folder: Path, message: str, cache_dtype: Any = None) -> None:
    with pytest.raises(ArtifactError, match=message):
        lite.load(folder, engine="onnx", cache_dtype=cache_dtype)


def with_table(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], object]:
    return lambda file: np.save(file, change(np.load(file)))


def with_an_input_more(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("spare", onnx.TensorProto.INT32, []))


NO_GRAPHS = (b"", b"\x3a\xff\xff\xff\x7f", b"\x3a", b"\x0b", b"\xff" * 20, b"\x3a\x02\x0a\x05")
OTHER_TABLES = (lambda a: a[:-1], lambda a: a.T, lambda a: a.astype(np.float32), lambda a: a[None])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("decoder.onnx.data", lambda file: file.write_bytes(file.read_bytes()[:70_000]),
         r"decoder\.onnx: got a graph that ONNX Runtime .* cannot load"),
        *(("decoder.onnx", lambda file, content=content: file.write_bytes(content),
           r"decoder\.onnx: got something that ONNX Runtime cannot load") for content in NO_GRAPHS),
        ("decoder.onnx", edit_graph(with_an_input_more), r"decoder\.onnx: got spare .* no such value"),
        *(("embed_tokens.npy", with_table(change), r"embed_tokens\.npy: got float\d+ .* expected float16 \[420, 64\]")
          for change in OTHER_TABLES),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be(own_onnx_artifact: Path, name: str, change: Any, message: str) -> None:
    """With a manifest that agrees: an artifact put together by hand."""
    damage(own_onnx_artifact, name, change)
    refused(own_onnx_artifact, message)


def reading_from(place: str) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place

    return edit


@pytest.mark.parametrize("location", ["../outside.data", "absolute", "link"])
@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.int8_cache.onnx"])
def test_a_graph_that_reads_outside_of_the_artifact(own_onnx_artifact: Path, location: str, name: str) -> None:
    outside = own_onnx_artifact.parent / "outside.data"
    shutil.copyfile(own_onnx_artifact / "decoder.onnx.data", outside)
    if location == "link":
        (own_onnx_artifact / "link").symlink_to(outside)
    damage(own_onnx_artifact, name, edit_graph(reading_from(str(outside) if location == "absolute" else location)))
    message = rf"{name}: got a graph that reads its weights from '.*' · expected them in decoder\.onnx\.data"
    refused(own_onnx_artifact, message, "int8" if "int8" in name else None)


def hidden_in_an_attribute(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    node = onnx.helper.make_node("Constant", [], ["unused"], value=tensor)
    inner = onnx.helper.make_graph([node], "inner", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))


def hidden_in_a_function(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    model.functions.append(onnx.helper.make_function("own", "f", [], ["y"], [node], model.opset_import))


@pytest.mark.parametrize(
    "hide", [lambda model, tensor: model.graph.initializer.append(tensor), hidden_in_an_attribute, hidden_in_a_function]
)
@pytest.mark.parametrize("name", ["decoder.onnx", "vision.onnx"])
def test_a_tensor_outside_is_found_wherever_it_hides(own_onnx_artifact: Path, name: str, hide: Any) -> None:
    tensor = onnx.TensorProto(name="hidden", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value="/etc/hostname")
    damage(own_onnx_artifact, name, edit_graph(lambda model: hide(model, tensor)))
    refused(own_onnx_artifact, rf"{name}: got a graph that reads its weights from '/etc/hostname'")


def test_a_tag_that_hides_a_graph_from_us_and_not_from_onnx_runtime(own_onnx_artifact: Path) -> None:
    """Field 7, the graph, with a 33rd bit in its tag: ONNX Runtime's reader drops that."""

    def hide(file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        reading_from("secret.bin")(model)
        graph = model.graph.SerializeToString()
        model.ClearField("graph")
        length = bytes((len(graph) >> shift & 127) | (128 if shift < 21 else 0) for shift in (0, 7, 14, 21))
        file.write_bytes(model.SerializeToString() + b"\xba\x80\x80\x80\x10" + length + graph)

    damage(own_onnx_artifact, "decoder.onnx", hide)
    refused(own_onnx_artifact, r"cannot load \(a tag of more than 32 bits\)")


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
        refused(own_onnx_artifact, r"embed_tokens\.npy: got something unreadable")
        assert not trace.exists()
    np.load(own_onnx_artifact / "embed_tokens.npy", allow_pickle=True)
    assert trace.exists(), "the trap is none"


def test_the_graph_of_another_model(own_onnx_artifact: Path, tmp_path: Path, tokenizer_model: bytes) -> None:
    other = write_tiny_gptq_artifact(tmp_path / "other", tokenizer_model, num_hidden_layers=3, head_dim=32)
    add_onnx(other.path, OnnxSettings(verify_studies=1, verify_tokens=4, device="cpu"))
    for name in ("decoder.onnx", "decoder.onnx.data"):
        damage(own_onnx_artifact, name, lambda file, name=name: shutil.copyfile(other.path / name, file))
    refused(own_onnx_artifact, r"got past_key_values\.0\.key .*32.* expected .*16.* by the manifest")


def test_a_graph_in_place_of_the_other(own_onnx_artifact: Path) -> None:
    float_graph = (own_onnx_artifact / "decoder.onnx").read_bytes()
    damage(own_onnx_artifact, "decoder.int8_cache.onnx", lambda file: file.write_bytes(float_graph))
    message = r"int8_cache\.onnx: got is_prefill nowhere · expected .*bool.* by the manifest"
    refused(own_onnx_artifact, message, "int8")
