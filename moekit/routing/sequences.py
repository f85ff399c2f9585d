"""What a router may know of the sequences that its rows form: who sees whom, and attention.

More shape suffixes: A attention heads, G key-value heads, C channels of a head, P tokens that can
be seen, which are those kept of earlier calls and then the T rows of this one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.autocast import without_autocast
from moekit.errors import SignalError


class Memory(Protocol):
    """Keeps rows of earlier calls, as a KV cache does; whose it is also reorders and crops it."""

    def extend(self, value_BTE: Tensor, key_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Keep rows, and return all that are kept now, (B, P, E) and (B, P, C)."""


@dataclass(frozen=True)
class View:
    """Who sees whom in one call of a router.

    Attributes:
        visible_BTP: True where row t may look at token p; B is 1 where all sequences agree. None
            is the order of reading: row t sees tokens 0 to t, and a row that comes alone sees all
            that is kept. A row that may look at nothing stands here with everything open, so that
            a softmax over it is finite.
        alone_BT1: True for those rows, and for padding; None for no such row.
    """

    visible_BTP: Tensor | None
    alone_BT1: Tensor | None

    def own_where_alone(self, mixed_BTC: Tensor, own_BTC: Tensor) -> Tensor:
        """``mixed``, and ``own`` for the rows that see no token."""
        if self.alone_BT1 is None:
            return mixed_BTC
        return torch.where(self.alone_BT1, own_BTC, mixed_BTC)


