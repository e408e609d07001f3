"""Parity: what the exported artifact computes against what the source computes, measured before it is kept.

The source is computed plainly (see `export.forward`): LoRA beside the weights, everything float32. The artifact is
computed from the files just written, `vision.onnx` by ONNX Runtime and `decoder/` by the runtime's own decoder; a
decoder too large for this machine's memory is computed one layer at a time from its files instead. Each study is a
film, its prompt, and a findings text; the decoder is scored on the text, teacher-forced:

    source    film ─ torch tower ─ base + LoRA, float32 ──▶ p(token | …)  ─┐
    artifact  film ─ vision.onnx ─ decoder/ ──────────────▶ q(token | …)  ─┴▶ KL(p‖q), same top token

The numbers go into the manifest; numbers worse than `TOLERANCES` end the export.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import psutil
import torch
from safetensors import safe_open

from export import forward
from lite.artifact import Artifact, FileRecord
from lite.config import IMAGE_TOKEN_ID
from lite.decoder import load_decoder
from lite.errors import ArtifactError, CheckpointError
from lite.image import load_image, preprocess
from lite.prompt import PromptEncoder, Tokenizer
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from export.checkpoint import Checkpoint
    from lite.artifact import Manifest
    from lite.config import Preprocessing

    Array = np.ndarray[Any, np.dtype[np.float32]]
    Advance = Callable[[], object]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The worst an export may measure."""

    min_cosine: float | None = None
    max_relative_error: float | None = None
    max_mean_kl: float | None = None
    min_same_top: float | None = None


TOLERANCES: Final = {
    # float32 sums in another order: 1e-6 of the features' RMS is usual, the bar leaves room for deep towers.
    "vision fp32": Tolerance(min_cosine=0.99999, max_relative_error=1e-3),
    # float16 rounds at 5e-4; outlier channels of a trained tower make single features a few times worse than the mean.
    "vision fp16": Tolerance(min_cosine=0.999, max_relative_error=0.1),
    # Rounding to float16 costs about 1e-6 nats; published fp16-to-bf16 noise is 2.5e-5 and 99.74 % the same top token.
    # A merge with half the LoRA scale costs more than 0.1.
    "decoder fp16": Tolerance(max_mean_kl=1e-3, min_same_top=0.98),
}
"""By part and format. The decoder is measured behind the exported vision part, as a user will run it."""

MIN_TOKENS_FOR_SAME_TOP: Final = 100
"""With fewer scored tokens one near-tie is more than a per cent; same_top is then recorded but does not fail."""

