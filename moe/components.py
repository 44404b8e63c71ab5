"""From a configuration node to the object it describes, with errors that a reader of the config can act on.

A node is a plain mapping. `build` makes an object of the class that `_target_` names, `check` one of a known class.
Keys are checked against the constructor's signature and values against its annotations before anything is called.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ..kernels import ConfigError

T = TypeVar("T")
TARGET = "_target_"
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}


def build(node: Mapping[str, Any], field: str, **given: Any) -> Any:
    """Make the object that a node describes.

    Args:
        node: `_target_`, the dotted name of a class or function, and its arguments.
        field: where the node stands in the config, for messages.
        given: arguments that the program supplies; the node must not.

    Raises: ConfigError that names the field, the value and what is allowed.
    """
    return _call(target_of(node, field), node, field, given)


def check(cls: type[T], node: Mapping[str, Any], field: str, **given: Any) -> T:
    """Make an instance of a known class from a node without `_target_`; otherwise as `build`."""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{field}={_show(node)} is of the wrong type, allowed: a mapping")
    return _call(cls, node, field, given)


def target_of(node: Mapping[str, Any], field: str) -> Callable[..., Any]:
    """The class or function that `_target_` names.

    Raises: ConfigError if there is none, or it cannot be imported.
    """
    name = node.get(TARGET) if isinstance(node, Mapping) else None
    if not isinstance(name, str):
        shown = f"{field}.{TARGET}={_show(name)}" if isinstance(node, Mapping) else f"{field}={_show(node)}"
        raise ConfigError(f"{shown} names no class, allowed: a mapping with {TARGET}: package.module.Class")
    found = _resolve(name, f"{field}.{TARGET}={name!r}")
    if not callable(found):
        raise ConfigError(f"{field}.{TARGET}={name!r} is not a class, allowed: package.module.Class")
    return found


def _resolve(name: str, shown: str) -> Any:
    """Import as much of the dotted name as is a module and look the rest up."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{shown} is not a dotted name, allowed: package.module.Class")
    for end in range(len(parts), 0, -1):
        module_name = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
                continue  # this part of the name is no module; a missing import inside one is another matter
            raise ConfigError(f"{shown} cannot be imported: {error}") from error
        except Exception as error:
            raise ConfigError(f"{shown} cannot be imported: {type(error).__name__}: {_one_line(error)}") from error
        for index in range(end, len(parts)):
            owner = ".".join(parts[:index])
            if not hasattr(found, parts[index]):
                guess = _did_you_mean(parts[index], [key for key in dir(found) if not key.startswith("_")])
                raise ConfigError(f"{shown} cannot be imported: {owner} has no {parts[index]}{guess}")
            found = getattr(found, parts[index])
        return found
    raise ConfigError(f"{shown} cannot be imported: there is no module {parts[0]}")


