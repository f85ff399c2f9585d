"""Routing of noisy tokens by untrained routers, with and without a graph of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.measure import Fluctuation
from moekit.routing import Router, Sequences, Signals, SimilarityAware, Site, TopK

CLUSTERS, TOKENS, WIDTH, EXPERTS = 8, 64, 32, 8
SPREAD = NOISE = 0.5
TEMPERATURES = (0.1, 0.3, 1.0, 3.0)
BASE = TopK(k=2, init_std=WIDTH**-0.5)


def flip_rates(seed: int) -> dict[str, float]:
    """Share of slots that noise changes, of top-2 and of each temperature, for one draw.

    64 tokens stand around 8 Gaussian centres, and noise of deviation 0.5 moves each. All routers
    have the same gate; similarity is that of the tokens as they are, and each token sees all.
    """
    generator = torch.Generator().manual_seed(seed)
    centre_CD = torch.randn(CLUSTERS, WIDTH, generator=generator)
    around_ND = SPREAD * torch.randn(TOKENS, WIDTH, generator=generator)
    clean_ND = centre_CD.repeat_interleave(TOKENS // CLUSTERS, dim=0) + around_ND
    noisy_ND = clean_ND + NOISE * torch.randn(TOKENS, WIDTH, generator=generator)
    specs = {f"τ {t:g}": SimilarityAware(BASE, temperature=t, rank=0) for t in TEMPERATURES}
    return {
        name: _changed(spec.build(_SITE), clean_ND, noisy_ND, seed)
        for name, spec in {"top-2": BASE, **specs}.items()
    }


_SITE = Site(WIDTH, ("feed_forward",) * EXPERTS)


@torch.no_grad()
def _changed(router: Router, clean_ND: Tensor, noisy_ND: Tensor, seed: int) -> float:
    weight_ED = torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(seed + 1000))
    for parameter in router.parameters():  # the gate alone
        parameter.copy_(weight_ED * WIDTH**-0.5)
    everyone = torch.ones(1, TOKENS, TOKENS, dtype=torch.bool)
    signals = Signals(sequences=Sequences(1, everyone))
    before, after = (router(x_ND, signals) for x_ND in (clean_ND, noisy_ND))
    return Fluctuation.of(before, after).changed_slots
