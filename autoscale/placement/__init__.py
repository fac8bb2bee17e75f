"""What to buy and where to put it: planners behind one protocol, and what checks their plans."""
