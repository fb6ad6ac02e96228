"""The model of a task with one checkpoint after another loaded, and its gradient engines.

A model may be kept between uses: its weights are then stored when they are loaded for the second time.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracin_ann.choices import Precision, SideName
from tracin_ann.device import Sent, make_copies
from tracin_ann.errors import GradientProofError, NonFiniteError, TaskError, problem
from tracin_ann.features.preconditioner import ScalesCache, compute_scales
from tracin_ann.features.rates import ParameterRates, compute_rates
from tracin_ann.features.task_data import TaskData
from tracin_ann.gradients import (
    Batch,
    GradientEngine,
    GradientScales,
    describe_no_gradient,
    detach_graph,
    probe_description,
    probe_examples,
    probe_gradients,
    probe_losses,
    replace_nonfinite,
)
from tracin_ann.task import (
    CheckpointLoader,
    CollatedBatch,
    FileIdentity,
    OriginalModel,
    PartialLoad,
    SecondMoment,
    WeightCache,
    digest_second_moments,
    identify_checkpoint,
    leaves,
    list_memory,
    map_leaves,
    pin_memory,
    preserve_globals,
    preserve_model,
    read_second_moments,
    tensors_within,
    to_device,
)

logger = logging.getLogger(__name__)
_PROBED = 32
"""Largest number of rows of a side whose losses the probes compute."""
_MOST_BATCHES_WITHOUT_GRADIENT = 16
"""Batches of rows, spread over the data, that are tried before an error says that no loss reaches a parameter."""
_PROBE_TOLERANCE = 1e-5
"""Largest difference of losses by stored weights and by loaded ones, relative to the largest of them."""


class LoadedModel:
    """The model of a task with one checkpoint loaded; makes batches and gradient engines.

    It is used in blocks of `use`. Between them the user's model is in its original state.

    Args:
        runner: the data of the task, and the options of the run.
        loader: loads the checkpoints of the task.
        model: the user's model.
        memory_bytes: memory for weights that are stored when they are first loaded, and attached afterwards; a
            preconditioner keeps its weights in as much memory again.

    Attributes:
        checkpoint: the position of the loaded checkpoint; -1 if none is loaded.
        parameters: the parameters that the task selects, by name.
        rates: the learning rates of these parameters at each checkpoint.
        channels_last: the memory format of images and convolution weights.
        precision: precision of forward and backward.
        copies: copies of batches to the device, and of results from it.
        shares_engines: one engine serves both sides if they have the same loss. It is verified with rows of the side
            that comes first, so the features of the other side have to be compared with known ones.
    """

    def __init__(self, runner: TaskData, loader: CheckpointLoader, model: nn.Module, memory_bytes: int = 0) -> None:
        self.runner, self.module, self._loader = runner, model, loader
        self.checkpoint, self.precision = -1, runner.options.precision
        self.channels_last = runner.options.channels_last
        self.copies = make_copies(runner.options.device)
        self.shares_engines = False
        self._trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self._unloaded = self.parameters = runner.task.select_parameters(model)
        self.rates: tuple[ParameterRates, ...] = compute_rates(runner.task, self.parameters)
        self._engines: dict[tuple[int, SideName, bool, Precision], GradientEngine] = {}
        self._original: OriginalModel | None = None
        self._written = PartialLoad.list_written(runner.task, model)
        self._cache = WeightCache(model, memory_bytes, self._written) if memory_bytes else None
        self._loads: dict[int, _Load] = {}
        self._last_read = -1
        self._scales = ScalesCache(memory_bytes)
        self._loaded_scales: GradientScales | None = None
        self._parts, self._memory = _list_parts(model), list_memory(model, self._written)

    @property
    def has_new_parts(self) -> bool:
        """Return whether the user has replaced, added or removed modules or parameters since the last use.

        Other memory for a tensor that no checkpoint sets counts as replaced.
        """
        return self._original is None and not (
            _are_same_objects(self._parts, _list_parts(self.module))
            and self._memory == list_memory(self.module, self._written)
        )

    @contextlib.contextmanager
    def use(self, precision: Precision) -> Iterator[None]:
        """Borrow the user's model in the block.

        A block inside another one changes the precision, and loads the checkpoint of the outer block again at its end.
        """
        outer, self.precision = self.precision, precision
        try:
            with self._borrow() if self._original is None else self._preserve_checkpoint():
                yield
        finally:
            self.precision = outer

    @contextlib.contextmanager
    def _preserve_checkpoint(self) -> Iterator[None]:
        checkpoint = self.checkpoint
        try:
            yield
        finally:
            if checkpoint not in (-1, self.checkpoint):
                self.load(checkpoint)

    @contextlib.contextmanager
    def _borrow(self) -> Iterator[None]:
        try:
            with preserve_model(self.module, self._written) as self._original:
                if self._cache is None:
                    self._original.prepare_overwrite(self.runner.options.device)
                    self.set_memory_format(channels_last=self.channels_last)
                else:
                    self._cache.start_use()
                yield
        finally:
            self._original, self.checkpoint, self.parameters = None, -1, self._unloaded
            if self._cache is not None:
                self._cache.detach()
            self._release_parameters()
            # A loader or a forward pass may add modules.
            self._parts, self._memory = _list_parts(self.module), list_memory(self.module, self._written)

    def _release_parameters(self) -> None:
        """Drop the engines of parameter objects that a loader created and that are not stored."""
        stored = [load.parameters for load in self._loads.values()]
        known = {id(parameter) for each in (self._unloaded, *stored) for parameter in each.values()}
        self._engines = {
            key: engine
            for key, engine in self._engines.items()
            if known.issuperset(map(id, engine.parameters.values()))
        }

    @property
    def has_checkpoint(self) -> bool:
        """Return whether a checkpoint is loaded."""
        return self.checkpoint >= 0

    @property
    def rate(self) -> float:
        """Return η_c of the loaded checkpoint: the largest learning rate of the selected parameters."""
        return self.rates[self.checkpoint].rate

    def load(self, checkpoint: int) -> None:
        """Load a checkpoint into the model. Its gradient engines are reused when it is loaded again.

        In a model that is kept, the weights are stored when they are loaded for the second time, and not read from
        their file any more while the file does not change.

        Raises:
            CheckpointError: the file is missing, unreadable or does not match the model.
            TaskError: loading changed the names, shapes or dtypes of the selected parameters.
        """
        # The weights of a preconditioner take as much memory as the model: release those of the last checkpoint.
        self._loaded_scales = None
        if self._cache is None:
            self._load_file(checkpoint)
        elif not self._attach_stored(checkpoint):
            self._load_and_store(checkpoint)

    def reload(self, checkpoint: int) -> None:
        """Load a checkpoint from its file, whether its weights are stored or not, with new gradient engines.

        Raises:
            CheckpointError: the file is missing, unreadable or does not match the model.
            TaskError: loading changed the names, shapes or dtypes of the selected parameters.
        """
        self._loads.pop(checkpoint, None)
        self._engines = {key: engine for key, engine in self._engines.items() if key[0] != checkpoint}
        self.load(checkpoint)

    def _attach_stored(self, checkpoint: int) -> bool:
        """Attach the stored weights of a checkpoint; return False if they are not stored, or not valid."""
        cache, last = self._cache, self._loads.get(checkpoint)
        # Without parameters, the computation of the losses was interrupted.
        if cache is None or last is None or not last.parameters or checkpoint not in cache:
            return False
        if identify_checkpoint(self.runner.task.checkpoints[checkpoint]) != last.identity or not last.identity:
            return False
        self.checkpoint = -1
        cache.attach(checkpoint)
        self.parameters = last.parameters
        self._forbid_gradients()
        self.checkpoint = checkpoint
        if self._is_confirmed(checkpoint):
            return True
        last.is_excluded = not _are_close(self._compute_probe_losses(), last.losses_B)
        if last.is_excluded:
            logger.info("checkpoint %d is read again for every query: stored weights give other losses", checkpoint)
        elif self._last_read not in (-1, checkpoint):
            last.confirmed.add(self._last_read)
        return not last.is_excluded

    def _is_confirmed(self, checkpoint: int) -> bool:
        """Return whether stored weights gave the losses of loaded ones after the file that was read last.

        Reading the checkpoint's own file proves nothing: its state that is not a tensor is still in the model. It is
        sufficient that the weights of another checkpoint were confirmed with that state.
        """
        if self._last_read == checkpoint:
            is_only = len(self.runner.task.checkpoints) == 1
            return is_only or any(checkpoint in load.confirmed for load in self._loads.values())
        return self._last_read in self._loads[checkpoint].confirmed

    def _load_and_store(self, checkpoint: int) -> None:
        """Load a checkpoint from its file, and store its weights if it was loaded before."""
        assert self._cache is not None
        assert self._original is not None
        identity, last = identify_checkpoint(self.runner.task.checkpoints[checkpoint]), self._loads.get(checkpoint)
        is_same = last is not None and last.identity == identity != ()
        if self._cache.detach():
            self._original.attach()
        if not is_same:
            self._engines = {key: engine for key, engine in self._engines.items() if key[0] != checkpoint}
        self._cache.remove(checkpoint)
        self._original.prepare_overwrite(self.runner.options.device)
        self.set_memory_format(channels_last=self.channels_last)
        self._load_file(checkpoint)
        self._loads[checkpoint] = loaded = _Load(identity)
        if is_same and last is not None:
            loaded.is_excluded = last.is_excluded
            if not last.is_excluded and self._cache.store(checkpoint):
                loaded.parameters, loaded.losses_B = self.parameters, self._compute_probe_losses()

    def _compute_probe_losses(self) -> Tensor:
        """Return the losses of the first and the last training row, in the model's own precision."""
        with self.use("fp32"):
            batches = self.batches("train", sorted({0, self.runner.n_rows("train") - 1}))
            return torch.cat([self.engine("train").loss_values(batch).cpu() for batch in batches])

    def _load_file(self, checkpoint: int) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        task = self.runner.task
        logger.debug("loading checkpoint %d, %s", checkpoint, task.checkpoints[checkpoint].path)
        # A load that fails leaves the model partly loaded.
        self.checkpoint = self._last_read = -1
        self._loader.load(self.module, checkpoint, self.runner.options.device)
        before = self.parameters
        self.parameters = task.select_parameters(self.module)
        was, now = ({name: (list(p.shape), p.dtype) for name, p in each.items()} for each in (before, self.parameters))
        if was != now:
            name = next(name for name in {**was, **now} if was.get(name) != now.get(name))
            there, here = ("nothing" if got is None else f"{got[0]} {got[1]}" for got in (was.get(name), now.get(name)))
            raise TaskError(
                problem(
                    f"loading checkpoint {checkpoint} changed the model's parameters",
                    got=f"{len(now)} chosen parameters, {name} {here}",
                    expected=f"the same {len(was)} names, shapes and dtypes as before, {name} {there}",
                    remedy="create parameters of the final dtype in Task.model; only set their values in Task.load",
                )
            )
        self._forbid_gradients()
        if any(after is not before[name] for name, after in self.parameters.items()):
            # New parameter objects have the memory format of the checkpoint.
            self.set_memory_format(channels_last=self.channels_last)
        self.checkpoint = self._last_read = checkpoint

    def _forbid_gradients(self) -> None:
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)

    def set_memory_format(self, *, channels_last: bool) -> None:
        """Set the memory format of images and convolution weights; each format has its own gradient engines."""
        self.channels_last = channels_last
        form = torch.channels_last if channels_last else torch.contiguous_format
        for parameter in self.module.parameters():
            if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=form):  # noqa: PLR2004
                parameter.data = parameter.data.contiguous(memory_format=form)

    def engine(self, side: SideName) -> GradientEngine:
        """Return the engine for the gradients of a side's loss at the loaded checkpoint.

        The sides `query` and `input` have the same loss, and share an engine.
        """
        if side == "input":
            side = "query"
        if side == "query" and self.shares_engines and self.runner.task.query_loss is None:
            side = "train"
        task, key = self.runner.task, (self.checkpoint, side, self.channels_last, self.precision)
        engine = self._engines.get(key)
        # A loader may replace the parameters by other objects.
        if engine is None or any(engine.parameters[name] is not own for name, own in self.parameters.items()):
            loss = task.query_loss if side == "query" and task.query_loss is not None else task.loss
            engine = self._engines[key] = GradientEngine(
                self.module, self.parameters, loss, self._collate, self.checkpoint, self.precision
            )
            engine.find_scales = self._find_scales
        return engine

    def _find_scales(self) -> GradientScales | None:
        """Return the scales of gradients at the loaded checkpoint.

        Raises:
            CheckpointError: the second moments are missing or cannot be used.
        """
        checkpoint, kind = self.checkpoint, self.runner.options.preconditioner
        rates = self.rates[checkpoint]
        if kind == "none":
            return rates.scales
        if self._loaded_scales is None:
            key = checkpoint, identify_checkpoint(self.runner.task.checkpoints[checkpoint])
            self._loaded_scales = self._scales.find(
                key, lambda: compute_scales(kind, rates, self._read_moments(checkpoint), self.parameters)
            )
        return self._loaded_scales

    def _read_moments(self, checkpoint: int) -> dict[str, SecondMoment]:
        """Return the second moments of the parameters whose learning rate is not 0."""
        rates = self.rates[checkpoint].by_parameter
        names = [name for name, parameter in self.parameters.items() if rates[name] and parameter.numel()]
        given = self.runner.task.checkpoints[checkpoint]
        return read_second_moments(given, self.module, names, sorted(self._trainable))

    def digest_moments(self, checkpoint: int) -> str | None:
        """Return a digest of the second moments that a preconditioner uses at a checkpoint; None without one.

        Raises:
            CheckpointError: the second moments are missing or cannot be used.
        """
        if self.runner.options.preconditioner == "none":
            return None
        return digest_second_moments(self._read_moments(checkpoint))

    def _collate(self, examples: list[Any]) -> Any:
        return self._move_to_device(self.runner.task.collate_rows(examples))

    def _move_to_device(self, inputs: Any) -> Any:
        moved = to_device(inputs, self.runner.options.device, channels_last=self.channels_last)
        # Examples may have their own autograd graph; a backward pass through it would free it.
        has_graph = any(isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None for leaf in leaves(moved))
        return map_leaves(detach_graph, moved) if has_graph else moved

    def batch(self, side: SideName, read: CollatedBatch) -> Batch:
        """Return a collated batch, moved to the device."""
        examples = _Examples(self.runner.data(side), read.ids) if read.examples is None else read.examples
        return Batch(read.ids, examples, self._move_to_device(read.inputs))

    def send(self, side: SideName, read: CollatedBatch) -> Sent[Batch]:
        """Start to move a collated batch to the device; `copies.receive` returns it."""
        if not self.copies.n_ahead:
            return Sent(self.batch(side, read))
        is_on_device = any(tensor.device.type != "cpu" for tensor in tensors_within(read.inputs))
        pinned = replace(read, inputs=pin_memory(read.inputs, self.copies.pin))
        return self.copies.send(
            lambda: self.batch(side, pinned), lambda batch: tensors_within(batch.inputs), after=is_on_device
        )

    def batches(self, side: SideName, ids: Sequence[int]) -> Iterator[Batch]:
        """Yield batches of the examples with these ids, in this order, on the device."""
        for read in self.runner.read(side, ids):
            yield self.batch(side, read)

    def iterate_without_padding(self, side: SideName, ids: Sequence[int]) -> Iterator[tuple[list[int], Batch]]:
        """Yield batches in which every example has the positions that it has alone, and the examples' places in `ids`.

        `collate` pads the examples of a batch to one length. Examples that have the same shapes when each is collated
        alone need no padding. An example with values of other types than tensors and numbers has its own batch.
        """
        data, collate = self.runner.data(side), self.runner.task.collate_rows
        by_shape: dict[Any, list[int]] = {}
        for place, row in enumerate(ids):
            shapes = [_find_shape(leaf) for leaf in leaves(collate([data[row]]))]
            key = place if None in shapes else tuple(shapes)
            by_shape.setdefault(key, []).append(place)
        size = self.runner.options.batch_size
        for places in by_shape.values():
            for start in range(0, len(places), size):
                chosen = places[start : start + size]
                rows = [ids[place] for place in chosen]
                yield chosen, self.engine(side).batch(rows, [data[row] for row in rows])

    def probe(self, side: SideName) -> None:
        """Run the checks of the first batch of a side.

        Raises:
            TaskError: the data or the loss break the contract; the message names the cause and a fix.
        """
        data, engine = self.runner.data(side), self.engine(side)
        ids = range(min(self.runner.options.batch_size, _PROBED, len(data)))
        if not self.runner.options.allow_random_data:
            with preserve_globals():
                probe_examples(data, side, ids, self.runner.task.collate_rows)
        with preserve_globals():
            probe_description(self.runner.task, data[0], side)
        batch = engine.batch(ids, [data[i] for i in ids])
        if self.runner.options.on_nonfinite == "skip":
            batch = self._replace_nonfinite(side, batch)
        chosen = probe_losses(engine, batch, self.checkpoint)
        try:
            engine.choose_methods(chosen)
            self._verify_spread_rows(side)
        except GradientProofError:
            # If the examples of a batch interact, no gradient method is right, and the probe reports that cause.
            probe_gradients(engine, chosen)
            raise
        probe_gradients(engine, chosen)

    def _verify_spread_rows(self, side: SideName) -> None:
        """Verify gradients on rows spread over a side if no loss of the first batch reaches a parameter.

        Raises:
            TaskError: no loss of these rows reaches a parameter either.
        """
        engine, n_rows = self.engine(side), self.runner.n_rows(side)
        parts = min(_MOST_BATCHES_WITHOUT_GRADIENT, math.ceil(n_rows / self.runner.options.batch_size))
        for part in range(parts):
            if engine.reached:
                return
            batch = self._make_spread_batch(side, part, parts)
            if self.runner.options.on_nonfinite == "skip":
                batch = self._replace_nonfinite(side, batch)
            engine.choose_methods(batch)
        if not engine.reached:
            raise TaskError(describe_no_gradient(n_rows=min(n_rows, parts * self.runner.options.batch_size)))

    def _replace_nonfinite(self, side: SideName, batch: Batch) -> Batch:
        """Return a batch with its non-finite rows replaced by finite ones of this batch, or of the data set.

        Raises:
            NonFiniteError: neither has a finite row.
        """
        engine = self.engine(side)
        found = replace_nonfinite(engine, batch) or replace_nonfinite(engine, self._make_spread_batch(side))
        if found is None:
            raise NonFiniteError(self._describe_nonfinite(side, len(batch)))
        return found[0]

    def require_finite_losses(self) -> None:
        """Check that the loaded checkpoint gives finite losses.

        Raises:
            NonFiniteError: no loss is finite in a batch of rows spread over the training data.
        """
        batch = self._make_spread_batch("train")
        if not bool(torch.isfinite(self.engine("train").loss_values(batch)).any()):
            raise NonFiniteError(self._describe_nonfinite("train", len(batch)))

    def _make_spread_batch(self, side: SideName, part: int = 0, parts: int = 1) -> Batch:
        """Return a batch of rows spread evenly over a side: the given one of several disjoint batches."""
        data = self.runner.data(side)
        size = min(parts * self.runner.options.batch_size, len(data))
        ids = [round(j * (len(data) - 1) / max(1, size - 1)) for j in range(part, size, parts)]
        return self.engine(side).batch(ids, [data[i] for i in ids])

    def _describe_nonfinite(self, side: SideName, n_rows: int) -> str:
        return problem(
            f"no row of {side}_data is finite at checkpoint {self.checkpoint}",
            got=f"NaN or infinity for each of {n_rows} sampled rows",
            expected="at least one finite row",
            remedy="leave out this checkpoint, or fix the loss or the data",
        )


