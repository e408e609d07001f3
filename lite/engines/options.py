"""What a caller may ask for when an artifact is loaded, and what excludes what.

`lite.load`, the command lines and `lite.bench` build a `LoadOptions`; their defaults are read from it.
`lite.engines.resolve.resolve` makes a plan of it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import TYPE_CHECKING, Final, Literal, NoReturn, TypedDict, get_args

from lite.artifact.parts import ImageMethod, PromptWeights
from lite.engines.protocol import EngineName
from lite.errors import BackendUnavailable, LiteError
from lite.memory.sizes import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

EngineChoice = Literal["auto", "torch", "onnx"]
Dtype = Literal["float32", "float16", "bfloat16"]
_DEVICE: Final = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a keyword argument that there is not, as Python does, and name those that there are.

    Raises:
        TypeError: there is one.
    """
    if unknown := sorted({*given} - {*known}):
        raise TypeError(f"got the option {unknown[0]!r} · expected some of {', '.join(known)} · leave it out")


class LoadArguments(TypedDict, total=False):
    """`LoadOptions` as keyword arguments."""

    engine: EngineChoice
    device: str
    dtype: Dtype | None
    provider: str | None
    cache_dtype: str | None
    prompt_weights: PromptWeights | None
    memory_limit: int | str | None
    fp16_accumulation: bool
    rows: int | None
    image_tokens: int | None
    image_method: ImageMethod
    drafts: str | os.PathLike[str]
    adapters: Sequence[str]
    verify: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How to load an artifact. Two options that exclude each other are refused when it is made.

    engine: "torch" computes `decoder/`; "onnx" computes `decoder.onnx`, without torch. "auto" takes torch if a GPU or a
        dtype is asked for; else onnx if the artifact has `decoder.onnx` and there is no GPU for torch, the CPU or a
        provider is asked for, or torch is not installed; and torch otherwise.
    device: "auto" (an NVIDIA GPU if torch sees one, or the CPU), "cpu", "cuda" or "cuda:N".
    dtype: what torch computes the decoder in. None takes the stored dtype on a GPU and float32 on the CPU: twice the
        memory of float16, and far less time where 16-bit products are slow.
    provider: what ONNX Runtime computes with, tower and decoder: a name of its own such as "CUDAExecutionProvider", or
        cpu, cuda; "cuda:1" for the second GPU. None takes the CPU for the decoder, and for the tower CUDA where the
        decoder is on a GPU and this ONNX Runtime has it.
    cache_dtype: what keys and values are kept in: "int8", or what the decoder computes in. None chooses: see `resolve`.
    prompt_weights: what the onnx engine reads prompts by: "int8", a second set of weights that some artifacts have for
        it, or "stored", those that tokens are decoded by. None takes int8 where the artifact has them, this CPU adds
        int8 products up exactly, and there is the memory: a byte for each weight.
    memory_limit: bytes, or text such as "12GiB": refuse, before anything is loaded, what would take more, and run as
        many studies at a time as fit. On a GPU all that the model has there counts, and None takes what is free; on a
        CPU what the process has resident, with all that it holds already, and None sets no limit.
    fp16_accumulation: let a GPU add up in float16 where a prompt is read: faster on GeForce cards, and less exact.
    rows: how many studies can be under way at a time. None: as many as fit, up to `MAX_ROWS`.
    image_tokens: how many tokens the decoder reads of a film. None: one of each patch, as published. Fewer cost less
        and lose something: `lite.bench --image-tokens` measures both.
    image_method: how patches become fewer: see `lite.image_tokens`.
    drafts: "auto" guesses how a text goes on by the texts that this process has made before, and has the decoder verify
        several tokens in one step where that pays: see `lite.session.drafting`. A path names a table of past texts to
        guess by, too (`python -m lite drafts build`). "off" decodes each token by itself.
    adapters: of the artifact, by name: those that requests may use. Each takes memory; one that no row uses, no time by
        torch, and by onnx what it reads of the adapters that are loaded.
    verify: compare the sha256 of the files that will be read with the manifest first: 12 s for the 14 GB of a 7B model
        at the 1.2 GB/s that hashing alone reached (one core of an AMD EPYC, November 2026).
    """

    engine: EngineChoice = "auto"
    device: str = "auto"
    dtype: Dtype | None = None
    provider: str | None = None
    cache_dtype: str | None = None
    prompt_weights: PromptWeights | None = None
    memory_limit: int | str | None = None
    fp16_accumulation: bool = False
    rows: int | None = None
    image_tokens: int | None = None
    image_method: ImageMethod = "diverse"
    drafts: str | os.PathLike[str] = "off"
    adapters: Sequence[str] = ()
    verify: bool = True

    def __post_init__(self) -> None:
        """Refuse what is not an option, and options that exclude each other.

        Raises:
            BackendUnavailable: there is no such device.
            LiteError: anything else.
        """
        if self.engine not in get_args(EngineChoice):
            _refuse(f"engine {self.engine!r}", ", ".join(get_args(EngineChoice)), "choose one of them")
        if not _DEVICE.fullmatch(str(self.device)):
            msg = f"got device {self.device!r} · expected auto, cpu, cuda or cuda:N · choose one of them"
            raise BackendUnavailable(msg)
        if self.dtype is not None and self.dtype not in get_args(Dtype):
            _refuse(f"dtype {self.dtype!r}", f"{', '.join(get_args(Dtype))} or None", "choose one of them")
        if self.prompt_weights not in (None, *get_args(PromptWeights)):
            _refuse(f"prompt_weights {self.prompt_weights!r}", "int8, stored or None", "choose one of them")
        if self.provider is not None and not isinstance(self.provider, str):
            _refuse(f"provider {self.provider!r}", "one name, a text such as cpu or cuda:1", "give only one")
        if self.rows is not None and (type(self.rows) is not int or self.rows < 1):
            _refuse(f"rows {self.rows!r}", "a whole number from 1", "leave it out for as many as fit")
        if not str(self.drafts or ""):
            _refuse(f"drafts {self.drafts!r}", "auto, off, or the path of a table", "choose one of them")
        if isinstance(self.adapters, str) or len(set(self.adapters)) < len(self.adapters):
            _refuse(f"adapters {self.adapters!r}", "a list of names, each once", "give a list: ['name']")
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit)
        self._check_exclusions()

    def _check_exclusions(self) -> None:
        for_torch = f"dtype {self.dtype!r}" if self.dtype is not None else f"device {self.device!r}"
        todo = "export decoder.onnx with --activations" if self.dtype is not None else "give a provider such as cuda"
        if self.asks_for_torch and self.asks_for_onnx:
            _refuse(f"{for_torch} for the onnx engine", "it for the torch engine only", todo)
        if self.engine == "torch" and self.provider is not None:
            _refuse(f"provider {self.provider!r} for the torch engine", "it for onnx only", "give a device")
        if self.provider is not None and self.device == "cpu" and not self.provider.lower().startswith("cpu"):
            _refuse(f"device 'cpu' and provider {self.provider!r}", "one of them", "leave one out")

        if self.prompt_weights == "int8" and (self.engine == "torch" or self.asks_for_torch):
            _refuse("prompt_weights 'int8' for the torch engine", "it for onnx only", "leave it out")

    @property
    def asks_for_torch(self) -> bool:
        """Whether something that only torch has is asked for."""
        return self.dtype is not None or self.device not in ("auto", "cpu")

    @property
    def asks_for_onnx(self) -> bool:
        """Whether the onnx engine is asked for, or something that only it has."""
        only_onnx = self.provider is not None or self.prompt_weights == "int8"
        return self.engine == "onnx" or (self.engine == "auto" and only_onnx)

    @property
    def limit_bytes(self) -> int | None:
        """The memory limit in bytes."""
        return None if self.memory_limit is None else parse_bytes(self.memory_limit)

    @property
    def asked_engine(self) -> EngineName | None:
        """The engine that these options leave no choice but; None: it depends on artifact and machine."""
        if self.engine == "torch" or self.asks_for_torch:
            return "torch"
        return "onnx" if self.asks_for_onnx else None


def _refuse(got: str, expected: str, todo: str) -> NoReturn:
    msg = f"got {got} · expected {expected} · {todo}"
    raise LiteError(msg)