def _call(target: Callable[..., T], node: Mapping[str, Any], field: str, given: Mapping[str, Any]) -> T:
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_POSITIONAL
    }
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {name: p for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    settable = [name for name in named if name not in given]
    for name in given:
        if name not in named and not open_ended:
            raise ConfigError(f"{field}: {_name_of(target)} does not take {name}, which the program gives it")
    arguments = {str(key): value for key, value in node.items() if key != TARGET}
    for key, value in arguments.items():
        if key in given:
            raise ConfigError(
                f"{field}.{key}={_show(value)} cannot be set here, it follows from other fields; allowed: "
                f"{', '.join(settable) or 'no keys'}"
            )
        if key not in named and not open_ended:
            guess = _did_you_mean(key, settable)
            raise ConfigError(
                f"{field}.{key}={_show(value)} is not a known key{guess}; allowed: {', '.join(settable) or 'no keys'}"
            )
    annotations = {name: _annotation(target, named[name]) for name in settable}
    for name in settable:
        if named[name].default is inspect.Parameter.empty and name not in arguments:
            raise ConfigError(f"{field}.{name} is missing, allowed: {_describe(annotations[name])}")
    converted = {key: _convert(value, annotations.get(key, Any), f"{field}.{key}") for key, value in arguments.items()}
    return target(**converted, **given)


def _annotation(target: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The evaluated annotation, or Any if it is absent or names something that exists for type checkers only."""
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    for owner in _annotation_owners(target, parameter.name):
        try:
            return eval(annotation, dict(vars(inspect.getmodule(owner) or types.ModuleType("empty"))))
        except (NameError, AttributeError, TypeError):
            continue
    return Any


def _annotation_owners(target: Callable[..., Any], name: str) -> Iterable[Any]:
    """Where the annotation may have been written: the class that states the field or constructor, or its bases."""
    if inspect.isclass(target):
        for cls in target.__mro__:
            if name in vars(cls).get("__annotations__", {}) or "__init__" in vars(cls):
                yield cls
    else:
        yield target


def _convert(value: Any, annotation: Any, field: str) -> Any:
    """The value as the annotation wants it: int to float, list to tuple, mapping to dataclass, `_target_` to object."""
    for wanted in _alternatives(annotation):
        matched, converted = _match(value, wanted, field)
        if matched:
            return converted
    raise ConfigError(f"{field}={_show(value)} is of the wrong type, allowed: {_describe(annotation)}")


def _match(value: Any, wanted: Any, field: str) -> tuple[bool, Any]:
    """Whether the value serves as `wanted`, and the converted value."""
    origin = get_origin(wanted) or wanted
    if wanted is Any or isinstance(wanted, TypeVar):
        return True, value
    if wanted is None or wanted is type(None):
        return value is None, None
    if origin is Literal:
        return value in get_args(wanted), value
    if wanted is bool:
        return isinstance(value, bool), value
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if wanted is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number, float(value) if is_number else value
    if wanted is Path:
        return isinstance(value, (str, Path)), Path(value) if isinstance(value, (str, Path)) else value
    if origin in (list, tuple, Sequence, Iterable):
        return _match_list(value, wanted, origin, field)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping), dict(value) if isinstance(value, Mapping) else value
    if isinstance(value, Mapping):
        if TARGET in value:
            return True, build(value, field)
        return is_dataclass(wanted), check(wanted, value, field) if is_dataclass(wanted) else value  # type: ignore
    return not inspect.isclass(origin) or isinstance(value, origin), value


def _match_list(value: Any, wanted: Any, origin: Any, field: str) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple)):
        return False, value
    arguments = get_args(wanted)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            return False, value
        kinds = list(arguments)
    else:
        kinds = [arguments[0] if arguments else Any] * len(value)
    items = [_convert(item, kind, f"{field}[{index}]") for index, (item, kind) in enumerate(zip(value, kinds))]
    return True, tuple(items) if origin is tuple else items


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, null first so that it is not mistaken for text."""
    if get_origin(annotation) in (Union, types.UnionType):
        return sorted(get_args(annotation), key=lambda kind: kind is not type(None))
    return [annotation]


def _describe(annotation: Any) -> str:
    """An annotation in words."""
    alternatives = _alternatives(annotation)
    if len(alternatives) > 1:
        return " or ".join(_describe(kind) for kind in alternatives)
    if annotation is None or annotation is type(None):
        return "null"
    if annotation in _NAMES:
        return _NAMES[annotation]
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Literal:
        return ", ".join(str(value) for value in arguments)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}: {', '.join(_describe(kind) for kind in arguments)}"
    if origin in (list, tuple, Sequence, Iterable):
        return f"a list, each {_describe(arguments[0])}" if arguments else "a list"
    if origin in (dict, Mapping) or is_dataclass(origin):
        return "a mapping"
    if annotation is Any:
        return "a value"
    return f"a mapping with {TARGET} of a {_name_of(origin)}" if inspect.isclass(origin) else str(annotation)


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _name_of(target: Any) -> str:
    return getattr(target, "__name__", str(target))


def _show(value: Any) -> str:
    """A value as a config shows it, in one short line."""
    words = {None: "null", True: "true", False: "false"}
    shown = words[value] if value is None or isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
