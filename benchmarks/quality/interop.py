"""Whether other programs read `decoder/` as this project does: `make interop`, `python -m benchmarks quality interop`.

A folder in a known format is worth what other readers make of it. Each folder is read twice:

    decoder/ ─┬─ by `kernels`, expanded to float32 ──▶ dense Llama ─▶ logits
              └─ by a peer (transformers with gptqmodel or bitsandbytes, gptqmodel; `interop_peer` in its environment)
                                                  ───▶ its kernels ─▶ logits

and compared twice. *Weights*: the peer's own linears are given the identity matrix, so that what comes out are the
weights its kernel really multiplies with. They have to be ours bit for bit, after a rounding that is named; a kernel
that computes in bfloat16 rounds the scales too. *Logits*: Kullback-Leibler divergence per token, on fixed random ids.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import load_file

from kernels.bnb import Int8Weight, Nf4Weight
from kernels.gptq import GptqWeight
from lite.bench.table import markdown_table, to_json
from lite.config import DecoderConfig, Quantization
from lite.console import say
from lite.errors import LiteError
from lite.eval.divergence import compare_logits

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

NUM_SEQUENCES: Final = 4
SEQUENCE_LENGTH: Final = 64
MAX_KL: Final = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "int8": 5e-2}
"""Nats per token, by what the peer's linears compute in: what rounding explains. Most of it comes from the activations,
and from how sharp a model is: at most 4e-7, 3e-6, 2e-4 and 2e-2 were seen on the phantom model, and in bfloat16 3e-3 on
random weights. It is there for all that is not a linear's weight (norms, rotary embedding, head), and GPTQ folders have
a reader in float32. int8 is bitsandbytes' LLM.int8(), which rounds activations to 8 bit."""
# The ends of the names by which linears of a format are known.
_MARKS: Final[dict[str | None, tuple[str, ...]]] = {
    None: ("_proj.weight", "lm_head.weight"),
    "gptq-int4": (".qweight",),
    "gptq-int8": (".qweight",),
    "bnb-nf4": (".weight.quant_state.bitsandbytes__nf4",),
    "bnb-int8": (".SCB",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear's weight as this project expands it."""

    weight: Tensor  # float32 [N, K]
    rounded_scales: Tensor | None = None  # the same from scales rounded to bfloat16 first; None where nobody does that
    last_bit: float = 0.0  # relative difference that a peer's order of multiplications makes

    def roundings(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights as kernels may hold them, in float32, each with the name of its rounding."""
        yield "float32", self.weight
        yield "float16", self.weight.half().float()
        if self.rounded_scales is not None:
            yield "bfloat16, scales too", self.rounded_scales.bfloat16().float()
        yield "bfloat16", self.weight.bfloat16().float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A decoder folder, read by this project."""

    path: Path
    config: dict[str, Any]
    quantization: Quantization | None
    linears: dict[str, Linear]  # by module name
    others: dict[str, Tensor]

    @property
    def format(self) -> str:
        """How the linears are stored."""
        return "16 bits" if self.quantization is None else self.quantization.format

    def input_ids(self) -> Tensor:
        """Return the ids that every model is asked about, int64 [NUM_SEQUENCES, SEQUENCE_LENGTH]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.config["vocab_size"], (NUM_SEQUENCES, SEQUENCE_LENGTH), generator=generator)

    def logits(self) -> Tensor:
        """Compute logits [sequences, positions, vocabulary] with plain float32 weights and no quantisation code.

        Raises:
            LiteError: the folder's tensors are not those of its config.
        """
        from transformers import LlamaConfig, LlamaForCausalLM

        plain = {key: value for key, value in self.config.items() if key not in ("quantization_config", "dtype")}
        model: Any = LlamaForCausalLM(LlamaConfig(**(plain | {"attn_implementation": "eager"})))
        weights = self.others | {f"{name}.weight": linear.weight for name, linear in self.linears.items()}
        try:
            model.float().load_state_dict(weights)
        except RuntimeError as error:
            msg = f"{self.path}: got tensors other than its config.json has ({error}) · export it again"
            raise LiteError(msg) from error
        with torch.inference_mode():
            logits: Tensor = model.eval()(self.input_ids(), use_cache=False).logits
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One folder and one peer."""

    reader: str
    kernel: str = ""  # the classes of the linears that ran
    dtype: str = ""  # what they compute in
    weights: str = ""  # "ours in …" where all are, or the first that differs
    max_abs_logits: float | None = None
    mean_kl: float | None = None  # nats per token
    same_top: float | None = None
    skipped: str = ""  # why it was not asked
    wrong: str = ""  # what disagrees; figures are None when there is nothing to compare


def read_folder(path: Path) -> Folder:
    """Read an artifact's `decoder/`, or such a folder itself.

    Raises:
        LiteError: it is not there, not a Llama folder, or in a format that is not known here.
    """
    folder = path / "decoder" if (path / "decoder").is_dir() else path
    config_file, files = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if not config_file.is_file() or not files:
        msg = f"{path}: got no config.json with *.safetensors there or in its decoder/ · expected an artifact or a "
        raise LiteError(f"{msg}decoder folder · `make interop` exports some, or: python -m export --help")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    quantization = DecoderConfig.from_hf(config, where=str(config_file)).quantization
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    marks = _MARKS[quantization.format if quantization is not None else None]
    modules = sorted(key.rpartition(".weight")[0] or key.rpartition(".")[0] for key in tensors if key.endswith(marks))
    if not modules:
        raise LiteError(f"{folder}: got no linear in the format of its config.json · expected some · export it again")
    try:
        linears = {module: _expand(quantization, module, tensors) for module in modules}
    except ValueError as error:
        raise LiteError(f"{folder}: {error} · export it again") from error
    others = {key: tensor.float() for key, tensor in tensors.items()}
    return Folder(path=folder, config=config, quantization=quantization, linears=linears, others=others)


def _expand(quantization: Quantization | None, module: str, tensors: dict[str, Tensor]) -> Linear:
    """Take a linear's tensors out of `tensors`, and expand them."""
    prefix = f"{module}."
    own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
    stored = quantization.lm_head if quantization is not None and module == "lm_head" else quantization
    if stored is None:
        return Linear(weight=own["weight"].float())
    if stored.format == "bnb-nf4":
        return Linear(weight=Nf4Weight.from_tensors(own).dequantize(torch.float32))
    if stored.format == "bnb-int8":
        # The kernel multiplies three float32 numbers, then rounds to float16: at times to the neighbour of ours.
        return Linear(weight=Int8Weight.from_tensors(own).dequantize(torch.float32), last_bit=2**-10)
    gptq = GptqWeight.from_tensors(own, bits=stored.bits)
    rounded = dataclasses.replace(gptq, scales=gptq.scales.bfloat16())
    return Linear(weight=gptq.dequantize(torch.float32), rounded_scales=rounded.dequantize(torch.float32))


# -- Comparing -------------------------------------------------------------------------------------------------------


def request_of(folder: Folder) -> dict[str, Any]:
    """Return what `interop_peer` is asked."""
    return {
        "folder": str(folder.path.resolve()),
        "format": folder.format,
        "group_size": folder.quantization.group_size if folder.quantization is not None else None,
        "linears": list(folder.linears),
        "input_ids": folder.input_ids().tolist(),
    }


def check(folder: Folder, python: Path) -> tuple[list[Comparison], dict[str, str]]:
    """Let the peers of another environment read a folder, and compare.

    Args:
        folder: as this project reads it.
        python: of the environment.

    Returns:
        a comparison for each peer, and the versions of the peers.

    Raises:
        LiteError: there is no such environment, or it does not work.
    """
    request, ours = request_of(folder), folder.logits()
    with tempfile.TemporaryDirectory(prefix="interop-") as work:
        (Path(work) / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [str(python), "-I", str(Path(__file__).with_name("interop_peer.py")), work]
        try:
            done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", errors="replace")
        except OSError as error:
            msg = f"{python}: got {error.strerror} · expected the Python of the peers' environment · run: make interop"
            raise LiteError(msg) from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            msg = f"{python}: got exit status {done.returncode} ({said}) · expected answers · run it by itself"
            raise LiteError(msg)
        document = json.loads((Path(work) / "answers.json").read_text(encoding="utf-8"))
        rows = [
            compare(folder, ours, reader, answer, Path(work) / f"{reader}.safetensors")
            for reader, answer in document["answers"].items()
        ]
    if any("failed" in answer for answer in document["answers"].values()):
        say(textwrap.indent(done.stderr.strip(), "  | "))
    if all(row.skipped for row in rows):  # a gate that nothing went through is not passed
        rows[-1] = dataclasses.replace(rows[-1], wrong="no peer read this folder")
    return rows, document["versions"]


def compare(folder: Folder, ours: Tensor, reader: str, answer: Mapping[str, str], file: Path) -> Comparison:
    """Compare what a peer made of a folder with our reading.

    Args:
        folder: our reading.
        ours: its logits.
        reader: the peer.
        answer: what it says of itself: see `interop_peer.read`.
        file: with its weights and logits.
    """
    if "skipped" in answer:
        return Comparison(reader=reader, skipped=answer["skipped"])
    if "failed" in answer:
        return Comparison(reader=reader, wrong=f"cannot read it: {answer['failed']}")
    found = load_file(file)
    theirs, dtype = found.pop("logits"), answer["dtype"]
    weights, exact = _compare_weights(folder, found)
    wrong = [] if exact else ["the weights differ"]
    try:
        flat, rows = theirs.flatten(0, 1).numpy(), ours.flatten(0, 1).numpy()
        apart = compare_logits(rows, flat, [0] * len(flat))
    except LiteError as error:
        return Comparison(reader=reader, weights=weights, wrong="; ".join([*wrong, str(error)]))
    mean_kl = float(apart.kl.mean())
    if mean_kl > MAX_KL[dtype]:
        wrong.append(f"KL {mean_kl:.2g} above {MAX_KL[dtype]:g}, what rounding to {dtype} explains")
    return Comparison(
        reader=reader,
        kernel=answer["kernel"],
        dtype=dtype,
        weights=weights,
        max_abs_logits=float((theirs - ours).abs().max()),
        mean_kl=mean_kl,
        same_top=float(apart.same_top.mean()),
        wrong="; ".join(wrong),
    )


def _compare_weights(folder: Folder, found: Mapping[str, Tensor]) -> tuple[str, bool]:
    """Return how the peer's weights compare with ours, and whether every linear's are ours after a known rounding."""
    as_what: set[str] = set()
    for name, ours in folder.linears.items():
        if name not in found:
            return f"{name}: not there", False
        candidates = [(kind, (weight - found[name]).abs()) for kind, weight in ours.roundings()]
        # Written so that NaN is a difference. The rounding meant is the one that explains most.
        allowed = ours.last_bit * ours.weight.abs()
        counts = [(int((~(apart <= allowed)).sum()), int((apart != 0).sum())) for _, apart in candidates]
        best = counts.index(min(counts))
        (kind, apart), (different, inexact) = candidates[best], counts[best]
        if different:
            share = f"{different} of {apart.numel()} weights"
            return f"{name}: {share} differ from ours in {kind}, by {float(apart.max()):.2g} at most", False
        as_what.add(f"{kind} but for the last bit" if inexact else kind)
    return f"ours in {' and '.join(sorted(as_what))}", True


# -- Printing --------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Comparison]) -> str:
    """Return the comparisons of one folder, a line each, and one more for what is wrong."""
    header = ("reader", "kernel", "computes in", "max |Δ|", "KL", "same top", "weights")
    lines = []
    for row in rows:
        figures = ("–",) * 3
        if row.mean_kl is not None:
            figures = f"{row.max_abs_logits:.2g}", f"{row.mean_kl:.2g}", f"{row.same_top:.2%}"
        lines.append((row.reader, row.kernel, row.dtype, *figures, row.weights))
    skipped = [f"{row.reader} skipped: {row.skipped}" for row in rows if row.skipped]
    return "\n".join(
        [markdown_table(header, lines), *skipped, *(f"{r.reader} WRONG: {r.wrong}" for r in rows if r.wrong)]
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare folders, and print what came of it; return 1 when a peer disagrees, else 0.

    Raises:
        LiteError: a folder cannot be read by this project, or there are no peers.
    """
    document: dict[str, Any] = {"folders": {}}
    every: list[Comparison] = []
    for path in arguments.folders:
        folder = read_folder(path)
        rows, document["versions"] = check(folder, arguments.python)
        document["folders"][str(folder.path)] = [to_json(row) for row in rows]
        every += rows
        if not arguments.json:
            sys.stdout.write(f"{folder.path}: {folder.format}, {len(folder.linears)} linears\n\n{table(rows)}\n\n")
            sys.stdout.flush()
    compared = [row for row in every if not row.skipped]
    if arguments.json:
        sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    else:
        versions = ", ".join(f"{package} {version}" for package, version in document["versions"].items())
        agree = f"{sum(not row.wrong for row in compared)} of {len(compared)} readings agree with ours"
        sys.stdout.write(f"{versions}\n{agree}, on {NUM_SEQUENCES} sequences of {SEQUENCE_LENGTH} random ids.\n")
    return int(any(row.wrong for row in every))
