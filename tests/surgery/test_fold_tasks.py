"""Merged mixtures that start as, or become, dense models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekit import (
    GELU,
    Bank,
    Dropless,
    HeavyBall,
    Merged,
    MoESpec,
    NoisyTopK,
    PerChunk,
    PerTask,
    SwiGLU,
    TokenAttention,
    TopK,
    Zero,
)
from moekit.errors import SpecError
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.surgery import fold_tasks, upcycle

TASKS = ((1, 2), (3,), (2, 4, 4))
DENSE = GELU(count=1, hidden=24, bias=True)
BANK = DENSE.replace(count=8)


def decoder(*layers: Any) -> MoEDecoderForCausalLM:
    torch.manual_seed(0)
    config = MoEDecoderConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        initializer_range=0.3,
        layers=list(layers),
    )
    model = MoEDecoderForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "bias" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return model


IDS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("router", [PerTask, PerChunk])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_merged_mixture_starts_as_the_dense_model(k: int, router: type, mode: str) -> None:
    """Biases included, whatever the gates: Σ g = 1. Noise changes nothing yet."""
    dense = decoder(DENSE, DENSE).double()
    layer = MoESpec(router(NoisyTopK(k=k)), BANK, Merged(), adapter=TokenAttention())
    grown = upcycle(dense, layer).train(mode == "train")
    torch.testing.assert_close(grown(IDS).logits, dense.eval()(IDS).logits)


@pytest.mark.parametrize("bank", [BANK, SwiGLU(count=5, hidden=8)], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("task", range(3))
def test_a_folded_model_computes_what_it_did_for_its_task(task: int, bank: Any) -> None:
    layer = MoESpec(PerTask(NoisyTopK(k=3), descriptions=TASKS), bank, Merged())
    model = decoder(layer, bank.replace(count=1), layer).double().train()
    dense = fold_tasks(model, task)
    assert model.training
    assert dense.config.layer_specs == (bank.replace(count=1),) * 3
    assert len(dense.moe_layers) == 0
    task_ids = torch.full((2,), task)
    torch.testing.assert_close(
        dense.eval()(IDS).logits, model.eval()(IDS, task_ids=task_ids).logits
    )
    other = fold_tasks(model, (task + 1) % 3).eval()(IDS).logits
    assert not torch.allclose(other, dense(IDS).logits)


def test_a_folded_model_generates_the_same_with_its_cache() -> None:
    model = decoder(MoESpec(PerTask(TopK(k=2)), BANK, Merged())).eval()
    common = {"max_new_tokens": 5, "do_sample": False}
    folded = fold_tasks(model).eval()
    assert torch.equal(folded.generate(IDS, **common), model.generate(IDS, **common))


TASK = MoESpec(PerTask(TopK(k=2)), BANK, Merged())


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (TASK.replace(router=PerChunk(TopK(k=2))), "PerChunk decides from the tokens"),
        (TASK.replace(dispatch=Dropless()), "run one by one"),
        (TASK.replace(experts=Bank((BANK, Zero(1)))), "a Bank is no bank of feed-forward"),
        (TASK.replace(adapter=TokenAttention()), "would be lost"),
        (TASK.replace(shared=DENSE), "would be lost"),
        (TASK.replace(residual=HeavyBall(mu=0.5)), "no residual rule"),
    ],
)
def test_what_cannot_be_folded(layer: MoESpec, match: str) -> None:
    with pytest.raises(SpecError, match=f"layer 1 cannot be folded into a dense one.*{match}"):
        fold_tasks(decoder(TASK, layer))


def test_a_task_that_is_not_there() -> None:
    with pytest.raises(SpecError, match="task is 1, but layer 0 knows the tasks 0 to 0"):
        fold_tasks(decoder(TASK), task=1)
