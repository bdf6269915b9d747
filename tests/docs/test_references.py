"""What the documents refer to is there: tests by name, files by path, headings by anchor."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
TEST = re.compile(r"`(tests/[\w/]+\.py)?::(test_\w+)`")
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
