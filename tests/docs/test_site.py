"""The site as it is built: without warnings, whole, from this machine alone, on screens and telephones."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import CONTRAST, SEEN, chromium, opened
from pages import CONFIG, ROOT, navigation

import lora_lightning as ll

pytestmark = pytest.mark.slow
UNSEEN = (
    "class=md-skip>",
    'id="__toc">',
)  # a link that only a keyboard's focus shows; the theme's switch, never shown


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(CONFIG), "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """Where the site is served on this machine."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def built(site: Path) -> list[str]:
    """Addresses of all pages below that of the site."""
    return sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))


def test_it_has_every_page(site):
    pages = {name.removesuffix(".md").removesuffix("index") or "." for name in navigation()}
    assert pages <= {*built(site)}
    assert (site / "search" / "search_index.json").is_file()


def test_every_public_name_has_its_signature(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    parts = re.split(r'<h3 id="lora_lightning\.(\w+)" class="doc doc-heading">', page)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert sorted(found) == sorted(ll.__all__)
    bare = {name for name, html in found.items() if "doc-signature" not in html}
    assert bare == {"AdapterFileError", "UserError"}  # Python's own signature
    assert "Annotated[" not in re.sub(r"<[^>]*>", "", page)


def test_a_command_goes_on_further_in_on_the_next_line(site, address):
    """Where a telephone would cut it."""
    rows = """line => {
      const range = document.createRange();
      range.selectNodeContents(line);
      return [...range.getClientRects()].map(row => [Math.round(row.top), row.left]);
    }"""
    with chromium() as browser, opened(browser, f"{address}gallery/", "telephone") as page:
        command = page.locator(".language-bash code > span", has_text="whisper_manifest").first
        left: dict[int, float] = {}
        for top, x in command.evaluate(rows):
            left[top] = min(x, left.get(top, x))
    first, *others = (left[top] for top in sorted(left))
    assert others and all(x > first for x in others)


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = re.compile(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"")
    found = {path.name: fetched.findall(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert not {name: links for name, links in found.items() if links}


@pytest.mark.parametrize("look", ["telephone", "desktop", "dark"])
def test_pages_open_in_a_browser(site, address, look):
    pages = built(site) if look == "telephone" else [".", "api", "speed", "repository/CONTRIBUTING"]
    found = []
    with chromium() as browser:
        for name in pages:
            told: list[str] = []
            with opened(browser, f"{address}{name}/", look, told) as page:
                told += page.evaluate(SEEN) + page.evaluate(CONTRAST)
            found += [f"{name}: {line}" for line in told if not any(words in line for words in UNSEEN)]
    assert not found, "\n".join(found)


def test_the_search_finds_a_name(site, address):
    with chromium() as browser, opened(browser, address) as page:
        page.locator(".md-search__input").fill("mixed_adapters")
        page.locator(".md-search-result__link").first.wait_for()
        links = page.locator(".md-search-result__link").evaluate_all("links => links.map(link => link.href)")
    assert any("/api/" in link for link in links)
