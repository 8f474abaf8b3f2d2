"""The lab's server: hostile requests, which it answers or refuses and goes on, and the command."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import labs
import pytest
from labs import TOKEN, run, send

from probes.lab.worker import Cancelled, Job

pytest.importorskip("starlette", reason="starlette (extra: lab) is not installed")
pytest.importorskip("uvicorn", reason="uvicorn (extra: lab) is not installed")

VIEW = {"photo": "split:0", "model": 0}
BLOCK = {
    "kind": "block",
    "patches": [0, 2],
    "layers": [1, 2],
}
REPLACE = {
    "kind": "replace",
    "patches": [1],
    "site": "layer_01",
    "by": "split:2",
}
REQUESTS = {  # one of each operation
    "read": VIEW | {"intervention": BLOCK},
    "words_of_patch": VIEW | {"patch": 3},
    "words_of_site": VIEW | {"intervention": REPLACE, "site": "adapter"},
    "pixel_map": VIEW | {"site": "layer_03", "square": True},
    "ask": VIEW | {"question": "Sky?", "intervention": BLOCK},
    "attention": VIEW | {"patch": 1, "layer": 2},
    "answer_attention": VIEW
    | {
        "question": "Sky?",
        "answer": "the sky",
        "token": 0,
        "layer": 2,
    },
}


@pytest.fixture
def still_serves(port):
    """After the test, the server answers as before."""
    yield
    assert "result" in run(port, "read", VIEW)


@pytest.mark.parametrize("operation", REQUESTS)
def test_each_operation_answers_in_lines_of_json(port, operation):
    assert "result" in run(port, operation, REQUESTS[operation])


def headers_of(port, path: str):
    connection = labs.http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers={"Cookie": f"lab-{port}={TOKEN}"})
    return connection.getresponse().headers


def test_page_has_a_policy_that_allows_this_server_only(port):
    status, page = send(port, "GET", "/")
    assert status == 200
    assert not re.search(rb"https?://|@import|url\(", page)
    policy = headers_of(port, "/")["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'")
    assert "unsafe" not in policy
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
    assert nonce not in page.decode(), "a nonce is used once"


def test_token_sets_a_cookie_that_other_sites_cannot_use(port):
    headers = headers_of(port, f"/?token={TOKEN}")
    assert headers["Location"] == "/"
    for part in (f"lab-{port}={TOKEN}", "HttpOnly", "SameSite=strict"):
        assert part in headers["Set-Cookie"]


FOREIGN = {
    "no cookie": {"Cookie": None},
    "wrong token": {"Cookie": "lab-{port}=guess"},
    "broken cookie": {"Cookie": '=;;\\x00="; lab'},
    "token of another port": {"Cookie": f"lab-1={TOKEN}"},
    "rebound name": {"Host": "attacker.example:{port}"},
    "name that begins like ours": {"Host": "127.0.0.1.attacker.example"},
    "no host": {"Host": ""},
    "foreign origin": {"Origin": "http://attacker.example"},
    "opaque origin": {"Origin": "null"},
    "origin of another port": {"Origin": "http://127.0.0.1:1"},
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/run/read"), ("POST", "/photo?key=split:0"), ("GET", "/")]
)
def test_foreign_requests_are_refused(
    port,
    still_serves,
    case,
    method,
    path,
):
    headers = {k: v and v.replace("{port}", str(port)) for k, v in FOREIGN[case].items()}
    status, body = send(
        port,
        method,
        path,
        json.dumps(VIEW) if method == "POST" else None,
        **headers,
    )
    assert status in (400, 403)
    assert b"classes" not in body


@pytest.mark.parametrize("cookie", ['theme={"dark": true}', "flag", "path=1", "a=b c"])
def test_cookies_of_other_servers_of_the_host_do_not_lock_the_page(port, cookie):
    assert send(port, "GET", "/", Cookie=f"{cookie}; lab-{port}={TOKEN}")[0] == 200


def test_pictures_are_neither_kept_for_a_later_lab_at_the_port_nor_shown_by_other_origins(port):
    """A later lab's validation split has other pictures under the same keys; a page at another port has the cookie."""
    headers = headers_of(port, "/picture?photo=split:0")
    assert headers["Cache-Control"] == "no-store"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("path", ["/picture?photo=split:0", "/"])
