"""One forward pass of a model, and what unlearning looks at in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.surgery.batch import Batch
from moekit.surgery.unlearn.anchor import watching
from moekit.surgery.unlearn.losses import mean_nats, token_nats
from moekit.surgery.unlearn.trained import Trained
from moekit.surgery.view import BlockView, block_views
from moekit.surgery.view_architectures import architecture_of


@dataclass(frozen=True)
class Seen:
    """What a forward pass showed.

    Attributes:
        nats_BT: nats of each predicted token; None for a pass that stops at a hidden state.
        batch: of what.
        hidden_ND: hidden states of the tokens that are learned, after the layer asked for.
        probabilities: of the watched routers (N, E), by the number of their block.
    """

    batch: Batch
    nats_BT: Tensor | None = None
    hidden_ND: Tensor | None = None
    probabilities: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def nats(self) -> Tensor:
        """Mean nats over the predicted tokens ()."""
        assert self.nats_BT is not None
        return mean_nats(self.nats_BT, self.batch.target_BT)

    @property
    def nats_B(self) -> Tensor:
        """Nats of each sequence, summed over its tokens."""
        assert self.nats_BT is not None
        return self.nats_BT.sum(1)


class Runner:
    """Runs a model on batches, as it is and as it was.

    Args:
        model: the model.
        trained: the part of it that is trained.
        watched: blocks whose routers' probabilities are wanted.
    """

    def __init__(
        self, model: PreTrainedModel, trained: Trained, watched: tuple[int, ...] = ()
    ) -> None:
        self.model = model
        self.trained = trained
        views = block_views(model)
        self._watched: dict[int, BlockView] = {block: views[block] for block in watched}

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        base: Any = self.model.base_model
        return len(base.layers)

    def __call__(self, batch: Batch, hidden_after: int | None = None) -> Seen:
        """The pass, with gradients.

        Args:
            batch: what to run on.
            hidden_after: number of a decoder layer, for a pass that shows hidden states after it
                in place of likelihoods.
        """
        with watching(self._watched) as probabilities:
            if hidden_after is None:
                output = self.model(batch.token_BT, attention_mask=batch.mask_BT, use_cache=False)
                nats_BT = token_nats(output.logits, batch.target_BT)
                return Seen(batch, nats_BT=nats_BT, probabilities=probabilities)
            with _after(self.model, hidden_after) as found:
                self.model.base_model(batch.token_BT, attention_mask=batch.mask_BT, use_cache=False)
            hidden_ND = found[0][batch.learned_BT]
            return Seen(batch, hidden_ND=hidden_ND, probabilities=probabilities)

    @torch.no_grad()
    def before(self, batch: Batch, hidden_after: int | None = None) -> Seen:
        """The same of the model before unlearning, without gradients."""
        with self.trained.as_before():
            return self(batch, hidden_after)


@contextmanager
def _after(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """The hidden states (B, T, D) after a decoder layer in the forward pass inside."""
    architecture, found = architecture_of(model.config), list[Tensor]()
    base: Any = model.base_model

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(architecture.handed_on(output, args)[0])

    handle = base.layers[layer].register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
