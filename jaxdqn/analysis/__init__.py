"""Loading runs and sweeps, statistics of learning curves, and figures. Reads files only and never imports JAX."""