@pytest.mark.parametrize("site", ["cross-site", "same-site", "same-origin", "none", None])
def test_pages_at_other_ports_can_embed_nothing(port, path, site):
    status, _ = send(port, "GET", path, **{"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"})
    assert status == (403 if site in ("cross-site", "same-site") else 200)


def test_a_link_on_another_page_opens_the_lab(port):
    link = {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate"}
    assert send(port, "GET", f"/?token={TOKEN}", Cookie=None, **link)[0] == 303
    assert send(port, "GET", "/", **link)[0] == 200
    assert send(port, "GET", "/", Cookie=None, **link)[0] == 403


BODIES = {
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "huge number": b'{"photo": "split:0", "model": 1' + b"0" * 5000 + b"}",
    "traversal": json.dumps(VIEW | {"photo": "split:../../etc/passwd"}).encode(),
    "key with a line break": json.dumps(VIEW | {"photo": "split:0\n"}).encode(),
    "too many patches": json.dumps(
        VIEW | {"intervention": BLOCK | {"patches": [0] * 20_000}}
    ).encode(),
    "too long": b" " * (1 << 20) + json.dumps(VIEW).encode(),
}


@pytest.mark.parametrize("case", BODIES)
def test_invalid_json_is_refused(port, still_serves, case):
    status, body = send(port, "POST", "/run/read", BODIES[case])
    assert status == (413 if case == "too long" else 400)
    assert json.loads(body)["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/picture?photo=../../etc/passwd", 400),
        ("GET", "/picture?photo=split:0&model=-1", 400),
        ("GET", "/picture", 400),
        ("POST", "/run/__init__", 404),
        ("POST", "/photo?key=split:9999999999", 400),
    ],
)
def test_unknown_addresses_are_refused(
    port,
    still_serves,
    method,
    path,
    status,
):
    assert send(port, method, path, "{}" if method == "POST" else None)[0] == status


