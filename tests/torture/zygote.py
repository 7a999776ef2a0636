"""Starts Python commands quickly: imports the heavy libraries once, then forks a process for each request.

Run as a script, with the libraries as arguments. Each request is a line of JSON on stdin; each answer, a line on
stdout. A forked child goes on exactly as `python -m MODULE ARGUMENTS` would, in a directory, with an environment and
with files for stdout and stderr of its own. It knows nothing of what the commands do.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import sys
import time
import traceback
from typing import Any, NoReturn


def serve() -> dict[str, Any]:
    """Answer requests until stdin ends; in a forked child, return the request that it is to fulfil."""
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                return request["start"]
            answer = {"pid": pid}
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        print(json.dumps(answer), flush=True)
    os._exit(0)


def become(request: dict[str, Any]) -> None:
    """Take on the surroundings that the request names."""
    for descriptor, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY
        os.dup2(os.open(name, flags, 0o666), descriptor)
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    time.tzset()
    if request["umask"] is not None:
        os.umask(request["umask"])
    if request["max_file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"], resource.RLIM_INFINITY))
    if request["user"] is not None:
        os.setgid(request["user"])
        os.setuid(request["user"])
    sys.path[0] = request["cwd"]
    sys.argv[1:] = request["arguments"]
    if request["environment"].keys() & {"TORTURE_WATCH", "TORTURE_CLOCK"}:  # what a start of Python would import
        sys.modules.pop("sitecustomize", None)
        sys.path.insert(1, request["environment"]["PYTHONPATH"].split(":")[0])
        importlib.import_module("sitecustomize")


def run(module: str) -> int:
    """Run a module as `python -m` would, and return its exit code."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as done:
        if isinstance(done.code, str):
            print(done.code, file=sys.stderr)
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException as error:
        traceback.print_exc()
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def end(code: int) -> NoReturn:
    """End as Python does, without taking its objects apart: in a fork that copies all the memory of the libraries."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for library in sys.argv[1:]:
        importlib.import_module(library)
    gc.freeze()
    wanted = serve()
    become(wanted)
    sys.stdin = open(os.devnull)  # noqa: SIM115  # the old one has the zygote's requests in its buffer
    end(run(wanted["module"]))
