import http.client
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from netfission.classifier import Classifier
from netfission.classifier.answer_settings import AnswerSettings
from netfission.cli import main
from netfission.data import load_data
from netfission.evaluation.guarantees import SPARSE_CLASSES
from netfission.serve import protocol
from netfission.serve.drift import DriftWindow
from netfission.serve.protocol import BoundedHTTPProtocol
from netfission.serve.server import Settings


@pytest.fixture(scope="module")
def classifier(finished_run):
    return Classifier.from_pretrained(finished_run)


def expected(classifier, content):
    pixels = classifier.pixels(Image.open(io.BytesIO(content)))
    return classifier.predict(pixels[None])


def assert_tells(answer, predictions, names):
    """All classes of an answer are what was predicted."""
    own = predictions.probabilities[0]
    for place, one in enumerate(answer["probabilities"]):
        index = names.index(one["class"])
        assert one["probability"] == pytest.approx(own[index].item(), abs=1e-5)
        for exit_, shares in zip(answer["exits"], predictions.exit_probabilities[0], strict=True):
            assert exit_["probabilities"][place] == pytest.approx(shares[index].item(), abs=1e-5)
    for exit_, shares in zip(answer["exits"], predictions.exit_probabilities[0], strict=True):
        assert exit_["probability"] == pytest.approx(shares.max().item(), abs=1e-5)
    for name in ("entropy", "mutual_information"):
        assert answer[name] == pytest.approx(getattr(predictions, name)[0].item(), abs=1e-5)
    assert answer["probability"] == pytest.approx(own.max().item(), abs=1e-5)
    assert answer["seconds"] > 0


