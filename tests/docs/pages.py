"""The Markdown that a reader meets, on a code host and on the site: pages, anchors, navigation."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG = DOCS / "site" / "mkdocs.yml"
FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1`*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


class Loader(yaml.SafeLoader):
    """YAML with what mkdocs takes from the environment left empty."""


Loader.add_constructor("!ENV", lambda loader, node: "")


def pages() -> list[Path]:
    """Every page: of docs/, of the repository, of its forms."""
    found = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
    return sorted(path for path in found if path.is_file())


def config() -> dict[str, Any]:
    """The configuration of the site."""
    return yaml.load(CONFIG.read_text(encoding="utf-8"), Loader)


def navigation() -> list[str]:
    """The pages of the navigation, in its order."""

    def leaves(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [
            leaf for part in (entry if isinstance(entry, list) else entry.values()) for leaf in leaves(part)
        ]

    return leaves(config()["nav"])


@cache
def text_of(path: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def links(path: Path) -> list[str]:
    """What a page links to within the repository, pictures included."""
    found = LINK.findall(CODE.sub("", text_of(path)))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@cache
def anchors(path: Path) -> list[str]:
    """The anchors of a page's headings as code hosts and the site make them, each as often as it is there."""
    texts = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in HEADING.findall(text_of(path)))
    return [re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in texts]
