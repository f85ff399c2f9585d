"""Tiny models of every architecture that can be operated on, and text for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from moekit import GELU, MoESpec, SwiGLU, TopK
from moekit.models.language import MoEDecoderConfig

VOCABULARY, WIDTH = 48, 16
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "first_k_dense_replace": 1,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(
        **COMMON, intermediate_size=16, num_local_experts=8, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **COMMON,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=12,
        num_experts=8,
        num_experts_per_tok=3,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    ),
    "olmoe": lambda: OlmoeConfig(
        **COMMON, intermediate_size=8, num_experts=8, num_experts_per_tok=3
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **COMMON, **LATENT, num_experts_per_tok=2, topk_method="greedy", routed_scaling_factor=1.5
    ),
    "deepseek_v2_groups": lambda: DeepseekV2Config(
        **COMMON,
        **LATENT,
        num_experts_per_tok=2,
        topk_method="group_limited_greedy",
        n_group=2,
        topk_group=1,
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **COMMON, **LATENT, num_experts_per_tok=2, n_group=2, topk_group=1
    ),
    "gpt_oss": lambda: GptOssConfig(
        **COMMON,
        head_dim=8,
        intermediate_size=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=8,
    ),
    "granitemoe": lambda: GraniteMoeConfig(
        **COMMON,
        intermediate_size=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.7,
    ),
    "granitemoeshared": lambda: GraniteMoeSharedConfig(
        **COMMON,
        intermediate_size=8,
        shared_intermediate_size=12,
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "phimoe": lambda: PhimoeConfig(
        **COMMON,
        intermediate_size=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_jitter_noise=0.3,
    ),
    "moekit_decoder": lambda: own_config(
        SwiGLU(count=1, hidden=20),
        MoESpec(TopK(k=2), SwiGLU(count=8, hidden=8), shared=SwiGLU(count=1, hidden=12)),
        MoESpec(
            TopK(k=2, score="sigmoid", bias=True, bias_rate=0.01), SwiGLU(8, hidden=8, bias=True)
        ),
    ),
    "moekit_ungated": lambda: own_config(
        MoESpec(TopK(k=2, normalize="none"), GELU(count=8, hidden=16, bias=True)),
        MoESpec(TopK(k=2, scale=2.0, groups=2, top_groups=1), GELU(count=8, hidden=16)),
        MoESpec(TopK(k=1), GELU(count=8, hidden=16)),
    ),
}


def own_config(*layers: Any) -> MoEDecoderConfig:
    """A config of moekit's decoder with these layers."""
    return MoEDecoderConfig(**(COMMON | {"num_hidden_layers": len(layers)}), layers=list(layers))


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of the architecture ``name`` whose every tensor, biases too, is random."""
    return random_model(CONFIGS[name](), seed)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, and random biases where they would start at zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "bias" in key:
                tensor.normal_(std=0.1)
    return model


class Blocks:
    """Blocks of random tokens, of which some rows start with padding."""

    def __init__(self, count: int = 6, length: int = 12, padding: int = 4, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(3, VOCABULARY, (count, length), generator=generator)
        self.masks = torch.ones_like(self.tokens)
        self.masks[1::3, :padding] = 0
        self.tokens[self.masks == 0] = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "attention_mask": self.masks[index]}
