"""Whether other programs read `decoder/` as it is meant: `make interop`.

A folder in a known format is worth what other readers make of it. Here each folder is read twice:

    decoder/ ─┬─ by this file: safetensors, unpacked here, w = scale · (q − zero) ────▶ dense float32 Llama ─▶ logits
              └─ by a peer: transformers with gptqmodel or bitsandbytes, gptqmodel ───▶ its own kernels     ─▶ logits

and compared twice. *Weights*: the peer's own linears are given the identity matrix, so that what comes out are the
weights its kernel really multiplies with. They have to be ours bit for bit, after a rounding that is named; a kernel
that computes in bfloat16 rounds the scales too. *Logits*: Kullback-Leibler divergence per token, on fixed random ids.

This is a script for an environment of its own, whose packages are in `interop-requirements.txt` beside it. It imports
nothing else of this project: a peer has no need of it, and transformers looks for a package that has the name of our
folder `kernels`. Run it with `python -I`, which keeps the folders of the checkout off the path.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

NUM_SEQUENCES: Final = 4
SEQUENCE_LENGTH: Final = 64
SEED: Final = 0
MAX_KL: Final = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2, "int8": 5e-2}
"""Nats per token, by what the peer's linears compute in: what rounding explains. Most of it comes from the activations,
and from how sharp a model is: at most 4e-7, 3e-6, 2e-4 and 2e-2 were seen on the phantom model, and in bfloat16 3e-3 on
random weights. It is there for all that is not a linear's weight (norms, rotary embedding, head), and GPTQ folders have
a reader in float32. int8 is bitsandbytes' LLM.int8(), which rounds activations to 8 bit."""
PACKAGES: Final = (
    "torch",
    "transformers",
    "optimum",
    "gptqmodel",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "numpy",
)

_PROBE_ROWS: Final = 512  # of the identity at a time


class InteropError(Exception):
    """A folder that cannot be read or a peer that is missing; the message says what to do.

    Not a `LiteError`: the environment of the peers does not have this project.
    """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One quantised linear, read by this file."""

    weight: Tensor  # float32 [N, K], exact: integer times scale
    rounded_scales: Tensor | None = None  # the same from scales rounded to bfloat16 first; None where nobody does that
    last_bit: float = 0.0  # relative difference that a peer's order of multiplications makes

    def roundings(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights as kernels may hold them, in float32, each with the name of its rounding."""
        yield "float32", self.weight
        yield "float16", self.weight.half().float()
        if self.rounded_scales is not None:
            yield "bfloat16, scales too", self.rounded_scales.bfloat16().float()
        yield "bfloat16", self.weight.bfloat16().float()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A decoder folder, read by this file."""

    path: Path
    config: dict[str, Any]
    format: str  # "gptq", "nf4", "int8", or the dtype of weights that are not quantised
    bits: int
    group_size: int | None  # of GPTQ: inputs that share a scale, -1 for all
    linears: dict[str, Linear]  # by module name
    dense: dict[str, Tensor]  # everything else, float32

    def __str__(self) -> str:
        """Return a line about it."""
        group = "" if self.group_size is None else f", group size {self.group_size}"
        return f"{self.path}: {self.format}, {self.bits} bits{group}, {len(self.linears)} quantised linears"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A peer that reads a folder."""

    name: str
    needs: tuple[str, ...]
    load: Callable[[Path], Any]  # returns a model whose `logits` are asked for
    refuses: Callable[[Folder], str | None] = lambda _: None
    """Why it cannot read a folder, where that is known not to be the folder's fault."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One folder and one peer."""

    folder: str
    format: str
    bits: int
    group_size: int | None
    reader: str
    kernel: str = ""  # the classes of the linears that ran
    dtype: str = ""  # what they compute in
    weights: str = ""  # "ours as …" where all are, or the first that differs
    max_abs_logits: float | None = None
    relative: float | None = None  # root mean square of the difference, relative to that of the logits
    mean_kl: float | None = None  # nats per token
    same_top: float | None = None
    skipped: str = ""  # why it was not asked
    wrong: str = ""  # what disagrees; figures are None when there is nothing to compare


