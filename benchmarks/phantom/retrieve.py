"""Give the phantom its towers for retrieval: a small BERT, and of the film's tower the last block, norm and head.

    film ─tower, frozen─▶ [B, 1 + P, D] ─last block─▶ norm ─▶ CLS ─head─▶ ┐
    text ─────────────────────BERT───────────────────────────▶ CLS ─MLP─▶ ┴▶ like and unlike, both ways

Both learn from films that the phantom was not grown on: by reports, where studies with the same findings are alike, and
by short descriptions (`benchmarks.phantom.queries`), which many films of a batch answer. What findings are drafted by
stays as it is to the bit. The BERT is transformers', and the block torch's own attention: so the parity at export
compares two implementations. What is added to the checkpoint is stored in float16.
"""

from __future__ import annotations

import dataclasses
import json
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import BertConfig, BertModel, Dinov2Model

from benchmarks.phantom.dataset import draw_films
from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.layout import write_json
from benchmarks.phantom.loop import Plan, Training
from benchmarks.phantom.network import TOWER_BLOCKS, TOWER_WIDTH, dinov2_config, load_trunk, run_blocks
from benchmarks.phantom.publish import NAME
from benchmarks.phantom.queries import answers, describe, draw_query
from benchmarks.phantom.report import write_findings
from lite.config import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from lite.files import whole_file, write_whole

EMBED_DIM: Final = 128
BERT_FOLDER: Final = "biomedbert"
TOWER_FILE: Final = "biomedclipcxr_112_checkpoint.pt"
PREFIX: Final = "module."
_BERT: Final[dict[str, Any]] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
# The rest of an uncased BERT's config.json, as published.
_BERT_JSON: Final = {
    "architectures": ["BertForMaskedLM"], "model_type": "bert", "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
    "pad_token_id": 0, "type_vocab_size": 2,
}  # fmt: skip
_SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MAX_SCALE: Final = 100.0
_SEEN: Final = 100
_TOGETHER: Final = 24
_LAST: Final = TOWER_BLOCKS - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalPlan(Plan):
    """Everything that decides the towers. Seed 0 would draw the films that the phantom itself was grown on."""

    seed: int = 2
    films: int = 10_000
    batch_size: int = 96
    queries: int = 64  # descriptions in a batch
    steps: int = 1000
    learning_rate: float = 1.5e-3
    warm_up_steps: int = 20
    weight_decay: float = 0.05
    lora_rank: int = 0  # none of them


