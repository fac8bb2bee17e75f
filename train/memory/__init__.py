"""Training in less memory: activations saved in few bits or computed again, state on other tiers."""
