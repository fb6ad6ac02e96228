"""Linear datamodeling scores of traker and dattri on the models and subsets of `benchmarks.attribution.lds`.

Both have to be installed: `pip install traker==0.3.2 dattri==0.3.0`. Each method is measured with its default damping
and with the best of several, chosen by the linear datamodeling score itself.

Shapes: N training rows, Q queries, B batch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attribution.settings import SETTINGS, Rows, Setting
from benchmarks.attribution.truth import Truth, measure_truth, merge_results, summarise
from benchmarks.common.results import write_results

RESULT = "lds_peers"
FRACTIONS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Damping as a fraction of the mean eigenvalue of the matrix that it is added to."""
BATCH = 1000
# (damping as a fraction, scores [Q, N])
Damped = Iterator[tuple[float, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """A setting with the weights of its checkpoints."""

    setting: Setting
    train: Rows
    query: Rows
    states: Sequence[dict[str, Tensor]]
    rates: Sequence[float]
    dim: int

    def make_model(self) -> nn.Module:
        model = self.setting.make().eval()
        model.load_state_dict(self.states[-1])
        return model

    def loaders(self, batch: int = BATCH) -> tuple[Any, Any]:
        """Return loaders of the training rows and of the queries."""
        make = partial(torch.utils.data.DataLoader, shuffle=False, batch_size=batch)
        return make(torch.utils.data.TensorDataset(*self.train)), make(torch.utils.data.TensorDataset(*self.query))

    def compute_loss(self, model: nn.Module, weights: Any, row: Sequence[Tensor]) -> Tensor:
        """Return the mean loss of a batch, or the loss of one row without its batch dimension."""
        x, y = (part.reshape(-1, *rows.shape[1:]) for part, rows in zip(row, self.train, strict=True))
        return self.setting.loss(lambda z: functional_call(model, weights, (z,)), (x, y)).mean()  # type: ignore[arg-type]

    def compute_margin(self, model: nn.Module, weights: Any, row: Sequence[Tensor]) -> Tensor:
        """Return log(p / (1 - p)) with p = exp(-loss), the output function of TRAK, of one row."""
        if self.setting.loss_is_nll:
            logits = functional_call(model, weights, (row[0].reshape(-1, *self.train[0].shape[1:]),))[0]
            is_label = torch.arange(len(logits)) == row[1].reshape(-1)
            others = logits.masked_fill(is_label, -torch.inf).logsumexp(0)
            return torch.where(is_label, logits, 0.0).sum() - others
        loss = self.compute_loss(model, weights, row)
        return -loss - torch.log(-torch.expm1(-loss))


def score_traker(case: Case) -> Damped:
    """Yield the scores of TRAK by traker, with every damping."""
    from trak import TRAKer  # type: ignore[import-not-found]  # noqa: PLC0415
    from trak.modelout_functions import AbstractModelOutput  # type: ignore[import-not-found]  # noqa: PLC0415
    from trak.projectors import BasicProjector, ProjectionType  # type: ignore[import-not-found]  # noqa: PLC0415

    class Margin(AbstractModelOutput):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(model, weights, buffers, *row):  # type: ignore[no-untyped-def]
            return case.compute_margin(model, (weights, buffers), row)

        def get_out_to_loss_grad(self, model, weights, buffers, batch):  # type: ignore[no-untyped-def]
            loss_B = case.setting.loss(lambda z: functional_call(model, (weights, buffers), (z,)), batch)
            return (1 - torch.exp(-loss_B)).detach().unsqueeze(-1)

    model = case.make_model()
    n_parameters = sum(p.numel() for p in model.parameters())
    projector = BasicProjector(n_parameters, case.dim, 0, ProjectionType.rademacher, "cpu", block_size=case.dim)
    projector.free_memory = lambda: None  # without its matrix, it cannot project the queries of the same model
    n_rows, n_queries, ids = len(case.train[0]), len(case.query[0]), list(range(len(case.states)))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"projector": projector, "proj_dim": case.dim, "device": "cpu", "use_half_precision": False}
        tracer = TRAKer(model, Margin(), n_rows, folder, logging_level=40, **settings)
        for i, state in enumerate(case.states):
            tracer.load_checkpoint(state, model_id=i)
            for batch in case.loaders()[0]:
                tracer.featurize(batch=batch, num_samples=len(batch[0]))
        means = []
        for i in ids:
            tracer.saver.load_current_store(i)
            means.append(float(np.square(tracer.saver.current_store["grads"]).sum()) / case.dim)
        for number, fraction in enumerate((0.0, *FRACTIONS)):
            tracer.score_computer.lambda_reg = fraction * float(np.mean(means))
            for i in ids:
                tracer.saver.model_ids[i]["is_finalized"] = 0
            tracer.finalize_features()
            for i, state in enumerate(case.states) if number == 0 else ():
                tracer.start_scoring_checkpoint("queries", state, i, n_queries)
                for batch in case.loaders()[1]:
                    tracer.score(batch=batch, num_samples=len(batch[0]))
            yield fraction, np.asarray(tracer.finalize_scores("queries")).T.copy()


def _make_dattri_task(case: Case, states: Sequence[dict[str, Tensor]], margin: bool = False) -> Any:
    from dattri.task import AttributionTask  # type: ignore[import-not-found]  # noqa: PLC0415

    model = case.make_model()
    # dattri reads the names of the arguments.
    loss = lambda weights, data: case.compute_loss(model, weights, data)  # noqa: E731
    output = lambda weights, data: case.compute_margin(model, weights, data)  # noqa: E731
    return AttributionTask(output if margin else loss, model, list(states))


def score_dattri_trak(case: Case) -> Damped:
    """Yield the scores of TRAK by dattri, with its default damping."""
    from dattri.algorithm.trak import TRAKAttributor  # type: ignore[import-not-found]  # noqa: PLC0415

    task = _make_dattri_task(case, case.states, margin=True)
    model = case.make_model()
    probability = lambda weights, row: torch.exp(-case.compute_loss(model, weights, row))  # noqa: E731
    settings = {"proj_dim": case.dim, "proj_type": "rademacher", "device": "cpu"}
    train_loader, query_loader = case.loaders()
    attributor = TRAKAttributor(task, probability, settings)
    attributor.cache(train_loader)
    yield 0.0, attributor.attribute(query_loader).T.numpy()


def score_dattri_tracin(case: Case) -> Damped:
    """Yield the scores of TracIn by dattri, with unprojected gradients."""
    from dattri.algorithm.tracin import TracInAttributor  # type: ignore[import-not-found]  # noqa: PLC0415

    task = _make_dattri_task(case, case.states)
    attributor = TracInAttributor(task, torch.tensor(case.rates), normalized_grad=False)
    yield 0.0, attributor.attribute(*case.loaders()).T.numpy()


def score_dattri_ekfac(case: Case) -> Damped:
    """Yield the scores of EK-FAC by dattri at the last checkpoint, over the Linear layers."""
    from dattri.algorithm.influence_function import IFAttributorEKFAC  # type: ignore[import-not-found]  # noqa: PLC0415

    attributor = IFAttributorEKFAC(_make_dattri_task(case, case.states[-1:]))
    train_loader, query_loader = case.loaders(len(case.train[0]))
    attributor.cache(case.loaders(64)[0])
    mean = float(np.mean([value.mean() for value in attributor.cached_lambdas.values()]))
    for fraction in (0.0, *FRACTIONS):
        attributor.damping = fraction * mean
        yield fraction, attributor.attribute(train_loader, query_loader).T.detach().numpy()


def score_dattri_logra(case: Case) -> Damped:
    """Yield the scores of LoGra by dattri at the last checkpoint, over the Linear layers, with its default damping."""
    from dattri.algorithm.block_projected_if.core.compressor import (  # type: ignore[import-not-found]  # noqa: PLC0415
        setup_model_compressors,
    )
    from dattri.algorithm.logra import LoGraAttributor  # type: ignore[import-not-found]  # noqa: PLC0415
    from dattri.task import AttributionTask  # type: ignore[import-not-found]  # noqa: PLC0415

    model = case.make_model()
    n_layers = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    side = round((case.dim / n_layers) ** 0.5)
    loss = lambda network, batch, device: case.setting.loss(network, batch).mean()  # noqa: E731
    task = AttributionTask(loss, model, [case.states[-1]])
    with tempfile.TemporaryDirectory() as folder:
        attributor = LoGraAttributor(task, hessian="eFIM", proj_dim=side * side, cache_dir=folder)
        # Its own setup passes one row without a batch dimension, which fails.
        attributor.compressors = setup_model_compressors(
            attributor.model,
            attributor.layer_names,
            attributor.sparsifier_kwargs,
            attributor.projector_kwargs,
            sample_inputs=(case.train[0][:1],),
            device="cpu",
        )
        train_loader, query_loader = case.loaders(50)
        attributor.cache(train_loader)
        yield 0.0, attributor.attribute(train_loader, query_loader).T.numpy()


METHODS: dict[str, Callable[[Case], Damped]] = {
    "traker, TRAK": score_traker,
    "dattri, TRAK": score_dattri_trak,
    "dattri, TracIn": score_dattri_tracin,
    "dattri, EK-FAC": score_dattri_ekfac,
    "dattri, LoGra": score_dattri_logra,
}
LAST_ONLY = ("dattri, EK-FAC", "dattri, LoGra")


def make_case(setting: Setting, data: Path, work: Path, runs: int, last: bool, dim: int) -> Case:
    """Return a setting with the checkpoints of several runs."""
    setting.train_runs(data, work / "runs", range(runs))
    epochs = setting.training.saved[-1:] if last else setting.training.saved
    n_rows = len(setting.load(data)[0][0])
    states, rates = [], []
    for seed in range(runs):
        for epoch in epochs:
            states.append(torch.load(setting.find_checkpoint(work / "runs", seed, epoch), weights_only=True))
            rates.append(setting.training.describe_checkpoint(epoch, n_rows)[0])
    return Case(setting, *setting.load(data), states, rates, dim)


def measure_method(method: str, case: Case, truth: Truth) -> dict[str, Any]:
    """Return the score of a method with its default damping and with the best one."""
    start_s, found = time.perf_counter(), {}
    try:
        with sdpa_kernel(SDPBackend.MATH):
            for fraction, score_QN in METHODS[method](case):
                if np.isfinite(score_QN).all():
                    found[fraction] = summarise(score_QN, truth)
    except Exception as error:  # noqa: BLE001 - any failure of another library is a result
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    if not found:
        return {"failed": "scores that are not finite"}
    best = max(found, key=lambda fraction: found[fraction][0])
    seconds = time.perf_counter() - start_s
    return {"default": found.get(0.0), "best": found[best], "best_fraction": best, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=Path("runs/attribution"), help="folder of models and their losses")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["LR", "MLP", "CNN", "GPT"], help="settings")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to measure")
    parser.add_argument("--runs", type=int, default=1, help="training runs whose checkpoints are used")
    parser.add_argument("--last", action="store_true", help="use only the last checkpoint of each run")
    parser.add_argument("--dim", type=int, default=1024, help="dimensions of projections")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.settings:
        setting, work = SETTINGS[name], options.work / name
        truth = measure_truth(setting, options.data, work)
        for method in options.methods:
            last = options.last or method in LAST_ONLY
            case = make_case(setting, options.data, work, options.runs, last, options.dim)
            row = {"setting": name, "method": method, "runs": options.runs, "last": last, "dim": options.dim}
            row |= measure_method(method, case, truth)
            print(row, flush=True)
            results = merge_results(RESULT, [row], ("setting", "method", "runs", "last", "dim"))
            print(write_results(RESULT, {"threads": options.threads}, results), flush=True)


if __name__ == "__main__":
    main()
