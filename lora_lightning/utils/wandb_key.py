"""Whether Weights & Biases can log in here without asking; read without wandb."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

WANDB_URLS = ("https://api.wandb.ai", "https://api.forge.coreweave.com")  # the second since wandb 0.31


def has_wandb_key() -> bool:
    """Whether there is a key where W&B looks itself: WANDB_API_KEY, a token's file, or an entry for its host
    (with its port) in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    given = os.environ.get("WANDB_BASE_URL")
    hosts = [urlparse(url).netloc for url in ([given] if given else WANDB_URLS)]
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            entries = netrc.netrc(path.expanduser())
            if any(entries.authenticators(host) for host in hosts if host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
