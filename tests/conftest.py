"""Settings for every test: one thread, a fixed seed, quiet Lightning."""

import logging
import warnings

import pytest
import torch

from lora_lightning.kernels import common, conv_form, linear_form, sources

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _made_again(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are made again in the backward, and the functions taken, whatever the sizes: those of most tests
    are small."""
    if not request.node.get_closest_marker("shipped_threshold"):
        monkeypatch.setattr(sources, "LEAST", 0)
        monkeypatch.setattr(sources, "LEAST_OFF_CPU", 0)
        monkeypatch.setattr(linear_form, "LARGEST", 1e9)
        monkeypatch.setattr(linear_form, "SMALL", 0)
        monkeypatch.setattr(conv_form, "SMALL", 0)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


@pytest.fixture
def off_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes, on a CPU."""
    monkeypatch.setattr(common, "on_cpu", lambda device: False)


@pytest.fixture
def drops_alike(monkeypatch):
    """Every dropout drops the same entries of a tensor of one shape, whoever draws them."""

    def mask(x):
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) < 0.6

    def dropout(x, p=0.5, training=True, inplace=False):
        return x * mask(x) / (1 - p) if training and p else x

    for module in ("conv", "functional"):
        monkeypatch.setattr(f"lora_lightning.kernels.{module}.keep_mask", lambda x, p: mask(x))
    monkeypatch.setattr("torch.nn.functional.dropout", dropout)
    return dropout


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without -m, slow and GPU tests are skipped by name, so that the summary counts them."""
    if config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run with -m gpu"))
