"""What a run has done so far, on disk, so that it goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moekit.errors import OutputError

_FILE = "run.safetensors"


class RunStore:
    """One file with weights, the optimiser's state and plain facts; it is replaced whole.

    Args:
        folder: where; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def of(cls, work: Path | None, digest: str, kind: str = "unlearning") -> RunStore:
        """The store of one run; what the folder holds of another one of its kind is deleted."""
        if work is None:
            return cls(None)
        folder = work / f"{kind}-{digest[:16]}"
        for other in work.glob(f"{kind}-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        return cls(folder)

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Facts and tensors; None if there are none, or if they cannot be read."""
        if self.folder is None or not (self.folder / _FILE).is_file():
            return None
        try:
            with safe_open(str(self.folder / _FILE), framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                return facts, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep them.

        Raises:
            OutputError: the folder cannot be written.
        """
        if self.folder is None:
            return
        part = self.folder / f".{_FILE}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(plain, part, metadata={"facts": json.dumps(facts)})
            os.replace(part, self.folder / _FILE)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {self.folder} ({error}); free some space") from None


def blocks_digest(blocks: Iterable[dict[str, Tensor]]) -> str:
    """Tells blocks of text apart by all of their tensors: tokens, masks and labels."""
    digest = hashlib.sha256()
    for block in blocks:
        for name, value in sorted(block.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def optimiser_tensors(optimiser: torch.optim.Optimizer, leaves: list[Tensor]) -> dict[str, Tensor]:
    """The leaves and what the optimiser keeps of each."""
    tensors = {f"leaf.{number}": leaf for number, leaf in enumerate(leaves)}
    for number, leaf in enumerate(leaves):
        state = optimiser.state.get(leaf, {})
        tensors |= {f"state.{number}.{name}": value for name, value in state.items()}
    return tensors


def restore(
    optimiser: torch.optim.Optimizer, leaves: list[Tensor], tensors: dict[str, Tensor]
) -> None:
    """The reverse of :func:`optimiser_tensors`."""
    for number, leaf in enumerate(leaves):
        with torch.no_grad():
            leaf.copy_(tensors[f"leaf.{number}"])
        prefix = f"state.{number}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if own:
            optimiser.state[leaf] = {
                name: value if name == "step" else value.to(leaf.device)
                for name, value in own.items()
            }
