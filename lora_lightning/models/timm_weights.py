"""pretrained_file: timm's pretrained weights on this machine, fetched if that is possible."""

from __future__ import annotations

from pathlib import Path

from lora_lightning.errors import ConfigError, did_you_mean
from lora_lightning.models.hub import WEIGHTS, hub_files
from lora_lightning.utils.download import url_file
from lora_lightning.utils.libraries import loading

with loading("timm"):
    import timm
    from timm.models import get_pretrained_cfg


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
        filename = cfg.hf_hub_filename or WEIGHTS
        return hub_files(name, repo, [filename], f"weights/{filename}", revision or None, cache_dir)[0]
    if cfg is not None and cfg.url:
        url = cfg.url if isinstance(cfg.url, str) else cfg.url[0]
        return url_file(name, url, cache_dir)
    raise ConfigError([_no_weights(name)])


def _no_weights(name: str) -> str:
    arch = name.partition(".")[0]
    tagged = timm.list_models(f"{arch}.*", pretrained=True)
    others = {other.partition(".")[0] for other in timm.list_pretrained()}
    near = "" if tagged else did_you_mean(arch, others)
    named = f"one of {', '.join(tagged)}" if tagged else "another name, or pretrained=False"
    return f"pretrained=True: timm has no weights for {name!r}.{near} Give {named}."
