"""Tensors of a source checkpoint, read lazily and safely from safetensors or pickle files.

`TensorFiles` knows every tensor's name, dtype and shape without reading its bytes. `read` opens each file, copies the
tensors asked for and closes it again: a mapping that stayed open would keep the pages it touched in this process's
memory, and reading all of a 7B checkpoint would end with 13 GB resident. So the peak is what one call asks for.

Pickles are read with torch's restricted unpickler. Beyond tensors it allows NumPy *scalars* (training loops leave
learning rates and losses of that type in a checkpoint) and nothing else; a file that asks for more is refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

_LOG = logging.getLogger(__name__)
_LFS_MAGIC: Final = b"version https://git-lfs"
_GLOBAL_IN_MESSAGE: Final = re.compile(r"GLOBAL ([\w.]+)")
_SAFETENSORS_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_FLOAT_DTYPES: Final = frozenset(_SAFETENSORS_DTYPES.values())
# What torch.load has been seen to raise on files with some bytes changed.
_DAMAGED_PICKLE: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_NUMPY_SCALAR_TYPES: Final = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor is, and what it looks like, known without reading it."""

    file: Path
    key: str  # its name inside the file
    group: str = ""  # the dict inside the file that holds it, such as a training checkpoint's "state_dict"
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of one or several files, by the name callers use; messages say `what` they are: "the base model"."""

    def __init__(self, entries: Mapping[str, TensorEntry], *, what: str) -> None:
        """Keep the entries; nothing is read."""
        self.entries = dict(entries)
        self.what = what

    @property
    def files(self) -> list[Path]:
        """The files that hold at least one tensor."""
        return sorted({entry.file for entry in self.entries.values()})

    def require(self, expected: Mapping[str, tuple[int, ...]], *, unneeded: Iterable[str] = ()) -> None:
        """Check the names, shapes and dtypes of all tensors against what is expected.

        Args:
            expected: Shape of every tensor that will be read.
            unneeded: Regular expressions (full match) of tensors known not to be needed; they may be present.

        Raises:
            CheckpointError: A tensor is missing, misshapen, not floating point, or neither expected nor known.
        """
        missing = [name for name in expected if name not in self.entries]
        if missing:
            msg = f"{self.what}: got no tensor {missing[0]!r}{_and_more(missing)} · expected {len(expected)} tensors"
            raise CheckpointError(f"{msg} · the download is incomplete or of another model: fetch it again")
        patterns = [re.compile(pattern) for pattern in unneeded]
        for name, entry in self.entries.items():
            if name in expected:
                self._require_form(name, entry, expected[name])
            elif not any(pattern.fullmatch(name) for pattern in patterns):
                raise CheckpointError(
                    f"{entry.file}: got the tensor {name!r} {list(entry.shape)}, which this exporter does not know · "
                    f"expected only the tensors of {self.what} · check that this is the right model"
                )

    def _require_form(self, name: str, entry: TensorEntry, shape: tuple[int, ...]) -> None:
        if entry.shape != shape:
            msg = f"{entry.file}: got {name!r} of shape {list(entry.shape)} · expected {list(shape)}"
            raise CheckpointError(f"{msg} · its config.json belongs to another model, or the file is damaged")
        if entry.dtype not in {str(dtype).removeprefix("torch.") for dtype in _FLOAT_DTYPES}:
            msg = f"{entry.file}: got {name!r} as {entry.dtype} · expected floating point"
            raise CheckpointError(f"{msg} · quantised checkpoints cannot be exported: use the original download")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors into memory, in the dtype they are stored in.

        Raises:
            CheckpointError: A tensor holds NaN or infinity, or its file cannot be read any more.
        """
        wanted = list(names)
        tensors: dict[str, Tensor] = {}
        for file in sorted({self.entries[name].file for name in wanted}):
            here = {name: self.entries[name] for name in wanted if self.entries[name].file == file}
            with _opened(file, self.what) as get:
                for name, entry in here.items():
                    tensors[name] = get(entry)
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                msg = f"{self.entries[name].file}: got NaN or infinity in {name!r} · expected finite weights"
                raise CheckpointError(f"{msg} · the file is damaged: fetch it again")
        return {name: tensors[name] for name in wanted}


