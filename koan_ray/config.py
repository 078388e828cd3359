"""What a user can set, and where it may come from: keywords, environment, ``koan.toml``, defaults, in this order.

All problems are reported at once, each with its path, the value and where it came from. Credentials in URLs are never shown.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from koan_ray.domain.archival import ARCHIVE, SETTLED, ArchivalPolicy
from koan_ray.domain.durations import bound
from koan_ray.domain.status import JobStatus
from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMES = ("memory://", "mongodb://", "mongodb+srv://", "sqlite:///", "postgresql://", "file:///")
_CREDENTIALS = re.compile(r"//[^/@\s]*@")
_PREFIX = "KOAN_RAY_"
_SECRET_PATHS = (("web", "tokens"), ("web", "session_key"))
_GOOD_TOKEN = re.compile(r"[A-Za-z0-9._~-]{20,200}")


def _duration(value: object) -> timedelta:
    try:
        return timedelta(seconds=bound(value, name="duration"))
    except ConfigurationError:
        text = "expected a duration of 0 or more: a timedelta, seconds, or text such as '90s', '60m', '2h', '30d'"
        raise ValueError(text) from None


def _url(value: str) -> str:
    if not value.startswith(SCHEMES):
        msg = f"expected a URL that begins with one of {', '.join(SCHEMES)}"
        raise ValueError(msg)
    return value


Duration = Annotated[timedelta, BeforeValidator(_duration)]


def _several(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _settled(value: JobStatus) -> JobStatus:
    if not value.is_final:
        msg = f"expected one or several of {', '.join(SETTLED)}: only jobs that have ended are archived"
        raise ValueError(msg)
    return value


_Settled = Annotated[JobStatus, AfterValidator(_settled)]
Count = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceSettings(_Section):
    """One named connection to a store."""

    url: Annotated[str, AfterValidator(_url)] = Field("memory://", repr=False)


class JobsSettings(_Section):
    """Where ``.persist()`` without arguments keeps jobs, and the modules that define job classes."""

    default_source: str = "default"
    default_partition: Annotated[str, Field(pattern=r"^([a-z0-9_-]{1,64})?$")] = ""
    audit_source: str = ""
    # Imported by the API, and by commands that start jobs by kind or run them again; the engine is sent the classes.
    modules: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()


class MemorySettings(_Section):
    """How long the in-memory store keeps finished jobs, how many, and how much of what their items have produced."""

    completed_retention: Duration = timedelta(minutes=60)
    faulted_retention: Duration = timedelta(minutes=120)
    max_finished: Some = 1_000_000
    max_part_bytes: Some = 256 * 1024 * 1024  # what items of jobs in memory have produced, of all jobs together


class PolicySettings(_Section):
    """One archival policy; what each means: `koan_ray.domain.archival.ArchivalPolicy`. What is left out is as usual."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    status: Annotated[tuple[_Settled, ...], BeforeValidator(_several), Field(min_length=1)] = SETTLED
    kinds: Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)] | None = None
    older_than: Duration | None = None  # archival.retention
    source: str | None = None
    partition: str | None = None
    target_partition: str = ARCHIVE
    target_source: str | None = None
    keep_count: Count = 0
    batch: Some | None = None  # archival.batch

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self.policy(timedelta(), 1)
        except ConfigurationError as error:
            raise ValueError(str(error)) from None
        return self

    def policy(self, retention: timedelta, batch: int) -> ArchivalPolicy:
        """Return the policy, with these values where it has none of its own."""
        age = self.older_than if self.older_than is not None else retention
        return ArchivalPolicy(
            self.name, self.status, self.kinds, age.total_seconds(), self.source, self.partition, self.target_partition,
            self.target_source, self.keep_count, self.batch or batch,
        )  # fmt: skip


class ArchivalSettings(_Section):
    """When finished documents move to the archive.

    The first of the ``policies`` that covers a job decides over it; ``retention`` is for all others.
    """

    enabled: bool = True
    check_interval: Annotated[Duration, Field(gt=timedelta())] = timedelta(minutes=60)
    retention: Duration = timedelta(days=30)
    batch: Some = 500
    policies: tuple[PolicySettings, ...] = ()

    @field_validator("policies")
    @classmethod
    def _check_names(cls, policies: tuple[PolicySettings, ...]) -> tuple[PolicySettings, ...]:
        names = [policy.name for policy in policies] + ["default"]
        for name in names:
            if names.count(name) > 1:
                text = f"two policies are named {name!r}; each needs a name of its own, and 'default' is the last one's"
                raise ValueError(text)
        return policies

    def resolved(self) -> tuple[ArchivalPolicy, ...]:
        """Return all policies; the last one covers every job."""
        own = [policy.policy(self.retention, self.batch) for policy in self.policies]
        return (*own, ArchivalPolicy(older_than_s=self.retention.total_seconds(), batch=self.batch))


