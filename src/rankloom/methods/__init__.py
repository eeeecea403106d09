"""Parametrisations and combinators, one file for each idea."""
