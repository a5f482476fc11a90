"""pretrained_file: timm's pretrained weights on this machine, fetched if that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_lightning.errors import ConfigError, MissingFileError, did_you_mean
from lora_lightning.utils.download import PROBE_SECONDS, failure_text, request_failure, url_file
from lora_lightning.utils.libraries import loading

with loading("timm"):
    import huggingface_hub as hub
    import timm
    from timm.models import get_pretrained_cfg

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
    remedy = f"Name one that has: {', '.join(tagged)}." if tagged else did_you_mean(arch, others)
    return f"pretrained=True: timm has no weights for {name!r}. {remedy.strip()}"


def hub_files(
    name: str,
    repo: str,
    filenames: Sequence[str],
    checkpoint: str,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> list[Path]:
    """Files of a repository: from the hub's cache, else downloaded, else one error at once.

    Args:
        name: of the model, for the error.
        checkpoint: what to give as model.checkpoint after a download by hand into the folder `weights`.
        cache_dir: in place of the hub's cache (HF_HOME).

    Raises:
        MissingFileError: they are not here and cannot be had now.
    """
    cached = [hub.try_to_load_from_cache(repo, f, cache_dir=cache_dir, revision=revision) for f in filenames]
    found = [Path(path) for path in cached if isinstance(path, str)]
    if len(found) == len(filenames):
        return found
    url = hub.hf_hub_url(repo, filenames[-1], revision=revision)
    if hub.constants.HF_HUB_OFFLINE:
        reason: str | None = "HF_HUB_OFFLINE is set"
    else:
        reason = request_failure(lambda: hub.get_hf_file_metadata(url, timeout=PROBE_SECONDS))
    if reason is None:
        try:
            return [
                Path(hub.hf_hub_download(repo, f, revision=revision, cache_dir=cache_dir)) for f in filenames
            ]
        except Exception as error:  # requests, httpx or the hub's own, by version
            reason = failure_text(error)
    folder = Path(cache_dir or hub.constants.HF_HUB_CACHE).absolute()
    entry = f"models--{repo.replace('/', '--')}"
    command = f"hf download {repo} {' '.join(filenames)}" + (f" --revision {revision}" if revision else "")
    raise MissingFileError(
        f"The pretrained weights of {name} are not on this machine, and cannot be downloaded now"
        f" ({reason}).\n"
        f"  file:       {', '.join(filenames)} of {repo} on {hub.constants.ENDPOINT}\n"
        f"  looked for: {folder / entry} (HF_HOME sets another cache)\n"
        f"  to get it:  on a machine with internet, {command} --local-dir weights\n"
        f"  then:       copy it here and give model.checkpoint={checkpoint};\n"
        f"              or copy the folder {entry} from that machine's hub cache to {folder}"
    )