def open_tensors(folder: Path, stem: str, *, what: str) -> TensorFiles:
    """Find and index the tensors named `stem` in a folder: one file or shards, safetensors or pickle.

    Looks for `{stem}.safetensors`, `{stem}.safetensors.index.json`, `{stem}.bin`, `{stem}.bin.index.json`, and for
    `model` in place of `pytorch_model` with safetensors, in this order of preference.

    Raises:
        CheckpointError: None is there, an index leads out of the folder or disagrees with its shards, or a file is
            unsafe or damaged.
    """
    safetensors_stem = "model" if stem == "pytorch_model" else stem
    candidates = [
        f"{safetensors_stem}.safetensors",
        f"{safetensors_stem}.safetensors.index.json",
        f"{stem}.bin",
        f"{stem}.bin.index.json",
    ]
    there = [folder / name for name in candidates if (folder / name).is_file()]
    for path in there:
        listed = path.name.endswith(".index.json")
        # A mirror's index whose shards were not downloaded is in the way of weights that are whole.
        if listed and path != there[-1] and not _has_shards(path):
            _LOG.warning("%s: left aside: none of its shards is there", path)
            continue
        return TensorFiles(_index_shards(path, what) if listed else _index_file(path, what), what=what)
    msg = f"{folder}: got none of {', '.join(candidates)} · expected the weights of {what}"
    raise CheckpointError(f"{msg} · the download is incomplete, or this is the wrong folder")


def load_pickle(file: Path, *, what: str) -> Any:  # noqa: ANN401 - a pickle holds anything
    """Load a pickled checkpoint with its tensors memory-mapped.

    Raises:
        CheckpointError: The file is a git-lfs pointer, damaged, or asks for a type that is not allow-listed.
    """
    refuse_lfs_pointer(file, what)
    try:
        with torch.serialization.safe_globals(_numpy_scalar_globals()):
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, ValueError):
                # Files from before torch 1.6 are not zip archives and cannot be mapped; they are read whole.
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = _unsafe_globals(file, error)
        msg = f"{file}: got bytes that are no checkpoint · expected the weights of {what} · fetch the file again"
        if names:
            msg = (
                f"{file}: got a pickle that asks for {', '.join(names)} · expected tensors and numbers only · "
                "loading it could run code: do not use this file unless you trust it and have removed them"
            )
        raise CheckpointError(msg) from error
    except _DAMAGED_PICKLE as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        msg = f"{file}: got a damaged or truncated file ({reason}) · expected the weights of {what} · fetch it again"
        raise CheckpointError(msg) from error


def entries_of(file: Path, tensors: Mapping[Any, Any], *, group: str = "") -> dict[str, TensorEntry]:
    """List the tensors of an unpickled state dict, a file's or a group in it; anything but named tensors is refused."""
    entries = {}
    for key, tensor in tensors.items():
        where = f"{key!r} in {group}" if group else repr(key)
        if not isinstance(key, str):
            msg = f"{file}: got the key {where}, of type {type(key).__name__} · expected names of tensors"
            raise CheckpointError(f"{msg} · this is not the file the exporter reads")
        if not isinstance(tensor, torch.Tensor):
            msg = f"{file}: got {where} of type {type(tensor).__name__} · expected a tensor"
            raise CheckpointError(f"{msg} · this is not the file the exporter reads")
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries[key] = TensorEntry(file=file, key=key, group=group, shape=tuple(tensor.shape), dtype=dtype)
    return entries


def read_json(file: Path, *, what: str) -> dict[str, Any]:
    """Read a JSON object of the checkpoint, or raise CheckpointError."""
    if not file.is_file():
        msg = f"{file}: got no such file · expected {what} · the download is incomplete, or this is the wrong folder"
        raise CheckpointError(msg)
    refuse_lfs_pointer(file, what)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{file}: got something that is not JSON ({error}) · expected {what} · fetch the file again"
        raise CheckpointError(msg) from error
    if not isinstance(value, dict):
        msg = f"{file}: got a JSON {type(value).__name__} · expected {what}, an object · fetch the file again"
        raise CheckpointError(msg)
    return value


