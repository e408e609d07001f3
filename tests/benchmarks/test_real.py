"""What rounding loses on decoders that are not LLaVA-Rad's, on a tiny random Llama in a Hugging Face folder.

The decoder with trained weights is measured where the extra `real` and its package are installed: with --full.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_folder import write_llama
from safetensors.torch import save_file
from tiny import random_llama

from benchmarks.quality.command import INTEROP_PYTHON, main
from benchmarks.quality.real import command, prompts, texts
from benchmarks.quality.real.decoder import EMBEDDINGS, FINAL_NORM, HEAD, LlamaFolder, write_folder
from benchmarks.quality.real.experiments import asymmetric, eight_bits, low_rank, worst
from benchmarks.quality.real.measure import Judge, Judged, Row, States, kl_ratio, measure
from benchmarks.quality.real.peer import peers
from benchmarks.quality.real.rounding import Calibrated, Plain, Setup, Way
from benchmarks.quality.real.rows import DEFAULT, ways
from benchmarks.quality.real.smollm2 import GgufLlama, carried_file, halves_apart
from benchmarks.quality.real.table import format_table
from benchmarks.quality.recipes import TRICKS
from export.quantize.gptq import Grid, gptq, relative_error
from export.settings import GptqSettings
from lite.errors import BackendUnavailable, CheckpointError, LiteError
from lite.eval.divergence import StudyDivergence


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Path:
    """A random Llama with a tied head, in two shards. Read only."""
    return write_llama(tmp_path_factory.mktemp("real") / "llama", tokenizer_model, shards=2)


def through(decoder: LlamaFolder, ids: list[int]) -> torch.Tensor:
    """Logits by the judge's own path: [T - 1, V]."""
    judge = Judge(decoder, [tuple(ids)], "cpu")
    return judge._logits(judge._hidden[0])


def judged(row: Row) -> Judged:
    assert row.judged is not None, row
    return row.judged


# -- Decoders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_computes_what_transformers_does(tmp_path: Path, tokenizer_model: bytes, tied: bool) -> None:
    from transformers import LlamaForCausalLM

    folder = write_llama(tmp_path, tokenizer_model, shards=2, tie_word_embeddings=tied)
    decoder = LlamaFolder(folder)
    ids = [*decoder.prefix, *decoder.encode("The heart size is normal.")]
    assert ids[0] == 1
    assert len(ids) > 5
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0, :-1]
    torch.testing.assert_close(through(decoder, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_written_folder_is_the_decoder(tmp_path: Path, llama: Path) -> None:
    decoder = LlamaFolder(llama)
    write_folder(decoder, tmp_path)
    again = LlamaFolder(tmp_path)
    assert again.config == dataclasses.replace(decoder.config, dtype="float32")
    assert again.prefix == decoder.prefix
    assert again.encode("No pneumothorax.") == decoder.encode("No pneumothorax.")
    for name in (EMBEDDINGS, FINAL_NORM, HEAD):
        assert torch.equal(again.read(name), decoder.read(name))
    ours, theirs = again.read_layer(1), decoder.read_layer(1)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2"}, "model_type='qwen2'.*expected 'llama'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*take the original"),
    ],
)
def test_what_is_no_plain_llama_is_refused(
    tmp_path: Path, tokenizer_model: bytes, changes: dict[str, Any], message: str
) -> None:
    folder = write_llama(tmp_path, tokenizer_model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        LlamaFolder(folder)


def test_biases_and_pickles_are_refused(tmp_path: Path, tokenizer_model: bytes) -> None:
    folder = write_llama(tmp_path, tokenizer_model)
    weights = random_llama(json.loads((folder / "config.json").read_text()))
    biased = weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    save_file(biased, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
        LlamaFolder(folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "model.bin")
    with pytest.raises(CheckpointError, match="got no model.safetensors.*pickles are not read"):
        LlamaFolder(folder)


def test_a_tokenizer_that_does_not_say_what_it_adds_is_refused(tmp_path: Path, tokenizer_model: bytes) -> None:
    folder = write_llama(tmp_path, tokenizer_model)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"got tokenizer\.model alone"):
        LlamaFolder(folder)


def test_interleaved_rows_are_put_apart() -> None:
    """What llama.cpp's converter does to q and k, as its formula says it, is undone."""
    weight = torch.randn(3 * 8, 5)
    stored = weight.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)
    assert not torch.equal(stored, weight)
    assert torch.equal(halves_apart(stored, 8), weight)


# -- Texts -------------------------------------------------------------------------------------------------------------


