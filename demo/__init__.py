"""The shop of `definitions.py`, running: user interface, daemon and traffic. ``make demo`` starts all of it."""
