"""ConformerCTC: padding changes nothing, lengths are exact, LoRA fits, weights are read whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_lightning as ll
from lora_lightning.data.accents import VOCABULARY
from lora_lightning.errors import AdapterFileError, ConfigError, MissingFileError
from lora_lightning.models.ctc import HOP, conformer_ctc

SMALL = {"width": 32, "depth": 2}
LENGTHS = [16_000, 9_999, 20_480, 401, 1]


def padded(lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    waves = [0.1 * torch.randn(n) for n in lengths]
    return waves, torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)


@pytest.mark.parametrize("adapted", [False, True])
def test_padding_changes_nothing(adapted: bool) -> None:
    model = conformer_ctc(VOCABULARY, **SMALL)
    for norm in [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]:
        norm.running_mean.normal_()  # statistics that a shift by padding would show in
        norm.bias.data.normal_()
    if adapted:
        ll.inject(model, ll.LoRAConfig(rank=4, target_modules="all"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    model.eval()
    waves, batch = padded(LENGTHS)
    with torch.no_grad():
        together, frames = model(batch, torch.tensor(LENGTHS))
        for i, wave in enumerate(waves):
            alone, own = model(wave[None], torch.tensor([len(wave)]))
            assert alone.shape[1] == own.item() == frames[i].item()
            torch.testing.assert_close(together[i, : own.item()], alone[0], rtol=0, atol=1e-5)


def test_frames_are_counted_exactly() -> None:
    model = conformer_ctc(VOCABULARY, **SMALL).eval()
    for samples in [*range(1, 4 * HOP + 2, 37), 4 * HOP, 8 * HOP, 15_999]:
        logits, frames = model(torch.zeros(1, samples), torch.tensor([samples]))
        assert logits.shape == (1, frames.item(), len(VOCABULARY))


def test_specaugment_in_training_alone() -> None:
    model = conformer_ctc(VOCABULARY, **SMALL, dropout=0.0)
    waves, lengths = torch.randn(2, 8000), torch.tensor([8000, 8000])
    for norm in [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]:
        norm.eval()
        norm.train = lambda mode=True, norm=norm: norm  # only the masks shall differ
    first, second = (model.train()(waves, lengths)[0] for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (model.eval()(waves, lengths)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_gradients_reach_every_parameter() -> None:
    model = conformer_ctc(VOCABULARY, **SMALL)
    logits, _ = model(torch.randn(2, 8000), torch.tensor([8000, 7000]))
    logits.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_shipped_base() -> None:
    model = conformer_ctc(VOCABULARY, checkpoint="conformer_us")
    assert 500_000 < sum(p.numel() for p in model.parameters()) < 1_500_000


def test_weights_fit_or_are_refused(tmp_path: Path) -> None:
    model = conformer_ctc(VOCABULARY, **SMALL)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    again = conformer_ctc(VOCABULARY, checkpoint=str(tmp_path / "m.safetensors"), **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(AdapterFileError, match=r"does not fit.*29 characters.*width=32"):
        conformer_ctc(VOCABULARY, checkpoint=str(tmp_path / "m.safetensors"), width=32, depth=3)
    with pytest.raises(MissingFileError, match="conformer_us"):
        conformer_ctc(VOCABULARY, checkpoint="conformer_uk", **SMALL)
    with pytest.raises(ConfigError, match="kernel"):
        conformer_ctc(VOCABULARY, kernel=4)


def test_half_precision_hears_nearly_the_same() -> None:
    model = conformer_ctc(VOCABULARY, **SMALL).eval()
    _, waves = padded(LENGTHS)
    exact, frames = model(waves, torch.tensor(LENGTHS))
    half = model.bfloat16()
    assert half.spectrogram.spectrogram.window.dtype == torch.float32
    found, own = half(waves, torch.tensor(LENGTHS))
    assert found.dtype == torch.bfloat16 and torch.equal(own, frames)
    assert (found.float() - exact).norm() < 0.1 * exact.norm()
