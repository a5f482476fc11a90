"""What a model is for the calling thread or asyncio task alone: the adapters and values that it sees there.

Nothing in the model says which thread sees what: a view is held by a context variable, and whatever depends
on the choice of adapters is read through it. A copy of the model made meanwhile is therefore as the model
stands, without a view.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import _CheckpointFrame

from lora_lightning.errors import UserError
from lora_lightning.kernels.together import Together
from lora_lightning.layers.viewed import hide, show


class Choice:
    """Of one model, shared by its layers: who sees it otherwise than it stands.

    Attributes:
        viewed: whether some thread or task may; compiled code has this as its condition.
        version: counts what changes the adapters or their values; a thread's own choice is then read anew.
        contexts: the names of the context managers that are open, by any thread or task.
        held: whether some thread or task has made a choice of its own.
        needs: what open views ask of the modules, see `viewed`.
        together: forms the merged weights of its layers.
        lock: held while the model's adapters or the classes of its modules change.
    """

    def __init__(self) -> None:
        self.viewed, self.held, self.version = False, False, 0
        self.contexts: list[str] = []
        self.needs: dict[nn.Module, list[Any]] = {}
        self.lock = threading.RLock()
        self.together = Together()
        self.stay()

    def __reduce__(self) -> tuple[Any, ...]:
        return Choice, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Choice:
        return Choice()

    def view(self) -> View | None:
        """How the calling thread or task sees the model; None is as it stands."""
        if not self.viewed:
            return None
        views = _seen()
        for view in views:
            if view.choice is self and (isinstance(view, Held) or view.entered):
                _see_again_so(views)
                return view.now() if isinstance(view, Held) else view
        return None

    def stay(self) -> None:
        """From now on the `set_adapter` of the calling thread, and task, is the model's own choice."""
        self._thread, self._task = weakref.ref(threading.current_thread()), _task()

    def at_home(self) -> bool:
        """Whether the caller's choice is the model's own: so it is in the thread and task in which the model
        was adapted or trained last, and when these are over in the main thread."""
        thread, here = self._thread(), _task()
        task = None if self._task is None else self._task()
        over = self._task is not None and (task is None or task.done())
        if over or thread is None or not thread.is_alive():
            if here is None and threading.current_thread() is threading.main_thread():
                self.stay()
                return True
            return False
        return thread is threading.current_thread() and (None if here is None else here()) is task


def _task() -> weakref.ref[asyncio.Task[Any]] | None:
    """The running asyncio task, if any. IPython runs its cells in tasks of its own, which are none here."""
    if hasattr(builtins, "__IPYTHON__"):
        return None
    with contextlib.suppress(RuntimeError):
        task = asyncio.current_task()
        return None if task is None else weakref.ref(task)
    return None


@dataclass(frozen=True, eq=False)
class Standing:
    """A value that the model holds itself now: the parameter, and its memory of now, which stays this
    adapter's when another one is selected."""

    parameter: Tensor
    memory: Tensor


class _FromMemory(torch.autograd.Function):
    """The memory as the parameter's value: the gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, memory: Tensor) -> Tensor:
        return memory.view_as(memory)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class Samples(Protocol):
    """The samples of a batch that belong to different adapters, as far as a view knows them."""

    def refuse_reading(self, path: str) -> None:
        """Refuse to read the weight of the module of this path outside of its own call."""


@dataclass(eq=False)
class View:
    """A model as a thread or task sees it.

    Attributes:
        choice: of the model.
        within: name of the context manager that made it, "" for a choice that holds on.
        active: the adapters whose updates are added.
        values: of tensors of the model's own, by name, where another adapter has or had others; None where
            there is to be none.
        samples: the adapters of the batch's samples where they differ; `active` is empty then.
        calls: by path the forward of every module that is called with samples of several adapters, whose
            weights cannot be read as one.
        modules: the model's, by path; none where the view is only seen within another one.
        entered: how often somebody is within it; one that was left elsewhere holds no more.
    """

    choice: Choice
    within: str
    active: tuple[str, ...] = ()
    values: Mapping[str, Tensor | Standing | None] = field(default_factory=dict)
    samples: Samples | None = None
    calls: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    entered: int = 0

    def refuse_reading(self, path: str) -> None:
        """Refuse to read what differs from sample to sample.

        Raises:
            UserError: the module of this path is called with samples of several adapters.
        """
        if self.samples is not None and path in self.calls:
            self.samples.refuse_reading(path)

    def value(self, name: str) -> Tensor | None:
        """The value of a name in `values`."""
        value = self.values[name]
        if not isinstance(value, Standing):
            return value
        if torch.is_grad_enabled() and value.parameter.requires_grad:
            return cast(Tensor, _FromMemory.apply(value.parameter, value.memory))
        return value.memory


class Held:
    """A choice that holds on in a thread or task, made anew when the model's adapters have changed."""

    def __init__(self, choice: Choice, make: Callable[[], View]) -> None:
        self.choice, self.make = choice, make
        self.version, self.view = choice.version, make()

    def now(self) -> View:
        if self.version != self.choice.version:
            self.version, self.view = self.choice.version, self.make()
        return self.view


