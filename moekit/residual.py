"""Residual rules: how a layer's output is added to the hidden state, from layer to layer.

A stack of residual MoE layers, ``x <- x + y``, reads as gradient descent over depth: ``-y`` is the
gradient at ``x``. These rules put a method with momentum in its place (Teo and Nguyen,
"MomentumSMoE: Integrating Momentum into Sparse Mixture of Experts", arXiv 2410.14574).

A rule's state is one or more tensors of the hidden state's shape. It travels in
:attr:`moekit.Carry.momentum`: empty, which stands for zero, at the first MoE layer of a forward
pass, and handed from each MoE layer to the next. Dense layers hand it on as it is. Nothing in it
is detached, and no module keeps it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from moekit.errors import SignalError
from moekit.spec import Spec

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class ResidualSpec(Spec):
    """Base of the residual rules.

    A block calls ``look_ahead`` for the point at which to run its MoE layer, and then ``increment``
    with the layer's output ``y``::

        y = moe(norm(rule.look_ahead(x, state)))
        delta, state = rule.increment(x, y, state)
        x = x + delta
    """

    abstract: ClassVar[bool] = True
    tensors: ClassVar[int]
    """Number of tensors in the state."""

    def look_ahead(self, x: Tensor, state: State) -> Tensor:
        """Where router and experts are evaluated: at the hidden state ``x`` (..., D) itself.

        Raises:
            SignalError: the state is not one of this rule for hidden states like ``x``.
        """
        return x

    @abstractmethod
    def increment(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        """What to add to ``x`` (..., D), and the state for the next MoE layer.

        Args:
            x: the hidden state, not the look-ahead point.
            y: output of the MoE layer at the look-ahead point.
            state: what the MoE layer below handed on; empty at the first one.

        Raises:
            SignalError: the state is not one of this rule for hidden states like ``x``.
        """

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Type of the state for hidden states of ``dtype``."""
        return dtype

    def checked(self, x: Tensor, state: State) -> State:
        """The state, zeros if it is empty.

        Raises:
            SignalError: the state is not one of this rule for hidden states like ``x``.
        """
        dtype = self.state_dtype(x.dtype)
        if not state:
            return tuple(torch.zeros_like(x, dtype=dtype) for _ in range(self.tensors))
        name = type(self).__name__
        if len(state) != self.tensors:
            raise SignalError(
                f"{name} was handed {len(state)} state tensors and keeps {self.tensors}; "
                "use one rule in all layers of a stack"
            )
        for tensor in state:
            if (tensor.shape, tensor.dtype, tensor.device) != (x.shape, dtype, x.device):
                raise SignalError(
                    f"{name} was handed a state {_described(tensor)} for hidden states "
                    f"{_described(x)}; wanted the same shape and device, in {dtype}, or no state "
                    "at the first MoE layer"
                )
        return state


