"""An S3 server (moto) on a free port of the loopback, which prints its address and serves until it is stopped.

What it answers can be spoiled: a request to /spoil/KIND/EVERY/COUNT lets COUNT of the requests for objects, each
EVERY-th of them, be answered with the status KIND, with nothing at all (KIND hang), or with a byte a second (KIND
drip). /count/METHOD says how many requests for objects of that method there were, and /count/list how many for a page
of a listing.
"""

import itertools
import threading
import time
from collections import Counter

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

app = DomainDispatcherApplication(create_backend_app)
lock = threading.Lock()
counts: Counter[str] = Counter()
spoil = {"kind": "", "every": 1, "left": 0}


def answer(environ, start_response):
    path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
    if path.startswith("/spoil/"):
        kind, every, count = path.split("/")[2:]
        spoil.update(kind=kind, every=int(every), left=int(count))
        return reply(start_response, "200 OK", b"")
    if path.startswith("/count/"):
        return reply(start_response, "200 OK", str(counts[path.removeprefix("/count/")]).encode())
    with lock:
        is_object = path.count("/") > 1 and not path.endswith("/")
        counts[method] += is_object
        counts["list"] += "list-type" in environ["QUERY_STRING"]
        spoilt = is_object and spoil["left"] > 0 and next(numbers) % spoil["every"] == 0
        spoil["left"] -= spoilt
    if spoilt and spoil["kind"] == "hang":
        time.sleep(3600)
    if spoilt and spoil["kind"] == "drip":
        start_response("200 OK", [("Content-Length", "3600")])
        return drops()
    if spoilt:
        return reply(start_response, f"{spoil['kind']} spoilt", b"")
    return app(environ, start_response)


def drops():
    for _ in range(3600):
        yield b"x"
        time.sleep(1)


def reply(start_response, status, body):
    start_response(status, [("Content-Length", str(len(body)))])
    return [body]


numbers = itertools.count(1)
server = make_server("127.0.0.1", 0, answer, threaded=True)
print(f"http://127.0.0.1:{server.port}", flush=True)
server.serve_forever()
