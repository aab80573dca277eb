"""Options of frozen dataclasses: each field says its limits, and whether it may change on resume.

Such a dataclass is what a command line shows and what config.json holds.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from ddim_jax.paths import PathOption, expanded, local_path

Config = TypeVar("Config")

MAX_BATCH = 2**20 + 1
"""A batch is below it: memory for more is not asked for."""
MAX_SIDE = 8193
"""An image's side is below it: beyond, one image alone takes the memory of a machine."""


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
    if below is None and isinstance(value, int) and value >= 2**31:
        yield f"below {2**31}"
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


def path_options(config_type: type) -> dict[str, PathOption]:
    """The fields that are paths, or tuples of them, by the types of `ddim_jax.paths`."""
    hints = typing.get_type_hints(config_type, include_extras=True)
    fields = {field.name for field in dataclasses.fields(config_type)}
    found = {name: _path_option(hint) for name, hint in hints.items() if name in fields}
    return {name: kind for name, kind in found.items() if kind is not None}


def _path_option(hint: Any) -> PathOption | None:
    parts = (*getattr(hint, "__metadata__", ()), *typing.get_args(hint))
    inside = (part if isinstance(part, PathOption) else _path_option(part) for part in parts)
    return next((kind for kind in inside if kind is not None), None)


def with_local_paths(config: Config) -> Config:
    """The same settings with every path expanded, those of a dataclass in it too.

    Raises ValueError for a path that `local_path` refuses, by the name of its field.
    """
    kinds, changes = path_options(type(config)), {}
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        value = new = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            new = with_local_paths(value)
        elif field.name in kinds:
            new = _through_the_door(value, field.name, kinds[field.name])
        if new != value:
            changes[field.name] = new
    return dataclasses.replace(config, **changes) if changes else config  # pyright: ignore[reportArgumentType, reportReturnType]


def _through_the_door(value: Any, name: str, option: PathOption) -> Any:
    if isinstance(value, tuple):
        return tuple(_through_the_door(item, name, option) for item in value)
    if not isinstance(value, str):
        return value
    local_path(value, name, option.kind)  # for its checks
    return expanded(value, name)  # as it is spelt: pathlib would drop what a name may end in


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
