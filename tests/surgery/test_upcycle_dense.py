"""Dense models of transformers as mixtures: equal at the start, and other where that is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from moekit.errors import CheckpointError, SpecError
from moekit.surgery import Upcycling, block_views, upcycle_dense

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DENSE = {
    "llama": LlamaConfig(**SIZES),
    "llama with scaled positions": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=12),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3, tied, biased": Qwen3Config(
        **SIZES, head_dim=16, tie_word_embeddings=True, attention_bias=True
    ),
}
EVERY = pytest.mark.parametrize("config", DENSE.values(), ids=DENSE)


def dense_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    token_BT = torch.randint(64, (2, 17), generator=generator)
    mask_BT = torch.ones_like(token_BT)
    mask_BT[0, :4] = 0
    return model(input_ids=token_BT, attention_mask=mask_BT).logits[:, 4:]


@pytest.mark.parametrize("k", [1, 3, 4])
@EVERY
def test_it_starts_as_the_dense_model(config, k: int) -> None:
    dense = dense_of(config).double()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    grown = upcycle_dense(dense, Upcycling(experts=4, k=k, seed=k))
    grown.set_experts_implementation("eager")  # the default one does not take float64
    # Routers normalise in float32 whatever the dtype: 1e-7 a layer, grown by the layers after it.
    torch.testing.assert_close(logits(grown), logits(dense), rtol=1e-5, atol=1e-5)
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name])
    assert len(block_views(grown)) == 4
    routers = [view.router.weight for view in block_views(grown)]
    assert all(0.01 < float(weight.std()) < 0.03 for weight in routers)


@EVERY
def test_it_is_an_ordinary_checkpoint_that_trains(config, tmp_path: Path) -> None:
    """Partly drawn anew: among experts that are all alike a router's gradient is 0."""
    grown = upcycle_dense(dense_of(config), Upcycling(experts=4, k=2, reinit=0.5))
    grown.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(grown)
    torch.testing.assert_close(logits(again), logits(grown), rtol=1e-6, atol=1e-6)
    again.train()
    token_BT = torch.arange(12).view(2, 6)
    again(input_ids=token_BT, labels=token_BT).loss.backward()
    for view in block_views(again):
        assert float(view.block.gate.weight.grad.abs().max()) > 1e-6  # 5e-8 by rounding alone
    out = again.eval().generate(token_BT, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 9)


@pytest.mark.parametrize(
    ("layers", "indices"), [("all", [0, 1, 2, 3]), ("every-other", [1, 3]), ("last-half", [2, 3])]
)
def test_which_layers(layers, indices: list[int]) -> None:
    dense = dense_of(DENSE["qwen3"])
    grown = upcycle_dense(dense, Upcycling(experts=2, k=1, layers=layers))
    assert [view.index for view in block_views(grown)] == indices
    torch.testing.assert_close(logits(grown), logits(dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_neurons_that_are_drawn_anew(share: float) -> None:
    """Gate, up and down of one neuron together, another set in each expert."""
    dense = dense_of(DENSE["llama"])
    grown = upcycle_dense(dense, Upcycling(experts=3, k=1, reinit=share))
    sets = set()
    for view in block_views(grown):
        part = dense.model.layers[view.index].mlp
        for index in range(3):
            expert = view.expert(index)
            changed = (expert.gate != part.gate_proj.weight).any(1)
            assert torch.equal(changed, (expert.up != part.up_proj.weight).any(1))
            assert torch.equal(changed, (expert.down != part.down_proj.weight).any(0))
            assert int(changed.sum()) == round(share * 24)
            sets.add(tuple(changed.tolist()))
            old, new = part.gate_proj.weight.detach(), expert.gate[changed].detach()
            assert abs(float(new.std() / old.std()) - 1) < 0.5
    assert (len(sets) > 1) == (share < 1)


def test_noise_is_as_large_as_asked_and_seeds_differ() -> None:
    dense = dense_of(DENSE["llama"])
    grown = {s: upcycle_dense(dense, Upcycling(experts=2, k=1, noise=0.1, seed=s)) for s in (0, 1)}
    again = upcycle_dense(dense, Upcycling(experts=2, k=1, noise=0.1, seed=0))
    weight = dense.model.layers[0].mlp.up_proj.weight.detach()
    first = {seed: block_views(model)[0].expert(0).up.detach() for seed, model in grown.items()}
    assert torch.equal(first[0], block_views(again)[0].expert(0).up)
    assert not torch.equal(first[0], first[1])
    assert float((first[0] - weight).std() / weight.std()) == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experts": 0}, "experts is 0"),
        ({"experts": 2, "k": 3}, "k is 3"),
        ({"reinit": 1.5}, "reinit is 1.5"),
        ({"noise": -1.0}, "noise is -1"),
        ({"layers": "some"}, "layers"),
    ],
)
def test_specs_that_make_no_sense(settings, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Upcycling(**settings)


def test_models_that_have_no_counterpart() -> None:
    spec = Upcycling(experts=2, k=1)
    with pytest.raises(SpecError, match="llama, mistral, qwen2, qwen3"):
        upcycle_dense(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2)), spec)
    with pytest.raises(SpecError, match="dense model"):
        upcycle_dense(dense_of(MixtralConfig(**SIZES, num_local_experts=2)), spec)
    with pytest.raises(SpecError, match="mlp_bias"):
        upcycle_dense(dense_of(LlamaConfig(**SIZES, mlp_bias=True)), spec)
    with pytest.raises(SpecError, match="every layer of Mixtral"):
        upcycle_dense(dense_of(DENSE["llama"]), spec.replace(layers="last-half"))
    with pytest.raises(SpecError, match="sliding windows"):
        upcycle_dense(
            dense_of(Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4)), spec
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    dense = dense_of(DENSE["llama"])
    dense.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        upcycle_dense(dense, Upcycling(experts=2, k=1))
