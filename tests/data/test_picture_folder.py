"""The pictures of a folder that a detector is shown."""

from pathlib import Path

import pytest
from PIL import Image

from lora_lightning.app.predict_masks import Pictures
from lora_lightning.data.picture_folder import PictureFolder
from lora_lightning.errors import UserError


def test_a_strip_is_named_before_a_model_is_shown_it(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (1, 50)).save(tmp_path / "b.png")
    assert len(PictureFolder(tmp_path)) == 2
    Image.new("RGB", (1, 5000)).save(tmp_path / "c.png")
    with pytest.raises(
        UserError, match=r"more than 50 times as long as wide, .*c\.png; take them away, or cut"
    ):
        PictureFolder(tmp_path)
    index, told, size = Pictures(tmp_path, 32)[2]  # of masks the table says it, and the others are done
    assert (index, size) == (2, None) and told == "1 x 5000 pixels: cut it to 50 times as long as wide."
