"""Gives every package of moekit, and every public module beside them, a reference page.

A new package needs no file here and no line in ``mkdocs.yml``: its docstring and the names in its
``__all__`` become its page.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# The commands describe themselves with --help.
WITHOUT_PAGE = {"moekit.cli"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the reference pages last in the navigation."""
    assert config.nav is not None
    pages = [{name: _page(name)} for name in _documented(_package(config))]
    config.nav.append({"API reference": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference pages to the files of the site."""
    for name in _documented(_package(config)):
        content = f"# {name}\n\n::: {name}\n"
        files.append(File.generated(config, _page(name), content=content))
    return files


def _package(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent / "moekit"


def _page(name: str) -> str:
    return f"reference/{name.removeprefix('moekit.')}.md"


def _documented(package: Path) -> list[str]:
    modules = [path.with_suffix("") for path in package.glob("*.py")]
    packages = [path.parent for path in package.rglob("__init__.py") if path.parent != package]
    paths = (path.relative_to(package.parent) for path in modules + packages)
    names = {".".join(path.parts) for path in paths if not _is_private(path)}
    return sorted(names - WITHOUT_PAGE)


def _is_private(path: Path) -> bool:
    return any(part.startswith("_") for part in path.parts)
