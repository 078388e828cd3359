"""The engine on a Ray cluster: shells around the engine's classes, and everything that knows Ray."""
