"""A decoder-only language model whose every layer is dense or a mixture of experts.

Importing this package registers the model with transformers, so that ``AutoConfig``, ``AutoModel``
and ``AutoModelForCausalLM`` load its checkpoints like any other::

    import moekit.models.language
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("runs/first/checkpoint")
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moekit.models.language.block import DenseFeedForward, MoEDecoderLayer
from moekit.models.language.causal_lm import MoEDecoderForCausalLM
from moekit.models.language.config import MoEDecoderConfig
from moekit.models.language.decoder import MoEDecoderModel
from moekit.models.language.output import MoECausalLMOutput, MoEDecoderOutput

AutoConfig.register(MoEDecoderConfig.model_type, MoEDecoderConfig, exist_ok=True)
AutoModel.register(MoEDecoderConfig, MoEDecoderModel, exist_ok=True)
AutoModelForCausalLM.register(MoEDecoderConfig, MoEDecoderForCausalLM, exist_ok=True)

__all__ = [
    "DenseFeedForward",
    "MoECausalLMOutput",
    "MoEDecoderConfig",
    "MoEDecoderForCausalLM",
    "MoEDecoderLayer",
    "MoEDecoderModel",
    "MoEDecoderOutput",
]
