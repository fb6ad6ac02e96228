"""Copies between main memory and a device, beside the work of a GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import Tensor

T = TypeVar("T")


def record_event(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for all work launched on the device so far; on a CPU it returns at once."""
    import torch

    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


class Streams(Protocol):
    """The streams of a device: queues of work that run beside each other; one of them is current in a thread."""

    def open(self) -> Any:
        """Return a new stream."""

    def current(self) -> Any:
        """Return the current stream, in which models compute."""

    def use(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Make a stream the current one in a block."""

    def record(self, stream: Any) -> Any:
        """Return an event that occurs when the work that the stream has now is done."""

    def delay(self, stream: Any, event: Any) -> None:
        """Let the work that is added to the stream from now on begin after the event."""

    def wait(self, event: Any) -> None:
        """Wait in this thread until the event has occurred."""

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Keep the memory of a tensor, once it is unused here, until the stream has done the work that it has then."""

    def pin(self, tensor: Tensor) -> Tensor:
        """Return a copy in page-locked memory; only copies from and to such memory run beside computation."""

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        """Start to copy a tensor to page-locked memory, in the current stream."""


class _GpuStreams:
    """The streams of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def open(self) -> Any:
        import torch

        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current(self) -> Any:
        import torch

        return torch.cuda.current_stream(self._device)

    def use(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        import torch

        return torch.cuda.stream(stream)

    def record(self, stream: Any) -> Any:
        return stream.record_event()

    def delay(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def wait(self, event: Any) -> None:
        event.synchronize()

    def keep(self, tensor: Tensor, stream: Any) -> None:
        import torch

        if tensor.device.type == self._device.type and tensor.layout is torch.strided:
            tensor.record_stream(stream)

    def pin(self, tensor: Tensor) -> Tensor:
        import torch

        # Not `pin_memory`: for page-locked memory it returns the tensor itself, which the task may overwrite.
        return torch.empty_like(tensor, pin_memory=True).copy_(tensor)

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        import torch

        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class Sent(Generic[T]):
    """A value whose copy to a device has begun; `DeviceCopies.receive` returns it.

    Attributes:
        value: on the device.
        tensors: the tensors of the value.
        event: when the copy is complete; None: it is.
    """

    value: T
    tensors: tuple[Tensor, ...] = ()
    event: Any = None


@dataclass(frozen=True)
class Fetched:
    """Tensors whose copy to main memory has begun.

    Attributes:
        host: the tensors in main memory, valid after `wait`.
        wait: blocks until the copy is complete, and with it all work that was launched before the copy.
    """

    host: tuple[Tensor, ...]
    wait: Callable[[], None]


class DeviceCopies:
    """Copies of batches to a device, and of results from it.

    With streams, copies run beside the computation: batches in one stream, results in another. No function waits for
    the device, except `Fetched.wait`. Without streams, everything runs at once.

    Args:
        streams: the streams of the device; None for a device without streams, such as a CPU.

    Attributes:
        n_ahead: how many batches to send before a batch is computed, and to compute before its results are fetched.
    """

    def __init__(self, streams: Streams | None) -> None:
        self._streams = streams
        self.n_ahead = 0 if streams is None else 1
        self._lanes = None if streams is None else (streams.open(), streams.open())

    def pin(self, tensor: Tensor) -> Tensor:
        """Return a copy of a dense CPU tensor in page-locked memory, if the device copies beside computation."""
        import torch

        is_dense = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_nested
        if self._streams is None or tensor.device.type != "cpu" or not is_dense:
            return tensor
        return self._streams.pin(tensor)

    def send(
        self, copy: Callable[[], T], find_tensors: Callable[[T], Iterable[Tensor]], *, after: bool = False
    ) -> Sent[T]:
        """Start a copy to the device.

        Args:
            copy: returns the value on the device; its sources are in page-locked memory, see `pin`.
            find_tensors: value -> its tensors.
            after: begin after the work that is launched now, because the source is on the device already.
        """
        if self._streams is None or self._lanes is None:
            return Sent(copy())
        lane = self._lanes[0]
        if after:
            self._streams.delay(lane, self._streams.record(self._streams.current()))
        with self._streams.use(lane):
            value = copy()
        return Sent(value, tuple(find_tensors(value)), self._streams.record(lane))

    def receive(self, sent: Sent[T]) -> T:
        """Return a value for work that is launched from now on, in the current stream; this work waits for the copy."""
        if self._streams is not None and sent.event is not None:
            current = self._streams.current()
            self._streams.delay(current, sent.event)
            for tensor in sent.tensors:
                self._streams.keep(tensor, current)
        return sent.value

    def fetch(self, tensors: Sequence[Tensor]) -> Fetched:
        """Start to copy results of the work that is launched now to main memory."""
        if self._streams is None or self._lanes is None:
            return Fetched(tuple(tensor.cpu() for tensor in tensors), lambda: None)
        lane = self._lanes[1]
        self._streams.delay(lane, self._streams.record(self._streams.current()))
        with self._streams.use(lane):
            host = tuple(self._streams.copy_to_host(tensor) for tensor in tensors)
        for tensor in tensors:
            self._streams.keep(tensor, lane)
        return Fetched(host, functools.partial(self._streams.wait, self._streams.record(lane)))


def make_copies(device: torch.device) -> DeviceCopies:
    """Return the copies to and from a device."""
    return DeviceCopies(_GpuStreams(device) if device.type == "cuda" else None)


def array_to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device; a GPU copies it without a wait for the work that is launched."""
    import torch

    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
