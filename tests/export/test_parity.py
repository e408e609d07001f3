"""Parity: what it computes film by film and layer by layer is that of the whole, and what is wrong it finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from driving import score_text
from small_export import RTN, Folders, Small, command_line, settings_for
from tiny import cache_fidelity

import export.source.checkpoint
import export.studies
import export.write.decoder
import export.write.vision_onnx
import lite
from export import ExportSettings, export_artifact, verify
from export.__main__ import main
from export.logits import artifact_logits, onnx_logits, source_logits
from export.studies import FilmStudies, StudyReader, by_film
from export.write.work import work_path
from lite.artifact.open import load_artifact
from lite.artifact.parts import CacheDtype, Divergence
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.torch_engine.load import load_decoder
from lite.errors import ArtifactError
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from export.source.checkpoint import Checkpoint
    from lite.artifact.open import Artifact


def judged_films(
    source: Checkpoint, artifact: Artifact, count: int = 6
) -> tuple[list[FilmStudies], list[torch.Tensor]]:
    """Built-in studies, four of one film and two of another, and the films' features."""
    films = by_film(
        StudyReader(
            source.tokenizer, artifact.manifest, max_seq_len=source.decoder.max_position_embeddings, max_tokens=16
        ).built_in(count)
    )
    assert [len(film.studies) for film in films] == [4, count - 4]
    return films, [torch.from_numpy(VisionEncoder(artifact)(film.pixel_values[None])[0]) for film in films]


@pytest.mark.parametrize("form", ["fp16", "rtn-int4", "bnb-nf4", "bnb-int8"])
def test_parity_film_by_film_and_layer_by_layer_is_that_of_the_whole_decoder(
    source: Checkpoint, small: Small, form: str
) -> None:
    artifact = small(form)
    films, features = judged_films(source, artifact)
    caches: tuple[CacheDtype | None, ...] = (None, "int8")
    found = artifact_logits(artifact, films, features, "cpu", show=False, cache_dtypes=caches)
    asked = [(study, image) for film, image in zip(films, features, strict=True) for study in film.studies]
    for cache_dtype, layered in zip(caches, found, strict=True):
        decoder = load_decoder(artifact, device="cpu", cache_dtype=cache_dtype)
        for (study, image), logits in zip(asked, layered, strict=True):
            whole = score_text(decoder, study.input_ids, study.target_ids, image)
            assert whole.shape == logits.shape == (16, decoder.config.vocab_size)
            torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)
    for exact, rounded in zip(*found, strict=True):
        assert not torch.equal(exact[0], rounded[0]), "the question is read behind a rounded film"
        assert not torch.equal(exact[1:], rounded[1:])


