"""What a Dagster user touches, one module per pattern."""