_BUILT_IN_TEXTS: Final = (
    (
        "Chest pain.",
        "The heart is normal in size. The mediastinal and hilar contours are unremarkable. The lungs are clear without "
        "focal consolidation. The pulmonary vasculature is normal. No pleural effusion or pneumothorax is seen. There "
        "is no acute osseous abnormality, and no free air is seen under the diaphragm.",
    ),
    (
        None,
        "There is a moderate left pleural effusion with adjacent atelectasis, and a small right pleural effusion. The "
        "right upper lung is clear. The left heart border is obscured, so that the size of the heart cannot be told. "
        "No pneumothorax. A right central venous catheter ends in the lower superior vena cava.",
    ),
    (
        "Shortness of breath, evaluate for pneumonia.",
        "There is a consolidation in the right lower zone, which is concerning for pneumonia. The left lung is clear. "
        "The heart is mildly enlarged, without signs of pulmonary edema. There is no large pleural effusion, and no "
        "pneumothorax. Multiple healed fractures of the left ribs are seen. The bones are otherwise intact.",
    ),
    (
        None,
        "Moderate cardiomegaly with mild pulmonary edema and small effusions on both sides. An endotracheal tube is in "
        "place, with its tip 4 cm above the carina, and an enteric tube ends in the stomach. A left pacemaker with two "
        "leads is in place. There is no pneumothorax. Lung volumes are low, with atelectasis at both bases.",
    ),
)
"""Reasons and findings that any model of this kind gives sensible probabilities to.

Each has 40 words or more, and no tokenizer takes less than a token for a word: the four are past
`MIN_TOKENS_FOR_SAME_TOP` with any. The cost of a study is its image and prompt, not its text.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerifyStudy:
    """One film with its prompt and the findings the decoder is scored on."""

    pixel_values: Array  # [3, S, S]
    input_ids: tuple[int, ...]  # with IMAGE_TOKEN_ID once
    target_ids: tuple[int, ...]


class Studies:
    """Turn films and texts into `VerifyStudy`s, with the artifact's own tokenizer, template and preprocessing."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest, *, max_tokens: int) -> None:
        """Prepare the tokenizer.

        Args:
            checkpoint: The source.
            manifest: Of the artifact being written.
            max_tokens: Findings tokens that are scored per study, at most.
        """
        try:
            self.tokenizer = Tokenizer(checkpoint.tokenizer, manifest.decoding)
        except ArtifactError as error:
            raise CheckpointError(str(error).replace("the manifest", "config.json")) from error
        self.max_seq_len = checkpoint.decoder.max_position_embeddings
        self.prompts = PromptEncoder(
            self.tokenizer,
            manifest.prompt,
            num_image_tokens=checkpoint.tower.num_patches,
            max_seq_len=self.max_seq_len,
        )
        self.preprocessing: Preprocessing = manifest.preprocessing
        self.eos_token_id = manifest.decoding.eos_token_id
        self.max_tokens = max_tokens

    def built_in(self, count: int) -> list[VerifyStudy]:
        """Return studies made here: smooth shaded fields with noise, and fixed findings texts."""
        size = self.preprocessing.image_size
        studies = []
        for number in range(count):
            rng = np.random.default_rng([0xF11, number])
            y, x = np.mgrid[0:size, 0:size] / size
            waves = sum(
                np.sin(2 * np.pi * (rng.uniform(0, 3) * x + rng.uniform(0, 3) * y + rng.uniform())) for _ in range(4)
            )
            film = 128 + 25 * waves + rng.normal(0, 12, (size, size))
            pixels = np.repeat(np.clip(film, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
            reason, findings = _BUILT_IN_TEXTS[number % len(_BUILT_IN_TEXTS)]
            studies.append(self._study(pixels, reason, findings))
        return studies

    def from_list(self, file: Path, image_folder: Path, count: int) -> list[VerifyStudy]:
        """Return the first studies of a JSON list in the evaluation format.

        Raises:
            CheckpointError: The list is unreadable, empty, or an entry lacks an image or findings.
        """
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            msg = f"{file}: got something unreadable ({error}) · expected a JSON list of studies · check --verify-data"
            raise CheckpointError(msg) from error
        if not isinstance(entries, list) or not entries:
            raise CheckpointError(f"{file}: got no studies · expected a JSON list of them · check --verify-data")
        return [self._listed(entry, file, image_folder) for entry in entries[:count]]

    def _listed(self, entry: Any, file: Path, image_folder: Path) -> VerifyStudy:  # noqa: ANN401 - parsed JSON
        try:
            image, findings = entry["image"], entry["conversations"][1]["value"]
            reason = entry.get("reason")
            path = image_folder / image
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            got = f"an entry that is not a study ({error!r})"
            msg = f"{file}: got {got} · expected id, image, reason, conversations · check --verify-data"
            raise CheckpointError(msg) from error
        return self._study(path, reason, str(findings))

    def _study(self, source: Path | np.ndarray[Any, Any], reason: str | None, findings: str) -> VerifyStudy:
        input_ids = self.prompts.encode(reason)
        room = self.max_seq_len - self.prompts.num_tokens(input_ids)
        target_ids = [*self.tokenizer.encode(findings), self.eos_token_id][: min(self.max_tokens, room)]
        pixel_values = preprocess(load_image(source).image, self.preprocessing)
        return VerifyStudy(pixel_values=pixel_values, input_ids=tuple(input_ids), target_ids=tuple(target_ids))


def measure(
    checkpoint: Checkpoint,
    folder: Path,
    manifest: Manifest,
    studies: Sequence[VerifyStudy],
    *,
    device: str = "cpu",
    advance: Advance = lambda: None,
) -> dict[str, Any]:
    """Measure the artifact being written against its source.

    Args:
        checkpoint: The source.
        folder: Where the artifact's files lie, without a manifest yet.
        manifest: What it will say.
        studies: What to measure on.
        device: Where torch computes.
        advance: Called `num_steps` times as the work goes on.

    Returns:
        What the manifest records under `fidelity`: {"vision": {...}, "decoder": {...}}.
    """
    advance_and = _after(advance)
    source_features = advance_and(_source_features(checkpoint, studies, device))
    artifact = _unfinished_artifact(folder, manifest)
    ours = advance_and(_artifact_features(artifact, studies))
    fidelity = {"vision": _compare_features(source_features, ours)}
    source_logits = score_by_layer(
        studies, source_features, _source_parts(checkpoint, device), checkpoint, device=device, advance=advance
    )
    whole = _fits_in_memory(checkpoint, device)
    if whole:
        logits = advance_and(_score_whole(artifact, studies, ours, device))
    else:
        parts = _artifact_parts(folder / "decoder", checkpoint, device)
        logits = score_by_layer(studies, ours, parts, checkpoint, device=device, advance=advance)
    fidelity["decoder"] = _compare_logits(source_logits, logits)
    fidelity["decoder"]["computed_by"] = "lite.decoder" if whole else "export.forward, layer by layer"
    return fidelity


def num_steps(checkpoint: Checkpoint, *, device: str = "cpu") -> int:
    """Return how often `measure` calls its advance."""
    layers = checkpoint.decoder.num_hidden_layers
    return 2 + layers + (1 if _fits_in_memory(checkpoint, device) else layers)


def require_parity(fidelity: dict[str, Any], manifest: Manifest) -> None:
    """Compare what was measured with the tolerances.

    Raises:
        ArtifactError: A number is worse than its tolerance.
    """
    vision, decoder = fidelity["vision"], fidelity["decoder"]
    checks = [
        (f"vision {manifest.vision.format}", "cosine", vision["min_cosine"], "min_cosine"),
        (f"vision {manifest.vision.format}", "relative error", vision["relative_error"], "max_relative_error"),
        (f"decoder {manifest.decoder.format}", "mean KL", decoder["mean_kl"], "max_mean_kl"),
    ]
    if decoder["tokens"] >= MIN_TOKENS_FOR_SAME_TOP:
        checks.append((f"decoder {manifest.decoder.format}", "same top token", decoder["same_top"], "min_same_top"))
    for part, measure_name, got, limit_name in checks:
        limit = getattr(TOLERANCES[part], limit_name)
        # Written so that NaN fails.
        good = got >= limit if limit_name.startswith("min") else got <= limit
        if not good:
            bound = "at least" if limit_name.startswith("min") else "at most"
            msg = (
                f"parity of {part}: got {measure_name} {got:.6g} · expected {bound} {limit:g} · the artifact would not "
                "compute what the checkpoint does, so it was not kept: "
                "check that the base model is the one the adapter was trained on, and report this"
            )
            raise ArtifactError(msg)


def score_by_layer(
    studies: Sequence[VerifyStudy],
    features: Sequence[Tensor],
    parts: Parts,
    checkpoint: Checkpoint,
    *,
    device: str,
    advance: Advance,
) -> list[Tensor]:
    """Compute the logits of every target token, holding one decoder layer at a time.

    Returns:
        Per study [len(target_ids), vocab_size], float32, on the CPU.
    """
    config = checkpoint.decoder
    with torch.inference_mode():
        embeddings = parts.tensor("model.embed_tokens.weight")
        hidden = [_embed(study, image, embeddings).to(device) for study, image in zip(studies, features, strict=True)]
        del embeddings
        for norms, linear in parts.layers():
            hidden = [forward.decoder_layer(config, norms, linear, x) for x in hidden]
            advance()
        norm, head = parts.tensor("model.norm.weight"), parts.tensor("lm_head.weight").to(device, torch.float32)
        logits = []
        for study, x in zip(studies, hidden, strict=True):
            scored = forward.rms_norm(x[-len(study.target_ids) :], norm, config.rms_norm_eps)
            logits.append(torch.nn.functional.linear(scored, head).cpu())
    return logits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A decoder that can be computed one layer at a time."""

    tensor: Callable[[str], Tensor]
    layers: Callable[[], Iterator[tuple[dict[str, Tensor], forward.Linear]]]


def _source_parts(checkpoint: Checkpoint, device: str) -> Parts:
    def layers() -> Iterator[tuple[dict[str, Tensor], forward.Linear]]:
        for index in range(checkpoint.decoder.num_hidden_layers):
            layer = checkpoint.read_layer(index)
            yield layer.weights, forward.source_linear(layer, device)

    return Parts(tensor=checkpoint.read_base, layers=layers)


def _artifact_parts(decoder: Path, checkpoint: Checkpoint, device: str) -> Parts:
    places: dict[str, Path] = {}
    for file in sorted(decoder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file)

    def tensor(name: str) -> Tensor:
        with safe_open(str(places[name]), framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name).clone()
        return found

    def layers() -> Iterator[tuple[dict[str, Tensor], forward.Linear]]:
        for index in range(checkpoint.decoder.num_hidden_layers):
            prefix = f"model.layers.{index}."
            weights = {name.removeprefix(prefix): tensor(name) for name in places if name.startswith(prefix)}
            yield weights, forward.plain_linear(weights, device)

    return Parts(tensor=tensor, layers=layers)


def _embed(study: VerifyStudy, features: Tensor, embeddings: Tensor) -> Tensor:
    """Splice the image between the prompt's halves; the last target is predicted, never read."""
    ids = [*study.input_ids, *study.target_ids[:-1]]
    at = ids.index(IMAGE_TOKEN_ID)
    before, after = (embeddings[torch.tensor(part, dtype=torch.long)].float() for part in (ids[:at], ids[at + 1 :]))
    return torch.cat([before, features, after])


def _source_features(checkpoint: Checkpoint, studies: Sequence[VerifyStudy], device: str) -> list[Tensor]:
    tensors = {name: tensor.to(device) for name, tensor in checkpoint.read_tower().items()}
    with torch.inference_mode():
        films = [torch.from_numpy(study.pixel_values)[None].to(device) for study in studies]
        return [forward.image_features(tensors, checkpoint.tower, film)[0].cpu() for film in films]


def _artifact_features(artifact: Artifact, studies: Sequence[VerifyStudy]) -> list[Tensor]:
    encoder = VisionEncoder(artifact)
    return [torch.from_numpy(encoder(study.pixel_values[None])[0]) for study in studies]


def _unfinished_artifact(folder: Path, manifest: Manifest) -> Artifact:
    """Describe the files as they lie there, so that the runtime can open them before the manifest is written."""
    written = [file for file in folder.rglob("*") if file.is_file()]
    files = {
        file.relative_to(folder).as_posix(): FileRecord(bytes=file.stat().st_size, sha256="0" * 64) for file in written
    }
    return Artifact(path=folder, manifest=dataclasses.replace(manifest, files=files), id="0" * 16)


def _score_whole(
    artifact: Artifact, studies: Sequence[VerifyStudy], features: Sequence[Tensor], device: str
) -> list[Tensor]:
    decoder = load_decoder(artifact, device=device)
    pairs = zip(studies, features, strict=True)
    return [decoder.score(study.input_ids, study.target_ids, image).cpu() for study, image in pairs]


def _fits_in_memory(checkpoint: Checkpoint, device: str) -> bool:
    """Tell whether the runtime's decoder can be loaded whole beside what verification holds."""
    weights = sum(int(np.prod(entry.shape)) for entry in checkpoint.base.entries.values())
    if torch.device(device).type == "cpu":
        return weights * 4 < 0.5 * psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return weights * 2 < 0.8 * free


def _compare_features(source: Sequence[Tensor], ours: Sequence[Tensor]) -> dict[str, Any]:
    p, q = torch.stack(list(source)).double(), torch.stack(list(ours)).double()
    cosine = torch.nn.functional.cosine_similarity(p, q, dim=-1)
    max_abs = float((p - q).abs().max())
    rms = float(p.square().mean().sqrt())
    return {
        "films": len(source),
        "max_abs": max_abs,
        "relative_error": max_abs / rms,  # of the features' root mean square
        "mean_cosine": float(cosine.mean()),
        "min_cosine": float(cosine.min()),
    }


def _compare_logits(source: Sequence[Tensor], ours: Sequence[Tensor]) -> dict[str, Any]:
    p = torch.log_softmax(torch.cat(list(source)).double(), dim=-1)
    q = torch.log_softmax(torch.cat(list(ours)).double(), dim=-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return {
        "studies": len(source),
        "tokens": len(p),
        "mean_kl": float(kl.mean()),  # nats per token
        "max_kl": float(kl.max()),
        "same_top": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }


def _after(advance: Advance) -> Callable[[list[Tensor]], list[Tensor]]:
    def pass_on(value: list[Tensor]) -> list[Tensor]:
        advance()
        return value

    return pass_on
