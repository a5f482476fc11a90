"""What hatchling asks while it builds: the package's addresses, and its README with links that hold anywhere.

Both are those of the repository that the release workflow runs in; built elsewhere the package names none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)(?:\./)?([^)\s]+)")
PICTURE = re.compile(r"\.(png|svg|jpe?g|gif|webp)$")


class Addresses(MetadataHookInterface):
    """Fills in `urls` and `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the table `project`."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
        metadata["urls"] = {}
        if server and name:
            home, (owner, project) = f"{server}/{name}", name.split("/")
            metadata["urls"] = {
                "Documentation": f"https://{owner}.github.io/{project}/",
                "Source": home,
                "Issues": f"{home}/issues",
                "Changelog": f"{home}/blob/main/CHANGELOG.md",
            }
            text = absolute(text, home, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, home: str, tag: str) -> str:
    """A text of Markdown whose links into the repository are addresses of it."""
    return LINK.sub(lambda m: f"{home}/{'raw' if PICTURE.search(m[1]) else 'blob'}/{tag}/{m[1]}", text)
