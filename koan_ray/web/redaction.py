"""Takes secrets out of what leaves the process: values under telling names, fields declared secret, credentials in texts.

Four rules. A value that is stored as a secret (`koan_ray.exact`) is replaced, whoever declared it. A value whose key says
what it is (``password``, ``api_key``, …) is replaced. A field that its JSON Schema declares secret (pydantic's `SecretStr`
and `SecretBytes`: ``writeOnly`` or ``format: password``) is replaced, whatever its name. And the values that were replaced
in a job's context or result are replaced in all of its texts, too: an exception likes to repeat them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from koan_ray.domain.texts import readable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

REDACTED: Final = "[redacted]"
_MIN_SECRET: Final = 4  # shorter values are not looked for in texts: they would be found everywhere
_MAX_SECRETS: Final = 200
_NAMES: Final = re.compile(
    r"passw(or)?d|passphrase|pwd$|secret|token$|^token|_token|api[-_]?key|access[-_]?key|private[-_]?key|credential"
    r"|authorization|^auth$|bearer|cookie|session[-_]?id|signature|dsn$",
    re.IGNORECASE,
)
_USERINFO: Final = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/@\s'\"]+@", re.IGNORECASE)
_ASSIGNED: Final = re.compile(
    r"(?P<name>[\w-]*(?:passw(?:or)?d|passphrase|secret|token|api[-_]?key|access[-_]?key|private[-_]?key|credential)[\w-]*)"
    r"(?P<is>['\"]?\s*[:=]\s*)(?!\[redacted\])(?P<value>'[^']*'|\"[^\"]*\"|[^\s,;&'\")}\]]+)",
    re.IGNORECASE,
)
_BEARER: Final = re.compile(r"\b(?P<scheme>Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_TURNING: Final = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # the marks that turn text around


def is_secret_name(name: str) -> bool:
    """Tell whether a key says that its value is a secret."""
    return _NAMES.search(name) is not None


def clean_text(text: str) -> str:
    """Return a text without credentials and without characters that a terminal or a log could mistake for its own."""
    text = readable(text)  # first: an escape sequence in its middle would hide a name from the patterns
    text = _USERINFO.sub(r"\g<scheme>***@", text)
    text = _ASSIGNED.sub(rf"\g<name>\g<is>{REDACTED}", text)
    text = _BEARER.sub(rf"\g<scheme> {REDACTED}", text)
    return _TURNING.sub("\N{REPLACEMENT CHARACTER}", text)


def clean_schema(schema: Any) -> Any:
    """Return a JSON Schema without defaults and examples that hold secrets: a form must not offer them."""
    return _clean_schema(schema, schema.get("$defs", {}) if isinstance(schema, dict) else {}, is_secret=False)


def _clean_schema(schema: Any, definitions: Mapping[str, Any], *, is_secret: bool) -> Any:
    if isinstance(schema, list):
        return [_clean_schema(item, definitions, is_secret=is_secret) for item in schema]
    if not isinstance(schema, dict):
        return schema
    cleaned: dict[str, Any] = {}
    is_secret = is_secret or schema.get("writeOnly") is True or schema.get("format") == "password"
    for name, value in schema.items():
        if name in ("default", "examples", "const", "enum"):
            if not is_secret and Redactor().value(value, {**schema, "$defs": definitions}) == value:
                cleaned[name] = value
        elif name in ("properties", "$defs", "patternProperties") and isinstance(value, dict):
            cleaned[name] = {
                key: _clean_schema(item, definitions, is_secret=name == "properties" and is_secret_name(key))
                for key, item in value.items()
            }
        else:
            cleaned[name] = _clean_schema(value, definitions, is_secret=is_secret)
    return cleaned


class Redactor:
    """Redacts one job's values, and remembers them to redact its texts.

    Args:
        values: Secrets that are known from elsewhere.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._found: dict[str, None] = dict.fromkeys(values)

    def value(self, value: Any, schema: Mapping[str, Any] | None = None) -> Any:
        """Return a JSON value without secrets; ``schema`` is its JSON Schema, if there is one."""
        definitions = (schema or {}).get("$defs", {})
        return self._walk(value, [schema] if schema else [], definitions, 0)

    def text(self, text: str | None) -> str | None:
        """Return a text without the secrets that were found so far."""
        if text is None:
            return None
        text = readable(text)  # as texts of jobs are stored, so a secret may be in there as that made it
        for secret in sorted({*self._found, *map(readable, self._found)}, key=len, reverse=True):
            if secret in text:
                text = text.replace(secret, REDACTED)
        return clean_text(text)

    def _walk(self, value: Any, schemas: list[Mapping[str, Any]], definitions: Mapping[str, Any], depth: int) -> Any:
        schemas = _resolved(schemas, definitions)
        if any(schema.get("writeOnly") is True or schema.get("format") == "password" for schema in schemas):
            return self._hide(value)
        if depth > 100:
            return REDACTED
        if isinstance(value, dict):
            if len(value) == 1 and "koan:secret" in value:  # the class that declared it may not be known here
                return self._hide(value)
            if len(value) == 1 and (shown := self._tag(value, schemas, definitions, depth)) is not None:
                return shown
            return {
                name: self._hide(item)
                if is_secret_name(name)
                else self._walk(item, _below(schemas, name), definitions, depth + 1)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [self._walk(item, _items(schemas, place), definitions, depth + 1) for place, item in enumerate(value)]
        return self.text(value) if isinstance(value, str) and self._found else value

    def _tag(
        self, value: dict[str, Any], schemas: list[Mapping[str, Any]], definitions: Mapping[str, Any], depth: int
    ) -> dict[str, Any] | None:
        """Return a tag of `koan_ray.exact` around something else; None for any other value."""
        name, content = next(iter(value.items()))
        if not isinstance(content, list):
            return None
        if name == "koan:choice" and len(content) == 2:
            return {name: [content[0], self._walk(content[1], schemas, definitions, depth + 1)]}
        if name == "koan:tuple":
            return {name: self._walk(content, schemas, definitions, depth + 1)}
        if name == "koan:dict" and all(isinstance(pair, list) and len(pair) == 2 for pair in content):
            pairs: list[Any] = []
            for key, item in content:
                is_secret = isinstance(key, str) and is_secret_name(key)
                pairs.append([key, self._hide(item) if is_secret else self._walk(item, [], definitions, depth + 1)])
            return {name: pairs}
        return None

    def _hide(self, value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        self._remember(value)
        return REDACTED

    def _remember(self, value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                self._remember(item)
        elif isinstance(value, list):
            for item in value:
                self._remember(item)
        elif isinstance(value, (str, int, float)) and len(self._found) < _MAX_SECRETS:
            text = str(value)
            if len(text) >= _MIN_SECRET and text != REDACTED and set(text) != {"*"}:
                self._found[text] = None


def _resolved(schemas: list[Mapping[str, Any]], definitions: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the schemas that may be meant: references followed, alternatives laid side by side."""
    found: list[Mapping[str, Any]] = []
    pending = list(schemas)
    seen: set[str] = set()
    while pending and len(found) < 50:
        schema = pending.pop()
        if not isinstance(schema, dict):
            continue
        reference = schema.get("$ref")
        if isinstance(reference, str):
            if reference not in seen:
                seen.add(reference)
                pending.append(definitions.get(reference.rpartition("/")[2], {}))
            if len(schema) == 1:
                continue
        found.append(schema)
        for how in ("anyOf", "oneOf", "allOf"):
            pending.extend(schema.get(how, ()))
    return found


def _below(schemas: list[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    found = []
    for schema in schemas:
        properties = schema.get("properties", {})
        if name in properties:
            found.append(properties[name])
        elif isinstance(schema.get("additionalProperties"), dict):
            found.append(schema["additionalProperties"])
    return found


def _items(schemas: list[Mapping[str, Any]], place: int) -> list[Mapping[str, Any]]:
    found = []
    for schema in schemas:
        prefix = schema.get("prefixItems", ())
        if place < len(prefix):
            found.append(prefix[place])
        elif isinstance(schema.get("items"), dict):
            found.append(schema["items"])
    return found
