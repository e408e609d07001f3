"""CheXbert F1: on a small random labeller of the published layout, and on examples worked by hand.

The published weights cannot be here. What they are is written out in `published_layout`, with small sizes; what the
labeller computes is compared with BERT and its heads put together the long way round.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from lite.errors import BackendUnavailable, CheckpointError
from lite.eval import chexbert
from lite.eval.chexbert import COMPETITION, CONDITIONS, chexbert_f1, read_classes
from lite.eval.figures import Estimate, Missing
from lite.eval.labels import LABELS

HIDDEN, INTERMEDIATE, LAYERS, POSITIONS = 128, 96, 2, 24
PUBLISHED = chexbert.BERT_BASE
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PLAIN = (".", ",", "the", "heart", "is", "enlarged", "large", "no", "effusion", "##s", "edema", "left", "cafe")
WORDS = [*SPECIAL, *PLAIN]
TEXTS = [
    "The heart is enlarged.",
    "  Effusions,\n no edema.  ",
    "",
    "Left effusion. " * 30,  # cut
    "Café unknown edema, the left heart",
]

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def small_bert(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": INTERMEDIATE}
    sizes |= {"vocab_size": len(WORDS), "hidden_size": HIDDEN, "max_position_embeddings": POSITIONS}
    assert sizes.keys() == chexbert.BERT_BASE.keys()
    monkeypatch.setattr(chexbert, "BERT_BASE", sizes)


def test_the_sizes_are_those_of_bert_base_uncased() -> None:
    assert {name: getattr(BertConfig(), name) for name in PUBLISHED} == PUBLISHED


def published_layout(*, seed: int = 0) -> State:
    """Random tensors under the names that the published file has."""
    normal = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (len(WORDS), HIDDEN),
        "bert.embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "bert.embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "bert.pooler.dense.weight": (HIDDEN, HIDDEN),
        "bert.pooler.dense.bias": (HIDDEN,),
    }
    for layer in range(LAYERS):
        square = [f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
        linears = dict.fromkeys(square, (HIDDEN, HIDDEN))
        linears |= {"intermediate.dense": (INTERMEDIATE, HIDDEN), "output.dense": (HIDDEN, INTERMEDIATE)}
        for name, (outputs, inputs) in linears.items():
            shapes[f"bert.encoder.layer.{layer}.{name}.weight"] = (outputs, inputs)
            shapes[f"bert.encoder.layer.{layer}.{name}.bias"] = (outputs,)
    for index in range(14):
        classes = 2 if index == 13 else 4
        shapes[f"linear_heads.{index}.weight"] = (classes, HIDDEN)
        shapes[f"linear_heads.{index}.bias"] = (classes,)
    state = {name: 0.3 * torch.randn(shape, generator=normal) for name, shape in shapes.items()}
    norms = [f"bert.encoder.layer.{layer}.{part}" for layer in range(LAYERS) for part in ("attention.output", "output")]
    for norm in ["bert.embeddings", *norms]:
        state[f"{norm}.LayerNorm.weight"] = 1 + 0.1 * torch.randn(HIDDEN, generator=normal)
        state[f"{norm}.LayerNorm.bias"] = 0.1 * torch.randn(HIDDEN, generator=normal)
    return state


def write_weights(folder: Path, state: State, *, prefix: str = "module.", **options: Any) -> Path:
    path = folder / "chexbert.pth"
    saved = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    # The published file is that of a training run: an optimiser's state and an epoch lie beside the weights.
    optimiser = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"betas": (0.9, 0.999)}]}
    contents = {"epoch": 8, "model_state_dict": saved, "optimizer_state_dict": optimiser}
    torch.save(contents, path, **options)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path, published_layout())


def classes_by_hand(state: State, text: str) -> list[int]:
    """One text at a time, without padding, cut into pieces by hand."""
    words = text.lower().replace("é", "e").replace(".", " . ").replace(",", " , ").split()
    pieces = [piece for word in words for piece in {"effusions": ["effusion", "##s"]}.get(word, [word])]
    ids = [WORDS.index(piece) if piece in WORDS else 1 for piece in pieces]
    bert = BertModel(BertConfig(**chexbert.BERT_BASE))
    bert.load_state_dict({name.removeprefix("bert."): state[name] for name in state if name.startswith("bert.")})
    with torch.inference_mode():
        first = bert.eval()(input_ids=torch.tensor([[2, *ids[: POSITIONS - 2], 3]])).last_hidden_state[0, 0]
    scores = (state[f"linear_heads.{i}.weight"] @ first + state[f"linear_heads.{i}.bias"] for i in range(14))
    return [int(score.argmax()) for score in scores]


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_labeller_computes_what_bert_and_its_heads_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    # Batches of two: short and long texts are padded together, and come back in their own order.
    monkeypatch.setattr(chexbert, "_BATCH_SIZE", 2)
    state = published_layout()
    classes = read_classes(TEXTS, weights=write_weights(tmp_path, state, prefix=prefix), device="cpu")
    expected = [classes_by_hand(state, text) for text in TEXTS]
    assert classes.tolist() == expected
    assert len({tuple(row) for row in expected}) == len(TEXTS)  # else the order would not show


def test_a_file_of_torch_before_1_6_is_read(tmp_path: Path, weights: Path) -> None:
    """The published file is of 2020."""
    expected = read_classes(TEXTS, weights=weights, device="cpu")
    old = write_weights(tmp_path, published_layout(), _use_new_zipfile_serialization=False)
    assert old.read_bytes()[:2] != b"PK"
    assert (read_classes(TEXTS, weights=old, device="cpu") == expected).all()


def test_the_heads_are_in_the_published_order() -> None:
    """Write it down again: nothing in the weights says which head is which."""
    assert sorted(CONDITIONS) == sorted(LABELS)
    assert ", ".join(CONDITIONS) == (
        "Enlarged Cardiomediastinum, Cardiomegaly, Lung Opacity, Lung Lesion, Edema, Consolidation, Pneumonia, "
        "Atelectasis, Pneumothorax, Pleural Effusion, Pleural Other, Fracture, Support Devices, No Finding"
    )
    assert set(COMPETITION) == {CONDITIONS[index] for index in (1, 4, 5, 7, 9)}


@pytest.fixture
def labelled(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Any], dict[str, Estimate]]:
    """Score classes as if the labeller had read them."""

    def score(truth: Any, said: Any) -> dict[str, Estimate]:
        monkeypatch.setattr(chexbert, "read_classes", lambda *_, **__: np.concatenate([truth, said]))
        scores = chexbert_f1(["r"] * len(truth), ["p"] * len(said), weights=weights, device="cpu")
        assert isinstance(scores, dict)
        return {name: sums.estimate() for name, sums in scores.items()}

    return score


def test_f1_of_a_worked_example(labelled: Callable[[Any, Any], dict[str, Estimate]]) -> None:
    edema, fracture = CONDITIONS.index("Edema"), CONDITIONS.index("Fracture")
    truth, said = np.zeros((3, 14), dtype=int), np.zeros((3, 14), dtype=int)
    truth[:, edema], said[:, edema] = (1, 3, 2), (1, 1, 0)
    truth[:, fracture], said[:, fracture] = (0, 0, 1), (0, 1, 3)
    scores = {name: estimate.value for name, estimate in labelled(truth, said).items()}
    # Negative: Edema tp 1, fp 1; Fracture fp 1, fn 1. Positive: Edema tp 2; Fracture tp 1, fp 1.
    assert scores == {
        "micro-14 uncertain negative": pytest.approx(2 / 5),
        "macro-14 uncertain negative": pytest.approx((2 / 3 + 0) / 14),
        "micro-5 uncertain negative": pytest.approx(2 / 3),
        "macro-5 uncertain negative": pytest.approx((2 / 3) / 5),
        "micro-14 uncertain positive": pytest.approx(6 / 7),
        "macro-14 uncertain positive": pytest.approx((1 + 2 / 3) / 14),
        "micro-5 uncertain positive": pytest.approx(1),
        "macro-5 uncertain positive": pytest.approx(1 / 5),
    }


def test_no_positive_anywhere_is_0_as_in_the_reference_evaluation(
    labelled: Callable[[Any, Any], dict[str, Estimate]],
) -> None:
    for estimate in labelled(np.zeros((2, 14), dtype=int), np.full((2, 14), 2)).values():
        assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)


def test_references_and_predictions_are_read_and_compared(weights: Path) -> None:
    same, other = (
        chexbert_f1(TEXTS, texts, weights=weights, device="cpu")["micro-14 uncertain positive"].estimate()
        for texts in (TEXTS, TEXTS[::-1])
    )
    assert same.value == 1
    assert 0 < other.value < 1
    assert same.count == len(TEXTS)


def without(name: str) -> Callable[[State], Any]:
    return lambda state: state.pop(name)


def replaced(name: str, tensor: torch.Tensor) -> Callable[[State], Any]:
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("linear_heads.13.bias"), r"got Missing .*linear_heads\.13\.bias.* · expected the \d+ tensors"),
        (without("bert.encoder.layer.1.output.LayerNorm.weight"), r"got Missing .*layer\.1\.output\.LayerNorm"),
        (without("bert.embeddings.word_embeddings.weight"), r"got Missing .*word_embeddings\.weight"),
        (replaced("linear_heads.14.weight", torch.zeros(4, HIDDEN)), r"got Unexpected .*linear_heads\.14\.weight"),
        (replaced("linear_heads.13.weight", torch.zeros(4, HIDDEN)), r"got size mismatch for linear_heads\.13\.weight"),
        (replaced("linear_heads.0.bias", torch.zeros(4, dtype=torch.int64)), r"got linear_heads\.0\.bias, which does"),
        (replaced("linear_heads.0.bias", torch.full((4,), torch.nan)), "not hold finite numbers"),
        (replaced("bert.embeddings.word_embeddings.weight", torch.zeros(18, 32)), r"got size mismatch for bert\.emb"),
        (dict.clear, r"got Missing .* of CheXbert's labeller"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, change: Callable[[State], Any], message: str) -> None:
    state = published_layout()
    change(state)
    path = write_weights(tmp_path, state)
    with pytest.raises(CheckpointError, match=message):
        chexbert_f1(["a"], ["b"], weights=path, device="cpu")


def test_a_prefix_that_only_some_names_have_is_not_taken_off(tmp_path: Path) -> None:
    state = published_layout()
    state["module.linear_heads.0.bias"] = state.pop("linear_heads.0.bias")
    with pytest.raises(CheckpointError, match=r"got Missing .*linear_heads\.0\.bias"):
        read_classes(["a"], weights=write_weights(tmp_path, state, prefix=""), device="cpu")


class Runs:
    """Asks to be rebuilt by running something."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path, weights: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"model_state_dict": published_layout(), "epoch": Runs(ran)}, weights)
    with pytest.raises(CheckpointError, match="nothing that would have to be run"):
        chexbert_f1(["a"], ["b"], weights=weights, device="cpu")
    weights.write_bytes(pickle.dumps(Runs(ran), protocol=2))
    with pytest.raises(CheckpointError, match="nothing that would have to be run"):
        chexbert_f1(["a"], ["b"], weights=weights, device="cpu")
    assert not ran.exists()


