"""A run's folder of somebody else, and the marker that no payload may create."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from small import mlp

import lora_lightning as ll


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = mlp()
    ll.inject(model, ll.LoRAConfig(rank=2))
    ll.save_adapter(model, folder)
    return folder


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def run(tmp_path: Path, adapter: Path) -> Path:
    """A run's folder with an adapter in it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(adapter)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def resolver() -> Any:
    """What a plugin or a script may have registered."""
    OmegaConf.register_new_resolver("evil", lambda path: open(path, "w").close() or 1, replace=True)
    yield
    OmegaConf.clear_resolver("evil")