def test_the_source_computes_studies_of_a_film_as_each_by_itself(source: Checkpoint, artifact: Artifact) -> None:
    films, features = judged_films(source, artifact)
    together = iter(source_logits(source, films, features, "cpu", show=False))
    for film, image in zip(films, features, strict=True):
        for study in film.studies:
            (alone,) = source_logits(source, [FilmStudies(studies=(study,))], [image], "cpu", show=False)
            torch.testing.assert_close(next(together), alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_decoder_onnx_reads_studies_of_a_film_as_each_by_itself(
    tiny_onnx_artifact: Artifact, cache_dtype: CacheDtype | None
) -> None:
    reader = StudyReader(
        tiny_onnx_artifact.file("tokenizer.model"), tiny_onnx_artifact.manifest, max_seq_len=512, max_tokens=16
    )
    films = by_film(reader.built_in(5))
    encoder, decoder = VisionEncoder(tiny_onnx_artifact), OnnxDecoder(tiny_onnx_artifact, cache_dtype=cache_dtype)
    features = [torch.from_numpy(encoder(film.pixel_values[None])[0]) for film in films]
    together = iter(onnx_logits(tiny_onnx_artifact, films, features, cache_dtype))
    for film, image in zip(films, features, strict=True):
        for study in film.studies:
            alone = score_text(decoder, study.input_ids, study.target_ids, image.numpy())
            torch.testing.assert_close(next(together), torch.from_numpy(alone), rtol=0, atol=1e-4)


def is_refused(folders: Folders, out: Path, settings: ExportSettings, match: str) -> Path:
    """Export, see parity fail with no artifact made, and return the folder in which all that was written stays."""
    with pytest.raises(ArtifactError, match=f"{match}.*stays in {work_path(out)} .*--keep-anyway"):
        export_artifact(*folders, out, settings)
    assert [path.name for path in out.parent.glob("*artifact*")] == [work_path(out).name]
    return work_path(out)


def test_what_is_refused_can_be_kept_anyway_and_says_so(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    out = tmp_path / "artifact"
    strict = dataclasses.replace(verify.TOLERANCES["decoder fp16"], max_mean_kl=1e-12)
    monkeypatch.setitem(verify.TOLERANCES, "decoder fp16", strict)
    left = is_refused(folders, out, ExportSettings(), "parity of decoder fp16: got mean KL")
    written = {file: file.stat().st_mtime_ns for file in left.rglob("*.safetensors")}
    assert len(written) == 4
    # Repeated it measures again, and goes on with what is there.
    is_refused(folders, out, ExportSettings(verify_studies=1), "parity of decoder fp16: got mean KL")
    assert written == {file: file.stat().st_mtime_ns for file in left.rglob("*.safetensors")}
    assert main([*command_line(folders, out), "--keep-anyway", "--quiet"]) == 0
    assert not left.exists()
    kept = load_artifact(out)
    assert [file.stat().st_mtime_ns for file in sorted((out / "decoder").glob("*.safetensors"))] == list(
        dict(sorted(written.items())).values()
    )
    (refusal,) = kept.manifest.refused
    assert refusal.startswith("parity of decoder fp16: got mean KL")
    warning = f"kept at the export though it was refused: {refusal}"
    assert f"warning: {warning}\n" in capsys.readouterr().out
    lite.load(out, device="cpu")
    assert f"{out}: {warning}" in caplog.messages


@pytest.mark.parametrize("form", ["fp16", "rtn-int4"])
def test_a_good_export_is_not_marked(small: Small, form: str) -> None:
    assert small(form).manifest.refused == ()


def test_a_weight_packed_along_the_wrong_axis_is_refused(
    folders: Folders, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export.write.decoder.to_tensors

    def wrong(values: torch.Tensor, scales: torch.Tensor, *, bits: int) -> dict[str, torch.Tensor]:
        square = values.shape[0] == values.shape[1]
        return right(values.t() if square else values, scales, bits=bits)

    monkeypatch.setattr(export.write.decoder, "to_tensors", wrong)
    settings = settings_for(listed, "gptq-int8", **RTN)
    is_refused(folders, tmp_path / "artifact", settings, "parity of decoder gptq-int8: got mean KL")


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0])
def test_a_wrong_merge_is_refused(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    right = export.source.checkpoint.merge

    def wrong(weight: torch.Tensor, pair: Any) -> torch.Tensor:
        if pair is None:
            return right(weight, pair)
        return weight.float() + factor * (right(weight, pair) - weight.float())

    monkeypatch.setattr(export.source.checkpoint, "merge", wrong)
    is_refused(folders, tmp_path / "artifact", ExportSettings(), "parity of decoder fp16: got mean KL")


@pytest.mark.parametrize("fault", ["eps", "layer scale", "position"])
def test_a_wrong_tower_is_refused(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    graph = export.write.vision_onnx.TowerGraph
    right = graph.source
    if fault == "eps":
        monkeypatch.setattr(graph.layer_norm, "__defaults__", (1e-2,))
    else:
        part = {"layer scale": "ls2.gamma", "position": "pos_embed"}[fault]
        monkeypatch.setattr(graph, "source", lambda self, name: right(self, name) * (1 - 0.05 * (part in name)))
    is_refused(folders, tmp_path / "artifact", ExportSettings(), "parity of vision fp32")


def test_parity_that_is_not_a_number_fails(artifact: Artifact) -> None:
    parts = artifact.manifest.parts
    verify.require_parity(parts)
    decoder = dataclasses.replace(parts.decoder, fidelity=cache_fidelity(float("nan")))
    for keep_anyway in (False, True):
        with pytest.raises(ArtifactError, match="got mean KL nan"):
            verify.require_parity(dataclasses.replace(parts, decoder=decoder), keep_anyway=keep_anyway)


class _OneTokenPerWord(export.studies.Tokenizer):
    """The least that any tokenizer gives: one token per word, a short one."""

    def encode(self, text: str) -> list[int]:
        return [3 + len(word) for word in text.split()]


def test_the_same_top_token_is_required_of_a_default_export(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = verify.divergence_of
    tokens: list[int] = []

    def worse(*logits: Any) -> Divergence:
        compared = right(*logits)
        tokens.append(compared.tokens)
        return dataclasses.replace(compared, same_top=0.95)

    monkeypatch.setattr(verify, "divergence_of", worse)
    monkeypatch.setattr(export.studies, "Tokenizer", _OneTokenPerWord)
    is_refused(folders, tmp_path / "artifact", ExportSettings(), "parity of decoder fp16: got same top token 0.95")
    assert tokens[0] >= 1.5 * verify.MIN_TOKENS_FOR_SAME_TOP
