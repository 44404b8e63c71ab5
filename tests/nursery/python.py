"""An interpreter by its looks: asks the nursery (server.py) for a process, passes signals on, ends as it ends.

It lies beside the socket. The process finds in STARTED_BY who its parent would be.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
early, child = [], None


def pass_on(number, frame):
    if child is None:
        early.append(number)
    else:
        send(number)


def send(number):
    with suppress(ProcessLookupError):
        os.kill(child, number)


for number in HANDLED:
    signal.signal(number, pass_on)
nursery = socket.socket(socket.AF_UNIX)
nursery.connect(os.path.join(os.path.dirname(__file__), "socket"))
job = {
    "arguments": sys.argv[1:],
    "folder": os.getcwd(),
    "environment": {**os.environ, "STARTED_BY": str(os.getppid())},
}
data = json.dumps(job).encode() + b"\n"
sent = socket.send_fds(nursery, [data], [0, 1, 2])
nursery.sendall(data[sent:])
answers = nursery.makefile()
child = int(answers.readline())
for number in early:
    send(number)
for stream in (0, 1, 2):
    os.close(stream)  # whoever reads them waits for the process alone
status = int(answers.readline() or signal.SIGKILL)
if os.WIFSIGNALED(status):
    number = os.WTERMSIG(status)
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
os._exit(os.waitstatus_to_exitcode(status))
