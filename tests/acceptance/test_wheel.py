"""The built wheel alone, without the checkout: package data, console command, a run from any folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.terminal import beside_progress

ROOT = Path(__file__).parents[2]
RUN = ["recipe=vit_digits", "debug=fast"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_recipes_and_weights_and_runs_from_any_folder(
    wheel: Path, tmp_path: Path
) -> None:
    """A process in an empty folder: nothing on stderr, nothing but the run folder left."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "lora_lightning" / "data" / "accents" / "scottish-train.opus").is_file()
    assert (site / "lora_lightning" / "models" / "weights" / "conformer_us.safetensors").is_file()
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = "import lora_lightning; print(lora_lightning.__file__)"
    start = f"{where}; from lora_lightning.app.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", start, "train", *RUN],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert beside_progress(run.stderr) == ""
    assert run.stdout.startswith(str(site))
    assert re.search(r"method +test accuracy %", run.stdout)
    assert "LoRA" in run.stdout
    assert (elsewhere / "outputs" / "vit_digits").is_dir()
    assert [path.name for path in elsewhere.iterdir()] == ["outputs"]


@pytest.mark.slow
def test_the_wheel_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    subprocess.run(
        [environment / "bin" / "pip", "install", "-q", f"{wheel}[recipes]"], check=True, capture_output=True
    )
    run = subprocess.run(
        [environment / "bin" / "lora-lightning", "train", *RUN], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"method +test accuracy %", run.stdout)
