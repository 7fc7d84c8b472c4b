"""JSON documents that have a type: frozen dataclasses, read from what anybody may have written, and their JSON Schema.

A field's type says what JSON it takes: text, a whole number, a number, a flag, an object of another such class,
`Mapping[str, T]`, `Sequence[T]`, `T | None`; `Any` takes everything. `Annotated[T, Limits(...)]` narrows it. A field
with a default may be absent, or null; keys that no field has are passed over, so that a later version may add some.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from oneround.errors import BadData
from oneround.text import shown

Record = TypeVar("Record")

_MOST_LETTERS = 64 << 10  # of one text, where nothing else is said
_DEEPEST = 16  # lists and objects within each other, where a type takes anything
_WHOLE = 2**63  # one more than the largest whole number, where nothing else is said
_SCALARS: dict[Any, tuple[str, str]] = {
    str: ("string", "a string"),
    int: ("integer", "a whole number"),
    float: ("number", "a number"),
    bool: ("boolean", "true or false"),
}


@dataclass(frozen=True)
class Limits:
    """What narrows a type: a regular expression for the whole text and its most letters, or the least and the most
    that a number may be. `about` says what the value means, and `expected` what a message asks for instead."""

    about: str = ""
    pattern: str = ""
    longest: int | None = None
    low: float | None = None
    high: float | None = None
    expected: str = ""

    def hold(self, value: Any) -> bool:
        """Whether a value of the right type keeps to them."""
        if isinstance(value, str):
            short = self.longest is None or len(value) <= self.longest
            return short and (not self.pattern or re.fullmatch(self.pattern, value) is not None)
        if isinstance(value, int | float):
            return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        return True

    @property
    def sentence(self) -> str:
        """What is expected, for a message."""
        if self.expected:
            return self.expected
        if self.pattern:
            return f"text like {self.pattern}"
        if self.longest is not None:
            return f"at most {self.longest} letters"
        if self.low is not None and self.high is not None:
            return f"{self.low} to {self.high}"
        return f"{self.low} or more" if self.high is None else f"at most {self.high}"

    def keywords(self) -> dict[str, Any]:
        """As JSON Schema has them."""
        keywords = {
            "description": self.about or None,
            "pattern": f"^(?:{self.pattern})$" if self.pattern else None,
            "maxLength": self.longest,
            "minimum": self.low,
            "maximum": self.high,
        }
        return {name: value for name, value in keywords.items() if value is not None}


def read(kind: type[Record], text: bytes, source: str, *, most: int) -> Record:
    """A document of at most so many bytes; `source` is what messages call it.

    Raises:
        BadData: it is too large, is not JSON, or has a value of the wrong type or out of range, which is named.
    """
    if len(text) > most:
        raise BadData(f"{source} is larger than {most >> 20} MiB")
    try:
        values = json.loads(text, parse_constant=_no_number, object_pairs_hook=_object_of)
    except (ValueError, RecursionError) as error:
        raise BadData(f"{source} is not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise BadData(f"{source} is not a JSON object")
    whole: Any = kind
    record: Record = _reader(whole)(values, (source, None))
    return record


def schema(kind: type, title: str, about: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a class's documents."""
    definitions: dict[str, Any] = {}
    document = _object_schema(kind, definitions)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, "description": about}
    return {**head, **document, "$defs": dict(sorted(definitions.items()))}


# ---- reading ----


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no number in JSON")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two values readers would take one or the other."""
    values = dict(pairs)
    if len(values) < len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(double)} is there twice")
    return values


Place = tuple[str, Any]  # a key, and the place that it is in; of the document itself None
Reader = Callable[[Any, Place], Any]


def _wrong(place: Place, fault: str) -> BadData:
    """`source: key: key is 3; expected a string`, from the innermost key and what is said of it."""
    key, outer = place
    path = []
    while outer is not None:
        name, outer = outer
        path.append(name)
    return BadData(": ".join([*reversed(path), f"{key} {fault}" if path else f"{key}: {fault}"]))


