"""A message of ours taken apart: what is wrong, and what to do about it."""

from __future__ import annotations

import re

VERBS = """
adapt add allow ask begin build call check choose close combine compute convert copy create cut decide
delete divide do download eject enter escape export extract fetch free generate get give inject install keep
leave let load log look lower make map merge mend move name normalize open optimize pack pass pip put
quantize quote raise remove rename repeat replace resume retry return run save say select set shorten show
start stop take target train try turn type unmerge unpack update upgrade use wait wrap write
"""
VERB = rf"(?:{'|'.join(VERBS.split())})\b(?![-=_.:])"
CASE = r"(?:(?:If|Or|To|For|On|In|With) (?:[^.:;]{0,70}?[ ,])??)?"  # "If the run is yours, give …"
ALLOWED = r"Options:|Options of \S+:|Recipes:|Columns:|Tags:|to get it:"
ELSEWHERE = "Did you mean|<remedy>|<near>|<problem>"  # a part that is put together in another place
STOP = r"^|(?<= )(?=to get it:)|(?<=[.:;] )|(?<=[.:;>])|(?<=[…>)?] )(?-i:(?=[A-Z`<]))"
# In the imperative, after a stop; or a list of what is allowed.
BEGINS = re.compile(rf"(?:{STOP})`?(?:{CASE}{VERB}|{ALLOWED}|~<|{ELSEWHERE})", re.IGNORECASE)
PERHAPS = re.compile(r"Did you mean …\?|<near>|<hint>|…|[\s.]")  # nothing is said where there is no near miss


def taken_apart(text: str) -> tuple[str, str]:
    """What is wrong and what to do, of which either may be ""; one after the other they are the message."""
    for found in BEGINS.finditer(text):
        remedy = text[found.start() :]
        if PERHAPS.sub("", remedy):
            return text[: found.start()].strip(), remedy.strip()
    return text.strip(), ""