def test_texts_are_the_same_every_time_and_on_one_side_only() -> None:
    asked = {"prefix": (7,), "calibration": 24, "evaluation": 12, "length": 400}
    calibration, evaluation = texts.read_blocks(lambda text: list(text.encode()), **asked)
    assert (calibration, evaluation) == texts.read_blocks(lambda text: list(text.encode()), **asked)
    assert (len(calibration), len(evaluation)) == (24, 12)
    assert all(len(block) == 400 and block[0] == 7 for block in (*calibration, *evaluation))
    assert not set(calibration) & set(evaluation)
    sides = [[bytes(block[1:]).decode(errors="replace") for block in side] for side in (calibration, evaluation)]
    assert [sum("Indication:" in text for text in side) for side in sides] == [6, 3]
    documents = [*texts.documentation(), *texts.reports()]
    owners = [{next(i for i, d in enumerate(documents) if text in d) for text in side} for side in sides]
    assert not owners[0] & owners[1]
    assert texts.sha256_of_blocks(calibration) != texts.sha256_of_blocks(calibration[::-1])


def test_more_text_than_there_is_is_refused() -> None:
    with pytest.raises(LiteError, match="got .* blocks of 500 tokens to judge by .* expected 100000"):
        texts.read_blocks(lambda text: list(range(len(text))), prefix=(), calibration=1, evaluation=100_000, length=500)


# -- Ways to round -----------------------------------------------------------------------------------------------------


def test_every_trick_has_its_rows_and_no_two_rows_are_the_same() -> None:
    names = [way.name for way in ways(64, INTEROP_PYTHON)]
    assert names[0] == DEFAULT
    assert len(set(names)) == len(names)
    tricks = [trick.name for trick in TRICKS]
    assert len(tricks) > 2
    # Alone the first is the first of the cumulative ones; with the last the set is full, which is the default.
    assert set(names) >= {f"plus-{tricks[0]}", *(f"plus-{name}" for name in tricks[:-1])}
    assert set(names) >= {"plain", *(f"only-{name}" for name in tricks[1:])}
    assert not {"gptq-int4-g64", "full"} & set(names)
    assert set(names) >= {"rtn", "int8", "int8-rtn", "bnb-nf4", "q4_0", "gptq-int4-g32", "gptq-int4-g128", "gptqmodel"}


def test_rounding_is_judged_beside_the_float_decoder(llama: Path) -> None:
    decoder = LlamaFolder(llama)
    blocks = [tuple(decoder.encode(f"{text} " * 20)[:40]) for text in ("Mild cardiomegaly.", "The lungs are clear.")]
    known = {way.name: way for way in ways(32, INTEROP_PYTHON)}
    exact = Way(name="exact", make=lambda given: Plain(lambda weight: (weight, 32 * weight.numel()), given.device))
    chosen = [known[name] for name in (DEFAULT, "rtn", "int8")]
    rows = {row.name: judged(row) for row in measure([*chosen, exact], Judge(decoder, blocks, "cpu"), blocks)}
    default, rtn, int8, same = (rows[name] for name in (DEFAULT, "rtn", "int8", "exact"))
    assert (default.bits, rtn.bits, int8.bits, same.bits) == (4 + 20 / 32, 4 + 20 / 32, 8 + 24 / 32, 32)
    kl = {name: row.divergence.mean_kl.value for name, row in rows.items()}
    assert same.divergence.num_tokens == 2 * 39
    assert kl["exact"] < 1e-6 < kl["int8"] < kl[DEFAULT] / 5
    # Calibrated on the very text: of random weights, too, it has to help.
    assert kl[DEFAULT] < 0.8 * kl["rtn"]
    assert default.kl_ratio is None
    assert rtn.kl_ratio is not None
    assert rtn.kl_ratio.value == pytest.approx(kl["rtn"] / kl[DEFAULT])
    assert set(default.errors) > {"model.layers.1.mlp.down_proj"}
    assert (rtn.errors, len(default.errors)) == ({}, 14)


