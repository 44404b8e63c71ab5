"""The nursery: one process that has imported what ranks and commands need, and forks a copy of itself for each.

Imports are most of the seconds that a small run takes, and the suite starts hundreds of processes. `python.py` beside
this file looks like an interpreter to whoever starts it, and asks this process to be it. What runs is a process of its
own, as ever: only its imports were done before.

    python server.py SOCKET INTERPRETER OWNER     ends when the process of the number OWNER does

One connection is one process: a line of JSON with three file descriptors comes in, and out go two lines, the number of
the process and later its wait status. A client that has gone takes its process with it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import types
from contextlib import suppress

PRELOADED = (
    "numpy",
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.run",
    "torch.distributed.tensor.parallel",
    "torch.nn.attention.varlen",
    "scatterfold.moe.build",
    "scatterfold.moe.training.run",
    "scatterfold.moe.data.indexed",
    "scatterfold.tools.cli",
    "scatterfold.tools.composition",
    "scatterfold.tools.launch",
    "scatterfold.tools.launchers",
    "scatterfold.tools.sweep.trials",
    "scatterfold.tools.train",
)


def preload() -> None:
    import torch

    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    from scatterfold.moe.data.megatron import _modules

    _modules()  # megatron-core's datasets, which training imports when it opens its data


def serve(path: str, interpreter: str, owner: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children would ignore it
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)  # there is a socket once it answers
    gc.collect()
    gc.freeze()  # pages that no collection touches stay shared
    while True:
        ready, _, _ = select.select([listener, owner], [], [])
        if owner in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            supervise(connection, interpreter)
        connection.close()
        with suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def supervise(connection: socket.socket, interpreter: str) -> None:
    """Fork the process that a client wants and stay with it; does not return."""
    data, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 16)
    child = os.fork()
    if child == 0:
        connection.close()
        live(json.loads(data), streams, interpreter)
    for stream in streams:
        os.close(stream)
    connection.sendall(b"%d\n" % child)
    ready, _, _ = select.select([os.pidfd_open(child), connection], [], [])
    if connection in ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    try:
        connection.sendall(b"%d\n" % status)
    finally:
        os._exit(0)


def live(job: dict, streams: list[int], interpreter: str) -> None:
    """Be `python ARGUMENTS` in the folder and with the variables of the client; does not return."""
    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        sys.executable = interpreter
        run(job["arguments"])
        code = 0
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            if code < 0:
                signal.signal(-code, signal.SIG_DFL)
                os.kill(os.getpid(), -code)
            os._exit(code)


def run(arguments: list[str]) -> None:
    """What the interpreter does with -u, -c CODE, -m MODULE and a file."""
    if arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        arguments = arguments[1:]
    if os.environ.get("PYTHONPATH"):
        sys.path[1:1] = os.environ["PYTHONPATH"].split(os.pathsep)
    kind, *rest = arguments
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv, sys.path[0] = ["-m", *rest[1:]], os.getcwd()
        sys.modules.pop(rest[0], None)  # it is imported, and runpy would warn of that
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind.startswith("-"):
        raise SystemExit(f"tests/nursery knows -u, -c, -m and files, not {kind}")
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    owner = os.pidfd_open(int(sys.argv[3]))
    preload()
    serve(*sys.argv[1:3], owner)
