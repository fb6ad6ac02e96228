"""A device without a GPU: streams that record their use, and whose copies to main memory are late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tracin_ann.device import DeviceCopies

COMPUTE, SENDING, FETCHING = 0, 1, 2


@dataclass
class RecordedStreams:
    """Streams with numbers: 0 is the one that computes.

    A copy to main memory is made when its event is waited for: until then, its result is NaN, or as invalid as its type
    permits. If its source is overwritten before, the result is wrong.

    Attributes:
        log: the calls, as (name, stream or event, ...).
        failures: by number of a wait, an error that it raises.
    """

    log: list[tuple[object, ...]] = field(default_factory=list)
    failures: dict[int, Exception] = field(default_factory=dict)
    n_streams: int = 1
    n_events: int = 0
    n_waits: int = 0
    used: int = COMPUTE
    kept: list[tuple[int, int]] = field(default_factory=list)
    late: list[Callable[[], object]] = field(default_factory=list)
    at_event: dict[int, int] = field(default_factory=dict)

    def open(self) -> int:
        self.n_streams += 1
        return self.n_streams - 1

    def current(self) -> int:
        return self.used

    @contextmanager
    def use(self, stream: int) -> Iterator[None]:
        self.log.append(("use", stream))
        before, self.used = self.used, stream
        try:
            yield
        finally:
            self.used = before

    def record(self, stream: int) -> int:
        self.n_events += 1
        self.log.append(("record", stream, self.n_events))
        self.at_event[self.n_events] = len(self.late)
        return self.n_events

    def delay(self, stream: int, event: int) -> None:
        self.log.append(("delay", stream, event))

    def wait(self, event: int) -> None:
        self.log.append(("wait", event))
        self.n_waits += 1
        if self.n_waits in self.failures:
            raise self.failures[self.n_waits]
        for place in range(self.at_event[event]):
            self.late[place]()
            self.late[place] = lambda: None

    def keep(self, tensor: Tensor, stream: int) -> None:
        self.kept.append((tensor.untyped_storage().data_ptr(), stream))

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        assert self.used == FETCHING
        # A flag that a row is not finite is wrong while the copy is late.
        late = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 0)
        self.late.append(lambda: late.copy_(tensor))
        return late


def use_streams(monkeypatch: pytest.MonkeyPatch) -> RecordedStreams:
    """Let models compute as if the CPU were a device with streams."""
    streams = RecordedStreams()

    def make(device: torch.device) -> DeviceCopies:
        streams.n_streams = 1
        return DeviceCopies(streams)

    monkeypatch.setattr("tracin_ann.features.loaded_model.make_copies", make)
    return streams
