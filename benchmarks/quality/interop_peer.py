"""How other programs read a decoder folder: a script for their own environment, `python -I interop_peer.py WORK`.

    WORK/request.json        folder, format, group_size, linears (names), input_ids
    WORK/answers.json        for each reader: kernel and dtype of what ran, or why it was skipped or what failed
    WORK/READER.safetensors  "logits", and by the name of each linear the weight that it really multiplies with

Its packages are in `interop-requirements.txt` beside it. It imports nothing else of this project: transformers looks
for a package that has the name of our folder `kernels`. `-I` keeps the checkout off the path.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PACKAGES: Final = ("torch", "transformers", "optimum", "gptqmodel", "accelerate", "bitsandbytes", "safetensors")
_PROBE_ROWS: Final = 512  # of the identity at a time
# These compute in another type than they are given.
_COMPUTES_IN: Final = {"TorchAtenLinear": "bfloat16", "Linear8bitLt": "int8"}
# The coarsest decides what rounding explains.
_COARSEST_FIRST: Final = ("int8", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be read."""

    folder: Path
    format: str  # "gptq-int4", "gptq-int8", "bnb-nf4", "bnb-int8" or "16 bits"
    group_size: int | None  # of GPTQ: inputs that share a scale, -1 for all
    linears: list[str]
    input_ids: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A peer that reads a folder."""

    name: str
    needs: tuple[str, ...]
    load: Callable[[Path], Any]  # returns a model whose `logits` are asked for
    refuses: Callable[[Request], str | None] = lambda _: None
    """Why it cannot read a folder, where that is known not to be the folder's fault."""


def read(request: Request, reader: Reader, out: Path) -> dict[str, str]:
    """Let a peer read the folder, and write what its linears and its logits are.

    Returns:
        kernel and dtype, or why it was "skipped", or how it "failed".
    """
    missing = [package for package in reader.needs if importlib.util.find_spec(package) is None]
    if missing:
        return {"skipped": f"{' and '.join(missing)} not installed: run this by `make interop`"}
    if (reason := reader.refuses(request)) is not None:
        return {"skipped": reason}
    try:
        answer, tensors = _ask(reader.load(request.folder), request)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is the answer, and the next peer is asked
        return {"failed": f"{type(error).__name__}: {error}"}
    save_file(tensors, out)
    return answer


def _ask(model: Any, request: Request) -> tuple[dict[str, str], dict[str, Tensor]]:  # noqa: ANN401 - a peer's model
    linears = {name: module for name, module in model.named_modules() if name in request.linears}
    kernels: set[str] = set()
    dtypes: set[str] = set()

    def note(module: Any, inputs: tuple[Tensor, ...], _: object) -> None:  # noqa: ANN401
        kernel = type(module).__name__
        kernels.add(kernel)
        given = str(inputs[0].dtype).removeprefix("torch.")
        # Linear4bit, on a CPU that multiplies bfloat16.
        given = "bfloat16" if getattr(module, "support_avx512bf16_for_cpu", False) else given
        dtypes.add(_COMPUTES_IN.get(kernel, given))

    hooks = [module.register_forward_hook(note) for module in linears.values()]
    with torch.inference_mode():
        logits = model.eval()(torch.tensor(request.input_ids), use_cache=False).logits.float().contiguous()
    for hook in hooks:
        hook.remove()
    dtype = next(iter(model.parameters())).dtype
    weights = {name: _applied_weight(module, dtype) for name, module in linears.items()}
    answer = {"kernel": " ".join(sorted(kernels)), "dtype": min(dtypes, key=_COARSEST_FIRST.index)}
    return answer, weights | {"logits": logits}


def _applied_weight(module: Any, dtype: torch.dtype) -> Tensor:  # noqa: ANN401 - a peer's linear
    """Return what a linear multiplies with, float32 [N, K], whatever it keeps it as: its outputs for the identity."""
    in_features, rows = module.in_features, []
    for start in range(0, in_features, _PROBE_ROWS):
        identity = torch.zeros(min(_PROBE_ROWS, in_features - start), in_features, dtype=dtype)
        identity.diagonal(start).fill_(1)
        with torch.inference_mode():
            rows.append(module(identity).float())
    return torch.cat(rows).T.contiguous()


