"""The toy world: scenes of colored shapes whose every true answer is known."""
