"""Which engine computes: every rule of the choice, and what excludes what."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from tiny import cache_fidelity, write_tiny_gptq_artifact

import lite
from export import OnnxSettings, add_onnx
from lite.artifact.open import Artifact
from lite.engines import choose as engines
from lite.engines.choose import choose_engine
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.errors import ArtifactError, BackendUnavailable, LiteError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_gpu_for_torch", lambda: True)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_gpu_for_torch", lambda: False)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else found(name, *a))
    monkeypatch.delitem(sys.modules, "torch")


def refuse(artifact: Artifact, error: type[LiteError], message: str, *arguments: Any, **settings: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        choose_engine(artifact, *arguments, **settings)
    assert type(caught.value) is error


@pytest.mark.usefixtures("no_gpu")
def test_on_a_cpu_onnx_where_it_is_there(tiny_artifact: Artifact, tiny_onnx_artifact: Artifact) -> None:
    assert choose_engine(tiny_onnx_artifact) == "onnx"
    assert choose_engine(tiny_artifact) == "torch"
    assert choose_engine(tiny_onnx_artifact, "torch") == "torch"
    assert choose_engine(tiny_onnx_artifact, device="cpu") == "onnx"


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_torch_unless_something_says_otherwise(tiny_artifact: Artifact, tiny_onnx_artifact: Artifact) -> None:
    assert choose_engine(tiny_onnx_artifact) == "torch"
    assert choose_engine(tiny_onnx_artifact, "onnx") == "onnx"
    assert choose_engine(tiny_onnx_artifact, device="cpu") == "onnx"
    assert choose_engine(tiny_onnx_artifact, provider="cuda") == "onnx"
    assert choose_engine(tiny_artifact) == "torch"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("settings", [{"device": "cuda:1"}, {"device": "abacus"}, {"dtype": "float32"}])
def test_what_only_torch_has_means_torch(tiny_onnx_artifact: Artifact, settings: dict[str, Any]) -> None:
    assert choose_engine(tiny_onnx_artifact, **settings) == "torch"


@pytest.mark.usefixtures("no_torch", "no_gpu")
def test_without_torch(tiny_artifact: Artifact, tiny_gptq_artifact: Artifact, tiny_onnx_artifact: Artifact) -> None:
    assert choose_engine(tiny_onnx_artifact) == "onnx"
    refuse(
        tiny_onnx_artifact, BackendUnavailable, r"got no torch .*llava-rad-lite\[torch\].*leave out what asks", "torch"
    )
    # A GPU that was asked for is not silently a CPU.
    for settings in ({"device": "cuda"}, {"dtype": "float16"}):
        refuse(tiny_onnx_artifact, BackendUnavailable, "got no torch", **settings)
    refuse(tiny_artifact, BackendUnavailable, "got no torch .* a decoder in fp16 .* export it as gptq with --engine")
    refuse(tiny_gptq_artifact, BackendUnavailable, "a decoder in gptq-int4 .* add decoder.onnx with `python -m export")


def test_an_artifact_without_decoder_onnx(tiny_artifact: Artifact) -> None:
    message = "got an artifact without decoder.onnx .* `python -m export onnx .*, or use the torch engine"
    refuse(tiny_artifact, ArtifactError, message, "onnx")
    refuse(tiny_artifact, ArtifactError, message, provider="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "tensorrt"}, "got engine 'tensorrt' · expected auto, torch, onnx"),
        ({"engine": "onnx", "device": "cuda"}, "got device 'cuda' for the onnx engine .* give a provider"),
        ({"engine": "onnx", "dtype": "float16"}, "got dtype 'float16' for the onnx engine .*--activations"),
        ({"engine": "torch", "provider": "cpu"}, "got provider 'cpu' for the torch engine .* give a device"),
        ({"engine": "torch", "cache_dtype": "int4"}, "got cache_dtype 'int4' · expected int8, or float32, which"),
        ({"engine": "torch", "cache_dtype": "float16"}, "got cache_dtype 'float16' · expected int8, or float32, which"),
        ({"engine": "onnx", "cache_dtype": "int4"}, "got cache_dtype 'int4' · expected float32 or int8"),
        ({"engine": "onnx", "cache_dtype": "float16"}, "got cache_dtype 'float16' · expected float32 or int8"),
    ],
)
def test_settings_that_exclude_each_other(tiny_onnx_artifact: Artifact, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LiteError, match=message):
        lite.load(tiny_onnx_artifact.path, **settings)


@pytest.mark.parametrize("settings", [{"provider": "cpu", "device": "cuda"}, {"provider": "cpu", "dtype": "float32"}])
def test_a_provider_and_what_only_torch_has(tiny_onnx_artifact: Artifact, settings: dict[str, Any]) -> None:
    """Neither is dropped without a word."""
    refuse(tiny_onnx_artifact, LiteError, "for the onnx engine · expected it for the torch engine only", **settings)


@pytest.mark.parametrize("provider", ["abacus", "", "cuda:x", "cpu:", "cpu:1", "CUDAExecutionProvider", "dml"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, perhaps with its provider")
def test_a_provider_that_is_not_there(tiny_onnx_artifact: Artifact, provider: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"got provider .* expected one that ONNX Runtime .*CPUExecution"):
        lite.load(tiny_onnx_artifact.path, engine="onnx", provider=provider)


@pytest.mark.parametrize("provider", [1, ["cpu"], [("CPUExecutionProvider", {})]])
def test_a_provider_that_is_no_name(tiny_onnx_artifact: Artifact, provider: Any) -> None:
    with pytest.raises(LiteError, match="got provider .* expected one name"):
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


def test_a_device_and_a_provider_that_contradict_each_other(tiny_onnx_artifact: Artifact) -> None:
    for settings in ({"engine": "onnx"}, {}):
        with pytest.raises(LiteError, match="got device 'cpu' and provider 'cuda' · expected one of them"):
            lite.load(tiny_onnx_artifact.path, device="cpu", provider="cuda", **settings)
    assert choose_engine(tiny_onnx_artifact, device="cpu", provider="cpu") == "onnx"


@pytest.mark.parametrize("provider", ["cpu", "CPU", "CPUExecutionProvider"])
def test_names_of_the_cpu(tiny_onnx_artifact: Artifact, films: list[Path], provider: str) -> None:
    found = lite.load(tiny_onnx_artifact.path, provider=provider).findings(films[0], max_new_tokens=1)
    assert (found.engine, found.provider, found.device) == ("onnx", "CPUExecutionProvider", "cpu")


def test_the_engine_is_in_the_result(tiny_onnx_artifact: Artifact, films: list[Path]) -> None:
    for settings, expected in (
        ({"engine": "onnx"}, ("onnx", "cpu", "float32", "float32")),
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
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKED + _NO_TORCH, tiny_onnx_artifact.path, films[0]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = lite.load(tiny_onnx_artifact.path, engine="onnx").findings(films[0]).text
    assert done.stdout.split() == ["onnx", expected.encode().hex()]


def test_torch_is_installed_and_not_loaded(tiny_onnx_artifact: Artifact, films: list[Path]) -> None:
    """On a machine with torch, too, the onnx engine never imports it."""
    code = (
        "import sys, lite\n"
        "found = lite.load(sys.argv[1], engine='onnx').findings(sys.argv[2], max_new_tokens=2)\n"
        "print(found.engine, 'torch' in sys.modules, 'kernels' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_onnx_artifact.path, films[0]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["onnx", "False", "False"]


def test_a_driver_is_asked_for_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch takes seconds: not where there can be no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("torch was asked"))
    # No such library, and one that is no driver: the process itself.
    for driver in ("libnosuchdriver.so.1", None):
        monkeypatch.setattr(engines, "_CUDA_DRIVER", driver)
        engines._has_gpu.cache_clear()
        assert not engines._gpu_for_torch()
        assert engines.gpu_problem() is None
    engines._has_gpu.cache_clear()  # of what has just been answered
    monkeypatch.setattr(engines, "_has_gpu", lambda: True)
    for answer in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=answer: answer)
        assert engines._gpu_for_torch() is answer


def test_why_torch_does_not_see_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 9000).\nPlease update")

    monkeypatch.setattr(engines, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert engines.gpu_problem() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert engines.gpu_problem() == "The NVIDIA driver on your system is too old (found version 9000)."
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert engines.gpu_problem() == f"torch {torch.__version__} does not see it"
    monkeypatch.setattr(engines, "has_torch", lambda: False)
    assert engines.gpu_problem() == "torch is not installed"


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


# ---- the limit on memory


@pytest.fixture(scope="module")
def deep_onnx_artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Artifact:
    """Of so many layers that the cache is larger than what a prompt takes on its way through one of them."""
    folder = tmp_path_factory.mktemp("deep")
    plain = write_tiny_gptq_artifact(folder / "plain", tokenizer_model, num_hidden_layers=8)
    return add_onnx(plain.path, OnnxSettings(verify_studies=1, verify_tokens=4, device="cpu"), out=folder / "artifact")


@pytest.fixture
def plans(deep_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """The peaks planned with an int8 and with a float cache, the process's own memory left out."""
    from lite.memory.plan import plan_memory

    monkeypatch.setattr("lite.loading.rss_bytes", lambda: 0)
    small, large = (
        plan_memory(deep_onnx_artifact, device="cpu", engine="onnx", cache_dtype=cache).peak_bytes
        for cache in ("int8", None)
    )
    return small, large


