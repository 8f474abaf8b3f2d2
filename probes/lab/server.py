"""HTTP server of the lab, for one person's browser.

    GET  /?token=T        sets the cookie of this server and leads to /
    GET  /                the page
    GET  /picture         a photo's preview: ?photo=KEY
    POST /photo?name=N    a photo as the body, or ?key=KEY for one that the server has; its key, size, grid and labels
    POST /run/OPERATION   JSON (requests.py) to lines of JSON: {"waiting": jobs}, {"layer": l, "layers": L}, the answer
                          so far as {"text": answer, "blocked": bool}, and last {"result": ...} or {"error": text}.
                          Closing the connection cancels the operation.

Every request needs the cookie, a Host that is no foreign name (DNS rebinding) and, if the browser sends them, the
page's own Origin (cross-site posts) and Sec-Fetch-Site (browsers send the cookie from pages at other ports, too).
"""

import hmac
import ipaddress
import json
import secrets
import traceback
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_bidir.common.errors import UserError
from probes.report.render import render

from .photos import encode_image
from .requests import Attention, PatchView, PhotoQuestion, ShownViews, SiteView, View, parse_request
from .session import Session
from .worker import Job, Worker

MAX_PHOTO_BYTES = 64 << 20  # a 50-megapixel JPEG of a camera has about 30 MB
MAX_JSON_BYTES = 1 << 20  # 128 x 128 patch numbers have 100 KB
# of a body's limit are read before it is refused: closing while a client still sends loses the answer
READ_LIMITS = 4
OPERATIONS: dict[str, type[View]] = {
    "read": View,
    "words_of_patch": PatchView,
    "words_of_site": SiteView,
    "pixel_map": SiteView,
    "similarity": PatchView,
    "norms": View,
    "pca": ShownViews,
    "ask": PhotoQuestion,
    "attention": Attention,
}


def build_app(session: Session, worker: Worker, token: str, hosts: set[str]) -> ASGIApp:
    """Return the application."""
    pages = Pages(session, worker)
    routes = [
        Route("/", pages.show_page),
        Route("/picture", pages.show_picture),
        Route("/photo", pages.add_photo, methods=["POST"]),
        Route("/run/{operation}", pages.run_operation, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        UserError: refuse,
        Refused: refuse,
        ClientDisconnect: refuse,
        Exception: fail,
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), token, hosts)


# ---------------------------------------------------------------------------------------------- requests
@dataclass
class Pages:
    """What the server answers from a session, whose operations the worker runs."""

    session: Session
    worker: Worker

    async def show_page(self, request: Request) -> Response:
        """Return the page."""
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; style-src 'nonce-{nonce}'; "
        policy += f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        text = await run_in_threadpool(
            render, "lab/lab.html.j2", data=self.session.describe(), nonce=nonce
        )
        headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
        }
        return Response(text, media_type="text/html", headers=headers)

    async def add_photo(self, request: Request) -> Response:
        """Keep a photo, or find one, and describe it."""
        key = request.query_params.get("key")
        if key is None:
            content = await read_body(request, MAX_PHOTO_BYTES)
            name = request.query_params.get("name", "")[:200]
            key = await run_in_threadpool(self.session.photos.add, content, name)
        photo = await run_in_threadpool(self.session.photos.get, check_key(key))
        geometry = self.session.models[0].mllm.geometry
        return JSONResponse({"key": key, **photo.describe(geometry)})

    async def show_picture(self, request: Request) -> Response:
        """Return a photo's preview."""
        key = check_key(request.query_params.get("photo", ""))
        photo = await run_in_threadpool(self.session.photos.get, key)
        content = await run_in_threadpool(encode_image, photo.preview, "JPEG")
        # A later lab at this port has other pictures under the same key. Browsers send no Sec-Fetch-Site to a host
        # without TLS other than localhost, but do not show such a picture on other origins' pages.
        headers = {"Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin"}
        return Response(content, media_type="image/jpeg", headers=headers)

    async def run_operation(self, request: Request) -> Response:
        """Return the events of an operation as they come."""
        name = request.path_params["operation"]
        if name not in OPERATIONS:
            raise Refused(
                404, f"no operation {name[:50]!r}; expected one of {', '.join(OPERATIONS)}"
            )
        parsed = parse_request(OPERATIONS[name], await read_body(request, MAX_JSON_BYTES))
        self.session.check(parsed)
        operation = getattr(self.session, name)
        job = self.worker.submit(lambda job: operation(parsed, job))
        if job is None:
            raise Refused(503, "too many requests wait for the model; try again")
        return StreamingResponse(stream_events(job), media_type="application/x-ndjson")


