"""What was said and what was heard, word by word: what is right, another word, left out, put in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rapidfuzz.distance import Levenshtein

from lora_lightning.report.page import text

Kind = Literal["right", "substituted", "left out", "put in"]
MARKS: dict[
    Kind, tuple[str, str]
] = {  # how what was heard is marked: an element of HTML, and a sign before it
    "right": ("span", ""),
    "substituted": ("mark", "→ "),
    "left out": ("del", "− "),
    "put in": ("ins", "+ "),
}
LONGEST = 40  # characters of a word


@dataclass(frozen=True)
class Pair:
    """A word that was said and what was heard for it; "" where there is none."""

    said: str
    heard: str
    kind: Kind


def compared(said: str, heard: str) -> list[Pair]:
    """The words of two texts, side by side, with as few differences as there can be.

    The pairs that are not right are as many as the errors that the word error rate counts.
    """
    left, right = said.split(), heard.split()
    pairs: list[Pair] = []
    for block in Levenshtein.opcodes(left, right):
        some, others = left[block.src_start : block.src_end], right[block.dest_start : block.dest_end]
        if block.tag == "delete":
            pairs += [Pair(word, "", "left out") for word in some]
        elif block.tag == "insert":
            pairs += [Pair("", word, "put in") for word in others]
        else:
            kind: Kind = "right" if block.tag == "equal" else "substituted"
            pairs += [Pair(a, b, kind) for a, b in zip(some, others, strict=True)]
    return pairs


def as_html(pairs: list[Pair]) -> str:
    """Words in a row that goes on in the next line; under each word that was said what was heard, where that
    differs, marked by a sign and not by colour alone."""
    return f'<p class="words">{" ".join(map(_pair, pairs)) or "<i>nothing</i>"}</p>'


def _pair(pair: Pair) -> str:
    element, sign = MARKS[pair.kind]
    said, heard = text(pair.said, LONGEST), text(pair.heard, LONGEST)
    if pair.kind == "right":
        return f"<span><b>{said}</b><span>{heard}</span></span>"
    meaning = {
        "substituted": f"{said}: heard {heard}",
        "left out": f"{said}: left out",
        "put in": f"{heard}: put in",
    }[pair.kind]
    shown = f"{sign}{heard or said}"
    return f'<span title="{meaning}"><b>{said or "&nbsp;"}</b><{element}>{shown}</{element}></span>'
