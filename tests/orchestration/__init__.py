"""Tests of the Dagster layer, in process and deterministic."""
