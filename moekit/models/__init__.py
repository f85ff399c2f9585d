"""Whole networks built from the layer."""
