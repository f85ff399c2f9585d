"""The structure of a checkpoint, without loading its weights.

The config says what the model is: it is built without memory, on the ``meta`` device, and its
parameters are counted by what they do. The headers of the weight files say what is stored, and
whether all of it is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moekit.errors import CheckpointError
from moekit.measure.headers import StoredTensor, elements_by_dtype, read_folder
from moekit.measure.structure import (
    LayerStructure,
    active_parameters,
    moe_layers,
    parameters_by_part,
)

ADAPTER = "moekit_adapter.json"  # settings of what `moekit adapt` wrote


@dataclass(frozen=True)
class CheckpointStructure:
    """A model and its checkpoint.

    Attributes:
        name: the path or hub name that was given.
        architecture: class of the model.
        hidden_size, layers, vocabulary: width, number of blocks, number of token ids.
        moe_layers: its MoE layers in order; empty for a dense model.
        parameters: parameters by part, in the order of
            :data:`moekit.measure.structure.PARTS`.
        total: all parameters, tied ones once.
        active: parameters that one token uses: all but experts, and top-k of the experts.
        stored_bytes: size of the stored tensors.
        stored_dtypes: stored elements of each dtype.
    """

    name: str
    architecture: str
    hidden_size: int
    layers: int
    vocabulary: int
    moe_layers: tuple[LayerStructure, ...]
    parameters: dict[str, int]
    total: int
    active: int
    stored_bytes: int
    stored_dtypes: dict[str, int]


def inspect_checkpoint(path_or_name: str | Path) -> CheckpointStructure:
    """Read the structure of a folder or a model on the Hugging Face hub.

    Only the config and the headers of the weight files are read, of a hub model too. No code that
    comes with a checkpoint is run.

    Raises:
        CheckpointError: it is missing, incomplete, damaged, or of an unknown architecture.
    """
    name = os.fspath(path_or_name)
    is_local = os.path.isdir(os.path.expanduser(name))
    if is_local:
        name = os.path.expanduser(name)
    elif not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", name) or os.path.exists(name):
        raise CheckpointError(
            f"{name} is not a folder; give the folder of a checkpoint, or a name on the hub"
        )
    config = read_config(name, is_local)
    model = model_without_weights(name, config)
    stored = read_folder(Path(name)) if is_local else _hub_headers(name)
    structure = _structure(os.fspath(path_or_name), model, stored)
    _check_complete(structure, config)
    return structure


def read_config(name: str, is_local: bool) -> PreTrainedConfig:
    """The config of a folder or of a hub name, without what would fetch or run code.

    A config may name an attention kernel of the hub, which transformers would fetch and run; the
    attention is chosen here as if it named none.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = Path(name) / "config.json"
    if is_local and path.with_name(ADAPTER).is_file():
        raise CheckpointError(
            f"{name} is an adapter; give its model, or merge it with moekit merge-adapter first"
        )
    if is_local and not path.is_file():
        raise CheckpointError(f"{name} has no config.json; give the folder of a checkpoint")
    try:
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=False, local_files_only=is_local
        )
    except Exception as error:  # whatever a damaged or foreign config leads to
        where = path if is_local else name
        wanted = "" if is_local else "; is the name right, and the hub within reach?"
        raise CheckpointError(f"{where} cannot be read: {first_sentence(error)}{wanted}") from None
    config._attn_implementation = None
    return config


def model_without_weights(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The model that a config describes, on the ``meta`` device.

    Raises:
        CheckpointError: the config contradicts itself; the message begins with ``name``.
    """
    try:
        with torch.device("meta"):
            model_class = _model_class(config)
            if model_class is None:
                return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
            return model_class(config)
    except Exception as error:  # a config can contradict itself in as many ways as models check
        raise CheckpointError(
            f"{name}: its config.json does not make a model: {first_sentence(error)}"
        ) from None


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that the config names, where transformers has it."""
    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return None


def _hub_headers(name: str) -> list[StoredTensor]:
    try:
        files = huggingface_hub.get_safetensors_metadata(name).files_metadata.values()
    except Exception as error:
        raise CheckpointError(
            f"the weights of {name} cannot be read from the hub: {first_sentence(error)}"
        ) from None
    return [
        StoredTensor(key, t.dtype, tuple(t.shape), t.data_offsets[1] - t.data_offsets[0])
        for file in files
        for key, t in file.tensors.items()
    ]


def _structure(
    name: str, model: PreTrainedModel, stored: Sequence[StoredTensor]
) -> CheckpointStructure:
    parameters = parameters_by_part(model)
    config = model.config.get_text_config()
    return CheckpointStructure(
        name=name,
        architecture=type(model).__name__,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        moe_layers=moe_layers(model),
        parameters=parameters,
        total=sum(parameters.values()),
        active=active_parameters(model),
        stored_bytes=sum(tensor.bytes for tensor in stored),
        stored_dtypes=elements_by_dtype(stored),
    )


def _check_complete(structure: CheckpointStructure, config: PreTrainedConfig) -> None:
    """Refuse a checkpoint with fewer elements than the model; quantised ones cannot be compared."""
    if getattr(config, "quantization_config", None) is not None:
        return
    stored = sum(structure.stored_dtypes.values())
    if stored < structure.total:
        raise CheckpointError(
            f"{structure.name} is incomplete: it stores {stored:,} numbers and its config.json "
            f"describes a model of {structure.total:,} parameters"
        )


def first_sentence(error: Exception) -> str:
    """The first line of a foreign error, to put into one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