@dataclass
class _Load:
    """The last load of a checkpoint from its file into a model that is kept.

    Attributes:
        identity: of the file.
        parameters: the selected parameters after the load; empty: no weights are stored.
        losses_B: the losses of two rows after the load; they are compared with those of the stored weights.
        confirmed: stored weights gave these losses after these checkpoints had been read from their files. Reading a
            file may change state that is not a tensor.
        is_excluded: stored weights gave other losses: the loader or the model has state that is not a tensor.
    """

    identity: FileIdentity
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    losses_B: Tensor = field(default_factory=lambda: torch.zeros(0))
    confirmed: set[int] = field(default_factory=set)
    is_excluded: bool = False


def _find_shape(leaf: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor, an array or a number; None for a value that has none."""
    if leaf is None or isinstance(leaf, int | float):
        return ()
    return tuple(leaf.shape) if isinstance(leaf, torch.Tensor | np.ndarray | np.generic) else None


def _are_close(losses_B: Tensor, expected_B: Tensor) -> bool:
    """Return whether losses agree up to rounding, which is relative to the largest finite loss."""
    finite = expected_B[torch.isfinite(expected_B)].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    return losses_B.shape == expected_B.shape and torch.allclose(
        losses_B, expected_B, rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE * largest, equal_nan=True
    )


def _list_parts(model: nn.Module) -> list[object]:
    """Return the modules of a model, each followed by its parameters."""
    return [part for module in model.modules() for part in (module, *module._parameters.values())]


def _are_same_objects(one: Sequence[object], other: Sequence[object]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


class _Examples(Sequence[Any]):
    """The examples of a batch that a worker collated; each is read again when it is accessed."""

    def __init__(self, data: Any, ids: tuple[int, ...]) -> None:
        self._data, self._ids = data, ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: Any) -> Any:
        chosen = self._ids[place]
        return [self._data[i] for i in chosen] if isinstance(chosen, tuple) else self._data[chosen]
