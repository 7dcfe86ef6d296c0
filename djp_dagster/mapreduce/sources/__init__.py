"""Where a map-reduce reads: text, JSON Lines, CSV and Parquet on disks and in buckets; topics; what is in memory."""
