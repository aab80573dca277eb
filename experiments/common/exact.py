"""Numbers as text that stands for them."""

from __future__ import annotations


def exact(number: float) -> str:
    """As short as can be, and never the text of another number."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)
