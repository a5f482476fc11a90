"""Files of repositories on the Hugging Face hub: from its cache, or fetched; offline is noticed at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_lightning.errors import MissingFileError
from lora_lightning.utils.download import PROBE_SECONDS, failure_text, request_failure
from lora_lightning.utils.libraries import loading

with loading("huggingface_hub", "recipes"):
    import huggingface_hub as hub

WEIGHTS = "model.safetensors"


def hub_files(
    name: str,
    repo: str,
    filenames: Sequence[str],
    checkpoint: str,
    revision: str | None = None,
    cache_dir: str | None = None,
    model_name: str | None = None,
) -> list[Path]:
    """Files of a repository: from the hub's cache, else downloaded, else one error at once.

    Args:
        name: of the model, for the error.
        checkpoint: what to give as model.checkpoint after a download by hand into the folder `weights`.
        cache_dir: in place of the hub's cache (HF_HOME).
        model_name: what to give as model.name instead, where the folder as a whole is a model.

    Raises:
        MissingFileError: they are not here and cannot be had now.
    """
    cached = [hub.try_to_load_from_cache(repo, f, cache_dir=cache_dir, revision=revision) for f in filenames]
    found = [Path(path) for path in cached if isinstance(path, str)]
    if len(found) == len(filenames):
        return found
    reason = hub_failure(repo, filenames[-1], revision)
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
        f"  then:       copy it here and give "
        f"{f'model.name={model_name}' if model_name else f'model.checkpoint={checkpoint}'};\n"
        f"              or copy the folder {entry} from that machine's hub cache to {folder}"
    )


def in_cache(repo: str, filename: str, revision: str | None = None, cache_dir: str | None = None) -> bool:
    """Whether a file of a repository is in the hub's cache on this machine."""
    return isinstance(hub.try_to_load_from_cache(repo, filename, cache_dir=cache_dir, revision=revision), str)


def hub_failure(repo: str, filename: str, revision: str | None = None) -> str | None:
    """Why a file of a repository cannot be had now, None if it can: one HEAD request decides."""
    if hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url = hub.hf_hub_url(repo, filename, revision=revision)
    return request_failure(lambda: hub.get_hf_file_metadata(url, timeout=PROBE_SECONDS))
