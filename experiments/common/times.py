"""Lists of time indices of a user's own, beside the named sub-sequences.

Where a spacing is a name, such as "uniform", an own list is its indices: "900 600 300 0".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ddim_jax.runs import RunSpec
from ddim_jax.schedule import warn_of_low_start

_SHOWN = 12


def list_from(text: str) -> str:
    """An own list in its one spelling. Raises ValueError for what is none."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(
            "timesteps must be time indices, from noise to data, such as 900,600,300,0; "
            f"got {text!r}."
        )
    return spelt([int(word) for word in words])


def lists_from(texts: Sequence[str]) -> list[str]:
    """Several own lists. Raises ValueError for what are none, and for one cut into its indices."""
    lists = [list_from(text) for text in texts]
    if len(lists) > 1 and all(length(text) == 1 for text in lists):
        raise ValueError(
            "timesteps must be one word for each list, its indices joined by commas; got "
            f"{' '.join(lists)}, {len(lists)} lists of one step each. For one list of "
            f"{len(lists)} steps give {','.join(lists)}."
        )
    return lists


def spelt(timesteps: Sequence[int]) -> str:
    """The list as a spacing's name."""
    return " ".join(map(str, timesteps))


def is_list(spacing: str) -> bool:
    """Whether it is an own list, and no name."""
    return spacing[:1].isdecimal()


def length(spacing: str) -> int:
    """S of an own list."""
    return len(spacing.split())


def timesteps_of(spec: RunSpec, num_steps: int, spacing: str) -> np.ndarray:
    """The times of a spacing, named or an own list. Raises ValueError for what the run has not."""
    if not is_list(spacing):
        return spec.timesteps(num_steps, spacing)
    times = np.array([int(word) for word in spacing.split()])
    num_steps = spec.schedule.num_steps
    checked = np.asarray(spec.schedule.check_timesteps(times))
    warn_of_low_start(checked, num_steps, f"the list of times {shown(spacing)}")
    return checked


def file_name(spacing: str) -> str:
    """What files call it: all of a short list, a hash of a long one."""
    if not is_list(spacing):
        return spacing
    return f"times_{spacing.replace(' ', '-') if length(spacing) <= 6 else _digest(spacing)}"


def shown(spacing: str) -> str:
    """What a table's row calls it: of a long list its ends, and a hash for the rest."""
    if not is_list(spacing):
        return spacing
    words = spacing.split()
    if len(words) <= _SHOWN:
        return f"t = {', '.join(words)}"
    return f"t = {', '.join(words[:3])}, ..., {', '.join(words[-3:])} ({_digest(spacing)})"


def _digest(spacing: str) -> str:
    return hashlib.sha256(spacing.encode()).hexdigest()[:8]