# -- Readers ---------------------------------------------------------------------------------------------------------


def _load_by_transformers(folder: Path, **options: Any) -> Any:  # noqa: ANN401 - what from_pretrained takes
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _load_gptq_by(backend: str, dtype: torch.dtype, folder: Path) -> Any:  # noqa: ANN401 - a peer's model
    """Load a GPTQ folder into a kernel of gptqmodel that it would not choose by itself, with activations of a dtype."""
    from transformers import GPTQConfig

    bits = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["bits"]
    # Only `backend` counts: all else is taken from the folder.
    chosen = GPTQConfig(bits=bits, backend=backend)
    return _load_by_transformers(folder, quantization_config=chosen, dtype=dtype)


def _load_by_gptqmodel(folder: Path) -> Any:  # noqa: ANN401 - a peer's model
    """Load a folder by gptqmodel's own loader, which insists on a tokenizer: it gets one that knows no word."""
    tokenizers: Any = importlib.import_module("tokenizers")
    gptqmodel: Any = importlib.import_module("gptqmodel")
    transformers: Any = importlib.import_module("transformers")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = {token: index for index, token in enumerate(special.values())}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    with tempfile.TemporaryDirectory() as temporary:
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(temporary)
        for file in folder.iterdir():
            (Path(temporary) / file.name).symlink_to(file.resolve())
        loaded = gptqmodel.GPTQModel.load(temporary, device="cpu")
    return loaded.model


def _beyond_its_choice(request: Request) -> str | None:
    """Say what the kernel that gptqmodel chooses by itself cannot do (7.6)."""
    if request.format == "gptq-int4" and request.group_size == -1:
        return "for 4 bits and group size -1 it chooses TorchFusedLinear, which torch has no such product for"
    return None


def _beyond_fused(request: Request) -> str | None:
    """Say what torch's int4 product cannot do."""
    return "it is for 4 bits in groups" if request.format != "gptq-int4" or request.group_size == -1 else None


def _beyond_transformers(request: Request) -> str | None:
    """Say what transformers cannot read (5.23, optimum 2.3)."""
    if "lm_head" in request.linears:
        return "it leaves a quantised lm_head unread, and puts random weights in its place"
    return None


def readers(request: Request) -> list[Reader]:
    """Return the peers that read a format."""
    if request.format.startswith("gptq"):
        peers = ("gptqmodel", "optimum", "accelerate")
        return [
            Reader(
                name="transformers",
                needs=peers,
                load=_load_by_transformers,
                refuses=lambda asked: _beyond_transformers(asked) or _beyond_its_choice(asked),
            ),
            Reader(
                name="gptq_torch",
                needs=peers,
                load=partial(_load_gptq_by, "gptq_torch", torch.float32),
                refuses=_beyond_transformers,
            ),
            Reader(
                name="gptq_torch_fused",
                needs=peers,
                load=partial(_load_gptq_by, "gptq_torch_fused", torch.float16),
                refuses=lambda asked: _beyond_transformers(asked) or _beyond_fused(asked),
            ),
            Reader(name="gptqmodel", needs=peers, load=_load_by_gptqmodel, refuses=_beyond_its_choice),
        ]
    needs = ("bitsandbytes", "accelerate") if request.format.startswith("bnb") else ()
    return [Reader(name="transformers", needs=needs, load=_load_by_transformers)]


def versions() -> dict[str, str]:
    """Return the version of Python and of every package that has a say."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def main(work: Path) -> None:
    """Answer the request in a folder."""
    # Nothing here is worth a download, nor gptqmodel's compiling of every linear's unpacking.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TORCHDYNAMO_DISABLE": "1"}
    asked = json.loads((work / "request.json").read_text(encoding="utf-8"))
    request = Request(**asked | {"folder": Path(asked["folder"])})
    answers = {reader.name: read(request, reader, work / f"{reader.name}.safetensors") for reader in readers(request)}
    document = {"versions": versions(), "answers": answers}
    (work / "answers.json").write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
