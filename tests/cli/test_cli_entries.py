"""The table of commands says what the commands say, and loads one of them at a time."""

from __future__ import annotations

import subprocess
import sys
from inspect import cleandoc

import pytest
from typer.testing import CliRunner

from moekit.cli.commands import Benches, Commands, Entry
from moekit.cli.main import build

ENTRIES = {**Commands.entries, **Benches.entries}


@pytest.mark.parametrize("name", ENTRIES)
def test_the_summary_is_that_of_the_command(name: str) -> None:
    loaded = ENTRIES[name].load()
    assert loaded.help is not None
    assert loaded.help.split("\n\n")[0] == ENTRIES[name].summary


def test_help_lists_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    listed = CliRunner().invoke(build(), ["--help"]).output
    for name, entry in Commands.entries.items():
        assert f"{name} " in listed
        assert entry.summary in listed
    benches = CliRunner().invoke(build(), ["bench", "--help"]).output
    assert Benches.entries["layer"].summary in benches


def test_a_command_is_loaded_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Entry] = []
    original = Entry.load
    monkeypatch.setattr(Entry, "load", lambda entry: calls.append(entry) or original(entry))
    CliRunner().invoke(build(), ["--help"])
    assert calls == []
    CliRunner().invoke(build(), ["systems", "--help"])
    assert calls == [Commands.entries["systems"]]


def test_a_list_of_commands_waits_for_no_library_of_theirs() -> None:
    code = cleandoc("""
        import sys
        from moekit.cli.main import main
        sys.argv = ["moekit", "--help"]
        try:
            main()
        except SystemExit:
            print(sorted({"transformers", "accelerate", "matplotlib"} & set(sys.modules)))
    """)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
