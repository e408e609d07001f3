"""The towers of retrieval, exported and run: against transformers' own BERT and DINOv2, and against their own rules."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import random_checkpoint
import random_towers
import torch
from PIL import Image
from repository import run_python
from torch.nn import functional

import lite
from benchmarks.phantom.network import load_trunk
from export import ExportSettings, export_artifact
from export.__main__ import read_settings
from export.source.checkpoint import open_checkpoint
from export.write.retrieval_part import _recall
from lite.artifact.open import load_artifact
from lite.errors import ArtifactError, CheckpointError, ImageError, LiteError, MemoryBudgetError, PromptError
from lite.image.files import load_image
from lite.retrieval.towers import Retrieval, load_retrieval, open_towers
from lite.retrieval.wordpiece import WordPiece

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lite.artifact.open import Artifact
    from lite.config import VisionFormat

TEXTS = ("Left pleural effusion.", "The lungs are clear. No effusion.", "", "heart " * 90, "Lungs are clear")
FORMATS: tuple[VisionFormat, ...] = ("fp32", "fp16", "int8")
# Of numbers of embeddings of length 1, float32: 2e-7 is usual.
CLOSE = 2e-6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return checkpoint, base and the BERT's folder."""
    folder = tmp_path_factory.mktemp("towers")
    checkpoint, base = random_checkpoint.write(folder)
    random_towers.add_towers(checkpoint)
    return checkpoint, base, random_towers.bert_folder(folder / "bert")


def export(source: tuple[Path, Path, Path], out: Path, form: VisionFormat, **settings: Any) -> Artifact:
    checkpoint, base, bert = source
    how: dict[str, Any] = {"retrieval": True, "text_vocab": bert, "text_format": form} | settings
    return export_artifact(checkpoint, base, out, ExportSettings(vision_format=form, verify_tokens=4, **how))


