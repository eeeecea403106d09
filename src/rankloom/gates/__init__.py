"""Gates, one idea a file: what a router looks at, how it scores, what it keeps."""