_views: ContextVar[tuple[View | Held, ...]] = ContextVar("lora_lightning.views", default=())


def within(choice: Choice) -> str:
    """Name of the context manager of the model that the calling thread or task is within, or ""."""
    views = (v for v in _seen() if v.choice is choice and isinstance(v, View))
    return next((v.within for v in views if v.entered), "")


def holds(choice: Choice) -> bool:
    """Whether the calling thread or task has made a choice of its own that holds on."""
    return any(v.choice is choice and isinstance(v, Held) for v in _seen())


@contextmanager
def opened(view: View) -> Iterator[None]:
    """Within this context the calling thread or task sees the model by this view, which has its modules."""
    choice = view.choice
    with choice.lock:
        needs = show(view)
        choice.contexts.append(view.within)
        choice.viewed = True
    try:
        with seen(view):
            yield
    finally:
        with choice.lock:
            choice.contexts.remove(view.within)
            hide(needs, choice)
            choice.viewed = bool(choice.contexts or choice.held)


@contextmanager
def seen(view: View) -> Iterator[None]:
    """Within this context the calling thread or task sees the model so.

    Raises:
        UserError: it is left in another thread or task than it was entered in.
    """
    before = _views.set((view, *_views.get()))
    with view.choice.lock:
        view.entered += 1
    try:
        yield
    finally:
        with view.choice.lock:
            view.entered -= 1
        try:
            _views.reset(before)
        except ValueError:
            raise UserError(
                f"{view.within}(model) was left in another thread or task than it was entered in, and holds "
                "for that one alone: enter and leave it where the model is called."
            ) from None


def hold(view: Held | None, choice: Choice) -> None:
    """From now on the calling thread or task sees the model so; None is as it stands."""
    others = tuple(v for v in _views.get() if v.choice is not choice)
    _views.set(others if view is None else (view, *others))
    if view is not None:
        choice.held = choice.viewed = True


def _seen() -> tuple[View | Held, ...]:
    if torch.compiler.is_compiling():
        return _views.get()
    return _views.get() or _handed_on()


def _see_again_so(views: tuple[View | Held, ...]) -> None:
    """Let a part under non-reentrant checkpointing be computed again by these views, whenever and in
    whichever thread the backward comes; torch.utils.checkpoint keeps what it needs for that in a frame."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    for cell in (hooks and hooks[0].__closure__) or ():
        frame = cell.cell_contents
        if isinstance(frame, _CheckpointFrame) and not isinstance(frame.recompute_fn, _Again):
            frame.recompute_fn = _Again(views, frame.recompute_fn)


@dataclass(frozen=True)
class _Again:
    """A checkpointed part's function, called by the views of its forward."""

    views: tuple[View | Held, ...]
    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        with ExitStack() as stack:
            for view in reversed(self.views):
                view = view.now() if isinstance(view, Held) else view
                stack.enter_context(opened(view) if view.modules else seen(view))
            return self.function(*args)


def _handed_on() -> tuple[View | Held, ...]:
    """The views of who called `backward`, in a thread of autograd's own, where parts under reentrant
    checkpointing are computed again: torch hands the context over.

    Raises:
        UserError: before torch 2.14 it does not.
    """
    own_thread = isinstance(threading.current_thread(), threading._DummyThread)
    if torch._C._current_graph_task_id() == -1 or not own_thread:
        return ()
    if not torch._C._is_key_in_tls("context"):
        raise UserError(
            "checkpointing with use_reentrant=True computes a part again in a thread of autograd's, which "
            "before torch 2.14 does not know the adapters that were chosen for the calling thread: take "
            "use_reentrant=False, or torch 2.14."
        )
    context: Context = torch._C._get_obj_in_tls("context")
    return context.get(_views, ())
