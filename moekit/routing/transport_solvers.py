"""Ascent on concave functions, many at once: Adam, and BFGS for functions with kinks.

Every leading dimension is a function of its own, and solving a batch equals solving each alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]

RISE, CURVATURE = 1e-4, 0.9  # of the weak Wolfe conditions
SEARCHES = 40  # evaluations of one line search
PATIENCE = 10  # steps without a rise that rounding could not explain


def adam_ascent(
    gradient: Gradient,
    start_D: Tensor,
    iterations: int,
    learning_rate: float,
    tolerance: float | None = None,
) -> tuple[Tensor, int]:
    """The point (..., D) after Adam steps up the gradient, and their number.

    Args:
        tolerance: stop where no entry of the gradient is larger; None never looks, so that nothing
            is read back from the device.
    """
    x_D, mean_D, square_D = start_D, torch.zeros_like(start_D), torch.zeros_like(start_D)
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    for step in range(1, iterations + 1):
        g_D = gradient(x_D)
        if tolerance is not None and bool((g_D.abs() <= tolerance).all()):
            return x_D, step - 1
        mean_D = beta1 * mean_D + (1 - beta1) * g_D
        square_D = beta2 * square_D + (1 - beta2) * g_D.square()
        size_D = (square_D / (1 - beta2**step)).sqrt() + eps
        x_D = x_D + (learning_rate / (1 - beta1**step)) * mean_D / size_D
    return x_D, iterations


class _Point(NamedTuple):
    """A place (..., D), its value (..., 1) and its gradient (..., D)."""

    x_D: Tensor
    value: Tensor
    gradient_D: Tensor

    @classmethod
    def at(cls, objective: Objective, x_D: Tensor) -> _Point:
        value, gradient_D = objective(x_D)
        return cls(x_D, value[..., None], gradient_D)

    def where(self, mask: Tensor, other: _Point) -> _Point:
        """This point where ``mask`` (..., 1) holds, else the other."""
        return _Point(*(torch.where(mask, a, b) for a, b in zip(self, other, strict=True)))


def bfgs_ascent(
    objective: Objective, start_D: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, int]:
    """The point (..., D) that BFGS climbs to, and the steps taken.

    Dual functions under a sparsity constraint have kinks, and often their maximum is one. BFGS with
    its whole history and a line search for the weak Wolfe conditions finds such a maximum (Lewis
    and Overton, "Nonsmooth optimization via quasi-Newton methods", 2013), where one with a short
    history, or one that asks for the strong conditions, stops early. It keeps a matrix (D, D) for
    each function and reads back from the device at every step.

    A function is done where no entry of its gradient is larger than ``tolerance``, or where it
    rises no further.
    """
    point = _Point.at(objective, start_D)
    top, idle = point.value, torch.zeros_like(point.value)
    identity_DD = torch.eye(start_D.shape[-1], dtype=start_D.dtype, device=start_D.device)
    inverse_DD = identity_DD.expand(*start_D.shape, -1)
    fresh = torch.ones_like(point.value, dtype=torch.bool)
    moving = _steep(point, tolerance)
    for step in range(iterations):
        if not bool(moving.any()):
            return point.x_D, step
        direction_D = _uphill(inverse_DD, point.gradient_D).masked_fill(~moving, 0.0)
        reached, rose = _line_search(objective, point, direction_D, moving)
        inverse_DD = _updated(inverse_DD, point, reached, fresh, rose)
        inverse_DD = torch.where((rose | ~moving)[..., None], inverse_DD, identity_DD)
        higher = reached.value > top + _rounding(top)
        top, idle = torch.where(higher, reached.value, top), torch.where(higher, 0, idle + 1)
        moving = moving & (rose | ~fresh) & (idle < PATIENCE) & _steep(reached, tolerance)
        point, fresh = reached, ~rose
    return point.x_D, iterations


def _dot(left_D: Tensor, right_D: Tensor) -> Tensor:
    return (left_D * right_D).sum(-1, keepdim=True)


def _rounding(value: Tensor) -> Tensor:
    """What rounding alone may change in a value."""
    return 4 * torch.finfo(value.dtype).eps * value.abs()


def _steep(point: _Point, tolerance: float) -> Tensor:
    return point.gradient_D.abs().amax(-1, keepdim=True) > tolerance


def _uphill(inverse_DD: Tensor, gradient_D: Tensor) -> Tensor:
    """The quasi-Newton direction, or the gradient where rounding made it point down."""
    direction_D = (inverse_DD @ gradient_D[..., None])[..., 0]
    return torch.where(_dot(direction_D, gradient_D) > 0, direction_D, gradient_D)


def _line_search(
    objective: Objective, start: _Point, direction_D: Tensor, moving: Tensor
) -> tuple[_Point, Tensor]:
    """A point that satisfies the weak Wolfe conditions, found by doubling and halving.

    Returns the best point with a sufficient rise, or the start, and which functions rose (..., 1).
    """
    slope, floor = _dot(start.gradient_D, direction_D), start.value - _rounding(start.value)
    length, low = torch.ones_like(slope), torch.zeros_like(slope)
    high = torch.full_like(slope, float("inf"))
    best, rose, open_ = start, torch.zeros_like(moving), moving
    for _ in range(SEARCHES):
        found = _Point.at(objective, start.x_D + length * direction_D)
        end = _dot(found.gradient_D, direction_D)
        # Below rounding the slopes tell what the values cannot (Hager and Zhang 2005).
        flat = (end >= (2 * RISE - 1) * slope) & (found.value >= floor)
        higher = found.value >= start.value + RISE * length * slope
        risen = higher | flat
        best, rose = found.where(open_ & risen, best), rose | (open_ & risen)
        enough = risen & ((end <= CURVATURE * slope) | ~higher)
        low = torch.where(open_ & risen, length, low)
        high = torch.where(open_ & ~risen, length, high)
        open_ = open_ & ~enough
        if not bool(open_.any()):
            break
        longer = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        length = torch.where(open_, longer, length)
    return best, rose


def _updated(inverse_DD: Tensor, start: _Point, end: _Point, fresh: Tensor, rose: Tensor) -> Tensor:
    """The BFGS update of the inverse Hessian of the negated function.

    A fresh identity is scaled to the curvature of its first step.
    """
    step_D, change_D = end.x_D - start.x_D, start.gradient_D - end.gradient_D
    curvature, norm = _dot(step_D, change_D), _dot(change_D, change_D)
    usable = rose & (curvature > torch.finfo(norm.dtype).eps * norm) & (norm > 0)
    scale = torch.where(usable & fresh, curvature / norm, 1.0)
    scaled_DD = scale[..., None] * inverse_DD
    rho = torch.where(usable, 1 / curvature, 0.0)
    image_D = (scaled_DD @ change_D[..., None])[..., 0]
    cross_DD = step_D[..., :, None] * image_D[..., None, :]
    outer_DD = step_D[..., :, None] * step_D[..., None, :]
    bend = rho * (1 + rho * _dot(change_D, image_D))
    return scaled_DD - rho[..., None] * (cross_DD + cross_DD.mT) + bend[..., None] * outer_DD
