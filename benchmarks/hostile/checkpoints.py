"""Kinds of hostile checkpoints, and of hospitals' adapters: as PEFT folders, and as parts of an artifact."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import sys
import zipfile
from typing import TYPE_CHECKING, Any, Final

import lite
from benchmarks.exports import PHANTOM
from benchmarks.hostile.child import MARK
from benchmarks.hostile.mutate import OUTSIDE, hostile_value, mutate_bytes, mutate_json
from lite.artifact.open import load_artifact
from lite.engines.adapters import Adapters
from lite.errors import LiteError

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.hostile.material import Material, Reading
    from lite.engines.protocol import EngineName

CHECKPOINT: Final = PHANTOM / "llava-rad-phantom"
BASE: Final = PHANTOM / "base"
HOSPITAL: Final = PHANTOM.parent / "hospital" / "northside"
# Settings of PEFT that are met, and that are not those of the files beside them.
_SETTINGS: Final[dict[str, tuple[Any, ...]]] = {
    "peft_type": ("IA3", "PREFIX_TUNING", "ADALORA", "LOHA", "lora"),
    "r": (1, 8, 17, 2**31, 16.0, "16"),
    "lora_alpha": (1e-300, 2**31 - 1, "32", True),
    "bias": ("all", "lora_only", None),
    "use_dora": (True, "yes"),
    "use_rslora": (True, "no", 1),
    "fan_in_fan_out": (True,),
    "modules_to_save": (["lm_head"], ["mm_projector"], "mm_projector", ["mm_projector", "embed_tokens"]),
    "target_modules": ("all-linear", ".*_proj", ["q_proj"], ["lm_head", "q_proj"], [[]], {"q_proj": 1}),
    "rank_pattern": ({"q_proj": 8}, {"(a+)+$": 8}, {"": 8}, {"q_proj": 8.5}, [1]),
    "alpha_pattern": ({"q_proj": 8}, {"layers.0.self_attn.q_proj": 1e9}, {"x": "y"}),
    "layers_to_transform": ([0], 0, [99]),
    "init_lora_weights": ("pissa", "olora", "gaussian", 1),
    "base_model_name_or_path": (None, "", "llava-rad-phantom", "/", 5, "\ud800"),
}
# What is stuck into a pickle: whoever runs it leaves a mark, or is seen by the audit.
_PAYLOADS: Final = (
    b"cbuiltins\nexec\n(V__import__('sys').modules['%s'] = 1\ntR." % MARK.encode(),
    b"cbuiltins\neval\n(V__import__('sys').modules.__setitem__('%s', 1)\ntR." % MARK.encode(),
    b"cos\nsystem\n(Vtrue\ntR.",
    b"csubprocess\nPopen\n((lVtrue\natR.",
    b"\x80\x04\x8c\x08builtins\x8c\x04open\x93\x8c%c%s\x8c\x01w\x86R." % (len(OUTSIDE), OUTSIDE.encode()),
    b"ctorch.hub\nload\n(V../outside\nVx\ntR.",
    b"(S'true'\nios\nsystem\n.",
    b"cposix\nsystem\n(Vtrue\ntR.",
    b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\n(I0\ntVb\ntR.",
)


def checkpoint(material: Material, rng: random.Random, folder: Path) -> Reading:  # noqa: ARG001 - it has its own
    """Spoil a file of a checkpoint or of its base, and let the exporter look at both."""
    source = folder / "source"
    for path in (CHECKPOINT, BASE):
        shutil.copytree(path, source / path.name, copy_function=os.link)
    _spoil(rng, source)
    command = ("check", "--checkpoint", str(source / CHECKPOINT.name), "--base", str(source / BASE.name))
    return lambda: _export(*command)


def lora(material: Material, rng: random.Random, folder: Path) -> Reading:
    """Spoil a hospital's LoRA as training leaves it, and add it to an artifact."""
    source, artifact = folder / "northside", folder / "artifact"
    shutil.copytree(HOSPITAL, source)
    shutil.copytree(material.artifact, artifact, copy_function=os.link)
    if rng.random() < 0.3:
        file = source / "adapter_config.json"
        chosen = {key: rng.choice(_SETTINGS[key]) for key in rng.sample(sorted(_SETTINGS), rng.choice((1, 1, 2)))}
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | chosen), encoding="utf-8")
    else:
        _spoil(rng, source)
    name = "north" if rng.random() < 0.9 else str(hostile_value(rng))
    command = ("adapter", str(source), "--artifact", str(artifact), f"--name={name}", "--base", str(BASE), "--device")

    def read() -> None:
        measured = ("--verify-studies", "1", "--verify-tokens", "1", "--keep-anyway", "--quiet")
        _export(*command, "cpu", "--published", str(CHECKPOINT), *measured)
        Adapters(load_artifact(artifact), [name])

    return read


