"""Names of tensors as wrappers leave them: "module.conv_in.weight", "ema_model.conv_in.weight"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

Tensor = TypeVar("Tensor")
Kind = Literal["ema", "raw"]

PREFIXES: dict[str, Kind | None] = {
    "module.": None,  # torch's DataParallel and DistributedDataParallel
    "_orig_mod.": None,  # torch.compile
    "unet.": None,  # a field of a training module
    "unet_ema.": "ema",
    "ema_model.": "ema",  # ema-pytorch, and many training modules
    "online_model.": "raw",  # ema-pytorch
}
"""What stands before the names of a wrapped network's tensors, and which set they then are."""
COUNTERS = frozenset({"initted", "step"})
"""What ema-pytorch saves beside the two sets."""


def without_prefix(
    tensors: Mapping[str, Tensor], weights: Kind
) -> tuple[dict[str, Tensor], Kind | None, str]:
    """The tensors of one network by their own names; which set they are, None if the names do not
    say so; and a clause about the others, "" without any.

    A prefix goes where all names have it, several after one another too. Where some have one and
    the rest another, and one of the two is an average's, they are two sets, and `weights` picks.
    Another mixture stays as it is. Raises ValueError where only the set not asked for is there.
    """
    left: dict[str, Tensor] = dict(tensors)
    kind: Kind | None = None
    beside = ""
    while True:
        sets = _by_prefix(left)
        if len(sets) > 1:
            sets = {p: {k: v for k, v in s.items() if k not in COUNTERS} for p, s in sets.items()}
            sets = {prefix: some for prefix, some in sets.items() if some}
        if len(sets) == 2 and "ema" in (PREFIXES.get(prefix) for prefix in sets):
            kinds = {prefix: PREFIXES.get(prefix) or "raw" for prefix in sets}
            taken = next((prefix for prefix in sets if kinds[prefix] == weights), None)
            if taken is None:
                break
            (other,) = sets.keys() - {taken}
            before = f"named {other}* " if other else ""
            beside = f"; also there and not read: the {kinds[other]} ones {before}".rstrip()
            kind, left = weights, sets[taken]
        elif len(sets) == 1:
            ((taken, left),) = sets.items()
            kind = kind or PREFIXES.get(taken)
        else:
            break
        if not taken:
            break
        left = {name.removeprefix(taken): tensor for name, tensor in left.items()}
    if kind not in (None, weights):
        raise ValueError(
            f"the file must hold the {weights} weights asked for; the names of its tensors say "
            f"that it has the {kind} ones alone. Ask for those."
        )
    return left, kind, beside


def _by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by the wrapper's prefix of their names, "" without one."""
    sets: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        sets.setdefault(prefix, {})[name] = tensor
    return sets
