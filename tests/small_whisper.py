"""A Whisper of one layer that writes letters, in the files that the real ones have."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

END = "<|endoftext|>"
SPECIAL = (
    "startoftranscript", "en", "transcribe", "translate", "startoflm", "startofprev", "nospeech",
    "notimestamps",
)  # fmt: skip


def small_whisper(path: Path) -> Path:
    """Write it into a folder that is there."""
    vocabulary = {c: i for i, c in enumerate([*"abcdefghijklmnopqrstuvwxyz'", "Ġ", END])}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(vocab=str(path / "vocab.json"), merges=str(path / "merges.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in SPECIAL]})
    tokenizer.save_pretrained(path)
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), vocabulary[END])
    torch.manual_seed(0)
    network = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
            max_target_positions=40,
            suppress_tokens=[], begin_suppress_tokens=[],
            decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"), **ends,
        )
    )  # fmt: skip
    network.save_pretrained(path)
    WhisperFeatureExtractor().save_pretrained(path)
    return path
