"""Whether other programs read `decoder/` as this project does: `make interop`, `python -m benchmarks quality interop`.

A folder in a known format is worth what other readers make of it. Each artifact's is read twice:

    decoder/ ─┬─ by the torch engine, in float32 ─▶ logits
              └─ by a peer (transformers with gptqmodel or bitsandbytes, gptqmodel; `interop_peer` in its environment)
                                                 ─▶ its kernels ─▶ logits

and compared twice. *Weights*: the peer's own linears are given the identity matrix, so that what comes out are the
weights its kernel really multiplies with. They have to be ours bit for bit, after a rounding that is named; a kernel
that computes in bfloat16 rounds the scales too. *Logits*: Kullback-Leibler divergence per token, on fixed random ids.

Scales of GPTQ are of either sign. How many of a folder's are negative is printed: a reader that takes them for
magnitudes is found out by such a folder only.
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

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from kernels.bnb import Int8Weight, Nf4Weight
from kernels.gptq import GptqWeight
from lite.artifact.open import Artifact, load_artifact
from lite.bench.table import markdown_table, to_json
from lite.console import say
from lite.engines.protocol import Segment
from lite.engines.torch_engine.linear import Weight, linears_of
from lite.engines.torch_engine.load import load_decoder, parts_of
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A decoder folder, read by this project."""

    path: Path
    format: str  # "gptq-int4", "gptq-int8", "bnb-nf4", "bnb-int8" or "16 bits"
    group_size: int | None
    linears: dict[str, Weight]  # by module name
    logits: NDArray[np.float32]  # [NUM_SEQUENCES, SEQUENCE_LENGTH, vocabulary]
    input_ids: list[list[int]]  # what they are on

    def count_scales(self) -> tuple[int, int]:
        """Return how many of GPTQ's scales are negative, and how many there are."""
        scales = [weight.scales for weight in self.linears.values() if isinstance(weight, GptqWeight)]
        return sum(int((each < 0).sum()) for each in scales), sum(each.numel() for each in scales)


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


def read_folder(artifact: Artifact) -> Folder:
    """Read an artifact's `decoder/` by the torch engine.

    Raises:
        LiteError: it cannot.
    """
    decoder, quantization = load_decoder(artifact, device="cpu"), artifact.decoder_config().quantization
    linears = linears_of(decoder)
    by_part = {name: dict(zip(linear.parts, linear.weights, strict=True)) for name, linear in linears.items()}
    parts = {module: by_part[name][part] for module, (name, part) in parts_of(linears).items()}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (NUM_SEQUENCES, SEQUENCE_LENGTH), generator=generator).tolist()
    cache, logits = decoder.new_cache(NUM_SEQUENCES, SEQUENCE_LENGTH), []
    for row, input_ids in enumerate(ids):
        asked: Segment[Any] = Segment(
            row=row, start=0, input_ids=tuple(input_ids), image_features=None, num_logits=SEQUENCE_LENGTH
        )
        logits.append(decoder.logits(asked, cache))
    return Folder(
        path=artifact.path / "decoder",
        format=quantization.format if quantization is not None else "16 bits",
        group_size=quantization.group_size if quantization is not None else None,
        # The 16-bit parts of a quantised decoder are read as such.
        linears={name: own for name, own in parts.items() if not quantization or not isinstance(own, torch.Tensor)},
        logits=np.stack(logits),
        input_ids=ids,
    )


def _roundings(weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """Yield a weight as kernels may hold it, in float32 [N, K], each with the name of its rounding."""
    ours = _dense(weight)
    yield "float32", ours
    yield "float16", ours.half().float()
    if isinstance(weight, GptqWeight):
        scaled = dataclasses.replace(weight, scales=weight.scales.bfloat16())
        yield "bfloat16, scales too", _dense(scaled).bfloat16().float()
    if isinstance(weight, Nf4Weight):  # bitsandbytes does that on a CPU that multiplies bfloat16, with the codes, too
        rounded = dataclasses.replace(weight, quant_map=weight.quant_map.bfloat16().float())
        scales = weight.block_scales().bfloat16().float()
        yield "bfloat16, scales too", rounded.rows(0, len(scales), torch.float32, scales).bfloat16().float()
    yield "bfloat16", ours.bfloat16().float()


def _dense(weight: Weight) -> Tensor:
    return weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)


