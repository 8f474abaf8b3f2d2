"""A lab of tiny models, its server in a thread of the test's process, and its page in a browser."""

import http.client
import json
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from urllib.parse import parse_qsl

import probe_runs
import tiny_models
import torch
from PIL import Image
from torch import Tensor

import probes
from probes.lab.models import load_runs
from probes.lab.requests import View
from probes.lab.session import Session

TOKEN = "secret"
JOB = SimpleNamespace(  # without a client
    watched=lambda mllm: nullcontext(), report=lambda event: None, check=lambda: None
)


def fit_runs(checkpoints, folder) -> list[str]:
    """Train a causal and a bidirectional run on images of 24 x 20 pixels."""
    root = tiny_models.write_segmentation(folder / "data", 4, 5, seed=5)
    runs = [str(folder / mask) for mask in ("causal", "bidirectional")]
    for mask, run in zip(("causal", "bidirectional"), runs, strict=True):
        probe_runs.fit(checkpoints[mask], root, run, "--data.batch_size", "2")
    return runs


def open_session(runs: list[str]) -> Session:
    return Session(load_runs(runs))


def read_directly(session: Session, view: View, image: Image.Image | None = None) -> Tensor:
    """Return the probabilities f[S, T, K] of a view by the Python API, of a photo of the split or of another image."""
    model = session.models[view.model]
    mllm = model.mllm
    change = view.intervention

    def pixels_of(photo: str) -> Tensor:
        return mllm.preprocess(model.run.dataset()[int(photo.removeprefix("split:"))]["image"])

    pixels = pixels_of(view.photo) if image is None else mllm.preprocess(image)
    options = {}
    if change is not None:
        patches = torch.zeros(1, mllm.image_tokens, dtype=torch.bool)
        patches[0, list(change.patches)] = True
        if change.kind == "block":
            options["knockout"] = probes.Knockout(patches, change.layers)
        else:
            other = pixels
            mask = mllm.image_attention
            if change.by.startswith("split:"):
                other = pixels_of(change.by)
            elif change.by == "other_mask":
                mask = model.other_mask
            new = mllm.with_attention(mask).states(other, [change.site])[change.site]
            if change.by == "mean":
                new = new.mean(1, keepdim=True)
            place = patches[..., None]
            options["hooks"] = {change.site: lambda states: torch.where(place, new, states)}
    states = mllm.states(pixels, model.sites, **options)
    logits = [probe(states[site].float())[0] for site, probe in model.run.probes().items()]
    return torch.stack(logits).softmax(-1)


@contextmanager
def serve(session: Session):
    """Yield the port of a server of the session, with the settings of `probes lab`."""
    from probes.lab.command import build_server, listen
    from probes.lab.worker import Worker

    with listen("127.0.0.1", 0) as listener:
        server = build_server(session, worker=Worker(), token=TOKEN, hosts={"localhost"})
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(20)


def send(
    port: int, method: str, path: str, body: bytes | str | None = None, **headers
) -> tuple[int, bytes]:
    """Send a request with the token's cookie; return status and body. Headers replace the usual ones."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Cookie": f"lab-{port}={TOKEN}", "Host": f"127.0.0.1:{port}"} | headers
    sent = {name: value for name, value in headers.items() if value is not None}
    connection.request(method, path, body, sent)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


def run(port: int, operation: str, request: dict) -> dict:
    """Run an operation and return its last event."""
    status, body = send(port, method="POST", path=f"/run/{operation}", body=json.dumps(request))
    assert status == 200, body
    return json.loads(body.splitlines()[-1])


@contextmanager
def browser_tabs(chromium, address: str, allowed: tuple[str, ...]):
    """Yield a function that opens a page at a fragment of its address.

    A request to another address than those that begin with `allowed`, or an error in the page, fails the test.
    """
    contexts = []
    errors = []

    def keep_message(message) -> None:
        if message.type == "error":
            errors.append(message.text)

    def keep_request(request) -> None:
        if not request.url.startswith(allowed):
            errors.append(request.url)

    def open_tab(fragment: str = ""):
        contexts.append(chromium.new_context(viewport={"width": 1280, "height": 720}))
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", keep_message)
        tab.on("request", keep_request)
        tab.goto(address + fragment)
        tab.wait_for_selector("html[data-ready]")
        return settle(tab)

    yield open_tab
    for context in contexts:
        context.close()
    assert not errors


def settle(tab):
    """Wait until the page shows the requested view."""
    tab.wait_for_selector("main[aria-busy=false]")
    return tab


def address(tab) -> dict[str, str]:
    return dict(parse_qsl(tab.evaluate("location.hash.slice(1)")))


def point(tab, patch: int, panel: int = 0) -> tuple[float, float]:
    """Return the screen position of the centre of a patch of the 2 x 2 grid."""
    canvas = tab.locator("#panels canvas").nth(panel)
    canvas.scroll_into_view_if_needed()
    x, y, width, height = (canvas.bounding_box()[key] for key in ("x", "y", "width", "height"))
    row, column = divmod(patch, 2)
    return x + width * (0.25 + column / 2), y + height * (0.25 + row / 2)