class LastBlock(nn.Module):
    """The block that findings never run, for CLS alone, the norm behind it, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(TOWER_WIDTH, eps=1e-6) for _ in range(3))
        self.attention = nn.MultiheadAttention(TOWER_WIDTH, TOWER_WIDTH // 64, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(TOWER_WIDTH, 4 * TOWER_WIDTH), nn.Linear(4 * TOWER_WIDTH, TOWER_WIDTH)
        self.ls1, self.ls2 = (nn.Parameter(torch.full((TOWER_WIDTH,), 0.5)) for _ in range(2))
        self.head = nn.Linear(TOWER_WIDTH, EMBED_DIM, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Embed films: hidden states [B, 1 + P, D] of the block before → [B, EMBED_DIM]."""
        normed = self.norm1(hidden)
        attended, _ = self.attention(normed[:, :1], normed, normed, need_weights=False)
        x = hidden[:, 0] + self.ls1 * attended[:, 0]
        x = x + self.ls2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))
        embedded: Tensor = self.head(self.norm(x))
        return embedded

    def published(self) -> dict[str, Tensor]:
        """Return it under the published names."""
        block = f"visual.trunk.blocks.{_LAST}"
        modules = {
            f"{block}.norm1": self.norm1, f"{block}.norm2": self.norm2, "visual.trunk.norm": self.norm,
            f"{block}.attn.proj": self.attention.out_proj, f"{block}.mlp.fc1": self.fc1, f"{block}.mlp.fc2": self.fc2,
            "visual.head.proj": self.head,
        }  # fmt: skip
        named = {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
        qkv = {"weight": self.attention.in_proj_weight, "bias": self.attention.in_proj_bias}
        named |= {f"{block}.attn.qkv.{kind}": tensor for kind, tensor in qkv.items()}
        return named | {f"{block}.ls1.gamma": self.ls1, f"{block}.ls2.gamma": self.ls2}


class Towers(nn.Module):
    """Both, and the scale that their cosines are multiplied by."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.film = LastBlock()
        config = BertConfig(vocab_size=vocab_size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_BERT)
        self.bert = BertModel(config, add_pooling_layer=False)
        width = (_BERT["hidden_size"] + EMBED_DIM) // 2
        self.proj = nn.Sequential(
            nn.Linear(_BERT["hidden_size"], width, bias=False), nn.GELU(), nn.Linear(width, EMBED_DIM, bias=False)
        )
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def texts(self, ids: Tensor) -> Tensor:
        """Embed texts: ids [B, T], 0 behind the end → [B, EMBED_DIM] of length 1."""
        hidden = self.bert(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        return F.normalize(self.proj(hidden[:, 0]), dim=-1)

    def published(self) -> dict[str, Tensor]:
        """Return all that learnt under the published names, `module.` left out."""
        named = self.film.published()
        named |= {f"text.transformer.{name}": tensor for name, tensor in self.bert.state_dict().items()}
        named |= {f"text.proj.{name}": tensor for name, tensor in self.proj.state_dict().items()}
        return {name: t.detach().half() for name, t in named.items()} | {"logit_scale": self.logit_scale.detach()}


def vocabulary(*, seed: int, studies: int = 4_000) -> list[str]:
    """Return the pieces of a small WordPiece: letters, digits and signs, alone and within words, and the words."""
    rng = np.random.default_rng([seed, 3])
    words: Counter[str] = Counter()
    for number in range(studies):
        study = sample_study(int(rng.integers(2**62)))
        text = f"{write_findings(study, rng).text} {describe(draw_query(study, rng))}" if number % 8 else "x-ray chest"
        words.update("".join(c if c.isalnum() else " " for c in text.lower()).split())
    alone = [*string.punctuation, *string.digits, *string.ascii_lowercase]
    within = [f"##{c}" for c in (*string.digits, *string.ascii_lowercase)]
    return [*_SPECIAL, *alone, *within, *sorted(word for word in words if len(word) > 1)]


class RetrievalTraining(Training):
    """One stage, of reports and descriptions together."""

    plan: RetrievalPlan
    network: Towers

    def __init__(self, plan: RetrievalPlan, work: Path, checkpoint: dict[str, Any]) -> None:
        torch.manual_seed(plan.seed)
        self.pieces = vocabulary(seed=plan.seed)
        self.tokenizer = BertWordPieceTokenizer({piece: i for i, piece in enumerate(self.pieces)}, lowercase=True)
        films = draw_films(work / "films", count=plan.films, seed=plan.seed)
        self.studies = [sample_study(int(seed)) for seed in films.seeds]
        self.answers = [answers(study) for study in self.studies]
        self.hidden = _hidden_states(checkpoint, films.pixels, work / "hidden.npy")
        super().__init__(plan, Towers(len(self.pieces)), stages={"find": plan.steps}, state=work / "state.pt")

    def _parts(self) -> Iterator[tuple[Iterator[nn.Parameter], float]]:
        yield self.network.parameters(), 1.0

    def _embed(self, texts: list[str]) -> Tensor:
        """Embed texts, those of like length together: padding costs as much as words."""
        ids = [torch.tensor(encoding.ids) for encoding in self.tokenizer.encode_batch(texts)]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        parts = [
            [ids[number] for number in order[start : start + _TOGETHER]] for start in range(0, len(ids), _TOGETHER)
        ]
        rows = torch.cat([self.network.texts(pad_sequence(part, batch_first=True)) for part in parts])
        return rows[torch.tensor(order).argsort()]

    def _loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        epoch, place = divmod(step, len(self.studies) // self.plan.batch_size)
        order = np.random.default_rng([self.plan.seed, epoch]).permutation(len(self.studies))
        rows = order[place * self.plan.batch_size : (place + 1) * self.plan.batch_size]
        rng = np.random.default_rng([self.plan.seed, epoch, place])
        studies, found = [self.studies[row] for row in rows], [self.answers[row] for row in rows]
        queries = [draw_query(studies[number], rng) for number in rng.integers(len(rows), size=self.plan.queries)]
        reports = self._embed([write_findings(study, rng).text for study in studies])
        asked = self._embed([describe(query) for query in queries])
        films = F.normalize(self.network.film(torch.from_numpy(self.hidden[rows]).float()), dim=-1)
        scale = self.network.logit_scale.exp().clamp(max=_MAX_SCALE)
        same = torch.tensor([[a == b for b in found] for a in found])
        answered = torch.tensor([[query in here for here in found] for query in queries])
        similarity = scale * reports @ films.T
        by_report = (_contrast(similarity, same) + _contrast(similarity.T, same)) / 2
        by_query = _contrast(scale * asked @ films.T, answered)
        shown = {"report": float(by_report.detach()), "query": float(by_query.detach()), "scale": float(scale.detach())}
        return by_report + by_query, shown


def _contrast(logits: Tensor, alike: Tensor) -> Tensor:
    """Return the cross entropy of each row against those that are alike, equally shared."""
    target = alike.float() / alike.sum(dim=1, keepdim=True)
    return F.cross_entropy(logits, target)


def _hidden_states(checkpoint: dict[str, Any], pixels: NDArray[np.uint8], kept: Path) -> NDArray[np.float16]:
    """Return what the frozen blocks make of each film, [N, 1 + P, D]; computed once."""
    if not kept.exists():
        tower = Dinov2Model(dinov2_config(TOWER_BLOCKS - 1))
        tower.eval()  # type: ignore[no-untyped-call]
        load_trunk(tower, checkpoint["state_dict"])
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        found = []
        for start in tqdm(range(0, len(pixels), _SEEN), desc="seeing films", unit_scale=_SEEN, unit="film"):
            levels = torch.from_numpy(pixels[start : start + _SEEN])[:, None].float() / 255
            with torch.inference_mode():
                found.append(run_blocks(tower, (levels - mean) / std).half().numpy())
        with whole_file(kept) as partial, partial.open("wb") as stream:
            np.save(stream, np.concatenate(found))
    states: NDArray[np.float16] = np.load(kept)
    return states


def train_retrieval(out: Path, *, plan: RetrievalPlan, work: Path) -> int:
    """Train the towers, and write them into a checkpoint that `benchmarks.phantom train` has written.

    Args:
        out: that folder, with `llava-rad-phantom/` in it. Of its files the tower's checkpoint is replaced, by one whose
            other tensors are the same; its BERT's `vocab.txt` and `config.json` are written beside it.
        plan: what to do.
        work: folder for films and state; a run that was interrupted continues from it.

    Returns:
        Bytes of what was added.

    Raises:
        LiteError: `work` holds films of another seed or number or a run of another plan.
    """
    work.mkdir(parents=True, exist_ok=True)
    file = out / NAME / TOWER_FILE
    checkpoint = _read(file)
    training = RetrievalTraining(plan, work, checkpoint)
    training.run()
    state, before = checkpoint["state_dict"], file.stat().st_size
    dropped = (f"{PREFIX}text.", f"{PREFIX}visual.head.", f"{PREFIX}visual.trunk.blocks.{_LAST}.")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(dropped)}
    learnt = {f"{PREFIX}{name}": tensor.contiguous().clone() for name, tensor in training.network.published().items()}
    with whole_file(file) as partial:
        torch.save({**checkpoint, "state_dict": kept | learnt}, partial)
    folder = out / BERT_FOLDER
    folder.mkdir(exist_ok=True)
    write_whole(folder / "vocab.txt", "".join(f"{piece}\n" for piece in training.pieces))
    write_json(folder / "config.json", {**_BERT_JSON, **_BERT, "vocab_size": len(training.pieces)})
    described = file.with_name("biomedclipcxr_112.json")
    write_json(described, json.loads(described.read_text(encoding="utf-8")) | {"embed_dim": EMBED_DIM})
    write_json(out / "retrieval.json", dataclasses.asdict(plan))
    return file.stat().st_size - before


def _read(file: Path) -> dict[str, Any]:
    """Read a checkpoint of our own: beside tensors there are NumPy's numbers in it."""
    scalar: Any = np.float64(0).__reduce__()[0]
    numbers: list[Any] = [scalar, np.dtype, *(type(np.dtype(name)) for name in ("float32", "float64"))]
    with torch.serialization.safe_globals(numbers):
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return content
