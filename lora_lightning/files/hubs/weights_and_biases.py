"""Files of an artifact of Weights & Biases, by its own client: its server, its key, its manifest."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from lora_lightning.errors import UserError
from lora_lightning.files.hubs.address import Address
from lora_lightning.files.hubs.remote import (
    SECONDS,
    Digest,
    Listing,
    Remote,
    UnreachableError,
    answered,
    hexadecimal,
    told,
)
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.wandb_key import has_wandb_key

PIECE = 2**20  # bytes
MOST_FILES = 1000  # of an artifact whose manifest, which is read whole, is asked for
LOG_IN = "run `wandb login`, or set WANDB_API_KEY"
REFUSED = ("401", "403", "credentials", "permission", "denied")  # in the client's words, which have no codes


def client() -> Any:
    """wandb, when it is first asked for.

    Raises:
        LibraryError: it is missing or does not load.
    """
    with loading("wandb", "recipes"):
        return importlib.import_module("wandb")


def listing(address: Address, names: Sequence[str]) -> Listing:
    """Which of these files the artifact has, at one version.

    Raises:
        UnreachableError: the server does not answer.
        UserError: there is no key or no such artifact, or what it says of its files is not to be trusted.
    """
    wandb = client()
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        raise UnreachableError(f"WANDB_MODE={os.environ['WANDB_MODE']}")
    if not has_wandb_key():  # the client would ask for one
        raise UserError(f"{address}: W&B has no key here: {LOG_IN}.")
    whole = f"{address.name}:{address.version or 'latest'}"
    with failures(address):
        artifact = answered(lambda: wandb.Api(timeout=int(SECONDS)).artifact(whole))
        if (count := artifact.file_count or 0) > MOST_FILES:
            raise UserError(f"{address}: is no adapter: it has {count:,} files. Give one that is.")
        entries = answered(lambda: artifact.manifest).entries
        wanted = [name for name in names if name in entries]
        urls = answered(
            lambda: {f.name: f.direct_url for f in artifact.files(names=wanted)} if wanted else {}
        )
    files = {name: _remote(address, name, entries[name], urls.get(name)) for name in wanted}
    return Listing(str(artifact.source_version), files)


def _remote(address: Address, name: str, entry: Any, url: str | None) -> Remote:
    """A file that W&B itself keeps: a reference may lead anywhere."""
    if entry.ref is not None or not url:
        raise UserError(
            f"{address}: {name} is a reference to {told(ValueError(entry.ref or 'nowhere'))}, and none is "
            "followed: log the file itself."
        )
    algorithm = getattr(entry, "digest_algorithm", None)  # MD5 in older wandb
    kind = algorithm().value.rpartition("_")[2].lower() if algorithm else "md5"
    digest = Digest(kind, hexadecimal(entry.digest))
    if not digest.value or entry.size is None:
        raise UserError(
            f"{address}: {name} has no digest or no size there, by which it could be checked: log it anew."
        )

    def pieces() -> Generator[bytes]:
        requests = importlib.import_module("requests")  # which wandb brings
        with failures(address):
            options = {"headers": {"Accept-Encoding": "identity"}, "timeout": SECONDS, "stream": True}
            with requests.get(url, **options) as response:
                response.raise_for_status()
                yield from response.iter_content(PIECE)

    return Remote(name, entry.size, digest, pieces)


@contextlib.contextmanager
def failures(address: Address) -> Iterator[None]:
    """Within this context what the client raises is one error of ours.

    Raises:
        UnreachableError: it does not answer, or is not well.
        UserError: it refuses, with the remedy.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # wandb's, requests' or pydantic's
        raise _explained(address, error) from None


def _explained(address: Address, error: Exception) -> UserError:
    text = told(error)
    low = text.lower()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "not found" in low or "404" in low or status == 404:
        return UserError(
            f"{address}: there is no such artifact, alias or project, or your key may not read it. Look at "
            f"{page(address)}; {LOG_IN}."
        )
    if status in (401, 403) or ("busy" not in low and any(word in low for word in REFUSED)):
        return UserError(
            f"{address}: W&B refuses: {text.rstrip('.')}. Your key is wrong or may not do this: {LOG_IN}."
        )
    return UnreachableError(text)


def page(address: Address) -> str:
    """Where a person can look at an artifact."""
    entity, project, name = address.name.split("/")
    url = os.environ.get("WANDB_BASE_URL") or "https://wandb.ai"
    return f"{url.rstrip('/')}/{entity}/{project}/artifacts/model/{name}"
