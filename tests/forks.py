"""Run scripts without waiting for torch each time: it is loaded once, and every run is a fork of
that.

    python forks.py FD          serves requests on an open socket; tests/chain.py starts it

A request is a line of JSON. {"argv": […], "environment": {…}}, sent along with three file
descriptors, starts a script as `python argv[0] …` would, in a process of its own with these as its
standard input, output and error; the answer is its process id. {"wait": pid} is answered with its
exit status when it has ended, and {"poll": pid} at once, with null while it runs. A status is
negative if a signal ended the process, as with subprocess. The server ends when the socket is
closed."""

import atexit
import json
import os
import runpy
import signal
import socket
import sys
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def serve(connection):
    """Answer requests. Returns in each child with the request and its file descriptors, and in the
    server with (None, None), when there is nothing more to do."""
    while True:
        message, fds, _, _ = socket.recv_fds(connection, 2**16, 3)
        if not message:
            return None, None
        request = json.loads(message)
        if "argv" in request:
            answer = os.fork()
            if answer == 0:
                connection.close()
                return request, fds
            for fd in fds:
                os.close(fd)
        else:
            wanted = request["wait"] if "wait" in request else request["poll"]
            pid, status = os.waitpid(wanted, 0 if "wait" in request else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        connection.sendall(json.dumps(answer).encode() + b"\n")


def become(request, fds):
    """Turn this process into the script that is asked for."""
    os.setsid()  # its own group, so that it can be ended with all processes that it starts
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    encoding = request["environment"].get("PYTHONIOENCODING", "utf-8")
    sys.stdin, sys.stdout = open(0, encoding=encoding), open(1, "w", encoding=encoding)
    sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["environment"])
    sys.argv = request["argv"]
    sys.path.insert(0, os.path.dirname(os.path.join(ROOT, sys.argv[0])))
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        status = traceback.format_exc()
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    # Not the usual way out: as Python frees all objects, each page of torch would be copied first.
    os._exit(status)


if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    import torch._dynamo  # noqa: F401  the optimizers and DDP would load it in every run

    import prepare  # noqa: F401  and with it model.py, numpy, tiktoken, …

    request, fds = serve(socket.socket(fileno=int(sys.argv[1])))
    if request:
        become(request, fds)
