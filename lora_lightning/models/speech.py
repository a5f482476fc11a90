"""pretrained_recognizer: torchaudio's wav2vec 2.0, HuBERT and WavLM as CTC recognizers that padding does not
change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lightning.data.pipelines import (
    PIPELINES,
    labels,
    pipeline_name,
    pipeline_state,
    without_unused_outputs,
)
from lora_lightning.errors import ConfigError
from lora_lightning.files.weights import load_into, network_state
from lora_lightning.models.base_file import Weights, base_file, read_base
from lora_lightning.utils.checks import require
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import Check, at_least

with loading("torchaudio"):
    from torchaudio.models import Wav2Vec2Model, wav2vec2_model, wavlm_model
    from torchaudio.models.wav2vec2.wavlm_attention import WavLMSelfAttention

PIPELINE = Check(
    f"a pipeline of torchaudio: {', '.join(PIPELINES)}",
    lambda v: isinstance(v, str) and pipeline_name(v) in PIPELINES,
    tuple(PIPELINES),
)
PROBABILITY = at_least(0, below=1, noun="a probability")
MASKED = -10_000.0  # added to the attention's scores, as torchaudio does; it fits into half precision
TIME_SPAN, CHANNEL_SPAN = 10, 64  # of wav2vec 2.0's masks


class Wav2Vec2CTC(Wav2Vec2Model):
    """torchaudio's model, with its parameters' names, whose outputs do not depend on what an utterance is
    batched with.

    torchaudio's own forward does not promise that: the first convolution of the base models is normalized
    over time, padding included; large models are normalized over the whole batch; WavLM takes no lengths
    at all. Here all statistics are of the utterance alone, and WavLM gets a mask.

    Args:
        base: torchaudio's model.
        normalize: bring each waveform to mean 0 and variance 1, as the large models were trained with.
        freeze_feature_extractor: the convolutions never train, as in all published fine-tuning.
        mask_time: probability that a span of 10 frames begins at a frame, in training (Baevski et al. 2020,
            arXiv 2006.11477: 0.05 for 100 hours, 0.075 for ten minutes). Masked frames become zeros.
        mask_channels: the same for spans of 64 channels (0.004 to 0.008).
    """

    def __init__(
        self,
        base: Wav2Vec2Model,
        normalize: bool = False,
        freeze_feature_extractor: bool = True,
        mask_time: float = 0.0,
        mask_channels: float = 0.0,
    ) -> None:
        super().__init__(base.feature_extractor, base.encoder, base.aux)
        self.normalize = normalize
        self.mask_time, self.mask_channels = mask_time, mask_channels
        if freeze_feature_extractor:
            self.feature_extractor.requires_grad_(False)

    def get_classifier(self) -> nn.Module:
        """The output layer."""
        return self.aux

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (batch, frames, vocabulary) and lengths in frames (batch,).

        Args:
            waveforms: (batch, samples), 16 kHz.
            lengths: (batch,), samples; None means that nothing is padded.
        """
        if lengths is None:
            lengths = torch.full((len(waveforms),), waveforms.shape[1], device=waveforms.device)
        if self.normalize:
            waveforms = normalized(waveforms, lengths)
        features, frames = self._features(waveforms, lengths)
        x = self.encoder.feature_projection(features)
        x = self._masked(x)
        padding = torch.arange(x.shape[1], device=x.device) >= frames[:, None]  # (batch, frames)
        x = x.masked_fill(padding[..., None], 0.0)
        x = self._transformed(x, padding)
        return (x if self.aux is None else self.aux(x)), frames

    def _features(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """torchaudio's feature extractor with the lengths known to its norms."""
        trained = any(p.requires_grad for p in self.feature_extractor.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            x = waves[:, None]  # (batch, channels, frames)
            for block in self.feature_extractor.conv_layers:
                x = block.conv(x)
                lengths = torch.div(lengths - block.kernel_size, block.stride, rounding_mode="floor") + 1
                lengths = lengths.clamp(min=0)
                if isinstance(block.layer_norm, nn.GroupNorm):
                    x = group_norm(block.layer_norm, x, lengths)
                elif block.layer_norm is not None:
                    x = block.layer_norm(x)
                x = F.gelu(x)
            return x.transpose(1, 2), lengths

    def _transformed(self, x: Tensor, padding: Tensor) -> Tensor:
        transformer = self.encoder.transformer
        x = transformer._preprocess(x)
        keys = MASKED * padding.to(x.dtype)  # (batch, frames)
        scores = keys[:, None, None].expand(-1, 1, x.shape[1], -1)
        bias = None
        for layer in transformer.layers:
            drop = self.training and torch.rand(1).item() < transformer.layer_drop
            if drop and not _distributed():
                continue
            if isinstance(layer.attention, WavLMSelfAttention):
                y, bias = layer(x, position_bias=bias, key_padding_mask=keys)
            else:
                y, bias = layer(x, scores, position_bias=bias)
            # A layer that is left out on one process alone would keep the others waiting for its gradients.
            x = torch.where(torch.tensor(drop, device=x.device), x, y) if drop else y
        return x if transformer.layer_norm_first else transformer.layer_norm(x)

    def _masked(self, x: Tensor) -> Tensor:
        """Spans of frames and of channels set to zero, in training."""
        if not self.training:
            return x
        batch, frames, channels = x.shape
        for probability, size, span, axis in (
            (self.mask_time, frames, TIME_SPAN, 2),
            (self.mask_channels, channels, CHANNEL_SPAN, 1),
        ):
            if probability > 0:
                x = x.masked_fill(spans(batch, size, probability, span, x.device).unsqueeze(axis), 0.0)
        return x


def normalized(waves: Tensor, lengths: Tensor) -> Tensor:
    """Each waveform (batch, samples) at mean 0 and variance 1 over its own samples; padding stays 0."""
    valid = torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]
    count = lengths[:, None].clamp(min=1)
    mean = (waves * valid).sum(1, keepdim=True) / count
    centred = (waves - mean) * valid
    variance = centred.square().sum(1, keepdim=True) / count
    return centred / torch.sqrt(variance + 1e-5)


def group_norm(norm: nn.GroupNorm, x: Tensor, lengths: Tensor) -> Tensor:
    """A GroupNorm whose groups are single channels, over the valid frames of each row alone.

    Args:
        norm: with as many groups as channels.
        x: (batch, channels, frames).
        lengths: (batch,), valid frames.
    """
    valid = (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]  # (batch, 1, frames)
    count = lengths[:, None, None].clamp(min=1)
    wide = x.float()
    mean = (wide * valid).sum(2, keepdim=True) / count
    variance = ((wide - mean).square() * valid).sum(2, keepdim=True) / count
    y = ((wide - mean) * torch.rsqrt(variance + norm.eps)).to(x.dtype)
    return y * norm.weight[:, None] + norm.bias[:, None]


def spans(batch: int, size: int, probability: float, span: int, device: torch.device) -> Tensor:
    """True (batch, size) where a span of that many places covers it, each place beginning one with that
    probability."""
    starts = (torch.rand(batch, 1, size, device=device) < probability).float()
    covered = F.max_pool1d(F.pad(starts, (span - 1, 0)), span, stride=1)
    return covered[:, 0].bool()


def pretrained_recognizer(
    name: Annotated[str, PIPELINE],
    vocabulary: Sequence[str] | None = None,
    *,
    pretrained: bool = True,
    checkpoint: Weights = None,
    freeze_feature_extractor: bool = True,
    layer_drop: Annotated[float | None, PROBABILITY] = None,
    mask_time: Annotated[float, PROBABILITY] = 0.065,
    mask_channels: Annotated[float, PROBABILITY] = 0.004,
    **options: Any,
) -> Wav2Vec2CTC:
    """A pipeline of torchaudio as a recognizer: (waves, lengths) -> (logits, lengths in frames).

    Its output layer stays where the vocabulary is the pipeline's own (`data.vocabulary=NAME`), and is a
    fresh one otherwise.

    Args:
        name: a pipeline, such as WAV2VEC2_ASR_BASE_960H, HUBERT_BASE, WAVLM_BASE_PLUS.
        vocabulary: what the outputs stand for; None takes the pipeline's labels.
        pretrained: load the pipeline's weights, from torch's cache or download.pytorch.org.
        checkpoint: a .safetensors file with these names, in place of `pretrained`.
        freeze_feature_extractor: the convolutions never train.
        layer_drop: probability that a layer is left out in training; None takes the pipeline's.
        mask_time, mask_channels: as in `Wav2Vec2CTC`; the defaults are those for 10 hours.
        **options: of torchaudio's `wav2vec2_model` or `wavlm_model`, in place of the pipeline's.

    Raises:
        ConfigError: unknown names and bad values, one line each.
        MissingFileError: weights that are not on this machine and cannot be downloaded now.
        AdapterFileError: a checkpoint that is damaged or does not fit.
    """
    name = pipeline_name(name)
    require(pretrained_recognizer, locals())
    bundle = PIPELINES[name]
    own = labels(name)
    if vocabulary is None and own is None and pretrained:
        vocabulary = []  # there are no data; what else is missing is said below
    params = {**bundle._params, **options}
    if layer_drop is not None:
        params["encoder_layer_drop"] = layer_drop
    keep_head = own is not None and (vocabulary is None or list(vocabulary) == own)
    params["aux_num_out"] = len(own or []) if keep_head else len(vocabulary or []) or None
    state, source = _state(name, checkpoint, pretrained)
    base = _built(name, params)
    if state is not None:
        _load(base, state, source, keep_head)
    return Wav2Vec2CTC(base, bundle._normalize_waveform, freeze_feature_extractor, mask_time, mask_channels)


def _state(name: str, checkpoint: Weights, pretrained: bool) -> tuple[dict[str, Tensor] | None, str]:
    """Weights and where they come from."""
    if checkpoint is not None:
        path = base_file(checkpoint)
        return without_unused_outputs(name, read_base(path)), str(path)
    return (pipeline_state(name), f"the weights of {name}") if pretrained else (None, "")


def _built(name: str, params: Mapping[str, Any]) -> Wav2Vec2Model:
    factory = wavlm_model if PIPELINES[name]._model_type == "WavLM" else wav2vec2_model
    try:
        return factory(**params)
    except Exception as error:  # torchaudio checks options by what Python and torch raise
        raise ConfigError([f"torchaudio cannot build {name}: {error}. Give what it takes."]) from error


def _load(model: Wav2Vec2Model, state: dict[str, Tensor], source: str, keep_head: bool) -> None:
    """All weights or none; without `keep_head` the output layer stays fresh unless it fits."""
    stored, built = network_state(model, state), model.state_dict()
    head = [key for key in built if key.startswith("aux.")]
    fits = all(key in stored and stored[key].shape == built[key].shape for key in head)
    fresh = () if fits or keep_head else ("aux",)
    remedy = "Give the name of the pipeline that the weights were made for."
    load_into(model, stored, source, "the model as it was built", remedy, fresh)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
