"""What trained routers decide, measured, drawn and put into words; see `scripts/learned.py`."""
