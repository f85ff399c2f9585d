"""Tiny language models, one for every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekit import (
    AttentionAware,
    Bank,
    Capacity,
    Constant,
    Copy,
    ExpertChoice,
    Hash,
    HeterogeneousBalance,
    L1Balance,
    MoESpec,
    NullAwareBalance,
    Pathway,
    ReLURouting,
    RouterZ,
    SimilarityAware,
    SwiGLU,
    SwitchBalance,
    TopK,
    Zero,
)
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.routing import DenseWarmup, SparseTransport

Build = Callable[..., MoEDecoderForCausalLM]

BANK = SwiGLU(count=4, hidden=24)
MIXED_BANK = Bank((SwiGLU(count=4, hidden=24), Constant(1), Copy(1), Zero(1)))

LAYERS: dict[str, Any] = {
    "dense": SwiGLU(count=1, hidden=48),
    "top_k": MoESpec(TopK(k=2), BANK, losses=(SwitchBalance(), RouterZ())),
    "sigmoid": MoESpec(
        TopK(k=2, score="sigmoid", bias_rate=0.01, groups=2, scale=1.5),
        BANK,
        shared=SwiGLU(count=1, hidden=16),
        shared_gate=True,
    ),
    "adamoe": MoESpec(
        TopK(k=2, normalize="nonzero"),
        Bank((SwiGLU(count=4, hidden=24), Zero(2))),
        losses=(NullAwareBalance(weight=0.02, then=((5, 0.0001),)),),
    ),
    "pathway": MoESpec(Pathway(k=2), MIXED_BANK, losses=(HeterogeneousBalance(),)),
    "relu": MoESpec(ReLURouting(k=1), BANK, losses=(L1Balance(k=1, initial=1e-3),)),
    "warmup": MoESpec(DenseWarmup(k=1, warmup_k=3, warmup_steps=5), BANK),
    "hash": MoESpec(Hash(k=2), BANK),
    "capacity": MoESpec(TopK(k=2), BANK, dispatch=Capacity(factor=0.75), losses=(SwitchBalance(),)),
    "similarity": MoESpec(SimilarityAware(TopK(k=2), temperature=3.0), BANK),
    "attention": [
        MoESpec(AttentionAware(TopK(k=2)), BANK, losses=(SwitchBalance(),)),
        SwiGLU(count=1, hidden=48),
        MoESpec(AttentionAware(Pathway(k=2), heads="posterior", sigma=4.0), BANK),
    ],
    "expert_choice": MoESpec(ExpertChoice(capacity=2.0), BANK),
    "transport": MoESpec(SparseTransport(capacity_factor=2.0), BANK),
}
CAUSAL = [name for name in LAYERS if name not in ("expert_choice", "transport")]
VOCABULARY = 61


@pytest.fixture
def build() -> Build:
    """A function from layers (a spec, specs, or a name in ``LAYERS``) to a tiny model in eval mode.

    Weights are drawn wide, so that tokens disagree on experts and no two logits are close.
    """

    def make(layers: Any, *, seed: int = 0, **config: Any) -> MoEDecoderForCausalLM:
        torch.manual_seed(seed)
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": len(layers) if isinstance(layers, list) else 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
        }
        spec = LAYERS[layers] if isinstance(layers, str) else layers
        return MoEDecoderForCausalLM(MoEDecoderConfig(**{**sizes, **config}, layers=spec)).eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids (2, 11)."""
    return torch.randint(1, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(3))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``layers`` runs over every kind of layer, ``causal_layers`` over those that are causal."""
    for argument, names in (("layers", list(LAYERS)), ("causal_layers", CAUSAL)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)
