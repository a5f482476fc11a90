"""`lora-lightning serve`: adapters of one base answering over HTTP."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lightning.data.stream_sources import is_url
from lora_lightning.errors import UserError
from lora_lightning.files.hubs.address import address_of, is_address
from lora_lightning.serving.catalog import BASE, FILES, IN_RUN, NAME, Catalog, UnknownAdapter, taken
from lora_lightning.serving.client import is_token
from lora_lightning.serving.remote import RemoteCatalog
from lora_lightning.serving.routes import Manners
from lora_lightning.serving.server import TOKEN, Place, Server

if TYPE_CHECKING:
    from lora_lightning.serving.engine import Engine

MEGABYTE = 2**20


def serve(options: Mapping[str, Any], words: Sequence[str]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        options: of the command `serve`, by name.
        words: `recipe=NAME key=value …`, which build the base.

    Raises:
        UserError: every mistake in one message, before anything is built.
    """
    problems = []
    if "adapter" in options and "adapters" in options:
        problems.append("adapter and adapters: give one of the two.")
    if len(options.get("pinned", ())) > options.get("most", 256):
        problems.append("pinned: names more adapters than most= keeps. Give a larger most=.")
    token = os.environ.get(TOKEN)
    if token is not None and not token.strip():  # a secret that is not there must not open the server
        problems.append(f"{TOKEN}: is set and empty. Give a token, or unset it to ask for none.")
    elif token is not None and not is_token(token):  # a file's last line break: nobody could send it
        problems.append(
            f"{TOKEN}: has a line break, outer spaces or letters that no header brings. Give others."
        )
    if problems:
        raise UserError("\n".join(problems))
    options = here(options)
    catalog = catalog_of(options)
    for name in options.get("pinned", ()):
        try:
            catalog.check(name)
        except UnknownAdapter as error:
            raise UserError(f"pinned: {error}") from None
    names = catalog.names()
    count = f"{len(names)} adapter{'s' * (len(names) != 1)}" if names else "the base alone"
    given = {n: options[n] for n in ("host", "port", "workers", "threads", "queue", "batch") if n in options}
    accelerator = options.get("device", "auto")
    manners = {"most": options["max_mb"] * MEGABYTE} if "max_mb" in options else {}
    manners |= {"timeout": options["timeout"]} if "timeout" in options else {}
    build = partial(built, dict(options), list(words))
    place = Place(**given, accelerator=accelerator, token=token)
    Server(build, catalog, place, Manners(**manners), count).serve()


def here(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the folder that holds an adapter of a hub now, and its `name` there, in the place of its address:
    every worker is to serve the same.

    Raises:
        UserError: it cannot be had.
    """
    given = options.get("adapter")
    if given is None or not is_address(given):
        return options
    from lora_lightning.files.hubs.fetch import fetched  # loads torch

    name = address_of(given).name.rpartition("/")[2]
    return {**options, "adapter": str(fetched(given)), "name": name}


def catalog_of(options: Mapping[str, Any]) -> Catalog:
    """Of `adapter=` one name, the folder's or the hub's; of `adapters=` the names of its sub-folders.

    Raises:
        UserError: there is no adapter.
    """
    if "adapter" in options:
        folder = Path(options["adapter"]).expanduser().resolve()
        folder = folder / IN_RUN if (folder / IN_RUN / FILES[0]).is_file() else folder
        if not (folder / FILES[0]).is_file():
            raise UserError(f"adapter={options['adapter']}: holds no adapter_config.json. Give RUN/adapter.")
        name = options.get("name") or (folder.parent.name if folder.name == IN_RUN else folder.name)
        return Catalog(fixed={name if NAME.fullmatch(name) and name != BASE else "adapter": folder})
    if "adapters" not in options:
        return Catalog()
    if is_url(options["adapters"]):
        return RemoteCatalog(options["adapters"])
    folder = Path(options["adapters"]).expanduser()
    if not folder.is_dir():
        raise UserError(f"adapters={folder}: there is no such folder: give one that there is.")
    if any((place / FILES[0]).is_file() for place in (folder / BASE, folder / BASE / IN_RUN)):
        raise UserError(taken(folder))
    return Catalog(folder)


def built(options: Mapping[str, Any], words: Sequence[str], device: str) -> Engine:
    """The engine of a worker process; the server's own loads no torch."""
    from lora_lightning.app.served import engine_of
    from lora_lightning.serving.inputs import Limits

    limits = Limits(**{n: options[n] for n in ("pixels", "seconds") if n in options})
    return engine_of(options, words, catalog_of(options), limits, device)
