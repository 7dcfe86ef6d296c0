"""Servers and network faults the tests start and stop themselves."""
