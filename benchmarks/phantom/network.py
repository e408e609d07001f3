"""The phantom's network while it learns: transformers' DINOv2 and Llama, the form of LLaVA-Rad at a toy size.

Training uses transformers' own modules and never the project's, so that exporting and running the result compares
two independent implementations of the same model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from benchmarks.phantom.dataset import GRID, IMAGE_SIZE, PATCH_SIZE
from benchmarks.phantom.findings import DRAWN_LABELS, Study

if TYPE_CHECKING:
    from collections.abc import Mapping

TOWER_WIDTH = 192
TOWER_BLOCKS = 5
"""The last block is never run (select_layer -2), as in the real model."""
LLAMA_CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

TRUNK_PREFIX = "module.visual.trunk."
# timm's names, which the checkpoint has, and transformers' own.
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_PLAIN = {
    "attn.proj": "attention.o_proj", "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip

_SIDED = (
    "Pleural Effusion", "Pneumothorax", "Consolidation", "Atelectasis", "Lung Lesion", "Fracture",
    "central venous line", "pacemaker",
)  # fmt: skip
_SIZED = ("Cardiomegaly", "Edema", "Pleural Effusion", "Pneumothorax", "Lung Lesion")
_ZONED = ("Consolidation", "Lung Lesion", "Fracture")
_DEVICES = ("endotracheal tube", "central venous line", "pacemaker")
ATTRIBUTES: tuple[tuple[str, str], ...] = (
    *((label, "present") for label in (*DRAWN_LABELS, *_DEVICES)),
    *((name, side) for name in _SIDED for side in ("left", "right")),
    *((name, size) for name in _SIZED for size in ("small", "moderate", "large")),
    *((name, zone) for name in _ZONED for zone in ("upper", "mid", "lower")),
)
"""The yes/no questions that the training-only head answers about a whole film."""


def study_attributes(study: Study) -> np.ndarray:
    """Answer ATTRIBUTES for one study: float32 zeros and ones."""
    true: set[tuple[str, str]] = {("No Finding", "present")} if study.has("No Finding") else set()
    for finding in study.findings:
        for name in filter(None, (finding.label, finding.device)):
            true.add((name, "present"))
            sides = ("left", "right") if finding.side == "bilateral" else (finding.side,)
            true.update((name, str(value)) for value in (*sides, finding.size, finding.zone))
    return np.array([attribute in true for attribute in ATTRIBUTES], dtype=np.float32)


def dinov2_config(num_hidden_layers: int) -> Dinov2Config:
    """Return the tower's shape, with so many blocks."""
    return Dinov2Config(
        hidden_size=TOWER_WIDTH,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=TOWER_WIDTH // 64,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        layerscale_value=0.5,
        layer_norm_eps=1e-6,
        qkv_bias=True,
    )


def load_trunk(tower: Dinov2Model, published: Mapping[str, Tensor]) -> None:
    """Load the weights that `PhantomNetwork.trunk` has given, from a published state dict, into as many blocks."""
    trunk = {name.removeprefix(TRUNK_PREFIX): t for name, t in published.items() if name.startswith(TRUNK_PREFIX)}
    state = {theirs: trunk[ours] for ours, theirs in _EMBEDDINGS.items()}
    for index in range(len(tower.encoder.layer)):
        layer, block = f"encoder.layer.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", trunk[f"{block}.attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{layer}.attention.{name}_proj.{kind}"] = part
            state |= {f"{layer}.{theirs}.{kind}": trunk[f"{block}.{ours}.{kind}"] for ours, theirs in _PLAIN.items()}
        state |= {f"{layer}.layer_scale{i}.lambda1": trunk[f"{block}.ls{i}.gamma"] for i in (1, 2)}
    wanted = tower.state_dict()
    tower.load_state_dict(state | {name: wanted[name] for name in wanted.keys() - state.keys() if "mask_token" in name})


def run_blocks(tower: Dinov2Model, pixel_values: Tensor) -> Tensor:
    """Return what comes out of the tower's last block, before its norm: [B, 1 + P, D], CLS first."""
    hidden: Tensor = tower.embeddings(pixel_values)
    for layer in tower.encoder.layer:
        output = layer(hidden)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def _sine_positions(grid: int, width: int) -> Tensor:
    """Sine-cosine codes of the patch rows and columns, [grid², width]: a start from which places are easy to tell."""
    frequencies = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(grid)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = line[:, None].expand(grid, grid, -1)
    columns = line[None, :].expand(grid, grid, -1)
    return torch.cat([rows, columns], dim=-1).reshape(grid * grid, width)


