"""``python -m koan_ray``: the same as ``koan-ray``."""

from koan_ray.cli.app import main

main()