class EngineSection(_Section):
    """Limits and intervals of coordinator, broker and job actors; what each means: `koan_ray.engine.settings`."""

    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "koan"
    lease_ttl: Duration = timedelta(seconds=15)
    shards: Annotated[int, Field(ge=1, le=64)] = 1
    max_actors: Count = 0
    max_queued: Some = 2_000_000
    max_depth: Some = 100
    max_crashes: Some = 3
    cancel_grace: Duration = timedelta(seconds=5)
    inline_limit: Some = 1_048_576
    max_sessions: Some = 10_000
    max_watched: Some = 1_000_000
    batch_target: Duration = timedelta(milliseconds=10)
    batch_limit: Some = 500
    overrun: Duration = timedelta(milliseconds=20)
    idle_ttl: Duration = timedelta(seconds=30)
    recycle_age: Duration = timedelta(hours=4)
    recycle_rss: Some = 4 * 1024**3
    orphan_timeout: Duration = timedelta(seconds=60)
    stuck_after: Duration = timedelta(seconds=30)
    max_parked: Some = 1000
    max_watchers: Some = 10_000
    max_tracked: Some = 100_000


class TokenSettings(_Section):
    """One bearer token of the HTTP API: who it stands for, and what that may do; what the roles mean: `koan_ray.web`.

    Either ``token`` itself, or ``sha256``, its SHA-256 in hexadecimal, so that the file holds nothing that opens a door.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@-]{1,64}$")]
    roles: Annotated[
        tuple[Literal["viewer", "reader", "submitter", "operator", "admin"], ...],
        BeforeValidator(_several),
        Field(min_length=1),
    ]
    token: SecretStr | None = None
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", repr=False)
    expires_at: AwareDatetime | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.token is None) == (self.sha256 is None):
            msg = "give either token or sha256, and not both"
            raise ValueError(msg)
        if self.token is not None and not _GOOD_TOKEN.fullmatch(self.token.get_secret_value()):
            msg = "token: expected 20 to 200 of A-Z a-z 0-9 . _ ~ -; make one with `openssl rand -hex 32`"
            raise ValueError(msg)
        return self

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the token."""
        if self.token is not None:
            return hashlib.sha256(self.token.get_secret_value().encode()).digest()
        return bytes.fromhex(self.sha256 or "")


class WebLimits(_Section):
    """What one process of the HTTP API takes at most, and what it does about more: `koan_ray.web`."""

    body: Annotated[int, Field(ge=1024, le=64 * 1024**2)] = 1_048_576  # bytes of a request
    body_timeout: Duration = timedelta(seconds=10)  # for a request to arrive
    depth: Annotated[int, Field(ge=4, le=100)] = 32  # nesting of JSON
    page: Annotated[int, Field(ge=1, le=1000)] = 500
    bulk: Annotated[int, Field(ge=1, le=100_000)] = 10_000  # jobs of one cancel or retry by filter
    requests_per_second: Annotated[float, Field(gt=0)] = 50.0  # of one token, in the long run
    burst: Some = 200  # of one token, at once
    streams: Some = 500  # server-sent events
    websockets: Some = 100
    queued: Some = 1_000_000  # jobs that are not final; above this the API takes no new ones
    answer_timeout: Duration = timedelta(seconds=10)  # of coordinator, broker and sources


