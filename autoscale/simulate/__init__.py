"""Policies against recorded or made markets and requests, in virtual time."""
