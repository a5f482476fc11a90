"""The gallery has a command for each recipe, and pictures that load fast."""

import re

from pages import DOCS, ROOT

from benchmarks.gallery import GALLERY, MOST_BYTES, PICTURES

TEXT = (DOCS / "gallery.md").read_text(encoding="utf-8")


def test_every_recipe_has_a_command():
    named = {*re.findall(r"^lora-lightning train recipe=(\w+)", TEXT, re.MULTILINE)}
    named |= {"vit_digits"} if re.search(r"^lora-lightning train$", TEXT, re.MULTILINE) else set()
    assert named == {path.stem for path in (ROOT / "recipes" / "recipe").glob("*.yaml")}


def test_every_picture_is_shown():
    shown = re.findall(r"!\[[^]]{20,}\]\(images/gallery/(\w+)\.webp\)", TEXT)
    assert sorted(shown) == sorted(GALLERY) == sorted(path.stem for path in PICTURES.iterdir())


def test_pictures_are_small():
    pictures = [path for path in (DOCS / "images").rglob("*") if path.is_file()]
    assert pictures and all(path.stat().st_size < MOST_BYTES for path in pictures)
