"""Texts that strangers write about their entries: bounded, and without what no reader can see.

They are plain text. HTML and Markdown in them are allowed, since a formula or a BibTeX entry may hold
any sign, and mean nothing: whoever shows a text escapes it. Control characters, which a terminal would
obey, and invisible ones, which make a line read otherwise than it is, are refused.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

URL = r"https?://[A-Za-z0-9][A-Za-z0-9._~:/?#@!$&*+,;=%-]{1,290}"
"""An address: no quotes, brackets or spaces, and no scheme that runs anything."""


def _visible(text: str) -> str:
    if any(not (c.isprintable() or c in "\n\t") for c in text):
        raise ValueError("holds a control character or an invisible one")
    return text


def _one_line(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError("must be one line without control characters or spaces at its ends")
    return text


Line = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_one_line)]
Text = Annotated[str, Field(max_length=2000), AfterValidator(_visible)]
Address = Annotated[str, Field(pattern=f"^{URL}$")]
BibTeX = Annotated[
    str, Field(max_length=5000, pattern=r"^(@[A-Za-z]+\s*\{[\s\S]*\}\s*)?$"), AfterValidator(_visible)
]
Licence = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,63}$")]
"""An SPDX identifier."""
