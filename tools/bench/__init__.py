"""Times this package beside others that do the same work, in one run: `python -m tools.bench`."""