@pytest.fixture(scope="module")
def artifacts(source: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("exported")
    return {form: export(source, folder / form, form) for form in FORMATS}


@pytest.fixture
def towers(artifacts: dict[str, Artifact]) -> Iterator[Retrieval]:
    with load_retrieval(artifacts["fp32"].path) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def films() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    smooth = [Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((70, 60)) for _ in range(3)]
    return [load_image(film, any_film=True).image for film in smooth]


def bert_embeddings(texts: tuple[str, ...], wordpiece: WordPiece) -> np.ndarray:
    """Embed by transformers' BERT and two products, a text at a time."""
    from transformers import BertConfig, BertModel

    named = random_towers.others()
    prefix = "text.transformer."
    state = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    config = {key: value for key, value in random_towers.BERT.items() if key != "architectures"}
    bert: Any = BertModel(BertConfig(vocab_size=len(random_towers.pieces()), **config))
    bert.load_state_dict({name: tensor for name, tensor in state.items() if "position_ids" not in name})
    rows = []
    bert.eval()
    with torch.inference_mode():
        for ids in map(wordpiece.cut, wordpiece.encode(texts)):
            hidden = bert(torch.tensor([ids])).last_hidden_state[0, 0]
            hidden = functional.gelu(named["text.proj.0.weight"] @ hidden)
            rows.append(functional.normalize(named["text.proj.2.weight"] @ hidden, dim=0))
    return torch.stack(rows).numpy()


def dino_embeddings(checkpoint: Path, pixels: np.ndarray) -> np.ndarray:
    from transformers import Dinov2Config, Dinov2Model

    state = random_checkpoint.load(checkpoint / "biomedclipcxr_42_checkpoint.pt")["state_dict"]
    dim, size = random_checkpoint.DIM, random_checkpoint.IMAGE_SIZE
    config = Dinov2Config(
        hidden_size=dim, num_hidden_layers=random_checkpoint.DEPTH, num_attention_heads=dim // 64, image_size=size,
        patch_size=14, layer_norm_eps=1e-6,
    )  # fmt: skip
    tower: Any = Dinov2Model(config)
    load_trunk(tower, state)
    tower.eval()
    with torch.inference_mode():
        seen = tower(torch.from_numpy(pixels)).last_hidden_state[:, 0]
        return functional.normalize(seen @ state["module.visual.head.proj.weight"].T, dim=-1).numpy()


def test_texts_are_embedded_as_by_transformers(artifacts: dict[str, Artifact]) -> None:
    for form, bound in (("fp32", 1 - 1e-6), ("fp16", 1 - 1e-5), ("int8", 0.999)):
        with load_retrieval(artifacts[form].path) as towers:
            expected, got = bert_embeddings(TEXTS, towers.wordpiece), towers.embed_texts(TEXTS)
        assert got.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
        assert (expected * got).sum(axis=1).min() > bound, form
        if form == "fp32":
            np.testing.assert_allclose(got, expected, atol=CLOSE)


def test_films_are_embedded_as_by_transformers(
    source: tuple[Path, Path, Path], artifacts: dict[str, Artifact], films: list[Image.Image]
) -> None:
    from lite.image.preprocess import preprocess

    pixels = np.stack([preprocess(film, artifacts["fp32"].manifest.preprocessing) for film in films])
    expected = dino_embeddings(source[0], pixels)
    for form, bound in (("fp32", 1 - 1e-6), ("fp16", 1 - 1e-5), ("int8", 0.999)):
        with load_retrieval(artifacts[form].path) as towers:
            got = towers.embed_images(films, any_film=True)
            np.testing.assert_allclose(towers.embed_pixels(pixels), got, atol=1e-3 if form == "int8" else CLOSE)
        assert (expected * got).sum(axis=1).min() > bound, form
        if form == "fp32":
            np.testing.assert_allclose(got, expected, atol=CLOSE)


def test_a_text_does_not_depend_on_those_beside_it(artifacts: dict[str, Artifact]) -> None:
    for form, atol in (("fp32", 1e-6), ("fp16", 1e-6), ("int8", 5e-3)):
        with load_retrieval(artifacts[form].path) as towers:
            alone = np.concatenate([towers.embed_texts([text]) for text in TEXTS])
            np.testing.assert_allclose(towers.embed_texts(TEXTS * 2), np.concatenate([alone, alone]), atol=atol)
            ids = [towers.wordpiece.cut(row) for row in towers.wordpiece.encode(TEXTS)]
            padded = np.array([row + [0] * (max(map(len, ids)) - len(row)) for row in ids])
            np.testing.assert_allclose(towers.embed_ids(padded), alone, atol=atol)


def test_findings_run_the_same_files_with_retrieval_and_without(
    source: tuple[Path, Path, Path], artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    for form in ("fp32", "int8"):
        plain = export(source, tmp_path / form, form, retrieval=False, text_vocab=None, text_format="fp32")
        theirs, ours = plain.manifest.files, artifacts[form].manifest.files
        assert "retrieval" not in json.loads((plain.path / "manifest.json").read_text())["parts"]
        assert {name: ours[name] for name in theirs} == theirs
        assert set(ours) - set(theirs) == {"film.onnx", "text.onnx", "vocab.txt"}
    with pytest.raises(ArtifactError, match="without towers for retrieval .* --retrieval --text-vocab"):
        load_retrieval(plain.path)
    dim = random_checkpoint.DIM
    assert artifacts["fp32"].manifest.files["film.onnx"].bytes < 4 * (12 * dim**2 + 20 * dim + 48 * dim) + 8000


def test_what_was_lost_is_measured(artifacts: dict[str, Artifact]) -> None:
    cosines = []
    for form in FORMATS:
        part = load_artifact(artifacts[form].path).manifest.parts.retrieval
        assert part is not None
        assert part.fidelity is not None
        assert (part.fidelity.films, part.fidelity.texts, part.fidelity.data) == (1, 4, "built-in")
        assert not part.fidelity.recall  # of one film
        cosines.append((part.fidelity.film_cosine, part.fidelity.text_cosine))
    for found in zip(*cosines, strict=True):
        assert list(found) == sorted(found, reverse=True)


def test_recall_counts_a_tie_as_lost() -> None:
    films = np.eye(3, dtype=np.float32)
    texts = np.array([[1, 0, 0], [0, 1, 0], [0.6, 0.8, 0], [0.6, 0.6, 0.6]], np.float32)
    found = _recall(films, texts, np.array([0, 1, 0, 2]))
    # The third text's film is second to another; the fourth's is equal to two others.
    assert found["text to film @1"] == 0.5
    assert found["text to film @5"] == 1
    assert found["film to text @1"] == 1


def test_the_id_is_of_what_embeddings_depend_on(
    source: tuple[Path, Path, Path], artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    ids = {load_retrieval(artifacts[form].path, verify=False).artifact_id for form in FORMATS}
    assert len(ids) == len(FORMATS)
    other = export(source, tmp_path / "other", "fp32", decoder_format="bnb-int8")
    assert load_retrieval(other.path).artifact_id in ids
    other = export(source, tmp_path / "text", "fp32", text_format="fp16")
    assert load_retrieval(other.path).artifact_id not in ids


def test_a_long_text_is_cut_and_that_is_said(towers: Retrieval, caplog: pytest.LogCaptureFixture) -> None:
    words = ["left", "effusion", "heart", "clear"] * 80
    short, exact, long = " ".join(words[:10]), " ".join(words[:254]), " ".join(words[:255])
    with caplog.at_level(logging.WARNING, "lite"):
        rows = towers.embed_texts([short, exact])
        assert not caplog.records
        cut = towers.embed_texts([short, long])
    assert [record.getMessage() for record in caplog.records] == [
        "text 1: 257 tokens, of which the tower reads the first 256"
    ]
    np.testing.assert_allclose(rows, cut, atol=1e-6)
    assert towers.count_tokens([short, exact, long, ""]) == [12, 256, 257, 2]


def test_ids_are_those_of_berts_own_tokenizer(source: tuple[Path, Path, Path]) -> None:
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    theirs = BertTokenizerLegacy(str(source[2] / "vocab.txt"))  # type: ignore[no-untyped-call]
    ours = WordPiece(source[2] / "vocab.txt", vocab_size=len(random_towers.pieces()), max_tokens=256)
    rng = random.Random(0)
    odd = [
        "é",
        "Ü",
        "ﬁ",
        "ß",
        "İ",
        "中文",
        "中",
        "テ",
        "한글",
        "…",
        "–",
        "\u200b",
        "\x00",
        "\t",
        "\u3000",
        "¿",
        "½",
        "🫁",
    ]
    known = [*random_towers.WORDS[:8], "Effusions", "LEFTLY", "naïve", "Ångström", "x-ray", "3.4cm", "T8/T9", "a" * 120]
    texts = ["", " ", "\n", "...", "\ufffd", "e\u0301", "lungs\u00a0are", "-", "(no)", "'s"]
    texts += ["".join(rng.choices([*odd, *known, " ", " ", ".", ","], k=rng.randrange(1, 20))) for _ in range(490)]
    assert len(set(texts)) > 450
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert ids == theirs.encode(text), text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pieces: pieces[:-1], r"got \d+ pieces · expected \d+"),
        (lambda pieces: [*pieces[:-1], "left"], "got 1 pieces twice"),
        (lambda pieces: [p if p != "[UNK]" else "unk" for p in pieces], r"got no \[UNK\]"),
        (lambda pieces: [pieces[1], pieces[0], *pieces[2:]], "in the first line"),
    ],
)
def test_another_vocabulary_is_refused(source: tuple[Path, Path, Path], tmp_path: Path, change: Any, said: str) -> None:
    folder = random_towers.bert_folder(tmp_path / "bert")
    pieces = change(random_towers.pieces())
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(*source[:2], text_vocab=folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 90}, r"word_embeddings.weight' of shape \[\d+, 64\] · expected \[90, 64\]"),
        ({"num_hidden_layers": 2}, "got the tensor 'text.transformer.encoder.layer.2"),
        ({"num_hidden_layers": 4}, "got no tensor 'text.transformer.encoder.layer.3"),
        ({"num_attention_heads": 7}, "num_attention_heads=7.* heads of equal width"),
        ({"max_position_embeddings": 128}, "max_position_embeddings=128.* positions for max_tokens"),
        ({"hidden_act": "relu"}, "got hidden_act='relu' · expected 'gelu'"),
        ({"hidden_size": "64"}, "hidden_size: got '64' · expected int"),
        ({"layer_norm_eps": 2}, "layer_norm_eps=2.0"),
    ],
)
def test_another_bert_is_refused(
    source: tuple[Path, Path, Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = random_towers.bert_folder(tmp_path / "bert", **changes)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(*source[:2], text_vocab=folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(*source[:2], text_vocab=tmp_path / "none")


@pytest.mark.parametrize(
    "name",
    [
        "visual.head.proj.weight",
        "text.proj.0.weight",
        "text.proj.2.weight",
        "text.transformer.encoder.layer.1.attention.self.key.bias",
        "visual.trunk.blocks.2.attn.qkv.weight",
        "visual.trunk.norm.weight",
    ],
)
def test_a_missing_tensor_is_refused_with_retrieval_only(
    source: tuple[Path, Path, Path], tmp_path: Path, name: str
) -> None:
    checkpoint = shutil.copytree(source[0], tmp_path / "llava-rad-phantom")
    file = checkpoint / "biomedclipcxr_42_checkpoint.pt"
    random_checkpoint.edit_tensors(file, lambda state: {k: v for k, v in state.items() if k != f"module.{name}"})
    with pytest.raises(CheckpointError, match=name.removeprefix("visual.trunk.")):
        open_checkpoint(checkpoint, source[1], text_vocab=source[2])
    open_checkpoint(checkpoint, source[1])


def test_every_tensor_is_used_or_named(source: tuple[Path, Path, Path], tmp_path: Path) -> None:
    found = open_checkpoint(*source[:2], text_vocab=source[2]).retrieval
    assert found is not None
    used = {f"text.transformer.{name}" for name in found.read_text() if not name.startswith("proj.")}
    used |= {"text.proj.0.weight", "text.proj.2.weight", "visual.head.proj.weight"}
    assert set(random_towers.others()) - used == {
        "logit_scale",
        "text.transformer.embeddings.position_ids",
        *(f"text.transformer.pooler.dense.{kind}" for kind in ("weight", "bias")),
    }
    checkpoint = shutil.copytree(source[0], tmp_path / "llava-rad-phantom")
    more = {"module.text.transformer.adapter.weight": torch.zeros(2)}
    random_checkpoint.edit_tensors(checkpoint / "biomedclipcxr_42_checkpoint.pt", lambda state: state | more)
    with pytest.raises(CheckpointError, match="'text.transformer.adapter.weight' .* does not know"):
        open_checkpoint(checkpoint, source[1], text_vocab=source[2])


def test_settings_exclude_each_other() -> None:
    with pytest.raises(ArtifactError, match="retrieval without text_vocab .* --text-vocab DIR"):
        read_settings(["--retrieval"])
    for options in (["--text-vocab", "bert"], ["--text", "int8"]):
        with pytest.raises(ArtifactError, match="without retrieval .* give --retrieval"):
            read_settings(options)
    settings = read_settings(["--retrieval", "--text-vocab", "bert", "--text", "int8"])
    assert (settings.retrieval, settings.text_format, str(settings.text_vocab)) == (True, "int8", "bert")


def test_films_are_refused_by_the_rules_of_findings_and_texts_that_are_none(towers: Retrieval, tmp_path: Path) -> None:
    black = Image.new("L", (64, 64))
    with pytest.raises(ImageError) as rules:
        load_image(black)
    with pytest.raises(ImageError) as refused:
        towers.embed_images([black])
    assert str(refused.value) == str(rules.value)
    with pytest.raises(ImageError, match="no such file"):
        towers.embed_images([tmp_path / "none.png"])
    with pytest.raises(LiteError, match="got one str · expected several films"):
        towers.embed_images("film.png")
    assert towers.embed_images([]).shape == towers.embed_texts([]).shape == (0, random_towers.EMBED_DIM)
    with pytest.raises(PromptError, match="text 1: got 'None' of type NoneType"):
        towers.embed_texts(["left", None])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="without halves of surrogate pairs"):
        towers.embed_texts(["\ud800"])


def test_what_cannot_be_loaded_is_refused(artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    path = artifacts["fp32"].path
    with pytest.raises(MemoryBudgetError, match="limit of 1.0 MiB · expected"):
        load_retrieval(path, memory_limit="1MiB")
    load_retrieval(path, memory_limit="64GiB", threads=1).close()
    with pytest.raises(LiteError, match="threads=0"):
        load_retrieval(path, threads=0)
    for name in ("film.onnx", "vocab.txt", "vision.onnx"):
        damaged = shutil.copytree(path, tmp_path / name)
        content = bytearray((damaged / name).read_bytes())
        content[-1] ^= 1
        (damaged / name).write_bytes(content)
        with pytest.raises(ArtifactError, match="got sha256"):
            load_retrieval(damaged)


def test_a_tail_of_another_graph_is_refused(artifacts: dict[str, Artifact]) -> None:
    part = artifacts["fp32"].manifest.parts.retrieval
    assert part is not None
    other = artifacts["fp32"].with_parts(retrieval=dataclasses.replace(part, film="projector.onnx"))
    with pytest.raises(ArtifactError, match="cannot load .*patch_features"):
        open_towers(other)
    wider = artifacts["fp32"].with_parts(retrieval=dataclasses.replace(part, dim=part.dim + 1))
    with pytest.raises(ArtifactError, match="by the manifest"):
        open_towers(wider)


def test_closed_towers_say_so(artifacts: dict[str, Artifact]) -> None:
    with lite.load_retrieval(artifacts["fp32"].path) as towers:
        assert towers.dim == random_towers.EMBED_DIM
    with pytest.raises(LiteError, match="closed"):
        towers.embed_texts(["left"])


def test_nothing_heavy_is_loaded(artifacts: dict[str, Artifact]) -> None:
    code = f"""
import sys, lite
with lite.load_retrieval({str(artifacts["fp32"].path)!r}) as towers:
    print(towers.embed_texts(["left pleural effusion"]).shape)
print(sorted({{"torch", "transformers", "onnx", "sentencepiece", "export"}} & set(sys.modules)))
"""
    assert run_python("-c", code).splitlines() == [f"(1, {random_towers.EMBED_DIM})", "[]"]
