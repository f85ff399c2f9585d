"""Which backend runs a call: chosen by device, dtype and shape, unless the spec names one."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from moekit.autocast import autocast_dtype
from moekit.dispatch.backend import Backend
from moekit.dispatch.few_rows import FEW, FewRows
from moekit.dispatch.grouped import Grouped
from moekit.dispatch.native_backend import Native
from moekit.dispatch.native_decode import MOST_ROWS, decoded
from moekit.dispatch.native_grouped import NativeGrouped
from moekit.dispatch.native_library import library
from moekit.dispatch.plan import Plan
from moekit.dispatch.streamed import Streamed
from moekit.errors import SpecError
from moekit.experts.experts import FeedForward
from moekit.experts.groups import GroupedMM, PaddedGroups, RowGroups
from moekit.routing.routing import Routing
from moekit.watched import watched

BackendName = Literal["auto", "native", "streamed", "few_rows", "grouped_mm", "triton", "loop"]

# Where on a CPU one backend overtakes another, measured. Our own kernels are ahead at any size in
# float32, and in bfloat16 where they multiply in pairs, or where torch multiplies it element by
# element; where neither, up to so many rows an expert, fewer where a backward pass follows.
NATIVE_IN_HALF = 128
NATIVE_IN_HALF_TRAINING = 32
# Experts that they run one product after the other keep all rows between these in memory: up to so
# many rows an expert, on a CPU with AVX2 alone, without and with a backward pass, and on others,
# not measured, where little but reading weights counts.
GROUPED, GROUPED_TRAINING, GROUPED_ELSEWHERE = 64, 256, 32
# Elsewhere: elements of an expert's first weight, and the same times its rows, which is a third of
# its multiply-adds for gated experts.
SMALL_EXPERT = 2**16
LITTLE_WORK = 2**21
LITTLE_WORK_IN_HALF = 2**26

# Tensors that have their numbers where they say.
PLAIN = {Tensor, torch.nn.Parameter, type(None)}

_BY_NAME: dict[str, type[Backend]] = {kind.name: kind for kind in (Streamed, FewRows, Grouped)}

logger = logging.getLogger(__name__)


class Choice:
    """Chooses a backend for each call, and logs each choice at level INFO the first time.

    Args:
        name: the backend to use; ``auto`` chooses.
    """

    def __init__(self, name: BackendName = "auto") -> None:
        self.name = name
        self._logged: set[tuple[str, str, torch.dtype]] = set()

    @property
    def groups(self) -> type[RowGroups]:
        """The products of a plan, for backends and banks that run all rows at once."""
        return RowGroups if self.name == "loop" else GroupedMM

    def backend(self, x_ND: Tensor, plan: Plan, bank: FeedForward) -> Backend | None:
        """The backend, or None where plain operations must serve.

        Those serve the loop, which is the oracle; tracing, compiling and transforms of torch.func;
        modes that look at every operation, such as counters of FLOPs; padded rows; and tensors that
        are no plain ones (meta, fake, distributed), or not in one place, which those refuse. What
        counts is the dtype that autocast gives the operands.
        """
        plain = self.name != "loop" and _plain(x_ND, *bank.tensors)
        together = x_ND.device == bank.up_EJD.device == bank.down_EOH.device
        if not (plain and together) or isinstance(plan.groups, PaddedGroups):
            return None
        dtype = autocast_dtype(x_ND)
        found = self._find(x_ND, plan, bank, dtype)
        self._log(found, x_ND, dtype)
        return found

    def decodes(self, x_ND: Tensor, routing: Routing) -> bool:
        """Whether these tokens are so few that :meth:`decoded` is worth asking."""
        return (
            self.name in ("auto", "native")
            and routing.full
            and 0 < routing.expert_NK.numel() <= MOST_ROWS
            and x_ND.is_cpu
            and not torch.is_grad_enabled()
        )

    def decoded(
        self, x_ND: Tensor, routing: Routing, bank: FeedForward
    ) -> tuple[Tensor, Tensor] | None:
        """The combined outputs of few tokens and the rows of each expert, without a plan.

        None where :meth:`backend` would not choose the kernels that do this, or they need more.
        """
        up_EJD = bank.up_EJD
        if (
            up_EJD.shape[0] != routing.experts
            or not (up_EJD.is_cpu and bank.down_EOH.is_cpu)
            or torch.is_autocast_enabled("cpu")
            or not _plain(x_ND, routing.expert_NK, routing.weight_NK, *bank.tensors)
        ):
            return None
        found = decoded(x_ND, routing.expert_NK, routing.weight_NK, bank)
        if found is not None:
            self._log(Native(), x_ND, x_ND.dtype)
        return found

    def own_kernels(self, x_ND: Tensor, *others: Tensor | None) -> bool:
        """Whether our own kernels for CPUs may run on these tensors beside a backend."""
        return self.name in ("auto", "native") and _plain(x_ND, *others)

    def _find(self, x_ND: Tensor, plan: Plan, bank: FeedForward, dtype: torch.dtype) -> Backend:
        match self.name:
            case "auto":
                return _fastest(x_ND, plan, bank, dtype)
            case "native":
                return _asked_native(x_ND, bank)
            case "triton":
                return _asked_triton(x_ND, dtype)
        return _BY_NAME[self.name]()

    def _log(self, found: Backend, x_ND: Tensor, dtype: torch.dtype) -> None:
        chosen = (found.name, x_ND.device.type, dtype)
        if chosen not in self._logged:
            self._logged.add(chosen)
            logger.info("experts run through %s (%s, %s)", *chosen)


def _plain(x_ND: Tensor, *others: Tensor | None) -> bool:
    """Whether these are plain tensors, and operations run as they come, seen by no mode."""
    if watched():
        return False
    return {type(x_ND), *map(type, others)} <= PLAIN and not x_ND.is_meta


def _asked_native(x_ND: Tensor, bank: FeedForward) -> Backend:
    """The kernels for CPUs, or one expert after another for what they do not take."""
    if x_ND.device.type != "cpu" or library() is None:
        raise SpecError(
            f"backend='native' was asked for on {x_ND.device}; it needs a CPU, Linux and a C++ "
            "compiler that is found as CXX, g++ or clang++; use backend='auto'"
        )
    if Native.takes(x_ND, bank):
        return Native()
    return NativeGrouped() if NativeGrouped.takes(x_ND, bank) else Streamed()


def _asked_triton(x_ND: Tensor, dtype: torch.dtype) -> Backend:
    found = _triton(x_ND, dtype)
    if found is None:
        raise SpecError(
            f"backend='triton' was asked for on {x_ND.device}; it needs the package triton and an "
            "NVIDIA GPU of compute capability 8.0 (or TRITON_INTERPRET=1 in the environment, for "
            "tests); use backend='auto'"
        )
    return found


def _triton(x_ND: Tensor, dtype: torch.dtype) -> Backend | None:
    """The kernels, or grouped products for a dtype that they do not take; None where they cannot
    run.

    They are imported when first asked for: triton is not everywhere, and where it is, those who
    never use it should not wait for it.
    """
    if find_spec("triton") is None:
        return None
    from moekit.dispatch.triton_backend import DTYPES, INTERPRETED, Triton

    on_device = x_ND.device.type == "cuda" and _nvidia(x_ND.device)
    if not (on_device or INTERPRETED):
        return None
    return Triton() if dtype in DTYPES else Grouped()


@cache
def _nvidia(device: torch.device) -> bool:
    """Whether the GPU has the matrix units that the kernels are written for."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _fastest(x_ND: Tensor, plan: Plan, bank: FeedForward, dtype: torch.dtype) -> Backend:
    """The backend for these sizes and this dtype; looks at no number on the device."""
    if not x_ND.is_cpu:
        return (_triton(x_ND, dtype) if x_ND.is_cuda else None) or Grouped()
    experts, inner, width = bank.up_EJD.shape
    rows = plan.assignment_R.shape[0]
    rows_an_expert = rows / max(1, min(rows, experts))
    whole = dtype in (torch.float32, torch.float64)
    if _native_ahead(x_ND, bank, rows_an_expert, whole) and Native.takes(x_ND, bank):
        return Native()
    if _grouped_ahead(x_ND, bank, rows_an_expert, whole) and NativeGrouped.takes(x_ND, bank):
        return NativeGrouped()
    if whole and rows_an_expert <= FEW and inner * width >= SMALL_EXPERT:
        return FewRows()
    little = LITTLE_WORK if whole else LITTLE_WORK_IN_HALF
    return Streamed() if rows_an_expert * inner * width >= little else Grouped()


def _native_ahead(x_ND: Tensor, bank: FeedForward, rows_an_expert: float, whole: bool) -> bool:
    """Whether our own kernels are the fastest, if they take it; ``whole``: float32."""
    if whole or rows_an_expert <= NATIVE_IN_HALF_TRAINING or _avx2_alone():
        return True
    training = _trains(x_ND, bank)
    if not training and rows_an_expert <= NATIVE_IN_HALF:
        return True
    return Native.in_pairs(bank, rows_an_expert, training)


def _grouped_ahead(x_ND: Tensor, bank: FeedForward, rows_an_expert: float, whole: bool) -> bool:
    """The same for the kernels that experts of other kinds run through."""
    if not _avx2_alone():
        return rows_an_expert <= GROUPED_ELSEWHERE
    return not whole or rows_an_expert <= (GROUPED_TRAINING if _trains(x_ND, bank) else GROUPED)


def _avx2_alone() -> bool:
    """Whether the CPU has AVX2 and nothing newer, where torch multiplies bfloat16 element by
    element."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def _trains(x_ND: Tensor, bank: FeedForward) -> bool:
    """Whether a backward pass will follow."""
    inputs = (x_ND, *bank.tensors)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
