"""Plans on models and on files: what transformers loads again, against masked and slow oracles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_models import CONFIGS, VOCABULARY, own_config, random_model, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit import MoESpec, SwiGLU, TopK
from moekit.errors import OutputError, SpecError
from moekit.surgery import block_views
from moekit.surgery.apply import needs_own_class, pruned_model, write_pruned
from moekit.surgery.checkpoint import Checkpoint
from moekit.surgery.plan import BlockPlan, clustered, kept
from moekit.surgery.pruned import PrunedMoEForCausalLM

IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
HALF = [0, 3, 5, 6]  # two of each group of four
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def written(model: PreTrainedModel, plans: list[BlockPlan], folder: Path) -> Path:
    model.save_pretrained(folder / "before", max_shard_size="20KB")
    own = needs_own_class(
        model.config, [p.count for p in plans], any(p.rows_KE is None for p in plans)
    )
    checkpoint = Checkpoint(folder / "before")
    write_pruned(checkpoint, lambda number, _: plans[number], folder / "after", own)
    return folder / "after"


def masked(model: PreTrainedModel, keep: list[int]) -> None:
    """The same model with the dropped experts' scores at minus infinity before they are chosen."""
    for view in block_views(model):
        router: Any = view.architecture.router_module(view.block)
        dropped = [e for e in range(8) if e not in keep]
        if view.router.correction is not None:  # a sigmoid: 0 + bias could still win
            view.router.correction[dropped] = -torch.inf
        else:
            router.register_forward_pre_hook(_masking(router, dropped))


