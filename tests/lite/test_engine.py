"""Which engine computes: every rule of the choice, and what excludes what."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import run_python
from tiny import with_cache_kl, write_tiny_gptq_artifact

import lite
from export import OnnxSettings, add_onnx
from lite.artifact.open import Artifact
from lite.engines.machine import Gpu, Machine
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.options import LoadArguments, LoadOptions
from lite.engines.plan import RunPlan
from lite.engines.resolve import MAX_ROWS, resolve
from lite.errors import ArtifactError, BackendUnavailable, LiteError

CPU = Machine(has_torch=True, onnxruntime="1.32.0", providers=("CPUExecutionProvider",))
NO_TORCH = dataclasses.replace(CPU, has_torch=False)
RTX_3060 = Gpu(name="RTX 3060", capability=(8, 6), total_bytes=12 << 30, free_bytes=11 << 30)
GPU = dataclasses.replace(CPU, gpus=(RTX_3060,), providers=("CUDAExecutionProvider", "CPUExecutionProvider"))


def plan(artifact: Artifact, machine: Machine = CPU, **options: Any) -> RunPlan:
    return resolve(LoadOptions(**options), artifact, machine)


def refuse(artifact: Artifact, error: type[LiteError], message: str, machine: Machine = CPU, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        plan(artifact, machine, **options)
    assert type(caught.value) is error


def test_which_engine_computes(tiny_artifact: Artifact, tiny_onnx_artifact: Artifact) -> None:
    """On a CPU onnx where it is there, on a GPU torch, unless something says otherwise."""
    cases: list[tuple[Artifact, Machine, dict[str, Any], str]] = [
        (tiny_onnx_artifact, CPU, {}, "onnx"),
        (tiny_artifact, CPU, {}, "torch"),
        (tiny_onnx_artifact, CPU, {"engine": "torch"}, "torch"),
        (tiny_onnx_artifact, CPU, {"device": "cpu"}, "onnx"),
        (tiny_onnx_artifact, CPU, {"device": "cpu", "provider": "cpu"}, "onnx"),
        (tiny_onnx_artifact, GPU, {"engine": "onnx"}, "onnx"),
        (tiny_onnx_artifact, GPU, {"device": "cpu"}, "onnx"),
        (tiny_onnx_artifact, GPU, {"provider": "cuda"}, "onnx"),
        (tiny_onnx_artifact, GPU, {"device": "cuda:0"}, "torch"),
        (tiny_onnx_artifact, GPU, {"dtype": "float32"}, "torch"),
        (tiny_artifact, GPU, {}, "torch"),
    ]
    for artifact, machine, options, engine in cases:
        assert plan(artifact, machine, **options).engine == engine, options
    assert plan(tiny_artifact, GPU, device="cpu").device == "cpu"
    found = plan(tiny_onnx_artifact, GPU)
    assert (found.engine, found.device, found.dtype) == ("torch", "cuda", "float16")
    assert found.vision_provider == "CUDAExecutionProvider"
    assert found.choices["device"] == ("cuda", "there is a GPU: RTX 3060")


def test_without_torch(tiny_artifact: Artifact, tiny_gptq_artifact: Artifact, tiny_onnx_artifact: Artifact) -> None:
    assert plan(tiny_onnx_artifact, NO_TORCH).engine == "onnx"
    message = r"got no torch .*llava-rad-lite\[torch\].*leave out what asks"
    refuse(tiny_onnx_artifact, BackendUnavailable, message, NO_TORCH, engine="torch")
    # A GPU that was asked for is not silently a CPU.
    for settings in ({"device": "cuda"}, {"dtype": "float16"}):
        refuse(tiny_onnx_artifact, BackendUnavailable, "got no torch", NO_TORCH, **settings)
    message = "got no torch .* a decoder in fp16 .* export it as gptq with --engine"
    refuse(tiny_artifact, BackendUnavailable, message, NO_TORCH)
    message = "a decoder in gptq-int4 .* add decoder.onnx with `python -m export"
    refuse(tiny_gptq_artifact, BackendUnavailable, message, NO_TORCH)


def test_a_gpu_that_is_not_there(tiny_onnx_artifact: Artifact) -> None:
    refuse(
        tiny_onnx_artifact,
        BackendUnavailable,
        "got device 'cuda' · expected a GPU that torch sees: there is none",
        device="cuda",
    )
    refuse(tiny_onnx_artifact, BackendUnavailable, "got device 'cuda:1' · expected one of the 1", GPU, device="cuda:1")
    blind = dataclasses.replace(CPU, gpu_problem="torch 2.13 is built without CUDA")
    for settings in ({}, {"engine": "torch"}):
        assert plan(tiny_onnx_artifact, blind, **settings).fallbacks == (
            "the CPU in place of the GPU that is there: torch 2.13 is built without CUDA",
        )
    refuse(
        tiny_onnx_artifact,
        BackendUnavailable,
        r"torch sees: there is none \(torch 2.13 is built w.*",
        blind,
        device="cuda",
    )
    assert plan(tiny_onnx_artifact, blind, device="cpu").fallbacks == ()
    without = dataclasses.replace(GPU, providers=CPU.providers)
    assert plan(tiny_onnx_artifact, without).fallbacks == (
        "the tower on the CPU: this ONNX Runtime has no CUDA provider",
    )


def test_an_artifact_without_decoder_onnx(tiny_artifact: Artifact, tiny_gptq_artifact: Artifact) -> None:
    refuse(tiny_gptq_artifact, ArtifactError, "without decoder.onnx .* `python -m export onnx .*torch", engine="onnx")
    message = (
        "got an artifact without decoder.onnx .* use the torch engine, or export with --decoder gptq-int4 --engine"
    )
    refuse(tiny_artifact, ArtifactError, message, engine="onnx")
    refuse(tiny_artifact, ArtifactError, message, provider="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "tensorrt"}, "got engine 'tensorrt' · expected auto, torch, onnx"),
        ({"device": "abacus"}, "got device 'abacus' · expected auto, cpu, cuda or cuda:N"),
        ({"dtype": "int8"}, "got dtype 'int8' · expected float32, float16, bfloat16 or None"),
        *(({"rows": rows}, "got rows .* expected a whole number from 1") for rows in (0, -1, True, 1.0, "2")),
        ({"fp16_accumulation": True}, "got fp16_accumulation for onnx on cpu · expected it for torch on a GPU only"),
        ({"fp16_accumulation": True, "engine": "torch"}, "got fp16_accumulation for torch on cpu"),
        ({"engine": "onnx", "device": "cuda"}, "got device 'cuda' for the onnx engine .* give a provider"),
        ({"engine": "onnx", "dtype": "float16"}, "got dtype 'float16' for the onnx engine .*--activations"),
        ({"engine": "torch", "provider": "cpu"}, "got provider 'cpu' for the torch engine .* give a device"),
        # Neither of two is dropped without a word.
        ({"provider": "cpu", "device": "cuda"}, "for the onnx engine · expected it for the torch engine only"),
        ({"provider": "cpu", "dtype": "float32"}, "for the onnx engine · expected it for the torch engine only"),
        ({"device": "cpu", "provider": "cuda"}, "got device 'cpu' and provider 'cuda' · expected one of them"),
        ({"engine": "onnx", "device": "cpu", "provider": "cuda"}, "got device 'cpu' and provider 'cuda'"),
        *(({"provider": one}, "got provider .* expected one name") for one in (1, ["cpu"], [("CPU", {})])),
        ({"engine": "torch", "cache_dtype": "int4"}, "got cache_dtype 'int4' · expected int8, or float32, which"),
        ({"engine": "torch", "cache_dtype": "float16"}, "got cache_dtype 'float16' · expected int8, or float32, which"),
        ({"engine": "onnx", "cache_dtype": "int4"}, "got cache_dtype 'int4' · expected float32 or int8"),
        ({"engine": "onnx", "cache_dtype": "float16"}, "got cache_dtype 'float16' · expected float32 or int8"),
    ],
)
def test_settings_that_exclude_each_other(tiny_onnx_artifact: Artifact, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LiteError, match=message):
        lite.load(tiny_onnx_artifact.path, **settings)


@pytest.mark.parametrize("provider", ["abacus", "", "cuda:x", "cpu:", "cpu:1", "CUDAExecutionProvider", "dml"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, perhaps with its provider")
def test_a_provider_that_is_not_there(tiny_onnx_artifact: Artifact, provider: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"got provider .* expected one that ONNX Runtime .*CPUExecution"):
        lite.load(tiny_onnx_artifact.path, engine="onnx", provider=provider)


def test_a_provider_that_cannot_compute_the_graph(tiny_onnx_artifact: Artifact) -> None:
    import onnxruntime

    others = [name for name in onnxruntime.get_available_providers() if name.startswith("Azure")]
    if not others:
        pytest.skip("this ONNX Runtime has no provider that lacks operators")
    with pytest.raises(BackendUnavailable, match=r"decoder\.onnx: got a provider Azure.* all of its operators"):
        OnnxDecoder(tiny_onnx_artifact, provider=others[0])
    # It computes nothing itself, and is not offered.
    with pytest.raises(BackendUnavailable, match="expected one that ONNX Runtime .* has here: (?!.*Azure.*choose)"):
        lite.load(tiny_onnx_artifact.path, engine="onnx", provider=others[0])


def test_a_provider_that_does_not_start_is_told_of_and_for_the_tower_is_the_cpu(
    tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    from lite.vision import VisionEncoder

    start = onnxruntime.InferenceSession._create_inference_session

    def fail(self: Any, providers: Any, *more: Any) -> None:
        if providers and providers[0][0] == "CUDAExecutionProvider":
            raise RuntimeError("invalid device ordinal; GPU=7")
        start(self, providers, *more)

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fail)
    with pytest.raises(BackendUnavailable, match=r"CUDAExecutionProvider that does not start.*ordinal; GPU=7"):
        OnnxDecoder(tiny_onnx_artifact, provider="CUDAExecutionProvider")
    # The result says which it was.
    assert VisionEncoder(tiny_onnx_artifact, provider="CUDAExecutionProvider").provider == "CPUExecutionProvider"
    assert capfd.readouterr().out == ""


def test_directml_is_refused_for_the_decoder(tiny_onnx_artifact: Artifact) -> None:
    with pytest.raises(BackendUnavailable, match="got provider Dml.* neither packed .* use another provider"):
        OnnxDecoder(tiny_onnx_artifact, provider="DmlExecutionProvider")


@pytest.mark.parametrize("provider", ["cpu", "CPU", "CPUExecutionProvider"])
def test_names_of_the_cpu(tiny_onnx_artifact: Artifact, films: list[Path], provider: str) -> None:
    found = lite.load(tiny_onnx_artifact.path, provider=provider).findings(films[0], max_new_tokens=1)
    assert (found.engine, found.provider, found.device) == ("onnx", "CPUExecutionProvider", "cpu")


def test_the_engine_is_in_the_result(tiny_onnx_artifact: Artifact, films: list[Path]) -> None:
    for settings, expected in (
        ({"engine": "onnx", "cache_dtype": "float32"}, ("onnx", "cpu", "float32", "float32")),
        ({"engine": "onnx", "cache_dtype": "int8"}, ("onnx", "cpu", "float32", "int8")),
        ({"engine": "torch", "device": "cpu"}, ("torch", "cpu", "float32", "float32")),
        ({"engine": "torch", "device": "cpu", "dtype": "bfloat16"}, ("torch", "cpu", "bfloat16", "bfloat16")),
    ):
        found = lite.load(tiny_onnx_artifact.path, **settings).findings(films[0], max_new_tokens=2)
        assert (found.engine, found.device, found.dtype, found.cache_dtype) == expected


_BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "safetensors", "transformers", "onnx"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""
_NO_TORCH = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else found(name, *a)
import lite
model = lite.load(sys.argv[1])
print(model.decoder.engine, model.findings(sys.argv[2]).text.encode().hex())
assert not {"torch", "safetensors", "onnx", "transformers"} & {name.partition(".")[0] for name in sys.modules}
"""


