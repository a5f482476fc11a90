"""Adapters behind addresses: found, copied, replaced and gone, and what is said while their store is away."""

import functools
import http.server
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from lora_lightning.app.serve import catalog_of
from lora_lightning.errors import UserError
from lora_lightning.serving import remote
from lora_lightning.serving.catalog import FILES, Catalog, UnknownAdapter, UnusableAdapter
from lora_lightning.serving.remote import RemoteCatalog


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "SLOWER", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["memory", "file", "http"])
def shelf(request, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An address, and the folder whose files it shows; of memory itself it is a name."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    if request.param == "file":
        yield f"file://{folder}", folder
    elif request.param == "memory":
        files = fsspec.filesystem("memory")
        yield "memory://shelf", folder
        files.rm("/shelf", recursive=True)
    else:
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/shelf", folder
        server.shutdown()
        server.server_close()


def put(shelf: tuple[str, Path], name: str, content: bytes = b"one") -> None:
    for file in FILES:
        if shelf[0].startswith("memory"):
            fsspec.filesystem("memory").pipe(f"/shelf/{name}/{file}", content)
        else:
            (shelf[1] / name).mkdir(parents=True, exist_ok=True)
            (shelf[1] / name / file).write_bytes(content)


def eventually(found, wanted) -> None:
    """It is looked at in the background."""
    end = time.monotonic() + 10
    while (last := found()) != wanted and time.monotonic() < end:
        time.sleep(0.02)
    assert last == wanted


def test_found_copied_replaced_and_gone(shelf) -> None:
    for name in ("ada", "bob/adapter", "base", "-x", "cyd/checkpoints"):
        put(shelf, name)
    catalog = RemoteCatalog(shelf[0])
    assert catalog.names() == ["ada", "bob"]
    assert [(catalog.folder("bob") / file).read_bytes() for file in FILES] == [b"one"] * 2
    with pytest.raises(UnknownAdapter):
        catalog.check("dia")
    put(shelf, "dia")
    assert (catalog.folder("dia") / FILES[1]).read_bytes() == b"one"  # it has come since
    put(shelf, "bob/adapter", b"other")
    eventually(lambda: (catalog.folder("bob") / FILES[1]).read_bytes(), b"other")
    with pytest.raises(UnknownAdapter, match="is no name"):
        catalog.folder("../ada")
    again = RemoteCatalog(shelf[0])
    assert (again.folder("bob") / FILES[0]).read_bytes() == b"other"


def test_a_store_that_is_away_stops_nobody_who_has_a_copy(tmp_path: Path, caplog) -> None:
    shelf = f"file://{tmp_path / 'shelf'}", tmp_path / "shelf"
    put(shelf, "ada")
    put(shelf, "bob")
    catalog = RemoteCatalog(shelf[0])
    catalog.folder("ada")
    shutil.move(tmp_path / "shelf", tmp_path / "away")
    for _ in range(3):
        assert (catalog.folder("ada") / FILES[0]).read_bytes() == b"one"
        assert catalog.names() == ["ada", "bob"]
    with pytest.raises(
        UnusableAdapter, match="adapter=bob: cannot be had from its store now: try again"
    ) as told:
        catalog.folder("bob")
    assert str(tmp_path) not in str(told.value) and "cannot be copied" in caplog.text
    shutil.move(tmp_path / "away", tmp_path / "shelf")
    assert (catalog.folder("bob") / FILES[0]).read_bytes() == b"one"


def test_links_to_adapters_are_adapters(tmp_path: Path) -> None:
    """As they are of a folder without an address."""
    shelf, place = (f"file://{tmp_path / 'shelf'}", tmp_path / "shelf"), tmp_path / "elsewhere"
    for name in ("one", "two/adapter", "three"):
        put((shelf[0], place), name, name.encode())
    put(shelf, "ada")
    (shelf[1] / "linked").symlink_to(place / "one")
    (shelf[1] / "run").symlink_to(place / "two")
    (shelf[1] / "inner").mkdir()
    (shelf[1] / "inner" / "adapter").symlink_to(place / "three")
    (shelf[1] / "lost").symlink_to(place / "none")
    catalog = RemoteCatalog(shelf[0])
    assert catalog.names() == Catalog(shelf[1]).names() == ["ada", "inner", "linked", "run"]
    held = {name: (catalog.folder(name) / FILES[1]).read_bytes() for name in ("linked", "run", "inner")}
    assert held == {"linked": b"one", "run": b"two/adapter", "inner": b"three"}


def test_copies_of_what_is_gone_go(tmp_path: Path, monkeypatch) -> None:
    shelf = f"file://{tmp_path / 'shelf'}", tmp_path / "shelf"
    for name in ("ada", "bob"):
        put(shelf, name)
    catalog = RemoteCatalog(shelf[0])
    places = {name: catalog.folder(name) for name in ("ada", "bob")}
    shutil.rmtree(shelf[1] / "bob")
    eventually(catalog.names, ["ada"])
    assert places["bob"].is_dir()  # another process may be about to read it
    monkeypatch.setattr(remote, "KEPT", 0.0)
    eventually(lambda: (catalog.names(), places["bob"].exists()), (["ada"], False))
    shutil.rmtree(places["ada"])  # as a user may, or another server's listing
    assert (catalog.folder("ada") / FILES[1]).read_bytes() == b"one"


def test_too_large_or_torn_is_not_kept(tmp_path: Path, monkeypatch) -> None:
    shelf = f"file://{tmp_path / 'shelf'}", tmp_path / "shelf"
    put(shelf, "ada", b"x" * 100)
    monkeypatch.setitem(remote.LIMITS, FILES[1], 99)
    catalog = RemoteCatalog(shelf[0])
    with pytest.raises(UnusableAdapter):
        catalog.folder("ada")
    (shelf[1] / "ada" / FILES[1]).write_bytes(b"")
    with pytest.raises(UnusableAdapter):
        catalog.folder("ada")
    assert not [f for f in catalog.cache.rglob("*") if f.is_file()]
    source = str(shelf[1] / "ada" / FILES[0])
    files = fsspec.filesystem("file")
    for most, size, told in ((50, None, "more than 50 bytes"), (200, 150, "100 bytes in place of 150")):
        with pytest.raises(OSError, match=told):
            remote._fetch(files, source, most, size, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s4://bucket/shelf", r"adapters=s4://bucket/shelf: s4:// is no address that fsspec knows\. Did you"),
        ("abfs://box/shelf", r"adapters=abfs://box/shelf: .*: pip install adlfs$"),
        ("file:///no/such/shelf", r"adapters=file:///no/such/shelf: there is nothing there"),
        ("http://127.0.0.1:1/shelf", r"adapters=http://127.0.0.1:1/shelf: "),
    ],
)
def test_an_address_that_cannot_be_read_is_one_message(address: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        catalog_of({"adapters": address})
    assert len(str(error.value).splitlines()) <= 2
