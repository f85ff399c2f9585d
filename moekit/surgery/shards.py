"""Writing a checkpoint in shards that appears whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from moekit.errors import OutputError

INDEX = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors and writes them out whenever they fill a shard.

    Args:
        folder: where to write.
        shard_bytes: how much is collected before it is written.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Store ``tensor`` as ``name``."""
        self._pending[name] = tensor.detach().cpu().contiguous()
        self.bytes += tensor.nbytes
        if sum(pending.nbytes for pending in self._pending.values()) >= self.shard_bytes:
            self._flush()

    def finish(self) -> None:
        """Write what is left, and the index where there are several shards."""
        if self._pending or not self._shards:
            self._flush()
        total = len(self._shards)
        if total == 1:
            os.replace(self._part(0), self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{total:05}.safetensors"
            os.replace(self._part(number), self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _flush(self) -> None:
        tensors: dict[str, Tensor] = {}
        while self._pending:
            name, tensor = self._pending.popitem()
            # Tensors of one storage, such as slices of a bank, are stored apart.
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            tensors[name] = tensor if whole else tensor.clone()
        tensors = dict(reversed(tensors.items()))
        save_file(tensors, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(tensors))

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05}"


def is_report(path: Path) -> bool:
    """Whether a file of a checkpoint says how a command of ours made it, not what it is."""
    return path.name.startswith("moekit_") and path.suffix == ".json"


def require_free(output: Path) -> None:
    """Refuse a place for a result where something is.

    Raises:
        OutputError: a file, a folder that is not empty, or the folder that one is in.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} is there already and would be replaced; choose another place")
    if output.absolute().resolve() == Path.cwd().resolve():
        raise OutputError(f"{output} is the folder that you are in; name one that is to be made")


def beside(output: Path, ending: str) -> Path:
    """A hidden place next to ``output``, named after it."""
    return output.with_name(f".{output.name}.{ending}")


@contextmanager
def appearing(output: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``output`` once the block ends without an error.

    What an earlier process that was killed left behind is deleted.

    Raises:
        OutputError: ``output`` is there already, or cannot be written.
    """
    require_free(output)
    scratch = beside(output, f"{secrets.token_hex(4)}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in scratch.parent.glob(beside(output, "*.part").name):
            shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
            take_name(scratch, output)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise _unwritable(output, error) from None


def take_name(folder: Path, output: Path) -> None:
    """Give a finished folder the name ``output``, where nothing or an empty folder is.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        if output.exists():
            output.rmdir()
        os.replace(folder, output)
    except OSError as error:
        raise _unwritable(output, error) from None


def _unwritable(output: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {output} ({error.strerror or error}); free some space, or choose another "
        "place"
    )
