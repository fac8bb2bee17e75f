"""One model over several workers: the pipeline."""
