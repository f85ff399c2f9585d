"""What a checkpoint stores, from the headers of its safetensors files alone."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the format itself
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: its name in the file.
        dtype: as safetensors spells it, such as ``BF16``.
        shape: its shape.
        bytes: the size of its data.
        file: name of the file that holds it, of those in one folder; empty where unknown.
        offset: where its data starts in that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str = ""
    offset: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def elements_by_dtype(tensors: Iterable[StoredTensor]) -> dict[str, int]:
    """Stored elements of each dtype, the most first."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += tensor.elements
    return dict(counts.most_common())


def read_folder(folder: Path) -> list[StoredTensor]:
    """Every tensor of the checkpoint in ``folder``, in one file or in shards with an index.

    Raises:
        CheckpointError: there are no safetensors weights, a shard is missing, or a file is cut
            off or damaged; the message names the file, and the tensor where one is known.
    """
    index = folder / _INDEX
    if index.is_file():
        return _read_shards(folder, index)
    single = folder / "model.safetensors"
    if single.is_file():
        return read_file(single)
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} holds pickled weights only, which can run code when they are read; "
            "save the model as safetensors"
        )
    raise CheckpointError(
        f"{folder} holds no weights; wanted model.safetensors, or {_INDEX} and its shards"
    )


def read_file(path: Path) -> list[StoredTensor]:
    """The tensors of one file, checked against its size.

    Raises:
        CheckpointError: the file cannot be read, is cut off or is no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise CheckpointError(
                    f"{path} is cut off or no safetensors file: "
                    f"its header should take {length:,} bytes and it has {size:,} in all"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: its header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is damaged: its header is not a JSON object")
    header.pop("__metadata__", None)
    return [_tensor(path, name, entry, 8 + length, size) for name, entry in header.items()]


def _tensor(path: Path, name: str, entry: Any, base: int, size: int) -> StoredTensor:
    room = size - base
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        start, stop = (int(n) for n in entry["data_offsets"])
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path} is damaged: its entry for {name} is malformed") from None
    if stop > room:
        raise CheckpointError(
            f"{path} is cut off: {name} ends at byte {stop:,} of the data, which has {room:,}"
        )
    bits = _BITS.get(dtype)
    if start < 0 or (bits is not None and (stop - start) * 8 != math.prod(shape) * bits):
        raise CheckpointError(
            f"{path} is damaged: {name} is {dtype} of shape {list(shape)} "
            f"but has {stop - start:,} bytes"
        )
    return StoredTensor(name, dtype, shape, stop - start, path.name, base + start)


def _read_shards(folder: Path, index: Path) -> list[StoredTensor]:
    file_of = _weight_map(index)
    found = {}
    for name in sorted(set(file_of.values())):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {index.name} lists it")
        found[name] = {tensor.name: tensor for tensor in read_file(path)}
    for tensor, name in file_of.items():
        if tensor not in found[name]:
            raise CheckpointError(f"{folder / name} lacks {tensor}, which {index.name} lists there")
    return [found[name][tensor] for tensor, name in file_of.items()]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is damaged: it has no weight_map in JSON") from None
    for name in names.values():
        if Path(name).name != name:
            raise CheckpointError(f"{index} lists {name!r}, which is not a file beside it")
    return names
