"""A request, top to bottom: HTTP edge, admission, routing, prefill, hand-off, decode, stream."""
