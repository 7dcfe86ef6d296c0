"""The shop of `definitions.py` as a newcomer sees it: a real dagster-webserver in a real Chromium."""
