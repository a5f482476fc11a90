"""The pages of a server: one to try it at `/`, one of its addresses at `/docs`; each needs no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

from lora_lightning.report.page import STYLE
from lora_lightning.utils.libraries import loading

with loading("litserve", "serve"):
    from fastapi import FastAPI
    from starlette.responses import HTMLResponse, Response

PARTS = Path(__file__).with_name("browser")
PAGES = {  # address -> its HTML, and its scripts in the order in which they stand in it
    "/": ("page.html", ("elements", "asking", "labels", "pictures", "sounds", "page")),
    "/docs": ("addresses.html", ("elements", "asking", "addresses")),
}
ALLOWED = (  # beside the style and the script, which are known by their digests
    "default-src 'none'; connect-src 'self'; img-src blob: data:; media-src blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def add_pages(app: FastAPI) -> None:
    """Give an application its pages. They hold nothing of the server: who has no token may read them."""
    for address, (html, scripts) in PAGES.items():
        app.add_api_route(
            address, _route(*page(html, scripts)), methods=["GET", "HEAD"], include_in_schema=False
        )


def page(html: str, scripts: Sequence[str]) -> tuple[str, str]:
    """A page, and the policy by which a browser runs its one script, takes its one style, loads nothing from
    elsewhere and asks this server alone.

    Args:
        html: the name of a file in which `STYLE` and `SCRIPT` stand for the two.
        scripts: names of files, without `.js`.
    """
    style = STYLE.read_text(encoding="utf-8") + _read("style.css")
    script = '"use strict";\n(() => {\n' + "\n".join(_read(f"{name}.js") for name in scripts) + "})();\n"
    whole = _read(html).replace("STYLE", style).replace("SCRIPT", script)
    return whole, f"{ALLOWED}; script-src {_digest(script)}; style-src {_digest(style)}"


def _route(whole: str, policy: str) -> Callable[[], Coroutine[None, None, Response]]:
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "permissions-policy": "microphone=(self), camera=(self), geolocation=()",
        "cache-control": "no-cache",
    }

    async def route() -> Response:
        return HTMLResponse(whole, headers=headers)

    return route


def _read(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
