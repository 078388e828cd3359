"""The ``koan-ray`` command."""
