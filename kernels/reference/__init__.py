"""The reference implementation in plain torch: correct first, and the oracle for the others.

Called by `models/`; runs on any device torch has. Every function states shapes and is
deterministic.
"""
