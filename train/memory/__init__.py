"""Training in less memory: activations in few bits or computed again, state elsewhere."""
