"""The lab's server: hostile requests, which it answers or refuses and goes on, and the command."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from labs import TOKEN, run, send

pytest.importorskip("starlette", reason="starlette (extra: lab) is not installed")
pytest.importorskip("uvicorn", reason="uvicorn (extra: lab) is not installed")

VIEW = {"photo": "split:0", "model": 0}
TEXT = json.dumps(VIEW)


@pytest.fixture
def still_serves(port):
    """After the test, the server answers as before."""
    yield
    assert "result" in run(port, "read", VIEW)


def begin(
    port: int, method: str, path: str, body: bytes = b"", length: int = 0
) -> http.client.HTTPConnection:
    """Send a request whose body is said to have `length` bytes, without waiting for the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Cookie": f"lab-{port}={TOKEN}", "Content-Length": str(length or len(body))}
    connection.request(method, path, body, headers)
    return connection


def test_page_and_pictures_are_for_this_server_only(port):
    status, page = send(port, "GET", "/")
    assert status == 200
    assert not re.search(rb"https?://|@import|url\(", page)
    page_headers, with_token, picture = (
        begin(port, "GET", path).getresponse().headers
        for path in ("/", f"/?token={TOKEN}", "/picture?photo=split:0")
    )
    policy = page_headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'")
    assert "unsafe" not in policy
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
    assert nonce not in page.decode(), "a nonce is used once"
    cookie = with_token["Set-Cookie"]
    assert all(part in cookie for part in (f"lab-{port}={TOKEN}", "HttpOnly", "SameSite=strict"))
    assert picture["Cache-Control"] == "no-store", "a later lab has other pictures at this address"
    assert picture["Cross-Origin-Resource-Policy"] == "same-origin"


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
def test_foreign_requests_are_refused(port, still_serves, case):
    headers = {k: v and v.replace("{port}", str(port)) for k, v in FOREIGN[case].items()}
    for method, path in (("POST", "/run/read"), ("POST", "/photo?key=split:0"), ("GET", "/")):
        status, answer = send(
            port, method=method, path=path, body=TEXT if method == "POST" else None, **headers
        )
        assert status in (400, 403)
        assert b"classes" not in answer


@pytest.mark.parametrize("cookie", ['theme={"dark": true}', "flag", "path=1", "a=b c"])
def test_cookies_of_other_servers_of_the_host_do_not_lock_the_page(port, cookie):
    assert send(port, "GET", "/", Cookie=f"{cookie}; lab-{port}={TOKEN}")[0] == 200