class PhantomWriter(nn.Module):
    """Projector and decoder."""

    def __init__(self) -> None:
        super().__init__()
        hidden_size = LLAMA_CONFIG["hidden_size"]
        self.projector = nn.Sequential(
            nn.Linear(TOWER_WIDTH, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )
        self.decoder = LlamaForCausalLM(LlamaConfig(**LLAMA_CONFIG))

    def forward(
        self, features: Tensor, before: Tensor, after: Tensor, target_mask: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Predict the findings tokens.

        Args:
            features: patch features [B, P, D].
            before: ids in front of the image, the same for every row, [T0].
            after: ids behind the image, findings and EOS included, padded on the right, [B, T1].
            target_mask: True where `after` holds a findings token or its EOS, [B, T1].
            positions: what position each place of a row stands for, at least as many as there are; None: each its own.

        Returns:
            Logits [number of True in target_mask, vocab_size], in row-major order of the mask.
        """
        embed = self.decoder.model.embed_tokens
        start = embed(before)[None].expand(len(after), -1, -1)
        inputs_embeds = torch.cat([start, self.projector(features), embed(after)], dim=1)
        places = {}
        if positions is not None:
            # Without a mask transformers takes a gap in the positions for the start of another text.
            places = {"position_ids": positions[None, : inputs_embeds.shape[1]]}
            places["attention_mask"] = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=after.device)
        # Padding stands behind everything it could disturb, so causality alone is mask enough.
        hidden = self.decoder.model(inputs_embeds=inputs_embeds, use_cache=False, **places).last_hidden_state
        first = len(before) + features.shape[1]
        # The token at position i is predicted at i - 1.
        logits: Tensor = self.decoder.lm_head(hidden[:, first - 1 : -1][target_mask])
        return logits


class PhantomNetwork(nn.Module):
    """Tower and writer, with the head that exists during training only.

    Args:
        patch_prior: how often each drawn label covers a patch, [labels]; the head starts from these odds.
        attribute_prior: how often each attribute is true, [attributes].
    """

    def __init__(self, *, patch_prior: Tensor, attribute_prior: Tensor) -> None:
        super().__init__()
        self.tower = Dinov2Model(dinov2_config(TOWER_BLOCKS - 1))
        self.writer = PhantomWriter()
        self.norm = nn.LayerNorm(TOWER_WIDTH)
        self.patch_head = nn.Linear(TOWER_WIDTH, len(patch_prior))
        self.attribute_head = nn.Linear(2 * TOWER_WIDTH, len(attribute_prior))
        with torch.no_grad():
            self.tower.embeddings.position_embeddings[0, 1:] = 0.4 * _sine_positions(GRID, TOWER_WIDTH)
            for head, prior in ((self.patch_head, patch_prior), (self.attribute_head, attribute_prior)):
                head.weight.mul_(0.1)
                head.bias.copy_(torch.logit(prior.clamp(1e-3, 1 - 1e-3)))

    def see(self, pixel_values: Tensor) -> Tensor:
        """Run the tower: pixel_values [B, 3, S, S] → patch features [B, P, D] of the last block that the model uses."""
        return run_blocks(self.tower, pixel_values)[:, 1:]

    def recognise(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Answer the training-only questions: logits [B, P, labels] per patch and [B, attributes] per film."""
        features = self.norm(features)
        pooled = torch.cat([features.mean(dim=1), features.amax(dim=1)], dim=1)
        return self.patch_head(features), self.attribute_head(pooled)

    def trunk(self) -> dict[str, Tensor]:
        """Give the tower under timm's names, float32, the never-run last block and final norm included."""
        source = self.tower.state_dict()
        trunk = {ours: source[theirs] for ours, theirs in _EMBEDDINGS.items()}
        for index in range(TOWER_BLOCKS):
            # The block that is never run repeats its neighbour: it must be there, and nobody may need it.
            layer = f"encoder.layer.{min(index, TOWER_BLOCKS - 2)}"
            block = f"blocks.{index}"
            for kind in ("weight", "bias"):
                trunk[f"{block}.attn.qkv.{kind}"] = torch.cat(
                    [source[f"{layer}.attention.{name}_proj.{kind}"] for name in ("q", "k", "v")]
                )
                for name, theirs in _PLAIN.items():
                    trunk[f"{block}.{name}.{kind}"] = source[f"{layer}.{theirs}.{kind}"]
            trunk[f"{block}.ls1.gamma"] = source[f"{layer}.layer_scale1.lambda1"]
            trunk[f"{block}.ls2.gamma"] = source[f"{layer}.layer_scale2.lambda1"]
        return {name: tensor.detach().float().clone() for name, tensor in trunk.items()}
