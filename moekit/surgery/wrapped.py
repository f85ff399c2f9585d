"""A model of transformers inside one of ours, where its own class cannot express what was done."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin

from moekit.errors import SpecError


class WrappedConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Base of the configs of such models.

    Attributes:
        text_config: the config of the model before, or its JSON.
    """

    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    text_config: Any = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            settings = dict(self.text_config)
            kind = settings.pop("model_type")
            self.text_config = AutoConfig.for_model(kind, **settings)
        if self.text_config is not None:
            self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """What a wrapping config takes over from the config of the model before."""
    return {
        "text_config": copy.deepcopy(config),
        "dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


class WrappedForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Base of such models.

    Attributes:
        inner: the model of transformers, changed by :meth:`change`.
    """

    base_model_prefix = "inner"
    balance_in_words = "this model has no balance loss of transformers"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: WrappedConfig) -> None:
        super().__init__(config)
        text_config = copy.deepcopy(config.text_config)
        text_config._attn_implementation_internal = None  # each architecture has its own default
        if getattr(text_config, "output_router_logits", False):
            text_config.output_router_logits = False  # as `forward` says
        self.inner: Any = AutoModelForCausalLM.from_config(text_config)  # type: ignore[no-untyped-call]
        self.change()
        self.post_init()  # type: ignore[no-untyped-call]

    def change(self) -> None:
        """Make the inner model what the config says, before weights are loaded."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        self.inner._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """As transformers' own, for the inner model."""
        self.inner.set_experts_implementation(experts_implementation)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the original model.

        Raises:
            SpecError: router logits are asked for: transformers' balance loss over them takes every
                layer to have the number of experts that the config says.
        """
        if kwargs.get("output_router_logits"):
            raise SpecError(f"{self.balance_in_words}; leave output_router_logits out")
        return self.inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
