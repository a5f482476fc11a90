"""From log-probabilities of CTC to texts: prefix beam search with an n-gram model and a lexicon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from torch import Tensor

from lora_lightning.errors import MissingFileError, UserError
from lora_lightning.utils.checks import require
from lora_lightning.utils.marks import Check, at_least

BLANK = 0
LOWEST = -math.inf
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
LEAST = Check("a log-probability below 0; -8 is usual", lambda v: isinstance(v, (int, float)) and v < 0)
LN10 = math.log(10)


class BeamDecoder:
    """The most probable texts of CTC outputs, all their alignments summed (prefix beam search, Graves 2012;
    Hannun et al. 2014, arXiv 1408.2873), with `lm_weight * ln P_lm(text) + word_bonus * words` added where
    there is a language model.

    torchaudio's `ctc_decoder` (flashlight-text) does not sum over alignments that end in a blank and in a
    symbol, and with small beams misses the best text; its wheels end at Python 3.12.

    Args:
        beam: prefixes that are kept at each frame.
        lm: an n-gram model of words in the ARPA format (KenLM and SRILM write it), or None.
        lexicon: a file with a word a line (what follows a space or tab is ignored), or the words
            themselves: only they are written. None allows every word.
        lm_weight: of the language model's log-probability.
        word_bonus: added for each word, since every word lowers the language model's probability.
        unknown_penalty: ln P of a word that the language model does not know, in place of its <unk>.
        least: outputs of a frame with a lower log-probability are not tried.

    Raises:
        ConfigError: one line for each bad option.
        MissingFileError: no such model or lexicon.
        UserError: a model that is no ARPA file.
    """

    def __init__(
        self,
        beam: Annotated[int, at_least(1, note="8 to 128 are usual")] = 32,
        lm: str | Path | NGram | None = None,
        lexicon: str | Path | Iterable[str] | None = None,
        lm_weight: float = 0.5,
        word_bonus: float = 1.0,
        unknown_penalty: float | None = None,
        least: Annotated[float, LEAST] = -8.0,
    ) -> None:
        require(BeamDecoder, locals())
        self.beam, self.least = beam, least
        self.lm_weight, self.word_bonus = lm_weight, word_bonus
        self.lm = NGram.read(lm, unknown_penalty) if isinstance(lm, (str, Path)) else lm
        words = _words(lexicon) if isinstance(lexicon, (str, Path)) else lexicon
        self.trie = None if words is None else _trie(words)

    def __call__(self, log_probs: Tensor, lengths: Tensor, vocabulary: Sequence[str]) -> list[str]:
        """The best text of each row.

        Args:
            log_probs: (batch, frames, vocabulary).
            lengths: (batch,), in frames.
            vocabulary: what each output stands for: first the blank; " " or "|" is the space.
        """
        rows = zip(log_probs.detach().float().cpu().numpy(), lengths.tolist(), strict=True)
        return [self.best(row[:length], vocabulary)[0][0] for row, length in rows]

    def best(
        self, log_probs: np.ndarray, vocabulary: Sequence[str], count: int = 1
    ) -> list[tuple[str, float]]:
        """The `count` best texts of one utterance (frames, vocabulary) and their scores, best first."""
        symbols = [" " if s == "|" else s for s in vocabulary]
        root = _Prefix(None, BLANK, self)
        beam: dict[_Prefix, tuple[float, float]] = {root: (0.0, LOWEST)}
        for frame in np.asarray(log_probs, np.float64):
            tried = [
                i for i in np.flatnonzero(frame >= self.least).tolist() if i != BLANK and len(symbols[i]) == 1
            ]
            beam = self._kept(self._extended(beam, frame.tolist(), tried, symbols))
        return self._finished(beam, count)

    def _extended(
        self,
        beam: Mapping[_Prefix, tuple[float, float]],
        frame: list[float],
        tried: list[int],
        symbols: list[str],
    ) -> dict[_Prefix, list[float]]:
        """Every prefix a frame later: ln P of ending in a blank, and of ending in its last symbol."""
        after: dict[_Prefix, list[float]] = {}

        def add(prefix: _Prefix, ending: int, value: float) -> None:
            ends = after.setdefault(prefix, [LOWEST, LOWEST])
            ends[ending] = _add(ends[ending], value)

        for prefix, (blank, symbol) in beam.items():
            total = _add(blank, symbol)
            add(prefix, 0, total + frame[BLANK])
            if prefix.last != BLANK:
                add(prefix, 1, symbol + frame[prefix.last])
            for i in tried:
                before = blank if i == prefix.last else total
                if before > LOWEST and (longer := prefix.with_symbol(i, symbols[i])) is not None:
                    add(longer, 1, before + frame[i])
        return after

    def _kept(self, after: Mapping[_Prefix, list[float]]) -> dict[_Prefix, tuple[float, float]]:
        ranked = sorted(after.items(), key=lambda item: -(_add(*item[1]) + item[0].bonus))
        return {prefix: (ends[0], ends[1]) for prefix, ends in ranked[: self.beam]}

    def _finished(self, beam: Mapping[_Prefix, tuple[float, float]], count: int) -> list[tuple[str, float]]:
        """Whole words alone, unless no prefix ends in one; texts that differ in spaces are the same."""
        for whole in (True, False):
            scores: dict[str, float] = {}
            for prefix, ends in beam.items():
                bonus = prefix.end(whole)
                if bonus is not None:
                    text = " ".join(prefix.text().split())
                    scores[text] = _add(scores.get(text, LOWEST), _add(*ends) + bonus)
            if scores:
                return sorted(scores.items(), key=lambda item: -item[1])[:count]
        return [("", LOWEST)]


class _Prefix:
    """A prefix of a text, made once: its longer ones, its place in the lexicon, its language model's state.

    Attributes:
        last: index of its last symbol; BLANK for the empty one.
        bonus: what the language model adds to it so far.
    """

    __slots__ = ("bonus", "context", "decoder", "last", "longer", "node", "parent", "symbol", "word")

    def __init__(self, parent: _Prefix | None, last: int, decoder: BeamDecoder, symbol: str = "") -> None:
        self.parent, self.last, self.decoder, self.symbol = parent, last, decoder, symbol
        self.longer: dict[int, _Prefix | None] = {}
        self.word = ""
        self.bonus = 0.0
        self.context: tuple[str, ...] = (BEGIN,)
        self.node = decoder.trie

    def with_symbol(self, index: int, symbol: str) -> _Prefix | None:
        """This prefix and one symbol more; None where the lexicon has no such word."""
        if index not in self.longer:
            self.longer[index] = self._made(index, symbol)
        return self.longer[index]

    def _made(self, index: int, symbol: str) -> _Prefix | None:
        new = _Prefix(self, index, self.decoder, symbol)
        new.bonus, new.context = self.bonus, self.context
        if symbol != " ":
            if self.node is not None:
                new.node = self.node.get(symbol)
                if new.node is None:
                    return None
            new.word = self.word + symbol
        elif self.word:
            if self.node is not None and "" not in self.node:
                return None
            new.bonus, new.context = self._scored()
        return new

    def _scored(self) -> tuple[float, tuple[str, ...]]:
        """Bonus and context when the word that stands at the end is complete."""
        decoder = self.decoder
        if decoder.lm is None:
            return self.bonus, self.context
        value, context = decoder.lm.score(self.context, self.word)
        return self.bonus + decoder.lm_weight * value + decoder.word_bonus, context

    def end(self, whole: bool) -> float | None:
        """The bonus when the text ends here; None where a word is begun that the lexicon lacks."""
        if whole and self.word and self.node is not None and "" not in self.node:
            return None
        bonus, context = self._scored() if self.word else (self.bonus, self.context)
        lm = self.decoder.lm
        return bonus if lm is None else bonus + self.decoder.lm_weight * lm.score(context, END)[0]

    def text(self) -> str:
        symbols = []
        prefix: _Prefix | None = self
        while prefix is not None:
            symbols.append(prefix.symbol)
            prefix = prefix.parent
        return "".join(reversed(symbols))


class NGram:
    """A back-off n-gram model of words, read from an ARPA file; natural logarithms.

    Args:
        probabilities: n-gram -> ln P of its last word after the others.
        backoffs: n-gram -> ln of its back-off weight.
        unknown: ln P of a word that the model does not know.
    """

    def __init__(
        self,
        probabilities: Mapping[tuple[str, ...], float],
        backoffs: Mapping[tuple[str, ...], float],
        unknown: float | None = None,
    ) -> None:
        self.probabilities, self.backoffs = probabilities, backoffs
        self.order = max(map(len, probabilities), default=1)
        lowest = min(probabilities.values(), default=-10.0)
        self.unknown = probabilities.get((UNKNOWN,), lowest) if unknown is None else unknown

    @classmethod
    def read(cls, path: str | Path, unknown: float | None = None) -> NGram:
        """From an ARPA file.

        Raises:
            MissingFileError: there is no such file.
            UserError: it is none.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise MissingFileError(f"lm={path}: there is no file {file.absolute()}; give an ARPA file.")
        probabilities, backoffs, order = {}, {}, 0
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                line = line.strip()
                if line.startswith("\\"):
                    order = int(line[1]) if line.endswith("-grams:") else 0
                elif order and line:
                    value, *rest = line.split()
                    gram = tuple(rest[:order])
                    try:
                        probabilities[gram] = LN10 * float(value)
                        if len(rest) > order:
                            backoffs[gram] = LN10 * float(rest[order])
                    except ValueError:
                        raise UserError(f"lm={path}: is no ARPA file: {line[:80]!r}. Give one.") from None
        if not probabilities:
            raise UserError(f"lm={path}: is no ARPA file: it has no section \\1-grams. Give one.")
        return cls(probabilities, backoffs, unknown)

    def score(self, context: tuple[str, ...], word: str) -> tuple[float, tuple[str, ...]]:
        """ln P(word | context), and the context of the next word.

        Where an n-gram is not in the model, the weight of its context times the shorter one (Katz 1987).
        """
        longer = (*context, word)[-self.order :]
        kept = longer[1:] if len(longer) == self.order else longer
        if (word,) not in self.probabilities:
            return self.unknown, kept
        value = 0.0
        while longer not in self.probabilities:
            value += self.backoffs.get(longer[:-1], 0.0)
            longer = longer[1:]
        return value + self.probabilities[longer], kept


def _add(a: float, b: float) -> float:
    """ln(e^a + e^b)"""
    if a < b:
        a, b = b, a
    return a if b == LOWEST else a + math.log1p(math.exp(b - a))


def _words(path: str | Path) -> list[str]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingFileError(f"lexicon={path}: there is no file {file.absolute()}; give a word a line.")
    return [line.split()[0] for line in file.read_text("utf-8").splitlines() if line.strip()]


Trie = dict[str, "Trie"]  # letter -> what follows; "" where a word may end


def _trie(words: Iterable[str]) -> Trie:
    root: Trie = {}
    for word in words:
        node = root
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return root
