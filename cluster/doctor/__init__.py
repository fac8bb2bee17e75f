"""`sanderling doctor`: what this machine has, what is missing, and what to do about it.

machine.py and packages.py hold the checks, each a function that returns a Finding; command.py runs
them all and prints the table.
"""
