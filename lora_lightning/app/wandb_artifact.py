"""An adapter as an artifact of Weights & Biases, with the base that it came from in its lineage."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from lora_lightning.app.upload import Upload

ADAPTER_TYPE, BASE_TYPE = "model", "base-model"


def log_adapter(run: Any, upload: Upload, name: str, aliases: Sequence[str]) -> Any:
    """Log an adapter as an output of a run, and its base as what the run has used; both once only where they
    are the same as before. Nothing but `upload.files` is copied.

    Args:
        run: a live one of W&B, online or offline.
        name: of the artifact: letters, digits, `-`, `_` and `.`.
        aliases: such as "best" and "last".

    Returns:
        The `wandb.Artifact`, which online can be waited for.
    """
    import wandb

    use_artifact(run, _base_artifact(upload))
    artifact = wandb.Artifact(name, ADAPTER_TYPE, metadata=upload.metadata)
    for file, path in upload.files.items():
        artifact.add_file(str(path), name=file)
    return run.log_artifact(artifact, aliases=list(aliases))


def use_artifact(run: Any, artifact: Any) -> None:
    """`run.use_artifact`, which wandb refuses offline, though its record is synced with the others."""
    if run.offline:
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def _base_artifact(upload: Upload) -> Any:
    """What says which base it is: by its contents W&B knows again that it has it."""
    import wandb

    name, about = upload.base["name"], upload.base["metadata"]
    artifact = wandb.Artifact(artifact_name(name), BASE_TYPE, metadata=about)
    with artifact.new_file("base.json", encoding="utf-8") as file:
        file.write(json.dumps({"name": name, **about}, indent=1))
    return artifact


def artifact_name(text: str) -> str:
    """A text made a name that W&B takes: at most 128 letters, digits, `-`, `_` and `.`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")[:128] or "base"
