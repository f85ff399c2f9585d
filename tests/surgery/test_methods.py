"""One contract over every method of reducing experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from surgery_models import CONFIGS, Blocks, random_model, tiny
from torch import Tensor
from transformers import DeepseekV3Config, PreTrainedModel

from moekit.errors import SpecError
from moekit.surgery import block_views
from moekit.surgery.methods import (
    DERN,
    REAP,
    Frequency,
    HCSMoE,
    Method,
    MSMoE,
    Random,
    RouterWeight,
    Uncurl,
)
from moekit.surgery.prune import prune_model
from moekit.surgery.pruned import PrunedMoEForCausalLM
from moekit.surgery.recorder import record_model

METHODS: dict[str, Method] = {
    "random": Random(),
    "frequency": Frequency(),
    "router-weight": RouterWeight(),
    "reap": REAP(),
    "m-smoe": MSMoE(),
    "m-smoe average": MSMoE(router="average"),
    "m-smoe dominant": MSMoE(router="dominant", align=False),
    "hc-smoe": HCSMoE(),
    "hc-smoe average": HCSMoE(router="average", align=True),
    "dern": DERN(alpha=0.1),
    "dern probability": DERN(alpha=0.1, router="probability"),
    "dern canonical": DERN(alpha=0.1, router="none", canonicalize=True, parts=("gate", "down")),
    "uncurl": Uncurl(),
    "uncurl alias": Uncurl(router="alias", center=True),
}
NAMES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "moekit_decoder"]
CASES = [
    pytest.param(name, method, id=f"{name}-{key}")
    for name in NAMES
    for key, method in METHODS.items()
    if not (key.startswith("dern") and name in ("gpt_oss", "moekit_decoder"))
    and not (method.reroutes and name.startswith("moekit"))
]
DATA = Blocks()


def logits_of(model: PreTrainedModel) -> Tensor:
    """Logits of the tokens that are not padding."""
    with torch.no_grad():
        out: Tensor = model(DATA.tokens, attention_mask=DATA.masks).logits
    return out[DATA.masks.bool()]


def pruned(model: PreTrainedModel, method: Method, count: int) -> Any:
    statistics = record_model(model, DATA, method.needs)
    return prune_model(model, method, [count] * len(statistics), statistics)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_half_of_the_experts(name: str, method: Method) -> None:
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small, plans = pruned(model, method, 4)
    assert type(small) is (PrunedMoEForCausalLM if method.reroutes else type(model))
    assert bool(logits_of(small).isfinite().all())
    inner = small.inner if method.reroutes else small
    for plan, view, own in zip(plans, block_views(model), block_views(inner), strict=True):
        bank = own.architecture.experts(own.block)
        assert bank.up.shape == (4, *view.bank.up.shape[1:])
        assert bank.down.shape == (4, *view.bank.down.shape[1:])
        assert len(plan.keep) == 4
        assert bool((plan.transfer_EK.sum(1) <= 1 + 1e-9).all())
        assert plan.transfer_EK[list(plan.keep)].equal(torch.eye(4, dtype=torch.float64))
    assert all(model.state_dict()[key].equal(value) for key, value in before.items())
    again, _ = pruned(model, method, 4)
    for key, value in small.state_dict().items():
        assert again.state_dict()[key].equal(value), key


@pytest.mark.parametrize(("name", "method"), CASES)
def test_keeping_all_changes_no_bit(name: str, method: Method) -> None:
    model = tiny(name)
    same, _ = pruned(model, method, 8)
    assert type(same) is type(model)
    for key, value in model.state_dict().items():
        assert same.state_dict()[key].equal(value), key


def twins(seed: int) -> PreTrainedModel:
    """Top-1 of eight experts that are four pairs, of which only the first is ever taken."""
    changes = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "n_routed_experts": 8}
    settings = CONFIGS["deepseek_v3"]().to_dict() | changes
    model = random_model(DeepseekV3Config.from_dict(settings), seed)
    for view in block_views(model):
        assert view.router.correction is not None
        view.router.correction[:4], view.router.correction[4:] = 0.0, -1e-3
        for first in range(4):
            view.set_expert(first + 4, view.expert(first))
            view.router.weight[first + 4] = view.router.weight[first]
    return model


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("key", METHODS)
def test_pruning_duplicates_is_lossless(key: str, seed: int) -> None:
    model, method = twins(seed), METHODS[key]
    for stats in record_model(model, DATA):
        assert not stats.count_E[4:].any()
    # Chance may drop both of a pair, unless it drops a single expert.
    small, plans = pruned(model, method, 7 if key == "random" else 4)
    torch.testing.assert_close(logits_of(small), logits_of(model), rtol=1e-4, atol=1e-4)
    assert all(len(plan.removed) == (1 if key == "random" else 4) for plan in plans)


def permuted(model: PreTrainedModel) -> PreTrainedModel:
    for view in block_views(model):
        size = 8 // view.rule.groups
        groups = torch.randperm(view.rule.groups).tolist()
        order = torch.cat([g * size + torch.randperm(size) for g in groups])
        view.set_bank(view.bank[order].map(torch.clone))
        view.set_router(view.router.map(lambda t, o=order: t[o].clone()))
    return model


@pytest.mark.parametrize(
    ("name", "method"), [case for case in CASES if not isinstance(case.values[1], Random)]
)
def test_permuting_experts_changes_nothing(name: str, method: Method) -> None:
    """All but random, which knows experts by their place alone; where no two are used alike."""
    data = next(d for d in map(without_ties(name), range(100)) if d is not None)
    found = []
    for model in (tiny(name), permuted(tiny(name))):
        statistics = record_model(model, data, method.needs)
        found.append(prune_model(model, method, [4] * len(statistics), statistics)[0])
    torch.testing.assert_close(logits_of(found[1]), logits_of(found[0]), rtol=1e-3, atol=1e-3)


def without_ties(name: str) -> Callable[[int], Blocks | None]:
    """Text of a seed, if no two experts of a block are chosen equally often on it."""

    def draw(seed: int) -> Blocks | None:
        data = Blocks(count=12, length=16, seed=seed)
        counts = [block.count_E.tolist() for block in record_model(tiny(name), data)]
        return data if all(len(set(count)) == 8 for count in counts) else None

    return draw


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in NAMES])
def test_every_architecture_is_pruned(name: str) -> None:
    for method in (REAP(), Uncurl()):
        small, _ = pruned(tiny(name), method, 4)
        assert all(view.experts == 4 for view in block_views(small))
        assert bool(logits_of(small).isfinite().all())


@pytest.mark.parametrize("key", METHODS)
def test_too_few_and_too_many_experts_are_refused(key: str) -> None:
    model, method = tiny("olmoe"), METHODS[key]
    if not method.reroutes:
        with pytest.raises(SpecError, match="2 experts are too few: a token takes 3"):
            pruned(model, method, 2)
    for count in (0, -1, 9):
        with pytest.raises(SpecError, match=f"{count} cannot be kept"):
            pruned(model, method, count)


@pytest.mark.parametrize("key", METHODS)
def test_groups_stay_equal(key: str) -> None:
    model, method = tiny("deepseek_v3"), METHODS[key]
    _, plans = pruned(model, method, 6)
    if not method.reroutes:
        assert all(sum(e < 4 for e in plan.keep) == 3 for plan in plans)
        with pytest.raises(SpecError, match="5 experts cannot be split into the router's 2"):
            pruned(model, method, 5)


def test_methods_are_found_by_name() -> None:
    assert Method.named("dern", alpha=0.25) == DERN(alpha=0.25)
    assert {kind.name for kind in Method.kinds().values()} == {
        "random", "frequency", "router-weight", "reap", "m-smoe", "hc-smoe", "dern", "uncurl",
    }  # fmt: skip
    with pytest.raises(SpecError, match="no method 'magic'; known: dern, frequency"):
        Method.named("magic")
    with pytest.raises(SpecError, match="has no field 'beta'"):
        Method.named("dern", beta=1)
