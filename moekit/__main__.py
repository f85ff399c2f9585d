"""``python -m moekit``, which ``torchrun -m moekit`` also starts."""

from moekit.cli.main import main

main()
