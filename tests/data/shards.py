"""Small shards of pictures, each of one colour by which it is known again."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = 3
SIDE = 8


def picture(number: int, form: str = "png") -> bytes:
    """A picture file whose red and green are its number."""
    pixels = np.full((SIDE, SIDE, 3), (number % 256, number // 256, 0), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def number_of(pixels: Any) -> int:
    """The number of a picture, PIL's or (3, height, width)."""
    red, green = (pixels.getpixel((0, 0)) if isinstance(pixels, Image.Image) else pixels[:, 0, 0].tolist())[
        :2
    ]
    return red + 256 * green


def members(number: int) -> dict[str, bytes]:
    """A sample of a tar: what follows the first dot of the name -> content."""
    return {"png": picture(number), "cls": str(number % CLASSES).encode()}


def write_tar(file: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A shard of samples by key."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for key, parts in samples.items():
            for ext, content in parts.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file


def write_tars(
    folder: Path,
    counts: Sequence[int],
    make: Callable[[int], dict[str, bytes]] = members,
    stem: str = "train",
) -> str:
    """Shards of so many samples, numbered through; the pattern that names them."""
    first = 0
    for shard, count in enumerate(counts):
        samples = {f"{n:05d}": make(n) for n in range(first, first + count)}
        write_tar(folder / f"{stem}-{shard:03d}.tar", samples)
        first += count
    return str(folder / f"{stem}-{{000..{len(counts) - 1:03d}}}.tar")


def write_parquet(
    file: Path, numbers: Sequence[int], rows: int, named: bool = True, plain: bool = False
) -> Path:
    """Rows of Hugging Face's layout, `rows` a group; with the classes' names; or plain bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    files = [picture(n) for n in numbers]
    pictures = files if plain else [{"bytes": f, "path": f"{n}.png"} for n, f in zip(numbers, files)]
    table = pa.table({"image": pictures, "label": [n % CLASSES for n in numbers]})
    if named:
        features = {
            "image": {"_type": "Image"},
            "label": {"names": ["cat", "dog", "hen"], "_type": "ClassLabel"},
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=rows)
    return file


def write_litdata(folder: Path, items: Sequence[Any], chunk: int) -> Path:
    """A folder as litdata optimizes one, `chunk` items a chunk."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=chunk)
    for number, item in enumerate(items):
        writer[number] = item
    writer.done()
    writer.merge()
    return folder
