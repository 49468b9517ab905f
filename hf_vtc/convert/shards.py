"""Checkpoint folders as streams of tensors: read shard by shard, write shard by shard."""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import read_json
from ..models.image_processing_vtc import write_json

# in the order in which a folder is searched: an index lists the shards, a single file holds everything
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


# weights that other software reads, by the end of their names
_OTHER_FORMATS = {
    ".gguf": "GGUF",
    ".ggml": "GGML",
    ".onnx": "ONNX",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".pth": "torch's own, under a name that may stand for anything",
    ".pt": "torch's own, under a name that may stand for anything",
    ".npz": "NumPy",
    ".engine": "TensorRT",
    ".xml": "OpenVINO",
}


def num_bytes(size: int | str, name: str = "max_shard_size") -> int:
    """Bytes from a number of them or a text such as `"2GB"`, `"500MB"`, `"20KB"`.

    Raises:
        ValueError: it is neither, or below one byte; the message calls it `name`.
    """
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([KMG]B)\s*", size, flags=re.IGNORECASE | re.ASCII)
        if found is None:
            raise ValueError(f"`{name}` must be bytes or like '2GB', '500MB', '20KB', got {size!r}.")
        size = int(float(found[1]) * _SIZE_UNITS[found[2].upper()])
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"`{name}` must be positive bytes or like '2GB', '500MB', '20KB', got {size!r}.")
    return size


class StoredTensor(NamedTuple):
    """What is known of a tensor before it is read; `name` is the one in its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    name: str


class CheckpointReader:
    """The tensors of a checkpoint folder, single or sharded, safetensors or `.bin`.

    Args:
        folder (`Path`): holds `model.safetensors`, its index and shards, or the `pytorch_model.bin` equivalents.

    Attributes:
        tensors (`dict[str, StoredTensor]`): name to shape, dtype and file, from the headers alone.

    Raises:
        FileNotFoundError: no weights, or a shard that the index lists is missing.
        ValueError: a shard is corrupt, unsafe, outside of the folder, or lacks a tensor that the index promises.
    """

    def __init__(self, folder: Path):
        files, weight_map = _find_shards(folder)
        self.tensors: dict[str, StoredTensor] = {}
        for file in files:
            with _open_shard(file) as shard:
                for name, (shape, dtype) in shard.entries.items():
                    # the index says which copy counts if a tensor lies in two shards
                    if weight_map.get(name, file.name) == file.name:
                        self.tensors[name] = StoredTensor(shape, dtype, file, name)
        lost = sorted(name for name in weight_map if name not in self.tensors)
        if lost:
            raise ValueError(
                f"The index of {folder} lists tensors that its shards do not hold: {_some(lost)}. "
                "Download the checkpoint again."
            )

    def add(self, other: "CheckpointReader", prefix: str) -> None:
        """Take in the tensors of another folder, as if they were stored here with `prefix` before their names."""
        self.tensors |= {f"{prefix}{name}": stored for name, stored in other.tensors.items()}

    def read(self, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` for `names` (all by default), each shard opened once.

        A tensor may be a view of the mapped file: clone what must outlive the file.
        """
        for names_here in self.by_shard(self.tensors if names is None else names):
            with _open_shard(self.tensors[names_here[0]].file) as shard:
                for name in names_here:
                    yield name, shard.read(self.tensors[name].name)

    def by_shard(self, names: Collection[str]) -> list[list[str]]:
        """`names` as they lie together in files, in the order of these."""
        by_file: dict[Path, list[str]] = {}
        for name, stored in self.tensors.items():
            if name in names:
                by_file.setdefault(stored.file, []).append(name)
        return list(by_file.values())

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same values. They are mapped, not loaded."""
        if self.tensors[first].shape != self.tensors[second].shape:
            return False
        (_, first_tensor), (_, second_tensor) = self.read((first, second))
        return torch.equal(first_tensor, second_tensor)

    def main_dtype(self) -> torch.dtype:
        """The floating dtype that most of the numbers have."""
        counts: dict[torch.dtype, int] = {}
        for stored in self.tensors.values():
            if stored.dtype.is_floating_point:
                counts[stored.dtype] = counts.get(stored.dtype, 0) + torch.Size(stored.shape).numel()
        return max(counts, key=counts.get, default=torch.float32)


class ShardWriter:
    """Write tensors to `model.safetensors`, or to shards and an index if they exceed `max_shard_size`.

    At most one shard is held in memory, less if `flush` is called before it is full. Call `close` at the end.

    Args:
        folder (`Path`): an existing folder.
        max_shard_size (`int` or `str`): bytes of one file, as a number or as `"2GB"`, `"500MB"`, `"20KB"`.
    """

    def __init__(self, folder: Path, max_shard_size: int | str):
        self.folder = folder
        self.max_bytes = num_bytes(max_shard_size)
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor under its final name."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_bytes:
            self.flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, give the shards their final names and write the index."""
        self.flush()
        total = len(self._shards)
        if total == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for shard_idx, names in enumerate(self._shards):
            file_name = f"model-{shard_idx + 1:05d}-of-{total:05d}.safetensors"
            self._part(shard_idx).rename(self.folder / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self.folder / _INDEX_NAMES[0], index)

    def flush(self) -> None:
        """Write a shard of what was added since the last one."""
        if self._pending:
            file = self._part(len(self._shards))
            file.touch()
            mode = file.stat().st_mode
            save_file(self._pending, file, metadata={"format": "pt"})
            # safetensors makes files that only their owner reads, whatever the umask
            file.chmod(mode)
            self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, shard_idx: int) -> Path:
        return self.folder / f"part-{shard_idx:05d}.safetensors"