def raw(port, content, patience=30.0):
    """What comes back for bytes sent as they are, until the server closes; within `patience` seconds."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as own:
        own.sendall(content)
        received = b""
        with suppress(ConnectionResetError):
            while chunk := own.recv(65536):
                received += chunk
    return received


def head(length, extra=""):
    return f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{extra}\r\n".encode()


def test_a_prediction_is_the_classifier_s(served, classifier, make_image):
    content = make_image(1, (30, 20), mode="RGB")
    status, _, answer = served.predict(content, "?all=1")
    assert status == 200
    assert len(answer["probabilities"]) == 10
    assert_tells(answer, expected(classifier, content), classifier.spec.classes)
    assert len(served.predict(content)[2]["probabilities"]) == 5


def test_64_clients_at_once_get_the_classifier_s_predictions_whatever_the_batch(
    served, classifier, make_image
):
    contents = [make_image(number) for number in range(64)]
    together = threading.Barrier(64)

    def client(content):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        together.wait()
        answers = [served.predict(content, connection=connection) for _ in range(3)]
        connection.close()
        return answers

    with ThreadPoolExecutor(64) as pool:
        answered = list(pool.map(client, contents))
    for content, answers in zip(contents, answered, strict=True):
        for status, _, answer in answers:
            assert status == 200
            assert_tells(answer, expected(classifier, content), classifier.spec.classes)
    sizes = re.findall(r'batch_size_bucket\{le="([\d.]+)"\} ([\d.]+)', served.ask("GET", "/metrics")[2])
    at_most = {float(size): float(number) for size, number in sizes}
    assert at_most[1] < at_most[8]  # some came together


def test_large_images_are_decoded_where_they_hold_up_nobody(finished_run, serving, make_image, monkeypatch):
    pixels, decoders = Classifier.pixels, []

    def noted(*arguments):
        decoders.append(threading.current_thread().name.startswith("decoder"))
        return pixels(*arguments)

    monkeypatch.setattr(Classifier, "pixels", noted)
    with serving(finished_run) as own:
        for side in (8, 600):
            assert own.predict(make_image(size=(side, side)))[0] == 200
    assert decoders == [False, True]


def test_a_form_of_several_files(served, classifier, make_image, make_form):
    contents = [make_image(number) for number in range(5)]
    body, headers = make_form(*contents)
    status, _, answer = served.predict(body, "?all=1", headers=headers)
    assert status == 200
    assert len(answer["predictions"]) == 5
    for own, content in zip(answer["predictions"], contents, strict=True):
        own["seconds"] = answer["seconds"]
        assert_tells(own, expected(classifier, content), classifier.spec.classes)


def test_a_damaged_image_in_a_form_gets_its_message_and_the_others_their_answers(
    served, classifier, make_image, make_form
):
    contents = [make_image(1), make_image(size=(200, 100), format_="JPEG")[:3000], b"hello", make_image(2)]
    body, headers = make_form(*contents)
    status, _, answer = served.predict(body, headers=headers)
    first, damaged, text, last = answer["predictions"]
    assert status == 200
    assert list(damaged) == list(text) == ["error"]
    assert damaged["error"].startswith("image 2 of 4 must be an undamaged file, got a damaged file (")
    assert text["error"].startswith("image 3 of 4 must be a file in ")
    for own, content in ((first, contents[0]), (last, contents[3])):
        own["seconds"] = answer["seconds"]
        assert_tells(own, expected(classifier, content), classifier.spec.classes)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/predict", 405), ("POST", "/", 405), ("GET", "/../config.yaml", 404)],
)
def test_what_is_not_there_is_told_as_json(served, method, path, status):
    found, _, answer = served.ask(method, path)
    assert (found, list(answer)) == (status, ["error"])


def test_requests_that_cannot_be_answered(served, make_image, make_form):
    image = make_image()
    form, headers = make_form(image)
    blank = io.BytesIO()
    Image.new("L", (1200, 1000)).save(blank, "PNG")
    cases = [
        (b"", {}, 415, "got another kind of file"),
        (b"hello", {}, 415, "got another kind of file"),
        (
            make_image(size=(200, 100), format_="JPEG")[:3000],
            {},
            400,
            "image must be an undamaged file, got a damaged file (",
        ),
        (blank.getvalue(), {}, 413, "image must be at most 1,000,000 pixels, got more"),
        (bytes(200_001), {}, 413, "request body must be at most 200,000 bytes, got more"),
        (bytes(1_000_000), {}, 413, "request body must be at most 200,000 bytes, got more"),
        (
            make_form(blank.getvalue()[:1000] + image, image)[0],
            headers,
            413,
            "images must be at most 1,000,000 pixels together, got 1,200,064",
        ),
        (form[:-10], headers, 400, "form must be complete, got no closing boundary"),
        (form, {"Content-Type": "multipart/form-data"}, 400, "boundary"),
        (b"nothing of the kind", headers, 400, "form must be complete, got no closing boundary"),
        (
            make_form()[0],
            headers,
            400,
            "form must be multipart/form-data with one image file or more, got no file",
        ),
        (make_form(*[image] * 9)[0], headers, 400, "Too many files"),
        (make_form(b"hello", b"", b"hello")[0], headers, 415, "image 1 of 3 must be a file in "),
        (make_form(b"hello")[0], headers, 415, "image must be a file in "),
    ]
    for body, sent, status, told in cases:
        found, _, answer = served.predict(body, headers=sent)
        assert (found, told in answer["error"]) == (status, True), (body[:20], answer)
    for asked in ("maybe", "", "true"):
        status, _, answer = served.predict(image, f"?all={asked}")
        assert (status, answer) == (400, {"error": f"all must be 0 or 1, got {asked!r}"})


@pytest.mark.parametrize("content", [head("abc"), b"no HTTP at all\r\n\r\n"])
def test_what_is_no_http_is_told_as_json(served, content):
    answer = raw(served.port, content)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"Content-Type: application/json" in answer
    assert b"X-Content-Type-Options: nosniff" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
        "error": "request must be valid HTTP/1.1, got other data"
    }


def head_of(lines, path="/health", host="localhost"):
    return b"".join([f"GET {path} HTTP/1.1\r\nHost: {host}\r\n".encode(), *lines])


@pytest.mark.parametrize(
    "content",
    [
        head_of([b"a: b\r\n"] * 101 + [b"\r\n"]),
        head_of([b"a: %b\r\n" % (b"x" * 3000)] * 30 + [b"\r\n"]),
        head_of([b"a: "] + [b"x" * 2**20] * 3),  # a line without an end
        head_of([b"x" * 2**17, b": b\r\n\r\n"]),
        head_of([b"\r\n"], path="/" + "x" * 2**16),  # with no time to find it too long before its end
        head_of([b"Transfer-Encoding: chunked\r\n\r\n0\r\n", *[b"a: b\r\n"] * 101]),  # trailers
    ],
    ids=["lines", "bytes", "endless", "name", "path", "trailers"],
)
def test_a_head_that_is_too_large_is_refused(served, content):
    answers = raw(served.port, content)
    refused = answers[answers.index(b"HTTP/1.1 431 ") :]
    assert json.loads(refused.partition(b"\r\n\r\n")[2]) == {
        "error": "head of the request must be of at most 100 lines and 64 KiB, got more"
    }


def test_a_head_within_the_bounds_is_answered(served):
    lines = [b"a: %b\r\n" % (b"x" * 600)] * 98
    closing = b"Connection: close\r\n\r\n"
    assert raw(served.port, head_of([*lines, closing])).startswith(b"HTTP/1.1 200 ")


def test_a_body_in_many_small_pieces_is_no_large_head(served, make_image):
    image = make_image()
    pieces = [image[place : place + 1] for place in range(len(image))]
    chunks = b"".join(b"1;%b\r\n%b\r\n" % (b"x" * 900, piece) for piece in pieces)
    start = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    start += b"Transfer-Encoding: chunked\r\n\r\n"
    assert raw(served.port, start + chunks + b"0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST.:80", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7", 200),
        (socket.gethostname(), 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost@evil.example", 421),
        ("", 421),
    ],
)
def test_only_names_of_the_server_are_answered_to(served, host, status):
    answer = raw(served.port, head_of([b"Connection: close\r\n\r\n"], host=host))
    assert answer.startswith(b"HTTP/1.1 %d " % status)


def test_a_request_without_a_name_or_with_two_is_refused(served):
    for content in (
        b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
        head_of([b"Host: localhost\r\n\r\n"]),
    ):
        answer = raw(served.port, content.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert answer.startswith(b"HTTP/1.1 421 ")
    assert raw(served.port, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_names_are_allowed_by_the_option(finished_run, serving):
    with serving(finished_run, allowed_host=["Example.org"]) as own:
        for host, status in (("example.org:443", 200), ("example.com", 421)):
            assert own.ask("GET", "/health", headers={"Host": host})[0] == status


def test_no_path_is_redirected(served):
    status, headers, _ = served.ask("POST", "/predict/", b"x")
    assert (status, headers["Location"]) == (404, None)


@pytest.mark.parametrize("path", ["/", "/health", "/model", "/metrics", "/nothing", "/page.js"])
def test_no_answer_is_taken_for_another_kind_of_file(served, path):
    assert served.ask("GET", path)[1].get_all("X-Content-Type-Options") == ["nosniff"]


def test_a_client_that_waits_to_be_asked_is_not_asked_for_what_is_too_large(served):
    answer = raw(served.port, head(10**9, "Expect: 100-continue\r\n"))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in answer


def test_a_transfer_coding_that_is_not_decoded_is_refused(served, monkeypatch):
    logged = []
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "error", lambda *said, **_: logged.append(said))
    start = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    answer = raw(served.port, start + b"3\r\nabc\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert b"Transfer-Encoding must be chunked, got gzip, chunked" in answer
    # The parser refuses it after the application has begun.
    answer = raw(served.port, start.replace(b"gzip, chunked", b"gzip") + b"abc")
    assert answer.startswith(b"HTTP/1.1 501 ") and b'Transfer-Encoding must be chunked, got gzip"' in answer
    assert served.ask("GET", "/health")[0] == 200
    assert logged == []


def test_malformed_requests_by_the_hundred_lose_nothing_for_others(served, make_image, make_form):
    image = make_image()
    body, _ = make_form(image)
    broken = [
        b"\x16\x03\x01\x02\x00 no HTTP at all\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        head(10) + b"more than ten bytes",
        head(200_000_000) + bytes(900_000),
        head(8, "Connection: close\r\n") + b"no image",
        head(len(body), "Connection: close\r\nContent-Type: multipart/form-data; boundary=other\r\n") + body,
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ]
    stop = threading.Event()
    idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(100)]
    for number, own in enumerate(idle):  # slow ones: in the head, or in the body
        own.sendall(b"POST /pred" if number % 2 else head(100) + b"slow")

    def good():
        statuses = []
        while not stop.is_set():
            statuses.append(served.predict(image)[0])
        return statuses

    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(good) for _ in range(4)]
        try:
            numbers = range(200)
            received = list(pool.map(lambda number: raw(served.port, broken[number % len(broken)]), numbers))
        finally:
            stop.set()
    for own in idle:
        own.close()
    statuses = [status for other in others for status in other.result()]
    assert len(statuses) >= 4
    assert set(statuses) == {200}
    for number, answer in enumerate(received):
        assert not answer or re.match(rb"HTTP/1.1 4\d\d ", answer), (
            broken[number % len(broken)][:40],
            answer,
        )
    assert served.ask("GET", "/health")[0] == 200


def test_a_slow_request_is_ended_while_others_are_answered(finished_run, serving, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    answered = head_of([b"\r\n"])  # after which the connection stays open
    beginning = [b"", b"POST /predict HTTP/1.1\r\nHos", answered + b"GET /hea", head(100) + b"slow"]
    beginning.append(head(10**12) + b"slow")
    with serving(finished_run, timeout_s=0.5) as own, ThreadPoolExecutor() as pool:
        silent, in_head, in_second, in_body, huge = (
            pool.submit(raw, own.port, content, patience=3.0) for content in beginning
        )
        assert own.ask("GET", "/health")[0] == 200
        assert silent.result() == b""
        assert in_head.result() == b""
        assert in_second.result().count(b"HTTP/1.1 ") == 1
        assert in_body.result().startswith(b"HTTP/1.1 408 ")
        assert huge.result().startswith(b"HTTP/1.1 413 ")
        assert b'{"error":"the request did not arrive within 0.5 s"}' in in_body.result()


def ends_within(server, seconds):
    """Whether all connections of a server end in time."""
    deadline = time.monotonic() + seconds
    while (connected := server.uvicorn.server_state.connections) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not connected


def test_a_client_that_reads_nothing_of_its_answers_is_cut_off(finished_run, serving, monkeypatch, capfd):
    monkeypatch.setattr(protocol, "STUCK_SECONDS", 0.3)
    with serving(finished_run) as own, socket.create_connection(("127.0.0.1", own.port)) as client:
        client.sendall(head_of([b"\r\n"], path="/page.js") * 1000)  # whose answers fit into no buffer
        assert client.recv(2**10)  # the server has begun
        assert ends_within(own, 3.0)
    assert capfd.readouterr().err == ""  # of a client that leaves, nothing is written to the log


def test_a_client_that_reads_slowly_is_not_cut_off():
    done = []
    transport = SimpleNamespace(get_write_buffer_size=lambda: 4, abort=lambda: done.append("cut off"))
    client = SimpleNamespace(transport=transport, _start_reading_timer=lambda: done.append("goes on"))
    for client._unread in (5, 4):  # it has read one byte, and none
        BoundedHTTPProtocol._abort_if_stuck(client)
    assert done == ["goes on", "cut off"]


def test_answers_are_given_up_in_time_and_too_many_at_once_refused(
    finished_run, serving, make_image, make_form, monkeypatch
):
    gate = threading.Event()
    interpret = Classifier.interpret

    def slow(*arguments, **settings):
        gate.wait(60)
        return interpret(*arguments, **settings)

    monkeypatch.setattr(Classifier, "interpret", slow)
    with serving(finished_run, timeout_s=4.0, max_batch=64) as own, ThreadPoolExecutor(8) as pool:
        body, headers = make_form(*[make_image()] * 64)
        asked = [pool.submit(own.predict, body, headers=headers) for _ in range(8)]
        while "netfission_images_in_flight 512.0" not in own.ask("GET", "/metrics")[2]:
            assert not asked[0].done()
        status, headers, _ = own.predict(make_image())
        assert (status, headers["Retry-After"]) == (503, "1")
        assert [one.result()[0] for one in asked] == [504] * 8
        gate.set()
        assert own.predict(make_image())[0] == 200


def test_a_network_that_fails_is_told_and_the_next_request_answered(
    finished_run, serving, make_image, monkeypatch, capfd
):
    with serving(finished_run) as own:
        with monkeypatch.context() as patch:
            patch.setattr(Classifier, "interpret", lambda *_, **__: 1 / 0)
            status, _, answer = own.predict(make_image())
        assert (status, answer) == (500, {"error": "the network failed on these images"})
        assert own.predict(make_image())[0] == 200
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_risk_tells_what_the_ensemble_abstains_from(finished_run, serving, classifier, make_image):
    with serving(finished_run, answers=AnswerSettings(risk=0.0)) as own:
        content = make_image()
        threshold = classifier.threshold(0.0)
        answer = own.predict(content)[2]
        assert answer["abstain"] is (answer["probability"] < threshold)
        assert own.ask("GET", "/model")[2]["threshold"] == threshold


def test_the_server_abstains_by_default_as_predict_does(
    served, classifier, finished_run, serving, make_image, tmp_path
):
    model = served.ask("GET", "/model")[2]
    assert (model["risk"], model["threshold"]) == (0.05, classifier.threshold(0.05))
    assert model["calibration_images"] == classifier.calibration.n
    assert model["calibrated_on"] == "validation images"
    answer = served.predict(make_image())[2]
    assert answer["abstain"] is (answer["probability"] < model["threshold"])
    uncalibrated = shutil.copytree(finished_run, tmp_path / "uncalibrated")
    (uncalibrated / "calibration.json").unlink()
    with serving(uncalibrated) as own:
        assert "abstain" not in own.predict(make_image())[2]
        model = own.ask("GET", "/model")[2]
    assert (model["calibrated"], model["risk"], model["threshold"]) == (False, None, None)


def test_the_accuracy_is_that_of_the_evaluation_if_there_is_one(
    served, classifier, finished_run, serving, tmp_path
):
    model = served.ask("GET", "/model")[2]
    evaluation = classifier.evaluation
    assert (model["accuracy"], model["test_images"]) == (evaluation.ensemble["top1"], evaluation.n)
    other = shutil.copytree(finished_run, tmp_path / "other")
    (other / "evaluation.json").unlink()
    with serving(other) as own:
        assert own.ask("GET", "/model")[2]["accuracy"] is None


def cors(headers):
    prefix = "access-control-"
    return {
        name.lower().removeprefix(prefix): value
        for name, value in headers.items()
        if name.lower().startswith(prefix)
    }


def test_pages_of_named_origins_may_read_the_answers_and_no_others(
    finished_run, serving, make_image, monkeypatch
):
    named, other = {"Origin": "https://app.example:8443"}, {"Origin": "https://other.example"}
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with serving(finished_run, cors_origin=["https://app.example:8443", "http://localhost:3000"]) as own:
        for origin, allowed in ((named, "https://app.example:8443"), (other, None), ({}, None)):
            status, headers, answer = own.predict(make_image(), headers=origin)
            assert (status, "class" in answer) == (200, True)
            assert cors(headers).get("allow-origin") == allowed
            assert "allow-credentials" not in cors(headers)
            assert headers["Vary"] == "Origin"  # or a cache gives one origin's answer to another
        status, headers, _ = own.ask("OPTIONS", "/predict", headers=named | preflight)
        assert status == 200
        assert cors(headers)["allow-origin"] == "https://app.example:8443"
        assert "POST" in cors(headers)["allow-methods"].split(", ")
        assert "content-type" in cors(headers)["allow-headers"].lower().split(", ")
        status, headers, _ = own.ask("OPTIONS", "/predict", headers=other | preflight)
        assert status == 400 and "allow-origin" not in cors(headers)
        status, headers, _ = own.predict(b"hello", headers=named)
        assert (status, cors(headers)["allow-origin"]) == (415, "https://app.example:8443")
        monkeypatch.setattr(Classifier, "interpret", lambda *_, **__: 1 / 0)
        status, headers, _ = own.predict(make_image(), headers=named)
        assert (status, cors(headers)["allow-origin"]) == (500, "https://app.example:8443")


def test_pages_of_all_origins_may_read_the_answers(finished_run, serving, make_image):
    with serving(finished_run, cors_origin=["*"]) as own:
        headers = own.predict(make_image(), headers={"Origin": "https://other.example"})[1]
    assert cors(headers)["allow-origin"] == "*"


def test_without_the_option_no_other_page_may_read_the_answers(served, make_image):
    origin = {"Origin": f"http://127.0.0.1:{served.port + 1}"}
    assert cors(served.predict(make_image(), headers=origin)[1]) == {}
    preflight = origin | {"Access-Control-Request-Method": "POST"}
    status, headers, _ = served.ask("OPTIONS", "/predict", headers=preflight)
    assert (status, cors(headers)) == (405, {})


def test_health_model_and_metrics(served, classifier, make_image):
    assert served.ask("GET", "/health")[2]["ok"] is True
    model = served.ask("GET", "/model")[2]
    assert (model["classes"], model["exits"], model["image"]) == (classifier.spec.classes, 2, [1, 8, 8])

    def value_of(line):
        found = re.search(rf"^{re.escape(line)} ([\d.]+)$", served.ask("GET", "/metrics")[2], re.MULTILINE)
        return float(found[1]) if found else 0.0

    lines = {
        'netfission_requests_total{path="/predict",status="200"}': 2,
        'netfission_requests_total{path="/predict",status="415"}': 1,
        'netfission_requests_total{path="other",status="404"}': 1,
        "netfission_images_total": 2,
        "netfission_predict_seconds_count": 3,
    }
    before = {line: value_of(line) for line in lines}
    for content in (make_image(), make_image(), b"hello"):
        served.predict(content)
    served.ask("GET", "/some/where")
    assert {line: value_of(line) - before[line] for line in lines} == lines
    assert value_of("netfission_images_in_flight") == 0


def test_memory_given_to_bodies_is_bounded_and_given_back(finished_run, serving, make_image):
    with serving(finished_run, max_bytes=1000, timeout_s=20.0) as own:
        held = [socket.create_connection(("127.0.0.1", own.port)) for _ in range(33)]
        for one in held:
            one.sendall(head(1000) + bytes(999))
        deadline = time.monotonic() + 15
        while own.predict(make_image())[0] == 200:
            assert time.monotonic() < deadline
        assert own.predict(make_image())[0] == 503
        for one in held:
            one.close()
        while own.predict(make_image())[0] == 503:
            assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--port 70000", r"port must be an integer from 0 to 65535, got 70000$"),
        (
            "--host 203.0.113.1",
            r"host and port must be an address of this machine and a free port, got 203\.0\.113\.1 and 8000",
        ),
        ("--max_batch 0", r"--max-batch must be a positive integer, got 0$"),
        ("--max_pixels 1000000000", r"--max-pixels must be an integer from 1 to \d+, got 1000000000$"),
        ("--timeout_s 0", r"--timeout-s must be a positive number of seconds, got 0\.0$"),
        ("--max_wait_ms -1", r"--max-wait-ms must be a number of milliseconds of at least 0, got -1\.0$"),
        (
            "--cors-origin https://app.example app.example",
            r"--cors-origin must be \* or an origin such as https://example\.org:8443, got 'app\.example'$",
        ),
        ("--cors-origin https://app.example/", r"got 'https://app\.example/'$"),
        ("--cors-origin https://App.example", r"got 'https://App\.example'$"),
        ("--risk 2", r"risk must be a share of wrong answers from 0 to 1, got 2\.0$"),
    ],
)
def test_a_bad_request_ends_in_one_line_and_status_2(finished_run, flags, told, capsys, monkeypatch):
    monkeypatch.setattr("uvicorn.Server.run", lambda *_: None)  # else it would serve what it should refuse
    assert main(["serve", str(finished_run), *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(told, line)


def test_a_port_in_use_and_a_run_without_weights_are_told(finished_run, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", str(finished_run), "--port", port]) == 2
    assert f"127.0.0.1 and {port} (Address already in use" in capsys.readouterr().err
    for name in ("config.yaml", "config.json"):
        (tmp_path / name).write_bytes((finished_run / name).read_bytes())
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "model.safetensors must be the weights of a network, got no such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["starlette", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_told(name, finished_run, capsys, monkeypatch):
    for loaded in list(sys.modules):
        if loaded.startswith(("netfission.serve", "starlette", "uvicorn")):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["serve", str(finished_run)]) == 2
    told = f"netfission serve needs {name}; install it by pip install 'netfission[serve]'"
    assert capsys.readouterr().err == f"netfission: {told}\n"


def refuses_connections(port):
    """Wait until a server accepts no more connections."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    raise AssertionError("the server still accepts connections")


