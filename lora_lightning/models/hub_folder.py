"""Networks of transformers from a folder of the hub's files: whole or not at all, quietly, no code run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_lightning.errors import AdapterFileError, ConfigError
from lora_lightning.files.hubs.address import is_address
from lora_lightning.files.weights import refuse_misfit
from lora_lightning.utils.download import failure_text
from lora_lightning.utils.libraries import loading

ADAPTER = "adapter_config.json"
COPY_AGAIN = "Copy or download the folder again."


def load_network(
    folder: Path,
    kind: Any,
    what: str,
    may_differ: Callable[[str], bool] = lambda name: False,
    **options: Any,
) -> tuple[Any, list[str]]:
    """A network of transformers, and the names of its tensors that are fresh ones.

    transformers itself fills what the file lacks with random numbers, and says so in a table.

    Args:
        folder: with config.json and the weights as safetensors.
        kind: the class of transformers whose `from_pretrained` reads it.
        what: the network, for errors, such as "Whisper".
        may_differ: of a tensor's name, whether it may have another shape in the file; it is then a fresh one.
        **options: of the network's configuration, and of `from_pretrained`.

    Raises:
        AdapterFileError: the folder cannot be read, lacks tensors or has some of another shape, or holds an
            adapter beside the weights.
    """
    refuse_adapter_beside(folder)
    with reading(folder, what), _quiet():
        network, found = kind.from_pretrained(
            folder,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    other = {name: (stored, own) for name, stored, own in found["mismatched_keys"]}
    shapes = [
        f"{name} is {tuple(stored)} in the file, {tuple(own)} in the model"
        for name, (stored, own) in sorted(other.items())
        if not may_differ(name)
    ]
    what = f"{what} as its own config.json says"
    refuse_misfit(sorted(found["missing_keys"]), [], shapes, folder, what, COPY_AGAIN)
    return network, sorted(other)


def refuse_address(checkpoint: str) -> None:
    """A model of many files is found on the hub by its name.

    Raises:
        ConfigError: the address of a hub stands where a folder belongs.
    """
    if is_address(checkpoint):
        name = checkpoint.partition(":")[2] or "USER/NAME"
        raise ConfigError([f"checkpoint={checkpoint!r}: give a folder, or name={name} and no checkpoint."])


def refuse_adapter_beside(folder: Path) -> None:
    """transformers hands an adapter that lies beside weights to PEFT, which imports what its file names.

    Raises:
        AdapterFileError: there is one.
    """
    if (folder / ADAPTER).exists():
        raise AdapterFileError(
            f"{folder} holds {ADAPTER}: a base has no adapter in it, and this one is not loaded unasked. "
            "Take it away, and load it with lora_lightning.load_adapter."
        )


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Within this context errors of the libraries that read the folder are ours."""
    try:
        yield
    except AdapterFileError:
        raise
    except Exception as error:  # transformers', tokenizers', safetensors', torch's or json's own
        raise AdapterFileError(
            f"{folder} cannot be loaded as {what}: {failure_text(error)}. Download it anew, whole."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers prints a table of what does not fit, which is in our error or wanted, and a bar."""
    with loading("transformers", "whisper"):  # which the caller has imported already, for its own extra
        from transformers import logging as log

    before, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bar:
            log.enable_progress_bar()
