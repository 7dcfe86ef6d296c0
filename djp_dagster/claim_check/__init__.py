"""Payload stores: where what is too heavy for the stream lies."""
