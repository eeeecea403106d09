"""The file layer: the only place that writes, syncs, renames and removes; what it wrote it can verify."""
