"""What the documents refer to is there: tests and code by name, files by path, headings by anchor."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
TEST = re.compile(r"`(tests/[\w/]+\.py)?::(test_\w+)`")
CODE = re.compile(r"`([\w/]+\.py) ([\w.]+)`")
METHOD = re.compile(r"`([A-Z]\w+)\.([a-z_]\w*)")
CONSTANT = re.compile(r"`(\w+)\.([A-Z][A-Z_]+)`(?:, `([A-Z][A-Z_]+)`)?")
PACKAGES = ["drsm_agent", "drsm_agent/core", "drsm_agent/store", "drsm_sdk"]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


def _named_tests(text: str) -> Iterator[tuple[str, str]]:
    """File and test; `::test_x` alone is of the file that was named last."""
    file = ""
    for found in TEST.finditer(text):
        file = found[1] or file
        yield file, found[2]


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page: Path) -> None:
    missing = [
        f"{file}::{name}"
        for file, name in _named_tests(page.read_text())
        if not re.search(rf"def {name}\b", (ROOT / file).read_text() if (ROOT / file).is_file() else "")
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in _anchors(target), f"{path}{anchor}"


def _sources(file: str) -> list[Path]:
    """Whom a page may mean by a path: from the top, or from one of the packages."""
    tops = [ROOT, ROOT / "drsm_agent", ROOT / "drsm_sdk", *(ROOT / package for package in PACKAGES)]
    return [top / file for top in tops if (top / file).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_piece_of_code_that_a_page_names_is_there(page: Path) -> None:
    """`file.py function`, or `file.py Class.method`."""
    missing = [
        f"{file} {name}"
        for file, name in CODE.findall(page.read_text())
        if not any(
            re.search(rf"\b(def|class) {name.rpartition('.')[2]}\b", source.read_text())
            for source in _sources(file)
        )
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_method_that_a_page_names_is_there(page: Path) -> None:
    """`Class.method`, or what it sets in itself; a class may be anywhere."""
    sources = [file.read_text() for file in ROOT.glob("drsm_*/**/*.py")]
    missing = [
        f"{kind}.{name}"
        for kind, name in METHOD.findall(page.read_text())
        if not any(
            re.search(rf"^class {kind}\b", source, re.MULTILINE)
            and re.search(rf"\bdef {name}\b|\bself\.{name}: ", source)
            for source in sources
        )
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_constant_that_a_page_names_is_there(page: Path) -> None:
    """`module.NAME`; a name that follows after a comma is of the same module."""
    missing = [
        f"{module}.{name}"
        for module, *names in CONSTANT.findall(page.read_text())
        for name in filter(None, names)
        if not any(
            re.search(rf"^(\w+, )*{name}(, \w+|: \w+)* = ", file.read_text(), re.MULTILINE)
            for file in ROOT.glob(f"drsm_*/**/{module}.py")
        )
    ]
    assert missing == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_architecture_lists_every_file(package: str) -> None:
    """And no other, in the table below the package's heading."""
    page = (ROOT / "docs/architecture.md").read_text()
    section = page.partition(f"### `{package}/`")[2].partition("\n### ")[0].partition("\n## ")[0]
    rows = "".join(re.findall(r"^\| (`[^|]*)", section, re.MULTILINE))
    files = {file.name for file in (ROOT / package).glob("*.py") if not file.name.startswith("__")}
    assert set(re.findall(r"`(\w+\.py)`", rows)) == files
