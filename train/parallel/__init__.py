"""How a model's state and work are divided among workers."""
