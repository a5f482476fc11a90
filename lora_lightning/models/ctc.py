"""ConformerCTC: a small speech recognizer of torchaudio's Conformer layers, and its builder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from lora_lightning.data.speech import SAMPLE_RATE
from lora_lightning.errors import ConfigError
from lora_lightning.files.weights import load_into
from lora_lightning.models.base_file import Weights, base_file, read_base
from lora_lightning.utils.checks import options_of, require, strays
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import Check, at_least, between, is_whole

with loading("torchaudio"):
    from torchaudio.models.conformer import ConformerLayer
    from torchaudio.transforms import FrequencyMasking, MelSpectrogram, TimeMasking

Network = TypeVar("Network", bound=nn.Module)
Size = Annotated[int, at_least(1)]
Dropout = Annotated[float, at_least(0, below=1, noun="a probability")]
ODD = Check("an odd whole number", lambda v: is_whole(v) and v % 2 == 1 and v > 0)
HOP = 128  # samples a frame of the spectrogram, 8 ms
MELS = 40


class ConformerCTC(nn.Module):
    """Log-mels, two convolutions of stride 2, Conformer layers (Gulati et al. 2020), a linear head.

    Outputs come every 32 ms. Padding changes nothing: an utterance alone and in a padded batch gives the
    same logits. (torchaudio's own layers are not so: their convolutions read what lies behind the end.)

    Args:
        vocabulary: the number of outputs, the blank among them.
        width: of the Conformer layers.
        depth: how many of them.
        heads: of their attention.
        kernel: frames that their depthwise convolutions see; odd.
        dropout: after each part of a layer.
        masks: SpecAugment (Park et al. 2019) in training: this many bands of up to `mask_mels` mels and as
            many stretches of up to `mask_frames` frames are blanked.
        mask_mels: of 40.
        mask_frames: of 8 ms.
    """

    def __init__(
        self,
        vocabulary: int,
        width: Size = 128,
        depth: Size = 2,
        heads: Size = 4,
        kernel: Annotated[int, ODD] = 15,
        dropout: Dropout = 0.0,
        masks: Annotated[int, at_least(0)] = 2,
        mask_mels: Annotated[int, between(0, MELS)] = 6,
        mask_frames: Annotated[int, at_least(0)] = 12,
    ) -> None:
        super().__init__()
        # Zeros at both ends, as behind a shorter utterance in a batch.
        self.spectrogram = _Float32Mels(
            SAMPLE_RATE, 512, 400, HOP, f_min=60.0, f_max=7600.0, n_mels=MELS, power=None, pad_mode="constant"
        )
        self.masks = nn.ModuleList(
            mask
            for _ in range(masks)
            for mask in (
                FrequencyMasking(mask_mels, iid_masks=True),
                TimeMasking(mask_frames, iid_masks=True),
            )
        )
        self.conv1 = nn.Conv1d(MELS, width, 5, stride=2, padding=2)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            PaddedConformerLayer(width, 2 * width, heads, kernel, dropout) for _ in range(depth)
        )
        self.head = nn.Linear(width, vocabulary)

    def get_classifier(self) -> nn.Linear:
        """The output layer, as timm's models name it."""
        return self.head

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, frames, vocabulary), frames (batch,) of waves (batch, samples), lengths (batch,)."""
        x, frames = self.features(waves, lengths)
        return self.head(x), frames

    def features(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What the head sees: (batch, frames, width), and frames (batch,)."""
        x, frames = self.log_mels(waves, lengths)  # (batch, mels, frames)
        if self.training:
            for mask in self.masks:
                x = mask(x[:, None])[:, 0]
        for conv in (self.conv1, self.conv2):
            x = F.gelu(conv(x))
            frames = (frames + 1) // 2
            x = x.masked_fill(beyond(frames, x.shape[-1])[:, None], 0.0)
        x = x.permute(2, 0, 1)  # (frames, batch, width)
        padding = beyond(frames, x.shape[0])
        for layer in self.layers:
            x = layer(x, padding)
        return x.transpose(0, 1), frames

    def log_mels(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, 40, frames) of mean 0 and variance 1 in each utterance, 0 behind it; frames (batch,)."""
        spectrum = self.spectrogram.spectrogram(waves.float())
        power = spectrum.real.square() + spectrum.imag.square()  # faster than torchaudio's abs()
        mels = (self.spectrogram.mel_scale(power) + 1e-6).log()
        frames = lengths // HOP + 1
        padding = beyond(frames, mels.shape[-1])[:, None]
        count = (MELS * frames)[:, None, None]
        mean = mels.masked_fill(padding, 0.0).sum((1, 2), keepdim=True) / count
        centred = (mels - mean).masked_fill(padding, 0.0)
        deviation = (centred.square().sum((1, 2), keepdim=True) / count).sqrt()
        return (centred / (deviation + 1e-3)).to(next(self.parameters()).dtype), frames


class _Float32Mels(MelSpectrogram):
    """torchaudio's, in float32 also where the network is made half precision: no library has a Fourier
    transform in bfloat16."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def kept(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.itemsize >= 4 or not made.is_floating_point() else tensor.to(made.device)

        return super()._apply(kept, recurse)


