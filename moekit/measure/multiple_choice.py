"""Multiple choice: which continuation of a context a language model finds likeliest.

Contexts and choices are split into tokens, cut to the model's window and scored as EleutherAI's
lm-evaluation-harness does it, so that numbers compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from moekit.data import ProgressHook
from moekit.errors import DataError


@dataclass(frozen=True)
class ChoiceItem:
    """A question.

    Attributes:
        context: what the model reads.
        choices: how it may go on; usually each begins with a space.
        answer: index of the right one.
    """

    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not all(choice.strip() for choice in self.choices):
            raise DataError(f"choices are {self.choices!r}; wanted at least two, none empty")
        if not 0 <= self.answer < len(self.choices):
            raise DataError(f"answer is {self.answer}; there are {len(self.choices)} choices")


@dataclass(frozen=True)
class ChoiceScores:
    """What a model made of some items.

    Attributes:
        items: the items.
        log_likelihoods: of each item's choices, in nats.
    """

    items: tuple[ChoiceItem, ...]
    log_likelihoods: tuple[tuple[float, ...], ...]

    @property
    def accuracy(self) -> float:
        """Share of items whose right choice is the likeliest (the harness's ``acc``)."""
        return self._share([_best(found) for found in self.log_likelihoods])

    @property
    def accuracy_normalized(self) -> float:
        """The same by log-likelihood a character of the choice (the harness's ``acc_norm``)."""
        chosen = [
            _best(
                [
                    score / len(text.lstrip())
                    for score, text in zip(found, item.choices, strict=True)
                ]
            )
            for item, found in zip(self.items, self.log_likelihoods, strict=True)
        ]
        return self._share(chosen)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, over items as a sample; NaN for a single one."""
        count, share = len(self.items), self.accuracy
        return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the single items."""
        return {
            "items": len(self.items),
            "accuracy": self.accuracy,
            "accuracy_normalized": self.accuracy_normalized,
            "standard_error": None if len(self.items) < 2 else self.standard_error,
        }

    def _share(self, chosen: Sequence[int]) -> float:
        right = [c == item.answer for c, item in zip(chosen, self.items, strict=True)]
        return sum(right) / len(right)


@torch.inference_mode()
def score_choices(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ChoiceItem],
    *,
    batch_size: int = 16,
    progress: ProgressHook | None = None,
) -> ChoiceScores:
    """The log-likelihood of every choice after its context.

    Contexts that do not fit into the model's window lose their beginning. Padding stands on the
    right, is masked and counts for nothing.

    Args:
        model: a causal language model of moekit or transformers; it is run in evaluation mode.
        tokenizer: its tokenizer.
        items: the items.
        batch_size: choices that are run together.
        progress: told of every batch.

    Raises:
        DataError: there is no item, or a choice has no token or more than the window.
    """
    if not items:
        raise DataError("there is no item to score; give at least one")
    window = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    pairs = [
        _encoded(tokenizer, item.context, choice, window)
        for item in items
        for choice in item.choices
    ]
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))  # little padding
    was_training, device = model.training, next(model.parameters()).device
    scores = [0.0] * len(pairs)
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found = _log_likelihoods(model, [pairs[i] for i in batch], device)
            for index, score in zip(batch, found, strict=True):
                scores[index] = score
            if progress is not None:
                progress("scoring choices", start + len(batch), len(order))
    finally:
        model.train(was_training)
    remaining = iter(scores)
    return ChoiceScores(
        tuple(items), tuple(tuple(next(remaining) for _ in item.choices) for item in items)
    )


def _encoded(
    tokenizer: PreTrainedTokenizerBase, context: str, choice: str, window: int | None
) -> tuple[list[int], int]:
    """The tokens of both, and how many of them are the choice's.

    White space at the end of the context belongs to the choice, and the choice's tokens are those
    that the whole has beyond the context's own.
    """
    kept = context.rstrip()
    choice = context[len(kept) :] + choice
    whole = tokenizer(kept + choice, add_special_tokens=False)["input_ids"]
    own = len(tokenizer(kept, add_special_tokens=False)["input_ids"]) if kept else 0
    count = len(whole) - own
    if not own:
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        if start is None:
            raise DataError("an item has no context, and the tokenizer no token to start from")
        whole = [start, *whole]
    if count < 1:
        raise DataError(f"the choice {choice!r} adds no token to its context")
    if window is not None and count >= window:
        raise DataError(
            f"the choice {choice[:40]!r}... has {count} tokens; the model's window has {window}"
        )
    # As many as the window predicts: the last token is a target only.
    return whole[-(window + 1) :] if window is not None else whole, count


def _log_likelihoods(
    model: nn.Module, pairs: Sequence[tuple[list[int], int]], device: torch.device
) -> list[float]:
    longest = max(len(ids) for ids, _ in pairs) - 1
    token_BT = torch.zeros(len(pairs), longest, dtype=torch.long)
    target_BT = torch.full_like(token_BT, -100)
    mask_BT = torch.zeros_like(token_BT)
    for row, (ids, count) in enumerate(pairs):
        end = len(ids) - 1
        token_BT[row, :end] = torch.tensor(ids[:-1])
        mask_BT[row, :end] = 1
        target_BT[row, end - count : end] = torch.tensor(ids[-count:])
    logits_BTV: Tensor = model(
        input_ids=token_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False
    ).logits
    nats_BT = F.cross_entropy(
        logits_BTV.float().flatten(0, 1), target_BT.to(device).flatten(), reduction="none"
    ).view_as(target_BT)
    return [-float(total) for total in nats_BT.sum(1)]


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda index: scores[index])
