"""How much of what, where, and at what price. The core sees numbers and protocols alone: it imports
neither Ray nor torch nor a cloud's SDK, so that the same objects plan in production, on a laptop
and in a simulation."""
