"""What is taken as a path may be an address: its files are fetched, checked, and kept by their digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lora_lightning.errors import AdapterFileError, UserError
from lora_lightning.files.hubs.address import HUBS, Address, address_of, is_address
from lora_lightning.files.hubs.remote import Digest, Listing, Remote, UnreachableError
from lora_lightning.utils.atomic import make_folder, reported, write_whole
from lora_lightning.utils.mapping_file import LARGEST
from lora_lightning.utils.writers import workplace

MODULES = {"hf": "huggingface", "wandb": "weights_and_biases"}
ADAPTER = {"adapter_config.json": LARGEST, "adapter_model.safetensors": 4 * 2**30}  # name -> most bytes
BASE = {"base.safetensors": 32 * 2**30}  # may lie beside an adapter
WEIGHTS = {"model.safetensors": 32 * 2**30}
PICKLE = "adapter_model.bin"
ROOM = 2**28  # bytes to leave free


def fetched(path: str | os.PathLike[str], adapter: bool = True) -> Path:
    """A path as it is; of an address the folder of this machine that now holds its files, and nothing else.

    Args:
        adapter: an adapter is meant, or all weights where there is none; otherwise the file of all weights.

    Raises:
        UserError: one message: a wrong address, no access, no answer and nothing kept, too large, torn or
            altered on its way.
    """
    if not is_address(path):
        return Path(path)
    address = address_of(path)
    folder = _folder(address, {**ADAPTER, **BASE, **WEIGHTS} if adapter else WEIGHTS)
    return folder if adapter else folder / next(iter(WEIGHTS))


def cache() -> Path:
    """Where what was fetched is kept; it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_lightning" / "hubs"


def _folder(address: Address, limits: Mapping[str, int]) -> Path:
    kept, altered = _kept(address, limits)
    if kept and address.fixed:
        return kept
    module = import_module(f"lora_lightning.files.hubs.{MODULES[address.hub]}")
    try:
        listing = module.listing(address, [*limits, PICKLE])
        files = _chosen(address, listing, limits)
        folder = _place(address) / _key(files)
        if not _complete(folder, files):
            _fetch(address, files, folder)
    except UnreachableError as error:
        reason = f"{address}: {HUBS[address.hub]} cannot be read now ({error})"
        if kept:
            rank_zero_warn(f"{reason}: the copy in {kept} is used.")
            return kept
        lacking = altered or f"there is no copy in {cache()}"
        raise UserError(
            f"{reason}, and {lacking}. Fetch it where there is a network and copy "
            "that folder here, or give an adapter's folder."
        ) from None
    _remember(address, limits, folder, files)
    return folder


def _chosen(address: Address, listing: Listing, limits: Mapping[str, int]) -> list[Remote]:
    """The files that are fetched: an adapter's, else all weights; each no larger than it may be."""
    there = listing.files
    if ADAPTER.keys() <= there.keys():
        files = [there[name] for name in (*ADAPTER, *BASE) if name in there and name in limits]
    else:
        files = [there[name] for name in WEIGHTS if name in there]
    if not files:
        wanted = " and ".join(ADAPTER) if ADAPTER.keys() <= limits.keys() else next(iter(WEIGHTS))
        pickle = f" {PICKLE} is a pickle, which can run any code, and is not read." if PICKLE in there else ""
        raise AdapterFileError(
            f"{address}: holds no {wanted} (looked at {listing.version}).{pickle} Give an address that does."
        )
    for file in files:
        if type(file.size) is not int or not 0 < file.size <= limits[file.name]:
            raise AdapterFileError(
                f"{address}: {file.name} has {file.size!r:.40} bytes by its hub; 1 to {limits[file.name]:,} "
                "are fetched. Nothing was: download it by hand, if you know what it is."
            )
    return files


