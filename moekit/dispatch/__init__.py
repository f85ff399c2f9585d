"""How rows travel: plans, capacity limits, rectification, dispatch and combine."""

from moekit.dispatch.capacity import capacities, limit
from moekit.dispatch.dispatch import (
    Between,
    Capacity,
    CapacityDispatch,
    Dispatch,
    Dispatched,
    DispatchSpec,
    Dropless,
    DroplessDispatch,
)
from moekit.dispatch.merged import Merged, MergedDispatch
from moekit.dispatch.plan import Plan, plan_places, plan_rows
from moekit.dispatch.rectify import Rectification, Rectified, RectifiedDispatch, rectify

__all__ = [
    "Between",
    "Capacity",
    "CapacityDispatch",
    "Dispatch",
    "DispatchSpec",
    "Dispatched",
    "Dropless",
    "DroplessDispatch",
    "Merged",
    "MergedDispatch",
    "Plan",
    "Rectification",
    "Rectified",
    "RectifiedDispatch",
    "capacities",
    "limit",
    "plan_places",
    "plan_rows",
    "rectify",
]
