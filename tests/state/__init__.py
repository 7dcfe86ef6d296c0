"""Tests of djp_dagster.state."""
