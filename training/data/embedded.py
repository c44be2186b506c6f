"""Texts that every Python brings with it: CPython's documentation, and the docstrings of its standard library."""

import ast
import functools
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path


@functools.cache
def embedded_documents() -> list[str]:
    """pydoc's topics, then one document of docstrings for every module of the standard library, in path order."""
    from pydoc_data.topics import topics

    modules = ["\n\n".join(found) for _, found in embedded_docstrings()]
    return [topics[name] for name in sorted(topics)] + modules


def embedded_docstrings() -> Iterator[tuple[str, list[str]]]:
    """Yields for every module of the standard library, in path order, its path without suffix and its docstrings."""
    root, seen = Path(sysconfig.get_path("stdlib")), set()
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - skipped)
        for path in sorted(Path(folder, name) for name in files if name.endswith(".py")):
            try:
                with warnings.catch_warnings(action="ignore"):  # old escapes in the sources
                    module = ast.parse(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, SyntaxError):
                continue
            # Shorter docstrings say little ("See base class."), and repeated ones say nothing new.
            found = [text for text in _docstrings(module) if len(text) >= 40 and not (text in seen or seen.add(text))]
            yield path.relative_to(root).with_suffix("").as_posix(), found


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings under `node` in the order of the source, with their indentation cleaned."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield from _docstrings(child)
