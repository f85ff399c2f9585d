"""Tiny models with random weights of the architectures that checkpoints come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

VOCABULARY = 48
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
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
        **COMMON, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **COMMON,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=12,
        num_experts=6,
        num_experts_per_tok=3,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_experts=6,
        num_experts_per_tok=3,
        tie_word_embeddings=True,
    ),
    "olmoe": lambda: OlmoeConfig(
        **COMMON, intermediate_size=8, num_experts=8, num_experts_per_tok=4
    ),
    "deepseek_v2": lambda: DeepseekV2Config(
        **COMMON, **LATENT, num_experts_per_tok=3, topk_method="greedy", n_group=1, topk_group=1
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **COMMON, **LATENT, num_experts_per_tok=2, n_group=4, topk_group=2
    ),
    "gpt_oss": lambda: GptOssConfig(
        **COMMON,
        head_dim=8,
        intermediate_size=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
    ),
    "granitemoe": lambda: GraniteMoeConfig(
        **COMMON, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "phimoe": lambda: PhimoeConfig(
        **COMMON, intermediate_size=8, num_local_experts=4, num_experts_per_tok=2
    ),
}


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of the architecture ``name``."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
