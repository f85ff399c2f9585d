"""Checkpoints: what transformers saves, it loads again, to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from moekit import Hash, L1Balance, MoESpec, ReLURouting, RouterZ, SwiGLU, TopK
from moekit.models.language import MoEDecoderForCausalLM, MoEDecoderModel
from moekit.routing import DenseWarmup

BANK = SwiGLU(count=4, hidden=24)
BIASED = MoESpec(TopK(k=2, bias_rate=1e-3), BANK)
ANNEALED = RouterZ(weight=0.1, then=((1000, 0.01),))
CONTROLLED = MoESpec(ReLURouting(k=1), BANK, losses=(L1Balance(k=1), ANNEALED))
WARMING = MoESpec(DenseWarmup(k=1, warmup_k=3, warmup_steps=2001), BANK)
HASHED = MoESpec(Hash(k=2, seed=3), BANK)
STATEFUL = [BIASED, CONTROLLED, HASHED, SwiGLU(count=1, hidden=48), WARMING]


def stateful(build) -> MoEDecoderForCausalLM:
    """A model whose buffers hold values that no initialisation gives, nor bfloat16 can."""
    model = build(STATEFUL)
    model.moe_layers[0].router.correction_bias_E.copy_(torch.tensor([1.001, -0.003, 0, 1e-4]))
    model.routing_losses.losses[0].exponent.fill_(-1003)
    table = model.moe_layers[2].router.table_VK
    table.copy_(table.flip(0))
    model.moe_layers[3].router.steps_left.fill_(1001)
    model.routing_losses.losses[1].step.fill_(1001)
    return model


def assert_same_state(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_model_is_bitwise_the_same(layers, build, ids, tmp_path, tied, aligned):
    model = build(layers, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded) is MoEDecoderForCausalLM
    assert not loaded.training
    assert_same_state(loaded, model)
    assert torch.equal(aligned(loaded)(ids).logits, model(ids).logits)
    shared = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert shared is tied
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]


def test_controller_state_and_tables_are_saved(build, tmp_path):
    model = stateful(build)
    model.save_pretrained(tmp_path)
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["routing_losses.losses.0.exponent"] == -1003
    assert not any("inv_freq" in name for name in stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loading_in_another_dtype_keeps_controller_state_float32(build, ids, tmp_path, dtype):
    model = stateful(build)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.moe_layers[0].router.correction_bias_E.dtype == torch.float32
    for name, buffer in model.named_buffers():
        assert loaded.get_buffer(name).dtype == buffer.dtype, name
        assert torch.equal(loaded.get_buffer(name), buffer), name
    for mine, theirs in zip(
        loaded.routing_losses.coefficients().values(),
        model.routing_losses.coefficients().values(),
        strict=True,
    ):
        assert torch.equal(mine, theirs)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == dtype, name
        assert torch.equal(parameter, model.get_parameter(name).to(dtype))
    assert loaded(ids).logits.dtype == dtype


def test_a_half_precision_checkpoint_keeps_controller_state_through_another_round(build, tmp_path):
    model = stateful(build).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert_same_state(loaded, model)
    assert loaded.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "second")
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "second"), model)
    assert loaded.moe_layers[0].router.correction_bias_E[3] == torch.tensor(1e-4)


def test_rotary_frequencies_are_restored_in_every_dtype(build, tmp_path):
    model = build("dense")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_sharded_checkpoint(build, ids, tmp_path, aligned):
    model = stateful(build)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(loaded, model)
    assert torch.equal(aligned(loaded)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "lost",
    [
        "model.layers.0.mlp.router.weight",
        "model.layers.0.mlp.router.correction_bias_E",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.2.mlp.router.table_VK",
        "model.layers.3.mlp.experts.gate_up_proj",
        "model.layers.4.mlp.router.weight",
        "model.layers.4.mlp.router.steps_left",
        "routing_losses.losses.0.exponent",
        "routing_losses.losses.1.step",
        "model.norm.weight",
    ],
)
def test_a_tensor_missing_from_the_checkpoint_is_initialised_and_no_other(build, tmp_path, lost):
    model = stateful(build)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored[lost]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert list(report["missing_keys"]) == [lost]
    state = loaded.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor), name
    fresh = build(STATEFUL).state_dict()[lost]
    if fresh.dim() > 1 and fresh.is_floating_point():  # drawn at random
        assert state[lost].std().item() == pytest.approx(fresh.std().item(), rel=0.5)
    else:
        assert torch.equal(state[lost], fresh)


def test_the_decoder_alone_loads_from_a_language_model(build, ids, tmp_path, aligned):
    model = build("pathway")
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is MoEDecoderModel
    assert torch.equal(aligned(decoder)(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_initial_weights_follow_the_config_and_the_specs(build):
    moe = MoESpec(TopK(k=2, init_std=0.5), SwiGLU(count=8, hidden=64), shared=SwiGLU(1, hidden=64))
    model = build([moe, SwiGLU(count=1, hidden=256)], initializer_range=0.07, pad_token_id=3)
    layer = model.moe_layers[0]
    for tensor, std in (
        (layer.router.weight, 0.5),
        (layer.experts.gate_up_proj, 0.07),
        (layer.experts.down_proj, 0.07),
        (layer.shared.down_proj, 0.07),
        (model.dense_layers[0].experts.gate_up_proj, 0.07),
        (model.model.layers[0].self_attn.o_proj.weight, 0.07),
        (model.lm_head.weight, 0.07),
    ):
        error = tensor.numel() ** -0.5  # four standard errors of a mean and of a deviation
        assert abs(tensor.mean().item()) < 4 * std * error
        assert tensor.std().item() == pytest.approx(std, rel=4 * error / 2**0.5)
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    assert model.get_input_embeddings().weight[3].abs().sum() == 0


def test_resized_embeddings_survive_a_round_trip(build, ids, tmp_path):
    model = build("top_k", tie_word_embeddings=True)
    logits = model(ids).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    torch.testing.assert_close(model(ids).logits[..., :61], logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 70
    assert_same_state(loaded, model)


def test_config_names_the_model_for_other_programs(build, tmp_path):
    build("top_k").save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["model_type"] == "moekit_decoder"
    assert data["architectures"] == ["MoEDecoderForCausalLM"]
    assert "auto_map" not in data  # no code travels with a checkpoint
