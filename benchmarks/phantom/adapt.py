"""Adapt the phantom model to fewer image tokens: what a short training buys back.

    film ─tower, frozen─ patches ─(fewer: lite.image_tokens)─▶ projector ─▶ decoder, frozen + LoRA ─▶ findings

The published LoRA learns further, beside new factors that start at zero, and so does the projector. The base stays as
it is: what is written is another LoRA for it. What the decoder reads of a film is what the runtime makes of it: the
tower of an artifact, which is exported into the work folder, runs once for each.

Everything is seeded, films and state are kept in the work folder, and an interrupted run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.exports import FP16, PHANTOM, ROOT, Source
from benchmarks.phantom.dataset import GRID, draw_films
from benchmarks.phantom.hospital import HospitalName
from benchmarks.phantom.layout import LORA_TARGETS, write_json
from benchmarks.phantom.loop import Plan, Training
from benchmarks.phantom.network import LLAMA_CONFIG, PhantomWriter
from benchmarks.phantom.publish import ADAPTER_PREFIX, LORA_SCALE, NAME, PROJECTOR_PREFIX, write_peft, write_trained
from benchmarks.phantom.texts import Texts
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import ImageMethod
from lite.errors import LiteError
from lite.files import staged_folder, whole_file
from lite.image.preprocess import preprocess
from lite.image_tokens import check_image_tokens, rotary_positions
from lite.vision import VisionEncoder

_VERIFY = ROOT / "benchmarks" / "references" / "phantom" / "studies.json"
_FACTORS = (".lora_A", ".lora_B")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptationPlan(Plan):
    """Everything that decides an adaptation. Seed 0 would draw the films that the phantom itself was grown on."""

    seed: int = 1
    films: int = 2_000
    learning_rate: float = 1e-3
    warm_up_steps: int = 20
    weight_decay: float = 0.0
    lora_rank: int = 16
    steps: int = 120
    image_tokens: int = GRID * GRID
    image_method: ImageMethod = "diverse"
    hospital: HospitalName = "home"
    dtype: Literal["float32", "bfloat16"] = "float32"


class LoraLinear(nn.Module):
    """A frozen linear and its LoRA of that rank: the published factors, and new ones that change nothing yet."""

    def __init__(self, linear: nn.Linear, lora_a: Tensor, lora_b: Tensor, *, rank: int) -> None:
        super().__init__()
        self.linear = linear
        more_a = torch.randn(rank - len(lora_a), linear.in_features) * linear.in_features**-0.5
        more_b = torch.zeros(linear.out_features, rank - len(lora_a))
        self.lora_A = nn.Parameter(torch.cat([lora_a.float(), more_a]))
        self.lora_B = nn.Parameter(torch.cat([lora_b.float(), more_b], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Compute W x + s · B (A x)."""
        adapted: Tensor = self.linear(x) + LORA_SCALE * F.linear(F.linear(x, self.lora_A), self.lora_B)
        return adapted


def published_writer(*, rank: int) -> PhantomWriter:
    """Return the committed checkpoint's projector and decoder, the base frozen, its LoRA widened to `rank`.

    Raises:
        LiteError: `rank` is less than the published LoRA's.
    """
    writer = PhantomWriter()
    projector = _read(PHANTOM / NAME / "non_lora_trainables.bin")
    writer.projector.load_state_dict({name.removeprefix(PROJECTOR_PREFIX): t for name, t in projector.items()})
    shards = (PHANTOM / "base").glob("*.bin")
    writer.decoder.load_state_dict({name: tensor for shard in shards for name, tensor in _read(shard).items()})
    writer.decoder.requires_grad_(requires_grad=False)
    adapter = _read(PHANTOM / NAME / "adapter_model.bin")
    for name, linear in list(writer.decoder.named_modules()):
        if isinstance(linear, nn.Linear) and name.endswith(LORA_TARGETS):
            a, b = (adapter[f"{ADAPTER_PREFIX}{name}.lora_{factor}.weight"] for factor in "AB")
            if rank < len(a):
                msg = f"got a LoRA of rank {rank} · expected at least {len(a)}, the published one's"
                raise LiteError(f"{msg} · choose a higher rank")
            writer.decoder.set_submodule(name, LoraLinear(linear, a, b, rank=rank))
    return writer


