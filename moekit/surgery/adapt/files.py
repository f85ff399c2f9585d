"""Adapters on disk: the weights that were added, and how to put them on again."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moekit.errors import CheckpointError, OutputError
from moekit.measure.inspect import ADAPTER
from moekit.surgery.adapt.install import (
    adapter_of,
    adapter_parameters,
    has_adapter,
    install_adapter,
)
from moekit.surgery.adapt.merge import merge_adapter
from moekit.surgery.adapt.spec import AdaptSpec

WEIGHTS = "adapter.safetensors"
SETTINGS = ADAPTER


def save_adapter(
    model: PreTrainedModel,
    folder: Path | str,
    base: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: dict[str, Any] | None = None,
) -> None:
    """Write a model's adapter: its own weights, in safetensors, and its settings, in JSON.

    The folder appears when it is complete; an adapter that is there is replaced.

    Args:
        model: with an adapter.
        folder: where.
        base: folder or hub name of the model that it was put on; the model's own name if None.
        tokenizer: saved beside it.
        report: put in the settings.

    Raises:
        SpecError: the model has no adapter.
        OutputError: the folder cannot be written, or holds something else.
    """
    folder = Path(folder)
    spec, weights = adapter_of(model), adapter_parameters(model)
    if folder.exists() and any(folder.iterdir()) and not is_adapter(folder):
        raise OutputError(f"{folder} holds something else than an adapter; give another folder")
    settings = {
        "base": base or model.config.name_or_path,
        "architecture": type(model).__name__,
        "adapter": spec.to_dict(),
        "report": report or {},
    }
    scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        scratch.mkdir(parents=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(settings, indent=1, ensure_ascii=False)
        (scratch / SETTINGS).write_text(text + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(scratch))
        _replace(scratch, folder)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {folder} ({error}); free some space") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_adapter(folder: Path | str) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / SETTINGS).is_file()


def adapter_settings(folder: Path | str) -> tuple[AdaptSpec, str]:
    """An adapter's spec, and the name of the model that it belongs on.

    Raises:
        CheckpointError: the folder holds none, or one that cannot be read.
    """
    path = Path(folder) / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        spec = AdaptSpec.from_dict(found["adapter"])
        assert isinstance(spec, AdaptSpec)
        return spec, str(found["base"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{path} cannot be read as an adapter's settings: {error}") from None


def load_adapter(model: PreTrainedModel, folder: Path | str) -> PreTrainedModel:
    """Put a saved adapter on a model, where it is.

    Args:
        model: the model that it was trained on, without an adapter, or with an untrained one.
        folder: where :func:`save_adapter` wrote it.

    Raises:
        CheckpointError: it is damaged, or of another model or size; both shapes are named.
        MissingExtraError: it needs peft, which is not installed.
    """
    spec, base = adapter_settings(folder)
    stored = _read(Path(folder) / WEIGHTS)
    fresh = not has_adapter(model)
    own = spec if fresh else adapter_of(model)
    if fresh:
        install_adapter(model, spec)
    weights = adapter_parameters(model)
    try:
        _require_equal(folder, stored, weights, base)
    except CheckpointError:
        if fresh:  # an adapter that has not been trained adds nothing when it is merged
            merge_adapter(model, 0)
        raise
    if own != spec:
        raise CheckpointError(
            f"{folder} is an adapter of {spec}, and the model has one of {own}; load the model "
            "without an adapter"
        )
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(stored[name])
    return model


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _require_equal(
    folder: Path | str, stored: dict[str, Tensor], weights: dict[str, Any], base: str
) -> None:
    for name, parameter in weights.items():
        if name not in stored:
            raise CheckpointError(
                f"{folder} lacks {name}, which the model's adapter has; it was made for {base}"
            )
        if stored[name].shape != parameter.shape:
            raise CheckpointError(
                f"{name} is {tuple(stored[name].shape)} in {folder} and {tuple(parameter.shape)} "
                f"in the model; it was made for {base}"
            )
        if not bool(stored[name].isfinite().all()):
            raise CheckpointError(f"{name} in {folder} holds NaN or infinite values")
    extra = sorted(set(stored) - set(weights))
    if extra:
        raise CheckpointError(
            f"{folder} has {extra[0]}, which the model's adapter lacks; it was made for {base}"
        )


def _replace(scratch: Path, folder: Path) -> None:
    """Move an adapter to where another one may be."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        os.replace(folder, old)
        os.replace(scratch, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(scratch, folder)
