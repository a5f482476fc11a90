"""whisper: OpenAI's Whisper by transformers, with its tokenizer and features, as one recognizer."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub as hub
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from lora_lightning.data.speech import SAMPLE_RATE
from lora_lightning.errors import ConfigError, MissingFileError
from lora_lightning.models.hub import hub_failure
from lora_lightning.models.hub_folder import load_network, reading, refuse_address
from lora_lightning.utils.checks import require
from lora_lightning.utils.download import failure_text
from lora_lightning.utils.libraries import loading
from lora_lightning.utils.marks import Null, between, path

with loading("transformers", "whisper"):
    from transformers import (
        GenerationMixin,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

FILES = ["*.json", "merges.txt", "model*.safetensors"]
NEEDED = ("config.json", "model.safetensors", "preprocessor_config.json")
POSITIONS = 50  # of the encoder, a second
IGNORED = -100  # a label that cross entropy leaves out
LOOP = 2.4  # bytes of a text for one of its compressed ones: Radford et al. 2022, section 4.5


class Whisper(nn.Module):
    """Whisper (Radford et al. 2022, arXiv 2212.04356): waves -> log-mels -> an encoder-decoder over tokens.

    Every wave is heard as a window of so many seconds, silence behind its end, so that a batch changes
    nothing; a longer one is an error.

    Args:
        network: of transformers; its encoder takes the first positions of its table, those of the window, and
            its weights stay whole: an adapter trained with one window loads into a model with another.
        tokenizer: with the language and task of its prefix set.
        features: log-mels.
        max_tokens: most tokens of a text.
        seconds: of the window; None for all that the network has positions for, 30 seconds.

    Raises:
        ConfigError: more seconds than that.
    """

    def __init__(
        self,
        network: WhisperForConditionalGeneration,
        tokenizer: WhisperTokenizer,
        features: WhisperFeatureExtractor,
        max_tokens: int = 200,
        seconds: int | None = None,
    ) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.features = _windowed(network, features, seconds)
        self.seconds: int = self.features.chunk_length
        room = network.config.max_target_positions - len(tokenizer.prefix_tokens) - 1
        self.max_tokens = min(max_tokens, room)

    def log_mels(self, waves: Tensor, lengths: Tensor) -> Tensor:
        """(batch, mels, 100 a second of the window) of waves (batch, samples) of these lengths."""
        longest = int(lengths.max()) / SAMPLE_RATE
        if longest > self.seconds:
            raise ConfigError([
                f"data.max_seconds: a recording has {longest:.1f} s, and this Whisper hears {self.seconds} s "
                "(model.seconds). Give data.max_seconds at most that, or a larger model.seconds, up to 30."
            ])  # fmt: skip
        arrays = [wave[:n].float().cpu().numpy() for wave, n in zip(waves, lengths.tolist(), strict=True)]
        with torch.autocast("cpu", enabled=False):  # where they are made, by products of torch
            found = self.features(arrays, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        return found.input_features.to(waves.device, self.network.dtype)

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder gives: (batch, frames, width), and lengths in frames, all of the window."""
        encoded = self.network.model.encoder(self.log_mels(waves, lengths)).last_hidden_state
        return encoded, torch.full((len(waves),), encoded.shape[1], device=waves.device)

    def loss(self, waves: Tensor, lengths: Tensor, texts: list[str]) -> Tensor:
        """Cross entropy of the texts' tokens and the end's, averaged over all of them."""
        prefix, end = self.tokenizer.prefix_tokens, self.tokenizer.eos_token_id
        tokens = [self._tokens(text) for text in texts]
        longest = max(map(len, tokens))
        before = [[*prefix, *t, *[end] * (longest - len(t))] for t in tokens]
        after = [[*[IGNORED] * (len(prefix) - 1), *t, end, *[IGNORED] * (longest - len(t))] for t in tokens]
        return self.network(
            input_features=self.log_mels(waves, lengths),
            decoder_input_ids=torch.tensor(before, device=waves.device),
            labels=torch.tensor(after, device=waves.device),
        ).loss

    @torch.no_grad()
    def transcribe(self, waves: Tensor, lengths: Tensor) -> list[str]:
        """The most probable token at each step, as texts. One that says the same again and again, as Whisper
        may without end, is heard anew with no three tokens twice: the paper's test, without its chance."""
        mels = self.log_mels(waves, lengths)
        texts = self._heard(mels)
        loops = [_compressed(text) > LOOP for text in texts]
        if not any(loops):
            return texts
        again = self._heard(mels, no_repeat_ngram_size=3)  # all of them: each may have an adapter of its own
        return [new if loop else text for text, new, loop in zip(texts, again, loops, strict=True)]

    def _heard(self, mels: Tensor, **options: Any) -> list[str]:
        prefix = torch.tensor([self.tokenizer.prefix_tokens] * len(mels), device=mels.device)
        # Whisper's own generate decides about languages, timestamps and long audio, which are decided here.
        network: Any = self.network
        tokens: Any = GenerationMixin.generate(
            network,
            inputs=mels,
            attention_mask=mels.new_ones(mels.shape[0], mels.shape[2], dtype=torch.long),
            decoder_input_ids=prefix,
            decoder_attention_mask=torch.ones_like(prefix),
            max_new_tokens=self.max_tokens,
            do_sample=False,
            num_beams=1,
            **options,
        )
        texts = self.tokenizer.batch_decode(tokens[:, prefix.shape[1] :], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _tokens(self, text: str) -> list[int]:
        """With the space before it that Whisper's own texts have."""
        return self.tokenizer(f" {text}", add_special_tokens=False).input_ids[: self.max_tokens]


def whisper(
    name: str = "openai/whisper-base.en",
    checkpoint: Annotated[str | None, path("a folder of the hub's files")] = None,
    language: str | None = None,
    seconds: Annotated[int | None, between(1, 30), Null("all of its 30 seconds")] = None,
) -> Whisper:
    """Whisper by its name on the Hugging Face hub, or from a folder.

    Args:
        name: of the hub; names that end in .en hear English alone.
        checkpoint: a folder with config.json, model.safetensors, preprocessor_config.json and the
            tokenizer's files, in place of the hub.
        language: of models for many languages, such as "en" or "german"; None for those of English alone.
        seconds: what it hears of everything, silence where a recording is shorter: 10 costs a third of 30.
            What is longer is refused.

    Raises:
        ConfigError: a language that it does not know, or one for a model of English alone.
        MissingFileError: the files are not on this machine and cannot be downloaded now.
        AdapterFileError: they are damaged.
    """
    require(whisper, locals())
    folder = _folder(name, checkpoint)
    network, _ = load_network(folder, WhisperForConditionalGeneration, "Whisper")
    with reading(folder, "Whisper"):
        tokenizer = WhisperTokenizer.from_pretrained(folder)
        features = WhisperFeatureExtractor.from_pretrained(folder)
    if language is not None:
        try:
            tokenizer.set_prefix_tokens(language=language, task="transcribe", predict_timestamps=False)
            known = None not in tokenizer.prefix_tokens
        except (ValueError, KeyError):
            known = False
        if not known:
            raise ConfigError(
                [f"language={language!r}: {name} does not know it: give null for English alone."]
            )
    return Whisper(
        network.train(), tokenizer, features, seconds=seconds
    )  # transformers hands it over in eval


def _compressed(text: str) -> float:
    """How many bytes of the text one byte of its compressed form holds."""
    whole = text.encode()
    return len(whole) / len(zlib.compress(whole))


def _windowed(
    network: WhisperForConditionalGeneration, features: WhisperFeatureExtractor, seconds: int | None
) -> WhisperFeatureExtractor:
    """Have the encoder take the positions of so many seconds; returns the features of as many."""
    encoder = network.model.encoder
    known = encoder.embed_positions.weight.shape[0] // POSITIONS
    seconds = known if seconds is None else seconds
    if seconds > known:
        raise ConfigError([f"seconds={seconds}: this Whisper has positions for {known}; give at most that."])
    # The encoder asks for positions 0 … num_embeddings - 1 of a table whose rows all stay.
    encoder.embed_positions.num_embeddings = encoder.config.max_source_positions = seconds * POSITIONS
    return WhisperFeatureExtractor(**{**features.to_dict(), "chunk_length": seconds})


def _folder(name: str, checkpoint: str | None) -> Path:
    if checkpoint is not None:
        refuse_address(checkpoint)
        folder = Path(checkpoint).expanduser()
        if missing := [f for f in NEEDED if not (folder / f).is_file()]:
            raise MissingFileError(
                f"checkpoint={checkpoint!r}: {folder} has no {', '.join(missing)}. Copy it whole."
            )
        return folder
    try:
        return Path(hub.snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        pass
    reason = hub_failure(name, NEEDED[0])
    if reason is None:
        try:
            return Path(hub.snapshot_download(name, allow_patterns=FILES))
        except Exception as error:  # requests, httpx or the hub's own, by version
            reason = failure_text(error)
    raise MissingFileError(
        f"Whisper ({name}) is not on this machine, and cannot be downloaded now ({reason}).\n"
        f"  files:      {', '.join(NEEDED)} and the tokenizer's of {name} on {hub.constants.ENDPOINT}\n"
        f"  looked for: {Path(hub.constants.HF_HUB_CACHE).absolute()} (HF_HOME sets another cache)\n"
        f"  to get it:  on a machine with internet, hf download {name} --local-dir whisper\n"
        f"  then:       copy the folder here and give model.checkpoint=whisper"
    )
