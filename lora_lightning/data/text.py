"""Text of a transcript as the symbols of a recognizer: normalized, and counted."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

BLANK, SPACE = "<blank>", " "
REPLACED = str.maketrans({
    "’": "'", "‘": "'", "ʼ": "'", "`": "'", "´": "'", "′": "'",
    "-": " ", "‐": " ", "‑": " ", "–": " ", "—": " ", "_": " ", "/": " ",
})  # fmt: skip


def normalize(text: str, vocabulary: Sequence[str] | None = None) -> str:
    """Lower case, single spaces, no punctuation but the apostrophe inside or before a word.

    1. Unicode NFKC: ligatures, full-width letters and the like become plain ones;
    2. lower case;
    3. typographic apostrophes become `'`; dashes, underscores and slashes become spaces;
    4. every other punctuation mark and symbol goes, and so do quotation marks made of apostrophes;
    5. white space becomes one space, none at the ends;
    6. with a vocabulary, a letter that it lacks loses its accent where it has the plain letter (é -> e).

    Digits stay as they are: how a number was spoken is not written in it. What is not in the vocabulary
    afterwards stays, too, to be reported by `unknown`. A normalized text is its own normal form; steps 2 to
    4 cannot be undone, so that rows keep the text as it was written beside it.
    """
    text = unicodedata.normalize("NFKC", text).lower().translate(REPLACED)
    kept = (c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " * c.isspace() for c in text)
    quoted = "".join(kept).split()
    words = (w.strip("'") if w.startswith("'") and w.endswith("'") else w for w in quoted)
    text = " ".join(word for word in words if word)
    if vocabulary is None:
        return text
    known = set(vocabulary)
    return "".join(c if c in known else _plain(c, known) for c in unicodedata.normalize("NFC", text))


def _plain(letter: str, known: set[str]) -> str:
    base = unicodedata.normalize("NFD", letter)[0]
    return base if base in known else letter


def unknown(texts: Iterable[str], vocabulary: Sequence[str]) -> Counter[str]:
    """How often each character that the vocabulary lacks occurs in normalized texts."""
    counts = Counter(c for text in texts for c in text)
    for symbol in vocabulary:
        counts.pop(symbol, None)
    return counts


def vocabulary_of(texts: Iterable[str]) -> list[str]:
    """The blank, the space and every character of normalized texts in Unicode's order."""
    return [BLANK, SPACE, *sorted({c for text in texts for c in text} - {SPACE})]
