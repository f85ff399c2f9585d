"""One contract over the views of every architecture, against the models' own forward passes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from surgery_models import CONFIGS, VOCABULARY, WIDTH, own_config, random_model, tiny
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moekit import MoESpec, ReLURouting, SwiGLU, TopK
from moekit.errors import CheckpointError, SpecError
from moekit.models.language import MoEDecoderForCausalLM
from moekit.surgery import block_views
from moekit.surgery.view import BlockView
from moekit.surgery.weights import ExpertWeights

FIRST_DENSE = ("qwen2_moe", "deepseek_v2", "deepseek_v2_groups", "deepseek_v3", "moekit_decoder")
BESIDE = re.compile("granitemoeshared")  # its shared expert stands beside the block
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))


class Seen:
    """What a block, its router and its experts were given and returned in one forward pass."""

    def __init__(self, model: PreTrainedModel, view: BlockView) -> None:
        self.block: list[Any] = []
        self.router: list[Any] = []
        router = view.architecture.router_module(view.block)
        hooks = [
            view.block.register_forward_hook(lambda _, x, y: self.block.append((x[0], y))),
            router.register_forward_hook(lambda _, x, y: self.router.append((x[0], y))),
        ]
        with torch.no_grad():
            self.logits = model(IDS).logits
        for hook in hooks:
            hook.remove()

    @property
    def x_ND(self) -> Tensor:
        return self.block[0][0].reshape(-1, WIDTH)

    @property
    def y_ND(self) -> Tensor:
        y = self.block[0][1]
        y = getattr(y, "y", y)
        return (y[0] if isinstance(y, tuple) else y).reshape(-1, WIDTH)


def by_hand(view: BlockView, seen: Seen, without: int = -1) -> Tensor:
    """The block's output token by token, in float64, from the view's weights."""
    routing = view.architecture.read("router", seen.router[0][1])
    rows = []
    for x_D, ids, weights in zip(
        seen.x_ND, routing.expert_NK.tolist(), routing.weight_NK.tolist(), strict=True
    ):
        y_D = torch.zeros(WIDTH, dtype=torch.float64)
        for e, weight in zip(ids, weights, strict=True):
            if e != without:
                y_D += weight * one(view, view.expert(e), x_D)
        if view.shared is not None and not BESIDE.search(view.architecture.model_type):
            factor = 1.0
            if view.shared_gate is not None:
                factor = float(torch.sigmoid(view.shared_gate.double() @ x_D.double()))
            y_D += factor * one(view, view.shared, x_D)
        rows.append(y_D)
    return torch.stack(rows)


def one(view: BlockView, expert: ExpertWeights, x_D: Tensor) -> Tensor:
    """One expert on one row, written again from the formulas of the model cards."""
    e = expert.map(lambda t: t.double())
    zero = torch.zeros((), dtype=torch.float64)
    up = e.up @ x_D.double() + (zero if e.up_bias is None else e.up_bias)
    if e.gate is None:
        inner = F.gelu(up)
    else:
        gate = e.gate @ x_D.double() + (zero if e.gate_bias is None else e.gate_bias)
        if view.architecture.model_type == "gpt_oss":
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            inner = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        else:
            inner = gate / (1 + torch.exp(-gate)) * up
    return e.down @ inner + (zero if e.down_bias is None else e.down_bias)


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_found(name: str) -> None:
    model = tiny(name)
    views = block_views(model)
    assert [v.index for v in views] == ([1, 2] if name in FIRST_DENSE else [0, 1, 2])
    for view in views:
        assert model.get_submodule(view.name) is view.block
        assert view.experts == 8
        assert view.bank.up.shape[0] == 8
        assert view.bank.down.shape[1] == WIDTH


@pytest.mark.parametrize("name", CONFIGS)
def test_slices_reconstruct_the_block(name: str) -> None:
    model = tiny(name)
    for view in block_views(model):
        seen = Seen(model, view)
        torch.testing.assert_close(seen.y_ND.double(), by_hand(view, seen), rtol=1e-4, atol=1e-5)
        x_ND = seen.x_ND[:5]
        for e in range(8):
            want = torch.stack([one(view, view.expert(e), x_D) for x_D in x_ND])
            got = view.compute(view.expert(e), x_ND).double()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_shared_expert_beside_granites_block() -> None:
    model: Any = tiny("granitemoeshared")
    view, x_ND = block_views(model)[0], torch.randn(5, WIDTH)
    assert view.shared is not None
    want = model.model.layers[0].shared_mlp(x_ND)
    torch.testing.assert_close(view.compute(view.shared, x_ND), want)
    view.shared.down.zero_()
    assert not model.model.layers[0].shared_mlp(x_ND).any()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_router(name: str) -> None:
    model = tiny(name)
    for view in block_views(model):
        seen = Seen(model, view)
        routing = view.architecture.read("router", seen.router[0][1])
        assert routing.logits_NE is not None
        torch.testing.assert_close(view.logits(seen.x_ND), routing.logits_NE.float())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_rule_tells_top_k_and_normalisation(name: str) -> None:
    model = tiny(name)
    for view in block_views(model):
        routing = view.architecture.read("router", Seen(model, view).router[0][1])
        assert routing.expert_NK.shape[1] == view.rule.top_k
        total_N = routing.weight_NK.double().sum(-1) / view.rule.scale
        is_one = torch.allclose(total_N, torch.ones_like(total_N), atol=1e-5)
        assert is_one == view.rule.normalised
        if view.rule.groups > 1:
            group_NK = routing.expert_NK // (8 // view.rule.groups)
            assert bool((group_NK == group_NK[:, :1]).all())  # one group a token here


def test_the_fewest_experts_that_a_block_works_with() -> None:
    smallest = {name: block_views(tiny(name))[0].rule.smallest for name in CONFIGS}
    assert smallest == {
        **dict.fromkeys(("mixtral", "gpt_oss", "granitemoe", "granitemoeshared", "phimoe"), 2),
        **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), 3),
        "deepseek_v2": 2,
        "deepseek_v2_groups": 4,  # two of the one group that a token may use
        "deepseek_v3": 4,
        "moekit_decoder": 2,
        "moekit_ungated": 2,
    }
    assert block_views(tiny("moekit_ungated"))[1].rule.smallest == 4


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_set_is_got_and_changes_the_model(name: str) -> None:
    model = tiny(name)
    view = block_views(model)[-1]
    before = Seen(model, view)
    chosen = view.architecture.read("router", before.router[0][1])
    busy = int(chosen.load_E().argmax())
    new = view.expert(busy).map(lambda t: torch.randn(t.shape))
    view.set_expert(busy, new)
    for key, value in view.expert(busy).items():
        assert value.equal(dict(new.items())[key])
    others = tiny(name)
    for e in set(range(8)) - {busy}:
        for key, value in view.expert(e).items():
            assert value.equal(dict(block_views(others)[-1].expert(e).items())[key])
    after = Seen(model, view)
    assert not torch.equal(before.logits, after.logits)
    torch.testing.assert_close(after.y_ND.double(), by_hand(view, after), rtol=1e-4, atol=1e-4)
    view.set_expert(busy, new.map(torch.zeros_like))
    silent = Seen(model, view)
    torch.testing.assert_close(
        silent.y_ND.double(), by_hand(view, silent, without=busy), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_permuting_experts_changes_nothing(name: str) -> None:
    model = tiny(name)
    with torch.no_grad():
        want = model(IDS).logits
        for view in block_views(model):
            size = 8 // view.rule.groups
            groups = torch.randperm(view.rule.groups).tolist()
            order = torch.cat([g * size + torch.randperm(size) for g in groups])
            view.set_bank(view.bank[order].map(torch.clone))
            view.set_router(view.router.map(lambda t, o=order: t[o].clone()))
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_permuting_hidden_neurons_changes_nothing(name: str) -> None:
    view = block_views(tiny(name))[-1]
    expert, x_ND = view.expert(2), torch.randn(7, WIDTH)
    moved = expert.reordered(torch.randperm(expert.hidden))
    torch.testing.assert_close(
        view.compute(moved, x_ND), view.compute(expert, x_ND), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_packing_gives_the_tensors_of_the_model(name: str) -> None:
    for view in block_views(tiny(name)):
        own = view.block.state_dict()
        packed = view.architecture.pack_experts(view.bank)
        packed |= view.architecture.pack_router(view.router)
        for key, value in packed.items():
            assert value.equal(own[key]), key
        left = [key for key in own if key not in packed]
        assert all("shared" in key for key in left), left


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_stored_names_are_those_that_transformers_writes(
    name: str, original: bool, tmp_path: Path
) -> None:
    model = tiny(name)
    names = block_views(model)[0].architecture.stored
    model.save_pretrained(tmp_path, save_original_format=original)
    stored = load_file(tmp_path / "model.safetensors")
    own = {k: v for k, v in model.state_dict().items() if k in stored or "lm_head" not in k}
    for key, value in own.items():
        assert names.read(key, value.shape, stored, stored.__getitem__).equal(value), key
    if original:
        split = {k: v for key, value in own.items() for k, v in names.split(key, value)}
        assert split.keys() == stored.keys()
        assert all(split[key].equal(stored[key]) for key in stored)


def test_an_unknown_architecture_lists_the_supported_ones() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(SpecError, match=r"'llama'.*mixtral, qwen2_moe.*deepseek_v3.*moekit_dec"):
        block_views(LlamaForCausalLM(config))


def test_a_model_without_a_mixture_is_refused() -> None:
    with pytest.raises(SpecError, match="has no MoE block"):
        block_views(random_model(own_config(SwiGLU(count=1, hidden=8))))


@pytest.mark.parametrize(
    "layer",
    [MoESpec(ReLURouting(k=2), SwiGLU(8, hidden=8)), MoESpec(TopK(noise=True), SwiGLU(8, 8))],
)
def test_an_own_layer_of_another_kind_is_refused(layer: MoESpec) -> None:
    with pytest.raises(SpecError, match="TopK without noise over one feed-forward bank"):
        block_views(random_model(own_config(layer)))


def test_a_wrong_shape_is_refused() -> None:
    view = block_views(tiny("gpt_oss"))[0]
    expert = view.expert(0)
    with pytest.raises(SpecError, match=r"down of an expert of model\.layers\.0\.mlp"):
        view.set_expert(0, ExpertWeights(up=expert.up, down=expert.down.T[:3], gate=expert.gate))
    with pytest.raises(SpecError, match=r"gate_bias .* got nothing"):
        view.set_expert(0, ExpertWeights(up=expert.up, down=expert.down, gate=expert.gate))


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        model = MoEDecoderForCausalLM(CONFIGS["moekit_decoder"]())
    with pytest.raises(CheckpointError, match="not in memory"):
        _ = block_views(model)[0].bank
