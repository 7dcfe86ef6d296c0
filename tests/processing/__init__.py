"""Tests of djp_dagster.processing."""
