"""Machines that are processes of this one: for the laptop, for tests, and for drills with a real
SIGKILL. What can be had, and what is taken back when, a trace says."""
