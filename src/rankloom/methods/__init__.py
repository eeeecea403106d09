"""Parametrisations and combinators, one file per idea."""
