"""Pictures with masks: pairs, what values mean, the check, parts, what a model is shown."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lora_lightning.data.findings import DataError
from lora_lightning.data.mask_files import numbered, read_colours
from lora_lightning.data.mask_transforms import PRESETS, TrainingTransform, evaluation_picture
from lora_lightning.data.masks import MasksDataModule
from lora_lightning.errors import ConfigError, MissingFileError
from tests.data.mask_files import COLOURS, NAMES, PALETTE, drawn, save_mask, write_pairs

SMALL = {"image_size": 24, "crop_size": 16, "batch_size": 2, "num_workers": 0}


def masks(root, **options):
    data = MasksDataModule(str(root), **{**SMALL, **options})
    data.prepare_data()
    return data


def names_of(data, part):
    return [pair.picture.name for pair in data.pairs(part)]


@pytest.mark.parametrize("kind", ["palette", "grey", "colour"])
def test_palettes_grey_values_and_colours_mean_the_same(tmp_path, kind):
    write_pairs(tmp_path, 6, kind=kind)
    options = {"class_names": NAMES}
    if kind == "colour":
        lines = [f"{name}: {list(colour)}" for name, colour in zip(NAMES, COLOURS, strict=True)]
        (tmp_path / "colours.yaml").write_text("\n".join([*lines, "ignore: '#ffffff'"]))
        options = {"colours": str(tmp_path / "colours.yaml")}
    data = masks(tmp_path, **options)
    assert data.provides["num_classes"] == 3 and data.provides["class_names"] == NAMES
    assert data.provides.get("palette") == (None if kind == "grey" else PALETTE)
    sizes = set()
    for part in ("train", "val", "test"):
        for pictures, truths, places in [next(iter(getattr(data, f"{part}_dataloader")()))]:
            if part == "train":
                assert pictures.shape == (2, 3, 16, 16) and truths.shape == (2, 16, 16)
                continue
            for picture, truth, place in zip(pictures, truths, places, strict=True):
                name = data.show(part, place)[0]
                wanted = drawn(int(name[-7:-4]), (32, 24) if int(name[-5]) % 2 else (24, 32))[1]
                assert np.array_equal(truth.numpy(), wanted)
                assert min(picture.shape[1:]) == 24 and picture.shape[1:] == truth.shape
                sizes.add(tuple(truth.shape))
    assert sizes <= {(24, 32), (32, 24)}


@pytest.mark.parametrize(
    ("parts", "inner"),
    [(("train", "val", "test"), False), (("train", "test"), False), (("train", "val"), True)],
)
def test_parts_by_folder(tmp_path, parts, inner):
    if inner:
        write_pairs(tmp_path / "x", 4, parts)
        for kind in ("images", "masks"):
            for part in parts:
                (tmp_path / kind).mkdir(exist_ok=True)
                (tmp_path / "x" / part / kind).rename(tmp_path / kind / part)
    else:
        write_pairs(tmp_path, 4, parts)
    data = masks(tmp_path, class_names=NAMES)
    counts = {part: len(data.pairs(part)) for part in ("train", "val", "test")}
    wanted = {
        ("train", "val", "test"): {"train": 4, "val": 4, "test": 4},
        ("train", "test"): {"train": 3, "val": 1, "test": 4},
        ("train", "val"): {"train": 4, "val": 4, "test": 4},
    }
    assert counts == wanted[parts]
    if parts == ("train", "test"):
        assert {"train"} == {p.picture.parts[-3] for p in data.pairs("val")}


def test_the_split_is_the_seeds_and_nothing_is_in_two_parts(tmp_path):
    write_pairs(tmp_path, 20)
    one, same, other = (masks(tmp_path, seed=seed, val_share=0.2, test_share=0.1) for seed in (1, 1, 2))
    parts = [set(names_of(one, part)) for part in ("train", "val", "test")]
    assert [len(p) for p in parts] == [14, 4, 2] and len(set.union(*parts)) == 20
    assert all(names_of(one, p) == names_of(same, p) for p in ("train", "val", "test"))
    assert names_of(one, "val") != names_of(other, "val")


def test_equal_pictures_come_into_one_part(tmp_path):
    """What is trained on is not tested on under another name."""
    write_pairs(tmp_path, 6)
    for kind in ("images", "masks"):
        for n in range(6):
            shutil.copy(tmp_path / kind / f"{n:03d}.png", tmp_path / kind / f"{n:03d}_copy.png")
    for seed in range(3):
        data = masks(tmp_path, seed=seed, val_share=0.2, test_share=0.2)
        parts = [[name[:3] for name in names_of(data, part)] for part in ("train", "val", "test")]
        assert sorted(name for part in parts for name in set(part)) == sorted({n for p in parts for n in p})
        assert [len(part) for part in parts] == [8, 2, 2]


def test_a_picture_in_two_given_parts_is_told_and_kept_in_the_later(tmp_path):
    write_pairs(tmp_path, 3, ("train", "test"))
    for kind in ("images", "masks"):
        shutil.copy(tmp_path / "train" / kind / "000.png", tmp_path / "test" / kind / "other.png")
    with pytest.raises(DataError, match=r"picture that is in two parts +1 +\S+ and \S+ +kept in the later"):
        masks(tmp_path)
    data = masks(tmp_path, strict=False)
    assert [len(data.pairs(part)) for part in ("train", "val", "test")] == [1, 1, 4]


def test_all_pictures_may_be_test_pictures(tmp_path):
    data = masks(write_pairs(tmp_path, 5), class_names=NAMES, test_share=1, strict=False)
    assert len(data.pairs("test")) == len(data.test_set) == 5 and not data.pairs("train")
    assert data.provides["palette"] == PALETTE


def test_a_table_says_files_and_parts(tmp_path):
    write_pairs(tmp_path, 6)
    rows = [
        f"images/{n:03d}.png,masks/{n:03d}.png,{p}" for n, p in enumerate(["train"] * 4 + ["valid", "test"])
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(["path,mask,split", *rows]))
    data = MasksDataModule(table=str(tmp_path / "pairs.csv"), class_names=NAMES, **SMALL)
    assert [len(data.pairs(p)) for p in ("train", "val", "test")] == [4, 1, 1]
    assert data.show("test", 0)[0] == "images/005.png"
    (tmp_path / "pairs.csv").write_text("\n".join(["path,mask,split", *rows, "gone.png,masks/000.png,train"]))
    with pytest.raises(DataError, match=r"row whose file is missing +1 +pairs.csv: line 8: gone.png"):
        MasksDataModule(table=str(tmp_path / "pairs.csv"), class_names=NAMES, **SMALL).prepare_data()
    (tmp_path / "pairs.csv").write_text("picture,mask\na,b")
    with pytest.raises(DataError, match="has no column path, but picture, mask"):
        MasksDataModule(table=str(tmp_path / "pairs.csv"), **SMALL).prepare_data()


def test_everything_wrong_in_one_table(tmp_path, capsys):
    write_pairs(tmp_path, 10)
    at = tmp_path / "masks"
    (at / "000.png").unlink()  # a picture alone
    (tmp_path / "images" / "001.png").unlink()  # a mask alone
    save_mask(drawn(2)[1], at / "002.png")  # lies, where its picture stands
    (at / "003.png").write_bytes(b"no picture")
    (tmp_path / "images" / "004.png").write_bytes(b"")
    unknown = drawn(5)[1]
    unknown[5, 5:9] = 9
    save_mask(unknown, at / "005.png")
    save_mask(np.full((32, 24), 255, np.uint8), at / "006.png")
    Image.fromarray(drawn(7)[1]).save(at / "007.jpg")
    (at / "007.png").unlink()
    with pytest.raises(DataError) as caught:
        masks(tmp_path, class_names=NAMES)
    told = str(caught.value)
    for words in (
        "picture without a mask", "mask without a picture", "mask of another size", "broken mask",
        "empty file", "index that no class has", " masks/005.png: 9, 4 pixels", "mask without a pixel of any",
        "mask as JPEG", "data.strict=false",
    ):  # fmt: skip
        assert words in told, words
    data = masks(tmp_path, class_names=NAMES, strict=False)
    assert "broken mask" in capsys.readouterr().out
    left = sorted(name for part in ("train", "val", "test") for name in names_of(data, part))
    assert left == ["005.png", "008.png", "009.png"]
    legend = numbered(NAMES, 255)
    assert (legend.read(at / "005.png")[5, 5:9] == 255).all(), "unknown indices are ignored"


def test_masks_of_0_and_255_are_told_before_one_class_is_learned(tmp_path):
    write_pairs(tmp_path, 6)
    for number in range(6):
        mask = drawn(number, (32, 24) if number % 2 else (24, 32))[1]
        save_mask(
            np.where(mask == 1, 255, 0).astype(np.uint8), tmp_path / "masks" / f"{number:03d}.png", "grey"
        )
    with pytest.raises(DataError, match=r"hold 0, 255, of which 255 is ignored: that is not two classes"):
        masks(tmp_path)
    (tmp_path / "colours.yaml").write_text("ground: 0\nobject: 255\n")
    data = masks(tmp_path, colours=str(tmp_path / "colours.yaml"))
    truth = data.val_dataloader().dataset[0][1]
    assert data.provides["class_names"] == ["ground", "object"] and truth.unique().tolist() == [0, 1]


def test_names_of_classes_from_a_file_or_by_number(tmp_path):
    write_pairs(tmp_path, 6)
    assert masks(tmp_path).provides["class_names"] == ["0", "1", "2"]
    (tmp_path / "names.txt").write_text("ground\ndisc\n\nbox\nnever seen\n")
    data = masks(tmp_path, class_names=str(tmp_path / "names.txt"))
    assert data.provides["class_names"] == [*NAMES, "never seen"]
    assert "class without a pixel to train on" in data.findings and "3: never seen" in data.findings


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ground: 0\nobject: red", "object='red': give '#rrggbb'"),
        ("ground: '#000000'\nobject: 255", "has colours and grey values"),
        ("ground: 0\nobject: 0", "object: 0 is the value of another name, too"),
        ("ignore: 0", "names 0 classes"),
        ("- ground", "holds no mapping"),
    ],
)
def test_files_of_colours_that_mean_nothing(tmp_path, text, told):
    (tmp_path / "colours.yaml").write_text(text)
    with pytest.raises(Exception, match=told) as caught:
        read_colours(tmp_path / "colours.yaml")
    assert "Give a YAML file" in str(caught.value)


def test_colour_masks_need_a_file_and_unknown_colours_are_counted(tmp_path):
    write_pairs(tmp_path, 6, kind="colour")
    with pytest.raises(DataError, match=r"mask in colours without data\.colours +6"):
        masks(tmp_path)
    (tmp_path / "c.yaml").write_text("ground: '#000000'\ndisc: ['#c81e1e', [1, 2, 3]]\nignore: '#ffffff'\n")
    with pytest.raises(DataError, match=r"colour that no class has +6 +masks/000.png: #1e1ec8, "):
        masks(tmp_path, colours=str(tmp_path / "c.yaml"))


def test_folders_and_names_that_do_not_fit_are_named_with_the_near_miss(tmp_path):
    write_pairs(tmp_path, 3, suffix="_mask")
    with pytest.raises(DataError, match=r"of 3 pictures and 3 masks.*Did you mean data\.mask_suffix=_mask\?"):
        masks(tmp_path)
    assert len(masks(tmp_path, mask_suffix="_mask").pairs("train")) == 1
    (tmp_path / "masks").rename(tmp_path / "mask")
    with pytest.raises(MissingFileError, match=r"no folder masks.* Did you mean 'mask'.*data\.masks=NAME"):
        masks(tmp_path, mask_suffix="_mask")
    with pytest.raises(MissingFileError, match="there is no such folder"):
        masks(tmp_path / "photos")


def test_options_that_do_not_go_together():
    with pytest.raises(ConfigError) as caught:
        MasksDataModule(
            class_names=["a"], colours="c.yaml", val_share=0.5, test_share=0.5, crop_size=4, augment="crop"
        )
    told = str(caught.value)
    for words in (
        "root and table",
        "class_names: colours=FILE",
        "test_share=0.5",
        "crop_size=4",
        "augment='crop'",
    ):
        assert words in told


def test_a_batch_that_training_cannot_fill_is_refused(tmp_path):
    data = masks(write_pairs(tmp_path, 6), batch_size=8)
    with pytest.raises(
        ConfigError, match=r"batch_size=8: 4 training pictures a process do not fill .*give 4"
    ):
        data.train_dataloader()


def test_pictures_turned_by_exif_fit_masks_as_they_are_seen(tmp_path):
    write_pairs(tmp_path, 6)
    picture, mask = drawn(0, (24, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned to the right
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "images" / "000.png", exif=exif)
    data = masks(tmp_path, val_share=0.8, test_share=0.0, image_size=None)
    place = names_of(data, "val").index("000.png") if "000.png" in names_of(data, "val") else None
    shown, truth, _ = (
        data.val_dataloader().dataset if place is not None else data.test_dataloader().dataset
    )[place or 0]
    assert shown.shape[1:] == truth.shape == mask.shape
    assert np.array_equal(shown.permute(1, 2, 0).numpy(), np.asarray(picture))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_picture_and_its_mask_move_together(preset):
    """The picture shows the class of each pixel in its red channel, as far as colours are left alone."""
    mask = torch.from_numpy(drawn(3, (64, 48))[1])
    picture = torch.stack([torch.where(mask == 255, 124, mask * 100)] * 3).to(torch.uint8)
    torch.manual_seed(0)
    seen = []
    for _ in range(6):
        shown, moved = TrainingTransform(preset, 48, 40)(picture, mask)
        assert (
            shown.shape == (3, 40, 40)
            and moved.shape == (40, 40)
            and shown.dtype == moved.dtype == torch.uint8
        )
        seen.append(moved)
        if preset == "photometric":
            continue
        red = shown[0].int()
        known = moved != 255
        # Edges are blended where the picture is resized, and masks are not.
        agree = ((red - moved.int() * 100).abs() < 25) | ~known
        assert agree.float().mean() > (0.8 if preset == "scale" else 0.9999)
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


def test_what_a_picture_lacks_of_a_crop_is_ignored():
    picture, mask = torch.zeros(3, 24, 32, dtype=torch.uint8), torch.zeros(24, 32, dtype=torch.uint8)
    shown, moved = TrainingTransform("none", None, 40)(picture, mask)
    assert (moved == 0).sum() == 24 * 32 and (moved == 255).sum() == 40 * 40 - 24 * 32
    assert (shown[:, moved == 255] == torch.tensor([[124], [116], [104]])).all()


def test_evaluation_keeps_the_shape_of_a_picture():
    picture = torch.zeros(3, 30, 45, dtype=torch.uint8)
    assert evaluation_picture(picture, 20).shape == (3, 20, 30)
    assert torch.equal(evaluation_picture(picture, None), picture)
