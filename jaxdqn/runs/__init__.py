"""Run directories: configuration, metrics, checkpoints, pictures. Whatever was computed is written atomically."""
