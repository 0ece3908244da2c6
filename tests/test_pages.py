"""Check that the code, files and headings exist that pages of docs and recipes name."""

import ast
import re

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "cola_lightning"
PAGES = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "recipes").rglob("*.md")]


def names(file):
    """List the functions and classes at the top of a file, and methods as ``Class.method``."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def test_every_step_of_the_architecture_page_names_code_that_exists():
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    steps = re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", page.replace("`tests/", "`../tests/"))
    assert len(steps) >= 25
    for file, name in steps:
        assert (PACKAGE / file).is_file(), file
        assert not name or name in names(PACKAGE / file), f"{file}:{name}"


def test_the_architecture_page_names_every_package_and_its_main_files():
    page = (REPOSITORY / "docs" / "architecture.md").read_text().partition("## The rooms")[2]
    packages = {str(file.parent.relative_to(PACKAGE)) for file in PACKAGE.rglob("__init__.py")} - {"."}
    assert packages == set(re.findall(r"^### `(.+)`$", page, re.MULTILINE))
    named = set(re.findall(r"^- `(.+)`: \S", page, re.MULTILINE))
    large = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if file.read_text().count("\n") > 200}
    assert large <= named, f"docs/architecture.md has no line for {large - named}; the first line of a file will do"


def anchors(page):
    """List the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
