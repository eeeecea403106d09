"""Applications from end to end."""