def with_cache_kl(artifact: Artifact, kl: float | None) -> Artifact:
    part = artifact.manifest.parts.decoder_onnx
    assert part is not None
    fidelity = None if kl is None else cache_fidelity(kl)
    return artifact.with_parts(decoder_onnx=dataclasses.replace(part, fidelity=fidelity))


def test_a_limit_that_only_the_int8_cache_fits_takes_it(
    deep_onnx_artifact: Artifact, plans: tuple[int, int], films: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = plans
    assert small < large
    good = with_cache_kl(deep_onnx_artifact, 1e-4)
    monkeypatch.setattr("lite.loading.load_artifact", lambda _: good)
    for limit, cache_dtype in ((large, "float32"), (large - 1, "int8"), (small, "int8")):
        model = lite.load(deep_onnx_artifact.path, engine="onnx", memory_limit=limit)
        assert model.findings(films[0], max_new_tokens=1).cache_dtype == cache_dtype
    with pytest.raises(lite.MemoryBudgetError, match="expected at least"):
        lite.load(deep_onnx_artifact.path, engine="onnx", memory_limit=small - 1)
    # What was asked for is not changed.
    with pytest.raises(lite.MemoryBudgetError):
        lite.load(deep_onnx_artifact.path, engine="onnx", memory_limit=large - 1, cache_dtype="float32")


@pytest.mark.parametrize(("kl", "why"), [(2e-3, "lost too much at export"), (None, "was not measured at export")])
def test_a_cache_that_loses_too_much_is_not_taken_unasked(
    deep_onnx_artifact: Artifact, plans: tuple[int, int], monkeypatch: pytest.MonkeyPatch, kl: float | None, why: str
) -> None:
    small, large = plans
    bad = with_cache_kl(deep_onnx_artifact, kl)
    monkeypatch.setattr("lite.loading.load_artifact", lambda _: bad)
    with pytest.raises(lite.MemoryBudgetError):
        lite.load(deep_onnx_artifact.path, engine="onnx", memory_limit=large - 1)
    with pytest.raises(lite.MemoryBudgetError, match=f"cache_dtype='int8' would fit, but {why}"):
        lite.load(deep_onnx_artifact.path, engine="onnx", memory_limit=small)
    model = lite.load(deep_onnx_artifact.path, engine="onnx", memory_limit=small, cache_dtype="int8")
    assert model.decoder.cache_dtype == "int8"
