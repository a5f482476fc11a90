"""pretrained_file: timm's pretrained weights on this machine, fetched if that is possible."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub as hub
import timm
from timm.models import get_pretrained_cfg

from lora_lightning.errors import ConfigError, MissingFileError, did_you_mean
from lora_lightning.models.download import PROBE_SECONDS, failure_text, request_failure, url_file

WEIGHTS = "model.safetensors"


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
