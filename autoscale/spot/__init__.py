"""Spot markets: what happened in them, how risky they are, and when to buy, move and leave."""
