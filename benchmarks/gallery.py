"""Makes the pictures of docs/gallery.md anew: runs recipes on embedded data and cuts out of what they leave.

    python -m benchmarks.gallery [NAME ...]        # all of them, or these; runs that are there are kept

Writes docs/images/gallery/NAME.webp from what stands in build/gallery/NAME/. Needs chromium and playwright.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
RUNS, PICTURES = ROOT / "build" / "gallery", ROOT / "docs" / "images" / "gallery"
MOST_BYTES = 100_000
CLASSES = ("background", "disc", "square", "triangle")
CPU = ("trainer=cpu", "trainer.precision=32-true", "logger=csv", "data.num_workers=0")
SEGMENTER = ("model=timm_segmenter", "model.name=resnet18", "model.pretrained=false", "method=full")


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        run: the command's words, after `lora-lightning train`.
        part: a file of the run's folder: a page, or a picture.
        heading: how a heading of that page begins, whose section is the picture; "" takes the file itself.
        height: pixels of the section at most, from its top, 0 for all.
        width: pixels of the page.
        before: makes what the run needs, in the folder where it runs.
    """

    run: tuple[str, ...]
    part: str = "report.html"
    heading: str = ""
    height: int = 0
    width: int = 900
    before: Callable[[Path], None] | None = None


def masks(folder: Path, count: int = 60) -> None:
    """Pictures of shapes and their masks: each pixel of the shape around it whose colour it has."""
    from lora_lightning.data.shapes import Shapes  # loads torch, which not every picture needs

    for name in ("images", "masks"):
        (folder / "shapes" / name).mkdir(parents=True, exist_ok=True)
    shapes = Shapes("source", "train", count, side=128)
    for index in range(count):
        image, target = shapes[index]
        pixels = (image * 255).round().to(int).permute(1, 2, 0).numpy()  # (side, side, 3)
        mask = np.zeros(pixels.shape[:2], np.uint8)
        nearest = abs(pixels - pixels[0, 0]).sum(2)  # to the ground's colour
        for (x1, y1, x2, y2), label in zip(target["boxes"].int().tolist(), target["labels"], strict=True):
            colour = pixels[(y1 + y2) // 2, (x1 + x2) // 2]
            away = abs(pixels - colour).sum(2)
            own = np.zeros_like(mask, bool)
            own[y1:y2, x1:x2] = (away < nearest)[y1:y2, x1:x2]
            mask[own], nearest[own] = int(label), away[own]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "shapes" / "images" / f"{index:03}.png")
        Image.fromarray(mask).save(folder / "shapes" / "masks" / f"{index:03}.png")


GALLERY = {
    "vit_digits": Picture(
        ("recipe=vit_digits", "compare=[]"), heading="Wrong before, right after", height=465
    ),
    "compare_digits": Picture(("recipe=vit_digits",), heading="Scores in validation", height=385),
    "fcos_shapes": Picture(("recipe=fcos_shapes", "compare=[]"), "contact_sheet.png"),
    "accent_espeak": Picture(
        ("recipe=accent_espeak", "compare=[]"), "scottish/report.html", "scottish: the worst",
        height=460, width=1000,
    ),
    "segment_folder": Picture(
        (
            "recipe=segment_folder", "data.root=shapes", f"data.class_names=[{','.join(CLASSES)}]",
            "data.image_size=96", "data.crop_size=96", "trainer.max_epochs=12", *SEGMENTER, *CPU,
        ), "contact_sheet.png", before=masks,
    ),
}  # fmt: skip


def main(names: list[str]) -> None:
    """Make these pictures, or all."""
    for name in names or GALLERY:
        run(name, GALLERY[name])
        image = made(RUNS / name, GALLERY[name])
        image = image.convert("RGB")
        image.thumbnail((1000, 1000))
        write(image, PICTURES / f"{name}.webp")


def run(name: str, picture: Picture) -> None:
    """Run the recipe, unless its folder is there."""
    if (RUNS / name).exists():
        return
    work = RUNS / f"{name}-unfinished"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if picture.before is not None:
        picture.before(work)
    program = Path(sys.executable).with_name("lora-lightning")
    command = [str(program), "train", *picture.run, "hydra.run.dir=run"]
    print(" ".join(["lora-lightning", *command[1:]]), flush=True)
    subprocess.run(command, cwd=work, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    shutil.move(work / "run", RUNS / name)
    shutil.rmtree(work)


def made(folder: Path, picture: Picture) -> Image.Image:
    """The picture as it stands in the run's folder."""
    path = folder / picture.part
    return section(path, picture) if picture.heading else Image.open(path)


def section(path: Path, picture: Picture) -> Image.Image:
    """A section of a page as a browser shows it."""
    from playwright.sync_api import sync_playwright

    heading, height, width = picture.heading, picture.height, picture.width

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 1000})
        page.goto(path.resolve().as_uri())
        page.wait_for_load_state("networkidle")
        headings = page.locator("h2")
        texts = [text.strip() for text in headings.all_inner_texts()]
        place = next((i for i, text in enumerate(texts) if text.startswith(heading)), None)
        if place is None:
            raise SystemExit(f"{path} has no section {heading!r}, but {', '.join(texts)}.")
        tops = headings.evaluate_all("all => all.map(h => h.getBoundingClientRect().y)")
        ends = [*tops[1:], page.evaluate("document.documentElement.scrollHeight")]
        top, end = tops[place], ends[place]
        box = {"x": 0, "y": top - 10, "width": width, "height": min(end - top, height or end - top)}
        shot = page.screenshot(clip=box, full_page=True)
        browser.close()
    return Image.open(io.BytesIO(shot))


def write(image: Image.Image, path: Path) -> None:
    """As WebP, of the best quality that is small enough."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for quality in range(85, 20, -10):
        image.save(path, quality=quality, method=6)
        if path.stat().st_size < MOST_BYTES:
            break
    print(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
