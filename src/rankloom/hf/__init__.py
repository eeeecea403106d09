"""The bridge to transformers, TRL and datasets: everything that imports them lives here."""
