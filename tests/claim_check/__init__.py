"""Tests of djp_dagster.claim_check."""