@cache
def _reader(hint: Any) -> Reader:
    """What reads the JSON of a type. Made once: a document may have a million values of one type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _within(arguments[1], _reader(arguments[0]))
    if origin in (Union, UnionType):
        return _reader(_inner(arguments))
    if origin is Mapping:
        return _mapping_reader(_reader(arguments[0]), _reader(arguments[1]))
    if origin is Sequence:
        return _sequence_reader(_reader(arguments[0]))
    if is_dataclass(hint):
        return _record_reader(hint)
    return _anything if hint is Any else _scalar_reader(hint)


def _inner(arguments: tuple[Any, ...]) -> Any:
    """The T of `T | None`."""
    (inner,) = (argument for argument in arguments if argument is not NoneType)
    return inner


def _record_reader(kind: Any) -> Reader:
    readers = [(field.name, _reader(hint), _is_required(field)) for field, hint in _typed_fields(kind)]

    def read_record(values: Any, place: Place) -> Any:
        arguments = {}
        for name, read_field, required in readers:
            value = _of_type(values, dict, "an object", place).get(name)
            if value is not None:
                arguments[name] = read_field(value, (name, place))
            elif required:
                raise _wrong((name, place), "is absent")
        return kind(**arguments)

    return read_record


def _mapping_reader(read_key: Reader, read_item: Reader) -> Reader:
    def read_mapping(value: Any, place: Place) -> Any:
        items = _of_type(value, dict, "an object", place).items()
        return {read_key(key, ("a key", place)): read_item(item, (key, place)) for key, item in items}

    return read_mapping


def _sequence_reader(read_item: Reader) -> Reader:
    def read_sequence(value: Any, place: Place) -> Any:
        items = enumerate(_of_type(value, list, "a list", place))
        return tuple(read_item(item, (f"number {number}", place)) for number, item in items)

    return read_sequence


def _within(limits: Limits, read_value: Reader) -> Reader:
    def read_narrowed(value: Any, place: Place) -> Any:
        checked = read_value(value, place)
        if not limits.hold(checked):
            raise _wrong(place, f"is {shown(value)}; expected {limits.sentence}")
        return checked

    return read_narrowed


def _of_type(value: Any, kind: type, expected: str, place: Place) -> Any:
    if not isinstance(value, kind):
        raise _wrong(place, f"is {shown(value)}; expected {expected}")
    return value


def _scalar_reader(kind: Any) -> Reader:
    _, expected = _SCALARS[kind]
    holds = _HOLDS[kind]

    def read_scalar(value: Any, place: Place) -> Any:
        if not holds(value):
            raise _wrong(place, f"is {shown(value)}; expected {expected}")
        return float(value) if kind is float else value

    return read_scalar


# A flag is a whole number to Python. float() of a number of thousands of digits overflows; a comparison does not.
_HOLDS: dict[Any, Callable[[Any], bool]] = {
    str: lambda value: isinstance(value, str) and len(value) <= _MOST_LETTERS,
    int: lambda value: isinstance(value, int) and not isinstance(value, bool) and -_WHOLE <= value < _WHOLE,
    float: lambda value: isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300,
    bool: lambda value: isinstance(value, bool),
}


def _anything(value: Any, place: Place) -> Any:
    if not _is_shallow(value):
        raise _wrong(place, f"is nested more than {_DEEPEST} deep")
    return value


def _is_shallow(value: Any, left: int = _DEEPEST) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return left > 0 and all(_is_shallow(item, left - 1) for item in inner)


# ---- the schema ----


def _typed_fields(kind: type) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return [(field, hints[field.name]) for field in fields(kind)]


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _object_schema(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    typed = _typed_fields(kind)
    return {
        "type": "object",
        "properties": {field.name: _schema(hint, definitions) for field, hint in typed},
        "required": [field.name for field, _ in typed if _is_required(field)],
    }


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return {**_schema(arguments[0], definitions), **arguments[1].keywords()}
    if origin in (Union, UnionType):
        return {"anyOf": [_schema(_inner(arguments), definitions), {"type": "null"}]}
    if origin is Mapping:
        keys, inner = (_schema(argument, definitions) for argument in arguments)
        names = {"propertyNames": keys} if arguments[0] is not str else {}
        return {"type": "object", **names, "additionalProperties": inner}
    if origin is Sequence:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if is_dataclass(hint):
        name = hint.__name__  # type: ignore[union-attr]
        if name not in definitions:
            definitions[name] = {}
            definitions[name] = {"description": _first_line(hint), **_object_schema(hint, definitions)}  # type: ignore[arg-type]
        return {"$ref": f"#/$defs/{name}"}
    return {} if hint is Any else {"type": _SCALARS[hint][0]}


def _first_line(kind: Any) -> str:
    return " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
