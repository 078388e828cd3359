"""A type's core schema once more, so that its values are written with tags, and read from them.

Only leaves differ: numbers that are none, texts and bytes that are no UTF-8, instants in named zones, secrets, and whatever
stands in a place for which nothing is declared. Everything else is validated and written as pydantic does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, time, timedelta
from typing import Any, Final, NamedTuple

from pydantic_core import PydanticSerializationUnexpectedValue, SchemaSerializer, SchemaValidator, core_schema

from koan_ray.exact import tags

Change = Callable[[dict[str, Any]], dict[str, Any]]

# What belongs to the user or to pydantic, and holds no schema.
_OPAQUE: Final = frozenset({
    "default", "default_factory", "metadata", "expected", "members", "function", "cls", "config", "missing",
    "custom_error_context", "serialization", "post_init", "generic_origin", "discriminator",
})  # fmt: skip
_ANY: Final[dict[str, Any]] = {"type": "any"}
_CHILDREN: Final[dict[str, tuple[str, ...]]] = {  # what stands for anything where nothing is declared
    "list": ("items_schema",), "set": ("items_schema",), "frozenset": ("items_schema",),
    "dict": ("keys_schema", "values_schema"),
}  # fmt: skip
_MOST_LEVELS: Final = 200


class Tagging(NamedTuple):
    """What writes the values of a type with tags, and what reads them.

    The second writer says of each member of a union which one it is; it is there only for a type with unions.
    """

    writer: SchemaSerializer
    choosing_writer: SchemaSerializer | None
    reader: SchemaValidator


def tagging_of(schema: Any) -> Tagging:
    """Return what writes and reads the values of a type.

    Raises:
        Exception: Anything that pydantic has to say; then its values cannot be written with tags.
    """
    more: Any = {"_use_prebuilt": False}  # those of the classes know no tags
    chooses = _Choosing(schema)
    choosing = None
    if any(node["type"] == "union" or _is_sequence(node) for node in nodes(schema)):
        choosing = SchemaSerializer(_copied(schema, chooses.written, 0), None, **more)
    return Tagging(
        SchemaSerializer(_copied(schema, _written, 0), None, **more), choosing,
        SchemaValidator(_copied(schema, _read, 0), None, **more),
    )  # fmt: skip


def nodes(schema: Any, level: int = 0) -> Any:
    """Yield all schemas within a schema, itself first."""
    if level > _MOST_LEVELS:
        return
    if isinstance(schema, Mapping):
        if isinstance(schema.get("type"), str):
            yield schema
        for name, value in schema.items():
            if name in ("fields", "choices") and isinstance(value, Mapping):
                for inner in value.values():
                    yield from nodes(inner, level + 1)
            elif name not in _OPAQUE:
                yield from nodes(value, level + 1)
    elif isinstance(schema, (list, tuple)):
        for inner in schema:
            yield from nodes(inner, level + 1)


def is_secret(schema: Mapping[str, Any]) -> bool:
    """Tell whether a schema is that of pydantic's `SecretStr`, `SecretBytes` or `Secret`."""
    function = schema.get("serialization", {}).get("function")
    return (
        getattr(function, "__module__", "") == "pydantic.types"
        and getattr(function, "__name__", "").startswith("_serialize_secret")
    )  # fmt: skip


def _copied(schema: Any, change: Change, level: int) -> Any:
    if level > _MOST_LEVELS:
        msg = "the schema is nested too deeply"
        raise ValueError(msg)
    if isinstance(schema, (list, tuple)):
        return type(schema)(_copied(item, change, level + 1) for item in schema)
    if not isinstance(schema, Mapping):
        return schema
    copy: dict[str, Any] = {}
    for name, value in schema.items():
        if name in ("fields", "choices") and isinstance(value, Mapping):
            copy[name] = {key: _copied(inner, change, level + 1) for key, inner in value.items()}
        else:
            copy[name] = value if name in _OPAQUE else _copied(value, change, level + 1)
    return change(_completed(copy, change)) if isinstance(copy.get("type"), str) else copy


def _completed(node: dict[str, Any], change: Change) -> dict[str, Any]:
    """Put a schema where one is left out because anything may stand there."""
    if _is_loose(node):
        return node
    if (node.get("config") or {}).get("extra_fields_behavior") == "allow" or node.get("extra_behavior") == "allow":
        _add_extras(node, change)
    missing = _CHILDREN.get(node["type"], ())
    return {**node, **{name: change(dict(_ANY)) for name in missing if name not in node}}


def _add_extras(node: dict[str, Any], change: Change) -> None:
    """Have what a model does not declare, and allows, written and read like anything else."""
    while node["type"] not in ("model-fields", "typed-dict"):
        inner = node.get("schema")
        if not isinstance(inner, dict):
            return
        node = inner
    node.setdefault("extras_schema", change(dict(_ANY)))


def _is_loose(node: Mapping[str, Any]) -> bool:
    """Tell whether a dict may have keys of any type: then it is written as a whole."""
    if node["type"] != "dict" or "serialization" in node:
        return False
    keys = node.get("keys_schema", _ANY)  # as it is, or as `_read` has changed it
    while keys["type"] == "function-after":
        keys = keys["schema"]
    is_loose: bool = keys["type"] == "any"
    return is_loose


# --- writing ---------------------------------------------------------------------------------------------------------


