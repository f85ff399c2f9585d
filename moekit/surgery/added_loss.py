"""A loss of ours in that which a model of transformers returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor


def with_loss_added(
    output: Any,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Tensor | None], Tensor],
) -> Any:
    """What a call returned, with a loss added to its own; as it was where it has none.

    Args:
        output: of the call, as an object or a tuple.
        forward: what was called, with named parameters.
        args, kwargs: what it was called with.
        loss: given the call's attention mask (B, T), or None, the loss to add.
    """
    given = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    if given.get("labels") is None:
        return output
    mask = given.get("attention_mask")
    more = loss(mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)
    if isinstance(output, tuple):
        return (output[0] + more.to(output[0].dtype), *output[1:])
    output.loss = output.loss + more.to(output.loss.dtype)
    return output
