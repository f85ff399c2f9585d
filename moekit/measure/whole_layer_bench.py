"""The speed of a whole MoE layer at one shape: its router, its experts and all between them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from moekit.dispatch import Dropless
from moekit.layer import MoE
from moekit.measure.layer_bench import LayerBench, Run
from moekit.measure.layer_shapes import LayerShape
from moekit.routing import Site, TopK


class WholeLayerBench(LayerBench):
    """The contenders of :class:`LayerBench` with their routers: each is given tokens alone.

    Ours is :class:`moekit.MoE` with Mixtral's routing, that of transformers Mixtral's block, on the
    same router weights, by which tokens choose experts about uniformly. A model calls such a layer
    and no less, so with few tokens this is what decoding costs. The router's product, 2 N D E
    operations, is not counted in the limit.
    """

    whole: ClassVar[bool] = True

    def __init__(self, shape: LayerShape, device: torch.device, seed: int = 0) -> None:
        super().__init__(shape, device, seed)
        with torch.device(device):
            router = TopK(k=shape.k).build(Site(shape.width, self.bank.kinds))
        self.router = router.to(self.x_ND.dtype)
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            self.router.weight.normal_(std=shape.width**-0.5, generator=generator)
            self.expert_NK = self.router(self.x_ND).expert_NK
        with torch.device("meta"):
            self._block = MixtralSparseMoeBlock(self.config)  # type: ignore[no-untyped-call]
        self._block.gate.weight = self.router.weight
        self._block.experts = self.theirs

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*super().parameters, *self.router.parameters()]

    def _ours(self, backend: str) -> Run:
        dispatch = Dropless(backend=backend).build()  # type: ignore[arg-type]  # one of ours
        layer = MoE(self.router, self.bank, dispatch)

        def run(x_ND: Tensor, _: Tensor) -> Tensor:
            y_ND: Tensor = layer(x_ND).y
            return y_ND

        return run

    def _theirs(self, backend: str) -> Run:
        def run(x_ND: Tensor, _: Tensor) -> Tensor:
            self.config._experts_implementation = backend
            y_ND: Tensor = self._block(x_ND[None])[0]
            return y_ND

        return run

    def _peers(self) -> dict[str, Run]:
        return {}
