"""What mkdocs calls while it builds the site: files beside docs/ that pages link to come into it as well."""

import json
import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parents[2]
BROUGHT = "repository/"  # where the site has what lies outside docs/
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
WITH_CODE = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors are those of code hosts, so that links hold in both; versions are where mike publishes."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    if "MIKE_DOCS_VERSION" not in os.environ:
        del config.extra["version"]  # else pages ask for a list of versions that is not there
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Bring what pages and the navigation name outside docs/, and what these pages link to in turn."""
    seen = set()
    waiting = [file.src_uri for file in files.documentation_pages()]
    waiting += re.findall(rf"{BROUGHT}[\w./-]+", Path(config.config_file_path).read_text(encoding="utf-8"))
    while waiting:
        uri = waiting.pop()
        if uri in seen or not (path := source_of(uri)).is_file():
            continue
        seen.add(uri)
        if files.get_file_from_path(uri) is None:
            files.append(brought(config, uri, path))
        if path.suffix == ".md":
            waiting += [uri_of(path, link) for link in LINK.findall(path.read_text(encoding="utf-8"))]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of a page, which hold between files of the repository, as links of the site."""
    path, folder = source_of(page.file.src_uri), posixpath.dirname(page.file.src_uri)
    return LINK.sub(lambda link: posixpath.relpath(uri_of(path, link[0]), folder or "."), markdown)


def source_of(uri: str) -> Path:
    """The file of the repository that stands in the site under this name."""
    if not uri.startswith(BROUGHT):
        return ROOT / "docs" / uri
    path = ROOT / uri.removeprefix(BROUGHT)
    return path if path.is_file() or path.suffix != ".md" else path.with_suffix("")


def uri_of(path: Path, link: str) -> str:
    """The name in the site of what a file of the repository links to; code and notebooks are pages there."""
    target = posixpath.normpath(posixpath.join(path.relative_to(ROOT).parent.as_posix(), link))
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"{BROUGHT}{target}{'.md' if Path(target).suffix in (*WITH_CODE, '.ipynb') else ''}"


def brought(config: MkDocsConfig, uri: str, path: Path) -> File:
    """A file of the repository as one of the site."""
    if path.suffix in WITH_CODE:
        text = f"# {path.name}\n\n````{WITH_CODE[path.suffix]}\n{path.read_text(encoding='utf-8')}\n````\n"
        return File.generated(config, uri, content=text)
    if path.suffix == ".ipynb":
        return File.generated(config, uri, content=notebook(path))
    return File.generated(config, uri, abs_src_path=str(path))


def notebook(path: Path) -> str:
    """A notebook's cells, without their outputs, as a page."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n\n".join(text if kind == "markdown" else f"````python\n{text}\n````" for kind, text in texts)
