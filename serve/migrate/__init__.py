"""Moving live sequences off a replica that must go: what to do with each, and doing it.

`plan` decides, `parking` and `depart` are the side that leaves, `arrive` the side that takes over,
`codec` and `keep` are ways to send fewer bytes. serve/README.md tells the whole story.
"""
