"""Several processes at one recipe: who they are, how they wait for the first one, and what they tell each other.

Lightning starts the processes (or finds those of torchrun or SLURM) and trains with them. Between trainings all of them
walk the same stages: what only one may do (locks, bundles, the report) the first does, and the others wait for it.
They wait in a gloo group of their own: it notices within moments when a process has died, it has no limit of minutes as
training's own group has, and it needs no GPU.
"""

import logging
import socket
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from aum_compress.errors import AumError, RecipeError
from aum_compress.recipe_schema import TrainConfig

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=24)
"""For the first process: reading a data set, or a stage that it does alone."""
_LOST = ("onnection closed", "onnection reset", "roken pipe", "onnection refused", "imed out")


class FirstProcessFailed(Exception):
    """The first process has met an error, which it reports itself: the others end without a word."""


@dataclass(frozen=True)
class Ranks:
    """This process among those at work on a recipe; the first has rank 0. The default is one process alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T | None:
        """What `work` returns on the first process, once it is done; None on the others, which wait and do not do it.

        Raises:
            FirstProcessFailed: on the others, when `work` has raised.
            AumError: a process has died.
        """
        if not self.is_first:
            if not self.agree(False):
                raise FirstProcessFailed
            return None
        try:
            result = work()
        except BaseException:
            self._tell_of_failure()
            raise
        self.agree(True)
        return result

    def agree(self, choice: bool) -> bool:
        """The first process' choice, on all."""
        told = torch.tensor([choice], dtype=torch.uint8)
        self.from_first([told])
        return bool(told.item())

    def same(self, digest: str) -> bool:
        """Whether this process has the hex digest of the first one."""
        first = torch.from_numpy(np.frombuffer(bytes.fromhex(digest), dtype=np.uint8).copy())
        own = first.clone()
        self.from_first([first])
        return torch.equal(own, first)

    def from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites CPU tensors with those of the first process, in order; all have the same shapes."""
        if self.group is None:
            return
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            _talk(lambda whole=whole: dist.broadcast(whole, 0, group=self.group))
            tensor.detach().copy_(whole)

    def mean(self, value: float) -> float:
        """Of all processes' values, in float64."""
        if self.group is None:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        _talk(lambda: dist.all_reduce(total, group=self.group))
        return float(total.item()) / self.size

    def gather(self, rows: np.ndarray, places: Sequence[np.ndarray]) -> np.ndarray:
        """All processes' rows in one array, on all.

        Args:
            rows: (n_own,C) float32 of this process. places: for each rank, where its rows belong; together 0 ... n-1.
        """
        if self.group is None:
            return rows
        longest = max(map(len, places))
        padded = torch.zeros(longest, rows.shape[1])
        padded[: len(rows)] = torch.from_numpy(rows)
        received = [torch.empty_like(padded) for _ in places]
        _talk(lambda: dist.all_gather(received, padded, group=self.group))
        whole = np.empty((sum(map(len, places)), rows.shape[1]), dtype=np.float32)
        for place, part in zip(places, received, strict=True):
            whole[place] = part[: len(place)].numpy()
        return whole

    def _tell_of_failure(self) -> None:
        with suppress(AumError):  # the others are gone already; what counts is why the first one failed
            self.agree(False)


ALONE = Ranks()


def is_shared(config: TrainConfig) -> bool:
    """Whether the recipe gives this training to several processes."""
    return (config.devices, config.nodes) != (1, 1)


def join(configs: Sequence[TrainConfig]) -> Ranks:
    """Starts, or finds, as many processes as the trainings of a run want, and connects them.

    On one machine Lightning executes the command line anew for each further process; under torchrun and SLURM they are
    there already. Trainings with `devices: 1` are left to the first process.

    Raises:
        RecipeError: trainings that want different numbers of processes, or torchrun or SLURM started another number.
        AumError: devices or a strategy that this machine lacks.
    """
    shared = [config for config in configs if is_shared(config)]
    wanted = {(config.accelerator, config.devices, config.nodes) for config in shared}
    if len(wanted) > 1:
        found = "; ".join(f"accelerator {a}, devices {d}, nodes {n}" for a, d, n in sorted(wanted, key=str))
        raise RecipeError(
            f"train: the stages of a run share their processes, found {found}. Give all of them the same accelerator, "
            "devices and nodes, or devices: 1 to those that need no more than one process"
        )
    started = _started_from_outside()
    if not shared:
        if started > 1:
            raise RecipeError(
                f"train.devices: torchrun or SLURM has started {started} processes, and no training of this recipe "
                "wants more than one. Set devices (processes a machine) and nodes, or start one process"
            )
        return ALONE
    (accelerator, devices, nodes), strategies = wanted.pop(), sorted({config.strategy for config in shared})
    if spawning := [name for name in strategies if name.endswith(("_spawn", "_fork", "_notebook"))]:
        raise RecipeError(f"train.strategy: {spawning[0]} starts processes that cannot run a recipe; wanted ddp")
    for name in ("lightning.fabric", "lightning.pytorch"):  # their banner
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy="ddp")
        size = len(fabric.strategy.parallel_devices) * nodes
        if started > 1 and started != size:  # of SLURM Lightning believes whatever it says
            raise RecipeError(
                f"train: devices {devices} on {nodes} nodes are {size} processes; torchrun or SLURM has started "
                f"{started}. Make them equal"
            )
        if size == 1:  # `devices: auto` on a machine that has one
            return ALONE
        fabric.launch()
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise AumError(
            f"train (accelerator={accelerator}, devices={devices}, nodes={nodes}): not possible here: {error}"
        ) from None
    return Ranks(fabric.global_rank, size, dist.new_group(backend="gloo", timeout=LONGEST_WAIT))


def lost_process(error: RuntimeError) -> AumError | None:
    """What to say of an error that came from talking to a process that has ended; None for any other error."""
    if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in _LOST):
        return None
    reason = str(error).splitlines()[0].split(". ")[0]
    return AumError(
        f"{socket.gethostname()}: another process of this run has ended or does not answer; what it said itself, or "
        f"the system's log, tells why ({reason}). Run again: finished stages and epochs are kept"
    )


def _talk(exchange: Callable[[], object]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        if lost := lost_process(error):
            raise lost from None
        raise


def _started_from_outside() -> int:
    """How many processes torchrun or SLURM has started; 1 without them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is an srun which one process does not need
        for environment in (TorchElasticEnvironment, SLURMEnvironment):
            if environment.detect():
                return environment().world_size()
    return 1