def read_folder(path: Path) -> Folder:
    """Read an artifact's `decoder/`, or such a folder itself.

    Raises:
        InteropError: it is not there, not a Llama folder, or in a format that is not known here.
    """
    folder = path / "decoder" if (path / "decoder").is_dir() else path
    config_file, weights = folder / "config.json", sorted(folder.glob("*.safetensors"))
    if not config_file.is_file() or not weights:
        msg = (
            f"{path}: got no config.json with *.safetensors there or in its decoder/ · expected an artifact or a "
            "decoder folder · `make interop` exports some, or: python -m export --help"
        )
        raise InteropError(msg)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for file in weights:
        with safe_open(file, framework="pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    group_size = None
    if method is None:
        name, linears = str(config.get("dtype") or config.get("torch_dtype")), {}
        bits = next(iter(tensors.values())).element_size() * 8
    elif method == "gptq":
        name, bits, group_size = "gptq", int(quantization["bits"]), int(quantization["group_size"])
        stored_as = quantization.get("checkpoint_format", "gptq")
        if stored_as != "gptq":
            msg = f"{folder}: got checkpoint_format {stored_as!r} · expected 'gptq' (version 1) · export it as that"
            raise InteropError(msg)
        linears = _gptq_linears(tensors, folder)
    elif method == "bitsandbytes":
        name, bits = ("nf4", 4) if quantization.get("load_in_4bit") else ("int8", 8)
        linears = _nf4_linears(tensors) if bits == 4 else _int8_linears(tensors)
    else:
        msg = f"{folder}: got quant_method {method!r} · expected gptq, bitsandbytes or none · export it as one of these"
        raise InteropError(msg)
    if method is not None and not linears:
        msg = f"{folder}: got quant_method {method!r} and no quantised weight · expected some · export it again"
        raise InteropError(msg)
    dense = {name: tensor.float() for name, tensor in tensors.items()}
    return Folder(
        path=folder, config=config, format=name, bits=bits, group_size=group_size, linears=linears, dense=dense
    )


def _modules(tensors: Mapping[str, Tensor], suffix: str) -> list[str]:
    return [name.removesuffix(suffix) for name in sorted(tensors) if name.endswith(suffix)]


def _gptq_linears(tensors: dict[str, Tensor], folder: Path) -> dict[str, Linear]:
    """Unpack GPTQ version 1, taking its tensors out of `tensors`.

    How many bits a linear has is told by its shapes: lm_head may have more than the rest.
    """
    linears = {}
    for module in _modules(tensors, ".qweight"):
        try:
            qweight, qzeros, scales, g_idx = (
                tensors.pop(f"{module}.{name}") for name in ("qweight", "qzeros", "scales", "g_idx")
            )
        except KeyError as error:
            msg = f"{folder}: got no {error.args[0]} · expected qweight, qzeros, scales and g_idx · export it again"
            raise InteropError(msg) from error
        group = g_idx.long()
        bits = 32 * len(qweight) // len(group)
        if bits not in (4, 8):
            got = f"{len(qweight)} rows of words for {len(group)} inputs"
            msg = f"{folder}: {module}: got {got} · expected 4 or 8 bits for each · export again"
            raise InteropError(msg)
        q = unpack_rows(qweight, bits)  # [K, N]
        # Version 1 stores zero - 1; what comes out of a field of all ones is 2^bits, not 0.
        zero = unpack_rows(qzeros.T, bits).T + 1  # [groups, N]
        if q.shape != (len(group), scales.shape[1]) or zero.shape != scales.shape:
            got = f"qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)}, scales {list(scales.shape)}"
            msg = f"{folder}: {module}: got {got} for {len(group)} inputs · expected shapes that fit · export again"
            raise InteropError(msg)
        integers = (q - zero[group]).float()
        linears[module] = Linear(
            weight=(scales.float()[group] * integers).T.contiguous(),
            rounded_scales=(scales.bfloat16().float()[group] * integers).T.contiguous(),
        )
    return linears


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 [R, C] to int64 [R · 32 / bits, C], the fields of a word along the rows, low bits first."""
    unsigned = words.long() & 0xFFFFFFFF
    fields = [(unsigned >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
    return torch.stack(fields, dim=1).flatten(0, 1)


def _nf4_linears(tensors: dict[str, Tensor]) -> dict[str, Linear]:
    """Expand bitsandbytes' NF4 with or without double quantisation, taking its tensors out of `tensors`."""
    linears = {}
    for module in _modules(tensors, ".weight.quant_state.bitsandbytes__nf4"):
        state = json.loads(tensors.pop(f"{module}.weight.quant_state.bitsandbytes__nf4").numpy().tobytes())
        codes, absmax, quant_map = (
            tensors.pop(f"{module}.weight{name}").flatten() for name in ("", ".absmax", ".quant_map")
        )
        if "nested_blocksize" in state:
            nested, nested_map = (
                tensors.pop(f"{module}.weight.{name}") for name in ("nested_absmax", "nested_quant_map")
            )
            block = torch.arange(len(absmax)) // int(state["nested_blocksize"])
            absmax = nested_map[absmax.long()] * nested[block] + state["nested_offset"]
        values = quant_map[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()]
        blocks = values.view(-1, int(state["blocksize"])) * absmax[:, None]
        linears[module] = Linear(weight=blocks.view(state["shape"]))
    return linears


def _int8_linears(tensors: dict[str, Tensor]) -> dict[str, Linear]:
    """Expand bitsandbytes' int8 rows, taking their tensors out of `tensors`."""
    linears = {}
    for module in _modules(tensors, ".SCB"):
        tensors.pop(f"{module}.weight_format", None)
        weight, scale = tensors.pop(f"{module}.weight").float(), tensors.pop(f"{module}.SCB").float()
        # The kernel multiplies three float32 numbers, then rounds to float16: at times to the neighbour of ours.
        linears[module] = Linear(weight=weight * (scale / 127)[:, None], last_bit=2**-10)
    return linears


def sequences(vocab_size: int) -> Tensor:
    """Return the ids that every model is asked about, int64 [NUM_SEQUENCES, SEQUENCE_LENGTH]."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocab_size, (NUM_SEQUENCES, SEQUENCE_LENGTH), generator=generator)


def our_logits(folder: Folder) -> Tensor:
    """Compute the logits with plain float32 weights and no quantisation code, [sequences, positions, vocabulary].

    Raises:
        InteropError: the folder's tensors are not those of its config.
    """
    with _listening(io.StringIO()):  # torchao, which transformers imports where it is, talks of GPUs
        from transformers import LlamaConfig, LlamaForCausalLM

    plain = {key: value for key, value in folder.config.items() if key not in ("quantization_config", "dtype")}
    model: Any = LlamaForCausalLM(LlamaConfig(**(plain | {"attn_implementation": "eager"})))
    weights = folder.dense | {f"{name}.weight": linear.weight for name, linear in folder.linears.items()}
    try:
        model.float().load_state_dict(weights)
    except RuntimeError as error:
        msg = f"{folder.path}: got tensors other than its config.json has ({error}) · export it again"
        raise InteropError(msg) from error
    return _logits(model, folder)


def _logits(model: Any, folder: Folder) -> Tensor:  # noqa: ANN401 - a peer's model
    with torch.inference_mode():
        logits: Tensor = model.eval()(sequences(folder.config["vocab_size"]), use_cache=False).logits
    return logits.float()


def compare(folder: Folder, reader: Reader, ours: Tensor) -> Comparison:
    """Read a folder by a peer, and compare its weights and logits with ours.

    Args:
        folder: as this file reads it.
        reader: the peer.
        ours: the logits of `our_logits`.
    """
    head = Comparison(
        folder=str(folder.path),
        format=folder.format,
        bits=folder.bits,
        group_size=folder.group_size,
        reader=reader.name,
    )
    missing = [package for package in reader.needs if importlib.util.find_spec(package) is None]
    if missing:
        todo = "run this by `make interop`"
        return dataclasses.replace(head, skipped=f"{' and '.join(missing)} not installed: {todo}")
    if (reason := reader.refuses(folder)) is not None:
        return dataclasses.replace(head, skipped=reason)
    said = io.StringIO()
    try:
        with _listening(said):
            model = reader.load(folder.path)
            kernels, computes_in, theirs = _run(model, folder)
            weights, exact = _compare_weights(model, folder)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is the answer, and the next peer is asked
        sys.stderr.write(textwrap.indent(said.getvalue(), "  | ") + "\n")
        return dataclasses.replace(head, wrong=f"cannot read it: {type(error).__name__}: {error}")
    log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
    mean_kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean().clamp_min(0))
    wrong = [] if exact else ["the weights differ"]
    # NaN is no agreement either.
    if not mean_kl <= MAX_KL[computes_in]:
        wrong.append(f"KL {mean_kl:.2g} above {MAX_KL[computes_in]:g}, what rounding to {computes_in} explains")
    return dataclasses.replace(
        head,
        kernel=kernels,
        dtype=computes_in,
        weights=weights,
        max_abs_logits=float((theirs - ours).abs().max()),
        relative=float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt()),
        mean_kl=mean_kl,
        same_top=float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()),
        wrong="; ".join(wrong),
    )


@contextlib.contextmanager
def _listening(said: io.StringIO) -> Iterator[None]:
    """Keep what the peers print to themselves: greetings, warnings and progress bars, of interest when they fail."""
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _asked(model: Any, folder: Folder) -> dict[str, Any]:  # noqa: ANN401 - a peer's model
    """Return the modules of the peer's model that stand for the quantised linears, or for all linears."""
    modules = dict(model.named_modules())
    names = list(folder.linears) or [n for n, module in modules.items() if isinstance(module, torch.nn.Linear)]
    return {name: modules[name] for name in names}


def _run(model: Any, folder: Folder) -> tuple[str, str, Tensor]:  # noqa: ANN401 - a peer's model
    """Return the classes of the linears that ran, what they compute in, and the logits."""
    ran: set[str] = set()
    dtypes: set[str] = set()

    def note(module: Any, inputs: tuple[Tensor, ...], _: object) -> None:  # noqa: ANN401
        kernel = type(module).__name__
        ran.add(kernel)
        # These compute in another type than they are given.
        own = {"TorchAtenLinear": "bfloat16", "TorchFusedLinear": "bfloat16", "Linear8bitLt": "int8"}
        dtypes.add(own.get(kernel, str(inputs[0].dtype).removeprefix("torch.")))

    hooks = [module.register_forward_hook(note) for module in _asked(model, folder).values()]
    logits = _logits(model, folder)
    for hook in hooks:
        hook.remove()
    # The coarsest decides what rounding explains.
    return " ".join(sorted(ran)), max(dtypes, key=MAX_KL.__getitem__), logits


def _compare_weights(model: Any, folder: Folder) -> tuple[str, bool]:  # noqa: ANN401 - a peer's model
    """Return how the peer's weights compare with ours, and whether every linear's are ours after a known rounding."""
    as_what: set[str] = set()
    for name, module in _asked(model, folder).items():
        ours = folder.linears[name] if name in folder.linears else Linear(weight=folder.dense[f"{name}.weight"])
        theirs = _applied_weight(module, ours.weight.shape[1], next(iter(model.parameters())).dtype)
        candidates = [(kind, (weight - theirs).abs()) for kind, weight in ours.roundings()]
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


def _applied_weight(module: Any, in_features: int, dtype: torch.dtype) -> Tensor:  # noqa: ANN401 - a peer's linear
    """Return what a linear multiplies with, float32 [N, K], whatever it keeps it as: its outputs for the identity."""
    rows = []
    for start in range(0, in_features, _PROBE_ROWS):
        identity = torch.zeros(min(_PROBE_ROWS, in_features - start), in_features, dtype=dtype)
        identity.diagonal(start).fill_(1)
        with torch.inference_mode():
            rows.append(module(identity).float())
    return torch.cat(rows).T.contiguous()


def _load_by_transformers(folder: Path, **options: Any) -> Any:  # noqa: ANN401 - what from_pretrained takes
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def _load_gptq_in_float32(folder: Path) -> Any:  # noqa: ANN401 - a peer's model
    """Load a GPTQ folder into gptqmodel's plain torch kernel, with float32 activations."""
    from transformers import GPTQConfig

    bits = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["bits"]
    # Only `backend` counts: all else is taken from the folder.
    chosen = GPTQConfig(bits=bits, backend="gptq_torch")
    return _load_by_transformers(folder, quantization_config=chosen, dtype=torch.float32)


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


def _beyond_its_choice(folder: Folder) -> str | None:
    """Say what the kernel that gptqmodel chooses by itself cannot do (7.6)."""
    if folder.bits == 4 and folder.group_size == -1:
        return "for 4 bits and group size -1 it chooses TorchFusedLinear, which torch has no such product for"
    return None


def _beyond_transformers(folder: Folder) -> str | None:
    """Say what transformers cannot read (5.23, optimum 2.3)."""
    if "lm_head" in folder.linears:
        return "it leaves a quantised lm_head unread, and puts random weights in its place"
    return None


def readers(folder: Folder) -> list[Reader]:
    """Return the peers that read a format."""
    if folder.format == "gptq":
        peers = ("gptqmodel", "optimum", "accelerate")
        return [
            Reader(
                name="transformers",
                needs=peers,
                load=_load_by_transformers,
                refuses=lambda f: _beyond_transformers(f) or _beyond_its_choice(f),
            ),
            Reader(
                name="transformers, gptq_torch", needs=peers, load=_load_gptq_in_float32, refuses=_beyond_transformers
            ),
            Reader(name="gptqmodel", needs=peers, load=_load_by_gptqmodel, refuses=_beyond_its_choice),
        ]
    needs = ("bitsandbytes", "accelerate") if folder.linears else ()
    return [Reader(name="transformers", needs=needs, load=_load_by_transformers)]


def versions() -> dict[str, str]:
    """Return the version of Python and of every package that has a say."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def table(comparisons: Sequence[Comparison]) -> str:
    """Return the comparisons of one folder, a line each, and one more for what is wrong."""
    heads = f"{'max |Δ|':>8} {'relative':>8} {'KL':>8} {'top':>7}  weights"
    lines = [f"  {'reader':<25} {'kernel':<16} {'computes in':<11} {heads}"]
    for row in comparisons:
        if row.skipped:
            lines.append(f"  {row.reader:<25} skipped: {row.skipped}")
        elif row.kernel:
            figures = f"{row.max_abs_logits:8.2g} {row.relative:8.2g} {row.mean_kl:8.2g} {row.same_top:7.2%}"
            lines.append(f"  {row.reader:<25} {row.kernel:<16} {row.dtype:<11} {figures}  {row.weights}")
        if row.wrong:
            lines.append(f"  {row.reader:<25} WRONG: {row.wrong}")
    return "\n".join(lines)


def check(paths: Sequence[Path], say: Callable[[str], None]) -> list[Comparison]:
    """Compare every peer on every folder.

    Args:
        paths: artifacts or decoder folders.
        say: takes the lines for people, as they are known.

    Raises:
        InteropError: a folder cannot be read by this file.
    """
    comparisons: list[Comparison] = []
    for path in paths:
        folder = read_folder(path)
        ours = our_logits(folder)
        rows = [compare(folder, reader, ours) for reader in readers(folder)]
        if all(row.skipped for row in rows):  # a gate that nothing went through is not passed
            rows[-1] = dataclasses.replace(rows[-1], wrong="no peer read this folder")
        say(f"{folder}\n{table(rows)}\n")
        comparisons += rows
    return comparisons


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="interop.py",
        description="Read decoder folders by other programs, and compare weights and logits with our own reading. "
        "Both models are in memory, one of them in float32: made for small ones.",
        epilog="exit status: 0 all agree, 1 a peer disagrees or cannot read a folder, 2 wrong use",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="an artifact, or a decoder folder")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    # Nothing here is worth a download, nor gptqmodel's compiling of every linear's unpacking.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TORCHDYNAMO_DISABLE": "1"}
    found = versions()

    def say(text: str) -> None:
        if not options.json:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    say(", ".join(f"{package} {version}" for package, version in found.items()))
    say(f"Logits for {NUM_SEQUENCES} sequences of {SEQUENCE_LENGTH} random ids, KL in nats per token.\n")
    try:
        comparisons = check(options.folders, say)
    except InteropError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    wrong = [row for row in comparisons if row.wrong]
    if options.json:
        document = {"versions": found, "comparisons": [dataclasses.asdict(row) for row in comparisons]}
        sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    compared = [row for row in comparisons if not row.skipped]
    say(f"{sum(not row.wrong for row in compared)} of {len(compared)} readings agree with ours.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