class _Shard(NamedTuple):
    entries: dict[str, tuple[tuple[int, ...], torch.dtype]]
    read: Any


@contextmanager
def _open_shard(file: Path) -> Iterator[_Shard]:
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as shard:
            yield shard
    else:
        state = _load_bin(file)
        yield _Shard({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}, state.__getitem__)


@contextmanager
def _open_safetensors(file: Path) -> Iterator[_Shard]:
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        with file.open("rb") as raw:
            pointer = raw.read(40).startswith(b"version https://git-lfs")
        reason = "a Git LFS pointer, not the file itself" if pointer else f"truncated or corrupt ({error})"
        raise ValueError(f"{file} is {reason}. Download it again.") from error
    with handle:
        entries = {}
        for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
            stored = handle.get_slice(name)
            entries[name] = (tuple(stored.get_shape()), _torch_dtype(stored.get_dtype(), file))
        yield _Shard(entries, handle.get_tensor)


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    try:
        # mapped, so that opening a shard reads no weights; weights_only refuses pickles that run code
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    # a damaged pickle fails in every way that its instructions can
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{file} cannot be read as plain tensors ({reason}): it is truncated, holds code, or was written by a "
            "torch before 1.6. Use the safetensors files of this checkpoint, or save it again with "
            "`torch.save(state_dict)`."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} must hold a dict of tensors (a state dict). Save `model.state_dict()` instead.")
    for name, tensor in state.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            raise ValueError(
                f"{file}: {name!r} must be a dense tensor that is stored as large as it is. Save the state dict again "
                "from a plain model."
            )
    return state


def _is_plain(tensor: torch.Tensor) -> bool:
    # a tensor that repeats a small storage could claim any size
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _find_shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Files of a checkpoint in order, and the index (empty for a single file)."""
    for index_name, single_name in zip(_INDEX_NAMES, _SINGLE_NAMES, strict=True):
        if (folder / index_name).is_file():
            return _indexed_shards(folder / index_name)
        if (folder / single_name).is_file():
            return [folder / single_name], {}
        # a lone file under another name is a checkpoint too; several without an index may be anything
        lone = [file for file in sorted(folder.glob(f"*{Path(single_name).suffix}")) if file.is_file()]
        if len(lone) == 1 and lone[0].suffix == ".safetensors" and not (folder / "adapter_config.json").is_file():
            return lone, {}
        if len(lone) > 1:
            raise FileNotFoundError(
                f"{folder} has {len(lone)} {Path(single_name).suffix} files but no `{index_name}`. Download it too."
            )
    raise FileNotFoundError(
        f"{folder} has no weights{_other_weights(folder)}: `model.safetensors`, or `model.safetensors.index.json` and "
        "its shards, is needed (`pytorch_model.bin` and its index are read too)."
    )


def _other_weights(folder: Path) -> str:
    """What a folder has instead of weights that are read, for a message."""
    if (folder / "adapter_config.json").is_file():
        return " of a model, but an adapter. Merge it into its model (`merge_and_unload`) and convert that"
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in _OTHER_FORMATS:
            return f" in a format that is read, but {file.name} ({_OTHER_FORMATS[file.suffix.lower()]})"
    return ""


def _indexed_shards(index_file: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_file} has no `weight_map`. Download it again.")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        # a shard is a plain file name: an index from a stranger must not make us read elsewhere
        if name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name:
            raise ValueError(
                f"`weight_map` of {index_file} must name files of that folder, got {name!r}. The index is refused."
            )
    missing = [name for name in names if not (index_file.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index_file} lists {len(names)} shards, of which {len(missing)} are missing: {_some(missing)}. "
            "Download them into the same folder."
        )
    return [index_file.parent / name for name in names], weight_map


def _torch_dtype(name: str, file: Path) -> torch.dtype:
    names = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    if name not in names:
        raise ValueError(f"{file} holds tensors of type {name}, which are not read. Use an unquantised checkpoint.")
    return names[name]


def _some(names: list[str]) -> str:
    """At most eight names, for a message."""
    shown, num_hidden = ", ".join(names[:8]), len(names) - 8
    return f"{shown} and {num_hidden} more" if num_hidden > 0 else shown
