"""What a prompt wants written, and what of two texts is the same to who reads them."""

from __future__ import annotations

import re
import unicodedata

STRAIGHT = '"＂'
# Each mark that opens, with what closes it; in some languages the same one, or the other way round.
CLOSING = {"“": "”", "‟": "”", "”": "”", "„": "“‟”", "«": "»", "»": "«»", "「": "」", "『": "』"}
NEVER_OPEN = "」』"
INCH = STRAIGHT + "”"
_SAME = str.maketrans(
    dict.fromkeys("“”„‟«»「」『』″〝〞〟", '"')
    | dict.fromkeys("‘’‚‛‹›ʼ′´`", "'")
    | dict.fromkeys("‐‑‒–—―−﹘", "-")
    | {"…": "...", "⁄": "/", "\ufe0f": None}
)


def target(prompt: str) -> str:
    """Return what a prompt wants written: the first text between double quotes, of any kind.

    A mark right behind a digit opens nothing: it is inches. Of quotes that hold nothing but quotes
    the inner ones count. Raises ValueError naming the prompt if nothing, or only spaces, stands
    between two quotes, or if a mark lacks its other half.
    """
    found, at = [], 0
    odd = None
    while at < len(prompt):
        if prompt[at] in NEVER_OPEN or _opens(prompt, at):
            end = _end(prompt, at)
            if end is None:
                odd = at
            else:
                found.append(_unwrapped(prompt[at + 1 : end]))
                at = end
        at += 1
    found = [text for text in found if plain(text)]
    if not found:
        raise ValueError(
            f'the prompt {prompt!r} quotes no text. One that does is needed, such as a sign "OPEN".'
        )
    if odd is not None:
        raise ValueError(
            f"the prompt {prompt!r} has a quotation mark without its other half: "
            f"{prompt[odd:]!r:.40}, at character {odd + 1}. Pair it, or leave it out."
        )
    return found[0]


def plain(text: str) -> str:
    """Drop what does not count: space, case, characters without a look, typographic variants."""
    same = unicodedata.normalize("NFKC", text.translate(_SAME)).translate(_SAME).lower()
    return "".join(c for c in same if not c.isspace() and unicodedata.category(c) != "Cf")


def _opens(prompt: str, at: int) -> bool:
    mark, after = prompt[at], prompt[at + 1 : at + 2]
    if mark in INCH and at:
        digits = unicodedata.category(prompt[at - 1]) in ("Nd", "No")
        apart = re.search(r"\d\s+$", prompt[:at]) and not after.strip()
        if digits or apart:
            return False
    return mark in STRAIGHT or mark in CLOSING


def _end(prompt: str, start: int) -> int | None:
    """Return where the quote ends that begins at `start`; None: nowhere."""
    mark = prompt[start]
    if (end := _partner(prompt, start)) is not None:
        return end
    at = start + 1  # a straight one, or one that a straight one must close
    while at < len(prompt):
        if prompt[at] in STRAIGHT:
            return at
        if mark in STRAIGHT:
            inner = None if prompt[at] == "”" else _partner(prompt, at)
            if inner is None and prompt[at] in "“”":
                return at
            at = at if inner is None else inner
        at += 1
    return None


def _partner(prompt: str, start: int) -> int | None:
    """Return where the mark is that belongs to one that is not straight."""
    mark, depth = prompt[start], 1
    for at in range(start + 1, len(prompt) if mark in CLOSING else 0):
        if prompt[at] in CLOSING[mark]:
            depth -= 1
        elif prompt[at] == mark:
            depth += 1
        if not depth:
            return at
    return None


def _unwrapped(text: str) -> str:
    inner = text.strip()
    if len(inner) > 2 and _opens(inner, 0) and _end(inner, 0) == len(inner) - 1:
        return _unwrapped(inner[1:-1])
    return text
