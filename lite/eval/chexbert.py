"""CheXbert F1: the labels that CheXbert reads from two texts, compared as LLaVA-Rad's evaluation compares them.

Over all 14 conditions and over the five of CheXpert's competition; blank and negated count as negative, uncertain as
negative or as positive. Published values of that evaluation (`llava/eval/rrg_eval`) are medians over resamples; here
the value is that of the studies themselves. The labeller opens local files only.

Source: Smit et al. 2020, https://arxiv.org/abs/2004.09167
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from lite.errors import CheckpointError
from lite.eval.figures import Floats, Missing, Sums, check_paired, f1
from lite.eval.labels import Label

if TYPE_CHECKING:
    import torch
    from tokenizers import BertWordPieceTokenizer
    from torch import Tensor
    from transformers import BertModel

CONDITIONS: Final[tuple[Label, ...]] = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
"""What CheXbert's heads are about, in their order."""

COMPETITION: Final[tuple[Label, ...]] = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
"""The five conditions of CheXpert's competition."""

BERT_BASE: Final[dict[str, Any]] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
"""The sizes of bert-base-uncased, which CheXbert has been made from."""

VOCABULARY_NAME: Final = "vocab.txt"
# A head's classes are blank, positive, negative, uncertain; No Finding has the first two.
_POSITIVE: Final = 1
_UNCERTAIN: Final = 3
_BATCH_SIZE: Final = 32
_SPECIAL_TOKENS: Final = frozenset({"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"})


def check_chexbert_files(weights: Path) -> None:
    """Require CheXbert's weights and the vocabulary beside them, without opening them.

    Raises:
        CheckpointError: one is not there.
    """
    if not weights.is_file():
        msg = f"{weights}: got no such file · expected CheXbert's weights, chexbert.pth · check the path"
        raise CheckpointError(msg)
    vocabulary = weights.with_name(VOCABULARY_NAME)
    if not vocabulary.is_file():
        msg = (
            f"{vocabulary}: got no such file · expected the vocabulary of BERT uncased beside CheXbert's weights · put "
            "vocab.txt of the model bert-base-uncased there"
        )
        raise CheckpointError(msg)


def chexbert_f1(
    references: Sequence[str], predictions: Sequence[str], *, weights: Path | None, device: str
) -> dict[str, Sums] | Missing:
    """Compare the labels that CheXbert reads from the references with those it reads from the predictions.

    As in the reference evaluation, a condition that neither side has counts 0 in a macro average, and so does a micro
    F1 without any positive: unlike `lite.eval.metrics.label_f1`, which leaves out what cannot be measured.

    Args:
        weights: the published file (the state of a DataParallel labeller, under "model_state_dict"), with the
            vocab.txt of bert-base-uncased beside it.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        F1 by "micro-14 uncertain negative" and so on: micro or macro, 14 or 5 conditions, uncertain as negative or as
        positive. Or why it is missing: no weights were given, or a package is not installed.

    Raises:
        CheckpointError: weights or vocabulary are not there, damaged, unsafe to read, or of another model.
        BackendUnavailable: there is no such device.
    """
    check_paired(references, predictions)
    if weights is None:
        todo = "Give CheXbert's weights: --chexbert FILE, with vocab.txt of bert-base-uncased in the same folder."
        return Missing(why="no weights", todo=todo)
    check_chexbert_files(weights)
    try:
        import tokenizers  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        todo = f'CheXbert needs torch and transformers ({error}): pip install "llava-rad-lite[torch,bench]".'
        return Missing(why="not installed", todo=todo)
    classes = read_classes([*references, *predictions], weights=weights, device=device)
    truth, drafted = np.split(classes, 2)

    def sums_of(average: str, conditions: Sequence[Label], uncertain: str) -> Sums:
        columns = [CONDITIONS.index(condition) for condition in conditions]
        positive = (_POSITIVE, _UNCERTAIN) if uncertain == "positive" else (_POSITIVE,)
        there, said = (np.isin(side[:, columns], positive) for side in (truth, drafted))
        counts = np.stack([there & said, ~there & said, there & ~said], axis=-1).astype(np.float64)
        return Sums(per_study=counts.reshape(len(references), -1), statistic=_AVERAGES[average])

    return {
        f"{average}-{len(conditions)} uncertain {uncertain}": sums_of(average, conditions, uncertain)
        for uncertain, conditions, average in product(("negative", "positive"), (CONDITIONS, COMPETITION), _AVERAGES)
    }


def _micro_f1(sums: Floats) -> Floats:
    return np.nan_to_num(f1(sums.reshape(len(sums), -1, 3).sum(axis=1)))


