"""Put on PYTHONPATH by `test_guard.py`: writes down, from the interpreter's first moment, what it must not do.

One JSON line for each connection, look-up of a name, new process, and file opened for writing.
"""

import json
import os
import sys

_FILE = os.open(os.environ["GUARD_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto",
            "socket.sendmsg", "socket.bind", "urllib.Request"}  # fmt: skip
_PROCESS = {"subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.spawn"}


def _watch(event: str, arguments: tuple) -> None:
    if event in _NETWORK or event in _PROCESS:
        _tell(event, [str(argument) for argument in arguments[:2]])
    elif event == "open":
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if isinstance(path, (str, bytes)) and (writes or (mode and set(mode) & set("wax+"))):
            _tell(event, [_place(os.fsdecode(path))])


def _place(path: str) -> str:
    """Where `path` is: a link stays a link, but an open folder of this process is named."""
    path = os.path.abspath(path)  # noqa: PTH100
    parts = path.split("/", 5)
    if path.startswith("/proc/self/fd/") and len(parts) > 5:
        return f"{os.readlink('/'.join(parts[:5]))}/{parts[5]}"  # noqa: PTH115
    return path


def _tell(event: str, arguments: list[str]) -> None:
    os.write(_FILE, (json.dumps([event, *arguments]) + "\n").encode())


sys.addaudithook(_watch)
