"""The event stream: its contracts, codecs and publishing."""
