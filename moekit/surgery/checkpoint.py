"""A checkpoint read tensor by tensor, each checked, none kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moekit.errors import CheckpointError
from moekit.measure.headers import StoredTensor, read_folder
from moekit.measure.inspect import first_sentence, model_without_weights, read_config
from moekit.surgery.pruned import PrunedMoEConfig
from moekit.surgery.stored_names import StoredNames
from moekit.surgery.view_architecture import Architecture
from moekit.surgery.view_architectures import architecture_of

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SLAB = 1 << 18  # elements looked at together, so that looking takes little memory


class Checkpoint:
    """The folder of a causal language model of a supported architecture.

    Opening it reads the config and the headers of the weight files, and compares them.

    Args:
        path: its folder.
        architecture: what is known of a config's kind; of mixtures by default.

    Attributes:
        folder: the folder.
        config: its config.
        architecture: what is known of its kind.
        stored: its tensors by their stored names.

    Raises:
        CheckpointError: it is missing, incomplete, damaged, quantised, or its config and its
            tensors contradict each other; the message names file and tensor.
        SpecError: its architecture is not supported.
    """

    def __init__(
        self,
        path: str | Path,
        architecture: Callable[[PreTrainedConfig], Architecture] = architecture_of,
    ) -> None:
        self.folder = Path(path).expanduser()
        if not self.folder.is_dir():
            raise CheckpointError(f"{path} is not a folder; give the folder of a checkpoint")
        self.config: PreTrainedConfig = read_config(str(self.folder), is_local=True)
        inner = self.config.text_config if self.is_pruned else self.config
        self.architecture: Architecture = architecture(inner)
        if getattr(self.config, "quantization_config", None) is not None:
            raise CheckpointError(
                f"{self.folder / 'config.json'} says that the weights are quantised; experts can "
                "be changed in full precision only, so save the model dequantised first"
            )
        self.stored = {tensor.name: tensor for tensor in read_folder(self.folder)}
        skeleton = self.skeleton()
        self._shapes = {name: t.shape for name, t in skeleton.state_dict().items()}
        self._tied_names: dict[str, str] = dict(skeleton.all_tied_weights_keys)
        # Buffers that older versions of transformers stored, and what the architecture leaves out.
        unexpected = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._check((r"rotary_emb\.inv_freq$", *unexpected))

    @property
    def is_pruned(self) -> bool:
        """Whether it is one of :class:`~moekit.surgery.pruned.PrunedMoEForCausalLM`."""
        return isinstance(self.config, PrunedMoEConfig)

    @property
    def tensor_names(self) -> list[str]:
        """The tensors of the model by their names in it."""
        return list(self._shapes)

    def shape_of(self, name: str) -> torch.Size:
        """The shape of a tensor of the model."""
        return self._shapes[name]

    @property
    def names(self) -> StoredNames:
        """How the tensors of modules are called on disk."""
        return self.architecture.stored

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the model computes in: the config's type, or that of most stored numbers."""
        named = getattr(self.config, "dtype", None)
        if isinstance(named, torch.dtype):
            return named
        sizes: dict[str, int] = {}
        for tensor in self.stored.values():
            if tensor.dtype.endswith(("F16", "F32", "F64")):
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.elements
        return _DTYPES[max(sizes, key=lambda name: sizes[name])]

    def skeleton(self) -> PreTrainedModel:
        """The model on the ``meta`` device, without weights.

        Raises:
            CheckpointError: the config contradicts itself, or names no causal language model.
        """
        model = model_without_weights(str(self.folder), self.config)
        if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            raise CheckpointError(
                f"{self.folder} holds a {type(model).__name__}; wanted a causal language model"
            )
        return model

    def read(self, name: str) -> Tensor:
        """A stored tensor.

        Raises:
            CheckpointError: the file is cut off, or the tensor holds NaN or infinity.
        """
        entry = self.stored[name]
        path = self.folder / entry.file
        tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # a buffer, which its type hides
        with path.open("rb") as file:
            file.seek(entry.offset)
            got = file.readinto(data)
        if got != entry.bytes:
            raise CheckpointError(f"{path} is cut off within {name}")
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity")
        return tensor

    def read_state(self, module: nn.Module, path: str) -> dict[str, Tensor]:
        """The tensors of a module of the skeleton, as they are stored.

        Args:
            module: the module.
            path: its path in the model.
        """
        return {
            name: self.names.read(self.source_of(f"{path}.{name}"), t.shape, self.stored, self.read)
            for name, t in module.state_dict().items()
        }

    def source_of(self, name: str) -> str:
        """``name``, or the tensor that it is tied to where it is not stored itself."""
        tied = self._tied_names.get(name)
        if tied is None or self.names.plain(name) in self.stored or name in self.stored:
            return name
        return tied

    def _check(self, ignored: Sequence[str]) -> None:
        used = set(map(self.names.plain, self._tied_names)) | set(self._tied_names)
        for name, wanted in self._shapes.items():
            for stored, shape in self.names.used(self.source_of(name), wanted, self.stored):
                self._check_tensor(stored, shape)
                used.add(stored)
        for name in self.stored:
            if name not in used and not any(re.search(pattern, name) for pattern in ignored):
                raise CheckpointError(
                    f"{self.folder / self.stored[name].file} holds {name}, which is no part of the "
                    f"model that {self.folder / 'config.json'} describes; mend the one or the other"
                )

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self.stored.get(name)
        if entry is None:
            raise CheckpointError(
                f"{self.folder} is incomplete: its config.json describes {name} of shape "
                f"{list(shape)}, and no file holds it"
            )
        self._check_entry(entry, shape)

    def _check_entry(self, entry: StoredTensor, shape: tuple[int, ...]) -> None:
        path = self.folder / entry.file
        if entry.shape != shape:
            raise CheckpointError(
                f"{path}: {entry.name} has shape {list(entry.shape)}, and config.json makes it "
                f"{list(shape)}"
            )
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: {entry.name} is {entry.dtype}, a packed type; experts can be changed in "
                f"{', '.join(name for name in _DTYPES if name.endswith(('16', '32', '64')))} only"
            )


def local_folder(name: str | Path) -> Path:
    """The folder of a checkpoint, downloaded into the hub's cache if it is a name there.

    Raises:
        CheckpointError: there is no such folder, and the hub does not answer to the name.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen kinds
        raise CheckpointError(
            f"{name} is not a folder, and cannot be fetched from the hub: {first_sentence(error)}"
        ) from None


def _is_finite(tensor: Tensor) -> bool:
    slabs = tensor.reshape(-1).split(_SLAB)
    return all(bool(torch.isfinite(slab).all()) for slab in slabs)
