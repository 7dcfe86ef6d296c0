"""Faults with real causes: each is a typed error or a dead letter, and nothing is lost or doubled."""
