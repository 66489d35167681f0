"""What the documentation points at is there."""

import re

import pytest
from conftest import REPOSITORY

PAGES = sorted(
    path
    for folder in (REPOSITORY, REPOSITORY / "docs", REPOSITORY / "bundles")
    for path in (folder.glob("*.md") if folder == REPOSITORY else folder.rglob("*.md"))
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page):
    """Return what GitHub calls the headings of a page: lower case, punctuation gone, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page):
    broken = []
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_configuration_that_the_documentation_names_is_there():
    named = {
        name
        for page in PAGES
        for name in re.findall(r"\b((?:configs|benchmarks)/\w[\w/]*\.(?:yaml|py))", page.read_text())
    }
    own = {name for name in named if not (REPOSITORY / name).exists() and not in_a_bundle(name)}
    assert own == set()


def in_a_bundle(name):
    """Say whether a bundle has the file, for which its own page names it."""
    return any((folder / name).exists() for folder in (REPOSITORY / "bundles").iterdir())
