"""`python -m rankloom.cli`."""

from __future__ import annotations

from rankloom.cli import main

if __name__ == "__main__":
    main()
