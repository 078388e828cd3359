"""The HTTP API as a Ray Serve deployment, beside the engine on the same cluster.

::

    from ray import serve
    from koan_ray.web.serve import deployment

    serve.run(deployment(num_replicas=2), name="koan_ray", route_prefix="/koan")

Or in a Serve config file: ``import_path: my_project.api:app`` with ``app = deployment()`` in that module. The record of
mutating requests (``[web] audit_file``) is a file of each replica's node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koan_ray.config import load_settings
from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from koan_ray.config import Settings


def deployment(settings: Settings | None = None, *, name: str = "koan_ray_api", **options: Any) -> Any:
    """Return a Ray Serve application of the API; `ray.serve.run` starts it.

    Args:
        settings: Of engine, sources and API; from environment and ``koan.toml`` by default. They travel to the replicas.
        name: Of the deployment.
        **options: As in ``ray.serve.deployment``, such as ``num_replicas=2``.

    Raises:
        ConfigurationError: Ray Serve is not installed; or there are no tokens, or no key that replicas could share.
    """
    found = settings if settings is not None else load_settings()
    if not found.web.tokens:
        msg = "web.tokens: a deployment needs at least one, because each replica would make its own; see [[web.tokens]]"
        raise ConfigurationError(msg)
    if found.web.session_key is None and options.get("num_replicas", 1) != 1:
        msg = (
            "web.session_key: several replicas need a common one, so that they take each other's cookies; set a random text "
            "of at least 20 characters"
        )
        raise ConfigurationError(msg)

    def build() -> Any:
        import koan_ray as koan
        from koan_ray.web.app import create_app

        return create_app(koan.init(settings=found))

    from koan_ray.runtime.ray.serving import application

    return application(build, name, options)