@dataclass(frozen=True)
class Plain(ResidualSpec):
    """The usual residual, ``x + y``. A state from other layers passes through."""

    tensors: ClassVar[int] = 0

    def increment(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        return y, state


@dataclass(frozen=True)
class HeavyBall(ResidualSpec):
    """Heavy-ball momentum: ``p <- mu p + y``, ``x <- x + gamma p`` (MomentumSMoE).

    The released code subtracts; that is the same class of functions, with the sign in the experts'
    output weights.

    Attributes:
        mu: momentum, -1 < mu < 1; 0 with ``gamma=1`` is the plain residual, bit for bit.
        gamma: step size, more than 0.

    Example:
        >>> rule = HeavyBall(mu=0.5)
        >>> x, y = torch.zeros(1, 2), torch.ones(1, 2)
        >>> first, state = rule.increment(x, y, ())
        >>> second, state = rule.increment(x + first, y, state)
        >>> second
        tensor([[1.5000, 1.5000]])
    """

    tensors: ClassVar[int] = 1

    mu: float = 0.7
    gamma: float = 1.0

    def check(self) -> None:
        _check_momentum(self, self.mu, self.gamma)

    def increment(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        (p,) = self.checked(x, state)
        p = self.mu * p + y.to(p.dtype)
        return self.gamma * p, (p,)

    def spectral_radius(self, curvature: float) -> float:
        """Growth a layer, in the limit of depth, of a stack whose experts are ``y = -curvature x``.

        Below 1 the stack contracts: for ``0 < gamma curvature < 2 (1 + mu)``, where the plain
        residual needs ``curvature < 2``.
        """
        step = self.gamma * curvature
        matrix = np.array([[1 - step, self.gamma * self.mu], [-curvature, self.mu]])
        return float(abs(np.linalg.eigvals(matrix)).max())


@dataclass(frozen=True)
class AdamMomentum(ResidualSpec):
    """AdamW over depth, without bias correction (AdamSMoE, as the paper's equations say)::

        p <- beta1 p + (1 - beta1) y
        v <- beta2 v + (1 - beta2) y²
        x <- (1 - decay) x + gamma p / sqrt(v + eps)

    Every layer is an Adam step. The released recipe is another one: :class:`AdamFirst`. The
    state is held in at least single precision, where ``eps`` is not lost.

    Attributes:
        beta1, beta2: decay of the two means, in [0, 1).
        eps: added to the second mean, inside the root.
        gamma: step size, more than 0.
        decay: decoupled decay of the hidden state, in [0, 1].
    """

    tensors: ClassVar[int] = 2

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    gamma: float = 1.0
    decay: float = 0.0

    def check(self) -> None:
        _check_adam(self, self.beta1, self.beta2, self.eps, self.decay)
        _check_step(self, "gamma", self.gamma)

    def state_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32)

    def increment(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        p, v = self.checked(x, state)
        y = y.to(p.dtype)
        p = self.beta1 * p + (1 - self.beta1) * y
        v = self.beta2 * v + (1 - self.beta2) * y.square()
        step = self.gamma * p / (v + self.eps).sqrt() - self.decay * x
        return step.to(x.dtype), (p, v)


@dataclass(frozen=True)
class AdamFirst(ResidualSpec):
    """The recipe released as AdamSMoE: an Adam step in the first MoE layer, heavy ball above it.

    The first layer's Adam starts from zero and is never continued, so that layer adds
    ``adam_gamma (1 - beta1) y / sqrt((1 - beta2) y² + eps)``, nearly ``3.16 sign(y)`` for the
    default values. The heavy-ball state collects ``y`` in that layer too.

    Attributes:
        mu, gamma: of the heavy ball.
        beta1, beta2, eps, decay: of the Adam step, as in :class:`AdamMomentum`. The released
            code's decay of 1 goes with a second residual around the layer, which this project's
            pre-norm blocks do not have; 0 keeps the hidden state as that residual does.
        adam_gamma: step size of the Adam step; 1.0 and 0.8 in the released scripts.
    """

    tensors: ClassVar[int] = 1

    mu: float = 0.7
    gamma: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    adam_gamma: float = 1.0
    decay: float = 0.0

    def check(self) -> None:
        _check_momentum(self, self.mu, self.gamma)
        _check_adam(self, self.beta1, self.beta2, self.eps, self.decay)
        _check_step(self, "adam_gamma", self.adam_gamma)

    def increment(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        heavy, after = HeavyBall(self.mu, self.gamma).increment(x, y, state)
        if state:
            return heavy, after
        adam = AdamMomentum(self.beta1, self.beta2, self.eps, self.adam_gamma, self.decay)
        return adam.increment(x, y, ())[0], after


@dataclass(frozen=True)
class RobustMomentum(ResidualSpec):
    """The robust momentum method (Cyrus, Hu, Van Scoy and Lessard, 2018; Robust MomentumSMoE)::

        z = x + look step p              router and experts see z
        p <- momentum p + moe(norm(z))
        x <- x + step p

    The released vision code adds the look-ahead after the norm instead; here it is a point of the
    hidden states, where the method has it.

    Attributes:
        rho: rate, ``1 - 1 / sqrt(kappa) < rho < 1``; smaller is faster and less robust.
        kappa: condition number, more than 1.
        L: largest curvature, more than 0.
    """

    tensors: ClassVar[int] = 1

    rho: float = 0.2
    kappa: float = 1.25
    L: float = 1.0

    def check(self) -> None:
        self.require(0 < self.rho < 1, f"rho is {self.rho}; wanted more than 0 and less than 1")
        self.require(
            1 < self.kappa < math.inf, f"kappa is {self.kappa}; wanted a number more than 1"
        )
        _check_step(self, "L", self.L)
        least = 1 - 1 / math.sqrt(self.kappa)
        self.require(
            self.rho > least,
            f"rho is {self.rho}; a condition number of {self.kappa} needs more than {least:.4g}",
        )

    @property
    def step(self) -> float:
        """Step size ``kappa (1 - rho)² (1 + rho) / L``."""
        return self.kappa * (1 - self.rho) ** 2 * (1 + self.rho) / self.L

    @property
    def momentum(self) -> float:
        """Momentum ``kappa rho³ / (kappa - 1)``."""
        return self.kappa * self.rho**3 / (self.kappa - 1)

    @property
    def look(self) -> float:
        """Distance of the look-ahead in steps, ``rho³ / ((kappa - 1) (1 - rho)² (1 + rho))``."""
        return self.rho**3 / ((self.kappa - 1) * (1 - self.rho) ** 2 * (1 + self.rho))

    def look_ahead(self, x: Tensor, state: State) -> Tensor:
        (p,) = self.checked(x, state)
        return x + self.look * self.step * p

    def increment(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        (p,) = self.checked(x, state)
        p = self.momentum * p + y.to(p.dtype)
        return self.step * p, (p,)


def check_stack(rules: tuple[ResidualSpec, ...]) -> None:
    """Refuse a stack whose layers would hand on a state that others cannot take up.

    Numbers may differ from layer to layer, and plain layers may lie between.

    Raises:
        SpecError: two kinds of rule with a state are in one stack.
    """
    kept = [rule for rule in rules if not isinstance(rule, Plain)]
    for rule in kept[1:]:
        rule.require(
            type(rule) is type(kept[0]),
            f"the stack also has {type(kept[0]).__name__}, whose momentum is another one; use one "
            "kind of rule in all MoE layers, or Plain",
        )


def _check_momentum(spec: ResidualSpec, mu: float, gamma: float) -> None:
    spec.require(-1 < mu < 1, f"mu is {mu}; wanted more than -1 and less than 1")
    _check_step(spec, "gamma", gamma)


def _check_step(spec: ResidualSpec, name: str, value: float) -> None:
    spec.require(0 < value < math.inf, f"{name} is {value}; wanted a number more than 0")


def _check_adam(spec: ResidualSpec, beta1: float, beta2: float, eps: float, decay: float) -> None:
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        spec.require(0 <= value < 1, f"{name} is {value}; wanted at least 0 and less than 1")
    _check_step(spec, "eps", eps)
    spec.require(0 <= decay <= 1, f"decay is {decay}; wanted 0 to 1")


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype} on {x.device}"
