"""Rows 10–16: what may happen to a training run."""