# -- Comparing -------------------------------------------------------------------------------------------------------


def request_of(folder: Folder) -> dict[str, Any]:
    """Return what `interop_peer` is asked."""
    return {
        "folder": str(folder.path.resolve()),
        "format": folder.format,
        "group_size": folder.group_size,
        "linears": list(folder.linears),
        "input_ids": folder.input_ids,
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
    with tempfile.TemporaryDirectory(prefix="interop-") as work:
        (Path(work) / "request.json").write_text(json.dumps(request_of(folder)), encoding="utf-8")
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
            compare(folder, reader, answer, Path(work) / f"{reader}.safetensors")
            for reader, answer in document["answers"].items()
        ]
    if any("failed" in answer for answer in document["answers"].values()):
        say(textwrap.indent(done.stderr.strip(), "  | "))
    if all(row.skipped for row in rows):  # a gate that nothing went through is not passed
        rows[-1] = dataclasses.replace(rows[-1], wrong="no peer read this folder")
    return rows, document["versions"]


def compare(folder: Folder, reader: str, answer: Mapping[str, str], file: Path) -> Comparison:
    """Compare what a peer made of a folder with our reading.

    Args:
        folder: our reading.
        reader: the peer.
        answer: what it says of itself: see `interop_peer.read`.
        file: with its weights and logits.
    """
    if "skipped" in answer:
        return Comparison(reader=reader, skipped=answer["skipped"])
    if "failed" in answer:
        return Comparison(reader=reader, wrong=f"cannot read it: {answer['failed']}")
    found = load_file(file)
    theirs, dtype = found.pop("logits").numpy(), answer["dtype"]
    weights, exact = _compare_weights(folder, found)
    wrong = [] if exact else ["the weights differ"]
    try:
        ours = np.concatenate(folder.logits)
        apart = compare_logits(ours, np.concatenate(theirs), [0] * len(ours))
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
        max_abs_logits=float(np.abs(theirs - folder.logits).max()),
        mean_kl=mean_kl,
        same_top=float(apart.same_top.mean()),
        wrong="; ".join(wrong),
    )


def _compare_weights(folder: Folder, found: Mapping[str, Tensor]) -> tuple[str, bool]:
    """Return how the peer's weights compare with ours, and whether every linear's are ours after a known rounding."""
    as_what: set[str] = set()
    for name, weight in folder.linears.items():
        if name not in found:
            return f"{name}: not there", False
        candidates = [(kind, (ours - found[name]).abs()) for kind, ours in _roundings(weight)]
        # bitsandbytes multiplies three float32 numbers, then rounds to float16: at times to the neighbour of ours.
        allowed = (2**-10 if isinstance(weight, Int8Weight) else 0) * _dense(weight).abs()
        # Written so that NaN is a difference. The rounding meant is the one that explains most.
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
    for path in arguments.artifacts:
        folder = read_folder(load_artifact(path))
        rows, document["versions"] = check(folder, arguments.python)
        negative, scales = folder.count_scales()
        document["folders"][str(folder.path)] = {
            "scales": scales,
            "negative_scales": negative,
            "readings": [to_json(row) for row in rows],
        }
        every += rows
        if not arguments.json:
            form = f"{folder.format}, {len(folder.linears)} linears"
            form += f", {negative} of {scales} scales negative" if scales else ""
            sys.stdout.write(f"{folder.path}: {form}\n\n{table(rows)}\n\n")
            sys.stdout.flush()
    compared = [row for row in every if not row.skipped]
    if arguments.json:
        sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    else:
        versions = ", ".join(f"{package} {version}" for package, version in document["versions"].items())
        agree = f"{sum(not row.wrong for row in compared)} of {len(compared)} readings agree with ours"
        sys.stdout.write(f"{versions}\n{agree}, on {NUM_SEQUENCES} sequences of {SEQUENCE_LENGTH} random ids.\n")
    return int(any(row.wrong for row in every))
