"""Training on workers that come and go: survivors keep their processes, and no step is lost.

A supervisor knows who is there and numbers the generations; workers train, abandon a step when
their generation ends, and go on in the next. See README.md.
"""
