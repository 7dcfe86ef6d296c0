"""Side by side with peers, in one run and one table: ``python -m benchmarks [--quick] [name ...]``. See README.md."""
