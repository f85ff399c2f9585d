"""moekit: sparse mixture-of-experts models, as parts that compose."""

__version__ = "0.1.0"
