"""pretrained_file: timm's pretrained weights on this machine, fetched if that is possible."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

import huggingface_hub as hub
import timm
import torch
from timm.models import get_pretrained_cfg

from lora_lightning.errors import ConfigError, MissingFileError, did_you_mean

WEIGHTS = "model.safetensors"
PROBE_SECONDS = 3.0  # the server answers a HEAD request within this time, or we are offline


def pretrained_file(name: str, cache_dir: str | None = None) -> Path:
    """The weights of a timm model name: from the cache, else downloaded, else one error at once.

    The hub's client retries a failed name lookup for most of a minute; here one HEAD request
    without retries, of bounded time, decides whether a download is tried.

    Args:
        name: a timm name, with or without a tag.
        cache_dir: in place of the hub's cache (HF_HOME) and torch's (TORCH_HOME).

    Raises:
        ConfigError: this model has no pretrained weights.
        MissingFileError: they are not here and cannot be had now.
    """
    cfg = get_pretrained_cfg(name)
    if cfg is not None and cfg.file:
        return Path(cfg.file)
    if cfg is not None and cfg.hf_hub_id:
        repo, _, revision = cfg.hf_hub_id.partition("@")
        return _hub_file(name, repo, revision or None, cfg.hf_hub_filename or WEIGHTS, cache_dir)
    if cfg is not None and cfg.url:
        url = cfg.url if isinstance(cfg.url, str) else cfg.url[0]
        return url_file(name, url, cache_dir)
    raise ConfigError([_no_weights(name)])


def _no_weights(name: str) -> str:
    arch = name.partition(".")[0]
    tagged = timm.list_models(f"{arch}.*", pretrained=True)
    others = {other.partition(".")[0] for other in timm.list_pretrained()}
    remedy = f"Name one that has: {', '.join(tagged)}." if tagged else did_you_mean(arch, others)
    return f"pretrained=True: timm has no weights for {name!r}. {remedy.strip()}"


def _hub_file(name: str, repo: str, revision: str | None, filename: str, cache_dir: str | None) -> Path:
    cached = hub.try_to_load_from_cache(repo, filename, cache_dir=cache_dir, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    url = hub.hf_hub_url(repo, filename, revision=revision)
    if hub.constants.HF_HUB_OFFLINE:
        reason: str | None = "HF_HUB_OFFLINE is set"
    else:
        reason = request_failure(lambda: hub.get_hf_file_metadata(url, timeout=PROBE_SECONDS))
    if reason is None:
        try:
            return Path(hub.hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir))
        except Exception as error:  # requests, httpx or the hub's own, by version
            reason = failure_text(error)
    folder = Path(cache_dir or hub.constants.HF_HUB_CACHE).absolute()
    entry = f"models--{repo.replace('/', '--')}"
    command = f"hf download {repo} {filename}" + (f" --revision {revision}" if revision else "")
    raise MissingFileError(
        f"The pretrained weights of {name} are not on this machine, and cannot be downloaded now"
        f" ({reason}).\n"
        f"  file:       {filename} of {repo} on {hub.constants.ENDPOINT}\n"
        f"  looked for: {folder / entry} (HF_HOME sets another cache)\n"
        f"  to get it:  on a machine with internet, {command} --local-dir weights\n"
        f"  then:       copy it here and give model.checkpoint=weights/{filename};\n"
        f"              or copy the folder {entry} from that machine's hub cache to {folder}"
    )


def url_file(name: str, url: str, cache_dir: str | None = None) -> Path:
    """The file of an address: from torch's cache, else downloaded, else one MissingFileError."""
    folder = Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints").absolute()
    path = folder / Path(urlparse(url).path).name
    if path.is_file():
        return path
    request = urllib.request.Request(url, method="HEAD")
    reason = request_failure(lambda: urllib.request.urlopen(request, timeout=PROBE_SECONDS).close())
    if reason is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
            return path
        except OSError as error:
            reason = failure_text(error)
    raise MissingFileError(
        f"The pretrained weights of {name} are not on this machine, and cannot be downloaded now"
        f" ({reason}).\n"
        f"  file:       {path.name} from {url}\n"
        f"  looked for: {path} (TORCH_HOME sets another cache)\n"
        f"  to get it:  on a machine with internet, curl -LO {url}\n"
        f"  then:       copy it here as {path}"
    )


def request_failure(probe: Callable[[], object]) -> str | None:
    """Why a network request fails, None if it succeeds; decided in 2 * PROBE_SECONDS.

    It runs in a thread of its own, since looking up a host name has no timeout.
    """
    reasons = [f"no answer within {PROBE_SECONDS:g} s"]

    def run() -> None:
        try:
            probe()
            reasons.clear()
        except Exception as error:  # requests, httpx or the hub's own, by version
            reasons[:] = [failure_text(error)]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(2 * PROBE_SECONDS)
    return reasons[0] if reasons else None


def failure_text(error: Exception) -> str:
    """The error's own message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
