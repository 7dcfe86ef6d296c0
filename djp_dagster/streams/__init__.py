"""The event stream: `EventLog` and `Coordinator`, two contracts, and SQL as the embedded default."""