class PaddedConformerLayer(ConformerLayer):
    """torchaudio's Conformer layer whose depthwise convolution sees zeros behind the end of an utterance."""

    def __init__(self, width: int, hidden: int, heads: int, kernel: int, dropout: float) -> None:
        super().__init__(width, hidden, heads, kernel, dropout)
        self.gate = MaskedGLU(dim=1)
        self.conv_module.sequential[1] = self.gate

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """(frames, batch, width) -> the same; padding (batch, frames) is true behind the end."""
        self.gate.padding = padding
        return super().forward(x, padding)


class MaskedGLU(nn.GLU):
    """A GLU over channels (batch, 2 * channels, frames) that gives zeros in the padding."""

    padding: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(self.padding[:, None], 0.0)


def beyond(lengths: Tensor, size: int) -> Tensor:
    """(batch, size), true from each length on."""
    return torch.arange(size, device=lengths.device) >= lengths[:, None]


@options_of(ConformerCTC)
def conformer_ctc(vocabulary: Sequence[str], checkpoint: Weights = None, **options: float) -> ConformerCTC:
    """A recognizer of these characters, with weights from a file if one is given.

    Args:
        vocabulary: what each output stands for; the first is the blank.
        checkpoint: a .safetensors file, or the name of weights shipped in the package (`conformer_us`).
        **options: of ConformerCTC.

    Raises:
        ConfigError: options that cannot be built.
        MissingFileError: no such checkpoint.
        AdapterFileError: a checkpoint that is damaged, or made for another model.
    """
    require(conformer_ctc, {"checkpoint": checkpoint, **options}, unknown(ConformerCTC, options))
    return built(ConformerCTC, vocabulary, checkpoint, options)


def unknown(kind: type[nn.Module], options: Mapping[str, float]) -> list[str]:
    """One line for each option that a recognizer of this class does not take."""
    known = [name for name in inspect.signature(kind).parameters if name != "vocabulary"]
    return strays(options, known, kind.__name__)


def built(
    kind: type[Network], vocabulary: Sequence[str], checkpoint: Weights, options: Mapping[str, float]
) -> Network:
    """A network of this class, `kind(len(vocabulary), **options)`, with weights from a file if one is given.

    Raises:
        ConfigError, MissingFileError, AdapterFileError: as `conformer_ctc`.
    """
    try:
        model = kind(len(vocabulary), **options)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError([f"{', '.join(f'{k}={v}' for k, v in options.items())}: {error}"]) from error
    if checkpoint is not None:
        path = base_file(checkpoint)
        given = ", ".join(f"{k}={v}" for k, v in options.items()) or "the default options"
        what = f"a recognizer of {len(vocabulary)} characters with {given}"
        remedy = "Give the options that the weights were made with."
        load_into(model, read_base(path), path, what, remedy)
    return model
