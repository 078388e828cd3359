"""Recipes: run defaults for a job class, frozen and reusable.

The one merge rule: a recipe's settings are where the run begins. A later ``.persist()`` or ``.audit()`` on the run
replaces the recipe's wholly, metadata merges key by key, and the last word wins.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from koan_ray.domain import words
from koan_ray.domain.durations import Duration, bound
from koan_ray.domain.retry import RetryPolicy
from koan_ray.errors import ConfigurationError
from koan_ray.run import JobManyBuilder, JobRunBuilder, RunSettings, persistence

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from koan_ray.jobs import Job

J = TypeVar("J", bound="Job[Any, Any]")


class RecipeBuilder:
    """A recipe in the making; every call returns a new builder."""

    __slots__ = ("_settings",)

    def __init__(self, settings: RunSettings | None = None) -> None:
        self._settings = settings or RunSettings()

    def persist(self, source: str | None = None, partition: str | None = None) -> RecipeBuilder:
        """Keep the jobs as documents."""
        return RecipeBuilder(replace(self._settings, persistence=persistence(source, partition)))

    def audit(self, enabled: bool = True) -> RecipeBuilder:
        """Keep a document of each execution."""
        return RecipeBuilder(replace(self._settings, audit=bool(enabled)))

    def with_defaults(self, *, metadata: Mapping[str, Any] | None = None) -> RecipeBuilder:
        """Give metadata that every run starts with."""
        return RecipeBuilder(self._settings.merged(metadata or {}))

    def use_policy(self, *, retry: RetryPolicy | None = None, timeout: Duration | None = None) -> RecipeBuilder:
        """Replace the class's retry policy or timeout for the recipe's runs; None leaves the class's."""
        given: object = retry
        if given is not None and not isinstance(given, RetryPolicy):
            msg = f"use_policy: retry must be a RetryPolicy, got {given!r}"
            raise ConfigurationError(msg)
        timeout_s = None if timeout is None else bound(timeout, name="use_policy: timeout")
        if timeout_s == 0:
            msg = "use_policy: timeout must be longer than 0 s; leave it out for the class's own"
            raise ConfigurationError(msg)
        settings = self._settings
        return RecipeBuilder(
            replace(
                settings,
                retry=retry if retry is not None else settings.retry,
                timeout_s=timeout_s if timeout_s is not None else settings.timeout_s,
            )
        )

    def build(self, job_type: type[J]) -> JobRecipe[J]:
        """Bind the recipe to a job class."""
        given: object = job_type
        if not isinstance(given, type) or not hasattr(given, "start_many"):
            msg = f"build: expected a job class, got {given!r:.80}"
            raise ConfigurationError(msg)
        return JobRecipe(job_type, self._settings)


class JobRecipe(Generic[J]):
    """Run defaults bound to a job class; start jobs from it as from the class."""

    __slots__ = ("_settings", "job_type")

    def __init__(self, job_type: type[J], settings: RunSettings) -> None:
        self.job_type, self._settings = job_type, settings

    def start(self, context: Any = None, correlation_id: str | None = None) -> JobRunBuilder[J]:
        """Return a builder for one job that begins with the recipe's settings."""
        builder = self.job_type.start(context)
        return builder._like(replace(self._settings, correlation_id=words.correlation_id(correlation_id, "start")))  # noqa: SLF001 - one package

    def start_many(self, contexts: Iterable[Any], correlation_id: str | None = None) -> JobManyBuilder[J]:
        """Return a builder for many jobs that begins with the recipe's settings."""
        builder = self.job_type.start_many(contexts)
        return builder._like(replace(self._settings, correlation_id=words.correlation_id(correlation_id, "start_many")))  # noqa: SLF001 - one package
