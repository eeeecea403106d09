"""Initialisers: (adapter, base) -> None fills the factors."""
