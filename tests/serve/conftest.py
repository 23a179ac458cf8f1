import http.client
import io
import json
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from netfission.serve.server import Settings, listen, make_server


def image_file(number=0, size=(8, 8), format_="PNG", mode="L") -> bytes:
    """A file of random pixels."""
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format_)
    return file.getvalue()


def form(*files: bytes, name="image") -> tuple[bytes, dict[str, str]]:
    """A body of type multipart/form-data, and its headers."""
    parts = [
        b'--limit\r\nContent-Disposition: form-data; name="%b"; filename="f"\r\n\r\n%b\r\n'
        % (name.encode(), content)
        for content in files
    ]
    return b"".join(parts) + b"--limit--\r\n", {"Content-Type": "multipart/form-data; boundary=limit"}


class Server(SimpleNamespace):
    """A running server; `port` is where."""

    def ask(self, method, path, body=None, headers=None, connection=None):
        """Status, headers and content of an answer."""
        client = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        client.request(method, path, body, headers or {})
        answer = client.getresponse()
        content = answer.read()
        if connection is None:
            client.close()
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, answer.headers, json.loads(content) if is_json else content.decode()

    def predict(self, content, query="", **settings):
        return self.ask("POST", f"/predict{query}", content, **settings)


@contextmanager
def running(run, **settings):
    """A server in a thread of this process."""
    listening = listen("127.0.0.1", 0)
    server = make_server(str(run), Settings(**settings))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Server(port=listening.getsockname()[1], uvicorn=server)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def served(finished_run):
    """A server of `finished_run`, for all tests."""
    with running(finished_run, max_bytes=200_000, max_pixels=1_000_000, max_batch=8) as own:
        yield own


@pytest.fixture(scope="session")
def serving():
    """`running` itself, for servers with other settings."""
    return running


@pytest.fixture(scope="session")
def make_image():
    return image_file


@pytest.fixture(scope="session")
def make_form():
    return form
