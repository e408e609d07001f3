"""What the design promises: who may import whom, how long things may be, what `import lite` costs.

A budget that hurts is a reason to redesign. Where it is wrong, raise it in a commit that says why.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from repository import ROOT, run_python

# kernels < lite < {export, benchmarks} < tests: what each package may import of the project, itself included.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "lite": {"kernels", "lite"},
    "export": {"kernels", "lite", "export"},
    "benchmarks": {"kernels", "lite", "benchmarks"},
}
# Decoders that are not LLaVA-Rad's are none of the exporter's command line: its functions are measured on them.
MAY_IMPORT_EXPORT = "benchmarks/quality/real/"
FIRST_PARTY = {*MAY_IMPORT, "tests"}
# The same inside lite, lowest first: a module or package imports itself and what stands in lines above its own.
LITE = (
    {"_version", "errors"},
    {"config", "console", "files"},
    {"artifact", "image"},
    {"image_tokens", "memory", "prompt"},
    {"studies"},
    {"engines"},
    {"vision"},
    {"session"},
    {"model"},
    {"loading", "retrieval"},
    {"lite"},  # the façade: what `import lite` gives
    {"eval"},
    {"bench", "cohort", "serve"},
    {"cli"},
    {"__main__"},
)

MAX_FILE, MAX_FUNCTION = 400, 50
# What each weighs today. A capability that needs more raises its line in the commit that brings it, and says why.
MAX_LINES = {"lite": 28_480, "export": 7_860, "kernels": 2_650, "benchmarks": 15_830, "tests": 33_560}
MAX_REQUEST_LINES, MAX_REQUEST_FILES = 1_800, 9
# What one request goes through, from the command line to the kernel.
REQUEST_PATH = (
    "lite/__main__.py",
    "lite/cli/generate.py",
    "lite/model.py",
    "lite/session/session.py",
    "lite/session/loop.py",
    "lite/engines/torch_engine/decoder.py",
    "lite/engines/torch_engine/linear.py",
    "kernels/quant_matmul.py",
    "kernels/gpu/quant_matmul.py",
)
# Files of kernels/gpu that hold no op.
NO_OPS = {"__init__", "probe"}
# What a command line's first help shall not wait for.
RUNTIME = {"PIL", "kernels", "numpy", "onnxruntime", "sentencepiece"}
HEAVY = {"bitsandbytes", "cv2", "jinja2", "matplotlib", "onnx", "onnxscript", "playwright", "pydicom", "radgraph"}
HEAVY |= {"prometheus_client", "sse_starlette", "starlette", "uvicorn"}
HEAVY |= {"openai", "pynetdicom", "rouge_score", "sacrebleu", "torch", "transformers", "triton"}


def modules(*folders: str) -> list[str]:
    files = sorted(file for folder in folders for file in (ROOT / folder).glob("[a-z]*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]


# Imported one after another: modules, and the packages that are not loaded then.
IMPORTS = (
    (("lite", "lite.__main__"), RUNTIME | HEAVY | {"benchmarks", "export"}),
    (modules("lite/eval", "lite/bench"), HEAVY | {"benchmarks", "export", "onnxruntime"}),
    (("export", "export.__main__"), HEAVY | {"benchmarks", "onnxruntime"}),
    ([*modules("kernels"), "export.quantize.bnb"], HEAVY - {"torch"}),
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


@cache
def tracked(*packages: str) -> tuple[Path, ...]:
    """Return the Python files of these packages that git knows of, or would if asked to add all."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *packages]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(ROOT / name for name in names if name.endswith(".py") and (ROOT / name).exists())


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield name and length of every function, its docstring left out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = isinstance(first, ast.Expr) and ast.get_docstring(node, clean=False) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - docstring


def lite_units(source: str, unit: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of each module or package of lite, other than its own, that a module of `unit` imports."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = [f"lite.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("lite.") in set().union(*LITE) else "lite" for name in named]
            names = names if node.module == "lite" else [node.module]
        for name in names:
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0] or "lite"
            if top == "lite" and other != unit:
                yield node.lineno, other


def unit_of(file: Path) -> str:
    parts = file.relative_to(ROOT / "lite").with_suffix("").parts
    if parts[-1] == "__main__":  # a command line, wherever it stands, is above all that it commands
        return "__main__"
    return "lite" if parts == ("__init__",) else parts[0]


def test_lite_imports_only_what_is_below() -> None:
    height = {unit: i for i, units in enumerate(LITE) for unit in units}
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports lite.{other}"
        for file in tracked("lite")
        for line, other in lite_units(file.read_text(encoding="utf-8"), unit_of(file))
        if height[other] >= height[unit_of(file)]
    ]
    assert wrong == []


