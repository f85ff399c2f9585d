"""The noisy gate and its two losses, against their definitions and by drawing noise anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moekit import NoisyTopK, Signals
from moekit.errors import SpecError
from moekit.routing import NoisyTopKRouter, Site
from moekit.routing.noisy_top_k import chance_of_a_place, squared_variation

WIDTH, EXPERTS = 6, 5
SITE = Site(WIDTH, ("feed_forward",) * EXPERTS)


def built(spec: NoisyTopK, scale: float = 1.0) -> NoisyTopKRouter:
    torch.manual_seed(0)
    router = spec.build(SITE).double()
    nn.init.normal_(router.weight, std=scale)
    nn.init.normal_(router.noise_weight, std=scale)
    return router


def variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1) / (mean**2 + 1e-10)


def test_evaluation_is_a_softmax_over_the_k_best() -> None:
    router = built(NoisyTopK(k=3)).eval()
    x_ND = torch.randn(7, WIDTH).double()
    found = router(x_ND)
    for n in range(7):
        top, ids = (router.weight @ x_ND[n]).topk(3)
        assert found.expert_NK[n].tolist() == ids.tolist()
        torch.testing.assert_close(found.weight_NK[n], top.softmax(0))
    dense = found.dense_weight_NE().detach()
    counts = [float((dense[:, e] > 0).sum()) for e in range(EXPERTS)]
    sums = [float(dense[:, e].sum()) for e in range(EXPERTS)]
    assert found.losses["load_cv2"].item() == pytest.approx(variation(counts))
    assert float(found.losses["importance_cv2"].detach()) == pytest.approx(variation(sums))


def test_training_adds_noise_of_the_learned_deviation() -> None:
    router = built(NoisyTopK(k=EXPERTS, noise_floor=0.25), scale=0.5)
    x_1D = torch.randn(1, WIDTH).double()
    torch.manual_seed(1)
    found = router(x_1D.expand(40_000, WIDTH))
    share_NE = found.dense_weight_NE().detach().log()
    # Differences of noisy logits, which a softmax over all experts gives back.
    spread = (share_NE[:, 0] - share_NE[:, 1]).std()
    std_E = nn.functional.softplus(router.noise_weight @ x_1D[0]) + 0.25
    wanted = (std_E[0] ** 2 + std_E[1] ** 2).sqrt()
    torch.testing.assert_close(spread, wanted.detach(), rtol=0.02, atol=0)  # 0.4% in one deviation
    quiet = router.eval()(x_1D.expand(2, WIDTH))
    assert torch.equal(quiet.weight_NK[0], quiet.weight_NK[1])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_is_the_chance_when_noise_is_drawn_again(k: int) -> None:
    """100,000 draws of one expert's noise with the others held, for each expert."""
    generator = torch.Generator().manual_seed(k)
    logits_1E = torch.randn(1, EXPERTS, generator=generator).double()
    std_1E = torch.rand(1, EXPERTS, generator=generator).double() + 0.3
    noise_1E = torch.randn(1, EXPERTS, generator=generator).double()
    noisy_1E = logits_1E + noise_1E * std_1E
    chosen_1E = torch.zeros(1, EXPERTS, dtype=torch.bool)
    chosen_1E.scatter_(1, noisy_1E.topk(k).indices, True)
    chance_1E = chance_of_a_place(logits_1E, noisy_1E, std_1E, chosen_1E)
    for e in range(EXPERTS):
        drawn = noisy_1E.repeat(100_000, 1)
        again = torch.randn(100_000, generator=generator).double()
        drawn[:, e] = logits_1E[0, e] + again * std_1E[0, e]
        stays = (drawn.topk(k).indices == e).any(1).double().mean()
        assert float(chance_1E[0, e]) == pytest.approx(float(stays), abs=1e-2)


def test_losses_reach_both_maps_and_leave_padding_out() -> None:
    router = built(NoisyTopK(k=2))
    x_ND = torch.randn(6, WIDTH).double()
    torch.manual_seed(2)
    found = router(x_ND)
    assert router.loss_weights == {"importance_cv2": 0.01, "load_cv2": 0.01}
    for name in router.loss_weights:
        grads = torch.autograd.grad(
            found.losses[name], [router.weight, router.noise_weight], retain_graph=True
        )
        assert all(float(g.abs().max()) > 0 for g in grads)

    def losses(x_ND: Tensor, valid_N: Tensor | None) -> list[Tensor]:
        routing = router.eval()(x_ND, Signals(valid_N=valid_N))
        return list(routing.losses.values())

    padded = torch.cat([x_ND, 50 * torch.randn(3, WIDTH).double()])
    for ours, theirs in zip(losses(padded, torch.arange(9) < 6), losses(x_ND, None), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_every_expert_or_one_expert_or_no_row() -> None:
    every = built(NoisyTopK(k=EXPERTS))(torch.randn(4, WIDTH).double())
    assert every.losses["load_cv2"].item() == 0.0
    one = NoisyTopK(k=1).build(Site(WIDTH, ("feed_forward",)))(torch.randn(4, WIDTH))
    assert [v.item() for v in one.losses.values()] == [0.0, 0.0]
    none = built(NoisyTopK(k=2))(torch.zeros(0, WIDTH).double())
    assert [v.item() for v in none.losses.values()] == [0.0, 0.0]
    assert squared_variation(torch.zeros(3)).item() == 0.0


def test_both_maps_start_at_zero_and_noise_breaks_the_tie() -> None:
    router = NoisyTopK(k=2).build(SITE)
    assert all(not bool(p.any()) for p in router.parameters())
    torch.manual_seed(0)
    found = router(torch.randn(200, WIDTH))
    assert bool((found.load_E() > 40).all())  # 80 each in the mean
    assert not bool(found.logits_NE.any())


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"k": 0}, "k is 0"),
        ({"noise_floor": 0.0}, "noise_floor is 0.0"),
        ({"load": -1.0}, "load is -1.0"),
    ],
)
def test_bad_fields(fields: dict, match: str) -> None:
    with pytest.raises(SpecError, match=match):
        NoisyTopK(**fields)
