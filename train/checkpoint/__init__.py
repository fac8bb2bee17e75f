"""Checkpoints: named tensors in flat pieces, whoever holds them, whole or not there at all."""
