"""Options of frozen dataclasses: each field says its limits, and whether it may change on resume.

Such a dataclass is what a command line shows and what config.json holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


def option(
    default: Any,
    *,
    at_least: int | float | None = None,
    above: int | float | None = None,
    below: int | float | None = None,
    may_change: bool = False,
) -> Any:
    """A field with a default, limits of its value, and whether a resumed run may give another.

    A value that is None, where that is allowed, has no limits. All other fields decide a run's
    result, and a resumed run must give the same.
    """
    metadata = {"at_least": at_least, "above": above, "below": below, "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata)


def check_limits(config: Any) -> None:
    """Raise ValueError for a field of the dataclass, or of one in it, outside its limits."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_limits(value)
        rules = list(_broken_rules(value, field.metadata))
        if value is not None and rules:
            raise ValueError(f"{field.name} must be {' and '.join(rules)}; got {value}.")


def _broken_rules(value: Any, limits: Any) -> Iterator[str]:
    """All rules, if one is broken, in words. Asked so that a NaN breaks each."""
    least, above, below = (limits.get(name) for name in ("at_least", "above", "below"))
    if value is None:
        return
    kept = (
        (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if kept:
        return
    if least is not None and below is not None:
        yield f"in [{least}, {below})"
    elif least is not None:
        yield f"at least {least}"
    elif above is not None:
        yield f"above {above}"
    if below == float("inf") and above is not None:
        yield "finite"


def may_change(config_type: type) -> frozenset[str]:
    """Names of the fields that a resumed run may change."""
    fields = dataclasses.fields(config_type)
    return frozenset(field.name for field in fields if field.metadata.get("may_change"))


def defaults(config_type: type) -> dict[str, Any]:
    """The defaults of the fields that have one, as JSON holds them: dicts for dataclasses in it."""
    found = {}
    for field in dataclasses.fields(config_type):
        if field.default is not dataclasses.MISSING:
            nested = dataclasses.is_dataclass(field.default)
            found[field.name] = dataclasses.asdict(field.default) if nested else field.default  # pyright: ignore[reportArgumentType]
    return found
