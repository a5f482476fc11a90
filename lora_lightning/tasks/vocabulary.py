"""Texts and the outputs of a recognizer: characters as indices, and frames of outputs as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_lightning.errors import UserError
from lora_lightning.utils.marks import Check, listed

BLANK = 0
CHARACTER = Check("a text", lambda v: isinstance(v, str))  # a space, too
VOCABULARY = listed("the blank and at least one character, each once", CHARACTER, least=2, distinct=True)
Decoder = Callable[[Tensor, Tensor, Sequence[str]], list[str]]


def encode(texts: Sequence[str], ids: Sequence[str], vocabulary: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts as indices of the vocabulary, one after the other (sum of lengths,), and lengths (batch,).

    Raises:
        UserError: a character that the vocabulary lacks.
    """
    index = {character: i for i, character in enumerate(vocabulary)}
    index.setdefault(" ", index.get("|", -1))
    missing = {c: name for text, name in zip(texts, ids, strict=True) for c in text if index.get(c, -1) < 1}
    if missing:
        where = ", ".join(f"{c!r} in {name or 'an utterance'}" for c, name in sorted(missing.items()))
        raise UserError(f"the vocabulary lacks {where}: normalize the texts, or add to the vocabulary.")
    flat = [index[c] for text in texts for c in text]
    return torch.tensor(flat, dtype=torch.int64), torch.tensor([len(text) for text in texts])


def greedy(log_probs: Tensor, lengths: Tensor, vocabulary: Sequence[str]) -> list[str]:
    """The most probable output of each frame, with repetitions and blanks taken out.

    Args:
        log_probs: (batch, frames, vocabulary); logits serve as well.
        lengths: (batch,), in frames.
        vocabulary: what each output stands for; 0 is the blank.
    """
    texts = []
    for row, length in zip(log_probs.argmax(-1).tolist(), lengths.tolist(), strict=True):
        path = row[:length]
        kept = [i for i, before in zip(path, [BLANK, *path], strict=False) if i not in (BLANK, before)]
        characters = (vocabulary[i] for i in kept if len(vocabulary[i]) == 1)
        texts.append(" ".join("".join(characters).replace("|", " ").split()))
    return texts
