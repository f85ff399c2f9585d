"""A checkpoint that differs from another in the trained tensors alone, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.errors import CheckpointError, OutputError
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.shards import is_report
from moekit.surgery.unlearn.trained import Trained

_COPIED = (".json", ".txt", ".model", ".jinja", ".md")


def write_unlearned(
    checkpoint: Checkpoint, model: PreTrainedModel, trained: Trained, folder: Path
) -> list[str]:
    """Copy a checkpoint and put the trained tensors in the places of the old ones.

    Files keep their names and their division, and every byte that is not a trained weight stays.

    Args:
        checkpoint: the model before, which is only read.
        model: the model after.
        trained: what was trained of it.
        folder: empty, for the result.

    Returns:
        The stored names of the tensors that were written.

    Raises:
        OutputError: it cannot be written.
        CheckpointError: a trained weight is not finite in the type that it is stored in.
    """
    weights = {entry.file for entry in checkpoint.stored.values()}
    for path in sorted(checkpoint.folder.iterdir()):
        is_rest = path.suffix in _COPIED and not is_report(path)
        if path.is_file() and (path.name in weights or is_rest):
            _copy(path, folder / path.name)
    written = []
    for name, tensor in _new_tensors(checkpoint, model, trained):
        _put(checkpoint, folder, name, tensor)
        written.append(name)
    return written


def _new_tensors(
    checkpoint: Checkpoint, model: PreTrainedModel, trained: Trained
) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors that change, by stored name, in the type of the model."""
    touched = _touched(trained)
    for name, parameter in model.state_dict(keep_vars=True).items():
        experts = touched.get(id(parameter), ())
        if experts is not None and not experts:
            continue
        names = checkpoint.names
        parts = names.parts(name, parameter.shape)
        if parts is None or name in checkpoint.stored:
            stored = name if name in checkpoint.stored else names.plain(name)
            if stored in checkpoint.stored:  # a tied tensor may be stored once
                yield stored, _merged(checkpoint, stored, parameter.detach(), experts)
            continue
        for part in parts:
            if experts is None or part.expert in experts:
                yield part.name, part.of(parameter.detach())


def _touched(trained: Trained) -> dict[int, set[int] | None]:
    """The experts of each parameter that are trained; None for all of the parameter."""
    found: dict[int, set[int] | None] = {id(p): None for p in trained.whole.values()}
    for tap in trained.taps:
        for parameter in tap.parameters():
            own = found.setdefault(id(parameter), set())
            if own is not None:
                own.add(tap.expert)
    return found


def _merged(checkpoint: Checkpoint, name: str, tensor: Tensor, experts: set[int] | None) -> Tensor:
    """The stored tensor with the trained experts in it, or all of ``tensor``."""
    if experts is None:
        return tensor
    stored = checkpoint.read(name)
    for expert in experts:
        stored[expert] = tensor[expert].to(stored.dtype)
    return stored


def _put(checkpoint: Checkpoint, folder: Path, name: str, tensor: Tensor) -> None:
    entry = checkpoint.stored[name]
    dtype = checkpoint.read(name).dtype
    data = tensor.detach().cpu().to(dtype).contiguous()
    if not bool(torch.isfinite(data).all()):
        raise CheckpointError(
            f"{name} is not finite as {entry.dtype} after unlearning; use a lower learning rate"
        )
    raw = data.reshape(-1).view(torch.uint8).numpy().tobytes()
    with (folder / entry.file).open("r+b") as file:
        file.seek(entry.offset)
        file.write(raw)


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise OutputError(
            f"cannot copy {source} ({error.strerror or error}); free some space, or choose another "
            "place"
        ) from None
