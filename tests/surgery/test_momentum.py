"""Residual rules on transformers' MoE models."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from moekit import AdamFirst, AdamMomentum, HeavyBall, Plain, RobustMomentum
from moekit.errors import MoekitError, SignalError, SpecError
from moekit.surgery import attach_momentum

RULES = (HeavyBall(0.6, 0.5), AdamMomentum(decay=0.1), AdamFirst(), RobustMomentum(0.4, 1.5))
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 8, "mlp_only_layers": [1], "head_dim": 8}
OWN = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_key_value_heads": 2},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 8},
    "qwen3_moe": QWEN,
}

each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
each_kind = pytest.mark.parametrize("kind", OWN)


def checkpointing(model, **options):
    """Turn it on, by the name that this version of transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)


def build(kind, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **OWN[kind], **options})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def ids():
    return torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def by_hand(model, ids, rule):
    """The decoder's logits, with the rule written out block by block."""
    base = model.model
    x, state = base.embed_tokens(ids), ()
    positions = torch.arange(ids.shape[1])[None]
    length = ids.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    rotation = base.rotary_emb(x, positions)
    for layer in base.layers:
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(x),
            position_embeddings=rotation,
            attention_mask=mask,
        )
        x = x + attended
        if not hasattr(layer.mlp, "experts"):
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            continue
        y = layer.mlp(layer.post_attention_layernorm(rule.look_ahead(x, state)))
        delta, state = rule.increment(x, y, state)
        x = x + delta
    return model.lm_head(base.norm(x))


@each_kind
@pytest.mark.parametrize("rule", [Plain(), HeavyBall(0.0, 1.0)], ids=str)
def test_off_is_off_bit_for_bit(rule, kind, ids):
    model = build(kind)
    before = model(ids).logits
    with attach_momentum(model, rule):
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_kind
@pytest.mark.parametrize("rule", [Plain(), HeavyBall(0.0, 1.0)], ids=str)
def test_off_changes_no_bit_of_a_gradient_either(rule, kind, dtype, ids):
    found = []
    for attached in (False, True):
        model = build(kind, output_router_logits=True).to(dtype).train()
        with attach_momentum(model, rule) if attached else contextlib.nullcontext():
            output = model(ids, labels=ids)
            output.loss.backward()
        found.append([output.loss, output.logits, *(p.grad for p in model.parameters())])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))


@each_kind
@each_rule
def test_the_model_computes_the_rule(rule, kind, ids):
    model = build(kind)
    before, wanted = model(ids).logits, by_hand(model, ids, rule)
    with attach_momentum(model, rule) as attached:
        assert attached.layers == (3 if kind.startswith("qwen") else 4)
        found = model(ids).logits
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found, before, atol=1e-2)
        assert torch.equal(model(ids).logits, found)
    assert torch.equal(model(ids).logits, before)


@each_rule
def test_generation_with_cache_equals_without(rule, ids):
    model = build("mixtral")
    with attach_momentum(model, rule):
        options = {"do_sample": False, "max_new_tokens": 6}
        cached = model.generate(ids, **options, use_cache=True)
        assert torch.equal(cached, model.generate(ids, **options, use_cache=False))


@each_kind
def test_gradient_checkpointing_changes_no_gradient(kind, ids):
    gradients = []
    for checkpointed in (False, True):
        model = build(kind).train()
        if checkpointed:
            checkpointing(model, use_reentrant=False)
        with attach_momentum(model, RobustMomentum(0.5, 1.5)):
            one, two = model(ids, labels=ids).loss, model(ids.flip(0), labels=ids).loss
            (one + 2 * two).backward()  # both graphs are alive at once
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=0, rtol=0)


def test_reentrant_checkpointing_is_refused(ids):
    model = build("mixtral").train()
    checkpointing(model, use_reentrant=True)
    with attach_momentum(model, HeavyBall()), pytest.raises(SpecError, match="use_reentrant"):
        model(ids)


def test_gradients_flow_through_the_momentum(ids):
    """The last layer's output with the direct path cut: its block is given a detached input."""
    model = build("mixtral")
    with attach_momentum(model, HeavyBall(0.9)):

        def cut(_, args, kwargs):
            return (args[0].detach(), *args[1:]), kwargs

        handle = model.model.layers[1].register_forward_pre_hook(cut, with_kwargs=True)
        model(ids).logits.sum().backward()
        handle.remove()
    assert model.model.layers[0].mlp.experts.down_proj.grad.norm() > 0


def test_other_heads_outputs_and_copies(ids, tmp_path, aligned):
    model = build("olmoe")
    before = model(ids).logits
    with attach_momentum(model, HeavyBall(0.7)):
        output = model(ids, output_hidden_states=True, output_router_logits=True)
        assert len(output.hidden_states) == 5
        assert len(output.router_logits) == 4
        assert torch.equal(copy.deepcopy(model)(ids).logits, output.logits)
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(aligned(loaded)(ids).logits, before)  # the rule is no part of the checkpoint
    base = AutoModel.from_pretrained(tmp_path).eval()
    plain = base(ids).last_hidden_state
    with attach_momentum(base, HeavyBall(0.7)):
        assert not torch.allclose(base(ids).last_hidden_state, plain)


def test_no_module_keeps_a_tensor(ids):
    model = build("mixtral")
    with attach_momentum(model, HeavyBall(0.7)):
        names = {n for n, _ in model.named_buffers()} | set(model.state_dict())
        attributes = [set(vars(m)) for m in model.modules()]
        model(ids)
        assert names == {n for n, _ in model.named_buffers()} | set(model.state_dict())
        assert attributes == [set(vars(m)) for m in model.modules()]
        for layer in model.model.layers:
            for hook in layer.mlp._forward_hooks.values():
                assert all(step() is None for step in hook.__self__._running.values())


def test_after_a_failed_pass_the_next_is_whole(ids):
    model = build("mixtral")
    with attach_momentum(model, HeavyBall(0.7)):
        before = model(ids).logits

        def fail(*_):
            raise RuntimeError("stop")

        handle = model.model.layers[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model(ids)
        handle.remove()
        assert torch.equal(model(ids).logits, before)


def test_mistakes():
    llama = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_experts_per_tok": None}))
    with pytest.raises(SpecError, match="'llama'; supported: mixtral, olmoe, qwen2_moe, qwen3_moe"):
        attach_momentum(llama, HeavyBall())
    with pytest.raises(SpecError, match="'Linear'"):
        attach_momentum(torch.nn.Linear(2, 2), HeavyBall())
    dense = build("qwen3_moe", mlp_only_layers=[0, 1, 2, 3])
    with pytest.raises(SpecError, match="no MoE layer"):
        attach_momentum(dense, HeavyBall())
    model = build("mixtral")
    handle = attach_momentum(model, HeavyBall())
    with pytest.raises(SpecError, match="already"):
        attach_momentum(model, HeavyBall())
    x = torch.randn(1, 3, 16)
    with pytest.raises(SignalError, match="on its own"):
        model.model.layers[0](
            x, position_embeddings=model.model.rotary_emb(x, torch.arange(3)[None])
        )
    with pytest.raises(MoekitError, match="on its own"):
        model.model.layers[0].mlp(x)
    handle.detach()
    handle.detach()
    attach_momentum(model, HeavyBall()).detach()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
