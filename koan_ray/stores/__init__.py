"""Implementations of `koan_ray.ports.JobStore`."""
