"""The floor everything stands on: settings, clock, registry, the CLI, Ray sessions. No policy.

Imports none of the other packages; names them only as strings that are loaded when used.
"""
