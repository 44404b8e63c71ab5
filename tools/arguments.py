"""Arguments of the form key=value, for the commands that need no Hydra configuration.

A command is a frozen dataclass: its docstring says what it does, each field is an argument.

    @dataclass(frozen=True)
    class Sample:
        \"\"\"Write text with a trained model.\"\"\"

        EXAMPLE: ClassVar[str] = 'scatterfold sample source=runs/demo prompt="def "'

        source: Path = argument("run folder, or one of its checkpoints")
        max_tokens: int = argument("how much to write", default=200)

    settings = parse(Sample, ["source=runs/demo"])
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .close_match import did_you_mean

T = TypeVar("T")

WORDS = {"true": True, "false": False}
NOTHING = ("null", "none", "None")
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def argument(help: str, default: Any = dataclasses.MISSING, choices: Sequence[str] = (), least: Any = None) -> Any:
    """A field of a command: what it means, its default (none: it must be given) and what is allowed."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": tuple(choices), "least": least})


def parse(command: type[T], argv: Sequence[str]) -> T:
    """Read `key=value` words into the command's dataclass.

    A list is written `key=[A,B]`, nothing is written `key=null`.
    Raises: ConfigError for a word without `=`, an unknown, repeated or missing key, or a value of a wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(command)}  # type: ignore[arg-type]
    hints = get_type_hints(command)
    values: dict[str, Any] = {}
    for word in argv:
        key, equals, text = word.partition("=")
        if not equals:
            raise _error(f"{word!r} is not an argument, allowed: key=value with a key of {', '.join(fields)}")
        if key not in fields:
            raise _error(f"{key}={text} is unknown{did_you_mean(key, fields)}, allowed: {', '.join(fields)}")
        if key in values:
            raise _error(f"{key}={text} is given twice, allowed: once")
        values[key] = _checked(fields[key], _convert(key, text, hints[key]))
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise _error(f"{name} is missing, allowed: {name}=VALUE, {field.metadata['help']}")
    return command(**values)


def usage(command: type) -> str:
    """What `--help` prints: what the command does, its arguments and one example."""
    fields = dataclasses.fields(command)
    width = max(len(field.name) for field in fields)
    lines = [inspect.cleandoc(command.__doc__ or ""), "", "Arguments (key=value):"]
    for field in fields:
        text = field.metadata["help"]
        if field.metadata["choices"]:
            text += f" ({', '.join(field.metadata['choices'])})"
        if field.default is dataclasses.MISSING:
            text += " [must be given]"
        elif field.default not in (None, "", ()):
            text += f" [{str(field.default).lower() if isinstance(field.default, bool) else field.default}]"
        lines.append(f"  {field.name:<{width}}  {text}")
    return "\n".join([*lines, "", "Example:", f"  {command.EXAMPLE}"])  # type: ignore[attr-defined]


def wants_help(argv: Sequence[str]) -> bool:
    """Whether the user asks what the command does."""
    return any(word in ("--help", "-h", "help") for word in argv)


def _convert(key: str, text: str, hint: Any) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if type(None) in options and text in NOTHING:
            return None
        return _convert(key, text, next(option for option in options if option is not type(None)))
    if origin is tuple:
        inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        return tuple(_convert(key, part.strip(), get_args(hint)[0]) for part in inner.split(",") if part.strip())
    try:
        return WORDS[text.lower()] if hint is bool else hint(text)
    except (ValueError, KeyError):
        raise _error(f"{key}={text} has the wrong type, allowed: {TYPE_NAMES[hint]}") from None


def _checked(field: dataclasses.Field, value: Any) -> Any:
    choices, least = field.metadata["choices"], field.metadata["least"]
    if choices and value is not None and value not in choices:
        raise _error(f"{field.name}={value} is unknown{did_you_mean(value, choices)}, allowed: {', '.join(choices)}")
    for number in value if isinstance(value, tuple) else (value,):
        if least is not None and number is not None and number < least:
            raise _error(f"{field.name}={number} is too small, allowed: {least} or more")
    return value


def _error(message: str) -> Exception:
    from ..kernels.errors import ConfigError  # loads torch, for which `--help` must not wait

    return ConfigError(message)
