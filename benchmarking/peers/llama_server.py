"""The peer `llama_cpp` as a server: llama.cpp's own, from the wheel `xllamacpp`, in a process of its own.

    python -m benchmarking.peers.llama_server MODEL.gguf SLOTS THREADS CONTEXT_LENGTH

It prints one JSON line with its `url`, and ends when its stdin does.
"""

from __future__ import annotations

import json
import sys


def main(arguments: list[str]) -> None:
    """Serve a GGUF file, keys and values in fp32, until stdin ends."""
    import xllamacpp

    path, (slots, threads, context_length) = arguments[0], map(int, arguments[1:])
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel, params.n_ctx = slots, slots * context_length
    params.kv_unified = False  # each slot has its own part of the context
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.hostnames, params.port = ["127.0.0.1"], 0
    server = xllamacpp.Server(params)
    print(json.dumps({"url": server.listening_address}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
