"""Several processes that train one run together: all that one of them knows of the others.

A single process is a world of size 1, in which nothing here costs or changes anything. A rank makes
its share of a batch, and of its loss: what all make is the sum. Tensors of a GPU travel by NCCL,
others by gloo, as do the words that ranks agree by, which no device has to be waited for.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fastidmm.errors import Followed, Gone, as_told
from fastidmm.lock import alive
from fastidmm.pulse import EVERY, LOOKS, Pulse, machine, own_store, sign

T = TypeVar("T")
PATIENCE = timedelta(hours=1)  # with ranks that give signs and no answer: the first may evaluate
NOTICED = 10.0  # seconds in which the end of a process is seen by others
HEAD_START = 0.5  # seconds
BUCKET = 1 << 23  # numbers that travel together


@dataclass(frozen=True, slots=True)
class World:
    """Who trains together, seen from one of them."""

    rank: int = 0
    size: int = 1
    local: int = 0  # among the ranks of this machine
    store: Any = None  # what outlives a rank: words of who has ended
    people: tuple[tuple[str, int], ...] = ()  # machine and process of every rank

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, tells and evaluates."""
        return self.rank == 0

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank."""
        if self.size == 1:
            return mine
        word = torch.tensor([mine], dtype=torch.int32)
        with self.heard():
            dist.all_reduce(word, dist.ReduceOp.MAX)
        return bool(word)

    def meet(self) -> None:
        """Go on when all have come here."""
        self.any(False)

    def tell(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all of them; as JSON holds it."""
        if self.size == 1:
            return make()
        made = json.dumps(make()).encode() if self.first else b""
        length = torch.tensor([len(made)])
        with self.heard():
            dist.broadcast(length, 0)
            words = torch.empty(int(length), dtype=torch.uint8)
            if self.first:
                words = torch.frombuffer(bytearray(made), dtype=torch.uint8)
            dist.broadcast(words, 0)
        told: T = json.loads(bytes(words.tolist()))
        return told

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by the first rank's."""
        if self.size > 1:
            with self.heard():
                for tensor in tensors:
                    there = tensor.detach().contiguous()
                    dist.broadcast(there, 0)
                    tensor.detach().copy_(there)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors of one type by their sums over the ranks, which agree to the bit."""
        if self.size == 1:
            return
        under_way = []
        with self.heard():
            for some in _buckets(tensors):
                flat = torch.cat([tensor.flatten() for tensor in some])
                under_way.append((some, flat, dist.all_reduce(flat, async_op=True)))
            for some, flat, work in under_way:
                work.wait()
                parts = flat.split([tensor.numel() for tensor in some])
                for tensor, part in zip(some, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks; a gradient's, too."""
        return x if self.size == 1 else _Sum.apply(x, self)  # type: ignore[no-untyped-call]

    def gather(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all ranks, (sizes[rank], ...) each, one rank after the other.

        A row's gradient is the sum of what every rank has for it.
        """
        if self.size == 1:
            return x
        return _Gather.apply(x, tuple(sizes), self)  # type: ignore[no-any-return, no-untyped-call]

    def own(self, sizes: Sequence[int]) -> tuple[int, int]:
        """Where this rank's rows begin and end among those gathered."""
        first = sum(sizes[: self.rank])
        return first, first + sizes[self.rank]

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Have a rank that has ended named where a message fails; follow one that told why."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            until = time.monotonic() + NOTICED
            while time.monotonic() < until:
                if ended := self._ended():
                    raise Gone(" and ".join(self._fate(rank) for rank in ended)) from None
                if left := self._left():
                    raise Followed(left[0]) from None
                time.sleep(0.1)
            if any(host != machine() for host, _ in self.people):
                raise Gone("a rank of another machine ended, or its network did") from None
            raise problem

    def _ended(self) -> list[int]:
        """Ranks of this machine whose processes are gone, but for those that left by themselves."""
        here = machine()
        gone = [
            rank
            for rank, (host, process) in enumerate(self.people)
            if host == here and not alive(process)
        ]
        with suppress(RuntimeError):  # the store may be gone with the first rank
            return [rank for rank in gone if not self.store.check([f"left {rank}"])]
        return gone

    def _fate(self, rank: int) -> str:
        with suppress(RuntimeError):
            if self.store.check([f"silent {rank}"]):
                return f"rank {rank} gave no sign for {EVERY * LOOKS:.0f} s and was ended"
        return f"rank {rank} ended"

    def _left(self) -> list[int]:
        """With which statuses others left by themselves."""
        with suppress(RuntimeError):
            names = [f"left {rank}" for rank in range(self.size)]
            return [int(self.store.get(name)) for name in names if self.store.check([name])]
        return []

    def speaks(self, status: int) -> bool:
        """Whether this rank is the one that tells of an error: one sentence is enough."""
        if not self.first:
            time.sleep(HEAD_START)  # what every rank meets the first one says
        try:
            first = bool(self.store.add("leaving", 1) == 1)  # before anyone follows
            self.store.set(f"left {self.rank}", str(status))
            return first
        except RuntimeError:
            return True


class _Sum(torch.autograd.Function):
    """`World.sum`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return _summed(x, world)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _summed(gradients[0], ctx.world), None


class _Gather(torch.autograd.Function):
    """`World.gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], world: World) -> Tensor:
        ctx.world, ctx.sizes = world, sizes
        return gathered(x, sizes, world)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        first, last = ctx.world.own(ctx.sizes)
        return _summed(gradients[0], ctx.world)[first:last], None, None


def _summed(x: Tensor, world: World) -> Tensor:
    found = x.clone(memory_format=torch.contiguous_format)
    with world.heard():
        dist.all_reduce(found)
    return found


def gathered(x: Tensor, sizes: Sequence[int], world: World) -> Tensor:
    """The rows of all ranks; shares are made equally long for the way."""
    if world.size == 1:
        return x
    most = max(sizes)
    sent = x.new_zeros(most, *x.shape[1:])
    sent[: len(x)] = x
    found = [torch.empty_like(sent) for _ in sizes]
    with world.heard():
        dist.all_gather(found, sent)
    return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])


def collected(x: Tensor, sizes: Sequence[int], world: World) -> Tensor:
    """The rows of all ranks in the first one's host memory; on others what they have."""
    here = x.cpu().contiguous()
    with world.heard():
        if not world.first:
            dist.send(here, 0)
            return x
        parts = [here]
        for rank, size in enumerate(sizes[1:], 1):
            parts.append(here.new_empty(size, *here.shape[1:]))
            dist.recv(parts[-1], rank)
    return torch.cat(parts)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors by so many that they travel well."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        bucket.append(tensor)
        held += tensor.numel()
        if held >= BUCKET:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket


_here = World()


def world() -> World:
    """Who trains together now."""
    return _here


@contextmanager
def apart() -> Iterator[None]:
    """Be a world of one for a while: what one rank does by itself waits for no other."""
    global _here
    before, _here = _here, World()
    try:
        yield
    finally:
        _here = before


def asked() -> int:
    """How many ranks a launcher such as torchrun has started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def launched() -> str:
    """What tells this launch by torchrun from others, whenever it begins its ranks; "" without."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    # Where it was given no name it says so, and has one process on one machine that stays.
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name


def restarts() -> int:
    """How often torchrun has begun all ranks again, since one of them ended."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks that a launcher has started, where it has started several.

    All but the first are silent, but for errors, of which the first that is met is told.
    """
    global _here
    if asked() == 1:
        yield
        return
    store, rank, size = next(rendezvous("env://"))
    # torchrun's store may hold where ranks that are gone could be reached.
    part = f"attempt {restarts()}"
    store = dist.PrefixStore(part, store)  # type: ignore[attr-defined]
    both = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if both else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
    words = own_store(part)
    words.set(sign(rank), "")
    words.set(f"process {rank}", f"{machine()} {os.getpid()}")
    told = [words.get(f"process {each}").decode().rsplit(" ", 1) for each in range(size)]
    people = tuple((host, int(process)) for host, process in told)
    _here = World(rank, size, int(os.environ.get("LOCAL_RANK", rank)), words, people)
    pulse = Pulse(own_store(part), rank, people)
    pulse.start()
    try:
        with ExitStack() as silent:
            if rank:
                nowhere = silent.enter_context(open(os.devnull, "w"))
                silent.enter_context(redirect_stdout(nowhere))
                silent.enter_context(redirect_stderr(nowhere))
            yield
            _here.meet()  # who leaves early would be missed
    except Exception as problem:
        meant = as_told(problem)
        if meant is None or _here.speaks(meant.status):
            raise
        raise SystemExit(meant.status) from None
    finally:
        pulse.stop()
        _here = World()
    dist.destroy_process_group()
