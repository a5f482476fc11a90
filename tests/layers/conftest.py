"""What several tests of layers ask for."""

import pytest

from lora_lightning.layers.folding import NormBehind


@pytest.fixture
def folded(monkeypatch):
    """How many convolutions have handed their output over."""
    count, plain = [], NormBehind.hand_over
    monkeypatch.setattr(NormBehind, "hand_over", lambda self, y: count.append(1) or plain(self, y))
    return count
