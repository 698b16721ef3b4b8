"""What serves the seven files: configuration, checkpoints, runs, conversion, teachers."""
