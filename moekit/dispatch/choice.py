"""Which backend runs a call: chosen by device, dtype and shape, unless the spec names one."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from moekit.dispatch.backend import Backend
from moekit.dispatch.few_rows import FEW, FewRows
from moekit.dispatch.grouped import Grouped
from moekit.dispatch.plan import Plan
from moekit.dispatch.streamed import Streamed
from moekit.experts.experts import FeedForward
from moekit.experts.groups import GroupedMM, PaddedGroups, RowGroups

BackendName = Literal["auto", "streamed", "few_rows", "grouped_mm", "loop"]

# Where on a CPU one backend overtakes another, measured: elements of an expert's first weight, and
# the same times its rows, which is a third of its multiply-adds for gated experts.
SMALL_EXPERT = 2**16
LITTLE_WORK = 2**21
LITTLE_WORK_IN_HALF = 2**26

logger = logging.getLogger(__name__)


class Choice:
    """Chooses a backend for each call, and logs each choice at level INFO the first time.

    Args:
        name: the backend to use; ``auto`` chooses.
    """

    def __init__(self, name: BackendName = "auto") -> None:
        self.name = name
        self._logged: set[str] = set()

    @property
    def groups(self) -> type[RowGroups]:
        """The products of a plan, for backends and banks that run all rows at once."""
        return RowGroups if self.name == "loop" else GroupedMM

    def backend(self, x_ND: Tensor, plan: Plan, bank: FeedForward) -> Backend | None:
        """The backend, or None where plain operations must serve.

        Those serve the loop, which is the oracle; tracing and compiling; padded rows; and tensors
        that are no plain ones (meta, fake, distributed).
        """
        if self.name == "loop" or torch.compiler.is_compiling():
            return None
        if isinstance(plan.groups, PaddedGroups) or not _plain(x_ND, bank):
            return None
        found = _fastest(x_ND, plan, bank) if self.name == "auto" else _BY_NAME[self.name]()
        self._log(found, x_ND)
        return found

    def _log(self, found: Backend, x_ND: Tensor) -> None:
        line = f"experts run through {found.name} ({x_ND.device.type}, {x_ND.dtype})"
        if line not in self._logged:
            self._logged.add(line)
            logger.info(line)


_BY_NAME: dict[str, type[Backend]] = {kind.name: kind for kind in (Streamed, FewRows, Grouped)}


def _fastest(x_ND: Tensor, plan: Plan, bank: FeedForward) -> Backend:
    """The backend for these sizes; looks at no number on the device."""
    if x_ND.device.type != "cpu":
        return Grouped()
    experts, inner, width = bank.up_EJD.shape
    rows = len(plan.assignment_R)
    rows_an_expert = rows / max(1, min(rows, experts))
    whole = x_ND.dtype in (torch.float32, torch.float64)
    if whole and rows_an_expert <= FEW and inner * width >= SMALL_EXPERT:
        return FewRows()
    little = LITTLE_WORK if whole else LITTLE_WORK_IN_HALF
    return Streamed() if rows_an_expert * inner * width >= little else Grouped()


def _plain(x_ND: Tensor, bank: FeedForward) -> bool:
    tensors = [t for t in (x_ND, *bank.tensors) if t is not None]
    kinds = (Tensor, torch.nn.Parameter)
    return not x_ND.is_meta and all(type(t) in kinds for t in tensors)
