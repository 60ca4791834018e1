"""A server of objects that speaks Google's protocol, on this machine: gcp-storage-emulator, and
what tensorstore needs beside it.

The emulator does not say of which generation the object is that it hands out, and writes whatever
the generation; a manifest that is read between two writes then stops the second one.
"""

from __future__ import annotations

import threading
from functools import partial
from http import HTTPStatus
from http.server import HTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage


class Handler(RequestHandler):
    """Generations as https://cloud.google.com/storage/docs/request-preconditions has them, for
    downloads and uploads.
    """

    def generation(self, bucket: str, name: str) -> str:
        try:
            return self.storage.get_file_obj(bucket, unquote(name))["generation"]
        except NotFound:
            return "0"

    def end_headers(self) -> None:
        path = urlsplit(self.path).path
        if self.command == "GET" and "/o/" in path:
            bucket, _, name = path.partition("/b/")[2].partition("/o/")
            self.send_header("x-goog-generation", self.generation(bucket, name))
        super().end_headers()

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        query = parse_qs(urlsplit(self.path).query)
        if "ifGenerationMatch" in query and "name" in query:
            bucket = path.partition("/b/")[2].partition("/o")[0]
            if query["ifGenerationMatch"] != [self.generation(bucket, query["name"][0])]:
                self.rfile.read(int(self.headers["content-length"]))
                self.send_response(HTTPStatus.PRECONDITION_FAILED)
                self.send_header("content-length", "0")
                super().end_headers()
                return
        super().do_POST()


class Queue(HTTPServer):
    request_queue_size = (
        128  # tensorstore asks many things at a time, and each on a connection of its own
    )


class Server:
    """One empty bucket, in memory."""

    def __init__(self, bucket: str) -> None:
        storage = Storage(use_memory_fs=True)
        buckets.create_bucket(bucket, storage)
        self._server = Queue(("127.0.0.1", 0), partial(Handler, storage))
        self.port = self._server.server_port

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
