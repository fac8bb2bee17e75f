"""What a training run does about losses: how often it writes, who holds what, who takes over."""
