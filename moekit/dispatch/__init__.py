"""How rows travel: plans, capacity limits, dispatch and combine."""

from moekit.dispatch.capacity import capacities, limit
from moekit.dispatch.dispatch import (
    Capacity,
    CapacityDispatch,
    Dispatch,
    Dispatched,
    DispatchSpec,
    Dropless,
    DroplessDispatch,
)
from moekit.dispatch.plan import Plan, plan_places, plan_rows

__all__ = [
    "Capacity",
    "CapacityDispatch",
    "Dispatch",
    "DispatchSpec",
    "Dispatched",
    "Dropless",
    "DroplessDispatch",
    "Plan",
    "capacities",
    "limit",
    "plan_places",
    "plan_rows",
]
