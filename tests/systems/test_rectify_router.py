"""What the experiment concludes from given losses, and how it counts waste."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moekit.dispatch import Dropless, Rectified, rectify
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.routing import TopK
from moekit.systems import Shape
from moekit.systems import rectify_router_experiment as study
from moekit.systems.rectify_router import rectify_router


def run_of(shift: float, **changed: float) -> dict[str, Any]:
    """Arms with losses of the expected order, all moved by a seed's ``shift``."""
    after = {
        "dense": 2.135,
        "dropless": 2.02,
        "top-1 c=0.5": 2.13,
        "FR c=0.5": 2.12,
        "IR c=0.5": 2.06,
        "FR+IR c=0.5": 2.055,
        "top-1 c=0.5, tested IR c=0.5": 2.12,
        "top-1 c=1.0": 2.06,
        "FR c=1.0": 2.06,
        "IR c=1.0": 2.035,
        "FR+IR c=1.0": 2.03,
    } | changed
    return {
        name: study._Arm(
            value + shift, shift + (2.135 if "IR" in name or name == "dropless" else 3.0)
        )
        for name, value in after.items()
    }


FINDINGS = (
    study._starts_as_dense,
    study._intra_device_pays,
    study._fill_in_is_neutral,
    study._low_capacity_gains_most,
    study._testing_alone,
    study._dropless_needs_no_repair,
)
SHIFTS = (0.0, 0.02, -0.01)


def verdicts(runs: list[dict[str, Any]], quick: bool = False) -> list[str]:
    return [finding(runs, quick).verdict for finding in FINDINGS]


def test_the_expected_order_is_a_reproduction() -> None:
    runs = [run_of(shift) for shift in SHIFTS]
    assert verdicts(runs) == ["reproduced"] * 6
    assert verdicts(runs, quick=True) == ["inconclusive"] * 6


def test_the_opposite_order_is_none() -> None:
    changed = {
        "IR c=0.5": 2.14,
        "FR+IR c=0.5": 2.15,
        "FR c=0.5": 2.2,
        "top-1 c=0.5, tested IR c=0.5": 2.2,
        "dropless": 2.3,
    }
    runs = [run_of(shift, **changed) for shift in SHIFTS]
    assert verdicts(runs)[1:] == ["not reproduced"] * 5
    broken = [dict(run, **{"IR c=0.5": study._Arm(2.0, 2.5)}) for run in runs]
    assert verdicts(broken)[0] == "not reproduced"


def test_what_lies_within_the_spread_or_in_one_seed_is_inconclusive() -> None:
    runs = [
        run_of(0.0, **{"IR c=0.5": 2.13 + gap, "FR+IR c=0.5": 2.13 + gap})
        for gap in (0.05, -0.05, 0.01)
    ]
    assert verdicts(runs)[1] == "inconclusive"
    assert verdicts([run_of(0.0)])[1:] == ["inconclusive"] * 5


class _Text:
    """Held-out text of random tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(32, (24, 16), generator=generator)
        self.validation = [{"input_ids": row} for row in ids]


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_waste_is_counted_over_layers_and_batches(factor: float) -> None:
    limits = study._limits(factor)
    shares = {}
    for name, limit in {**limits, "dropless": Dropless()}.items():
        torch.manual_seed(0)
        config = MoEDecoderConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            layers=MoESpec(TopK(k=1), SwiGLU(count=8, hidden=8), limit),
        )
        model = MoEDecoderForCausalLM(config).eval()
        shares[name] = study._waste(model, _Text())  # type: ignore[arg-type]
    assert shares["dropless"] == (0.0, 0.0, 1.0)
    dropped, padding, active = shares[f"top-1 c={factor}"]
    # 8 sequences a batch, 8 groups of 16 tokens: C = 16 c / 8, so 8 C = 16 c places a group.
    assert 1 - dropped == pytest.approx(factor * (1 - padding))
    assert active == pytest.approx(1 - dropped)
    assert shares[f"FR c={factor}"][1] < padding
    # What fill-in takes from padding it runs; local repair gives every dropped token one expert.
    assert shares[f"FR c={factor}"][2] == pytest.approx(factor * (1 - shares[f"FR c={factor}"][1]))
    assert shares[f"IR c={factor}"][2] == pytest.approx(1.0)
    assert shares[f"FR+IR c={factor}"][2] > shares[f"FR c={factor}"][2]


def test_the_design_is_one_expert_a_device() -> None:
    (layer,) = rectify_router(Shape(16, 8, 4)).layers
    assert isinstance(layer, MoESpec)
    assert layer.dispatch == Rectified(factor=1.0, groups=16)
    (full,) = rectify_router(Shape(4, 8, 4)).layers
    assert isinstance(full, MoESpec)
    assert full.dispatch == Rectified(groups=4, fill_in=False)
    routing = full.build(8).router(torch.randn(8, 8))
    assert int(rectify(routing, full.dispatch).routing.used_NK.any(-1).sum()) == 8
