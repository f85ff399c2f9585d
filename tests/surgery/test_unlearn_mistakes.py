"""Arguments of unlearning's parts that do not fit, and text of any form."""

from __future__ import annotations

import copy

import pytest
import torch
from surgery_models import tiny
from test_unlearn import SHORT, TEXTS

from moekit.errors import SpecError
from moekit.surgery import block_views
from moekit.surgery.unlearn import (
    Algorithm,
    Named,
    RouterAnchorLoss,
    attribute_experts,
    selection_overlap,
    unlearn_model,
)


def test_arguments_that_do_not_fit_are_refused() -> None:
    model = tiny("olmoe")
    for shape in ((2, 8), (3, 4), (4, 8), (24,)):
        with pytest.raises(SpecError, match="wanted \\(3, 8\\)"):
            unlearn_model(model, TEXTS, SHORT, scores_LE=torch.zeros(shape))
    for name in ("batch_size", "tokens"):
        with pytest.raises(SpecError, match="wanted at least 1"):
            attribute_experts(model, TEXTS.forget, **{name: 0})
    with pytest.raises(SpecError, match="wanted sum or mean"):
        RouterAnchorLoss([0], reduction="avg")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="counted from 0"):
        RouterAnchorLoss([-1])
    with pytest.raises(SpecError, match="the router has 4"):
        RouterAnchorLoss([7])(torch.full((2, 4), 0.25))
    with pytest.raises(SpecError, match="kind is no setting"):
        Algorithm.named("npo", kind="GA")
    with pytest.raises(SpecError, match="name"):
        Algorithm.named("npo", name="x")


def test_selections_of_any_text_are_compared() -> None:
    """Blocks of several lengths, masks on some of them alone."""
    rows = [{"input_ids": torch.arange(3, 3 + length)} for length in (5, 9, 7)]
    rows[1]["attention_mask"] = torch.tensor([1] * 6 + [0] * 3)
    model = tiny("olmoe")
    assert selection_overlap(model, model, rows).tolist() == [1.0] * 3
    other = copy.deepcopy(model)
    with torch.no_grad():
        for view in block_views(other):
            view.router.weight.normal_()
    overlap_L = selection_overlap(model, other, rows, batch_size=2)
    assert bool((overlap_L < 1).all())


@pytest.mark.parametrize("kind", ["float8", "int8 down", "config"])
def test_quantised_models_are_refused(kind: str) -> None:
    model = tiny("mixtral").bfloat16()
    view = block_views(model)[1]
    experts = model.get_submodule(f"{view.name}.experts")
    if kind == "config":
        model.config.quantization_config = {"quant_method": "fp8"}
    else:
        name, dtype = (
            ("gate_up_proj", torch.float8_e4m3fn)
            if kind == "float8"
            else (
                "down_proj",
                torch.int8,
            )
        )
        packed = experts.get_parameter(name).detach().to(dtype)
        setattr(experts, name, torch.nn.Parameter(packed, requires_grad=False))
    with pytest.raises(SpecError, match="packed type; load the model in full precision"):
        unlearn_model(model, TEXTS, SHORT.replace(targets=Named(experts=((1, 0),))))
