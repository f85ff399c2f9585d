"""Every registered kind takes part in the contract suite; specs survive JSON."""

from __future__ import annotations

import itertools
import json

import pytest
from contract_cases import (
    CASES,
    DISPATCHES,
    EXPERTS,
    FAMILIES,
    LOSSES,
    ROUTERS,
    Case,
    every_case,
    label,
    pairs,
    registered,
    speed,
)

from moekit.dispatch import Capacity, Merged, Rectified
from moekit.errors import SpecError
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import LossSpec, TokenGraph, TopK
from moekit.spec import Spec


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_registered_kind_has_a_case(family: type[Spec]) -> None:
    assert set(FAMILIES[family]) == registered(family)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_cases_stand_under_their_own_kind(family: type[Spec]) -> None:
    for kind, specs in FAMILIES[family].items():
        assert specs
        for spec in specs:
            assert kind in {type(part).__name__ for part in (spec, *getattr(spec, "parts", ()))}


@pytest.mark.parametrize(
    "spec",
    [spec for family in FAMILIES.values() for specs in family.values() for spec in specs],
    ids=label,
)
def test_a_spec_survives_json(spec: Spec) -> None:
    family = next(f for f in FAMILIES if isinstance(spec, f))
    again = family.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


def test_the_default_suite_shows_every_pair_of_parts_that_some_case_has() -> None:
    shown = [case for case in CASES if not speed(case)]
    assert set().union(*map(pairs, CASES)) == set().union(*map(pairs, shown))


@every_case()
def test_a_layer_spec_survives_json(case) -> None:
    spec = case.spec
    assert MoESpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_the_only_refused_pairs() -> None:
    """A limit with a free number of experts; rectification of what is no plain top-k.

    And merging with a decision for every row.
    """
    pairs = itertools.product(
        itertools.chain(*ROUTERS.values()), itertools.chain(*DISPATCHES.values())
    )
    for router, dispatch in pairs:
        case = Case(router, SwiGLU(count=EXPERTS, hidden=8), dispatch)
        chosen = router.router if isinstance(router, TokenGraph) else router
        said = None
        if isinstance(dispatch, Capacity | Rectified) and not (router.fixed_k or router.settles):
            said = "use Dropless" if isinstance(dispatch, Capacity) else "use TopK"
        elif isinstance(dispatch, Rectified) and not isinstance(chosen, TopK):
            said = "set fill_in=False" if router.settles and dispatch.fill_in else None
            said = said if router.settles else "use TopK"
        elif isinstance(dispatch, Rectified) and chosen.normalize == "none":
            said = "set normalize to selected"
        elif isinstance(dispatch, Rectified) and chosen.scale != 1:
            said = "at their defaults"
        elif isinstance(dispatch, Merged) and not router.per_scope:
            said = "decides row by row"
        if said is None:
            assert case.spec.router == router
            continue
        with pytest.raises(SpecError, match=said):
            _ = case.spec


@pytest.mark.parametrize("loss", list(itertools.chain(*LOSSES.values())), ids=label)
def test_a_loss_says_which_routers_it_serves(loss: LossSpec) -> None:
    kinds = ("feed_forward",) * 4 + ("zero",)
    for router in itertools.chain(*ROUTERS.values()):
        if router.scores in loss.needs:
            loss.check_layer(router, kinds)
        else:
            with pytest.raises(SpecError, match="it works on"):
                loss.check_layer(router, kinds)


def test_a_capacity_default_drops_nothing_in_evaluation() -> None:
    layer = MoESpec(TopK(k=2), CASES[0].experts, Capacity(factor=0.1)).build(8).eval()
    assert layer.dispatch.factor is None