def _macro_f1(sums: Floats) -> Floats:
    macro: Floats = np.nan_to_num(f1(sums.reshape(len(sums), -1, 3))).mean(axis=1)
    return macro


_AVERAGES: Final = {"micro": _micro_f1, "macro": _macro_f1}


def read_classes(texts: Sequence[str], *, weights: Path, device: str) -> NDArray[np.int64]:
    """Let CheXbert read reports.

    Args:
        texts: the reports; what is longer than BERT's context (512 tokens) is cut.
        weights: as in `chexbert_f1`.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        [texts, 14], in the order of `CONDITIONS`: 0 blank, 1 positive, 2 negative, 3 uncertain.

    Raises:
        CheckpointError: weights or vocabulary are damaged, unsafe to read, or of another model.
        BackendUnavailable: there is no such device.
    """
    import torch

    from lite.engines.machine import check_device

    chosen = torch.device(check_device(device))
    bert, heads = _labeller(weights, chosen)
    tokenizer = _tokenizer(weights.with_name(VOCABULARY_NAME))
    # Texts of like lengths are padded together; the order is restored at the end.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    classes = np.empty((len(texts), len(CONDITIONS)), dtype=np.int64)
    for start in range(0, len(order), _BATCH_SIZE):
        batch = order[start : start + _BATCH_SIZE]
        encodings = tokenizer.encode_batch([" ".join(texts[index].split()) for index in batch])
        input_ids = torch.tensor([encoding.ids for encoding in encodings], device=chosen)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], device=chosen)
        with torch.inference_mode():
            hidden = bert(input_ids=input_ids, attention_mask=mask).last_hidden_state[:, 0]
            chosen_classes = [head(hidden).argmax(dim=1) for head in heads]
        classes[batch] = torch.stack(chosen_classes, dim=1).cpu().numpy()
    return classes


def _labeller(weights: Path, device: torch.device) -> tuple[BertModel, torch.nn.ModuleList]:
    """Build BERT and the heads, and require the file to hold all of their tensors and nothing else."""
    import torch
    from transformers import BertConfig, BertModel

    state = _read_state(weights)
    classes = [2 if condition == "No Finding" else 4 for condition in CONDITIONS]
    heads = torch.nn.ModuleList(torch.nn.Linear(BERT_BASE["hidden_size"], count) for count in classes)
    bert = BertModel(BertConfig(**BERT_BASE))
    labeller = torch.nn.ModuleDict({"bert": bert, "linear_heads": heads})
    try:
        labeller.load_state_dict(state)
        wrong = [name for name, tensor in state.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]
        reason = f"{wrong[0]}, which does not hold finite numbers" if wrong else ""
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())[:300]
    if reason:
        msg = (
            f"{weights}: got {reason} · expected the {len(labeller.state_dict())} tensors of CheXbert's labeller · "
            "check that it is the published chexbert.pth, and whole"
        )
        raise CheckpointError(msg)
    labeller.to(device).train(mode=False)
    return bert, heads


def _read_state(weights: Path) -> dict[str, Tensor]:
    """Read the labeller's tensors, without the prefix that DataParallel gives to all of them."""
    import torch

    try:
        saved = torch.load(weights, map_location="cpu", weights_only=True)
        state = dict(saved.get("model_state_dict"))
        prefix = "module." if all(name.startswith("module.") for name in state) else ""
    except Exception as error:  # torch raises nearly anything on a file that is damaged or none of its own
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        msg = (
            f"{weights}: got a file that cannot be read as CheXbert's ({reason}) · expected tensors under "
            "model_state_dict, and nothing that would have to be run · fetch the published chexbert.pth again"
        )
        raise CheckpointError(msg) from error
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _tokenizer(path: Path) -> BertWordPieceTokenizer:
    """Read a list of word pieces, a line each, and require as many as BERT has embeddings."""
    from tokenizers import BertWordPieceTokenizer

    try:
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: got a file that cannot be read ({error}) · expected a list of word pieces · fetch it again"
        raise CheckpointError(msg) from error
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    if len(vocabulary) != BERT_BASE["vocab_size"] or not vocabulary.keys() >= _SPECIAL_TOKENS:
        msg = (
            f"{path}: got {len(vocabulary)} word pieces · expected the {BERT_BASE['vocab_size']} that the weights are "
            f"for, {', '.join(sorted(_SPECIAL_TOKENS))} among them · put vocab.txt of bert-base-uncased there"
        )
        raise CheckpointError(msg)
    tokenizer = BertWordPieceTokenizer(vocabulary, lowercase=True)
    tokenizer.enable_truncation(BERT_BASE["max_position_embeddings"])
    tokenizer.enable_padding()
    return tokenizer