def test_prompts_are_judged_by_the_text_behind_them(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas of the exporter's graph; and a way that computes a prompt as the text has no loss of its own."""
    rng = np.random.default_rng(0)
    x, weight = (torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((5, 64), (7, 64)))
    steps, token = weight.abs().amax(1) / 127, x.abs().amax(1, keepdim=True) / 127
    rounded = ((x / token).round() @ (weight / steps[:, None]).round().T) * token * steps
    torch.testing.assert_close(prompts._int8(x, weight), rounded)
    of_groups = [prompts._int8(x[:, at : at + 32], torch.eye(32)) for at in (0, 32)]
    torch.testing.assert_close(prompts._stored(x, weight, 32), torch.cat(of_groups, dim=1) @ weight.T)
    monkeypatch.setattr(prompts, "PROMPT_TOKENS", 2)
    both = prompts._both(lambda x, _: x, lambda x, _: -x, x, weight)
    assert torch.equal(both, torch.cat((x[:2], -x[2:])))
    monkeypatch.setattr(prompts, "PROMPT_TOKENS", 24)
    decoder = LlamaFolder(llama)
    blocks = [tuple(decoder.encode(f"{text} " * 20)[:40]) for text in ("Mild cardiomegaly.", "The lungs are clear.")]
    judge = Judge(decoder, blocks, "cpu")
    states = prompts._read(judge, blocks, 32)
    apart = {name: judge.compare(each, 24, states["stored"]) for name, each in states.items()}
    kl = {name: float(np.mean([block.kl.mean() for block in blocks])) for name, blocks in apart.items()}
    assert kl["stored"] == 0 < min(kl["exact"], kl["int8"])
    assert max(kl["exact"], kl["int8"]) < 0.1
    assert all(len(block.kl) == 16 for block in apart["int8"]), "the text alone is judged"


def test_a_layer_is_calibrated_on_what_rounded_ones_before_it_make(tmp_path: Path, llama: Path) -> None:
    decoder = LlamaFolder(llama)
    blocks = [tuple(decoder.encode("Mild cardiomegaly. " * 20)[:40])]
    given: dict[str, Any] = {"decoder": decoder, "blocks": blocks, "folder": tmp_path, "device": "cpu"}
    rounding = ways(32, INTEROP_PYTHON)[0].make(Setup(**given, default_errors={}, advance=lambda *_: None))
    assert isinstance(rounding, Calibrated)
    states = States(decoder, blocks, "cpu")
    for index in range(2):
        layer = rounding.round(index, decoder.read_layer(index))
        states.through(layer.norms, layer.linears)
        torch.testing.assert_close(rounding._inputs.read(0), states.hidden[0], rtol=1e-4, atol=1e-4)


def test_a_ratio_of_means_is_drawn_for_both_at_once() -> None:
    def blocks(*kl: float) -> list[StudyDivergence]:
        zeros = np.zeros(2)
        return [
            StudyDivergence(kl=np.array([v, 3 * v]), same_top=zeros == 0, reference_nll=zeros, candidate_nll=zeros)
            for v in kl
        ]

    found = kl_ratio(blocks(2, 20, 200), blocks(1, 10, 100))
    assert (found.value, found.low, found.high, found.count) == (2, 2, 2, 6)


def hessian_of(weight: torch.Tensor) -> torch.Tensor:
    x = torch.randn(500, weight.shape[1], generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 8
    x = x @ (torch.eye(weight.shape[1]) + 0.3)
    return x.T @ x / len(x)


def test_asymmetric_groups_hold_what_symmetric_ones_cannot() -> None:
    generator = torch.Generator().manual_seed(0)
    # All of a group lies on 16 values of which none is negative.
    weight = torch.randint(0, 16, (8, 64), generator=generator) * 0.5
    weight[:, ::32], weight[:, 1::32] = 0, 7.5
    hessian, grid, options = hessian_of(weight), Grid(bits=4, group_size=32), GptqSettings(fold_scales=False, refine=0)
    ours = asymmetric(weight, hessian, grid, options, name="w")
    assert torch.equal(ours.dequantized(), weight)
    assert ours.bits == weight.numel() * (4 + 20 / 32)
    symmetric = gptq(weight, hessian, grid, options)
    assert relative_error(weight, symmetric.dequantized(), hessian) > 1e-3


def test_a_product_beside_takes_back_most_of_a_low_rank_error() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    hessian, grid, options = hessian_of(weight), Grid(bits=4, group_size=32), GptqSettings(refine=0)
    alone, ours = gptq(weight, hessian, grid, options), low_rank(weight, hessian, grid, options, name="w")
    errors = [relative_error(weight, made.dequantized(), hessian) for made in (alone, ours)]
    assert errors[1] < 0.75 * errors[0]
    assert ours.bits == weight.numel() * (4 + 20 / 32) + 16 * 8 * (48 + 64)
    assert torch.linalg.matrix_rank(ours.dequantized() - alone.dequantized(), atol=1e-4) == 8


def test_eight_bits_go_to_the_worst() -> None:
    assert worst({"a": 0.1, "b": 0.5, "c": 0.3, "d": 0.2}) == {"b", "c", "d"}
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    rounds = eight_bits(worst({"w": 0.1}).__contains__)
    hessian, grid = hessian_of(weight), Grid(bits=4, group_size=32)
    assert rounds(weight, hessian, grid, GptqSettings(), name="w").grid == Grid(bits=8, group_size=32)
    assert rounds(weight, hessian, grid, GptqSettings(), name="x").grid == grid


def test_the_peer_is_skipped_where_it_is_not_installed(tmp_path: Path, llama: Path) -> None:
    judge = Judge(LlamaFolder(llama), [tuple(range(20))], "cpu")
    rounded = ways(32, INTEROP_PYTHON)[1]
    assert rounded.name == "rtn"
    rows = list(measure([rounded, *peers(32, tmp_path / "python")], judge, []))
    assert [row.name for row in rows if row.skipped] == ["gptqmodel", "gptqmodel-mse"]
    assert "no environment with GPTQModel" in format_table(rows)
    assert "make interop" in format_table(rows)


@pytest.mark.full
def test_gptqmodels_own_pipeline_is_read_back(tmp_path: Path, tokenizer_model: bytes) -> None:
    if not INTEROP_PYTHON.is_file():
        pytest.skip("no environment with GPTQModel: make interop")
    folder = write_llama(tmp_path / "llama", tokenizer_model, hidden_size=128, head_dim=32, intermediate_size=256)
    decoder = LlamaFolder(folder)
    blocks = [tuple(decoder.encode("The heart size is normal. " * 30)[:128])] * 4
    chosen = [way for way in ways(32, INTEROP_PYTHON) if way.name in (DEFAULT, "gptqmodel", "rtn")]
    rows = list(measure(chosen, Judge(decoder, blocks, "cpu"), blocks))
    assert [row.error or row.skipped for row in rows] == [None] * 3
    by_name = {row.name: judged(row) for row in rows}
    peer, rtn = by_name["gptqmodel"], by_name["rtn"]
    assert peer.bits == 4 + 20 / 32
    assert 0 < peer.divergence.mean_kl.value < rtn.divergence.mean_kl.value


# -- The command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_rows_and_what_they_depend_on(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["real", "--model", str(llama), "--quick", "--blocks", "2", "--tokens", "512", "--device", "cpu"]
    # 64 inputs are no group of 128.
    rows = ["--only", "rtn", "gptq-int4-g128", "--group-size", "32", "--json"]
    assert main([*asked, *rows]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == [DEFAULT, "rtn", "gptq-int4-g128"]
    assert "got 64 inputs · expected whole groups of 128" in found["rows"][2]["skipped"]
    assert found["rows"][1]["judged"]["divergence"]["mean_kl"]["value"] > 0
    assert found["calibration"].startswith("2 blocks of 128 tokens, sha256 ")
    assert math.isfinite(found["rows"][1]["judged"]["kl_ratio"]["high"])


def test_an_interrupted_run_prints_what_it_has_measured(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any) -> Iterator[Row]:
        yield next(measure(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupted)
    asked = ["--quick", "--blocks", "2", "--tokens", "512", "--group-size", "32", "--device", "cpu"]
    assert main(["real", "--model", str(llama), *asked]) == 130
    printed = capsys.readouterr().out
    assert re.search(r"^\| default +\| 4\.62 ", printed, re.MULTILINE)
    assert "(interrupted)." in printed


def test_an_unknown_row_is_answered_with_those_there_are(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["real", "--model", str(llama), "--only", "gptq-int5"]) == 1
    assert "got --only gptq-int5 · expected some of default, rtn, plain" in capsys.readouterr().err


# -- The decoder with trained weights ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> GgufLlama:
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed: the extra real")
    try:
        return GgufLlama(carried_file())
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.full
def test_a_trained_decoder_speaks_english(smollm2: GgufLlama) -> None:
    """Rows of q and k in another order would cost it more than a factor of ten."""
    _, blocks = texts.read_blocks(smollm2.encode, prefix=smollm2.prefix, calibration=1, evaluation=4, length=256)
    assert 8 < Judge(smollm2, blocks, "cpu").perplexity < 30


@pytest.mark.full
def test_a_gguf_file_is_read_as_transformers_reads_it(smollm2: GgufLlama) -> None:
    from transformers import LlamaForCausalLM

    file = carried_file()
    theirs = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids = smollm2.encode("The heart is normal in size. The lungs are clear, and there is no pleural effusion.")
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0, :-1]
    judge = Judge(smollm2, [tuple(ids)], "cpu")
    torch.testing.assert_close(judge._logits(judge._hidden[0]), expected, rtol=1e-3, atol=1e-3)
