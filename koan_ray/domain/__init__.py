"""Values and pure decisions: no I/O, no clock reads, nothing asynchronous, no third-party imports.

Instants inside the engine are seconds since the Unix epoch (UTC) as ``float`` and end in ``_at``; durations are seconds
as ``float`` and end in ``_s``. They become aware ``datetime`` and ``timedelta`` where a user sees them: a float takes
24 bytes against 48 of a datetime, and a million queued jobs hold several each.
"""
