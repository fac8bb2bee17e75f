"""How models are computed: one operation, one file per implementation folder.

`reference/` is plain torch and the yardstick for every faster implementation. The modules next
to this file (`formats`, `rope`) describe data and import no torch, so loaders may read them.
"""
