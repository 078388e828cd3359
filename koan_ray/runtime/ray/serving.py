"""An ASGI app as a Ray Serve deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koan_ray.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable


def application(build: Callable[[], Any], name: str, options: dict[str, Any]) -> Any:
    """Return a Ray Serve application whose replicas serve what ``build`` returns; it is called in each of them.

    Raises:
        ConfigurationError: Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        msg = f"a Ray Serve deployment needs Ray Serve ({error}): pip install 'koan-ray[serve]'"
        raise ConfigurationError(msg) from None

    class KoanApi:
        """The HTTP API of koan_ray."""

    ingress: Any = serve.ingress(build)(KoanApi)
    deployed: Any = serve.deployment(ingress, name=name, **options)
    return deployed.bind()