@dataclass(frozen=True)
class Sequences:
    """How the rows of a layer stand in sequences, and which tokens each of them may look at.

    Attributes:
        count: number of sequences B; the N rows are the flattened (B, T).
        visible_BTP: which tokens each row may look at, as in :class:`View`; None for the order of
            reading, in which no row sees a later one.
        memory: what is kept of earlier tokens; None keeps nothing, so that P = T.

    Example:
        >>> from moekit import SimilarityAware, Signals, SwiGLU, MoESpec
        >>> layer = MoESpec(SimilarityAware(), SwiGLU(count=4, hidden=16)).build(width=8)
        >>> layer(torch.randn(3, 5, 8), Signals(sequences=Sequences(count=3))).y.shape
        torch.Size([3, 5, 8])
    """

    count: int
    visible_BTP: Tensor | None = None
    memory: Memory | None = None

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to(self, device: torch.device | str | int) -> Self:
        """The same on ``device``; memory is shared, and keeps rows on the device they come from."""
        visible = self.visible_BTP
        return self.replace(visible_BTP=None if visible is None else visible.to(device))

    def split(self, value_N: Tensor) -> Tensor:
        """Rows (N, ...) as sequences (B, T, ...)."""
        return value_N.unflatten(0, (self.count, -1))

    def check(self, rows: int) -> None:
        """Refuse a number of rows that these sequences cannot have.

        Raises:
            SignalError: it does not divide evenly, or the shape of ``visible_BTP`` does not fit.
        """
        length, rest = divmod(rows, self.count) if self.count > 0 else (0, rows)
        if rest:
            raise SignalError(
                f"signal sequences has {self.count} sequences, which {rows} rows cannot form; "
                "wanted the flattened rows of (B, T, D) with count=B"
            )
        if self.visible_BTP is not None:
            self._check_visible(self.visible_BTP, length)

    def _check_visible(self, visible_BTP: Tensor, length: int) -> None:
        wanted = f"({self.count} or 1, {length}, {'P' if self.memory else length}) of torch.bool"
        shape = tuple(visible_BTP.shape)
        fits = (
            len(shape) == 3
            and shape[0] in (1, self.count)
            and shape[1] == length
            and (self.memory is not None or shape[2] == length)
            and visible_BTP.dtype == torch.bool
        )
        if not fits:
            raise SignalError(
                f"signal sequences: visible_BTP is {shape} of {visible_BTP.dtype}; wanted {wanted}"
            )

    def remember(self, value_BTE: Tensor, key_BTC: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of this call behind those of earlier ones, (B, P, E) and (B, P, C)."""
        if self.memory is None:
            return value_BTE, key_BTC
        return self.memory.extend(value_BTE, key_BTC)

    def view(self, valid_N: Tensor | None) -> View:
        """Who sees whom, with no one looking at padding.

        Args:
            valid_N: False for padding among the rows of this call. That of earlier calls, once
                something is kept, must be left out of ``visible_BTP`` by who keeps it.
        """
        visible_BTP, alone_BT1 = self.visible_BTP, None
        if valid_N is not None:
            valid_BT = self.split(valid_N)
            alone_BT1 = ~valid_BT[..., None]
            if self.memory is None:
                order = _order_of_reading(valid_BT) if visible_BTP is None else visible_BTP
                visible_BTP = order & valid_BT[:, None]
        if visible_BTP is None:
            return View(None, alone_BT1)
        blind_BT1 = ~visible_BTP.any(-1, keepdim=True)
        alone_BT1 = blind_BT1 if alone_BT1 is None else alone_BT1 | blind_BT1
        return View(visible_BTP | blind_BT1, alone_BT1)


def _order_of_reading(valid_BT: Tensor) -> Tensor:
    length = valid_BT.shape[1]
    return torch.ones(1, length, length, dtype=torch.bool, device=valid_BT.device).tril()


@dataclass(frozen=True)
class Attention:
    """Attention of a layer's rows over the tokens of their own sequences, as a signal."""

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str | int) -> Self:
        """The same on ``device``."""
        return self.replace(**{k: v.to(device) for k, v in self._tensors().items()})

    def detach(self) -> Self:
        """The same without gradient."""
        return self.replace(**{k: v.detach() for k, v in self._tensors().items()})

    def average(self, value_BPE: Tensor, view: View) -> Tensor:
        """What each row sees of ``value``: weights times values, mean over heads (B, T, E)."""
        raise NotImplementedError

    def weights(self, view: View) -> Tensor:
        """The weights themselves (B, A, T, P), of which each row sums to 1."""
        raise NotImplementedError

    def check(self, sequences: int, length: int, seen: int) -> None:
        """Refuse shapes that do not fit B ``sequences`` of T rows over P tokens.

        Raises:
            SignalError: names the shapes that were given and those that are wanted.
        """
        raise NotImplementedError

    def check_values(self, view: View) -> None:
        """Refuse weights that are none. Waits for the device.

        Raises:
            SignalError: a row that is no padding does not sum to 1 within 1e-3.
        """

    def _tensors(self) -> dict[str, Tensor]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class DotProductAttention(Attention):
    """Attention by its factors, ``softmax(scale · q kᵀ)``.

    ``average`` runs torch's fused kernels, which never form the (T, P) matrix of weights where the
    device has one for the sizes.

    Attributes:
        query_BATC: queries.
        key_BGPC: keys, each head of which serves A / G heads of queries.
        scale: factor on the scores.
    """

    query_BATC: Tensor
    key_BGPC: Tensor
    scale: float

    def average(self, value_BPE: Tensor, view: View) -> Tensor:
        dtype = _at_least_float32(value_BPE)
        query, key = self._heads(dtype)
        value = value_BPE.to(dtype)[:, None].expand(-1, query.shape[1], -1, -1)
        visible = None if view.visible_BTP is None else view.visible_BTP[:, None]
        with without_autocast(query):
            mixed_BATE = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=visible,
                is_causal=visible is None and query.shape[2] > 1,
                scale=self.scale,
            )
        return mixed_BATE.mean(1)

    def weights(self, view: View) -> Tensor:
        query, key = self._heads(_at_least_float32(self.query_BATC))
        with without_autocast(query):
            score_BATP = self.scale * query @ key.transpose(2, 3)
        hidden = _hidden(score_BATP, view)
        return score_BATP.masked_fill(hidden, float("-inf")).softmax(-1)

    def check(self, sequences: int, length: int, seen: int) -> None:
        query, key = self.query_BATC, self.key_BGPC
        fits = (
            query.dim() == key.dim() == 4
            and query.shape[0] == key.shape[0] == sequences
            and (query.shape[2], key.shape[2]) == (length, seen)
            and query.shape[3] == key.shape[3]
            and query.shape[1] % max(key.shape[1], 1) == 0
        )
        if not fits:
            raise SignalError(
                f"signal attention has queries {tuple(query.shape)} and keys {tuple(key.shape)}; "
                f"wanted (B, heads, T, C) and (B, heads, P, C) with B, T, P = "
                f"{sequences}, {length}, {seen}"
            )

    def _heads(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries and keys with equally many heads."""
        query, key = self.query_BATC.to(dtype), self.key_BGPC.to(dtype)
        return query, key.repeat_interleave(query.shape[1] // max(key.shape[1], 1), dim=1)


def _hidden(score_BATP: Tensor, view: View) -> Tensor:
    if view.visible_BTP is not None:
        return ~view.visible_BTP[:, None]
    everything = torch.ones(score_BATP.shape[-2:], dtype=torch.bool, device=score_BATP.device)
    return everything.triu(1) if len(everything) > 1 else ~everything


@dataclass(frozen=True)
class AttentionWeights(Attention):
    """Attention by its weights, after the softmax and before dropout.

    The weights themselves say who sees whom, so that nothing is masked here.

    Attributes:
        weight_BATP: the weights; each row that is no padding sums to 1.
    """

    weight_BATP: Tensor

    def average(self, value_BPE: Tensor, view: View) -> Tensor:
        dtype = _at_least_float32(value_BPE)
        with without_autocast(value_BPE):
            return self.weights(view).to(dtype).mean(1) @ value_BPE.to(dtype)

    def weights(self, view: View) -> Tensor:
        if view.alone_BT1 is None:
            return self.weight_BATP
        return self.weight_BATP.masked_fill(view.alone_BT1[:, None], 0.0)  # it may hold NaN there

    def check(self, sequences: int, length: int, seen: int) -> None:
        shape, wanted = tuple(self.weight_BATP.shape), (sequences, length, seen)
        if len(shape) != 4 or (shape[0], *shape[2:]) != wanted:
            raise SignalError(
                f"signal attention has weights {shape}; wanted (B, heads, T, P) with B, T, P = "
                f"{sequences}, {length}, {seen}"
            )

    def check_values(self, view: View) -> None:
        alone = view.alone_BT1
        error_BAT = (self.weight_BATP.sum(-1) - 1).abs()
        if alone is not None:
            error_BAT = error_BAT.masked_fill(alone[..., 0][:, None], 0.0)
        if not bool((error_BAT <= 1e-3).all()):
            raise SignalError(
                "signal attention has weights whose rows do not sum to 1; wanted those after the "
                "softmax and before dropout"
            )


def _at_least_float32(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
