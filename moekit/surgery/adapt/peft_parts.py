"""The parts of an adapter that peft makes: plain LoRA, and LoRA on fused expert tensors."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moekit.errors import MissingExtraError
from moekit.surgery.adapt.spec import AdaptSpec


def inject(model: PreTrainedModel, linears: list[str], fused: list[str], spec: AdaptSpec) -> None:
    """Put peft's LoRA on projections and on fused parameters, by path.

    Raises:
        MissingExtraError: peft is not installed.
    """
    peft = _peft()
    common: dict[str, Any] = {"r": spec.rank, "lora_alpha": spec.alpha}
    configs = []
    if linears:
        transposed = isinstance(model.get_submodule(linears[0]), Conv1D)
        configs.append(
            peft.LoraConfig(
                **common,
                target_modules=linears,
                lora_dropout=spec.dropout,
                fan_in_fan_out=transposed,
            )
        )
    if fused:
        configs.append(peft.LoraConfig(**common, target_modules=[], target_parameters=fused))
    for config in configs:
        peft.inject_adapter_in_model(config, model)
        del model.peft_config  # two settings of one adapter, which peft would take for two


def merge_injected(model: nn.Module) -> None:
    """Add what peft's layers learned to the weights that they adapt, and take the layers off."""
    peft = _peft()
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)
    ]
    for _, layer in layers:
        layer.merge(safe_merge=True)
    inner = {id(layer.base_layer) for _, layer in layers}
    for path, layer in layers:
        if id(layer) not in inner:  # a fused module has one layer around another
            model.set_submodule(path, layer.get_base_layer())


def has_injected(model: nn.Module) -> bool:
    """Whether peft has a part in the model's adapter."""
    return any(hasattr(module, "lora_embedding_A") for module in model.modules())


def _peft() -> Any:
    try:
        import peft
        import peft.tuners.tuners_utils
    except ImportError:
        raise MissingExtraError(
            "LoRA on attention and on fused experts needs peft; run pip install 'moekit[adapt]', "
            "or adapt dense feed-forward parts alone (attention=False, --no-attention)"
        ) from None
    return peft
