"""Counting, timing and drawing what a dynamic model executes."""