def _of(kind: type[Any], write: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def written(value: Any) -> Any:
        if not isinstance(value, kind):  # another member of a union
            msg = f"expected {kind.__name__}"
            raise PydanticSerializationUnexpectedValue(msg)
        return write(value)

    return written


def _loose(value: Any) -> Any:
    return tags.tagged(value)


_WRITERS: Final[dict[str, Callable[[Any], Any]]] = {
    "any": _loose,
    "str": _of(str, tags.text),
    "float": _of(float, tags.floating),
    "bytes": _of(bytes, tags.octets),
    "datetime": _of(datetime, tags.instant),
    "time": _of(time, tags.clock_time),
    "timedelta": _of(timedelta, tags.span),
}


def _written(node: dict[str, Any]) -> dict[str, Any]:
    if is_secret(node):
        write: Callable[[Any], Any] | None = tags.secret
    elif "serialization" in node:  # the user's, or of a type of pydantic's
        return node
    elif _is_loose(node):
        write = _of(dict, _loose)
    else:
        write = _WRITERS.get(node["type"])
    if write is None:
        return node
    return {**node, "serialization": core_schema.plain_serializer_function_ser_schema(write, when_used="json")}


class _Choosing:
    """Writes which member of a union a value is, by the first that takes it as it is."""

    def __init__(self, schema: Any) -> None:
        self._definitions = schema["definitions"] if schema["type"] == "definitions" else []

    def written(self, node: dict[str, Any]) -> dict[str, Any]:
        if _is_sequence(node):
            ser = core_schema.wrap_serializer_function_ser_schema(_sequence, schema=_bare(node), when_used="json")
            return _anew({"type": "any", "serialization": ser}, node)
        if node["type"] != "union" or "serialization" in node:
            return _written(node)
        return {**node, "choices": [self._choice(place, choice) for place, choice in enumerate(node["choices"])]}

    def _choice(self, place: int, choice: Any) -> Any:
        schema = choice[0] if isinstance(choice, tuple) else choice
        inner: Any = core_schema.definitions_schema(schema, self._definitions) if self._definitions else schema
        validator: list[SchemaValidator] = []  # made when it is needed

        def write(value: Any, handler: Callable[[Any], Any]) -> Any:
            if not validator:
                validator.append(SchemaValidator(inner))
            if not validator[0].isinstance_python(value, strict=True):
                msg = "another member of the union"
                raise PydanticSerializationUnexpectedValue(msg)
            return {"koan:choice": [place, handler(value)]}

        ser = core_schema.wrap_serializer_function_ser_schema(write, schema=schema, when_used="json")
        return {"type": "any", "serialization": ser}


def _is_sequence(node: Mapping[str, Any]) -> bool:
    """Tell whether a schema is that of `Sequence`, which a tuple is as well."""
    function = node.get("serialization", {}).get("function")
    return getattr(function, "__name__", "") == "serialize_sequence_via_list"


def _sequence(value: Any, handler: Callable[[Any], Any]) -> Any:
    return {"koan:tuple": handler(list(value))} if type(value) is tuple else handler(value)


# --- reading ---------------------------------------------------------------------------------------------------------

_READ: Final[dict[str, type[Any]]] = {
    "str": str, "float": float, "bytes": bytes, "datetime": datetime, "time": time, "timedelta": timedelta,
}  # fmt: skip


def _read(node: dict[str, Any]) -> dict[str, Any]:
    kind = node["type"]
    if kind == "union":
        return _anew(_chosen(node), node)
    if _is_sequence(node):
        whole = core_schema.no_info_before_validator_function(_elements, _bare(node))
        choices: dict[Any, Any] = {"": _bare(node), "tuple": core_schema.no_info_after_validator_function(tuple, whole)}
        return _anew(core_schema.tagged_union_schema(choices, _which_sequence), node)
    if is_secret(node):
        return _anew(core_schema.no_info_before_validator_function(tags.unveiled, _bare(node)), node)
    if kind == "any":
        return _anew(core_schema.no_info_after_validator_function(tags.revived, _bare(node)), node)
    if _is_loose(node):
        inner = core_schema.no_info_after_validator_function(_revived_as(dict), core_schema.any_schema())
        return _anew(inner, node)
    if kind in _READ and "serialization" not in node:
        tag = core_schema.no_info_after_validator_function(_revived_as(_READ[kind]), core_schema.dict_schema())
        return _anew(core_schema.union_schema([_bare(node), tag], mode="left_to_right"), node)
    return node


def _chosen(node: dict[str, Any]) -> Any:
    choices: dict[Any, Any] = {"": _bare(node)}
    for place, choice in enumerate(node["choices"]):
        schema = choice[0] if isinstance(choice, tuple) else choice
        choices[str(place)] = core_schema.no_info_before_validator_function(_content, schema)
    return core_schema.tagged_union_schema(choices, _which)


def _which(value: Any) -> str:
    if isinstance(value, dict) and len(value) == 1 and isinstance(found := value.get("koan:choice"), list) and found:
        return str(found[0])
    return ""


def _content(value: Any) -> Any:
    return value["koan:choice"][1]


def _which_sequence(value: Any) -> str:
    return "tuple" if isinstance(value, dict) and value.keys() == {"koan:tuple"} else ""


def _elements(value: Any) -> Any:
    return value["koan:tuple"]


def _bare(node: dict[str, Any]) -> Any:
    return {name: value for name, value in node.items() if name != "ref"}


def _anew(node: Any, instead_of: Mapping[str, Any]) -> dict[str, Any]:
    return {**node, "ref": instead_of["ref"]} if "ref" in instead_of else dict(node)


def _revived_as(kind: type[Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        found = tags.revived(value)
        if type(found) is not kind:
            msg = f"expected a {kind.__name__}"
            raise ValueError(msg)
        return found

    return read
