"""Tasks one after the other: the sequence, and what it remembers."""
