"""Who may import whom, what `import lite` costs, and that other libraries live beside our folder named `kernels`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from repository import ROOT, run_python

# kernels < lite < {export, benchmarks} < tests: what each package may import of the project, itself included.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "lite": {"kernels", "lite"},
    "export": {"kernels", "lite", "export"},
    "benchmarks": {"kernels", "lite", "benchmarks"},
}
FIRST_PARTY = {*MAY_IMPORT, "tests"}
HEAVY = (
    "bitsandbytes",
    "cv2",
    "export",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "playwright",
    "pydicom",
    "radgraph",
    "rouge_score",
    "sacrebleu",
    "torch",
    "transformers",
    "triton",
)


def first_party_imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yield line and top-level package of every import of the project's own code, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [package if node.level else node.module or ""]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names = [str(node.args[0].value)]
        for name in names:
            top = name.partition(".")[0]
            if top in FIRST_PARTY:
                yield node.lineno, top


def forbidden_imports(source: str, package: str) -> list[tuple[int, str]]:
    return [found for found in first_party_imports(source, package) if found[1] not in MAY_IMPORT[package]]


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_packages_import_only_what_is_below_them(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {top}"
        for path in files
        for line, top in forbidden_imports(path.read_text(encoding="utf-8"), package)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("kernels", "import lite.errors"),
        ("lite", "def load():\n    from export import checkpoint"),
        ("lite", "import importlib\nimportlib.import_module('benchmarks.phantom')"),
        ("export", "if True:\n    import benchmarks.phantom.film as film"),
        ("benchmarks", "try:\n    from export.lora import merge\nexcept ImportError:\n    pass"),
        ("benchmarks", "import tests.conftest"),
    ],
)
def test_the_check_sees_an_import_in_the_wrong_direction(package: str, source: str) -> None:
    assert len(forbidden_imports(source, package)) == 1


def test_importing_lite_is_cheap() -> None:
    loaded = run_python("-c", f"import sys, lite; print(*[name for name in {HEAVY} if name in sys.modules])")
    assert loaded == ""


def test_transformers_works_beside_our_kernels_folder() -> None:
    """Let transformers, which looks for a Hugging Face package named `kernels`, run a Llama from the root."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    code = """
import pathlib, kernels, torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    logits = model(torch.tensor([[1, 5, 7]])).logits
    tokens = model.generate(torch.tensor([[1, 5, 7]]), max_new_tokens=2, do_sample=False)
print(tuple(logits.shape), bool(torch.isfinite(logits).all()), tokens.shape[1] > 3)
print(pathlib.Path(kernels.__file__).resolve().parent.parent)
"""
    worked, root = run_python("-c", code).splitlines()
    assert worked == "(1, 3, 16) True True"
    assert root == str(ROOT)


def test_bitsandbytes_works_beside_our_kernels_folder() -> None:
    """Let bitsandbytes, whose CPU backend looks for the same package, quantise to NF4 and back."""
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    code = """
import torch, kernels
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
quantised, state = quantize_4bit(weight, quant_type="nf4")
back = dequantize_4bit(quantised, state)
print(quantised.numel() * 2 == weight.numel(), 0 < float((back - weight).abs().mean()) < 0.1)
"""
    assert run_python("-c", code).splitlines()[-1] == "True True"