@pytest.mark.parametrize("path", ["/picture?photo=split:0", "/"])
@pytest.mark.parametrize("site", ["cross-site", "same-site", "same-origin", "none", None])
def test_pages_at_other_ports_can_embed_nothing(port, path, site):
    status, _ = send(
        port, method="GET", path=path, **{"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}
    )
    assert status == (403 if site in ("cross-site", "same-site") else 200)


def test_a_link_on_another_page_opens_the_lab(port):
    link = {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate"}
    assert send(port, "GET", f"/?token={TOKEN}", Cookie=None, **link)[0] == 303
    assert send(port, method="GET", path="/", **link)[0] == 200
    assert send(port, "GET", "/", Cookie=None, **link)[0] == 403


BLOCK = {"kind": "block", "patches": [0, 400]}
LAYERS = {"kind": "block", "patches": [0], "layers": [1, 99]}
REPLACE = {"kind": "replace", "patches": [0], "site": "x", "by": "mean"}
REQUESTS = {
    "unknown model": ("/run/read", json.dumps(VIEW | {"model": 7}), 400),
    "unknown patch": ("/run/similarity", json.dumps(VIEW | {"patch": 400}), 400),
    "unknown patches": ("/run/read", json.dumps(VIEW | {"intervention": BLOCK}), 400),
    "unknown site": ("/run/pixel_map", json.dumps(VIEW | {"site": "layer_99"}), 400),
    "unknown layer": ("/run/attention", json.dumps(VIEW | {"patch": 0, "layer": 99}), 400),
    "unknown layers": ("/run/read", json.dumps(VIEW | {"intervention": LAYERS}), 400),
    "unknown site of states": ("/run/read", json.dumps(VIEW | {"intervention": REPLACE}), 400),
    "no JSON": ("/run/read", b"{", 400),
    "deep": ("/run/read", b"[" * 100_000, 400),
    "huge number": ("/run/read", b'{"photo": "split:0", "model": 1' + b"0" * 5000 + b"}", 400),
    "traversal": ("/run/read", TEXT.replace("split:0", "split:../../etc/passwd"), 400),
    "key with a line break": ("/run/read", TEXT.replace("split:0", "split:0\\n"), 400),
    "too long": ("/run/read", b" " * (1 << 20) + TEXT.encode(), 413),
    "unknown operation": ("/run/__init__", b"{}", 404),
    "unknown photo": ("/photo?key=split:9999999999", b"{}", 400),
    "picture elsewhere": ("/picture?photo=../../etc/passwd", None, 400),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_invalid_requests_are_refused(port, still_serves, case):
    path, body, expected = REQUESTS[case]
    status, answer = send(port, method="GET" if body is None else "POST", path=path, body=body)
    assert status == expected
    assert not path.startswith("/run/") or json.loads(answer)["error"]


@pytest.mark.parametrize("name", ["photo", "run/read"])
def test_a_client_whose_body_is_too_long_gets_the_answer(port, still_serves, monkeypatch, name):
    held = begin(port, "POST", f"/{name}", length=10**15)
    assert held.getresponse().status == 413, "before it arrives"
    for limit in ("MAX_PHOTO_BYTES", "MAX_JSON_BYTES"):
        monkeypatch.setattr(f"probes.lab.server.{limit}", 4 << 20)
    for _ in range(5):  # 16 MB do not fit into the socket's buffers
        status, body = send(port, method="POST", path=f"/{name}", body=bytes(16 << 20))
        assert status == 413
        assert "more than 4 MiB" in json.loads(body)["error"]


def test_a_flood_of_views_leaves_the_lab_answering(port, still_serves):
    """Each one is sent and given up at once, as the page does when the next one follows."""
    for i in range(120):
        block = {"kind": "block", "patches": [i % 4]}
        view = {"photo": f"split:{i % 5}", "model": 0, "intervention": block}
        begin(port, method="POST", path="/run/read", body=json.dumps(view).encode()).close()
    deadline = time.monotonic() + 30
    status = 503
    # until the server has seen that the clients left
    while status == 503 and time.monotonic() < deadline:
        status, body = send(port, method="POST", path="/run/read", body=TEXT)
    assert status == 200
    assert b'"result"' in body
    assert time.monotonic() < deadline, "views that nobody waits for are not read"


def test_words_are_sent_while_the_answer_grows_and_a_client_that_leaves_ends_it(
    port, still_serves, session, request
):
    shown = threading.Event()
    forwards = []

    def wait(*_) -> None:
        forwards.append(1)
        assert len(forwards) == 1 or shown.wait(20), "the first word was not sent"

    first_layer = session.models[0].mllm.decoder.layers[0]
    request.addfinalizer(first_layer.mlp.register_forward_hook(wait).remove)
    question = json.dumps(VIEW | {"question": "Sky?"}).encode()
    connection = begin(port, method="POST", path="/run/ask", body=question)
    response = connection.getresponse()
    first = next(event for event in map(json.loads, response) if "text" in event)
    assert first["text"]
    assert first["blocked"] is False
    assert len(forwards) <= 2
    response.close()
    connection.close()
    time.sleep(1)  # the server sees that the client has left
    shown.set()
    run(port, "read", VIEW)  # waits for the answer's end
    assert len(forwards) < 6, "the cancelled answer went on"


def test_a_crash_ends_one_request(port, session, monkeypatch, capfd):
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


@pytest.mark.slow
def test_command_prints_its_address_and_ends_at_once(checkpoints):
    command = [sys.executable, "-m", "probes", "lab", "--mllm", str(checkpoints["causal"])]
    process = subprocess.Popen(
        [*command, "--port", "0"],
        preexec_fn=ignore_interrupts,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = re.fullmatch(
        r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]{32})\n", process.stdout.readline()
    )
    port = int(address[1])
    assert send(port, "GET", "/", Cookie=f"lab-{port}={address[2]}")[0] == 200
    held = begin(port, "POST", "/photo", length=100)
    start = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert time.monotonic() - start < 3
    assert process.stderr.read().splitlines()[-1] == "probes: the lab has ended"
    held.close()
