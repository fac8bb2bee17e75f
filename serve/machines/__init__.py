"""Replicas in processes that are machines of their own, called over unix sockets, without Ray: a
machine's end is its replicas' end."""