def test_files_and_functions_are_short() -> None:
    texts = {file: file.read_text(encoding="utf-8") for file in tracked(*FIRST_PARTY)}
    long = [f"{relative(file)}: {num_lines(file)} lines" for file in texts if num_lines(file) > MAX_FILE]
    long += [
        f"{relative(file)}: {name}, {lines} lines"
        for file, text in texts.items()
        for name, lines in functions(text)
        if lines > MAX_FUNCTION
    ]
    assert long == []


@pytest.mark.parametrize("package", MAX_LINES)
def test_a_package_weighs_no_more_than_was_agreed(package: str) -> None:
    assert sum(map(num_lines, tracked(package))) <= MAX_LINES[package]


def test_a_request_reads_through_a_few_short_files() -> None:
    assert len(REQUEST_PATH) <= MAX_REQUEST_FILES
    assert sum(num_lines(ROOT / name) for name in REQUEST_PATH) <= MAX_REQUEST_LINES


@pytest.mark.parametrize("op", sorted(file.stem for file in tracked("kernels/gpu") if file.stem not in NO_OPS))
def test_every_op_has_launcher_reference_tests_and_benchmark_under_one_name(op: str) -> None:
    """A quartet: nothing runs that is not held against a plain reference, compiled for cards of today, and timed."""
    for file in (f"kernels/{op}.py", "kernels/reference.py"):
        assert f"def {op}(" in (ROOT / file).read_text(encoding="utf-8"), file
    for folder in ("tests/kernels/test_kernels_triton", "tests/compile_kernels", "benchmarks/speed/"):
        texts = [file.read_text(encoding="utf-8") for file in tracked() if relative(file).startswith(folder)]
        assert any(re.search(rf"\b{op}\b", text) for text in texts), folder


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_packages_import_only_what_is_below_them(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {top}"
        for path in files
        for line, top in forbidden_imports(path.read_text(encoding="utf-8"), package)
        if (top, relative(path).startswith(MAY_IMPORT_EXPORT)) != ("export", True)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("kernels", "import lite.errors"),
        ("lite", "def load():\n    from export import checkpoint"),
        ("lite", "import importlib\nimportlib.import_module('benchmarks.phantom')"),
        ("export", "if True:\n    import benchmarks.phantom.film as film"),
        ("benchmarks", "try:\n    from export.source.lora import merge\nexcept ImportError:\n    pass"),
        ("benchmarks", "import tests.conftest"),
    ],
)
def test_the_check_sees_an_import_in_the_wrong_direction(package: str, source: str) -> None:
    assert len(forbidden_imports(source, package)) == 1


def imported_modules(file: Path) -> Iterator[str]:
    """Yield what a file imports, wherever in it: modules, and of `from package import name` both."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from modules if any(map(module_file, modules)) else [node.module]


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    found = path.with_suffix(".py"), path / "__init__.py"
    return next((file for file in found if file.exists()), None)


def test_no_files_import_each_other() -> None:
    """Not even for types, or within functions: one can be read before the other."""
    graph = {
        file: {found for name in imported_modules(file) if (found := module_file(name)) not in (None, file)}
        for file in tracked(*MAY_IMPORT)
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1]
        pytest.fail(" ← ".join(map(relative, circle)))


def test_imports_are_cheap() -> None:
    """In one interpreter, from the lightest to the heaviest: what each loads, and none of it what it need not."""
    code = f"""
import sys
steps = {IMPORTS!r}
for modules, absent in steps:
    for module in modules:
        __import__(module)
    print(*modules, "loads", *sorted({{name.partition(".")[0] for name in sys.modules}} & absent))
"""
    assert [line for line in run_python("-c", code).splitlines() if not line.endswith("loads")] == []


def test_transformers_and_bitsandbytes_work_beside_our_kernels_folder() -> None:
    """Let them, who look for a Hugging Face package named `kernels`, run a Llama from the root, and round to NF4."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    code = """
import pathlib, kernels, torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
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
weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
quantised, state = quantize_4bit(weight, quant_type="nf4")
back = dequantize_4bit(quantised, state)
print(quantised.numel() * 2 == weight.numel(), 0 < float((back - weight).abs().mean()) < 0.1)
print(pathlib.Path(kernels.__file__).resolve().parent.parent)
"""
    assert run_python("-c", code).splitlines() == ["(1, 3, 16) True True", "True True", str(ROOT)]
