"""Rows 1–9: what a file may do."""
