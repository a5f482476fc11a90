"""Every page can be found, and every link leads somewhere, on a code host as on the site."""

import re

import pytest
from pages import DOCS, ROOT, anchors, config, links, navigation, pages, text_of

NAMES = [str(path.relative_to(ROOT)) for path in pages()]
LISTED = re.compile(r"(?:[-*+]|\d+\.) ")
OPENS = re.compile(r"#| |(?:[-*+]|\d+\.) ")  # what a list may stand right behind


def broken(name: str) -> list[str]:
    """Links of a page that lead nowhere."""
    path, found = ROOT / name, []
    for link in links(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.is_relative_to(ROOT) or not target.exists():
            found.append(f"{link}: there is no such file")
        elif anchor and anchors(target).count(anchor) != 1:
            found.append(
                f"{link}: the page has {anchors(target).count(anchor)} such headings, of {anchors(target)}"
            )
    return found


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_a_file_and_a_heading(name):
    assert not broken(name)


@pytest.mark.parametrize("name", NAMES)
def test_lists_begin_after_an_empty_line(name):
    """Without one code hosts show a list and the site shows a paragraph."""
    before, found = "", []
    for line in text_of(ROOT / name).splitlines():
        if LISTED.match(line) and before.strip() and not OPENS.match(before):
            found.append(line)
        before = line
    assert not found


def test_every_page_is_in_the_navigation_once_and_nothing_else():
    have = {str(path.relative_to(DOCS)) for path in pages() if path.is_relative_to(DOCS)}
    named = navigation()
    brought = {name for name in named if name.startswith("repository/")}
    assert all((ROOT / name.removeprefix("repository/")).is_file() for name in brought)
    assert have == {*named} - brought, (
        "put the page into nav of docs/site/mkdocs.yml, and its line into docs/index.md"
    )
    assert len(named) == len({*named})


def test_the_first_page_names_every_page():
    named = {link.partition("#")[0] for link in links(DOCS / "index.md")}
    missing = {name for name in navigation() if not name.startswith("repository/")} - named - {"index.md"}
    assert not missing


def test_the_site_fetches_nothing_from_elsewhere():
    theme = config()["theme"]
    assert theme["font"] is False
    assert not any(
        "://" in str(part) for part in (theme, config()["extra_css"], config().get("extra_javascript", ""))
    )


def test_what_is_broken_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n[a](gone.md) [b](#a-page) [c](page.md#other) `[d](no.md)` ![e](e.png)\n\n"
        "```\n[f](gone.md)\n```\n\n## Twice\n\n## Twice\n\n[g](#twice) [h](https://example.org)\n"
    )
    monkeypatch.setattr("test_pages.ROOT", tmp_path)
    assert [line.partition(":")[0] for line in broken("page.md")] == [
        "gone.md",
        "page.md#other",
        "e.png",
        "#twice",
    ]
