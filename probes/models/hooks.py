"""Read or change what modules receive and return: the one place that registers hooks.

The functions return torch's handle, a context at whose end the hook is removed. Hooks of a module run in the order in
which they were made.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Change = Callable[[Tensor], Tensor | None]  # None leaves the states as they are


class StopForward(Exception):
    """Raised in a hook to end the forward, by whoever catches it."""


def at_input(module: nn.Module, change: Change) -> RemovableHandle:
    """Call change(states) before a module runs, on its first argument."""

    def hook(_, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        states, *others = args or [kwargs["hidden_states"]]
        new = change(states)
        if new is None:
            return None
        if args:
            return (new, *others), kwargs
        return args, kwargs | {"hidden_states": new}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def at_output(module: nn.Module, change: Change) -> RemovableHandle:
    """Call change(states) after a module has run, on the first of what it returns."""

    def hook(_, args: tuple, output: Any) -> Any:
        if not isinstance(output, tuple | list):
            return change(output)
        new = change(output[0])
        if new is None:
            return None
        return (new, *output[1:])

    return module.register_forward_hook(hook)


def at_arguments(module: nn.Module, read: Callable[[tuple], None]) -> RemovableHandle:
    """Call read(arguments) before a module runs, on its positional arguments."""
    return module.register_forward_pre_hook(lambda _, args: read(args))


def with_arguments(module: nn.Module, change: Callable[[dict], dict]) -> RemovableHandle:
    """Replace arguments of a module, but its first one, by those of change(arguments by name)."""

    def hook(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = kwargs
        if len(args) > 1:
            names = list(signature(module.forward).parameters)
            given = dict(zip(names[1:], args[1:], strict=False)) | kwargs
        return args[:1], given | change(given)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@contextmanager
def around(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Call run(forward, *args, **kwargs) in place of a module's forward; its hooks run as before."""
    wrapped = vars(module).get("forward")  # accelerate's, which moves inputs to the module's device
    module.forward = partial(run, module.forward)
    try:
        yield
    finally:
        if wrapped is None:
            del module.forward
        else:
            module.forward = wrapped
