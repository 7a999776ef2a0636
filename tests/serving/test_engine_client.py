"""The engine from the web side, with a real engine process: streams, the queue, deaths and restarts."""

from __future__ import annotations

import asyncio

from tests.serving.helpers import read, request, running


def test_texts_come_in_pieces_and_end(run):
    """More texts than slots end whole, in a queue; equal seeds give equal texts, whoever runs beside them."""

    async def talk() -> None:
        async with running(run) as client:
            streams = client.submit([request(f"{i}", seed=i % 3) for i in range(9)])
            assert (client.status.running, client.status.waiting) == (4, 5)
            texts = [await read(stream) for stream in streams]
            assert [pieces[-1].finish for pieces in texts] == ["length"] * 9
            ids = [[one for piece in pieces for one in piece.token_ids] for pieces in texts]
            assert ids[:3] == ids[3:6] == ids[6:]
            assert ids[0] != ids[1]
            assert await client.drain(1)

    asyncio.run(talk())
