"""A temperature as state: annealed, learned, restored; its noise and its refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from temperature_cases import ALIKE, EXPERTS, OTHERS, SITE, STEP, advance, router_of, rows

from moekit.dispatch import Capacity
from moekit.errors import MoekitError, SignalError, SpecError
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import DenseToSparse
from moekit.routing.softmax import gumbel_like, tempered_softmax
from moekit.training.decay import decayed_names

# --- the temperature as state -------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_the_trajectory_is_exact_and_holds_at_its_end(schedule: str) -> None:
    router = router_of(temperature=2.0, final=0.3, steps=1000, schedule=schedule)
    for step in range(1003):
        done = min(step / 1000, 1.0)
        wanted = 2.0 + (0.3 - 2.0) * done if schedule == "linear" else 2.0 * 0.15**done
        assert float(router.temperature()) == pytest.approx(wanted, rel=1e-13)
        if step in (0, 1000, 1002):
            assert float(router.temperature()) == (2.0 if step == 0 else 0.3)
        router.update(STEP)


def test_a_rise_is_a_schedule_too_and_a_constant_stays() -> None:
    rising = router_of(temperature=0.5, final=4.0, steps=2, schedule="exponential")
    constant = router_of(temperature=0.5)
    found = []
    for _ in range(4):
        found.append(float(rising.temperature()))
        assert float(constant.temperature()) == 0.5
        rising.update(STEP)
        constant.update(STEP)
    assert found == pytest.approx([0.5, math.sqrt(2), 4.0, 4.0])


def test_restoring_mid_run_continues_the_same_trajectory(tmp_path: Path) -> None:
    ours, restored = (router_of(temperature=2.0, final=0.1, steps=50) for _ in range(2))
    advance(ours, 20)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    restored.load_state_dict(torch.load(tmp_path / "state.pt"))
    x_ND = rows()
    for _ in range(40):
        assert torch.equal(restored.temperature(), ours.temperature())
        assert torch.equal(restored(x_ND).weight_NK, ours(x_ND).weight_NK)
        ours.update(STEP)
        restored.update(STEP)
    ours.reset_parameters()
    assert float(ours.temperature()) == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_touch_the_schedule(dtype: torch.dtype) -> None:
    ours, plain = (router_of(temperature=2.0, final=0.1, steps=3000) for _ in range(2))
    ours.to(dtype)
    for step in (1, 700, 301):  # 1002: a bfloat16 counter would have stopped at 256
        advance(ours, step)
        advance(plain, step)
        assert torch.equal(ours.temperature(), plain.temperature())


def test_forward_passes_do_not_move_the_temperature() -> None:
    router = router_of(temperature=2.0, final=0.1, steps=5)
    for training in (True, False, True):
        router.train(training)(rows())
    assert float(router.temperature()) == 2.0


def test_a_learned_temperature_learns_and_does_not_decay() -> None:
    router = router_of(temperature=3.0, learned=True, activation="tanh")
    assert decayed_names(router) == ["weight"]
    optimiser = torch.optim.SGD([router.log_temperature], lr=1.0)
    x_ND = rows(50)
    best_NE = router(x_ND).logits_NE.detach().argmax(-1, keepdim=True)
    for _ in range(30):
        loss = -router(x_ND).weight_NK.gather(1, best_NE).log().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert 0 < float(router.temperature().detach()) < 1.0
    advance(router, 5)
    router.reset_parameters()
    assert float(router.temperature().detach()) == pytest.approx(3.0)


@pytest.mark.parametrize("activation", ALIKE)
def test_learning_what_cannot_be_identified_warns(activation: str) -> None:
    with pytest.warns(UserWarning, match="neither can be estimated"):
        DenseToSparse(learned=True, activation=activation).build(SITE)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", OTHERS)
def test_learning_beside_another_activation_does_not_warn(activation: str) -> None:
    DenseToSparse(learned=True, activation=activation).build(SITE)  # type: ignore[arg-type]


# --- noise --------------------------------------------------------------------------------------


def test_noise_is_added_before_the_division_and_in_training_alone() -> None:
    noisy, plain, x_ND = router_of(noise=True, temperature=0.7), router_of(temperature=0.7), rows()
    torch.manual_seed(5)
    routing = noisy(x_ND)
    torch.manual_seed(5)
    noise_NE = gumbel_like(routing.logits_NE)
    torch.testing.assert_close(
        routing.weight_NK, ((routing.logits_NE + noise_NE) / 0.7).softmax(-1), rtol=1e-12, atol=0
    )
    assert torch.equal(routing.logits_NE, plain(x_ND).logits_NE)
    assert torch.equal(noisy.eval()(x_ND).weight_NK, plain(x_ND).weight_NK)


def test_tempered_softmax_equals_softmax_of_the_quotient() -> None:
    logits = torch.randn(3, 5, 4, dtype=torch.float64)
    for dim in (-1, 1):
        torch.testing.assert_close(tempered_softmax(logits, 0.3, dim), (logits / 0.3).softmax(dim))


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; wanted a positive finite"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": 1e-300}, "temperature is 1e-300"),  # 0 in float32
        ({"final": 0.0, "steps": 5}, "final is 0.0"),
        ({"final": math.inf, "steps": 5}, "final is inf"),
        ({"final": 0.3}, "annealing needs both"),
        ({"steps": 5}, "annealing needs both"),
        ({"steps": -1}, "steps is -1"),
        ({"final": 0.3, "steps": 5, "learned": True}, "no schedule"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"k": 0}, "k is 0"),
        ({"init_std": 0.0}, "init_std is 0.0"),
        ({"activation": "cube"}, "activation is 'cube'"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
    ],
)
def test_bad_gates_are_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence) as caught:
        DenseToSparse(**fields)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MoekitError)


def test_bad_designs_are_refused() -> None:
    bank = SwiGLU(count=EXPERTS, hidden=4)
    with pytest.raises(SpecError, match="k is 7 but the bank has 6 experts"):
        MoESpec(DenseToSparse(k=7), bank)
    with pytest.raises(SpecError, match="all would be left out"):
        MoESpec(DenseToSparse(threshold=0.2), bank)
    with pytest.raises(SpecError, match="use Dropless"):
        MoESpec(DenseToSparse(), bank, Capacity())


def test_not_a_number_is_named_in_anomaly_mode_and_never_hidden() -> None:
    router, x_ND = router_of(), rows()
    x_ND[3, 2] = math.nan
    assert bool(router(x_ND).weight_NK[3].isnan().all())
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(SignalError, match="logits that are not finite"),
    ):
        router(x_ND)


def test_expected_load() -> None:
    bank = SwiGLU(count=EXPERTS, hidden=4)
    assert MoESpec(DenseToSparse(), bank).expected_load() == EXPERTS
    annealed = DenseToSparse(temperature=2.0, final=0.3, steps=9, k=2)
    assert MoESpec(annealed, bank).expected_load() == pytest.approx(2)
