"""One linear weight in the forms of bitsandbytes, tensor by tensor as transformers writes them.

    decoder format   tensors of a layer `….q_proj`                       bits per weight
    bnb-nf4          weight, weight.absmax, weight.quant_map,             4.13
                     weight.nested_absmax, weight.nested_quant_map,
                     weight.quant_state.bitsandbytes__nf4
    bnb-int8         weight, SCB, weight_format                           8

The library itself quantises, so that the numbers are its own; what each tensor means is in `kernels.bnb`. A folder with
these tensors, and `quantization_config` in its config.json, is one that transformers loads by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from kernels.bnb import NF4_BLOCK_SIZE, NF4_NESTED_BLOCK_SIZE, import_bitsandbytes
from lite.errors import BackendUnavailable

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

BnbFormat = Literal["bnb-nf4", "bnb-int8"]


def quantize_nf4(weight: Tensor) -> dict[str, Tensor]:
    """Quantise one weight to NF4: blocks of 64, their magnitudes quantised once more.

    Args:
        weight: [out, in], finite, in float16 or float32, on any device, where it is quantised too; `in` is a multiple
            of 64, so that no block crosses from one row into the next. The dtype becomes that of the JSON text, in
            which tools like peft expand the weight: pass float16 for a folder of float16.

    Returns:
        The tensors of `kernels.bnb.Nf4Weight.from_tensors`, contiguous, on the CPU.

    Raises:
        BackendUnavailable: bitsandbytes is not installed, or does not load.
    """
    quantised, state = _bitsandbytes().functional.quantize_4bit(
        weight.detach().contiguous(), blocksize=NF4_BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
    )
    if state.state2.blocksize != NF4_NESTED_BLOCK_SIZE:
        msg = f"got magnitudes quantised in blocks of {state.state2.blocksize} by bitsandbytes · expected "
        raise BackendUnavailable(f"{msg}{NF4_NESTED_BLOCK_SIZE} · install a version named in pyproject.toml")
    tensors = {"weight": quantised} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return _on_cpu(tensors)


def quantize_int8(weight: Tensor) -> dict[str, Tensor]:
    """Quantise one weight to int8, a magnitude per row.

    Args:
        weight: [out, in] that fits float16, to which the library rounds it first; on any device, where it is quantised.

    Returns:
        The tensors of `kernels.bnb.Int8Weight.from_tensors`, contiguous, on the CPU.

    Raises:
        BackendUnavailable: bitsandbytes is not installed, or does not load.
    """
    rounded = weight.detach().to(torch.float16).contiguous()
    quantised, scb, _ = _bitsandbytes().functional.int8_vectorwise_quant(rounded)
    # A row of zeros is divided by its magnitude, and what a NaN becomes in int8 depends on the machine.
    quantised = quantised.masked_fill(scb.unsqueeze(-1) == 0, 0)
    return _on_cpu({"weight": quantised, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)})


def quantization_config(decoder_format: BnbFormat) -> dict[str, Any]:
    """Return what config.json holds under "quantization_config".

    The head stays in 16 bit, as it does wherever transformers quantises a causal model.

    `llm_int8_threshold` is read by other tools only: the ops of `kernels.bnb` do not quantise activations. It is the
    6.0 of the paper, transformers' default: from it upwards an activation's column is computed in 16 bit. 0 would round
    every activation, the outliers of a Llama included, and those are what a decoder loses most by.
    """
    shared: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}
    if decoder_format == "bnb-int8":
        return {
            **shared,
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
        }
    return {
        **shared,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8",
    }


def _bitsandbytes() -> ModuleType:
    try:
        return import_bitsandbytes()
    except ImportError as error:
        msg = f'got no bitsandbytes ({error}) · expected it to quantise with · pip install "llava-rad-lite[bnb]"'
        raise BackendUnavailable(msg) from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
