"""Texts that strangers write about their entries: bounded, and without what no reader can see.

They are plain text, and whoever shows one escapes it. Control characters, which a terminal would obey,
and invisible ones, which make a line read otherwise than it is, are refused; so is what makes HTML or a
Markdown link, except in BibTeX, which may hold any visible sign.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

URL = r"https?://[A-Za-z0-9][A-Za-z0-9._~:/?#@!$&*+,;=%-]{1,290}"
"""An address: no quotes, brackets or spaces, and no scheme that runs anything."""


def _unmarked(text: str) -> str:
    if "<" in text or ">" in text or "](" in text:
        raise ValueError("is plain text, without HTML or Markdown: no '<', '>' or ']('")
    return text


def _visible(text: str) -> str:
    if any(not (c.isprintable() or c in "\n\t") for c in text):
        raise ValueError("holds a control character or an invisible one")
    return text


def _one_line(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError("must be one line without control characters or spaces at its ends")
    return text


Line = Annotated[
    str, Field(min_length=1, max_length=100), AfterValidator(_one_line), AfterValidator(_unmarked)
]
Text = Annotated[str, Field(max_length=2000), AfterValidator(_visible), AfterValidator(_unmarked)]
Address = Annotated[str, Field(pattern=f"^{URL}$")]
BibTeX = Annotated[
    str, Field(max_length=5000, pattern=r"^(@[A-Za-z]+\s*\{[\s\S]*\}\s*)?$"), AfterValidator(_visible)
]
Licence = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,63}$")]
"""An SPDX identifier."""
