"""The names of a folder's adapters, without a model."""

import logging
from pathlib import Path

import pytest
from hf_stand_in import ask, hf_hub

from lora_lightning.app.serve import catalog_of, here
from lora_lightning.errors import UserError
from lora_lightning.serving import catalog
from lora_lightning.serving.catalog import FILES, Catalog


def put(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", ["base", "base/adapter"])
def test_an_adapter_cannot_have_the_bases_name(name: str, tmp_path: Path, caplog, monkeypatch) -> None:
    monkeypatch.setattr(catalog, "FRESH", 0.0)
    put(tmp_path / "ada")
    shelf = Catalog(tmp_path)
    assert catalog_of({"adapters": str(tmp_path)}).names() == shelf.names() == ["ada"]
    place = put(tmp_path / name)
    with pytest.raises(UserError, match=r"base is the name of the base itself, .*: rename .*base\.$"):
        catalog_of({"adapters": str(tmp_path)})
    with caplog.at_level(logging.WARNING):  # one that came while the server runs
        assert shelf.names() == shelf.names() == ["ada"] and shelf.default() == "ada"
    assert len(caplog.records) == 1 and "rename" in caplog.text
    assert catalog_of({"adapter": str(place)}).names() == ["adapter"]  # as of any folder whose name is none


class Clock:
    """Time that passes where it is said."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_a_listing_is_as_old_as_its_beginning(tmp_path: Path, monkeypatch) -> None:
    """What goes while a folder is being listed is not believed to be there for the listing's time more."""
    clock = Clock()
    monkeypatch.setattr(catalog, "time", clock)
    gone = put(tmp_path / "gone")

    class Slow(Catalog):
        listings = 0

        def _listed(self) -> dict[str, Path]:
            self.listings += 1
            found = super()._listed()
            clock.now += 0.45
            return found

    shelf = Slow(tmp_path)
    assert shelf.names() == ["gone"]
    gone.rename(tmp_path / ".gone")
    clock.now += 0.5  # 0.95 s since the listing began
    assert shelf.names() == ["gone"] and shelf.listings == 1
    clock.now += 0.1
    assert shelf.names() == [] and shelf.listings == 2
    for _ in range(8):  # unknown names, asked for one after the other
        with pytest.raises(UserError, match="there is none of this name"):
            shelf.check("gone")
    assert shelf.listings == 2  # not one for each
    clock.now += 0.5
    with pytest.raises(UserError, match="there is none of this name"):
        shelf.check("gone")
    assert shelf.listings == 3


def test_an_adapter_of_a_hub_has_its_name_there(tmp_path: Path, monkeypatch) -> None:
    """It is fetched once for all workers, which are given its folder."""
    with hf_hub() as hub:
        ask(hub, tmp_path, monkeypatch)
        hub.put("somebody/scottish", dict.fromkeys(FILES, b"{}"))
        options = here({"adapter": "hf:somebody/scottish", "port": 8000})
        seen = len(hub.seen)
        found = catalog_of(options)
        assert found.names() == ["scottish"] and seen == len(hub.seen) and options["port"] == 8000
        assert (found.folder("scottish") / FILES[0]).read_bytes() == b"{}"
        with pytest.raises(UserError, match=r"hf:somebody/none: "):
            here({"adapter": "hf:somebody/none"})
    assert here({"adapters": "hf:no/address"}) == {"adapters": "hf:no/address"}
