"""Every system by name: those of this version, and those that are specified but not built."""

from __future__ import annotations

from moekit.errors import SpecError
from moekit.spec import suggestion
from moekit.systems.adamoe import ADAMOE
from moekit.systems.baselines import BASELINES
from moekit.systems.comet import COMET, COMET_RELATIVES
from moekit.systems.dern import DERN
from moekit.systems.gg_moe import GG_MOE
from moekit.systems.graph_of_tokens import GRAPH_OF_TOKENS, GRAPH_RELATIVES
from moekit.systems.llava_mole import LLAVA_MOLE
from moekit.systems.meo import MEO, MEO_RELATIVES
from moekit.systems.moduleformer import MODULEFORMER
from moekit.systems.moepp import MOEPP
from moekit.systems.momentum_smoe import MOMENTUM_SMOE
from moekit.systems.planned import PLANNED
from moekit.systems.rectify_router import RECTIFY_ROUTER
from moekit.systems.remoe import REMOE
from moekit.systems.sparsity_constrained_ot import (
    SPARSITY_CONSTRAINED_OT,
    TRANSPORT_RELATIVES,
)
from moekit.systems.system import System
from moekit.systems.temperature_gaussian_moe import TEMPERATURE_GAUSSIAN_MOE
from moekit.systems.uncurl import UNCURL
from moekit.systems.uoe import UOE

DEFAULT_DESIGNS = ("dense", "topk", "adamoe", "moepp", "remoe")


def baselines() -> tuple[System, ...]:
    """The plain designs, and those that belong to a system without being one of their own."""
    return (
        *BASELINES,
        *COMET_RELATIVES,
        *GRAPH_RELATIVES,
        *MEO_RELATIVES,
        *TRANSPORT_RELATIVES,
    )


def systems() -> tuple[System, ...]:
    """The published systems, available ones first."""
    return (
        MOEPP,
        ADAMOE,
        REMOE,
        TEMPERATURE_GAUSSIAN_MOE,
        GG_MOE,
        MOMENTUM_SMOE,
        RECTIFY_ROUTER,
        COMET,
        GRAPH_OF_TOKENS,
        MEO,
        SPARSITY_CONSTRAINED_OT,
        MODULEFORMER,
        DERN,
        UNCURL,
        UOE,
        LLAVA_MOLE,
        *PLANNED,
    )


def find(name: str) -> System:
    """The system or baseline of that name.

    Raises:
        SpecError: there is none, or this version does not have it yet.
    """
    known = {system.name: system for system in (*baselines(), *systems())}
    if name not in known:
        raise SpecError(
            f"{name!r} is no design or system; `moekit systems` lists them"
            + suggestion(name, known)
        )
    if not known[name].available:
        raise SpecError(f"{name} is specified but not part of this version of moekit")
    return known[name]
