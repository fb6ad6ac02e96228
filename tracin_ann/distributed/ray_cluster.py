"""Launcher of actors on a Ray cluster. No other module imports Ray.

Actors take units by number and yield small results: the data of a unit go to the file system that all nodes share, and
not through Ray's object store.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar, TypeVar

from tracin_ann.device import resolve_device
from tracin_ann.distributed.launcher import Launcher, OpenWorker, describe_unpicklable
from tracin_ann.distributed.service import (
    MakeService,
    ServiceHost,
    ServiceWorker,
    WorkerDied,
    pack_request,
    unpack_result,
)
from tracin_ann.distributed.units import UnitQueue
from tracin_ann.errors import MissingPackageError, UsageError, first_line, problem
from tracin_ann.packages import make_missing_package_error

U = TypeVar("U")
R = TypeVar("R")
LOCAL = "local"
"""The address that starts a cluster of this machine."""
_LOOPBACK = "127.0.0.1"
_ON_THIS_MACHINE_ONLY = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
_STORE_BYTES = 100 << 20
"""Object store of a cluster that this process starts: /dev/shm is small in many containers, and units do not use it."""
_PATIENCE_S = 60.0
"""Seconds without any result after which a warning is logged if no worker has started."""
_CONNECT_S = 10.0
"""Seconds until the address of a cluster has to answer."""
_CONNECTING = threading.Lock()
"""Held while a thread connects to a cluster."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayLauncher(Launcher):
    """Runs units, or the workers of an open index, on actors of a Ray cluster, each with its own processors.

    An actor of a node that dies is started again where there is place, and its units run on the next idle actor. Units
    need the same files under the same paths on every node: the task's file and data, its checkpoints, and the index.

    Attributes:
        address: of the cluster: `auto` (the environment variable RAY_ADDRESS, or a cluster on this machine),
            `HOST:PORT`, or `local`, which starts a cluster of this machine that listens on the loopback interface only.
            A connection that this process has is used in any case.
        workers: the number of actors; None: as many as have place.
        num_cpus_per_worker: CPUs of an actor, and its number of threads.
        num_gpus_per_worker: GPUs of an actor; at 0 it computes on the CPU.
        runtime_env: Ray's runtime environment of the actors, such as {"env_vars": {...}}.
    """

    address: str = "auto"
    workers: int | None = None
    num_cpus_per_worker: int = 1
    num_gpus_per_worker: float = 0
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    is_local: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the numbers, and that Ray is installed, without its import.

        Raises:
            UsageError: an actor would have no CPU, or a number is negative.
            MissingPackageError: Ray is not installed.
        """
        for name, value, least in (
            ("workers", 1 if self.workers is None else self.workers, 1),
            ("num_cpus_per_worker", self.num_cpus_per_worker, 1),
            ("num_gpus_per_worker", self.num_gpus_per_worker, 0),
        ):
            if value < least:
                raise UsageError(problem(f"bad {name}", got=value, expected=f"{least} or more", remedy="change it"))
        if find_spec("ray") is None:
            raise _make_missing_ray_error()

    def run(self, open_worker: OpenWorker[U, R], units: Sequence[U]) -> Iterator[R]:
        """Yield the results of the actors; see `Launcher`.

        Raises:
            MissingPackageError: Ray is not installed.
        """
        with self._connect() as ray:
            n_workers = min(self._count_workers(ray), len(units))
            logger.info("%d workers on Ray, each with %d CPUs", n_workers, self.num_cpus_per_worker)
            opening = _pickle(ray, open_worker), self.num_gpus_per_worker > 0
            pool = _Pool(ray, self._describe_actors(ray, _Actor), opening)
            yield from pool.run(UnitQueue(units, n_workers), n_workers)

    @contextmanager
    def _connect(self) -> Iterator[Any]:
        """Yield Ray's module, connected to the cluster in the block, unless this process is connected anyway.

        Raises:
            UsageError: there is no cluster at the address.
        """
        with self._limit_interfaces():
            ray = import_ray()
        if ray.is_initialized():
            yield ray
            return
        self._initialize(ray)
        try:
            yield ray
        finally:
            ray.shutdown()

    def _limit_interfaces(self) -> AbstractContextManager[None]:
        return _stay_on_loopback() if self.address == LOCAL else nullcontext()

    def _initialize(self, ray: Any) -> None:
        """Connect to the cluster.

        Raises:
            UsageError: there is no cluster at the address, or a local one can be reached from other machines.
        """
        options: dict[str, Any] = {"log_to_driver": logger.isEnabledFor(logging.INFO)}
        if self.address == LOCAL:
            options |= {"_node_ip_address": _LOOPBACK, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        try:
            _check_connection(self.address)
            with self._limit_interfaces():
                ray.init(self.address, **options)
        except ConnectionError as error:
            raise UsageError(
                problem(
                    f"no Ray cluster at {self.address}",
                    got=first_line(error),
                    expected="a running cluster",
                    remedy="start one with `ray start --head`, or use the address local",
                )
            ) from error
        if self.address == LOCAL:
            _require_loopback(ray)

    def count_services(self) -> int:
        """Return the number of actors.

        A connection to the cluster that this makes remains until the process ends.

        Raises:
            MissingPackageError: Ray is not installed.
            UsageError: there is no cluster at the address, or it has no place for an actor.
        """
        return self._count_workers(self._stay_connected())

    def start_service(self, make_service: MakeService, number: int) -> ServiceWorker:
        """Start an actor that holds a service, and return it without waiting for the service.

        A connection to the cluster that this makes remains until the process ends.

        Raises:
            MissingPackageError: Ray is not installed.
            UsageError: there is no cluster at the address.
        """
        ray = self._stay_connected()
        return _ServiceActor(ray, self._describe_actors(ray, ServiceHost).remote(partial(make_service, None)))

    def _stay_connected(self) -> Any:
        """Return Ray's module, connected to the cluster until the process ends."""
        with self._limit_interfaces():
            ray = import_ray()
        with _CONNECTING:
            if not ray.is_initialized():
                self._initialize(ray)
        return ray

    def _count_workers(self, ray: Any) -> int:
        """Return the number of actors.

        Raises:
            UsageError: the cluster has no place for one.
        """
        if self.workers is not None:
            return self.workers
        total = ray.cluster_resources()
        n_workers = int(total.get("CPU", 0) // self.num_cpus_per_worker)
        if self.num_gpus_per_worker:
            n_workers = min(n_workers, int(total.get("GPU", 0) // self.num_gpus_per_worker))
        if n_workers:
            return n_workers
        raise UsageError(
            problem(
                "the Ray cluster has no place for a worker",
                got=f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs",
                expected=f"{self.num_cpus_per_worker} CPUs and {self.num_gpus_per_worker:g} GPUs for each worker",
                remedy="add nodes, or ask for less",
            )
        )

    def _describe_actors(self, ray: Any, kind: type) -> Any:
        """Return Ray's class of actors of a kind."""
        environment = dict(self.runtime_env)
        # Ray sets it only where the environment of the node does not.
        threads = {"OMP_NUM_THREADS": str(self.num_cpus_per_worker)}
        environment["env_vars"] = {**threads, **environment.get("env_vars", {})}
        resources = {"num_cpus": self.num_cpus_per_worker, "num_gpus": self.num_gpus_per_worker}
        return ray.remote(**resources, max_restarts=0, runtime_env=environment)(kind)


def _check_connection(address: str) -> None:
    """Check that something listens at an address HOST:PORT, for which Ray itself waits for minutes.

    Raises:
        ConnectionError: nothing does.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error)) from error


@contextmanager
def _stay_on_loopback() -> Iterator[None]:
    """Let Ray, imported in the block, use the loopback interface only, and the cluster that is started in the block.

    Whoever reaches the ports of a cluster without access control runs code on it. On Linux, Ray replaces a loopback
    address by that of another interface, except with this setting.
    """
    before = os.environ.get(_ON_THIS_MACHINE_ONLY[0])
    os.environ.update([_ON_THIS_MACHINE_ONLY])
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ON_THIS_MACHINE_ONLY[0]]
        else:
            os.environ[_ON_THIS_MACHINE_ONLY[0]] = before


def _require_loopback(ray: Any) -> None:
    """Check that the cluster cannot be reached from other machines.

    Raises:
        UsageError: it can.
    """
    addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
    if addresses != {_LOOPBACK}:
        ray.shutdown()
        raise UsageError(
            problem(
                "the local Ray cluster can be reached from other machines",
                got=", ".join(sorted(addresses)),
                expected=_LOOPBACK,
                remedy="start it before Ray is imported, or connect this process with ray.init",
            )
        )


class _Actor:
    """A worker in a process that Ray starts."""

    def __init__(self) -> None:
        self._opened: Any = None
        self._worker: Any = None

    def open(self, pickled: bytes, needs_gpu: bool) -> None:
        """Open the worker.

        Raises:
            UsageError: it needs a GPU, and torch finds none.
        """
        if needs_gpu and resolve_device().type == "cpu":
            raise UsageError(
                problem(
                    f"torch finds no GPU on node {os.uname().nodename}",
                    got="a CPU",
                    expected="the GPU that Ray has assigned",
                    remedy="install a torch with GPU support there, or use --num-gpus-per-worker 0",
                )
            )
        # Ray passes arrays as read-only memory, bytes as they are: what is unpickled here can be written to.
        self._opened = import_ray().cloudpickle.loads(pickled)(None)
        self._worker = self._opened.__enter__()

    def compute(self, units: list[Any]) -> Iterator[Any]:
        """Compute units and yield the worker's results."""
        yield from self._worker(units)


@dataclass(frozen=True)
class _ServiceActor(ServiceWorker):
    """An actor that holds a service.

    Attributes:
        ray: the module.
        actor: Ray's handle.
    """

    ray: Any
    actor: Any

    def open(self) -> None:
        """Wait until the service is open, see `ServiceWorker`; a warning says that the cluster has no place for it."""
        opened = self.actor.open.remote()
        while not self.ray.wait([opened], timeout=_PATIENCE_S)[0]:
            free = self.ray.available_resources()
            logger.warning("a worker has not started yet: Ray has %g CPUs free", free.get("CPU", 0))
        self._get(opened)

    @property
    def pid(self) -> int | None:
        """Return None: the actor may run on another machine."""
        return None

    def run(self, request: Any) -> Any:
        """Return the service's reply, see `ServiceWorker`."""
        return self._get(self.actor.run.remote(pack_request(request)))

    def stop(self) -> None:
        """Kill the actor; without a connection to the cluster, which ends its actors, do nothing."""
        # Ray would start a cluster to kill the actor, and at the end of Python it is not connected any more.
        if self.ray.is_initialized():
            with suppress(self.ray.exceptions.RayError):
                self.ray.kill(self.actor)

    def _get(self, call: Any) -> Any:
        try:
            content = self.ray.get(call)
        except self.ray.exceptions.RayError as error:
            # The actor has died, alone or with its node, or it cannot be reached any more.
            raise WorkerDied(first_line(error)) from error
        return unpack_result(content)


@dataclass
class _Member:
    """An actor of a pool.

    Attributes:
        actor: Ray's handle.
        units: what it computes; empty while it opens its worker, and when nothing is left for it.
    """

    actor: Any
    units: list[Any] = field(default_factory=list)


class _Pool:
    """Actors that take units from a queue, one run of units each at a time.

    Args:
        ray: the module.
        actor_class: Ray's class of the actors.
        opening: the arguments of `_Actor.open`.
    """

    def __init__(self, ray: Any, actor_class: Any, opening: tuple[Any, bool]) -> None:
        self._ray, self._actor_class, self._opening = ray, actor_class, opening
        # By what Ray returns for its call: for `open` a reference, for `compute` a stream of references.
        self._busy: dict[Any, _Member] = {}
        self._idle: list[_Member] = []

    def run(self, queue: UnitQueue[Any], n_actors: int) -> Iterator[Any]:
        """Yield the results of the actors until all units are done.

        Raises:
            TaskError: actors died again and again.
            Exception: the first error that an actor raised.
        """
        try:
            for _ in range(n_actors):
                self._start()
            while queue or any(member.units for member in self._busy.values()):
                call = self._wait()
                member = self._busy[call]
                try:
                    if member.units:
                        yield self._ray.get(next(call))
                        continue
                    self._ray.get(call)
                except StopIteration:
                    logger.debug("a worker has finished %d units", len(member.units))
                except self._ray.exceptions.RayTaskError as error:
                    # Ray cannot send every exception.
                    raise error.cause or error from error
                except self._ray.exceptions.RayError as error:
                    # The actor has died, alone or with its node, or it cannot be reached any more.
                    logger.warning("a worker on Ray was lost: %s", first_line(error))
                    queue.put_back(member.units, first_line(error))
                    self._kill(member)
                    self._start()
                    del self._busy[call]
                    self._give_units(queue)
                    continue
                del self._busy[call]
                self._idle.append(member)
                self._give_units(queue)
        finally:
            for member in (*self._busy.values(), *self._idle):
                self._kill(member)

    def _wait(self) -> Any:
        """Return a call that has a result, has ended or has failed."""
        while True:
            ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=_PATIENCE_S)
            if ready:
                return ready[0]
            if not self._idle and not any(member.units for member in self._busy.values()):
                free = self._ray.available_resources()
                logger.warning("no worker has started yet: Ray has %g CPUs free", free.get("CPU", 0))

    def _start(self) -> None:
        member = _Member(self._actor_class.remote())
        self._busy[member.actor.open.remote(*self._opening)] = member

    def _give_units(self, queue: UnitQueue[Any]) -> None:
        while queue and self._idle:
            member = self._idle.pop()
            member.units = queue.take()
            self._busy[member.actor.compute.options(num_returns="streaming").remote(member.units)] = member

    def _kill(self, member: _Member) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(member.actor)


def _pickle(ray: Any, open_worker: Any) -> Any:
    """Return a reference to the pickled function; Ray's pickler also takes functions without a name.

    Raises:
        UsageError: it cannot be pickled.
    """
    try:
        return ray.put(ray.cloudpickle.dumps(open_worker))
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(describe_unpicklable(error)) from error


def import_ray() -> Any:
    """Return the module `ray`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import ray  # noqa: PLC0415
    except ImportError as error:
        raise _make_missing_ray_error() from error
    return ray


def _make_missing_ray_error() -> MissingPackageError:
    return make_missing_package_error("Ray", "ray", "workers on a Ray cluster", "ray")
