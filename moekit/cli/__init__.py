"""The ``moekit`` command: thin functions over the library."""
