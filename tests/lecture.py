"""Keeps the line numbers of docs/lecture.md right: `python -m tests.lecture` writes them anew.

A link of that page names a symbol and its file, [`Class.method`](../folder/file.py#L12).
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "lecture.md"
LINK = re.compile(r"\[`(?P<symbol>[\w.]+)`\]\(\.\./(?P<file>[\w/]+\.py)(#L(?P<line>\d+))?\)")


def line_of(file: str, symbol: str) -> int:
    """The line at which a file of the repository defines a function, a class or a method.

    Raises:
        ValueError: the file does not exist, or does not define the symbol.
    """
    path = ROOT / file
    if not path.exists():
        raise ValueError(f"docs/lecture.md links {file}, which does not exist")
    node = ast.parse(path.read_text())
    for name in symbol.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == name]
        if not found:
            raise ValueError(f"docs/lecture.md links {symbol}, which {file} does not define")
        node = found[0]
    return node.lineno


def with_lines(text: str) -> str:
    """The page with the line number of every link as it is now."""
    return LINK.sub(
        lambda link: f"[`{link['symbol']}`](../{link['file']}#L{line_of(link['file'], link['symbol'])})", text
    )


if __name__ == "__main__":
    PAGE.write_text(with_lines(PAGE.read_text()))
