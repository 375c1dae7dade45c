"""Several processes that train as one: rank 0 decides, the others do the same in lockstep.

Rank 0's code reads as if it were alone. Its call of a `collective` method is announced to the other
ranks, which wait in `follow` and make the same call, so that the collectives of DeepSpeed inside
meet on all ranks:

    trainer = PpoTrainer(recipe)          # on every rank
    if trainer.ranks.rank > 0:
        follow(trainer)                   # until rank 0 calls trainer.close()

When things go wrong: an exception ends the process it is raised in, on whatever rank, and nobody
waits for ever for a process that is gone. Gloo sees its connections close and raises on the ranks
that were waiting; NCCL does not, but the launcher (torchrun, deepspeed) kills all processes as soon
as one ends with an error. A single process has none of this and pays nothing for it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from torch import distributed

#: How long a rank waits for the next command. No step takes a day; the usual half an hour is not
#: enough for the rollouts of one.
PATIENCE = timedelta(days=1)
#: seconds that a call waits for an earlier one: one that was given up may never end
TURN = 300.0


class Ranks:
    """This process among those that train together; torch.distributed must be initialised."""

    def __init__(self) -> None:
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        # Objects travel through gloo whatever the tensors use, and wait for as long as it takes.
        self._group = (
            distributed.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None
        )
        self._one_at_a_time = threading.Lock()
        self._in_step = True

    @contextmanager
    def command(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Have the other ranks call the method `name` while this one does what stands inside.

        Calls of several threads come one after another.

        Raises:
            RuntimeError: on another rank than 0: its calls are rank 0's to make. Or an earlier call
                does not end.
        """
        if self.rank:
            raise RuntimeError(f"{name}() is rank 0's to call; rank {self.rank} runs follow()")
        with self._turn(name):
            if not self._in_step:
                raise RuntimeError(
                    f"{name}(): the other ranks are stopped, or out of step since an earlier call "
                    "failed half-way; resume from a checkpoint in new processes"
                )
            self._broadcast((name, args, kwargs))
            try:
                yield
            except GeneratorExit:  # a reader that had enough; see PpoTrainer.weights
                raise
            except BaseException:
                self._in_step = self.size == 1
                raise

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        if not self._one_at_a_time.acquire(timeout=TURN):
            raise RuntimeError(f"{name}(): an earlier call has not ended in {TURN:.0f} s")
        try:
            yield
        finally:
            self._one_at_a_time.release()

    def stop(self) -> None:
        """Let the other ranks return from `follow`; nothing can be called after it.

        After a call that failed, or while one still runs in another thread, they would not hear it:
        then they end when this process does, by the lost connection or by the launcher.
        """
        if self.size > 1 and self._one_at_a_time.acquire(blocking=False):
            if self._in_step:
                self._in_step = False
                self._broadcast(None)
                distributed.destroy_process_group()
            self._one_at_a_time.release()

    def receive(self) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
        """Rank 0's next command; None, once, when there will be no more.

        Raises:
            RuntimeError: rank 0 is gone.
        """
        try:
            command = self._broadcast(None)
        except RuntimeError as error:
            raise RuntimeError("rank 0 is gone; its own output says why") from error
        if command is None:
            distributed.destroy_process_group()
        return command

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's object, by rank, on every rank."""
        if self._group is None:
            return [mine]
        everyones = [None] * self.size
        distributed.all_gather_object(everyones, mine, group=self._group)
        return everyones

    def _broadcast(self, item: Any) -> Any:
        if self._group is None:
            return item
        box = [item]
        distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


class Collective(Protocol):
    """What has methods that all ranks call together."""

    ranks: Ranks


T = TypeVar("T", bound=Collective)
P = ParamSpec("P")
R = TypeVar("R")


def collective(method: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
    """A method that all ranks must call together: called on rank 0, it is called on all.

    Its arguments are pickled. It must not call another such method.
    """

    @functools.wraps(method)
    def called_on_rank_0(self: T, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.ranks.command(method.__name__, *args, **kwargs):
            return method(self, *args, **kwargs)

    return called_on_rank_0


def follow(target: Collective) -> None:
    """What every rank but 0 does: make the calls that rank 0 makes, until it says stop.

    Raises:
        RuntimeError: rank 0 is gone.
    """
    while (command := target.ranks.receive()) is not None:
        name, args, kwargs = command
        method = getattr(type(target), name)
        # The outermost layer alone: what is below it, such as torch.no_grad, holds here too.
        getattr(method, "__wrapped__", method)(target, *args, **kwargs)
