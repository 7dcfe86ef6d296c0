"""Orchestration: how Dagster runs, watches and shows consumers. The patterns are thin faces over this room."""