def adapter(material: Material, rng: random.Random, folder: Path) -> Reading:
    """Spoil an adapter of an artifact, and draft with it; what is said to be its hash is now and then that."""
    path, film = folder / "artifact", next(material.studies.parent.rglob("*.png"))
    shutil.copytree(material.adapted, path, copy_function=os.link)
    listed = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    parts = listed["parts"]["adapters"]
    name, part = list(parts.items())[-1]
    spoils_entry = rng.random() < 0.4
    if spoils_entry:
        for key in ("fidelity", "sources"):  # which nothing is computed from
            part.pop(key, None)
        with contextlib.suppress(ValueError, RecursionError):  # it may be no JSON any more
            listed["parts"]["adapters"] = parts = json.loads(mutate_json(rng, json.dumps(parts)))
            name = rng.choice([name, *parts]) if isinstance(parts, dict) else name
    else:
        spoilt = _spoil(rng, path / "adapters" / name)
        if rng.random() < 0.8 and spoilt.is_file():
            data = spoilt.read_bytes()
            part["files"][spoilt.relative_to(path).as_posix()] = {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    (path / "manifest.json").unlink()
    (path / "manifest.json").write_text(json.dumps(listed), encoding="utf-8")
    engine: EngineName = rng.choice(("torch", "onnx"))

    def draft(artifact: Path) -> tuple[int, ...]:
        with lite.load(artifact, engine=engine, device="cpu", adapters=[name]) as model:
            return model.findings(film, adapter=name, max_new_tokens=2).token_ids

    def read() -> None:
        token_ids = draft(path)
        if spoils_entry and token_ids != draft(material.adapted):
            raise ValueError("it drafts another text")

    return read


# -- What is spoilt --------------------------------------------------------------------------------------------------


def _spoil(rng: random.Random, folder: Path) -> Path:
    """Spoil a file of a folder, or put another in its place; return it."""
    import safetensors.torch
    import torch

    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    data = file.read_bytes()
    file.unlink()
    way = rng.random()
    if way < 0.1:
        if way < 0.05:
            file.symlink_to(rng.choice((OUTSIDE, ".", "/", f"../{OUTSIDE}", "/dev/zero", "/etc/passwd")))
    elif file.suffix == ".json":
        file.write_bytes(mutate_json(rng, data.decode()))
    elif file.suffix == ".safetensors" and way < 0.7:
        file.write_bytes(safetensors.torch.save(_spoilt_tensors(rng, safetensors.torch.load(data))))
    elif file.suffix == ".bin" and way < 0.4:
        torch.save(_spoilt_tensors(rng, torch.load(io.BytesIO(data), weights_only=True)), file)
    elif file.suffix in (".bin", ".pt") and way < 0.6:
        file.write_bytes(_with_payload(rng, data))
    elif file.suffix in (".bin", ".pt", ".safetensors") and way < 0.8:
        file.with_suffix(".safetensors").write_bytes(_safetensors(rng))
    else:
        file.write_bytes(mutate_bytes(rng, data))
    return file


def _spoilt_tensors(rng: random.Random, tensors: dict[str, Any]) -> dict[str, Any]:
    """Leave tensors out, and change names, numbers, shapes and types of others."""
    import torch

    for name in rng.sample(sorted(tensors), rng.choice((1, 1, 2, 4))):
        tensor, way = tensors.pop(name), rng.randrange(6)
        if way == 1:
            name = rng.choice(
                (f"{name}x", "", OUTSIDE, name.replace("layers.0", "layers.９"), name.replace("_A", "_B"))
            )
        elif way == 2:
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf"), -6e4))
        elif way == 3:
            tensor = rng.choice(
                (tensor[:-1], tensor[..., 1:], tensor.transpose(0, -1), tensor[:0], tensor[None], tensor.flatten())
            )
        elif way == 4:
            tensor = tensor.to(rng.choice((torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool)))
        elif way == 5:
            tensor = tensor * rng.choice((0.0, -1.0, 1e4, 1e30))
        if way:
            tensors[name] = tensor.contiguous()
    return tensors


def _export(*arguments: str) -> None:
    """Run the exporter in this process, as its command line."""
    import runpy

    sys.argv = ["export", *arguments]
    try:
        sys.modules.pop("export.__main__", None)  # it is to run anew
        runpy.run_module("export", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise LiteError(f"exit status {end.code}") from None


def _with_payload(rng: random.Random, data: bytes) -> bytes:
    """Put something to run into a checkpoint: in place of its pickle, in the midst of it, or as the whole file."""
    payload = rng.choice(_PAYLOADS)
    if rng.random() < 0.2:
        return payload
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                at = rng.choice((0, 2, rng.randrange(len(content))))
                content = content[:at] + payload[:-1] + content[at:] if rng.random() < 0.7 else payload
            new.writestr(entry, content)
    return buffer.getvalue()


def _safetensors(rng: random.Random) -> bytes:
    """Write a safetensors file whose header does not go with its bytes."""
    header = json.dumps({"a": {"dtype": "F16", "shape": [2, 4], "data_offsets": [0, 16]}, "__metadata__": {"x": "y"}})
    spoilt = mutate_json(rng, header)
    length = len(spoilt) if rng.random() < 0.7 else rng.choice((0, 1, 2**31, 2**63, len(spoilt) + 9))
    return length.to_bytes(8, "little") + spoilt + bytes(rng.choice((0, 15, 16, 4096)))
