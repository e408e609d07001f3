"""Resolve first, then build: options + artifact + machine → `RunPlan`.

`resolve` is a function of its three arguments: it loads nothing, asks nothing and needs no torch.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Final

from lite.engines.adapters import adapters_to_load
from lite.engines.machine import no_such_gpu
from lite.engines.onnx_session import (
    CPU,
    CUDA,
    INT8_CACHE_SINCE,
    check_provider,
    is_at_least,
    provider_of_device,
    require_onnxruntime,
)
from lite.engines.plan import RunPlan
from lite.engines.prompt_weights import prompt_ways
from lite.errors import BackendUnavailable, LiteError, MemoryBudgetError
from lite.memory.plan import CHUNK_SIZES, FIXED_TEXT_TOKENS, REASON_TOKENS, Shapes, Workload, plan_memory, refusal
from lite.memory.sizes import shown_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lite.artifact.open import Artifact
    from lite.artifact.parts import DecoderFidelity
    from lite.engines.machine import Gpu, Machine
    from lite.engines.options import LoadOptions
    from lite.engines.protocol import EngineName

MAX_ROWS: Final = 8
"""The most studies at a time where nobody asks for more."""
MAX_DRAFTED_IDS: Final = 0xFFFF
"""Token ids that a table of drafts has numbers for."""
MAX_CACHE_KL: Final = 1e-3
"""The most that an int8 cache may lose, in nats a token by the manifest, and still be taken without being asked for."""


def resolve(
    options: LoadOptions, artifact: Artifact, machine: Machine, *, num_prompt_tokens: int | None = None
) -> RunPlan:
    """Choose how to run an artifact.

    An int8 cache is taken unasked where the export measured that it loses no more than `MAX_CACHE_KL`, and it is the
    faster one: by the onnx engine on a CPU (1.4 times a token, a quarter of the memory). torch on a CPU makes float32
    of it, token by token, and is the slower for it; on a GPU it has not been measured. There it is taken where memory
    asks for it.

    What is given up where a limit is too small for all, in this order:

    1. Prompts go through torch in shorter chunks: the same numbers, a little later.
    2. The cache becomes int8, if it loses no more than `MAX_CACHE_KL`.
    3. Prompts are read by the stored weights, if the artifact has others for them that were not asked for.
    4. There are fewer rows: studies wait for one another. `options.rows` comes first in this: for rows that were asked
       for, all of these are given up. For rows that were not, neither is: there are as many as fit beside what one
       study wants.

    Args:
        options: what was asked for.
        artifact: a checked artifact; nothing of it is loaded.
        machine: what there is.
        num_prompt_tokens: places of a prompt without a reason, the image's included; None allows FIXED_TEXT_TOKENS.

    Raises:
        ArtifactError: the engine asked for needs a `decoder.onnx` that is not there.
        BackendUnavailable: the device, the provider or a package is not there.
        MemoryBudgetError: not even one study fits. It names the parts, and what would.
        LiteError: the engine does not have an option that was given.
    """
    engine, why = _engine(options, artifact, machine)
    resolver = (_Onnx if engine == "onnx" else _Torch)(options, artifact, machine, why)
    prompt = num_prompt_tokens or artifact.manifest.parts.vision.num_image_tokens + FIXED_TEXT_TOKENS
    return resolver.plan(prompt + REASON_TOKENS)


def _fidelity(artifact: Artifact, engine: EngineName) -> DecoderFidelity | None:
    parts = artifact.manifest.parts
    part = parts.decoder_onnx if engine == "onnx" else parts.decoder
    return part.fidelity if part is not None else None


def _engine(options: LoadOptions, artifact: Artifact, machine: Machine) -> tuple[EngineName, str]:
    """Choose the engine, and say why."""
    exists = artifact.manifest.parts.decoder_onnx is not None
    asked = options.asked_engine
    if asked == "torch" or (asked is None and not exists):
        if not machine.has_torch:
            raise BackendUnavailable(_no_torch(artifact))
        if options.engine == "torch":
            return "torch", "asked for"
        return "torch", "a device or a dtype is asked for" if asked else "the artifact has no decoder.onnx"
    artifact.onnx_part()
    if asked == "onnx":
        return "onnx", "asked for" if options.engine == "onnx" else "a provider is asked for"
    if options.device == "auto" and machine.gpus:
        return "torch", "it computes on the GPU"
    return "onnx", "the artifact has decoder.onnx: faster than torch on a CPU"


def _no_torch(artifact: Artifact) -> str:
    listed = artifact.manifest.parts.decoder.format
    if artifact.manifest.parts.decoder_onnx is not None:
        todo = "leave out what asks for torch: a device, a dtype, or the engine"
    elif listed.startswith("gptq"):
        todo = "add decoder.onnx with `python -m export onnx` where torch is installed"
    else:
        todo = "export it as gptq with --engine onnx where torch is installed"
    msg = f"{artifact.path}: got no torch · expected it for a decoder in {listed} · pip install"
    return f'{msg} "llava-rad-lite[torch]", or {todo}'


class _Resolver:
    """Resolve for one engine: what there is to choose from, and the best of it that fits."""

    engine: EngineName
    drafts_note: str  # what is to be known of a text that was drafted
    chunk_sizes: tuple[int, ...] = CHUNK_SIZES[:1]

    def __init__(self, options: LoadOptions, artifact: Artifact, machine: Machine, why: str) -> None:
        self.options, self.artifact, self.machine = options, artifact, machine
        self.shapes = Shapes.of(artifact)
        self.choices: dict[str, tuple[str, str]] = {"engine": (self.engine, why)}
        self.fallbacks: list[str] = []
        self.notes: list[str] = []
        self.adapters, why = adapters_to_load(options.adapters, artifact)
        if self.adapters:
            self.choices["adapters"] = ", ".join(self.adapters), why
        own = artifact.manifest.parts.adapters  # of the default one the decoder's own figures speak
        self.hospitals = {name: own[name].fidelity for name in self.adapters if not own[name].is_default}
        self.loss = self._int8_loss()
        self.small_loss = self.loss is not None and self.loss <= MAX_CACHE_KL
        self.place()
        if options.fp16_accumulation and self.gpu is None:
            msg = f"got fp16_accumulation for {self.engine} on {self.device} · expected it for torch on a GPU only"
            raise LiteError(f"{msg} · leave it out")

    def _int8_loss(self) -> float | None:
        """Return what an int8 cache loses, in nats a token, with the adapter that it is worst for; None: unknown."""
        # Of onnx the scales were found without the adapters; torch finds them for each token.
        found = _fidelity(self.artifact, self.engine), *(self.hospitals.values() if self.engine == "onnx" else ())
        losses = [one.int8_cache.mean_kl if one is not None and one.int8_cache is not None else None for one in found]
        return None if None in losses else max(lost for lost in losses if lost is not None)

    # What an engine says of itself.
    device: str
    computed: str  # in this dtype
    provider: str | None = None
    vision_provider: str
    gpu: Gpu | None = None

    def place(self) -> None:
        """Choose device, dtype and providers."""
        raise NotImplementedError

    def caches(self) -> Iterator[tuple[str, str]]:
        """Yield the caches that may be taken, the preferred first, each with the reason."""
        raise NotImplementedError

    def prompts(self) -> Iterator[tuple[bool, str]]:
        """Yield whether prompts may be read by int8 weights of their own, the preferred first, each with the reason."""
        yield False, ""

    @property
    def int8_reason(self) -> str:
        """What speaks for an int8 cache, or against it."""
        if self.loss is None:
            return "an int8 one was not measured at export"
        return f"int8 lost {self.loss:.2g} nats a token at export, {'no more' if self.small_loss else 'more'} than 1e-3"

    def limit(self) -> tuple[int | None, str]:
        """Return the memory limit, and where it comes from."""
        limit = self.options.limit_bytes
        if self.gpu is not None and self.gpu.free_bytes is not None and (limit is None or limit > self.gpu.free_bytes):
            return self.gpu.free_bytes, f"free on the {self.gpu.name}"
        return limit, "asked for" if limit is not None else "no limit is set"

    def plan(self, num_prompt_tokens: int) -> RunPlan:
        """Choose what fits."""
        limit, limit_from = self.limit()
        workload = Workload(
            engine=self.engine,
            device=self.device,
            dtype=self.computed if self.engine == "torch" else None,
            num_prompt_tokens=num_prompt_tokens,
            max_new_tokens=self.artifact.manifest.decoding.max_new_tokens,
            tower_on_gpu=self.vision_provider.startswith(CUDA) and self.gpu is not None,
            resident_bytes=0 if self.gpu is not None else self.machine.resident_bytes,
            capability=self.gpu.capability if self.gpu is not None else (8, 6),
            adapters=self.adapters,
        )
        chosen, why, why_prompts = self._that_fits(workload, limit)
        self.choices["cache"] = chosen.cache_dtype or self.computed, why
        if self.engine == "onnx":
            self.choices["prompts"] = "int8" if chosen.int8_prompts else "stored", why_prompts
        if self.engine == "torch":
            shorter = chosen.chunk_size != CHUNK_SIZES[0]
            why = "shorter, for the memory limit" if shorter else "a usual prompt is one chunk"
            self.choices["chunks"] = f"{chosen.chunk_size:,} tokens", why
        return RunPlan(
            workload=chosen,
            shapes=self.shapes,
            fp16_accumulation=self.options.fp16_accumulation,
            drafts=self._drafts(),
            provider=self.provider,
            vision_provider=self.vision_provider,
            memory=plan_memory(self.shapes, chosen),
            limit=limit,
            limit_from=limit_from,
            losses=self._losses(chosen),
            choices=self.choices,
            fallbacks=tuple(self.fallbacks),
            notes=tuple(self.notes),
        )

    def _that_fits(self, workload: Workload, limit: int | None) -> tuple[Workload, str, str]:
        """Return the workload, and the reasons of its cache and of what reads prompts; see `resolve` for the order."""
        ways = [
            (dataclasses.replace(workload, cache_dtype=cache, int8_prompts=int8, chunk_size=size), why, why_prompts)
            for int8, why_prompts in self.prompts()
            for cache, why in self.caches()
            for size in self.chunk_sizes
        ]
        asked = self.options.rows
        if limit is None:
            memory = self.machine.memory_bytes or sys.maxsize
            fitting = (one for one in ways if not one[0].int8_prompts or self._bytes(one[0], 1) <= memory)
            way, why, why_prompts = next(fitting, ways[0])
            rows, because = self._rows_without_limit(way)
        else:
            each = ((rows, *one) for rows in range(asked or 1, 0, -1) for one in ways)
            found = next((one for one in each if self._bytes(one[1], one[0]) <= limit), None)
            if found is None:
                raise self._refusal(ways[-1][0], limit)
            rows, way, why, why_prompts = found
            because = "asked for" if rows == asked else f"{asked} do not fit"
            if asked is None:
                rows, because = self._most_rows(way, limit)
        self.choices["rows"] = str(rows), because
        if asked is not None and rows < asked:
            self.notes.append(f"{rows} studies at a time in place of {asked}, which do not fit the memory")
        return dataclasses.replace(way, num_rows=rows), why, why_prompts

    def _bytes(self, workload: Workload, rows: int) -> int:
        return plan_memory(self.shapes, dataclasses.replace(workload, num_rows=rows)).card_bytes

    def _most_rows(self, workload: Workload, limit: int) -> tuple[int, str]:
        rows = next((n for n in range(MAX_ROWS, 1, -1) if self._bytes(workload, n) <= limit), 1)
        return rows, "the most that are taken unasked" if rows == MAX_ROWS else "all that fit"

    def _rows_without_limit(self, workload: Workload) -> tuple[int, str]:
        """Return the rows on a CPU: a row takes its memory when a study first uses it, and not before."""
        if self.options.rows is not None:
            return self.options.rows, "asked for"
        if self.provider not in (None, CPU):
            return 1, f"how much memory {self.provider} has is not known"
        memory = self.machine.memory_bytes or sys.maxsize
        if (needed := self._bytes(workload, 1)) > memory:
            got = f"one study takes {shown_bytes(needed)}, and this machine has {shown_bytes(memory)}"
            self.notes.append(f"{got}: it may swap, or be killed")
        return self._most_rows(workload, memory)

    def _refusal(self, smallest: Workload, limit: int) -> MemoryBudgetError:
        hint = ""
        with_int8 = dataclasses.replace(smallest, cache_dtype="int8")
        has_int8 = self.shapes.onnx is None or self.engine == "torch" or "int8" in self.shapes.onnx.cache_dtypes
        if has_int8 and self.options.cache_dtype is None and not self.small_loss and self._bytes(with_int8, 1) <= limit:
            why = "was not measured at export" if self.loss is None else "lost too much at export"
            hint = f"; cache_dtype='int8' would fit, but {why} to be taken without being asked for"
        return refusal(plan_memory(self.shapes, smallest), limit, what=str(self.artifact.path), hint=hint)

    def _drafts(self) -> str:
        """Return where drafts come from, and say what they may change."""
        drafts = str(self.options.drafts)
        why = "texts of this process" if drafts == "auto" else "as no others are asked for"
        self.choices["drafts"] = drafts, why if drafts in ("auto", "off") else "and texts of this process"
        if drafts != "off":
            if self.shapes.config.vocab_size > MAX_DRAFTED_IDS:
                got = f"got drafts for a vocabulary of {self.shapes.config.vocab_size:,}"
                raise LiteError(f"{got} · expected at most {MAX_DRAFTED_IDS:,} · leave drafts off")
            self.notes.append(self.drafts_note)
        return drafts

    def _losses(self, chosen: Workload) -> dict[str, float | None]:
        """Return what each step from the checkpoint to what runs has lost."""
        of_torch, of_onnx = (_fidelity(self.artifact, engine) for engine in ("torch", "onnx"))
        losses = {"decoder, from the checkpoint": of_torch.divergence.mean_kl if of_torch is not None else None}
        if self.engine == "onnx":
            losses["decoder.onnx, from decoder"] = of_onnx.divergence.mean_kl if of_onnx is not None else None
        if chosen.cache_dtype == "int8":
            losses["int8 cache, from a float one"] = self.loss
        if chosen.int8_prompts and self.shapes.onnx is not None and (part := self.shapes.onnx.prompts) is not None:
            losses["int8 prompts, from stored ones"] = part.divergence.mean_kl if part.divergence is not None else None
        for name, lost in self.hospitals.items():
            losses[f"with {name}, from the checkpoint"] = lost.divergence.mean_kl if lost is not None else None
        return losses


class _Torch(_Resolver):
    engine = "torch"
    drafts_note = (
        "drafts: several rows are rounded otherwise than one, so texts may differ where two tokens are as likely"
    )
    chunk_sizes = CHUNK_SIZES

    def place(self) -> None:
        """Choose device, dtype and providers."""
        options, machine = self.options, self.machine
        self.device, why = self._device()
        if self.device != "cpu":
            self.gpu = machine.gpus[int(self.device.partition(":")[2] or 0)]
            why = f"{why}: {self.gpu.name}"
        self.choices["device"] = self.device, why
        stored = self.shapes.config.dtype
        self.computed = options.dtype or ("float32" if self.gpu is None else stored)
        why = "as it is stored" if self.gpu is not None else "16-bit products are slow on most CPUs"
        self.choices["dtype"] = self.computed, "asked for" if options.dtype is not None else why
        self.vision_provider = provider_of_device(self.device, machine.providers)
        if self.gpu is not None and self.vision_provider == CPU:
            self.fallbacks.append("the tower on the CPU: this ONNX Runtime has no CUDA provider")
        self.choices["tower"] = self.vision_provider, "where the decoder is, if ONNX Runtime has a provider for it"

    def _device(self) -> tuple[str, str]:
        asked, machine = self.options.device, self.machine
        if asked == "auto":
            if machine.gpus:
                return "cuda", "there is a GPU"
            if machine.gpu_problem is not None:
                self.fallbacks.append(f"the CPU in place of the GPU that is there: {machine.gpu_problem}")
                return "cpu", f"torch does not see the GPU: {machine.gpu_problem}"
            return "cpu", "there is no GPU"
        if asked != "cpu" and int(asked.partition(":")[2] or 0) >= len(machine.gpus):
            raise no_such_gpu(asked, len(machine.gpus), machine.gpu_problem)
        return asked, "asked for"

    def caches(self) -> Iterator[tuple[str, str]]:
        asked = self.options.cache_dtype
        if asked is not None:
            if asked not in ("int8", self.computed):
                msg = f"got cache_dtype {asked!r} · expected int8, or {self.computed}, which the decoder computes in"
                raise LiteError(f"{msg} · choose one of them")
            yield asked, "asked for"
            return
        slower = "exact, and faster on a CPU, where torch makes float32 of an int8 one for every token"
        yield self.computed, slower if self.gpu is None else "exact, and it fits"
        if self.small_loss:
            yield "int8", f"for the memory limit; {self.int8_reason}"


class _Onnx(_Resolver):
    engine = "onnx"
    drafts_note = "drafts: a study by itself is the same whatever they are; a token is decoded as one of two"

    def place(self) -> None:
        """Choose device, dtype and providers."""
        options, machine = self.options, self.machine
        self.computed = self.artifact.onnx_part(options.cache_dtype).dtype
        require_onnxruntime(int8_cache=options.cache_dtype == "int8", installed=machine.onnxruntime)
        asked = options.provider
        self.provider = self.vision_provider = check_provider(
            "cpu" if asked is None else asked, machine.providers, version=machine.onnxruntime
        )
        if options.memory_limit is not None and self.provider != CPU:
            msg = f"got a memory limit with provider {asked!r} · expected the CPU, of whose memory alone there is a"
            raise LiteError(f"{msg} plan · leave the limit out")
        self.device = "cpu"
        if self.provider != CPU:
            self.drafts_note = _Torch.drafts_note
        if options.device == "auto" and asked is None and machine.gpu_problem is not None:
            self.fallbacks.append(f"the CPU in place of the GPU that is there: {machine.gpu_problem}")
        self.choices["provider"] = self.provider, "asked for" if asked is not None else "as no other is asked for"
        if self.provider != CPU:
            self.notes.append(f"memory is counted as on a CPU: of that of {self.provider} there is no plan")
        self.choices["dtype"] = self.computed, "decoder.onnx was exported so"

    def caches(self) -> Iterator[tuple[str, str]]:
        # The one that is best: the smaller is the faster, too.
        if self.options.cache_dtype is not None:
            yield self.options.cache_dtype, "asked for"
        elif "int8" not in self.artifact.onnx_part().cache_dtypes:
            yield self.computed, "decoder.onnx was exported without an int8 one"
        elif self.provider != CPU:
            yield self.computed, "an int8 one was measured on CPUs only"
        elif not self.small_loss:
            yield self.computed, self.int8_reason
        elif not is_at_least(self.machine.onnxruntime, INT8_CACHE_SINCE):
            old = f"onnxruntime {self.machine.onnxruntime} is older than {INT8_CACHE_SINCE}"
            self.fallbacks.append(f"a {self.computed} cache: {old}")
            yield self.computed, f"no int8 one: {old}"
        else:
            yield "int8", f"1.4 times as fast on a CPU, a quarter of the memory; {self.int8_reason}"

    def prompts(self) -> Iterator[tuple[bool, str]]:
        yield from prompt_ways(self.options.prompt_weights, self.artifact, self.provider, self.machine, self.hospitals)
