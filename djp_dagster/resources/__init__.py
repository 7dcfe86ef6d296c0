"""Dagster resources over the core's stream and payload stores. Each is a configurable shell: the core does the work."""
