"""The store of adapters: names, what is loaded when, what leaves, and what happens while requests run."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from served import digits_base, save_digits
from torch import Tensor, nn

import lora_lightning as ll
from lora_lightning.errors import ConfigError
from lora_lightning.files import pair
from lora_lightning.serving.catalog import FILES, Catalog, UnknownAdapter, UnusableAdapter
from lora_lightning.serving.store import AdapterStore

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, nn.Module]]:
    """A folder of adapters of two kinds, and the models that they make."""
    folder = tmp_path_factory.mktemp("shelf")
    models = {name: save_digits(folder / name, seed) for seed, name in enumerate(["ada", "bob", "cyd"])}
    models["dia"] = save_digits(folder / "dia" / "adapter", 9, rank=3, use_dora=True)  # a run's folder
    return folder, models


def store_of(folder: Path, **options) -> AdapterStore:
    catalog = Catalog(folder)
    return AdapterStore(digits_base(), catalog, **options)


def answers(store: AdapterStore, names: list[str | None], x: Tensor = X) -> Tensor:
    residents = [None if name is None else store.get(name) for name in names]
    with store.mixed(residents), torch.inference_mode():
        return store.model(x)


@torch.inference_mode()
def test_each_sample_is_answered_by_its_adapter(shelf) -> None:
    folder, models = shelf
    store = store_of(folder)
    assert store.catalog.names() == ["ada", "bob", "cyd", "dia"] and not store.residents()
    base = digits_base()
    assert torch.equal(answers(store, [None] * 4), base(X))  # before anything is loaded
    for names in (["ada"] * 4, ["ada", None, "bob", "dia"], ["cyd", "dia", "bob", "bob"], [None] * 4):
        found = answers(store, names)
        for i, name in enumerate(names):
            wanted = (models[name] if name else base)(X)[i]
            torch.testing.assert_close(found[i], wanted, rtol=1e-5, atol=1e-5)
    assert [r.name for r in store.residents()] == ["ada", "cyd", "dia", "bob"]
    with ll.adapters_off(store.model):  # what is at work changes nothing for who does not ask for it
        torch.testing.assert_close(store.model(X), base(X))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../ada", "ada/..", "/etc", "ada/adapter", "a\0da", "ada\n", "ä", "x" * 99, "C:\\ada"],
)
def test_no_path_comes_from_a_name(shelf, name: str) -> None:
    store = store_of(shelf[0])
    with pytest.raises(UnknownAdapter) as told:
        store.get(name)
    assert "is no name of an adapter" in str(told.value) and len(str(told.value).splitlines()) == 1
    assert str(shelf[0]) not in str(told.value) and len(str(told.value)) < 300


def test_unknown_damaged_and_foreign_adapters(shelf, tmp_path: Path) -> None:
    shutil.copytree(shelf[0] / "ada", tmp_path / "broken")
    file = tmp_path / "broken" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    torch.manual_seed(3)
    other = digits_base()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.add_(1)
    ll.inject(other, ll.LoRAConfig(rank=2))
    ll.save_adapter(other, tmp_path / "other_base")
    shutil.copytree(shelf[0] / "bob", tmp_path / "bob")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")  # which no question about it survives
    store = store_of(tmp_path)
    assert store.catalog.names() == ["bob", "broken", "other_base"]
    for first in (False, True):  # checked against the model, and against an adapter of the same plan
        for name in ("broken", "other_base"):
            with pytest.raises(UnusableAdapter) as told:
                store.get(name)
            assert str(tmp_path) not in str(told.value)
        if not first:
            store.get("bob")
    with pytest.raises(UnknownAdapter, match=r"bobb: there is none of this name\. Did you mean 'bob'"):
        store.get("bobb")
    assert [r.name for r in store.residents()] == ["bob"]


def test_the_one_not_used_for_the_longest_time_leaves(shelf) -> None:
    store = store_of(shelf[0], most=2, pinned=["bob"])
    assert [r.name for r in store.residents()] == ["bob"]
    held = store.get("ada")
    store.get("cyd")
    assert [r.name for r in store.residents()] == ["bob", "cyd"]
    with store.mixed([held] * 4), torch.inference_mode():  # who holds it has it still
        torch.testing.assert_close(store.model(X), shelf[1]["ada"](X), rtol=1e-5, atol=1e-5)
    answers(store, ["cyd"] * 4)
    assert len(store.model.lora_state.adapters) == 2  # with the one that changes nothing
    with pytest.raises(ConfigError, match="2 adapters, and most=1"):
        store_of(shelf[0], most=1, pinned=["ada", "bob"])


def test_a_replaced_folder_is_read_again_and_a_removed_one_is_gone(
    shelf, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("lora_lightning.serving.catalog.FRESH", 0)
    monkeypatch.setattr("lora_lightning.serving.catalog.LEAST", 0)
    shutil.copytree(shelf[0] / "ada", tmp_path / "mine")
    store = store_of(tmp_path)
    first = store.get("mine")
    config = tmp_path / "mine" / "adapter_config.json"
    config.write_bytes(config.read_bytes())  # written anew, of the same contents
    assert store.get("mine") is first
    new = save_digits(tmp_path / "mine", 77, rank=4)
    second = store.get("mine")
    assert second is not first and second.digest != first.digest
    with store.mixed([first, second, first, None]), torch.inference_mode():
        found = store.model(X)
    for i, model in enumerate([shelf[1]["ada"], new, shelf[1]["ada"], digits_base()]):
        torch.testing.assert_close(found[i], model(X)[i].detach(), rtol=1e-5, atol=1e-5)
    (tmp_path / "mine" / "adapter_model.safetensors").write_bytes(b"half")
    assert store.get("mine") is second  # until there is one that can be read
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(UnknownAdapter):
        store.get("mine")
    assert not store.residents()


def test_a_removed_one_is_not_answered_by_what_was_there_before_it(shelf, tmp_path: Path) -> None:
    """Of a name that is asked for seldom the adapter in memory may be one that was removed long ago."""
    mine, aside = tmp_path / "mine", tmp_path / ".mine"
    shutil.copytree(shelf[0] / "ada", mine)
    shutil.copytree(shelf[0] / "cyd", tmp_path / "cyd")
    store = store_of(tmp_path)
    store.get("mine")
    shutil.rmtree(mine)
    shutil.copytree(shelf[0] / "bob", mine)  # nobody asks for this one
    assert store.catalog.names() == ["cyd", "mine"]
    mine.rename(aside)
    with pytest.raises(UnknownAdapter, match="adapter=mine: there is none of this name any more"):
        store.get("mine")  # though it is listed
    assert not store.residents()
    aside.rename(mine)
    torch.testing.assert_close(answers(store, ["mine"] * 4), shelf[1]["bob"](X), rtol=1e-5, atol=1e-5)


def test_removed_ones_leave_memory(shelf, tmp_path: Path, monkeypatch) -> None:
    """Also where nobody asks for them any more."""
    monkeypatch.setattr("lora_lightning.serving.catalog.FRESH", 0)
    for name in ("ada", "cyd"):
        shutil.copytree(shelf[0] / name, tmp_path / name)
    store = store_of(tmp_path)
    store.get("ada"), store.get("cyd")
    shutil.rmtree(tmp_path / "ada")
    until = time.monotonic() + 60  # a listing that took long is believed for twice that time
    while len(store.residents()) > 1 and time.monotonic() < until:
        store.get("cyd")
    assert [r.name for r in store.residents()] == ["cyd"]


def test_a_shelf_that_is_away_is_served_from_memory(shelf, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lora_lightning.serving.catalog.FRESH", 0)
    folder = tmp_path / "shelf"
    shutil.copytree(shelf[0] / "ada", folder / "ada")
    store = store_of(folder)
    first = store.get("ada")
    folder.rename(tmp_path / "away")
    assert store.get("ada") is first
    (tmp_path / "away").rename(folder)
    assert store.get("ada") is first


def test_a_file_that_is_put_back_with_its_old_time_is_read_again(shelf, tmp_path: Path) -> None:
    """As `cp -p` and `rsync` do: of the same size, and maybe in the same place of the disk."""
    shutil.copytree(shelf[0] / "ada", tmp_path / "mine")
    store = store_of(tmp_path)
    store.get("mine")
    for name in FILES:
        file = tmp_path / "mine" / name
        before = file.stat()
        file.write_bytes((shelf[0] / "bob" / name).read_bytes())
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        now = file.stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert now.st_size == before.st_size
    torch.testing.assert_close(answers(store, ["mine"] * 4), shelf[1]["bob"](X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("when", ["listed", "configuration read", "tensors read"])
def test_one_that_is_removed_meanwhile_is_unknown_and_not_damaged(
    shelf, tmp_path: Path, monkeypatch, when: str
) -> None:
    shutil.copytree(shelf[0] / "ada", tmp_path / "mine")
    store = store_of(tmp_path)
    assert store.catalog.names() == ["mine"]
    reading = pair.read_tensors

    def removed(path: Path):
        if when == "tensors read":
            found = reading(path)
        shutil.rmtree(tmp_path / "mine")
        return found if when == "tensors read" else reading(path)

    if when == "listed":
        shutil.rmtree(tmp_path / "mine")
    monkeypatch.setattr(pair, "read_tensors", removed)
    with pytest.raises(UnknownAdapter, match="adapter=mine: there is none of this name"):
        store.get("mine")


def test_numbers_in_memory_are_not_those_of_a_file_that_is_written_over(shelf, tmp_path: Path) -> None:
    """As `cp` and `rsync --inplace` write: who maps the file computes with the new bytes, or is killed."""
    for name in ("ada", "bob"):
        shutil.copytree(shelf[0] / name, tmp_path / name)
    store = store_of(tmp_path)
    store.get("ada")
    resident = store.get("bob")  # of a plan that is known: its tensors are taken as they were read
    file = tmp_path / "bob" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:2000] + bytes(file.stat().st_size - 2000))
    with store.mixed([resident] * 4), torch.inference_mode():
        torch.testing.assert_close(store.model(X), shelf[1]["bob"](X).detach(), rtol=1e-5, atol=1e-5)


def test_memory_of_an_adapter_is_that_of_its_file(shelf) -> None:
    store = store_of(shelf[0])
    for name in ("ada", "bob", "dia"):
        folder = store.catalog.folder(name)
        resident, size = store.get(name), (folder / "adapter_model.safetensors").stat().st_size
        assert 0.5 * size < resident.bytes <= size
        update = next(iter(next(iter(resident.parked.updates.values())).values()))
        assert update.lora_A.grad is None and not update.lora_A.requires_grad
    one, other = (
        next(iter(next(iter(store.get(n).parked.updates.values())).values())).__dict__ for n in ("ada", "bob")
    )
    assert one["_forward_hooks"] is other["_forward_hooks"]  # what torch keeps of a module is there once


@pytest.mark.slow
def test_adding_replacing_and_removing_while_requests_run(shelf, tmp_path: Path, monkeypatch) -> None:
    """Every sample is answered by one version of its adapter that was in the folder while it ran."""
    monkeypatch.setattr("lora_lightning.serving.catalog.FRESH", 0.05)
    versions = {"steady": [shelf[1]["ada"]]}
    shutil.copytree(shelf[0] / "ada", tmp_path / "steady")
    ways = {seed: save_digits(tmp_path.parent / f"way{seed}", seed, rank=1 + seed % 2) for seed in range(4)}
    versions["moving"] = list(ways.values())
    wanted = {n: [m(X[:1])[0].detach() for m in models] for n, models in versions.items()}
    store = store_of(tmp_path, most=2)
    end, wrong, done = threading.Event(), [], []

    def ask(*names: str) -> None:
        while not end.is_set():
            try:
                batch = answers(store, [*names], X[:1].expand(len(names), *X.shape[1:]))
            except UnknownAdapter:
                continue
            for name, found in zip(names, batch, strict=True):
                if not any(torch.allclose(found, w, rtol=1e-5, atol=1e-5) for w in wanted[name]):
                    wrong.append((name, found))
                done.append(name)

    asked = (("steady",), ("moving",), ("moving", "steady"), ("steady", "moving", "moving"))
    threads = [threading.Thread(target=ask, args=names) for names in asked]
    for thread in threads:
        thread.start()
    for turn in range(24):
        source, place = tmp_path.parent / f"way{turn % 4}", tmp_path / "moving"
        if turn % 6 == 5:
            shutil.rmtree(place)
        else:  # as save_adapter does: both files are moved into their places
            save_digits(place, turn % 4, rank=1 + turn % 4 % 2)
        assert source.is_dir()
    end.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert done.count("steady") > 50 and done.count("moving") > 10
