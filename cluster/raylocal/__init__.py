"""Everything that touches Ray: the session, the HTTP front, named actors, and the clean-up after.

The only package of `cluster` that may import Ray, and the only one of ours that may import its
private modules (all of those in private.py). It is not called `ray`: with `cluster/` on sys.path,
as when a file in it is run as a script, `import ray` would find us. Importing it loads no Ray.
"""
