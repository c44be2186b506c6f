"""The documents: links lead somewhere, commands name files that exist, and the map of equations has the right lines."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import hf_models
from tests.lecture import LINK, PAGE, line_of
from tests.training.test_recipes import SCRIPTS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")])
PAGE_IDS = [str(path.relative_to(ROOT)) for path in PAGES]

every_page = pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_a_front_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@every_page
def test_every_local_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"\w+:", target):  # of the web
            continue
        place, _, anchor = target.partition("#")
        path = page.parent / place if place else page
        assert path.exists(), f"{page.name} links {target}"
        assert path.suffix != ".md" or not anchor or anchor in anchors_of(path), f"{page.name} links {target}"


@every_page
def test_every_command_names_files_that_exist(page):
    text = page.read_text()
    mentioned = re.findall(r"(?<![\w/])(?:training|tests|hf_models|docs|model_cards)/[\w./-]*\w", text)
    for name in mentioned:
        assert (ROOT / name).exists(), f"{page.name} mentions {name}"
    for module in re.findall(r"python -m ((?:training|tests|hf_models)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page.name}: python -m {module}"


def test_every_file_that_the_code_mentions_exists():
    """A name in backticks is that of a file beside the one that mentions it, or a path from the root."""
    for path in (
        *(ROOT / "hf_models").glob("*.py"),
        *(ROOT / "training").rglob("*.py"),
        *(ROOT / "tests").glob("*.py"),
    ):
        for name in re.findall(r"`([\w/]+\.(?:py|md|yaml))`", path.read_text()):
            places = (path.parent / name, ROOT / name)
            assert name.startswith("output_dir/") or any(place.exists() for place in places), f"{path} mentions {name}"


@every_page
def test_every_option_of_a_training_exists(page):
    arguments = dict(SCRIPTS.values())  # by the name of the script
    for line in page.read_text().splitlines():
        found = re.match(r"accelerate launch .*?training/(\w+)\.py(.*)", line)
        if found:
            names = {word[2:] for word in shlex.split(found[2], comments=True) if word.startswith("--")}
            known = {option for name in arguments[found[1]].__dataclass_fields__ for option in (name, f"no-{name}")}
            assert names <= known, f"{page.name}: {line}"


@every_page
def test_every_snippet_uses_what_the_package_has(page):
    for snippet in re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("hf_models"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), f"{page.name}: {ast.unparse(node)}"
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "hf_models":
                assert hasattr(hf_models, node.attr), f"{page.name}: {ast.unparse(node)}"


def test_the_map_of_equations_has_the_right_lines():
    links = list(LINK.finditer(PAGE.read_text()))
    assert len(links) > 40
    for link in links:
        line = line_of(link["file"], link["symbol"])
        assert link["line"] == str(line), f"{link['symbol']} is at line {line} now: run `python -m tests.lecture`"


def test_the_architecture_lists_every_module_of_the_package():
    listed = set(re.findall(r"\(\.\./hf_models/(\w+\.py)\)", (ROOT / "docs" / "architecture.md").read_text()))
    assert listed == {path.name for path in (ROOT / "hf_models").glob("*.py") if not path.name.startswith("__")}


def test_the_architecture_lists_every_file_of_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "training").rglob("[a-z]*.py"):
        room = path.parent.name
        line = page if room == "training" else re.search(rf"^\| \[`{room}/`\].*$", page, flags=re.MULTILINE)[0]
        assert f"`{path.name}`" in line, path


def test_every_document_names_the_same_version():
    heading = re.search(r"^## ([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert heading[1] == citation[1] == hf_models.__version__


def test_pre_commit_has_the_ruff_of_the_constraints():
    hooks = re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) == set(re.findall(r"^ruff==.+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
