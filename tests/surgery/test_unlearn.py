"""Unlearning models in memory: what changes, what must not, how it ends, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from surgery_models import CONFIGS, Blocks, tiny
from transformers import PreTrainedModel

from moekit.errors import DataError, SpecError
from moekit.surgery import block_views
from moekit.surgery.batch import batch_of
from moekit.surgery.unlearn import (
    GA,
    NPO,
    RMU,
    Algorithm,
    AllExperts,
    Attributed,
    Everything,
    GDiff,
    Look,
    Named,
    RandomExperts,
    Routers,
    Targets,
    Texts,
    UnlearnSpec,
    unlearn_model,
)
from moekit.surgery.unlearn.run import Runner
from moekit.surgery.unlearn.targets import Choice, choice_of
from moekit.surgery.unlearn.trained import Trained

TEXTS = Texts(Blocks(), Blocks(seed=3), Blocks(seed=4), Blocks(seed=5))
SHORT = UnlearnSpec(
    steps=3,
    until=None,
    check_every=2,
    learning_rate=1e-2,
    weight_decay=0.1,
    batch_size=2,
    accumulate=2,
)
ALGORITHMS: list[Algorithm] = [GA(), GDiff(), NPO(beta=0.1), RMU(weight=1.0)]


def state_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_but_the_expert_and_its_router_changes(name: str) -> None:
    model, before = tiny(name), tiny(name)
    report = unlearn_model(model, TEXTS, SHORT)
    (chosen,) = report.experts
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    views = zip(block_views(model), block_views(before), strict=True)
    inside = 0
    for view, old in views:
        for expert in range(view.experts):
            pairs = zip(view.expert(expert).items(), old.expert(expert).items(), strict=True)
            for (_, now), (_, then) in pairs:
                if (view.name, expert) == (chosen.block, chosen.expert):
                    assert (now != then).any()
                    assert now.any()  # trained, and not deleted
                    inside += now.numel()
                else:
                    assert now.equal(then)
        if view.name == chosen.block:
            assert (view.router.weight != old.router.weight).any(1).all()
            trained = [view.router.weight, view.router.bias]
            inside += sum(t.numel() for t in trained if t is not None)
    assert report.trained == inside
    assert report.changed <= inside
    own = block_views(before)[0].architecture
    for key, tensor in state_of(model).items():
        is_expert = key.startswith(f"{chosen.block}.experts.")
        is_router = key.startswith(f"{chosen.block}.{own.router}.") and "correction" not in key
        if not is_expert and not is_router:
            assert tensor.equal(before.state_dict()[key]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_of_an_expert_is_its_slice_of_the_banks(name: str) -> None:
    model = tiny(name).double()
    if not name.startswith("moekit"):
        model.set_experts_implementation("eager")  # grouped products take no float64
    batch = batch_of(Blocks(), range(4))
    want = model(batch.token_BT, attention_mask=batch.mask_BT).logits
    whole = Trained(model, Choice(banks=(0, 1), routers=(0, 1)))
    with whole.training():
        Runner(model, whole)(batch).nats.backward()
        views = block_views(model)
        banks = [_gradients(view, e) for view in views[:2] for e in range(view.experts)]
    several = tuple((b, e) for b in (0, 1) for e in range(views[b].experts))
    apart = Trained(model, Choice(experts=several, routers=(0, 1)))
    with apart.training():
        found = model(batch.token_BT, attention_mask=batch.mask_BT).logits
        assert found.detach().equal(want.detach())  # listening changes no output
        Runner(model, apart)(batch).nats.backward()
        frozen = [p for p in model.parameters() if id(p) not in map(id, apart.whole.values())]
        assert all(parameter.grad is None for parameter in frozen)
        for tap, bank in zip(apart.taps, banks, strict=True):
            for key, leaf in tap.leaves.items():
                assert leaf.grad is not None
                torch.testing.assert_close(leaf.grad, bank[key], rtol=1e-8, atol=1e-10)


def _gradients(view: Any, expert: int) -> dict[str, torch.Tensor]:
    """The gradients of one expert, read through the view like its weights."""
    parameters = list(view.block.experts.parameters())
    held = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.grad.clone()
    found = {key: value.clone() for key, value in view.expert(expert).items()}
    for parameter, data in zip(parameters, held, strict=True):
        parameter.data = data
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_all_experts_apart_are_the_ordinary_method(algorithm: Algorithm) -> None:
    if isinstance(algorithm, RMU):
        algorithm = algorithm.replace(layer=2)
    spec = SHORT.replace(algorithm=algorithm, anchor=0.0, weight_decay=0.0, steps=1)
    every = tuple((layer, e) for layer in range(3) for e in range(8))
    states = []
    for targets in (Named(experts=every), AllExperts()):
        model = tiny("olmoe")
        unlearn_model(model, TEXTS, spec.replace(targets=targets, max_grad_norm=1e9))
        states.append(model.state_dict())
    start = tiny("olmoe").state_dict()
    for key, tensor in states[0].items():
        # Adam's first step is the sign of the gradient, so that rounding shows where that is 0.
        far = (tensor - states[1][key]).abs() > 1e-4
        assert far.float().mean() < 0.01
        assert tensor.equal(start[key]) == states[1][key].equal(start[key])


def test_gradient_difference_without_weight_is_gradient_ascent() -> None:
    states = []
    for algorithm in (GA(), GDiff(weight=0.0), GDiff()):
        model = tiny("olmoe")
        unlearn_model(model, TEXTS, SHORT.replace(algorithm=algorithm))
        states.append(model.state_dict())
    assert all(tensor.equal(states[1][key]) for key, tensor in states[0].items())
    assert any(not tensor.equal(states[2][key]) for key, tensor in states[0].items())


def test_the_reference_is_the_model_before_the_first_step() -> None:
    model, beta = tiny("olmoe"), 0.1
    trained = Trained(model, Choice(experts=((1, 3),), routers=(1,)))
    run, batch = Runner(model, trained), batch_of(Blocks(), range(4))
    algorithm = NPO(beta=beta)
    with trained.training():
        _, first = algorithm.forget(run, batch)
        assert first.item() == pytest.approx(2 * math.log(2) / beta)
        first.backward()
        optimiser = torch.optim.SGD(trained.leaves, lr=1.0)
        optimiser.step()
        trained.write()
        _, second = algorithm.forget(run, batch)
    assert second.item() < 2 * math.log(2) / beta - 1e-3
    with torch.no_grad():
        old = tiny("olmoe")(batch.token_BT, attention_mask=batch.mask_BT).logits
        with trained.as_before():
            assert model(batch.token_BT, attention_mask=batch.mask_BT).logits.equal(old)
        assert not model(batch.token_BT, attention_mask=batch.mask_BT).logits.equal(old)


def test_misdirection_starts_with_nothing_to_retain() -> None:
    model = tiny("olmoe")
    trained = Trained(model, Choice(experts=((1, 3),), routers=(1,)))
    run, batch = Runner(model, trained), batch_of(Blocks(), range(4))
    seen = run(batch, hidden_after=1)
    with torch.no_grad():
        states = model(batch.token_BT, attention_mask=batch.mask_BT, output_hidden_states=True)
    torch.testing.assert_close(seen.hidden_ND, states.hidden_states[2][batch.valid_BT])
    assert run.before(batch, hidden_after=1).hidden_ND.equal(seen.hidden_ND)


@pytest.mark.parametrize(
    "targets",
    [
        Attributed(count=3),
        Attributed(count=2, scope="layer", router=False),
        Attributed(shared=True),
        Named(experts=((1, 2), (2, 0))),
        RandomExperts(count=2, seed=3),
        AllExperts(layers=(2,)),
        AllExperts(router=False),
        Routers(),
        Everything(),
    ],
    ids=lambda t: f"{type(t).__name__}-{len(str(t.to_dict()))}",
)
def test_every_choice_trains_what_it_says(targets: Targets) -> None:
    model, before = tiny("deepseek_v3"), tiny("deepseek_v3")
    report = unlearn_model(model, TEXTS, SHORT.replace(targets=targets, algorithm=GDiff()))
    old = before.state_dict()
    changed = {key for key, tensor in model.state_dict().items() if not tensor.equal(old[key])}
    layers = {expert.layer for expert in report.experts}
    if isinstance(targets, AllExperts):
        layers = set(targets.layers or (1, 2))
    if isinstance(targets, Routers):
        layers = {1, 2}
    kinds = {
        "experts": not isinstance(targets, Routers),
        "gate": getattr(targets, "router", True),
        "shared_experts": getattr(targets, "shared", False),
    }
    want = {
        key
        for key, tensor in old.items()
        if isinstance(targets, Everything)
        or any(
            wanted and key.startswith(f"model.layers.{layer}.mlp.{kind}.")
            for layer in layers
            for kind, wanted in kinds.items()
        )
        if tensor.dtype.is_floating_point and "correction" not in key
    }
    assert changed == want
    assert 0 < report.changed <= report.trained <= report.parameters


def test_the_anchor_holds_the_router() -> None:
    shares = []
    for anchor in (0.0, 10.0):
        model = tiny("olmoe")
        spec = SHORT.replace(algorithm=GA(), anchor=anchor, steps=30, weight_decay=0.0)
        (chosen,) = unlearn_model(model, TEXTS, spec).experts
        view = next(v for v in block_views(model) if v.name == chosen.block)
        inputs: list[torch.Tensor] = []
        router = view.architecture.router_module(view.block)
        handle = router.register_forward_hook(lambda _, args, __, into=inputs: into.append(args[0]))
        with torch.no_grad():
            model(TEXTS.forget.tokens, attention_mask=TEXTS.forget.masks)
        handle.remove()
        x_ND = inputs[0].flatten(0, -2)[TEXTS.forget.masks.flatten().bool()]
        shares.append(float(view.logits(x_ND).softmax(-1)[:, chosen.expert].mean()))
    assert shares[1] > max(shares[0], 0.5)


def test_it_ends_where_perplexity_is_reached() -> None:
    spec = SHORT.replace(algorithm=GA(), until=1.5, steps=200, check_every=1)
    report = unlearn_model(tiny("olmoe"), TEXTS, spec)
    ratios = [k.forget_perplexity / report.looks[0].forget_perplexity for k in report.looks]
    assert report.reached
    assert report.steps == len(ratios) - 1 < 200
    assert ratios[-1] >= 1.5 > max(ratios[:-1])
    assert report.forget["after"]["perplexity"] == report.looks[-1].forget_perplexity
    assert report.retain is not None
    short = unlearn_model(tiny("olmoe"), TEXTS, spec.replace(steps=1))
    assert not short.reached


def test_perplexity_at_equal_forgetting_is_between_the_looks_around_it() -> None:
    report = unlearn_model(tiny("olmoe"), TEXTS, SHORT.replace(steps=2))

    def at(times: float, *points: tuple[float, float | None]) -> float | None:
        looks = tuple(
            Look(
                step,
                forget,
                retain,
                loss=None,
                forget_nats=math.log(forget),
                retain_nats=None if retain is None else math.log(retain),
            )
            for step, (forget, retain) in enumerate(points)
        )
        return dataclasses.replace(report, looks=looks).retain_perplexity_at(times)

    path = ((10.0, 5.0), (20.0, 5.0), (80.0, 20.0), (100.0, 1.0))
    assert at(2.0, *path) == pytest.approx(5.0)
    assert at(8.0, *path) == pytest.approx(20.0)
    assert at(4.0, *path) == pytest.approx(10.0)  # half way in logarithms, of both
    assert at(11.0, *path) is None  # never came so far
    assert at(4.0, (10.0, None), (80.0, None)) is None


def test_labels_say_what_is_unlearned() -> None:
    class Answers(Blocks):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            block = super().__getitem__(index)
            labels = block["input_ids"].clone()
            labels[:8] = -100
            return {**block, "labels": labels}

    batch = batch_of(Answers(), range(2))
    assert (batch.target_BT[:, :7] == -100).all()
    assert batch.target_BT[:, 7:].equal(batch.token_BT[:, 8:])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": Attributed(count=25)}, "25 experts cannot be selected; wanted 1 to 24"),
        ({"targets": Attributed(count=9, scope="layer")}, "wanted 1 to 8"),
        ({"targets": RandomExperts(count=25)}, "25 experts cannot be drawn of 24"),
        ({"targets": Named(experts=((7, 0),))}, "layer 7 has no MoE block"),
        ({"targets": Named(experts=((1, 8),))}, "no routed expert 8; it has 0 to 7, and its sha"),
        ({"targets": Attributed(shared=True)}, "has no shared expert"),
        ({"targets": AllExperts(layers=(9,))}, "layer 9 has no MoE block"),
        ({"targets": AllExperts(layers=())}, "layers is empty"),
        (
            {"targets": Named(experts=((2, 0),)), "algorithm": RMU(layer=1)},
            "RMU after layer 1 gives no gradient to layer 2",
        ),
        (
            {"targets": AllExperts(layers=(2,)), "algorithm": RMU(layer=1)},
            "gives no gradient to layer 2",
        ),
        ({"algorithm": RMU(layer=3)}, "no layer 3; it has 0 to 2"),
        ({"targets": AllExperts(), "algorithm": RMU()}, "name it with layer=N"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(changes: dict[str, Any], said: str) -> None:
    model = tiny("olmoe")
    before = state_of(model)
    with pytest.raises(SpecError, match=said):
        unlearn_model(model, TEXTS, SHORT.replace(**changes))
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: UnlearnSpec(anchor=-1.0),
        lambda: UnlearnSpec(until=1.0),
        lambda: UnlearnSpec(steps=0),
        lambda: UnlearnSpec(learning_rate=0.0),
        lambda: UnlearnSpec(attribution_tokens=0),
        lambda: Attributed(count=0),
        lambda: RandomExperts(count=0),
        lambda: Named(),
        lambda: Named(experts=((0, 1), (0, 1))),
        lambda: NPO(beta=0.0),
        lambda: GDiff(weight=-1.0),
        lambda: RMU(coefficient=0.0),
    ],
)
def test_specs_that_mean_nothing_are_refused(make: Any) -> None:
    with pytest.raises(SpecError):
        make()


def test_specs_go_to_json_and_back() -> None:
    spec = SHORT.replace(algorithm=RMU(layer=2), targets=Named(experts=((1, 2), (0, 3))))
    assert UnlearnSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(SpecError, match="no algorithm 'magic'; known: ga, gdiff, npo, rmu"):
        Algorithm.named("magic")


def test_text_that_is_missing_is_refused() -> None:
    empty = Blocks(count=0)
    for algorithm in (GDiff(), NPO(), RMU()):
        texts = Texts(Blocks(), None, Blocks(), Blocks())
        with pytest.raises(SpecError, match="trains on text to retain"):
            unlearn_model(tiny("olmoe"), texts, SHORT.replace(algorithm=algorithm))
    parts = [Blocks()] * 4
    for place in range(4):
        texts = Texts(*(empty if i == place else part for i, part in enumerate(parts)))
        with pytest.raises(DataError, match="text is empty"):
            unlearn_model(tiny("olmoe"), texts, SHORT)
    alone = unlearn_model(
        tiny("olmoe"), Texts(Blocks(), None, Blocks(), None), SHORT.replace(algorithm=GA())
    )
    assert alone.retain is None
    assert set(alone.overlap) == {"forget"}


def test_packed_experts_are_refused() -> None:
    model = tiny("olmoe")
    model.model.layers[1].mlp.experts.gate_up_proj = torch.nn.Parameter(
        torch.zeros(8, 16, 16, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(SpecError, match=r"torch.int8, a packed type"):
        choice_of(model, Attributed(), lambda: torch.zeros(3, 8))
