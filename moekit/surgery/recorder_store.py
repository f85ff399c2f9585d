"""What calibration has done so far, on disk, so that it goes on where it was interrupted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moekit.data.fingerprint import digest_of, fingerprint_of
from moekit.errors import OutputError
from moekit.routing import Carry
from moekit.surgery.blockwise import State
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.statistics import BlockStatistics

_FILE = "recording.safetensors"
Progress = tuple[int, list[BlockStatistics], list[State] | None]
"""Layers done, the statistics of the MoE blocks among them, and the states after them."""


class RecordingStore:
    """One file that holds all that is done; it is replaced whole after every layer.

    Args:
        folder: where; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @classmethod
    def of(
        cls, work: Path | None, checkpoint: Checkpoint, settings: Sequence[Any]
    ) -> RecordingStore:
        """The store of one recording: other files, data or settings have another.

        What the folder holds of another recording is deleted.
        """
        if work is None:
            return cls(None)
        files = sorted(path for path in checkpoint.folder.iterdir() if path.is_file())
        plain = [dataclasses.asdict(s) if dataclasses.is_dataclass(s) else s for s in settings]  # type: ignore[arg-type]
        folder = work / f"recording-{digest_of([fingerprint_of(files), plain])[:16]}"
        for other in work.glob("recording-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        return cls(folder)

    def load(self) -> Progress:
        """What was done; nothing if there is none, or if it cannot be read."""
        if self.folder is None or not (self.folder / _FILE).is_file():
            return 0, [], None
        try:
            with safe_open(str(self.folder / _FILE), framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return 0, [], None
        found = [
            BlockStatistics.of_tensors(_within(tensors, f"block.{number}."))
            for number in range(facts["blocks"])
        ]
        states = [
            _state_of(_within(tensors, f"state.{number}."), facts["parts"])
            for number in range(facts["states"])
        ]
        return facts["done"], found, states

    def save(self, done: int, found: list[BlockStatistics], states: list[State]) -> None:
        """Keep what is done.

        Raises:
            OutputError: the folder cannot be written.
        """
        if self.folder is None:
            return
        tensors = {
            f"block.{number}.{name}": tensor
            for number, block in enumerate(found)
            for name, tensor in block.tensors().items()
        }
        for number, state in enumerate(states):
            tensors |= {f"state.{number}.{k}": v for k, v in _state_tensors(state).items()}
        facts = {
            "done": done,
            "blocks": len(found),
            "states": len(states),
            "parts": ["carry" if isinstance(part, Carry) else "tensor" for part in states[0]],
        }
        part = self.folder / f".{_FILE}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, part, metadata={"facts": json.dumps(facts)})
            os.replace(part, self.folder / _FILE)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot write {self.folder} ({error}); free some space") from None


def _within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _state_tensors(state: State) -> dict[str, Tensor]:
    tensors = {}
    for place, part in enumerate(state):
        if not isinstance(part, Carry):
            tensors[str(place)] = part
            continue
        if part.logits_NE is not None:
            tensors[f"{place}.logits"] = part.logits_NE
        tensors |= {f"{place}.momentum.{i}": m for i, m in enumerate(part.momentum)}
    return tensors


def _state_of(tensors: dict[str, Tensor], parts: list[str]) -> State:
    return tuple(
        tensors[str(place)] if kind == "tensor" else _carry_of(tensors, place)
        for place, kind in enumerate(parts)
    )


def _carry_of(tensors: dict[str, Tensor], place: int) -> Carry:
    momentum = _within(tensors, f"{place}.momentum.")
    return Carry(
        tensors.get(f"{place}.logits"), tuple(momentum[str(i)] for i in range(len(momentum)))
    )
