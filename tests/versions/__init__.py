"""Versions of stateful consumers: followed, compared, promoted, rolled back."""
