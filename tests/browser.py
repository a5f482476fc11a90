"""Opens pages in the system's chromium without a network, and says what is wrong with them.

Where there is no chromium or no playwright, the tests that ask for one are skipped, and say so.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TELEPHONE, DESKTOP = 360, 1280  # pixels
LOOKS = {  # width, dark, on paper
    "desktop": (DESKTOP, False, False),
    "telephone": (TELEPHONE, False, False),
    "dark": (DESKTOP, True, False),
    "telephone-dark": (TELEPHONE, True, False),
    "print": (794, False, True),  # A4 at 96 dots an inch
}
SEEN = """() => {
  const found = [];
  const say = (what, node) => found.push(`${what}: ${node.outerHTML.slice(0, 120)}`);
  const shown = node => node.getClientRects().length && getComputedStyle(node).visibility !== "hidden";
  for (const image of document.images)
    if (image.complete ? !image.naturalWidth : image.loading !== "lazy") say("a missing picture", image);
  for (const image of document.querySelectorAll("img:not([alt])")) say("a picture without a text", image);
  for (const field of document.querySelectorAll("input, select, textarea, audio, [role=img]"))
    if (!field.labels?.length && !field.getAttribute("aria-label") && !field.getAttribute("aria-labelledby"))
      say("without a label", field);
  for (const link of document.querySelectorAll("a[href^='#']"))
    if (link.hash.length > 1 && !document.getElementById(decodeURIComponent(link.hash.slice(1))))
      say("a link to nowhere", link);
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  if (wide > 0) {
    found.push(`the page is ${wide} pixels too wide`);
    for (const node of document.body.querySelectorAll("*"))
      if (node.getBoundingClientRect().right > innerWidth + 1 && !node.closest(".wide"))
        say("too wide", node);
  }
  for (const figure of document.querySelectorAll("figure.chart"))
    if (shown(figure) && figure.querySelector(".plot").clientWidth && !figure.querySelector(".plot svg"))
      say("a chart that was not drawn", figure);
  return found;
}"""
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = rgb => [.2126, .7152, .0722].reduce((sum, w, i) => sum + w * linear(rgb[i] / 255), 0);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return rgba(getComputedStyle(document.body).backgroundColor);
  };
  const found = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), node = walker.currentNode.parentElement;
    if (!text || !node.getClientRects().length || node.closest("script, style, noscript")) continue;
    const style = getComputedStyle(node), inSvg = node.closest("svg");
    if (inSvg && node.closest(".role-mark, .boxes")) continue;  // upon a mark, whose ground is not known
    const both = [light(rgba(inSvg ? style.fill : style.color)), light(ground(node))];
    const ratio = (Math.max(...both) + .05) / (Math.min(...both) + .05);
    const where = `<${node.tagName.toLowerCase()} class=${node.getAttribute("class")}>`;
    if (ratio < 4.5) found.add(`contrast ${ratio.toFixed(2)} of '${text.slice(0, 30)}' in ${where}`);
  }
  return [...found];
}"""


@contextmanager
def chromium(*arguments: str) -> Iterator:
    """Playwright's browser, without a network; skips the test where there is none.

    Args:
        arguments: of the program, beside the usual ones.
    """
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        usual = ["--no-sandbox", "--disable-gpu"]
        browser = started.chromium.launch(executable_path=program, args=[*usual, *arguments])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser, path: Path | str, look: str = "desktop", complaints: list[str] | None = None) -> Iterator:
    """A page in one of `LOOKS`, drawn; playwright's Page.

    Args:
        path: of a file, or an address on this machine.
        complaints: is told of errors on the console, and of everything the page asks a network for.
    """
    told = [] if complaints is None else complaints
    width, dark, paper = LOOKS[look]
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light",
        has_touch=width == TELEPHONE,
    )  # fmt: skip
    context.set_default_timeout(180_000)  # a machine that does much else is slow
    page = context.new_page()
    page.on(
        "console", lambda m: told.append(f"console: {m.text}") if m.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: told.append(f"error: {error}"))
    page.on("requestfailed", lambda request: told.append(f"failed: {request.url[:120]}"))
    address = path.resolve().as_uri() if isinstance(path, Path) else path
    home = address.split("/")[:3]

    def watch(request) -> None:
        own = request.url.startswith(("data:", "blob:", "about:")) or request.url.split("/")[:3] == home
        if not own:
            told.append(f"asked for {request.url[:120]}")

    page.on("request", watch)
    page.emulate_media(media="print" if paper else "screen")
    try:
        page.goto(address)
        page.wait_for_load_state("networkidle")
        yield page
    finally:
        context.close()


def problems(
    path: Path | str, looks=tuple(LOOKS), pictures: Path | None = None, unfold: bool = True
) -> list[str]:
    """What is wrong with a page: errors on the console, calls to a network, missing pictures, overflow, what
    has no label, texts that are hard to read, charts that were not drawn.

    Args:
        pictures: a folder for screenshots of the whole page in each look.
        unfold: open all that is folded away, too.
    """
    found = []
    with chromium() as browser:
        for look in looks:
            told: list[str] = []
            with opened(browser, path, look, told) as page:
                if pictures is not None:
                    pictures.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=pictures / f"{look}.png", full_page=True)
                told += page.evaluate(SEEN)
                if unfold and page.locator("details").count():
                    page.evaluate(
                        "() => document.querySelectorAll('details').forEach(d => { d.open = true; })"
                    )
                    page.wait_for_timeout(200)
                    told += page.evaluate(SEEN)
                told += page.evaluate(CONTRAST)
            found += [f"{look}: {line}" for line in dict.fromkeys(told)]
    return found