def _masking(router: Any, dropped: list[int]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        linear = torch.nn.functional.linear

        def without(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            out = linear(x, weight, bias)
            return out.index_fill(-1, torch.tensor(dropped), -torch.inf)

        torch.nn.functional.linear = without  # type: ignore[assignment]
        router.register_forward_hook(lambda *_: setattr(torch.nn.functional, "linear", linear))

    return hook


@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith("moekit")])
def test_pruning_equals_masking_before_the_softmax(name: str) -> None:
    model, oracle = tiny(name), tiny(name)
    plans = [kept(HALF, 8)] * len(block_views(model))
    small = pruned_model(model, plans)
    masked(oracle, HALF)
    torch.testing.assert_close(logits_of(small), logits_of(oracle), rtol=1e-4, atol=1e-4)
    assert type(small) is type(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_uniform_result_is_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plans = [kept(HALF, 8)] * len(block_views(model))
    small = pruned_model(model, plans)
    loaded = AutoModelForCausalLM.from_pretrained(written(model, plans, tmp_path))
    assert type(loaded) is type(model) is type(small)
    assert all(view.experts == 4 for view in block_views(loaded))
    for key, value in small.state_dict().items():
        assert loaded.state_dict()[key].equal(value), key
    torch.testing.assert_close(logits_of(loaded), logits_of(small))
    told = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    assert loaded.generate(IDS, **told).equal(small.generate(IDS, **told))
    gone = sum(v.numel() for v in before.values()) - sum(
        v.numel() for v in small.state_dict().values()
    )
    assert gone == sum(
        4 * sum(t.numel() // 8 for _, t in [*view.bank.items(), *view.router.items()])
        for view in block_views(model)
    )
    assert all(model.state_dict()[key].equal(value) for key, value in before.items())


@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith("moekit")])
@pytest.mark.parametrize("kind", ["counts", "transfer"])
def test_other_results_load_through_our_class(name: str, kind: str, tmp_path: Path) -> None:
    model = tiny(name)
    blocks = len(block_views(model))
    plans = [kept(HALF, 8)] * (blocks - 1) + [kept(range(8), 8)]
    if kind == "transfer":
        plans = [clustered(PAIRS, [0, 3, 4, 7], torch.arange(8) + 1.0, "alias")] * blocks
    small = pruned_model(model, plans)
    loaded = AutoModelForCausalLM.from_pretrained(written(model, plans, tmp_path))
    assert type(loaded) is type(small) is PrunedMoEForCausalLM
    for key, value in small.state_dict().items():
        assert loaded.state_dict()[key].equal(value), key
    torch.testing.assert_close(logits_of(loaded), logits_of(small))
    told = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    assert loaded.generate(IDS, **told).equal(small.generate(IDS, **told))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits_of(again), logits_of(small))
    config = json.loads((tmp_path / "after" / "config.json").read_text())
    assert config["model_type"] == "moekit_pruned"  # plain transformers refuses it by name


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("moekit")])
def test_own_layers_have_numbers_of_their_own(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    blocks = len(block_views(model))
    plans = [kept(HALF, 8)] * (blocks - 1) + [kept(range(8), 8)]
    loaded = AutoModelForCausalLM.from_pretrained(written(model, plans, tmp_path))
    assert [v.experts for v in block_views(loaded)] == [4] * (blocks - 1) + [8]
    torch.testing.assert_close(logits_of(loaded), logits_of(pruned_model(model, plans)))
    with pytest.raises(SpecError, match='such as router="average"'):
        pruned_model(model, [clustered(PAIRS, [0, 2, 4, 6], torch.ones(8), "alias")] * blocks)


@pytest.mark.parametrize("name", CONFIGS)
def test_keeping_all_changes_no_bit(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    plans = [kept(range(8), 8)] * len(block_views(model))
    loaded = AutoModelForCausalLM.from_pretrained(written(model, plans, tmp_path))
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].equal(value), key
    assert (
        loaded.config.to_diff_dict()
        == AutoModelForCausalLM.from_pretrained(tmp_path / "before").config.to_diff_dict()
    )


@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith("moekit")])
def test_aliases_of_equal_experts_are_exact(name: str) -> None:
    model = tiny(name)
    for view in block_views(model):
        for first, second in PAIRS:
            view.set_expert(second, view.expert(first))
    plans = [clustered(PAIRS, [1, 2, 5, 6], torch.rand(8), "alias")] * len(block_views(model))
    small = pruned_model(model, plans)
    torch.testing.assert_close(logits_of(small), logits_of(model), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_merging_is_the_weighted_mean_of_aligned_experts() -> None:
    view = block_views(tiny("gpt_oss"))[0]
    weight_E, order_EH = (
        torch.tensor([1.0, 3, 0, 0, 2, 2, 1, 0]),
        torch.stack([torch.randperm(8) for _ in range(8)]),
    )
    plan = clustered(PAIRS, [1, 3, 4, 6], weight_E, "average", order_EH)
    bank = plan.new_bank(view.bank)
    for place, (pair, shares) in enumerate(
        zip(PAIRS, [[0.25, 0.75], [0.5, 0.5], [0.5, 0.5], [1, 0]], strict=True)
    ):
        for key, value in bank[place].items():
            want = sum(
                share * dict(view.expert(e).reordered(order_EH[e]).items())[key].double()
                for e, share in zip(pair, shares, strict=True)
            )
            if shares == [1, 0]:  # alone: a copy in its own order
                want = dict(view.expert(6).items())[key].double()
            torch.testing.assert_close(value.double(), want)
    row = plan.new_router(view.router).weight[0]
    torch.testing.assert_close(row, 0.25 * view.router.weight[0] + 0.75 * view.router.weight[1])


def test_corrections_are_kept_and_not_summed() -> None:
    view = block_views(tiny("deepseek_v3"))[0]
    router = clustered(PAIRS, [1, 2, 4, 7], torch.ones(8), "average").new_router(view.router)
    assert view.router.correction is not None
    assert router.correction is not None
    assert router.correction.equal(view.router.correction[[1, 2, 4, 7]])


@pytest.mark.parametrize(
    ("name", "plan", "said"),
    [
        ("olmoe", kept([1, 2], 8), "a token takes 3, and this block works with 3"),
        ("deepseek_v2_groups", kept([0, 1, 2, 5], 8), r"keeps \[3, 1\]"),
        ("deepseek_v3", kept([0, 4], 8), "works with 4 or more"),
        ("olmoe", BlockPlan((2, 1, 0), torch.zeros(8, 3), torch.eye(3, 8)), "ascending"),
        ("olmoe", BlockPlan((1, 2, 9), torch.zeros(8, 3), torch.eye(3, 8)), "of 8"),
        ("olmoe", BlockPlan((1, 2, 3), torch.ones(8, 3), torch.eye(3, 8)), "more than all"),
        ("olmoe", BlockPlan((1, 2, 3), torch.ones(8, 2), torch.eye(3, 8)), "2 columns"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(name: str, plan: BlockPlan, said: str) -> None:
    model = tiny(name)
    with pytest.raises(SpecError, match=said):
        pruned_model(model, [plan] * len(block_views(model)))
    with pytest.raises(SpecError, match="one for each"):
        pruned_model(model, [plan])


class StoppedError(Exception):
    """An interruption."""


def test_an_interrupted_write_leaves_nothing_that_loads(tmp_path: Path) -> None:
    tiny("olmoe").save_pretrained(tmp_path / "before")
    checkpoint = Checkpoint(tmp_path / "before")
    files = {path: path.read_bytes() for path in (tmp_path / "before").iterdir()}

    def stop(number: int, _: Any) -> BlockPlan:
        if number == 2:
            raise StoppedError
        return kept(range(4), 8)

    with pytest.raises(StoppedError):
        write_pruned(checkpoint, stop, tmp_path / "after", False)
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
    (tmp_path / ".after.00000000.part").mkdir()  # of a process that was killed
    write_pruned(checkpoint, lambda *_: kept(range(4), 8), tmp_path / "after", False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after", "before"]
    assert {path: path.read_bytes() for path in (tmp_path / "before").iterdir()} == files
    with pytest.raises(OutputError, match="is there already"):
        write_pruned(checkpoint, lambda *_: kept(range(4), 8), tmp_path / "after", False)


def test_bfloat16_and_tied_embeddings_stay(tmp_path: Path) -> None:
    model = tiny("qwen3_moe").to(torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(written(model, [kept(HALF, 8)] * 3, tmp_path))
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    small = pruned_model(model, [kept(HALF, 8)] * 3)
    assert small.lm_head.weight is small.model.embed_tokens.weight


def test_a_balance_loss_over_unequal_layers_is_refused() -> None:
    model = tiny("mixtral")
    small = pruned_model(model, [kept(HALF, 8), kept(HALF, 8), kept(range(8), 8)])
    assert small(IDS, labels=IDS).loss.isfinite()
    with pytest.raises(SpecError, match="leave output_router_logits out"):
        small(IDS, output_router_logits=True)


def test_a_result_that_loses_its_groups_is_refused() -> None:
    layer = MoESpec(TopK(k=1, groups=4, top_groups=2, group_score="max"), SwiGLU(8, hidden=8))
    model = random_model(own_config(layer))
    assert pruned_model(model, [kept([0, 2, 4, 6], 8)]) is not None
    with pytest.raises(SpecError, match=r"4 equal groups, and the plan keeps \[2, 1, 1, 0\]"):
        pruned_model(model, [kept([0, 1, 2, 4], 8)])
