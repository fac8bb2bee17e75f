"""KV memory of one replica: pages, prefix tree, page tables and the storage under them.

Import the parts by module (`serve.kv.pool`, `.prefix`, `.table`, `.storage`): only `storage`
needs torch. Engine and hand-off call in here; nothing in here knows Ray, HTTP or a request.
"""