def _key(files: Sequence[Remote]) -> str:
    """By which the same contents are known again, whatever they are called."""
    text = "\n".join(f"{f.name} {f.size} {f.digest.kind}:{f.digest.value}" for f in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fetch(address: Address, files: Sequence[Remote], folder: Path) -> None:
    """Write all of the files, or nothing."""
    make_folder(folder.parent)
    need = sum(file.size for file in files) + ROOM
    if (free := shutil.disk_usage(folder.parent).free) < need:
        raise UserError(
            f"{address}: {need / 1e6:,.0f} MB are needed in {cache()}, and {free / 1e6:,.0f} MB are free: "
            "make room, or set XDG_CACHE_HOME."
        )
    with reported(folder.parent), workplace(folder.parent) as place:
        whole = place / folder.name
        whole.mkdir()
        for file in files:
            _write(address, file, whole / file.name)
        try:
            os.rename(whole, folder)
        except OSError:  # it is there: another process was faster, or somebody has deleted files in it
            if not _complete(folder, files):
                shutil.rmtree(folder)
                os.rename(whole, folder)


def _write(address: Address, file: Remote, path: Path) -> None:
    """The file, no longer than its hub says and with the digest that its hub says."""
    digest, size = file.digest.begun(file.size), 0
    with contextlib.closing(file.pieces()) as pieces, open(path, "xb") as out:
        for piece in pieces:
            size += len(piece)
            if size > file.size:
                break
            digest.update(piece)
            out.write(piece)
    came = f"{address}: {file.name} came"
    if size != file.size:
        what = "with more than" if size > file.size else f"with {size:,} bytes in place of"
        raise AdapterFileError(f"{came} torn, {what} {file.size:,} bytes. Nothing was kept: try again.")
    if digest.hexdigest() != file.digest.value:
        kind = file.digest.kind
        raise AdapterFileError(f"{came} altered: its {kind} digest differs. Nothing was kept: try again.")


def _complete(folder: Path, files: Sequence[Remote]) -> bool:
    """Whether the folder holds these files alone, as their hub has them now."""
    try:
        sizes = {p.name: p.stat().st_size for p in folder.iterdir()}
        return sizes == {f.name: f.size for f in files} and all(
            _is_unaltered(folder / f.name, f) for f in files
        )
    except OSError:
        return False


def _is_unaltered(path: Path, file: Remote) -> bool:
    digest = file.digest.begun(file.size)
    with open(path, "rb") as kept:
        while piece := kept.read(2**20):
            digest.update(piece)
    return bool(digest.hexdigest() == file.digest.value)


def _place(address: Address) -> Path:
    """The folder of all that was fetched of a repository or an artifact."""
    return (
        cache()
        / address.hub
        / "--".join([*address.name.split("/"), *filter(None, address.folder.split("/"))])
    )


def _note(address: Address, limits: Mapping[str, int]) -> Path:
    """The file that says what an address stood for when it was last fetched, from which server."""
    server = os.environ.get({"hf": "HF_ENDPOINT", "wandb": "WANDB_BASE_URL"}[address.hub], "")
    text = "\n".join([str(address), server, *limits])
    return _place(address) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _remember(address: Address, limits: Mapping[str, int], folder: Path, files: Sequence[Remote]) -> None:
    """Write down what an address stands for, with the digests by which a copy is checked before each use."""
    known = {f.name: [f.size, f.digest.kind, f.digest.value] for f in files}
    text = json.dumps({"address": str(address), "folder": folder.name, "files": known})
    write_whole(_note(address, limits), lambda path: Path(path).write_text(text, encoding="utf-8"))


def _kept(address: Address, limits: Mapping[str, int]) -> tuple[Path | None, str]:
    """What an address stood for when it was last fetched, if that is still there as it was; else None, and
    of a copy that was altered since what is wrong with it."""
    try:
        note = json.loads(_note(address, limits).read_text(encoding="utf-8"))
        folder = _place(address) / str(note["folder"])
        files = [
            Remote(str(name), int(size), Digest(str(kind), str(value)), _nothing)
            for name, (size, kind, value) in note["files"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, ""
    names = {file.name for file in files}
    if folder.parent != _place(address) or not folder.is_dir():
        return None, ""
    if not (ADAPTER.keys() <= names or WEIGHTS.keys() <= names) or not _complete(folder, files):
        return None, f"the copy in {folder} was altered since: its digests differ"
    return folder, ""


def _nothing() -> Generator[bytes]:
    """The pieces of a file of which only the digest is known."""
    yield from ()
