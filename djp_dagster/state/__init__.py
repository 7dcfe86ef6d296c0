"""Keyed state of a task: a local cache of its changelog."""