def raw(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(data)
    return connection


def head(port: int, path: str, *lines: str) -> bytes:
    start = [
        f"POST {path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        f"Cookie: lab-{port}={TOKEN}",
        *lines,
    ]
    return "\r\n".join([*start, "", ""]).encode()


def test_huge_uploads_are_refused_before_and_while_they_arrive(port, still_serves, monkeypatch):
    connection = raw(port, head(port, "/photo", f"Content-Length: {10**15}"))
    assert b" 413 " in connection.recv(100)
    monkeypatch.setattr("probes.lab.server.MAX_PHOTO_BYTES", 100_000)
    chunk = b"%x\r\n%s\r\n" % (50_000, bytes(50_000))
    last = b"1\r\nx\r\n"
    for chunks in (
        3 * chunk + b"0\r\n\r\n",
        8 * chunk + last,
    ):  # a bit too long, and one that does not end
        connection = raw(port, head(port, "/photo", "Transfer-Encoding: chunked") + chunks)
        assert b" 413 " in connection.recv(100)


@pytest.mark.parametrize("name", ["photo", "run/read"])
def test_a_client_whose_body_is_too_long_gets_the_answer(
    port,
    still_serves,
    monkeypatch,
    name,
):
    for limit in ("MAX_PHOTO_BYTES", "MAX_JSON_BYTES"):
        monkeypatch.setattr(f"probes.lab.server.{limit}", 4 << 20)
    for _ in range(5):  # 16 MB do not fit into the socket's buffers
        status, body = send(port, "POST", f"/{name}", bytes(16 << 20))
        assert status == 413
        assert "more than 4 MiB" in json.loads(body)["error"]


def test_a_flood_of_views_leaves_the_lab_answering(port, still_serves):
    """Each one is sent and given up at once, as the page does when the next one follows."""
    for i in range(120):
        view = {"photo": f"split:{i % 5}", "model": 0, "intervention": BLOCK | {"patches": [i % 4]}}
        body = json.dumps(view).encode()
        raw(port, head(port, "/run/read", f"Content-Length: {len(body)}") + body).close()
    deadline = time.monotonic() + 30
    status = 503
    # until the server has seen that the clients left
    while status == 503 and time.monotonic() < deadline:
        status, body = send(port, "POST", "/run/read", json.dumps(VIEW))
    assert status == 200
    assert b'"result"' in body
    assert time.monotonic() < deadline, "views that nobody waits for are not read"


def test_a_cancelled_forward_stops_at_its_next_layer(session):
    mllm = session.models[0].mllm
    ran = []
    pixels = mllm.preprocess([session.photos.get("split:0").squares[0]])

    async def forward():
        job = Job(None)

        def cancel(*_):
            ran.append(len(ran))
            job.cancelled.set()

        with ExitStack() as hooks:
            for layer in mllm.decoder.layers:
                hooks.callback(layer.register_forward_hook(cancel).remove)
            with pytest.raises(Cancelled), job.watched(mllm):
                mllm.states(pixels)

    asyncio.run(forward())
    assert len(ran) == 1


@pytest.mark.parametrize("leaves", [False, True])
def test_words_are_sent_before_the_next_one_is_computed_and_a_client_that_leaves_ends_the_answer(
    port,
    still_serves,
    session,
    monkeypatch,
    request,
    leaves,
):
    shown = threading.Event()
    forwards = []
    jobs = []
    stock = session.ask
    monkeypatch.setattr(
        session, "ask", lambda question, job: (jobs.append(job), stock(question, job))[1]
    )

    def wait(*_) -> None:
        forwards.append(1)
        assert len(forwards) == 1 or shown.wait(20), "the first word was not sent"

    request.addfinalizer(
        session.models[0].mllm.decoder.layers[0].mlp.register_forward_hook(wait).remove
    )
    connection = labs.http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(
        "POST", "/run/ask", json.dumps(REQUESTS["ask"]), {"Cookie": f"lab-{port}={TOKEN}"}
    )
    response = connection.getresponse()
    first = next(event for event in map(json.loads, response) if "text" in event)
    assert first["text"]
    assert first["blocked"] is False
    assert len(forwards) <= 2
    if leaves:
        response.close()
        connection.close()
        assert jobs[0].cancelled.wait(20)
        shown.set()
        run(port, "read", VIEW)  # waits for the answer's end
        assert len(forwards) < 6, "the cancelled answer went on"
    else:
        shown.set()
        events = [json.loads(line) for line in response]
        assert events[-1]["result"]["answer"].startswith(first["text"])
        assert len(forwards) > 6


def test_a_crash_ends_one_request(
    port,
    still_serves,
    session,
    monkeypatch,
    capfd,
):
    def crash(request, job):
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(session, "read", crash)
    assert run(port, "read", VIEW) == {
        "error": "RuntimeError; the terminal of `probes lab` has details"
    }
    monkeypatch.setattr(session.photos, "get", crash)
    status, body = send(port, "GET", "/picture?photo=split:0")
    assert status == 500
    assert b"secret" not in body
    monkeypatch.undo()
    assert "a secret detail" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- command
def ignore_interrupts():
    """As a shell without a terminal does for what it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def heed_interrupts():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [heed_interrupts, ignore_interrupts])
def test_command_prints_its_address_and_ends_at_once(checkpoints, prepare):
    command = [sys.executable, "-m", "probes", "lab", "--mllm", str(checkpoints["causal"])]
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    process = subprocess.Popen([*command, "--port", "0"], preexec_fn=prepare, **pipes)
    address = re.fullmatch(
        r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{32})\n", process.stdout.readline()
    )
    port = int(address[1])
    body = json.dumps(
        {
            "photo": "upload:" + 64 * "0",
            "model": 0,
            "question": "x",
        }
    ).encode()
    cookie = f"lab-{port}={address[2]}"
    assert send(port, "POST", "/run/ask", body, Cookie=cookie)[0] == 200
    held = raw(port, head(port, "/photo", "Content-Length: 100"))
    start = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert time.monotonic() - start < 3
    assert process.stderr.read().splitlines()[-1] == "probes: the lab has ended"
    held.close()