@pytest.mark.parametrize(
    "contents",
    [{}, {"model_state_dict": 3}, {"model_state_dict": {3: torch.zeros(1)}}, [1], torch.zeros(3), 0, 7, 3000, -100],
    ids=str,
)
def test_a_file_of_another_layout_or_cut_somewhere_is_refused(weights: Path, contents: Any) -> None:
    if isinstance(contents, int):
        weights.write_bytes(weights.read_bytes()[:contents])
    else:
        torch.save(contents, weights)
    with pytest.raises(CheckpointError, match="cannot be read as CheXbert's .* tensors under model_state_dict"):
        read_classes(["a"], weights=weights, device="cpu")


def test_files_that_are_not_there_are_named_with_what_to_do(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pth: got no such file .* check the path"):
        chexbert_f1(["a"], ["b"], weights=tmp_path / "none.pth", device="cpu")
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(
        CheckpointError, match=r"vocab\.txt: got no such file .* put vocab\.txt of the model bert-base-unc"
    ):
        chexbert_f1(["a"], ["b"], weights=weights, device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n".join([*WORDS, "more"]), r"got 19 word pieces · expected the 18 "),
        ("\n".join(word.replace("[SEP]", "sep") for word in WORDS), r"\[SEP\].* among them"),
        (b"\xff" * 9, "cannot be read"),
    ],
)
def test_a_vocabulary_of_another_model_is_refused(weights: Path, content: str | bytes, message: str) -> None:
    vocabulary = weights.with_name("vocab.txt")
    vocabulary.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=message):
        read_classes(["a"], weights=weights, device="cpu")


def test_no_such_device_is_said(weights: Path) -> None:
    with pytest.raises(BackendUnavailable, match="got device 'tpu'"):
        chexbert_f1(["a"], ["b"], weights=weights, device="tpu")


def test_without_weights_or_packages_the_figure_is_missing_and_says_how_to_get_it(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = chexbert_f1(["a"], ["b"], weights=None, device="cpu")
    assert isinstance(missing, Missing)
    assert missing.why == "no weights"
    assert "--chexbert FILE" in missing.todo
    monkeypatch.setitem(sys.modules, "transformers", None)
    missing = chexbert_f1(["a"], ["b"], weights=weights, device="cpu")
    assert isinstance(missing, Missing)
    assert missing.why == "not installed"
    assert "llava-rad-lite[torch,bench]" in missing.todo
