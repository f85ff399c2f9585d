"""Which experts a text engages most: the router's affinity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moekit.data import ProgressHook
from moekit.errors import CheckpointError, DataError, SpecError
from moekit.measure.observe import TokenBlocks
from moekit.surgery.batch import batch_of, require_tokens
from moekit.surgery.unlearn.anchor import router_probabilities
from moekit.surgery.view import BlockView, block_views


@torch.no_grad()
def attribute_experts(
    model: PreTrainedModel,
    data: TokenBlocks,
    *,
    tokens: int | None = 100_000,
    batch_size: int = 8,
    seed: int = 0,
    progress: ProgressHook | None = None,
) -> Tensor:
    """The affinity of every routed expert to a text (L, E), in float64.

    With s the router's probability and g = s where the router chose the expert, 0 elsewhere, a
    sequence has the mean of g over its tokens, and the text the mean over its sequences (UOE,
    attribution). So short sequences count as much as long ones. The router's own choices are
    taken, padding is left out, and shared experts, which no router chooses, have no score.

    Args:
        model: the model; its mode and weights are left as they were.
        data: the text, one sequence a block.
        tokens: take sequences in a random order until there are so many tokens; None for all.
        batch_size: sequences that run together.
        seed: of that order.
        progress: told how far it is.

    Returns:
        One row for each MoE block. Where blocks have fewer experts than others, −inf stands for
        those that they do not have.

    Raises:
        DataError: the text has no token.
        SpecError: the model has no MoE block, or is not supported; ``tokens`` or ``batch_size`` is
            less than 1.
        CheckpointError: probabilities are not finite.
    """
    require_tokens(data, "the text to attribute experts with")
    if batch_size < 1 or (tokens is not None and tokens < 1):
        raise SpecError(f"batch_size is {batch_size}, tokens {tokens}; wanted at least 1 of each")
    views = block_views(model)
    chosen = _sample(data, tokens, seed)
    was_training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    sums = [torch.zeros(view.experts, dtype=torch.float64) for view in views]
    try:
        with _affinities(views) as found_NE:
            for start in range(0, len(chosen), batch_size):
                batch = batch_of(data, chosen[start : start + batch_size], model.device)
                model.base_model(batch.token_BT, attention_mask=batch.mask_BT)
                for sum_E, affinity_NE in zip(sums, found_NE, strict=True):
                    sum_E += _mean_of_sequences(affinity_NE, batch.valid_BT).cpu()
                if progress is not None:
                    progress("attributing experts", start + len(batch.token_BT), len(chosen))
    finally:
        model.train(was_training)
    rows = [sum_E / len(chosen) for sum_E in sums]
    if not all(bool(row.isfinite().all()) for row in rows):
        raise CheckpointError("router probabilities are not finite; the weights are damaged")
    width = max(len(row) for row in rows)
    return torch.stack(
        [torch.cat([row, row.new_full((width - len(row),), -torch.inf)]) for row in rows]
    )


def select_experts(
    scores_LE: Tensor, m: int = 1, scope: Literal["global", "layer"] = "global"
) -> list[tuple[int, int]]:
    """The ``m`` experts with the highest scores, as (block, expert), the best first.

    Args:
        scores_LE: of :func:`attribute_experts`.
        m: how many.
        scope: ``global`` takes them from all blocks, ``layer`` from the block of the best one.

    Raises:
        SpecError: ``m`` is less than 1 or more than there are, or a score is NaN.
    """
    if bool(scores_LE.isnan().any()):
        raise SpecError("a score is NaN; experts cannot be ranked")
    if scope not in ("global", "layer"):
        raise SpecError(f"scope is {scope!r}; wanted global or layer")
    scores_LE = scores_LE.cpu()
    experts = scores_LE.shape[1]
    if scope == "layer":
        best = int(scores_LE.flatten().argmax()) // experts
        outside_L = torch.arange(len(scores_LE)) != best
        scores_LE = scores_LE.masked_fill(outside_L[:, None], -torch.inf)
    there = int((scores_LE > -torch.inf).sum())
    if not 1 <= m <= there:
        raise SpecError(f"{m} experts cannot be selected; wanted 1 to {there}, the routed experts")
    order = scores_LE.flatten().argsort(descending=True, stable=True)[:m].tolist()
    return [(index // experts, index % experts) for index in order]


def require_scores(scores_LE: Tensor, views: Sequence[BlockView]) -> None:
    """Refuse scores that are not those of a model's experts.

    Raises:
        SpecError: they have another shape.
    """
    wanted = (len(views), max(view.experts for view in views))
    if tuple(scores_LE.shape) != wanted:
        raise SpecError(
            f"scores_LE has shape {tuple(scores_LE.shape)}; wanted {wanted}, a row for each MoE "
            "block, as attribute_experts gives"
        )


def _sample(data: TokenBlocks, tokens: int | None, seed: int) -> list[int]:
    """Sequences with a token, in a random order, until there are enough tokens."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, count = list[int](), 0
    for index in order:
        block = data[index]
        mask = block.get("attention_mask")
        valid = block["input_ids"].numel() if mask is None else int(mask.bool().sum())
        if valid:
            chosen.append(index)
            count += valid
        if tokens is not None and count >= tokens:
            break
    if not chosen:
        raise DataError("the text to attribute experts with holds nothing but padding")
    return chosen


def _mean_of_sequences(affinity_NE: Tensor, valid_BT: Tensor) -> Tensor:
    """Sum over sequences of the mean over their tokens (E,)."""
    affinity_BTE = affinity_NE.double().view(*valid_BT.shape, -1)
    sum_BE = (affinity_BTE * valid_BT[..., None]).sum(1)
    return (sum_BE / valid_BT.sum(1, keepdim=True)).sum(0)


@contextmanager
def _affinities(views: Sequence[BlockView]) -> Iterator[list[Tensor]]:
    """The probability of each chosen expert (N, E) in the forward pass inside, block by block."""
    found = [torch.empty(0)] * len(views)

    def hook_of(place: int, view: BlockView) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            probability_NE = router_probabilities(view, args[0].flatten(0, -2))
            routing = view.architecture.read(view.name, output)
            index_NK = torch.where(routing.used_NK, routing.expert_NK, view.experts)
            chosen_NE = torch.zeros(len(index_NK), view.experts + 1, device=index_NK.device)
            chosen_NE.scatter_(1, index_NK, 1.0)
            found[place] = probability_NE * chosen_NE[:, :-1]

        return hook

    handles = [
        view.architecture.router_module(view.block).register_forward_hook(hook_of(place, view))
        for place, view in enumerate(views)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
