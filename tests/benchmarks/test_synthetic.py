"""The random checkpoint of any depth: that the exporter takes it, what it holds, and that it exists whole or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import sentencepiece
import torch
from random_checkpoint import SMALL, load

from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.report import write_findings
from benchmarks.phantom.tokenizer import VOCAB_SIZE
from benchmarks.speed import synthetic
from benchmarks.speed.synthetic import main, write_checkpoint
from benchmarks.speed.tokenizer import make_tokenizer
from export.source import forward
from export.source.checkpoint import Checkpoint, open_checkpoint
from export.source.shapes import adapter_shapes, base_shapes
from lite.config import DecodingDefaults, PromptTemplate
from lite.errors import LiteError
from lite.prompt import PromptEncoder, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = 6
FIRST_WORD_ID = 259


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of small widths, with studies. Read only."""
    out = tmp_path_factory.mktemp("synthetic") / "out"
    total = write_checkpoint(out, layers=LAYERS, studies=2, shapes=SMALL)
    assert total == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return out


@pytest.fixture(scope="module")
def opened(written: Path) -> Checkpoint:
    return open_checkpoint(written / "llava-rad-synthetic", written / "base")


def base_tensors(out: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in sorted((out / "base").glob("*.bin")):
        tensors |= load(shard)
    return tensors


def test_the_exporter_finds_the_published_layout(written: Path, opened: Checkpoint) -> None:
    assert {path.name for path in written.iterdir()} == {"llava-rad-synthetic", "base", "studies"}
    assert len(json.loads((written / "studies/studies.json").read_text())) == 2
    assert {path.name for path in (written / "llava-rad-synthetic").iterdir()} == {
        "config.json",
        "adapter_config.json",
        "adapter_model.bin",
        "non_lora_trainables.bin",
        "biomedclipcxr_42.json",
        "biomedclipcxr_42_checkpoint.pt",
        "NOTICE",
    }
    assert (opened.decoder.num_hidden_layers, opened.tower.num_blocks, opened.tower.image_size) == (LAYERS, 2, 42)
    assert opened.adapter.config.scale("model.layers.0.mlp.up_proj") == 2.0
    assert opened.notice is not None
    assert "random weights" in opened.notice
    stored = {
        entry.dtype
        for files in (opened.base, opened.adapter.factors, opened.projector)
        for entry in files.entries.values()
    }
    assert stored == {"float16"}
    assert {entry.dtype for entry in opened.trunk.entries.values()} == {"float32"}
    features = forward.image_features(opened.read_tower(), opened.tower, torch.randn(2, 3, 42, 42))
    assert features.shape == (2, 9, SMALL.hidden_size)
    assert 0.3 < float(features.square().mean().sqrt()) < 5


def test_names_and_shapes_are_those_the_exporter_expects(opened: Checkpoint) -> None:
    assert SMALL.tensors(LAYERS) == base_shapes(opened.decoder)
    assert SMALL.lora(LAYERS) == adapter_shapes(opened.decoder, opened.adapter.config)


def test_shards_are_filled_in_order_and_stay_small(written: Path) -> None:
    index = json.loads((written / "base/pytorch_model.bin.index.json").read_text())
    shards = {path.name: load(path) for path in sorted((written / "base").glob("*.bin"))}
    assert [*shards] == [f"pytorch_model-{number:05d}-of-00005.bin" for number in range(1, 6)]
    stored = {name: shard for shard, tensors in shards.items() for name in tensors}
    assert list(stored.items()) == list(index["weight_map"].items())
    assert list(stored) == list(SMALL.tensors(LAYERS))
    assert max(map(len, shards.values())) == synthetic.SHARD_TENSORS
    tensors = [tensor for shard in shards.values() for tensor in shard.values()]
    assert sum(tensor.nbytes for tensor in tensors) == index["metadata"]["total_size"]
    # Some layer lies in two shards, as one of the published base does.
    assert len({shard for name, shard in stored.items() if name.startswith("model.layers.1.")}) == 2


def test_hidden_states_and_logits_are_sane(opened: Checkpoint) -> None:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(FIRST_WORD_ID, SMALL.vocab_size, (48,), generator=generator)
    hidden = opened.read_base("model.embed_tokens.weight")[input_ids].float()
    sizes = []
    for index in range(LAYERS):
        layer = opened.read_layer(index)
        hidden = forward.decoder_layer(opened.decoder, layer.weights, forward.source_linear(layer), hidden)
        sizes.append(float(hidden.square().mean().sqrt()))
    # Each layer adds its share: hidden states grow, and no faster than a sum of independent parts.
    assert sizes == sorted(sizes)
    assert 1 < sizes[0] < sizes[-1] < 6 * LAYERS**0.5
    final = forward.rms_norm(hidden, opened.read_base("model.norm.weight"), opened.decoder.rms_norm_eps)
    logits = final @ opened.read_base("lm_head.weight").float().T
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert 1.0 < float(entropy) < 0.9 * np.log(SMALL.vocab_size)
    top = logits.argmax(-1)
    assert len(top.unique()) > 24
    # Neither the end nor a byte: drafts have the length that was asked for and can be printed.
    assert int(top.min()) >= FIRST_WORD_ID


def test_the_adapter_is_a_noticeable_share_of_every_linear(opened: Checkpoint) -> None:
    layer = opened.read_layer(1)
    assert len(layer.lora) == 7
    for linear, pair in layer.lora.items():
        base = layer.weights[f"{linear}.weight"].float()
        update = pair.scale * pair.b.float() @ pair.a.float()
        assert float(update.norm() / base.norm()) == pytest.approx(synthetic.LORA_SHARE, rel=0.15), linear


def test_no_matrix_repeats_or_has_low_rank(written: Path) -> None:
    tensors = base_tensors(written)
    assert len({float(tensor.flatten()[:64].float().sum()) for tensor in tensors.values()}) == len(tensors)
    # A Gaussian matrix of this form has singular values down to (1 - sqrt(256 / 688)) of its scale.
    for layer in range(LAYERS):
        singular = torch.linalg.svdvals(tensors[f"model.layers.{layer}.mlp.gate_proj.weight"].float())
        assert float(singular[-1] / singular[0]) > 0.02


def test_it_is_written_again_byte_for_byte_and_shallow_is_the_start_of_deep(tmp_path: Path, written: Path) -> None:
    for name, layers in (("again", LAYERS), ("shallow", 2)):
        write_checkpoint(tmp_path / name, layers=layers, shapes=SMALL)
    for path in sorted((tmp_path / "again").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (written / path.relative_to(tmp_path / "again")).read_bytes(), path.name
    deep, shallow = base_tensors(written), base_tensors(tmp_path / "shallow")
    assert len(shallow) == 2 * 9 + 3
    assert all(torch.equal(tensor, deep[name]) for name, tensor in shallow.items())
    adapters = [load(out / "llava-rad-synthetic/adapter_model.bin") for out in (tmp_path / "shallow", written)]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


# -- The tokenizer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(make_tokenizer(32000))
    return file


def test_the_tokenizer_has_the_published_size_and_llamas_pieces(tokenizer_file: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    assert pieces.get_piece_size() == 32000
    assert [pieces.id_to_piece(index) for index in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (0, 1, 2, -1)
    assert [pieces.is_byte(index) for index in (2, 3, 258, 259)] == [False, True, True, False]
    assert len({pieces.id_to_piece(index) for index in range(32000)}) == 32000
    # What is not in the vocabulary is spelt in bytes, and white space stays as it is.
    for text in ("Größe  \n\n 3.4 cm → ✓", "  two"):
        assert pieces.decode(pieces.encode(text)) == text


def test_a_prompt_and_findings_take_a_sane_number_of_tokens(tokenizer_file: Path) -> None:
    tokenizer = Tokenizer(tokenizer_file, DecodingDefaults())
    encoder = PromptEncoder(tokenizer, PromptTemplate(), num_image_tokens=1369, max_seq_len=4096)
    # Vicuna's tokenizer needs some 55 for the same prompt.
    assert 40 < len(encoder.encode()) < 70
    rng = np.random.default_rng(0)
    texts = [write_findings(sample_study(1000 + index), rng).text for index in range(50)]
    tokens, words = sum(len(tokenizer.encode(text)) for text in texts), sum(len(text.split()) for text in texts)
    assert 1.0 < tokens / words < 1.4
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


def test_pseudo_words_leave_english_alone(tokenizer_file: Path) -> None:
    large = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    small = sentencepiece.SentencePieceProcessor(model_proto=make_tokenizer(VOCAB_SIZE))
    assert small.get_piece_size() == VOCAB_SIZE
    text = "A chat between a curious user and an assistant. Large left pneumothorax, measuring 3.4 cm."
    assert large.encode(text) == small.encode(text)
    # Each is one piece and reads as a word of its own: a draft of them has spaces.
    assert large.decode([31999, 31998]) == f"w{32000 - VOCAB_SIZE} w{31999 - VOCAB_SIZE}"


def test_a_vocabulary_without_room_for_what_was_learnt_is_refused() -> None:
    with pytest.raises(LiteError, match=r"got a vocabulary of 1000 · expected at least the 1024"):
        make_tokenizer(1000)


# -- Whole or not at all ---------------------------------------------------------------------------------------------


def test_a_write_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(LiteError, match=r"a\.bin: got a write that failed \(Parent directory .*\) · expected room"):
        synthetic._save({}, tmp_path / "nowhere" / "a.bin")


def test_an_interrupt_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(folder: Path, *_: object, **__: object) -> None:
        assert list(folder.rglob("*.json"))
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "Shapes", lambda: SMALL)
    monkeypatch.setattr(synthetic, "_write_decoder", interrupted)
    assert main([str(tmp_path / "out"), "--layers", "1"]) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith("interrupted")
    assert not list(tmp_path.iterdir())


# -- The command line ------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthetic, "Shapes", lambda: SMALL)
    out = tmp_path / "a folder" / "out"
    assert main([str(out), "--layers", "2", "--studies", "1"]) == 0
    printed = capsys.readouterr().out
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert f"{total:,} bytes: random weights in LLaVA-Rad's layout, 2 decoder layers of the published 32" in printed
    assert f"python -m export --checkpoint '{out}/llava-rad-synthetic' --base '{out}/base'" in printed
    assert f"--verify-data '{out}/studies/studies.json'" in printed
    assert main([str(out), "--layers", "2"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {out}: got a path that exists")