def refuse_lfs_pointer(file: Path, what: str) -> None:
    """Raise CheckpointError for the few lines that git leaves in place of a large file it has not fetched."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_MAGIC))
    except OSError as error:
        msg = f"{file}: got an unreadable file ({error.strerror}) · expected {what} · check its permissions"
        raise CheckpointError(msg) from error
    if start == _LFS_MAGIC:
        msg = f"{file}: got a git-lfs pointer · expected {what} · run `git lfs pull` in that folder"
        raise CheckpointError(msg)


def plain_file_name(name: object, *, where: str) -> str:
    """Return a file name that stays in its folder, or raise CheckpointError: a path could lead anywhere."""
    if not isinstance(name, str) or not name or name != Path(name).name or "\\" in name or name in {".", ".."}:
        msg = f"{where}: got the file name {name!r} · expected a plain name in the same folder · do not use this file"
        raise CheckpointError(msg)
    return name


def _has_shards(index: Path) -> bool:
    weight_map = read_json(index, what="an index of shards").get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return any((index.parent / plain_file_name(name, where=str(index))).is_file() for name in set(map(str, names)))


def _index_shards(index: Path, what: str) -> dict[str, TensorEntry]:
    weight_map = read_json(index, what="an index of shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        msg = f"{index}: got no weight_map · expected tensor names and their shards · fetch the file again"
        raise CheckpointError(msg)
    entries: dict[str, TensorEntry] = {}
    for shard in sorted({plain_file_name(name, where=str(index)) for name in weight_map.values()}):
        file = index.parent / shard
        if not file.is_file():
            msg = f"{file}: got no such file · expected a shard listed in {index.name} · fetch it, {what} needs it"
            raise CheckpointError(msg)
        for name, entry in _index_file(file, what).items():
            if name in entries:
                msg = f"{file}: got {name!r}, which {entries[name].file.name} holds too · expected it once"
                raise CheckpointError(f"{msg} · fetch again")
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries or entries[name].file.name != shard:
            msg = f"{index}: got {name!r} listed in {shard} · expected it there · fetch the shards again"
            raise CheckpointError(msg)
    return entries


def _index_file(file: Path, what: str) -> dict[str, TensorEntry]:
    refuse_lfs_pointer(file, what)
    if file.suffix == ".safetensors":
        entries = {}
        with _safetensors(file, what) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the handle is not a mapping
                part = tensors.get_slice(name)
                stored = part.get_dtype()
                dtype = str(_SAFETENSORS_DTYPES.get(stored, stored)).removeprefix("torch.")
                entries[name] = TensorEntry(file=file, key=name, shape=tuple(part.get_shape()), dtype=dtype)
        return entries
    content = load_pickle(file, what=what)
    if not isinstance(content, dict):
        msg = f"{file}: got a pickled {type(content).__name__} · expected a dict of tensors · fetch the file again"
        raise CheckpointError(msg)
    return entries_of(file, content)


@contextlib.contextmanager
def _opened(file: Path, what: str) -> Iterator[Callable[[TensorEntry], Tensor]]:
    """Open one file and yield a function that copies a tensor out of it."""
    if file.suffix == ".safetensors":
        with _safetensors(file, what) as tensors:
            yield lambda entry: tensors.get_tensor(entry.key).clone()
        return
    content = load_pickle(file, what=what)

    def get(entry: TensorEntry) -> Tensor:
        tensor: Tensor = (content[entry.group] if entry.group else content)[entry.key]
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    yield get


@contextlib.contextmanager
def _safetensors(file: Path, what: str) -> Iterator[Any]:
    try:
        with safe_open(str(file), framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        msg = f"{file}: got a damaged safetensors file ({error}) · expected the weights of {what} · fetch it again"
        raise CheckpointError(msg) from error


def _numpy_scalar_globals() -> list[Any]:
    """Return the types a pickled NumPy scalar needs, under the module names of NumPy 1 and of NumPy 2."""
    rebuild_scalar: Any = np.float64(0).__reduce__()[0]
    dtype_classes = [type(np.dtype(name)) for name in _NUMPY_SCALAR_TYPES]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    return [*((rebuild_scalar, f"{module}.scalar") for module in modules), np.dtype, *dtype_classes]


def _unsafe_globals(file: Path, error: pickle.UnpicklingError) -> list[str]:
    """Name the types a pickle asks for that are not allowed."""
    named = _GLOBAL_IN_MESSAGE.findall(str(error))
    unreadable = (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError)
    with contextlib.suppress(*unreadable), torch.serialization.safe_globals(_numpy_scalar_globals()):
        named += torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    return sorted(set(named))


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
