"""One thread that runs the model, with a bounded queue, progress and cancelling."""

import asyncio
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import TypedDict

from llava_bidir.common.errors import UserError
from probes.models.frozen_model import FrozenModel
from probes.models.hooks import at_arguments

MAX_WAITING = 32  # eight tabs with four panels each; more wait longer than a person does
PROGRESS_S = 0.1  # between two reports of progress: faster ones cannot be read


class Cancelled(Exception):
    """Raised in a job whose client has left."""


class Event(TypedDict, total=False):
    """What the client is told of its request; the last event has "result" or "error"."""

    waiting: int  # requests before it
    layer: int
    layers: int
    text: str  # an answer while it grows
    blocked: bool  # it is the one under the intervention
    result: Mapping[str, object]  # of an operation of the session
    error: str


class Job:
    """A request on its way through the worker."""

    def __init__(self, work: Callable[["Job"], Mapping[str, object]]):
        self.work = work
        self.cancelled = threading.Event()
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._reported = time.monotonic()

    def report(self, event: Event) -> None:
        """Send an event to the client, from any thread."""
        with suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def check(self) -> None:
        """Raise `Cancelled` if the client has left."""
        if self.cancelled.is_set():
            raise Cancelled

    @contextmanager
    def watched(self, mllm: FrozenModel) -> Iterator[None]:
        """Report each layer that the model runs while the context is open, and stop there if cancelled."""
        layers = mllm.layers

        def step(number: int) -> None:
            self.check()
            if time.monotonic() - self._reported > PROGRESS_S:
                self._reported = time.monotonic()
                self.report({"layer": number, "layers": len(layers)})

        with ExitStack() as stack:
            for number, layer in enumerate(layers, 1):
                stack.enter_context(at_arguments(layer, lambda _, number=number: step(number)))
            yield


class Worker:
    """The thread that runs jobs one by one, so that a model runs one forward at a time."""

    def __init__(self):
        self._queue: queue.Queue[Job] = queue.Queue(MAX_WAITING)
        self._current: Job | None = None
        # A daemon, so that Ctrl-C does not wait for a forward.
        threading.Thread(target=self._run, name="lab-model", daemon=True).start()

    def submit(self, work: Callable[[Job], Mapping[str, object]]) -> Job | None:
        """Queue a job; return None if too many wait."""
        with self._queue.mutex:  # jobs whose clients have left wait for nothing
            waiting = [job for job in self._queue.queue if not job.cancelled.is_set()]
            self._queue.queue.clear()
            self._queue.queue.extend(waiting)
        job = Job(work)
        job.report({"waiting": self._queue.qsize() + (self._current is not None)})
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            return None
        return job

    def _run(self) -> None:
        while True:
            job = self._current = self._queue.get()
            try:
                job.check()
                job.report({"result": job.work(job)})
            except Cancelled:
                job.report({"error": "cancelled"})
            except UserError as error:
                job.report({"error": str(error)})
            except Exception as error:  # a bug or a lack of memory ends one request, not the server
                traceback.print_exc(file=sys.stderr)
                job.report(
                    {"error": f"{type(error).__name__}; the terminal of `probes lab` has details"}
                )
            self._current = None
