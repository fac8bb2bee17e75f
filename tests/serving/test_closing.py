"""Taking a service down: not ready at once, what is open finishes, nothing new is taken."""

import asyncio
from contextlib import aclosing

import pytest

from serve.errors import RequestError
from tests.serving.tiny import request, run, serving, settings, solo_tokens


def test_open_streams_finish_and_new_ones_are_refused(model):
    one = request("open", [5, 6, 7, 8], 40, ignore_eos=True)

    async def work():
        async with serving(settings(prefill=0, decode=1), model) as service:
            assert await service.ingress.probe()
            async with aclosing(service.ingress.generate(one)) as deltas:
                output = list((await anext(deltas)).token_ids)
                service.controller.close()
                while not service.ingress.directory.closing:
                    await asyncio.sleep(0.01)
                assert not await service.ingress.probe()
                with pytest.raises(RequestError, match="being taken down") as refused:
                    await anext(service.ingress.generate(request("new", [1, 2], 2)))
                assert (refused.value.status, refused.value.code) == (503, "closing")
                output += [token async for delta in deltas for token in delta.token_ids]
            assert output == solo_tokens(model, one)

    run(work())
