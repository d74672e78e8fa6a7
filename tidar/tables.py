"""Tables, of TOML or of Python, as frozen dataclasses: every field known, every value of its field's type."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tidar.errors import TidarError

__all__ = ["build", "merged", "read_toml"]


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``; tables are merged, everything else replaced."""
    found = dict(base)
    for name, value in changes.items():
        below = found.get(name)
        tables = isinstance(below, Mapping) and isinstance(value, Mapping)
        found[name] = merged(below or {}, value) if tables else value
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a file; `TidarError` when it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TidarError(f"cannot read {path} ({error.strerror}): name a recipe or a TOML file that exists") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TidarError(f"{path} is not valid TOML: {error}") from error


def build(kind: Any, values: Mapping[str, Any], source: str) -> Any:
    """A dataclass ``kind`` with fields ``values``.

    Raises:
        TidarError: unknown or missing field, or a value of the wrong type; it begins with ``source``.
    """
    known = [field.name for field in fields(kind)]
    types = get_type_hints(kind)
    for name in values:
        if name not in known:
            raise TidarError(f"{source}: unknown field '{name}'; {kind.__name__} has {', '.join(known)}")
    for field in fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in values:
            raise TidarError(f"{source}: {field.name} is missing; give it in the recipe")
    return kind(**{name: _value(name, types[name], value, source) for name, value in values.items()})


def _value(name: str, wanted: Any, value: Any, source: str) -> Any:
    """``value`` as a field of type ``wanted``: an int is a float too, a list a tuple, a table a dataclass."""
    origin = get_origin(wanted)
    if is_dataclass(wanted):
        if isinstance(value, Mapping):
            return build(wanted, value, f"{source}: {name}")
        fits = isinstance(value, wanted)  # type: ignore[arg-type]
    elif origin is Literal:
        fits = value in get_args(wanted)
    elif origin is tuple:
        kind = get_args(wanted)[0]
        if is_dataclass(kind) and isinstance(value, (list, tuple)):
            return tuple(_value(name, kind, part, source) for part in value)
        fits = isinstance(value, (list, tuple)) and all(type(v) is kind for v in value)
        value = tuple(value) if fits else value
    else:
        kinds = get_args(wanted) or (wanted,)  # of a union, or the type itself
        fits = type(value) in kinds or (float in kinds and type(value) is int)
    if not fits:
        shown = " | ".join(map(str, get_args(wanted))) if origin is Literal else getattr(wanted, "__name__", wanted)
        raise TidarError(f"{source}: {name} must be {shown}, not {value!r}")
    return value
