"""Files of a repository on the Hugging Face hub, by its own client: its endpoint, its token, its session."""

from __future__ import annotations

import contextlib
import importlib
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
    told,
)
from lora_lightning.utils.libraries import loading

PIECE = 2**20  # bytes
LOG_IN = "run `hf auth login`, or set HF_TOKEN"


def client() -> Any:
    """huggingface_hub, when it is first asked for.

    Raises:
        LibraryError: it is missing or does not load.
    """
    with loading("huggingface_hub", "recipes"):
        return importlib.import_module("huggingface_hub")


def listing(address: Address, names: Sequence[str]) -> Listing:
    """Which of these files the repository has, at one commit.

    Raises:
        UnreachableError: the hub does not answer.
        UserError: there is no such repository or revision, or it is not for everybody.
    """
    hub = client()
    if hub.constants.HF_HUB_OFFLINE:
        raise UnreachableError("HF_HUB_OFFLINE is set")
    within = f"{address.folder}/" if address.folder else ""
    with failures(address):
        api = hub.HfApi()
        commit = answered(
            lambda: api.model_info(address.name, revision=address.version or None, timeout=SECONDS)
        ).sha
        paths = [f"{within}{name}" for name in names]
        found = answered(lambda: api.get_paths_info(address.name, paths, revision=commit))
    files = {
        name: _remote(hub, address, commit, file, name)
        for file in found
        if hasattr(file, "size") and (name := file.path.removeprefix(within)) in names
    }
    return Listing(str(commit), files)


def _remote(hub: Any, address: Address, commit: str, file: Any, name: str) -> Remote:
    digest = Digest("sha256", file.lfs.sha256) if file.lfs else Digest("git", file.blob_id)
    url = hub.hf_hub_url(address.name, file.path, revision=commit)

    def pieces() -> Generator[bytes]:
        with failures(address):
            yield from _pieces(hub, url)

    return Remote(name, file.lfs.size if file.lfs else file.size, digest, pieces)


def _pieces(hub: Any, url: str) -> Generator[bytes]:
    """A file's bytes. Redirects are followed by http and https alone, and to other hosts without the token:
    both by the client's own session, of httpx, or of requests before huggingface_hub 1.0."""
    session = hub.utils.get_session()
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
    if hasattr(session, "stream"):
        with session.stream("GET", url, headers=headers, timeout=SECONDS, follow_redirects=True) as response:
            hub.utils.hf_raise_for_status(response)
            yield from response.iter_bytes(PIECE)
    else:
        with session.get(url, headers=headers, timeout=SECONDS, stream=True) as response:
            hub.utils.hf_raise_for_status(response)
            yield from response.iter_content(PIECE)


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
    except Exception as error:  # huggingface_hub's, httpx's or requests', by version
        raise _explained(address, error) from None


def _explained(address: Address, error: Exception) -> UserError:
    errors = importlib.import_module("huggingface_hub.errors")
    page = f"{client().constants.ENDPOINT}/{address.name}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{address}: its owner grants access: ask for it on {page}; {LOG_IN}.")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(
            f"{address}: the repository has no revision {address.version or 'main'}. See {page}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{address}: there is no such repository, or it is private and your token may not read it. "
            f"Look at {page}; {LOG_IN}."
        )
    if status in (401, 403):
        return UserError(
            f"{address}: the hub refuses ({status}): your token is wrong, old, or may not do this: {LOG_IN}."
        )
    if status == 404:
        return UserError(f"{address}: the hub has no such file any more (404). See {page}.")
    if status and status < 500 and status != 429:
        return UserError(f"{address}: the hub refuses ({status}): {told(error)}")
    return UnreachableError(f"it answers {status}" if status else told(error))
