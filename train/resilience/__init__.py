"""Ways to lose workers of a pipeline without losing the run."""
