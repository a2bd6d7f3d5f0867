"""What `scripts/reproduce.py` is made of: cells, running them, timing them, verdicts, and the report. See docs/protocol.md."""