def _read(file: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return tensors


class Adaptation(Training):
    """One stage, of texts alone."""

    plan: AdaptationPlan
    network: PhantomWriter

    def __init__(self, plan: AdaptationPlan, work: Path, device: torch.device) -> None:
        """Draw the films, and have the tower see them."""
        torch.manual_seed(plan.seed)
        writer = published_writer(rank=plan.lora_rank).to(device)
        artifact = _exported(work / "artifact", plan)
        part = artifact.manifest.parts.vision
        name = f"{plan.hospital}-{part.image_method}-{part.num_image_tokens}"
        films = draw_films(work / f"films-{plan.hospital}", count=plan.films, seed=plan.seed, hospital=plan.hospital)
        self.texts = Texts(
            films, PHANTOM / "base" / "tokenizer.model",
            seed=plan.seed, batch_size=plan.batch_size, num_image_tokens=part.num_image_tokens,
            hospital=plan.hospital,
        )  # fmt: skip
        self.features = _features(artifact, films.pixels, work / f"features-{name}.npy")
        self.device, self.before = device, self.texts.before.to(device)
        positions = rotary_positions(part, len(self.before), LLAMA_CONFIG["max_position_embeddings"])
        self.positions = None if positions is None else torch.from_numpy(positions).float().to(device)
        super().__init__(plan, writer, stages={"write": plan.steps}, state=work / f"state-{name}.pt")

    def _parts(self) -> Iterator[tuple[Iterator[nn.Parameter], float]]:
        yield (weight for weight in self.network.parameters() if weight.requires_grad), 1.0

    def _loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        rows, *texts = self.texts.batch(step)
        features, after, mask = (t.to(self.device) for t in (torch.from_numpy(self.features[rows]), *texts))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.dtype == "bfloat16"):
            logits = self.network(features, self.before, after, mask, self.positions)
        loss = F.cross_entropy(logits.float(), after[mask])
        return loss, {"text": float(loss.detach())}


def _exported(folder: Path, plan: AdaptationPlan) -> Artifact:
    """Return the committed checkpoint's artifact, exported where there is none yet, as it gives the tokens planned."""
    if not folder.exists():
        Source(verify=_VERIFY, calibration=_VERIFY).export(FP16, folder)
    artifact = load_artifact(folder)
    part = check_image_tokens(artifact.manifest.parts.vision, plan.image_tokens, plan.image_method)
    return dataclasses.replace(artifact, manifest=artifact.manifest.with_parts(vision=part))


def _features(artifact: Artifact, pixels: NDArray[np.uint8], kept: Path) -> NDArray[np.float32]:
    """Return what the runtime gives its projector of each film, [N, T, D]; computed once."""
    if not kept.exists():
        encoder, how = VisionEncoder(artifact), artifact.manifest.preprocessing
        shown = tqdm(pixels, desc="seeing films", unit="film")
        found = [encoder.patches(preprocess(Image.fromarray(film).convert("RGB"), how)[None])[0] for film in shown]
        with whole_file(kept) as partial, partial.open("wb") as stream:
            np.save(stream, np.stack(found))
    features: NDArray[np.float32] = np.load(kept)
    return features


def adapt(out: Path, *, plan: AdaptationPlan, work: Path, peft: bool = False) -> int:
    """Adapt the committed phantom model, and write it in LLaVA-Rad's layout, for the same base.

    Args:
        out: the new folder, another `llava-rad-phantom/`, with the plan as `training.json` in it.
        plan: what to do.
        peft: write what was trained alone, as PEFT does.
        work: folder for films, features and state; a run that was interrupted continues from it.

    Returns:
        Bytes of what was trained: LoRA and projector.

    Raises:
        LiteError: there is something at `out`, `work` holds films of another seed or number or a run of another plan,
            or the plan cannot be carried out.
    """
    with staged_folder(out) as staged:
        adaptation = Adaptation(plan, work, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        adaptation.run()
        state = adaptation.network.cpu().decoder.state_dict()
        adapter = {f"{ADAPTER_PREFIX}{name}.weight": t for name, t in state.items() if name.endswith(_FACTORS)}
        projector = adaptation.network.projector.state_dict()
        if peft:
            size = write_peft(staged.path, adapter=adapter, projector=projector, rank=plan.lora_rank)
        else:
            shutil.copytree(PHANTOM / NAME, staged.path, dirs_exist_ok=True)
            config = json.loads((staged.path / "config.json").read_text(encoding="utf-8"))
            size = write_trained(staged.path, adapter=adapter, projector=projector, config=config, rank=plan.lora_rank)
        write_json(staged.path / "training.json", dataclasses.asdict(plan))
        staged.finish()
    return size
