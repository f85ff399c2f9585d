"""One view over the MoE blocks of a model, whatever its architecture calls and stores them.

>>> from transformers import OlmoeConfig, OlmoeForCausalLM
>>> config = OlmoeConfig(
...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2,
...     num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
... )
>>> model = OlmoeForCausalLM(config)
>>> block = block_views(model)[1]
>>> block.name, block.experts, block.rule.top_k
('model.layers.1.mlp', 4, 2)
>>> block.expert(3).down.zero_().shape  # the model's own memory
torch.Size([16, 8])
>>> bool(model.model.layers[1].mlp.experts.down_proj[3].any())
False
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from moekit.errors import CheckpointError, SpecError
from moekit.surgery.view_architecture import Architecture, RoutingRule
from moekit.surgery.view_architectures import architecture_of
from moekit.surgery.weights import ExpertWeights, RouterWeights


class BlockView:
    """One MoE block. Tensors that it hands out share the model's memory.

    Args:
        architecture: whose block it is.
        config: the model's.
        layer: the decoder layer.
        index: its number.
        prefix: path of the list of decoder layers in the model.

    Attributes:
        name: path of the block in the model.
        index: number of its decoder layer.
        layer, block: the modules.
        rule: how it routes.

    Raises:
        SpecError: a layer of moekit's decoder has another router or bank than can be viewed.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: PreTrainedConfig,
        layer: nn.Module,
        index: int,
        prefix: str,
    ) -> None:
        architecture.check(layer)
        self.architecture = architecture
        self.config = config
        self.layer = layer
        self.index = index
        self.block = layer.get_submodule(architecture.block)
        self.name = f"{prefix}.{index}.{architecture.block}"
        self.rule: RoutingRule = architecture.rule(config, self.block)

    @property
    def experts(self) -> int:
        """Number of experts E."""
        return self.router.weight.shape[0]

    @property
    def router(self) -> RouterWeights:
        """The router."""
        return self.architecture.router_weights(self.block)

    @property
    def bank(self) -> ExpertWeights:
        """All experts, with a leading dimension E.

        Raises:
            CheckpointError: the weights are not in memory.
        """
        bank = self.architecture.experts(self.block)
        if bank.up.is_meta:
            raise CheckpointError(
                f"the experts of {self.name} are not in memory; load the model without offloading"
            )
        return bank

    @property
    def shared(self) -> ExpertWeights | None:
        """The shared expert, or None."""
        return self.architecture.shared_experts(self.layer)

    @property
    def shared_gate(self) -> Tensor | None:
        """Weight (1, D) of the shared expert's gate, or None."""
        return self.architecture.shared_gate_weight(self.layer)

    def expert(self, index: int) -> ExpertWeights:
        """One expert."""
        return self.bank[index]

    def set_expert(self, index: int, weights: ExpertWeights) -> None:
        """Write the weights of one expert.

        Raises:
            SpecError: a tensor is missing or has another shape.
        """
        own = dict(self.expert(index).items())
        given = dict(weights.items())
        for name, value in own.items():
            if name not in given or given[name].shape != value.shape:
                shape = tuple(given[name].shape) if name in given else "nothing"
                raise SpecError(
                    f"{name} of an expert of {self.name} is {tuple(value.shape)}; got {shape}"
                )
        self.expert(index).copy_(weights)

    def set_bank(self, bank: ExpertWeights) -> None:
        """Write the weights of all experts, of the shapes that they have."""
        for index in range(self.experts):
            self.set_expert(index, bank[index])

    def set_router(self, weights: RouterWeights) -> None:
        """Write the router's weights, of the shapes that they have."""
        self.router.copy_(weights)

    def compute(self, expert: ExpertWeights, x_ND: Tensor) -> Tensor:
        """What an expert of these weights would make of rows ``x_ND``."""
        return self.architecture.compute(self.block, expert, x_ND)

    def logits(self, x_ND: Tensor) -> Tensor:
        """Router logits (N, E) in float32, from the weights and not from what a router returns."""
        router = self.router
        bias = None if router.bias is None else router.bias.float()
        return F.linear(x_ND.float(), router.weight.float(), bias)


def block_views(model: PreTrainedModel) -> list[BlockView]:
    """The MoE blocks of a model, from the first to the last.

    Raises:
        SpecError: the architecture is not supported, or the model has no MoE block.
    """
    architecture = architecture_of(model.config)
    base: Any = model.base_model
    prefix = "layers" if base is model else f"{model.base_model_prefix}.layers"
    views = [
        BlockView(architecture, model.config, layer, index, prefix)
        for index, layer in enumerate(base.layers)
        if architecture.is_moe(layer)
    ]
    if not views:
        raise SpecError(f"{type(model).__name__} has no MoE block with this config")
    return views
