"""The request by which readiness is proved: one token after one token, shared with nobody.

Called by the ingress.
"""

from serve.engine.sequence import Limits, Request, Sampling
from serve.kv.prefix import CacheKey


def probe_request(request_id: str) -> Request:
    """A request for one greedy token."""
    return Request(
        request_id=request_id,
        prompt=(0,),
        sampling=Sampling(temperature=0.0),
        limits=Limits(max_tokens=1, ignore_eos=True),
        cache_key=CacheKey("readiness", "", ""),
    )
