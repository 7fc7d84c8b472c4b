"""Options that belong together are one frozen dataclass, whose fields are `Annotated` as typer has it. A command takes
it as one parameter, and hands it on as arguments to what it starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter
from typing import Any, get_args, get_type_hints

from typer.models import OptionInfo


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of each of its parameters that is a dataclass, in that parameter's place.

    The defaults are those of the parameter's own default, so that two commands can share options and differ in them.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    def run(**values: object) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    options: list[Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            options += _options(groups[name], parameter.default)
        else:
            options.append(_option(name, hints[name], parameter.default))
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {option.name: option.annotation for option in options}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _options(group: Any, default: object) -> Iterator[Parameter]:
    """A parameter for each field of a dataclass; without an instance for a default its own defaults hold."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        value = _default(field) if default is Parameter.empty else getattr(default, field.name)
        yield _option(field.name, hints[field.name], value)


def _option(name: str, hint: object, default: object) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _default(field: Field[Any]) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return Parameter.empty if field.default is MISSING else field.default


def as_arguments(options: Any) -> list[str]:
    """The arguments from which a spread command makes an equal instance, whatever its defaults are.

    None is left out, since no argument stands for it, and so is an empty text that is the default.
    """
    hints = get_type_hints(type(options), include_extras=True)
    arguments: list[str] = []
    for field in fields(options):
        value = getattr(options, field.name)
        if value is not None and not value == "" == field.default:
            arguments += _arguments(_flags(field.name, hints[field.name]), value)
    return arguments


def _flags(name: str, hint: object) -> tuple[str, ...]:
    """How an option is written: `--name`; of a switch, where it has them, both ways."""
    option = next(note for note in get_args(hint) if isinstance(note, OptionInfo))
    # Within Annotated the first declaration is where a default would be otherwise, until typer has looked at it.
    declared = [text for text in (option.default, *(option.param_decls or ())) if isinstance(text, str)]
    if declared:
        return tuple(declared[0].split("/"))
    flag = f"--{name.replace('_', '-')}"
    return (flag, flag.replace("--", "--no-", 1)) if get_args(hint)[0] is bool else (flag,)


def _arguments(flags: tuple[str, ...], value: object) -> list[str]:
    if isinstance(value, bool):
        return [flags[0]] if value else list(flags[1:])
    if isinstance(value, list):
        return [argument for item in value for argument in (flags[0], str(item))]
    return [flags[0], str(value)]
