"""A run that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_lightning.app.application import main


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run with LoRA."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quick = ["debug=fast", "trainer.enable_progress_bar=false", "logger=none", "lora.rank=2"]
        main(["recipe=vit_digits", *quick, "optim.lr=1e-2", "hydra.run.dir=lora"])
    return folder / "lora"
