"""`refused`: bad input is turned away before any compile, by name, in our own words."""

import contextlib

import jaxtyping
import pytest


@contextlib.contextmanager
def unchecked():
    """Without the shape checks that --jaxtyping-packages adds: users run without them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextlib.contextmanager
def refused(message: str):
    """A ValueError whose text matches `message`, a regular expression."""
    with unchecked(), pytest.raises(ValueError, match=message):
        yield