class WebSettings(_Section):
    """The HTTP API: where it listens, who may do what, and which job classes can be started through it."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8267
    # How browsers reach it, behind a proxy; with the path under which the proxy shows it, if any.
    public_url: Annotated[str, Field(pattern=r"^(https?://[^/\s?#]+(/[^\s?#;]*)?)?$")] = ""
    allowed_hosts: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()
    modules: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()  # imported at the start: they define job classes
    tokens: tuple[TokenSettings, ...] = ()
    session_lifetime: Duration = timedelta(hours=12)  # of a dashboard's cookie
    session_key: SecretStr | None = Field(None, min_length=20)  # signs cookies; None: that of session_key_file
    session_key_file: str = ".koan/session.key"  # made when it is not there; "": a new key at each start
    audit_file: str = ".koan/audit.jsonl"  # "": the log only
    audit_bytes: Annotated[int, Field(ge=65536)] = 16 * 1024**2  # of one file; four older ones are kept
    limits: WebLimits = WebLimits()

    @field_validator("tokens")
    @classmethod
    def _check_names(cls, tokens: tuple[TokenSettings, ...]) -> tuple[TokenSettings, ...]:
        names = [token.name for token in tokens]
        for name in names:
            if names.count(name) > 1:
                msg = f"two tokens are named {name!r}; each needs a name of its own, which the audit record tells"
                raise ValueError(msg)
        return tokens


class LoggingSettings(_Section):
    """What processes of koan_ray write to standard error: commands, coordinator, broker and job actors.

    An application that uses koan_ray has its own logging, which these do not touch.
    """

    level: Literal["debug", "info", "warning", "error"] = "warning"  # info: each move of each job is a line
    format: Literal["text", "json"] = "text"


class Settings(BaseSettings):
    """Everything that can be set, by section.

    ``Settings(engine={"max_actors": 2})`` takes the rest from the environment (``KOAN_RAY_ENGINE__MAX_QUEUED=1000``),
    ``koan.toml`` in the working directory (or the file that ``KOAN_RAY_CONFIG_FILE`` names), and the defaults.

    Raises:
        ConfigurationError: One line for each problem.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )
    _config_file: ClassVar[str] = "CONFIG_FILE"

    sources: dict[str, SourceSettings] = Field(default_factory=dict)
    jobs: JobsSettings = JobsSettings()
    memory: MemorySettings = MemorySettings()
    archival: ArchivalSettings = ArchivalSettings()
    engine: EngineSection = EngineSection()
    web: WebSettings = WebSettings()
    logging: LoggingSettings = LoggingSettings()

    def __init__(self, **sections: Any) -> None:
        try:
            super().__init__(**sections)
        except ValidationError as error:
            raise ConfigurationError(_explain(error, sections)) from None
        except SettingsError as error:
            raise ConfigurationError(_masked(f"settings: {error}")) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings' signature
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keywords, then the environment, then the file."""
        return init_settings, _Environment(settings_cls), _File(settings_cls)

    def differences(self, other: Settings) -> list[str]:
        """Return a line for each setting in which two settings differ, such as ``engine.max_actors: 2 != 4``."""
        mine, theirs = _flat(self.model_dump()), _flat(other.model_dump())
        return [
            _masked(f"{path}: {mine.get(path)!s} != {theirs.get(path)!s}")
            for path in sorted(mine.keys() | theirs.keys())
            if mine.get(path) != theirs.get(path)
        ]


class _Environment(EnvSettingsSource):
    """The environment; a name with our prefix that is no setting is refused instead of ignored."""

    def __call__(self) -> dict[str, Any]:
        found = super().__call__()
        for name in os.environ:
            if not name.upper().startswith(_PREFIX) or name.upper() == _PREFIX + "CONFIG_FILE":
                continue
            section, _, rest = name[len(_PREFIX) :].lower().partition("__")
            if rest and section not in self.settings_cls.model_fields:
                found.setdefault(section, {})[rest] = os.environ[name]
        return found


class _File(TomlConfigSettingsSource):
    """``koan.toml``."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        named = os.environ.get(_PREFIX + "CONFIG_FILE")
        path = Path(named or "koan.toml")
        if named and not path.is_file():
            msg = f"{_PREFIX}CONFIG_FILE: there is no file {named!r}"
            raise ConfigurationError(msg)
        try:
            super().__init__(settings_cls, path)
        except (ValueError, OSError) as error:
            msg = f"{path}: cannot be read as TOML: {error}"
            raise ConfigurationError(msg) from None


def load_settings(settings: Settings | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Return ``settings``, or what overrides, environment, file and defaults say.

    Raises:
        ConfigurationError: One line for each problem; or both were given.
    """
    if settings is None:
        return Settings(**(overrides or {}))
    if overrides:
        msg = f"koan.init(): give either settings= or sections ({', '.join(overrides)}), not both"
        raise ConfigurationError(msg)
    given: object = settings
    if not isinstance(given, Settings):
        msg = f"koan.init(): settings must be koan.Settings, got {given!r}"
        raise ConfigurationError(msg)
    return given


def _explain(error: ValidationError, sections: Mapping[str, Any]) -> str:
    return "\n".join(_explain_one(cast("dict[str, Any]", item), sections) for item in error.errors(include_url=False))


def _explain_one(item: dict[str, Any], sections: Mapping[str, Any]) -> str:
    path = tuple(str(part) for part in item["loc"])
    name = ".".join(path)
    if item["type"] == "extra_forbidden":
        known = _names_at(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        return f"{name}: is no setting{_origin(path, sections)}; {hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    got = "a value that is not shown" if path[:2] in _SECRET_PATHS else f"{item['input']!r:.200}"
    return _masked(f"{name}: {message}, got {got}{_origin(path, sections)}")


def _origin(path: tuple[str, ...], sections: Mapping[str, Any]) -> str:
    here: Any = sections
    for part in path:
        if isinstance(here, (list, tuple)):
            here = dict(zip(map(str, range(len(here))), here, strict=True))
        here = here.get(part, _ABSENT) if isinstance(here, dict) else _ABSENT
    if here is not _ABSENT:
        return ""
    variable = _PREFIX + "__".join(path).upper()
    if any(name.upper() == variable or name.upper().startswith(variable + "__") for name in os.environ):
        return f" (from the environment, {variable})"
    return f" (from {os.environ.get(_PREFIX + 'CONFIG_FILE', 'koan.toml')})"


_ABSENT = object()


def _names_at(path: tuple[str, ...]) -> list[str]:
    if not path:
        return list(Settings.model_fields)
    field = Settings.model_fields.get(path[0])
    if path[0] == "sources":
        return list(SourceSettings.model_fields)
    if path[:2] == ("archival", "policies"):
        return list(PolicySettings.model_fields)
    if path[0] == "web" and len(path) > 1:
        return list((TokenSettings if path[1] == "tokens" else WebLimits).model_fields)
    model = field.annotation if field is not None else None
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _masked(text: str) -> str:
    return _CREDENTIALS.sub("//***@", text)
