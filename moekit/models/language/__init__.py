"""A decoder-only language model whose every part is dense or a mixture of experts.

Importing this package registers the model with transformers, so that ``AutoConfig``, ``AutoModel``
and ``AutoModelForCausalLM`` load its checkpoints like any other::

    import moekit.models.language
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("runs/first/checkpoint")
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moekit.models.language.attention_mixture import AttentionMixture
from moekit.models.language.block import DenseFeedForward, MoEDecoderLayer
from moekit.models.language.causal_lm import MoEDecoderForCausalLM
from moekit.models.language.config import BlockSpec, MoEDecoderConfig
from moekit.models.language.decoder import MoEDecoderModel
from moekit.models.language.output import MoECausalLMOutput, MoEDecoderOutput
from moekit.models.language.stick_breaking import (
    stick_breaking_attention,
    stick_breaking_weights,
)

AutoConfig.register(MoEDecoderConfig.model_type, MoEDecoderConfig, exist_ok=True)
AutoModel.register(MoEDecoderConfig, MoEDecoderModel, exist_ok=True)
AutoModelForCausalLM.register(MoEDecoderConfig, MoEDecoderForCausalLM, exist_ok=True)

__all__ = [
    "AttentionMixture",
    "BlockSpec",
    "DenseFeedForward",
    "MoECausalLMOutput",
    "MoEDecoderConfig",
    "MoEDecoderForCausalLM",
    "MoEDecoderLayer",
    "MoEDecoderModel",
    "MoEDecoderOutput",
    "stick_breaking_attention",
    "stick_breaking_weights",
]