async def read_body(request: Request, limit: int) -> bytes:
    """Return the body of a request.

    Raises:
        Refused: It has more than `limit` bytes.
    """
    too_long = Refused(413, f"the body has more than {limit >> 20} MiB")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length[:20]) > READ_LIMITS * limit:
        raise too_long
    body = bytearray()
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > READ_LIMITS * limit:
            raise too_long
        if size <= limit:
            body += part
    if size > limit:
        raise too_long
    return bytes(body)


def check_key(key: str) -> str:
    """Return a photo's key; raise a UserError if it is none."""
    return parse_request(View, json.dumps({"photo": key, "model": 0}).encode()).photo


async def stream_events(job: Job) -> AsyncIterator[str]:
    """Yield the events of a job as lines of JSON; cancel it if the client leaves."""
    try:
        while True:
            event = await job.events.get()
            yield json.dumps(event) + "\n"
            if event.keys() & {"result", "error"}:
                return
    finally:
        job.cancelled.set()


# ------------------------------------------------------------------------------------------------ errors
class Refused(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def refuse(request: Request, error: Exception) -> Response:
    """Return why a request is refused."""
    status = getattr(error, "status", 400)
    return JSONResponse({"error": str(error)}, status, {"Connection": "close"})


def fail(request: Request, error: Exception) -> Response:
    """Print a bug in the terminal, and return that there is one."""
    traceback.print_exception(error)
    return JSONResponse(
        {"error": f"{type(error).__name__}; the terminal of `probes lab` has details"}, 500
    )


# ----------------------------------------------------------------------------------- who may use the server
@dataclass
class Guard:
    """Middleware that refuses requests of other sites, of foreign hosts and without the token."""

    app: ASGIApp
    token: str
    hosts: set[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope)
        refusal = self._refusal(request)
        if refusal:
            return await JSONResponse({"error": refusal}, 403)(scope, receive, send)
        if request.url.path == "/" and "token" in request.query_params:
            response = RedirectResponse("/", 303, {"Referrer-Policy": "no-referrer"})
            response.set_cookie(cookie_name(scope), self.token, httponly=True, samesite="strict")
            return await response(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, request: Request) -> str:
        host = request.headers.get("host", "")
        if not self._is_this_host(host):
            return f"the Host {host[:100]!r} is not this server's; open the address that `probes lab` printed"
        origin = request.headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return "requests of other sites are refused"
        # Another site's link may open the page, which it cannot read; that the token goes with it is checked below.
        opens_page = request.url.path == "/" and request.headers.get("sec-fetch-mode") == "navigate"
        if (
            request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
            and not opens_page
        ):
            return "requests of other sites are refused"
        given = request.query_params.get("token") if request.url.path == "/" else None
        if given is None:
            # Not http.cookies, which reads none after a cookie that is not valid; other servers of this host set some.
            given = request.cookies.get(cookie_name(request.scope), "")
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return "open the address that `probes lab` printed, with its token"
        return ""

    def _is_this_host(self, host: str) -> bool:
        """Return True for an address in numbers, which DNS cannot rebind, localhost, or the name given by --host."""
        name, _, port = host.rpartition(":")
        if not port.isdigit():
            name = host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower() in self.hosts
        return True


def cookie_name(scope: Scope) -> str:
    """Return the name of this server's cookie; browsers share cookies between the ports of a host."""
    return f"lab-{scope['server'][1]}"
