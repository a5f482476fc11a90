"""Pictures of one's own in folders: found, checked, split by class and group, and lost later."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_lightning.data import picture_check
from lora_lightning.data.findings import DataError, Findings
from lora_lightning.data.folder_parts import grouped
from lora_lightning.data.image_folder import ImageFolderDataModule
from lora_lightning.data.picture_files import picture_files
from lora_lightning.data.picture_rows import PictureRow
from lora_lightning.data.picture_split import split
from lora_lightning.data.pictures import PARTS
from lora_lightning.errors import ConfigError, MissingFileError
from tests.data.drawn import folders, photo


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def photos(tmp_path) -> Path:
    return folders(tmp_path / "photos", {"disc": 20, "square": 10, "triangle": 4})


def module(root: Path, **options) -> ImageFolderDataModule:
    data = ImageFolderDataModule(**{"root": str(root), "num_workers": 0, "image_size": 16, **options})
    data.setup()
    return data


def names(data: ImageFolderDataModule, part: str) -> list[str]:
    pictures = data.part(part)
    return [pictures.name(i) for i in range(len(pictures))]


def everything(data: ImageFolderDataModule) -> dict[str, list[str]]:
    return {part: names(data, part) for part in PARTS}


def test_folders_are_classes_and_each_is_split_alike(photos):
    data = module(photos)
    facts = {"num_classes": 3, "class_names": ["disc", "square", "triangle"], "target": "class"}
    assert data.provides == facts
    assert {p: torch.bincount(data.part(p).targets).tolist() for p in PARTS} == {
        "train": [16, 8, 2], "val": [2, 1, 1], "test": [2, 1, 1],
    }  # fmt: skip
    assert len({name for found in everything(data).values() for name in found}) == 34
    for part in PARTS:
        for name, target in zip(names(data, part), data.part(part).targets, strict=True):
            assert name.split("/")[0] == data.class_names[target]
    assert data.findings == ""


def test_batches(photos):
    data = module(photos, batch_size=8)
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 16, 16) and images.dtype == torch.uint8
    assert targets.dtype == torch.int64
    assert [len(t) for _, t in data.train_dataloader()] == [8, 8, 8]  # of 26
    assert [len(t) for _, t in data.test_dataloader()] == [4]


def test_the_split_follows_the_seed_and_few_move_when_pictures_are_added(photos):
    before = everything(module(photos))
    assert everything(module(photos)) == before
    assert everything(module(photos, seed=1)) != before
    photo("disc", 777).save(photos / "disc" / "new.png")
    after = everything(module(photos))
    moved = [name for part in PARTS for name in before[part] if name not in after[part]]
    assert len(moved) <= 2


@pytest.mark.parametrize(
    "words", [("train", "val", "test"), ("Training", "valid", "Testing"), ("train", "dev", "test")]
)
def test_parts_that_are_given_hold(tmp_path, words):
    counts = {
        f"{word}/{kind}": n for word, n in zip(words, (4, 2, 3), strict=True) for kind in ("disc", "square")
    }
    data = module(folders(tmp_path, counts))
    assert [len(data.part(p)) for p in PARTS] == [8, 4, 6]
    assert all(name.startswith(words[1]) for name in names(data, "val"))


@pytest.mark.parametrize(("given", "lacks"), [("val", "test"), ("test", "val")])
def test_the_training_part_gives_its_share_for_what_lacks(tmp_path, given, lacks):
    data = module(
        folders(tmp_path, {"train/disc": 10, "train/square": 10, f"{given}/disc": 3, f"{given}/square": 3})
    )
    assert len(data.part(given)) == 6
    assert [n.split("/")[:2] for n in names(data, lacks)] == [["train", "disc"], ["train", "square"]]
    assert len(data.train_set) == 18


def test_shares_of_nothing_and_of_all(photos):
    data = module(photos, test_share=0)
    assert names(data, "test") == names(data, "val")
    assert len(module(photos, test_share=1).test_set) == 34


def test_a_group_is_in_one_part(tmp_path):
    for number in range(60):
        file = tmp_path / ("disc", "square")[number % 2] / f"patient{number // 6}_{number}.png"
        file.parent.mkdir(exist_ok=True)
        photo(file.parent.name, number).save(file)
    data = module(tmp_path, group=r"(patient\d+)_", val_share=0.2, test_share=0.2)
    of = {p: {name.split("/")[1].split("_")[0] for name in names(data, p)} for p in PARTS}
    assert [len(of[p]) for p in PARTS] == [6, 2, 2]
    assert sum(len(found) for found in of.values()) == 10  # none in two
    for part in PARTS:
        assert torch.bincount(data.part(part).targets).tolist() == [3 * len(of[part])] * 2
    assert not any("patient" in line for line in data.findings.splitlines())


@pytest.mark.parametrize(
    ("group", "match"),
    [
        (
            "person",
            "group=person: is no column of a table, and as a regular expression matches no file's name",
        ),
        ("(", r"group=\(: is no column of the table, and no regular expression"),
        ("disc|square|tri|png", "group: finds"),
    ],
)
def test_groups_that_are_none(photos, group, match):
    if group.startswith("disc"):
        group = "png"
    with pytest.raises(ConfigError, match=match):
        module(photos, group=group)


def messy(root: Path) -> Counter[str]:
    """Two sound classes, and everything that a folder of photographs may hold; what is to be found."""
    folders(root, {"disc": 9, "square": 9})
    disc, square = root / "disc", root / "square"
    whole = (disc / "0.png").read_bytes()
    (disc / "half.png").write_bytes(whole[:-30])
    (disc / "empty.jpg").write_bytes(b"")
    (disc / "page.jpg").write_bytes(b"<html>")
    (disc / "phone.HEIC").write_bytes(b"x")
    (disc / "clip.mp4").write_bytes(b"x")
    (root / "loose.png").write_bytes((disc / "1.png").read_bytes())
    (root / "notes.txt").write_text("x")
    (disc / "dead.jpg").symlink_to(root / "nowhere.jpg")
    (square / "again.png").write_bytes((square / "1.png").read_bytes())
    (square / "disc.png").write_bytes((disc / "2.png").read_bytes())
    (root / "Disc").mkdir()
    photo("disc", 5000).convert("L").save(root / "Disc" / "Größe – 日本.png")
    photo("disc", 5001).convert("CMYK").save(disc / "print.tif")
    (root / "nothing").mkdir()
    for silent in (".DS_Store", "disc/Thumbs.db", "disc/._0.png", "square/desktop.ini"):
        (root / silent).write_bytes(b"x")
    (root / "__MACOSX").mkdir()
    photo("disc", 5002).save(root / "__MACOSX" / "0.png")
    (disc / "more").mkdir()
    photo("disc", 5003).save(disc / "more" / "deeper.WEBP", "WEBP", lossless=True)
    (disc / "more" / "loop").symlink_to(disc)
    return Counter(
        {
            "truncated picture": 1, "empty file": 1, "file that is no picture": 1,
            "picture in HEIC, which cannot be read": 1, "other file (.mp4)": 1, "other file (.txt)": 1,
            "picture in no class's folder": 1, "link that leads nowhere": 1, "picture that is there twice": 1,
            "picture that has two labels": 1, "class whose name differs in case or blanks alone": 1,
            "grey picture": 1, "CMYK picture": 1, "class folder without a picture": 1,
        }
    )  # fmt: skip


def test_one_table_of_all_that_is_wrong(tmp_path):
    tmp_path = tmp_path / "photos"
    expected = messy(tmp_path)
    with pytest.raises(DataError) as error:
        module(tmp_path)
    told = str(error.value)
    rows = [re.split(" {2,}", line) for line in told.splitlines()]
    found = Counter({row[0]: int(row[1]) for row in rows if row[0] in expected})
    assert found == expected
    assert "data.strict=false" in told
    data = module(tmp_path, strict=False)
    assert data.findings in told
    assert data.class_names == ["disc", "square"]
    kept = [name for found in everything(data).values() for name in found]
    assert len(kept) == 9 + 9 - 1 + 4  # but the one of two labels; Größe, print, deeper and again
    assert {"Disc/Größe – 日本.png", "disc/more/deeper.WEBP", "disc/print.tif", "square/again.png"} < set(
        kept
    )


def test_what_systems_leave_behind_is_not_predicted_either(tmp_path):
    messy(tmp_path)
    found = picture_files(tmp_path)[1]
    assert "disc/more/deeper.WEBP" in found and "Disc/Größe – 日本.png" in found
    assert not any("._" in name or "__MACOSX" in name for name in found)


def test_a_folder_that_cannot_be_opened_is_told(photos, monkeypatch):
    opened = os.scandir

    def scandir(place):
        if str(place).endswith("triangle"):  # a number, where shutil removes a folder
            raise PermissionError(13, "Permission denied", str(place))
        return opened(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"folder that cannot be opened +1 +.*triangle: Permission denied"):
        module(photos)


def test_harmless_findings_stop_nothing(photos):
    photo("disc", 9000).convert("L").save(photos / "disc" / "grey.png")
    assert "grey picture" in module(photos).findings


def test_equal_pictures_come_into_one_part(photos):
    for number in range(8):
        (photos / "disc" / f"copy{number}.png").write_bytes((photos / "disc" / f"{number}.png").read_bytes())
    places = {name.split("/")[1]: p for p, found in everything(module(photos)).items() for name in found
              if name.startswith("disc")}  # fmt: skip
    assert all(places[f"copy{n}.png"] == places[f"{n}.png"] for n in range(8))
    assert set(places.values()) == set(PARTS)


def test_a_picture_in_two_given_parts_is_told_and_kept_in_the_later(tmp_path):
    folders(tmp_path, {f"{p}/{k}": 4 for p in PARTS for k in ("disc", "square")})
    (tmp_path / "train" / "disc" / "leak.png").write_bytes(
        (tmp_path / "test" / "disc" / "0.png").read_bytes()
    )
    with pytest.raises(
        DataError, match=r"picture that is in two parts +1 +test/disc/0.png and train/disc/leak.png"
    ):
        module(tmp_path)
    data = module(tmp_path, strict=False)
    assert "train/disc/leak.png" not in names(data, "train") and "test/disc/0.png" in names(data, "test")


def test_classes_that_a_part_lacks(tmp_path):
    folders(tmp_path, {"train/disc": 4, "train/square": 4, "val/disc": 2, "test/disc": 2, "test/moon": 2})
    with pytest.raises(DataError, match=r"picture of a class that train has not +2 +test/moon"):
        module(tmp_path)
    data = module(tmp_path, strict=False)
    assert data.class_names == ["disc", "square"]
    assert "class without a picture in val" in data.findings and len(data.test_set) == 2


def test_names_of_classes(tmp_path):
    folders(tmp_path, {"10": 5, "9": 5, "2": 5})
    assert module(tmp_path).class_names == ["2", "9", "10"]
    assert module(tmp_path, classes=["9", "10", "2"]).class_names == ["9", "10", "2"]
    with pytest.raises(DataError, match=r"picture of a class that data.classes has not +5 "):
        module(tmp_path, classes=["9", "10"])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        ({}, MissingFileError, ["root=", "does not exist", "Did you mean 'photos'"]),
        ({"photo": 3}, DataError, ["no folders", "photo/cat/1.jpg"]),
        ({"photo/photo/disc": 3, "photo/photo/square": 3}, DataError, ["one class alone, 'photo'"]),
        ({"photo/disc": 3}, DataError, ["one class alone, 'disc'"]),
        ({"photo/disc": 1, "photo/square": 1}, DataError, ["of 2 pictures none is left for val and test"]),
    ],
)
def test_folders_that_are_none(tmp_path, make, error, words):
    (tmp_path / "photos").mkdir()
    folders(tmp_path, make)
    with pytest.raises(error) as caught:
        module(tmp_path / "photo")
    assert all(word in str(caught.value) for word in words), caught.value


def test_options_that_do_not_go_together():
    with pytest.raises(ConfigError) as error:
        ImageFolderDataModule(target="classes", label="x", test_share=0.5, val_share=0.6, shots=0, seed=-1)
    told = "\n".join(error.value.problems)
    for words in ("root=null", "target=classes", "label=x", "test_share=0.5", "shots=0", "seed=-1"):
        assert words in told


def test_what_was_seen_is_kept_until_a_file_changes(photos, monkeypatch):
    seen: list[str] = []
    look = picture_check.problems_of
    monkeypatch.setattr(
        picture_check, "problems_of", lambda file, whole: (seen.append(file), look(file, whole))[1]
    )
    module(photos)
    assert len(seen) == 34
    module(photos)
    assert len(seen) == 34
    file = photos / "disc" / "0.png"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"truncated picture +1 +disc/0.png"):
        module(photos)
    assert len(seen) == 35


def test_of_many_pictures_heads_and_ends_are_looked_at(photos, monkeypatch):
    monkeypatch.setattr(picture_check, "DECODED", 10)
    wholes = set()
    look = picture_check.problems_of
    monkeypatch.setattr(
        picture_check, "problems_of", lambda file, whole: (wholes.add(whole), look(file, whole))[1]
    )
    module(photos)
    assert wholes == {False}


def test_a_picture_lost_later_is_replaced_and_told_once(photos, capfd):
    data = module(photos, batch_size=4, augment={"crop_scale": None, "hflip": 0})
    files = data.train_set.files
    for gone in (3, 7):
        os.remove(files[gone])
    shown = data.train_dataloader().dataset.dataset
    assert torch.equal(shown[3][0], shown[4][0]) and shown[3][1] == data.train_set.targets[4]
    assert len([shown[i] for i in range(len(shown))]) == 26
    told = capfd.readouterr().err
    assert told.count("cannot be read as a picture") == 1 and files[3] in told
    data.teardown("fit")
    assert "2 of 26 train pictures could not be read" in capfd.readouterr().out
    assert "cannot be read any more" in data.show("train", 3)[0]
    for file in files:
        Path(file).unlink(missing_ok=True)
    with pytest.raises(DataError, match="look whether the files are still there"):
        shown[0]


def test_show_gives_the_picture_as_it_is_on_the_disk(photos):
    data = module(photos)
    name, picture = data.show("test", 0)
    assert name == names(data, "test")[0]
    assert picture.tobytes() == Image.open(photos / name).tobytes()


def test_a_class_of_few_pictures_keeps_one_to_train_on():
    """Rounded shares of three pictures would take all of them."""
    parts = split(
        list("abcdefghi"), [(k,) for k in "xxxyyyzz!"], list("abcdefghi"), {"val": 0.5, "test": 0.4}, 0
    )
    assert all(parts[a:b].count("train") == 1 for a, b in ((0, 3), (3, 6), (6, 8), (8, 9)))


def test_alternatives_of_a_group_are_not_one_group():
    """Of a pattern of two groups the one that matched counts; a match of nothing is no group."""
    rows = [PictureRow("", name, ("x",)) for name in ("a1_.png", "a2_.png", "b1-.png", "b2-.png", "c.png")]
    findings = Findings("the pictures")
    found = grouped(rows, r"(\w)\d_|(\w)\d-|c()", findings)
    assert [row.group for row in found] == ["a", "a", "b", "b", ""]
    assert findings.count("picture that data.group does not match") == 1
