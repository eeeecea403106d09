"""Training rules, one idea a file."""