def test_findings_in_a_process_that_cannot_import_torch(tiny_onnx_artifact: Artifact, films: list[Path]) -> None:
    printed = run_python("-c", _BLOCKED + _NO_TORCH, tiny_onnx_artifact.path, films[0])
    expected = lite.load(tiny_onnx_artifact.path, engine="onnx").findings(films[0]).text
    assert printed.split() == ["onnx", expected.encode().hex()]


def test_torch_is_installed_and_not_loaded(tiny_onnx_artifact: Artifact, films: list[Path]) -> None:
    """On a machine with torch, too, the onnx engine never imports it."""
    code = (
        "import sys, lite\n"
        "found = lite.load(sys.argv[1], engine='onnx').findings(sys.argv[2], max_new_tokens=2)\n"
        "print(found.engine, 'torch' in sys.modules, 'kernels' in sys.modules)\n"
    )
    assert run_python("-c", code, tiny_onnx_artifact.path, films[0]).split() == ["onnx", "False", "False"]


def test_an_old_onnxruntime_is_named(tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    for version, cache_dtype, message in (
        ("1.21.1", None, r"got onnxruntime 1\.21\.1 · expected 1\.22 or newer, the first with 8-bit MatMulNBits .*pip"),
        ("1.9.0", None, r"got onnxruntime 1\.9\.0 · expected 1\.22"),
        ("1.26.0", "int8", r"got onnxruntime 1\.26\.0 · expected 1\.27 or newer, the first with an int8 cache"),
    ):
        monkeypatch.setattr(onnxruntime, "__version__", version)
        with pytest.raises(BackendUnavailable, match=message):
            lite.load(tiny_onnx_artifact.path, engine="onnx", cache_dtype=cache_dtype)
    for version, cache_dtype in (("1.22.0", None), ("1.27.0", "int8"), ("2.0.0rc1", "int8")):
        monkeypatch.setattr(onnxruntime, "__version__", version)
        assert lite.load(tiny_onnx_artifact.path, engine="onnx", cache_dtype=cache_dtype).decoder.engine == "onnx"


def test_a_plan_says_what_drafts_change(tiny_onnx_artifact: Artifact) -> None:
    cuda = dataclasses.replace(CPU, providers=GPU.providers)
    for machine, options, drafts, note in (
        (CPU, {"drafts": Path("a/table")}, "a/table", "a study by itself is the same"),
        (CPU, {"drafts": "auto", "engine": "torch"}, "auto", "texts may differ where two tokens are as likely"),
        (cuda, {"drafts": "auto", "provider": "cuda"}, "auto", "texts may differ"),
    ):
        found = plan(tiny_onnx_artifact, machine, **options)
        assert (found.drafts, found.choices["drafts"][0]) == (drafts,) * 2 == (found.to_json()["drafts"], drafts)
        assert [note in line for line in found.notes if line.startswith("drafts: ")] == [True]


def test_a_cpu_takes_the_int8_cache_that_loses_little(tiny_onnx_artifact: Artifact) -> None:
    """It is the faster one with onnx, and the slower one with torch."""
    good, bad, unknown = (with_cache_kl(tiny_onnx_artifact, kl) for kl in (1e-3, 1.1e-3, None))
    found = plan(good)
    assert (found.cache_dtype, found.losses["int8 cache, from a float one"]) == ("int8", 1e-3)
    assert "1.4 times as fast" in found.choices["cache"][1]
    assert plan(good, engine="torch").cache_dtype == plan(good, cache_dtype="float32").cache_dtype == "float32"
    assert "faster on a CPU" in plan(good, engine="torch").choices["cache"][1]
    assert plan(good, GPU).cache_dtype == "float16"
    assert plan(good, GPU, provider="cuda").cache_dtype == "float32"
    for artifact, why in ((bad, "int8 lost 0.0011 nats .* more than 1e-3"), (unknown, "was not measured at export")):
        assert plan(artifact).cache_dtype == "float32"
        assert re.search(why, plan(artifact).choices["cache"][1])
        assert plan(artifact, cache_dtype="int8").cache_dtype == "int8"
    old = plan(good, dataclasses.replace(CPU, onnxruntime="1.26.1"))
    assert old.cache_dtype == "float32"
    assert old.fallbacks == ("a float32 cache: onnxruntime 1.26.1 is older than 1.27",)


def test_what_the_cache_loses_is_that_of_the_engine(tiny_onnx_artifact: Artifact) -> None:
    artifact = with_cache_kl(tiny_onnx_artifact, 0.0, onnx=2e-3)
    for engine, lost in (("torch", 0.0), ("onnx", 2e-3)):
        assert plan(artifact, engine=engine, cache_dtype="int8").losses["int8 cache, from a float one"] == lost


def test_what_is_planned_is_what_is_built(
    tiny_onnx_artifact: Artifact, films: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = with_cache_kl(tiny_onnx_artifact, 1e-4)
    monkeypatch.setattr("lite.loading.load_artifact", lambda _: good)
    for options in ({}, {"engine": "torch"}, {"engine": "torch", "dtype": "bfloat16", "cache_dtype": "int8"}):
        model = lite.load(good.path, **options)
        planned, found = model.plan, model.findings(films[0], max_new_tokens=1)
        expected = planned.engine, planned.device, planned.dtype, planned.cache_dtype, planned.vision_provider
        assert (found.engine, found.device, found.dtype, found.cache_dtype, found.provider) == expected
        loop = model.session.loop
        assert (planned.rows, planned.max_seq_len) == (loop.num_rows, loop.max_seq_len)


def test_the_options_are_the_arguments() -> None:
    assert LoadArguments.__annotations__.keys() == LoadOptions.__dataclass_fields__.keys()
    with pytest.raises(TypeError, match="gpu"):
        lite.load("nowhere", gpu=True)  # type: ignore[call-arg]


def test_a_plan_needs_no_torch(tiny_onnx_artifact: Artifact) -> None:
    code = """
from lite.artifact.open import load_artifact
from lite.engines.machine import Gpu, Machine
from lite.engines.options import LoadOptions
from lite.engines.resolve import resolve
gpu = Gpu(name="T4", capability=(7, 5), total_bytes=15 << 30, free_bytes=14 << 30)
machine = Machine(gpus=(gpu,), has_torch=True, onnxruntime="1.32.0", providers=("CPUExecutionProvider",))
plan = resolve(LoadOptions(), load_artifact(sys.argv[1]), machine)
print(plan.engine, plan.device, plan.rows, "onnxruntime" in sys.modules)
"""
    printed = run_python("-c", _BLOCKED + code, tiny_onnx_artifact.path)
    assert printed.split() == ["torch", "cuda", str(MAX_ROWS), "False"]


# ---- the limit on memory


@pytest.fixture(scope="module")
def deep_onnx_artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Artifact:
    """Of so many layers that the cache is larger than what a prompt takes on its way through one of them."""
    folder = tmp_path_factory.mktemp("deep")
    plain = write_tiny_gptq_artifact(folder / "plain", tokenizer_model, num_hidden_layers=8)
    return add_onnx(plain.path, OnnxSettings(verify_studies=1, verify_tokens=4, device="cpu"), out=folder / "artifact")


def of_rows(found: RunPlan, rows: int) -> int:
    return found.with_rows(rows).card_bytes


def test_as_many_rows_as_fit_the_limit(deep_onnx_artifact: Artifact) -> None:
    artifact = with_cache_kl(deep_onnx_artifact, 1e-4)
    free = plan(artifact)
    assert (free.rows, free.limit, free.cache_dtype) == (MAX_ROWS, None, "int8")
    limit = of_rows(free, 3)
    assert [plan(artifact, memory_limit=limit + more).rows for more in (-1, 0)] == [2, 3]
    tight = plan(artifact, memory_limit=limit, rows=5)
    assert (tight.rows, tight.memory.card_bytes) == (3, limit)
    assert tight.notes == ("3 studies at a time in place of 5, which do not fit the memory",)
    assert plan(artifact, memory_limit=limit, rows=2).notes == ()
    assert plan(artifact, rows=11).rows == 11
    with pytest.raises(lite.MemoryBudgetError, match="expected at least .*cache of 1 x"):
        plan(artifact, memory_limit=of_rows(free, 1) - 1)


def test_longer_rows_fit_while_the_limit_holds(deep_onnx_artifact: Artifact) -> None:
    found = plan(deep_onnx_artifact, cache_dtype="float32", rows=2)
    limited = plan(deep_onnx_artifact, cache_dtype="float32", rows=2, memory_limit=of_rows(found, 2))
    assert limited.fits(2, limited.max_seq_len)
    assert not limited.fits(2, limited.max_seq_len + 1)
    assert limited.fits(1, limited.max_seq_len + 1)
    assert found.fits(100, 10**6), "nothing sets a limit"


def test_a_cpu_takes_no_more_rows_than_its_memory_holds(deep_onnx_artifact: Artifact) -> None:
    found = plan(deep_onnx_artifact, cache_dtype="float32")
    small = dataclasses.replace(CPU, memory_bytes=of_rows(found, 4))
    assert plan(deep_onnx_artifact, small, cache_dtype="float32").rows == 4
    assert plan(deep_onnx_artifact, small, cache_dtype="float32", rows=6).rows == 6, "asked for, and no limit is set"
    tiny = dataclasses.replace(CPU, memory_bytes=1 << 20)
    crowded = plan(deep_onnx_artifact, tiny, cache_dtype="float32")
    assert crowded.rows == 1
    assert "this machine has 1.0 MiB: it may swap" in crowded.notes[0]


def test_a_gpu_has_what_is_free(tiny_onnx_artifact: Artifact) -> None:
    found = plan(tiny_onnx_artifact, GPU)
    assert (found.limit, found.limit_from) == (11 << 30, "free on the RTX 3060")
    assert plan(tiny_onnx_artifact, GPU, memory_limit="12GiB").limit == 11 << 30, "no more than that"
    assert plan(tiny_onnx_artifact, GPU, memory_limit="9GiB").limit == 9 << 30
    full = dataclasses.replace(GPU, gpus=(dataclasses.replace(RTX_3060, free_bytes=1 << 20),))
    refuse(tiny_onnx_artifact, lite.MemoryBudgetError, "got a memory limit of 1.0 MiB .* tower and libraries", full)


@pytest.mark.parametrize(("kl", "why"), [(2e-3, "lost too much at export"), (None, "was not measured at export")])
def test_a_cache_that_loses_too_much_is_not_taken_unasked(
    deep_onnx_artifact: Artifact, kl: float | None, why: str
) -> None:
    artifact = with_cache_kl(deep_onnx_artifact, kl)
    small = of_rows(plan(artifact, cache_dtype="int8"), 1)
    message = f"cache_dtype='int8' would fit, but {why}"
    refuse(artifact, lite.MemoryBudgetError, message, memory_limit=small)
    assert plan(artifact, memory_limit=small, cache_dtype="int8").cache_dtype == "int8"
    with pytest.raises(lite.MemoryBudgetError) as refused:  # what was asked for is not changed
        plan(artifact, memory_limit=small, cache_dtype="float32")
    assert "would fit" not in str(refused.value)
