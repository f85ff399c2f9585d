"""Loading a checkpoint that a user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import moekit.models.language
import moekit.surgery  # noqa: F401  (both register our checkpoints with transformers)
from moekit.errors import CheckpointError, SpecError, first_line
from moekit.measure import inspect_checkpoint
from moekit.measure.inspect import read_config
from moekit.surgery.adapt import is_adapter, load_adapter
from moekit.surgery.adapt.files import adapter_settings


def load_model(checkpoint: str) -> PreTrainedModel:
    """A causal language model, moekit's or any of transformers, without running its code.

    A folder that ``moekit adapt`` wrote gives its model with the adapter on it.

    Raises:
        CheckpointError: there is none, or it is damaged or incomplete.
    """
    if not is_adapter(checkpoint):
        return load_base(checkpoint)
    _, base = adapter_settings(checkpoint)
    model = load_adapter(load_base(base), checkpoint)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse another model's tokenizer whose ids this model does not have.

    Raises:
        SpecError: the largest id has no row in the embedding.
    """
    largest, rows = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if largest >= rows:
        raise SpecError(
            f"the tokenizer {tokenizer.name_or_path} has ids up to {largest}, and the model's "
            f"embedding {rows} rows; leave --tokenizer out, or give the one of this model"
        )


def load_base(checkpoint: str) -> PreTrainedModel:
    """The same of a checkpoint alone.

    Raises:
        CheckpointError: as :func:`load_model`.
    """
    inspect_checkpoint(checkpoint)  # a damaged file is named before anything is loaded
    folder = Path(checkpoint).expanduser()
    local = folder.is_dir()
    loader: Any = AutoModelForCausalLM
    try:
        model, found = loader.from_pretrained(
            str(folder) if local else checkpoint,
            config=read_config(str(folder) if local else checkpoint, local),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=local,
            output_loading_info=True,
        )
    except Exception as error:  # transformers and safetensors raise a dozen kinds
        raise CheckpointError(f"{checkpoint} cannot be loaded: {first_line(error)}") from None
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise CheckpointError(
            f"{checkpoint} is incomplete: it lacks {names[0]}"
            + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
        )
    return model
