"""Consumers joined by topics, seen as a whole: validated when declared, drawn, and traced for one entity."""