def damaged_fax():
    """A TIFF file whose lines are no valid fax code."""
    file = io.BytesIO()
    Image.radial_gradient("L").convert("1").save(file, "TIFF", compression="group4")
    content = bytearray(file.getvalue())
    content[8:600] = bytes(range(1, 38)) * 16
    return bytes(content)


def damaged_animation(image):
    """A PNG file that says it has no frames, which Pillow warns of."""
    chunk = b"acTL" + bytes(8)
    return image[:33] + bytes([0, 0, 0, 8]) + chunk + zlib.crc32(chunk).to_bytes(4) + image[33:]


def many_samples():
    """A TIFF file of 10,000 samples per pixel, which Pillow logs."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "TIFF")
    samples, much = (struct.pack("<HHIHH", 277, 3, 1, number, 0) for number in (3, 10_000))
    return file.getvalue().replace(samples, much)


def test_ctrl_c_answers_what_has_come_and_ends_with_status_0(finished_run, classifier, make_image, make_form):
    with pytest.warns(match=SPARSE_CLASSES):  # which no request may write to the log
        classifier.limits(coverage=0.935, class_wise=True)
    command = [sys.executable, "-m", "netfission", "serve", str(finished_run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        port = int(re.search(r"on http://127\.0\.0\.1:(\d+) ", process.stdout.readline())[1])
        content, damaged = make_image(), damaged_fax()
        form, type_ = make_form(content)
        for body, kind, status in (
            (damaged, "image/tiff", 400),  # libtiff prints a line for each line that it cannot decode
            (damaged_animation(content), "image/png", 200),
            (many_samples(), "image/tiff", 415),
            (form.replace(b"--limit", b"--other"), type_["Content-Type"], 400),
        ):
            start = head(len(body), f"Connection: close\r\nContent-Type: {kind}\r\n")
            assert raw(port, start + body).startswith(b"HTTP/1.1 %d " % status)
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        client.request("POST", "/predict?coverage=0.935&class_wise=1", content)
        assert client.getresponse().status == 200
        client.close()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as own:
            own.sendall(head(len(content), "Expect: 100-continue\r\n"))
            assert own.recv(65536).startswith(b"HTTP/1.1 100 ")  # the request has begun
            own.sendall(content[:-1])
            os.kill(process.pid, signal.SIGINT)
            refuses_connections(port)
            own.sendall(content[-1:])
            assert own.recv(65536).startswith(b"HTTP/1.1 200 ")
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_baseline_is_served_as_it_is(settings_of, serving, make_image, tmp_path):
    from netfission.runs.train import train

    train(settings_of(method="deep-ensemble", sparsity=0.0, epochs=1), tmp_path / "run", progress=False)
    classifier = Classifier.from_pretrained(tmp_path / "run")
    with serving(tmp_path / "run") as own:
        content = make_image()
        answer = own.predict(content)[2]
        assert_tells(answer, expected(classifier, content), classifier.spec.classes)
        assert own.ask("GET", "/model")[2]["exits"] == len(answer["exits"])


def test_threads_are_shared_out_among_batches(finished_run, serving, make_image):
    before = torch.get_num_threads()
    try:
        with serving(finished_run, threads=1) as own:
            assert own.predict(make_image())[0] == 200
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


LIMITS = {"coverage": 0.8, "risk": 0.3, "delta": 0.2, "accept_false_alarms": 0.1, "score": "aps"}


def assert_promises(answer, own, names, row=0):
    """What an answer says of sets, bounds and marks is what was predicted."""
    assert answer["set"] == [names[k] for k in own.sets[row].nonzero()[:, 0]]
    assert answer["abstain"] is bool(own.abstains[row])
    assert answer["out_of_distribution"] is bool(own.out_of_distribution[row])
    assert answer["p_value"] == pytest.approx(own.p_values[row].item(), abs=0.02)  # a rank or two of 145
    assert answer["class"] == names[own.classes[row]]
    assert {name: answer[name] for name in LIMITS} == LIMITS
    assert (answer["class_wise"], answer["detector"]) == (False, "energy")


def test_a_request_asks_for_sets_bounds_and_marks_as_predict_does(served, classifier, make_image, make_form):
    query = "?" + "&".join(f"{name}={value}" for name, value in LIMITS.items())
    contents = [make_image(number) for number in range(6)]
    body, headers = make_form(*contents)
    status, _, answer = served.predict(body, query, headers=headers)
    assert status == 200
    pixels = torch.stack([classifier.pixels(Image.open(io.BytesIO(content))) for content in contents])
    own = classifier.predict(pixels, **LIMITS)
    for row, one in enumerate(answer["predictions"]):
        assert_promises(one, own, classifier.spec.classes, row)
    plain = served.predict(contents[0])[2]
    assert plain["p_value"] == answer["predictions"][0]["p_value"]
    assert not {"set", "out_of_distribution", "delta"} & plain.keys()
    by_class = served.predict(contents[0], "?coverage=0.5&class_wise=1&detector=entropy")[2]
    own_by_class = classifier.predict(pixels[:1], coverage=0.5, class_wise=True, detector="entropy")
    assert by_class["set"] == [classifier.spec.classes[k] for k in own_by_class.sets[0].nonzero()[:, 0]]
    assert (by_class["class_wise"], by_class["detector"]) == (True, "entropy")
    single = served.predict(contents[0], f"{query}&all=1")[2]
    assert len(single["probabilities"]) == 10
    assert_promises(single, own, classifier.spec.classes)


def test_limits_of_a_request_are_computed_while_its_images_are_in_flight(
    finished_run, serving, make_image, monkeypatch
):
    computing, go_on = threading.Event(), threading.Event()
    limits = AnswerSettings.limits

    def slow(self, classifier):
        if self.coverage is not None:
            computing.set()
            assert go_on.wait(20)
        return limits(self, classifier)

    monkeypatch.setattr(AnswerSettings, "limits", slow)
    with serving(finished_run, timeout_s=5) as own, ThreadPoolExecutor(1) as client:
        answer = client.submit(own.predict, make_image(), "?coverage=0.5")
        assert computing.wait(20)
        metrics = own.ask("GET", "/metrics")[2]
        go_on.set()
        assert answer.result()[0] == 200
    assert "netfission_images_in_flight 1.0" in metrics


def test_what_is_asked_of_all_answers_is_on_the_page_and_a_request_may_ask_for_less(
    finished_run, serving, classifier, make_image
):
    content = make_image(3)
    own = classifier.predict(classifier.pixels(Image.open(io.BytesIO(content)))[None], **LIMITS)
    with serving(finished_run, answers=AnswerSettings(**LIMITS)) as server:
        assert_promises(server.predict(content)[2], own, classifier.spec.classes)
        model = server.ask("GET", "/model")[2]
        wider = server.predict(content, "?coverage=0.95&delta=0.5")[2]
    asked = {name: model[name] for name in LIMITS if name != "score"}
    assert asked == {name: value for name, value in LIMITS.items() if name != "score"}
    assert model["threshold"] == classifier.limits(risk=0.3, delta=0.2).threshold
    assert model["threshold_temperature"] == 1
    assert (wider["coverage"], wider["delta"], wider["risk"]) == (0.95, 0.5, 0.3)


_ASKED = "all, risk, delta, coverage, score, class_wise, accept_false_alarms, detector"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("coverage=x", "coverage must be a number, got 'x'"),
        ("coverage=1", "coverage must be a share of images above 0 and below 1, got 1.0"),
        ("coverage=0.9&delta=nan", "delta must be a probability above 0 and below 1, got nan"),
        ("score=aps", "score must be left out without a coverage, got 'aps'"),
        ("coverage=0.9&score=x", "score must be one of lac, aps, raps, got 'x'"),
        ("coverage=0.9&class_wise=yes", "class_wise must be 0 or 1, got 'yes'"),
        ("detector=x", "detector must be one of energy, entropy, maximum-probability, mutual-information,"),
        (
            "accept_false_alarms=0.001",
            "accept_false_alarms must be at least 0.01 with 145 calibration",
        ),
        ("coverge=0.9", f"query must be of {_ASKED}, got 'coverge'; did you mean coverage"),
        (
            "accept-false-alarms=0.1",
            f"query must be of {_ASKED}, got 'accept-false-alarms'; did you mean acc",
        ),
        ("coverage=0.9&coverage=0.8", "coverage must be given once, got 2 times"),
        (
            "accept_false_alarms=1e-300",
            "accept_false_alarms must be a share of images above 1e-16, got 1e-300",
        ),
        ("risk=0.001&delta=0.1", "risk must be at least 0.02 with 145 calibration images, got 0.001; "),
    ],
)
def test_a_request_whose_promises_cannot_be_kept_is_refused_in_one_line(served, make_image, query, message):
    status, _, answer = served.predict(make_image(), f"?{query}")
    assert status == 400
    assert answer["error"].startswith(message)


@pytest.mark.filterwarnings("ignore:a drift window of 40 is more than a tenth")
def test_the_metrics_tell_whether_the_last_images_have_drifted(
    finished_run, serving, classifier, make_form, tmp_path
):
    def files(images):
        for image in images:
            content = io.BytesIO()
            Image.fromarray(image[0].numpy()).save(content, "PNG")
            yield content.getvalue()

    def drift(server):
        metrics = server.ask("GET", "/metrics")[2]
        return [
            float(re.search(rf"^netfission_drift_{name} (\S+)$", metrics, re.MULTILINE)[1])
            for name in ("images", "p_value")
        ]

    images = load_data("digits").test.images
    with serving(finished_run, drift_window=40) as server:
        assert drift(server) == [0, pytest.approx(math.nan, nan_ok=True)]
        for start in (0, 20, 40):
            body, headers = make_form(*files(images[start : start + 20]))
            assert server.predict(body, headers=headers)[0] == 200
        number, p_value = drift(server)
        assert number == 40
        assert p_value == pytest.approx(classifier.drift_p_value(images[20:60]), abs=0.02)
        body, headers = make_form(*files(255 - images[:20]))
        for _ in range(2):
            server.predict(body, headers=headers)
        inverted = torch.cat([255 - images[:20]] * 2)
        assert drift(server)[1] == pytest.approx(classifier.drift_p_value(inverted), abs=0.02)
    assert classifier.drift_p_value(255 - images[:100]) < 0.001 < classifier.drift_p_value(images[:100])
    uncalibrated = shutil.copytree(finished_run, tmp_path / "uncalibrated")
    (uncalibrated / "calibration.json").unlink()
    with serving(uncalibrated) as server:
        server.predict(next(files(images)))
        assert drift(server) == [0, pytest.approx(math.nan, nan_ok=True)]
    with pytest.raises(
        ValueError, match=r"^detector must be left out for a network without calibration, got "
    ):
        Classifier.from_pretrained(uncalibrated).drift_p_value(images)


@pytest.mark.parametrize("query", ["{}=1", "all={}", "risk={}", "coverage=0.9&score={}"])
def test_a_refusal_repeats_little_of_what_was_sent(served, query):
    status, _, answer = served.predict(b"", "?" + query.format("x" * 20_000))
    assert (status, len(answer["error"]) < 300) == (400, True)


def test_a_refusal_repeats_little_of_a_host(served):
    status, _, answer = served.ask("GET", "/health", headers={"Host": "x" * 20_000})
    assert (status, len(answer["error"]) < 300) == (421, True)


def test_a_window_without_images_is_refused():
    with pytest.raises(ValueError, match=r"^drift_window must be a positive integer, got 0$"):
        Settings(drift_window=0)


def test_a_window_of_drift_is_a_tenth_of_the_calibration_and_a_larger_one_is_warned_of():
    calibration = torch.linspace(-9, -8, 99)
    window = DriftWindow(calibration)
    window.add(torch.zeros(60))
    assert len(window) == 9
    DriftWindow(None, 50), DriftWindow(calibration, 9)
    with pytest.warns(
        match=r"^a drift window of 10 is more than a tenth of 99 calibration images: small p-v"
    ):
        DriftWindow(calibration, 10)
