"""`probes lab`: the live page of running models."""

import os
import secrets
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llava_bidir.common.errors import UserError
from probes.config import LabOptions

if TYPE_CHECKING:
    import uvicorn

    from .session import Session
    from .worker import Worker


def run(options: LabOptions) -> None:
    """Run `probes lab` until Ctrl-C."""
    if bool(options.runs) == bool(options.mllm):
        raise UserError("expected finished probe runs, or a checkpoint by --mllm DIR, and not both")
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed; run: pip install 'llava-bidir[lab]'")
    from .models import load_runs, open_checkpoint
    from .session import Session
    from .worker import Worker

    with listen(options.host or "127.0.0.1", options.port) as listener:
        # In a thread that ends. If this one computed, OpenMP would keep threads for it beside those of the worker, and
        # with more threads than cores they no longer spin.
        with ThreadPoolExecutor(1) as pool:

            def load():
                if options.mllm:
                    return open_checkpoint(options.mllm, options.trust)
                return load_runs(options.runs, options.trust)

            session = Session(pool.submit(load).result())
        host, port = listener.getsockname()[:2]
        if host in ("0.0.0.0", "::"):  # all addresses of the machine
            host = socket.gethostname()
        token = secrets.token_urlsafe(24)
        server = build_server(
            session,
            worker=Worker(),
            token=token,
            hosts={"localhost", host.lower(), (options.host or host).lower()},
        )
        if ":" in host:  # an address of IPv6
            host = f"[{host}]"
        print(f"http://{host}:{port}/?token={token}", flush=True)
        # not raised where a script starts the lab in the background
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
        # At once: a forward may run, and the interpreter takes seconds to free its modules. No file is open.
        print("probes: the lab has ended", file=sys.stderr, flush=True)
        os._exit(130)


def build_server(
    session: "Session", worker: "Worker", token: str, hosts: set[str]
) -> "uvicorn.Server":
    """Return the server of a session, for requests with the token to these hosts."""
    import uvicorn

    from .server import build_app

    config = uvicorn.Config(
        build_app(session, worker=worker, token=token, hosts=hosts),
        http="h11",
        ws="none",
        lifespan="off",
        log_level="critical",  # the application prints its own errors
        server_header=False,
        timeout_graceful_shutdown=0,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at the address, before models are loaded.

    Raises:
        UserError: The address is in use or is none of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen at {host}, port {port} ({reason}); choose another --port or --host"
        ) from None
