"""What Ray runs in place of Python: `forking_python.py SOCKET SCRIPT ARGUMENT …` has the script run in a fork.

It hands its arguments, environment, folder and streams to the `fork_server` at the socket. Where that does not answer,
Python runs the script. It imports little, because it starts for every worker.
"""

import json
import os
import socket
import sys

_PATIENCE_S = 40  # Ray waits 60 seconds for a worker


def main() -> None:
    """Ask, or do it."""
    address, *arguments = sys.argv[1:]
    message = json.dumps([arguments, dict(os.environ), os.getcwd()]).encode() + b"\n"
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout(_PATIENCE_S)
            server.connect(address)
            sent = socket.send_fds(server, [message], [0, 1, 2])
            if rest := message[sent:]:  # nothing more, sent to who is through with it, would be an error
                server.sendall(rest)
            if server.recv(4) == b"done":
                return
    except OSError:
        pass
    os.execv(sys.executable, [sys.executable, *arguments])


main()
