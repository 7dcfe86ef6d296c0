"""The embedded default: SQLite or PostgreSQL, one code on SQLAlchemy Core."""
