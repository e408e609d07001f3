"""An unpacker of GPTQ's format that shares nothing with the packer."""

from __future__ import annotations

import numpy as np
import torch


def unpacked(tensors: dict[str, torch.Tensor], bits: int) -> np.ndarray:
    """Rebuild w[out, in] = scale * (q - zero) field by field, by the definition of AutoGPTQ's format."""
    qweight, qzeros, scales, g_idx = (tensors[name].numpy() for name in ("qweight", "qzeros", "scales", "g_idx"))
    factor, mask = 32 // bits, (1 << bits) - 1
    inputs, outputs = qweight.shape[0] * factor, qweight.shape[1]
    weight = np.zeros((outputs, inputs), dtype=np.float64)
    for k in range(inputs):
        group = int(g_idx[k])
        for n in range(outputs):
            q = (int(qweight[k // factor, n]) & 0xFFFFFFFF) >> (bits * (k % factor)) & mask
            zero = ((int(qzeros[group, n // factor]) & 0xFFFFFFFF) >> (bits * (n % factor)) & mask) + 1
            weight[n, k] = float(scales[group, n]) * (q - zero)
    return weight
