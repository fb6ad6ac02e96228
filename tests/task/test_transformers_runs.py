"""Run folders of the Hugging Face Trainer: `Task.from_transformers`, from the folder to exact scores."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from tracin_ann import BuildConfig, InfluenceIndex, Task, TracInCallback, build
from tracin_ann.cli.build import main as build_command
from tracin_ann.cli.query import main as query_command
from tracin_ann.errors import CheckpointError, MissingPackageError, TaskError, TracinAnnError, UsageError
from tracin_ann.task import TRANSFORMERS_TASK, load_named_task
from tracin_ann.task.integrations.weights import find_weights

if TYPE_CHECKING:
    from trainer_runs import Run

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
trainer_runs: Any = import_module("trainer_runs")
ROWS, UPDATES, SAVE_EVERY = trainer_runs.ROWS, trainer_runs.UPDATES, trainer_runs.SAVE_EVERY

pytestmark = [
    pytest.mark.xdist_group("trainer runs"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
NAMES = ("bert", "gpt2", "llama", "t5", "vit")
FEW = [name if name in ("bert", "llama") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
SMALL = BuildConfig(dim=64, device="cpu", yardstick=False)
Train = Callable[[str], "Run"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that trains a kind of model at its first call."""
    folder = tmp_path_factory.mktemp("runs")
    return cache(lambda name: trainer_runs.train(name, folder / name))


@pytest.fixture
def copied(trained: Train, tmp_path: Path) -> Run:
    """Return a copy of the run of the classifier, which a test may change."""
    run = trained("bert")
    return trainer_runs.Run(
        shutil.copytree(run.folder, tmp_path / "run"), run.records, run.encoded, run.at_save, run.used
    )


def step_folders(run: Run) -> list[Path]:
    return [run.folder / f"checkpoint-{step}" for step in range(SAVE_EVERY, UPDATES + 1, SAVE_EVERY)]


def brute_force(run: Run, rates: list[float]) -> np.ndarray[Any, Any]:
    """Return the TracInCP scores of all pairs of rows: autograd in float64, a batch of one, the model's own loss."""
    total = np.zeros((ROWS, ROWS))
    for folder, rate in zip(step_folders(run), rates, strict=True):
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float64).eval()
        gradients = []
        for row in run.encoded:
            inputs = {key: value.double() if value.is_floating_point() else value for key, value in row.items()}
            loss = model(**inputs).loss
            if "ForSequence" not in name and "ForImage" not in name:
                # The model's own loss is the mean over the predicted tokens.
                loss = loss * (row["labels"].numel() - ("ForConditional" not in name))
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            gradients.append(torch.cat([g.flatten() for g in found if g is not None]).double().numpy())
        total += rate * np.stack(gradients) @ np.stack(gradients).T
    return total


@pytest.mark.parametrize("name", FEW)
def test_exact_scores_of_a_run_equal_autograd_and_every_parameter_has_a_layer_rule(trained, name, tmp_path):
    run = trained(name)
    task = Task.from_transformers(run.folder, run.records)
    report = build(task, tmp_path / "index", SMALL)
    assert {step.step for step in report.manifest.steps} == {"layer rule"}
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    scores, truth = (
        trainer_runs.exact_scores(index),
        brute_force(run, [run.at_save[step] for step in sorted(run.at_save)]),
    )
    assert np.abs(scores - truth).max() <= 1e-4 * np.abs(truth).max()
    np.testing.assert_array_equal(trainer_runs.exact_scores(index), scores)  # weights are in memory at the second query


@pytest.mark.parametrize("name", FEW)
def test_rates_are_those_of_the_scheduler_when_checkpoints_were_saved(trained, name):
    run = trained(name)
    task = Task.from_transformers(run.folder, run.records)
    assert [c.learning_rate for c in task.checkpoints] == [run.at_save[step] for step in sorted(run.at_save)]
    assert len(task.checkpoints) == UPDATES // SAVE_EVERY
    assert max(run.at_save.values()) > 0
    # The Trainer's default is AdamW; a loss of several tokens is not -log p of one label.
    assert {c.steps for c in task.checkpoints} == {None}
    assert task.loss_is_nll is (True if name in ("bert", "vit") else None)


def test_summed_rates_are_those_of_the_updates_since_the_checkpoint_before(trained):
    run = trained("bert")
    task = Task.from_transformers(run.folder, run.records, rates="sum")
    expected = [sum(run.used[start : start + SAVE_EVERY]) for start in range(0, UPDATES, SAVE_EVERY)]
    np.testing.assert_allclose([c.learning_rate for c in task.checkpoints], expected, rtol=1e-12)


def test_a_run_in_which_the_last_checkpoint_alone_remains_needs_summed_rates(copied):
    for folder in step_folders(copied)[:-1]:
        shutil.rmtree(folder)
    with pytest.raises(TaskError, match=r"the learning rate is 0 at every checkpoint .* use rates='sum'"):
        Task.from_transformers(copied.folder, copied.records)
    task = Task.from_transformers(copied.folder, copied.records, rates="sum")
    assert task.checkpoints[0].learning_rate == pytest.approx(sum(copied.used), rel=1e-12)
    given = Task.from_transformers(copied.folder, copied.records, rates=[0.25])
    assert given.checkpoints[0].learning_rate == 0.25


def shard(folder: Path) -> None:
    """Save the weights of a checkpoint again, in several files."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def load_into_model(task: Task, checkpoint: int) -> dict[str, torch.Tensor]:
    model = task.model()
    assert task.load is not None
    task.load(model, str(task.checkpoints[checkpoint].path))
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_weights_in_shards_are_those_of_one_file(copied):
    task = Task.from_transformers(copied.folder, copied.records)
    whole = load_into_model(task, 1)
    shard(step_folders(copied)[1])
    task = Task.from_transformers(copied.folder, copied.records)
    parts = load_into_model(task, 1)
    assert Path(task.checkpoints[1].path).is_dir()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_a_missing_shard_is_named(copied):
    shard(step_folders(copied)[1])
    lost = sorted(step_folders(copied)[1].glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"are missing: got no {lost.name}, expected the .* files .*; copy"):
        Task.from_transformers(copied.folder, copied.records)


def test_weights_in_bf16_keep_their_type_or_are_converted(copied):
    folder = step_folders(copied)[1]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    for each in step_folders(copied):
        model.save_pretrained(each)
    own = load_into_model(Task.from_transformers(copied.folder, copied.records), 1)
    assert {value.dtype for value in own.values() if value.is_floating_point()} == {torch.bfloat16}
    wide = load_into_model(Task.from_transformers(copied.folder, copied.records, dtype="float32"), 1)
    for name, value in model.state_dict().items():
        assert torch.equal(own[name], value)
        assert torch.equal(wide[name], value.to(wide[name].dtype))


def test_tied_weights_stay_tied_and_names_that_differ_are_reported(trained, tmp_path):
    run = trained("gpt2")
    task = Task.from_transformers(run.folder, run.records)
    model = task.model()
    assert task.load is not None
    task.load(model, str(task.checkpoints[1].path))
    assert model.lm_head.weight is model.transformer.wte.weight
    other = shutil.copytree(run.folder, tmp_path / "other")
    for folder in other.glob("checkpoint-*"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    task = Task.from_transformers(other, run.records)
    with pytest.raises(CheckpointError, match=r"does not match .* got missing transformer.h.2.*; use the config.json"):
        task.load(task.model(), str(task.checkpoints[1].path))


def test_weights_that_the_config_ties_but_that_differ_are_refused(trained, tmp_path):
    run = trained("gpt2")
    folder = shutil.copytree(run.folder, tmp_path / "run")
    path = folder / f"checkpoint-{UPDATES}" / "model.safetensors"
    state = load_file(path)
    task = Task.from_transformers(folder, run.records)
    save_file({**state, "lm_head.weight": state["transformer.wte.weight"].clone()}, path)
    assert torch.equal(load_into_model(task, -1)["lm_head.weight"], state["transformer.wte.weight"])
    save_file({**state, "lm_head.weight": state["transformer.wte.weight"] + 1}, path)
    with pytest.raises(CheckpointError, match=r"other values of \S+ than of the weights to which config.json ties it"):
        load_into_model(task, -1)


MARK = "from pathlib import Path\nPath({place!r}).write_text('run')\n"


def test_a_malicious_run_folder_executes_nothing(trained, tmp_path, monkeypatch):
    """Code beside the weights, and pickles in every file that is read or not, leave no trace."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.write_text, (tmp_path / "executed", "run")

    pickled = pickle.dumps(Evil())
    pickle.loads(pickled)
    assert (tmp_path / "executed").exists(), "the pickle has an effect where it is loaded"
    (tmp_path / "executed").unlink()
    run = trained("bert")
    folder = shutil.copytree(run.folder, tmp_path / "run")
    code = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}
    for place in (folder, *folder.glob("checkpoint-*")):
        (place / "evil.py").write_text(MARK.format(place=str(tmp_path / "executed")))
        (place / "custom_generate").mkdir()
        (place / "custom_generate" / "generate.py").write_text(MARK.format(place=str(tmp_path / "executed")))
        for name, entries in (
            ("config.json", {"auto_map": code}),
            ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}),
        ):
            if (place / name).is_file():
                (place / name).write_text(json.dumps(json.loads((place / name).read_text()) | entries))
        for name in ("training_args.bin", "rng_state.pth"):
            (place / name).write_bytes(pickled)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    build(Task.from_transformers(folder, run.records), tmp_path / "index", SMALL)
    last = folder / f"checkpoint-{UPDATES}"
    (last / "scheduler.pt").write_bytes(pickled)
    with pytest.raises(TaskError, match="scheduler.pt cannot be read"):
        Task.from_transformers(folder, run.records)
    (last / "scheduler.pt").unlink()
    (last / "model.safetensors").unlink()
    torch.save(Evil(), last / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_into_model(Task.from_transformers(folder, run.records), -1)
    (last / "config.json").write_text(json.dumps({"model_type": "novel", "auto_map": code}))
    with pytest.raises(TaskError, match="is unknown"):
        Task.from_transformers(last, run.records, rates=[0.1])
    assert not (tmp_path / "executed").exists()
    assert "evil" not in sys.modules


def change_config(run: Run, **changes: Any) -> None:
    for folder in step_folders(run):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))


def remove_files(run: Run, *names: str) -> None:
    for folder in step_folders(run):
        for name in names:
            (folder / name).unlink()


def remove_rates(run: Run) -> None:
    remove_files(run, "scheduler.pt", "trainer_state.json")


def damage_index(run: Run) -> None:
    """Replace the weights of a checkpoint by an index whose files have no names."""
    folder = step_folders(run)[0]
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 3}}))


FAULTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "unknown model type": (lambda run: change_config(run, model_type="novel"), "architecture of .* is unknown"),
    "unknown class": (
        lambda run: change_config(run, architectures=["NovelModel"]),
        "kind of the run's task is unknown",
    ),
    "no class": (lambda run: change_config(run, architectures=[]), "pass kind="),
    "no config": (lambda run: remove_files(run, "config.json"), "has no config.json"),
    "no weights": (lambda run: remove_files(run, "model.safetensors"), "has no weights"),
    "no rates": (remove_rates, r"learning rates of .* are unknown.*pass rates="),
    "no run": (lambda run: shutil.rmtree(run.folder), "has no checkpoints: got no such folder"),
    "no rows": (lambda run: run.records.clear(), "the data are empty"),
    "no text": (lambda run: [row.pop("text") for row in run.records], r"a row has no text.*pass text="),
    "unknown label": (lambda run: [row.update(label="odd") for row in run.records], "a label is unknown: got 'odd'"),
    "damaged state": (
        lambda run: (step_folders(run)[0] / "trainer_state.json").write_text("{"),
        "trainer_state.json cannot be read",
    ),
    "damaged index": (damage_index, "weights of .* are missing: got no 3"),
    "damaged scheduler": (
        lambda run: (step_folders(run)[0] / "scheduler.pt").write_bytes(b"PK"),
        "scheduler.pt cannot be read",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_is_one_line_with_a_remedy(copied, fault):
    break_run, message = FAULTS[fault]
    run = trainer_runs.Run(copied.folder, [dict(record) for record in copied.records], [])
    break_run(run)
    with pytest.raises(TracinAnnError, match=message) as raised:
        Task.from_transformers(run.folder, run.records)
    assert "\n" not in str(raised.value)
    assert "; " in str(raised.value)


def test_without_transformers_the_error_names_the_extra(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"transformers is not installed.*'tracin-ann\[transformers\]'"):
        Task.from_transformers(copied.folder, copied.records)


def test_a_damaged_file_of_weights_is_reported(copied):
    task = Task.from_transformers(copied.folder, copied.records)
    path = Path(task.checkpoints[1].path)
    path.write_bytes(path.read_bytes()[:100])
    assert task.load is not None
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        task.load(task.model(), str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "novel"}, "option kind"),
        ({"rates": "mean"}, "option rates"),
        ({"loss": "max"}, "option loss"),
        ({"dtype": "int8"}, "option dtype"),
        ({"rates": [0.1]}, "number of learning rates is wrong: got 1 in rates, expected 3"),
    ],
)
def test_an_unknown_option_is_rejected(trained, options, message):
    run = trained("bert")
    with pytest.raises(UsageError, match=message):
        Task.from_transformers(run.folder, run.records, **options)


def test_a_checkpoint_folder_is_a_run_of_one_checkpoint(trained):
    run = trained("bert")
    task = Task.from_transformers(step_folders(run)[1], run.records)
    weights = find_weights(step_folders(run)[1])
    assert [(c.path, c.learning_rate) for c in task.checkpoints] == [(weights, run.at_save[2 * SAVE_EVERY])]


def test_the_record_of_a_run_has_precedence(tmp_path):
    run = trainer_runs.train(
        "bert", tmp_path / "run", callbacks=[TracInCallback()], save_strategy="no", logging_steps=1, optim="sgd"
    )
    record = json.loads((run.folder / "tracin.json").read_text())["checkpoints"]
    task = Task.from_transformers(run.folder, run.records)
    assert [find_weights(run.folder / each["path"]) for each in record] == [c.path for c in task.checkpoints]
    assert [c.largest_rate for c in task.checkpoints] == [run.used[each["step"] - 1] for each in record]
    summed = Task.from_transformers(run.folder, run.records, rates="sum")
    steps = [0, *(each["step"] for each in record)]
    expected = [sum(run.used[start:stop]) for start, stop in zip(steps, steps[1:], strict=False)]
    assert [c.largest_rate for c in summed.checkpoints] == pytest.approx(expected, rel=1e-6)
    # The first update of a warm-up has rate 0.
    counts = [pytest.approx(sum(run.used) / c.largest_rate) if c.largest_rate else None for c in task.checkpoints]
    assert [c.steps for c in task.checkpoints] == counts and counts[-1] is not None
    load_into_model(task, 0)


def test_a_task_can_be_sent_to_workers(trained, tmp_path):
    run = trained("gpt2")
    data = trainer_runs.write_jsonl(tmp_path / "rows.jsonl", run.records)
    task = Task.from_transformers(run.folder, data)
    sent = pickle.loads(pickle.dumps(task))
    assert sent.checkpoints == task.checkpoints
    assert torch.equal(sent.train_data()[3]["input_ids"], task.train_data()[3]["input_ids"])
    assert {name: p.shape for name, p in sent.model().named_parameters()} == {
        name: p.shape for name, p in task.model().named_parameters()
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "dataset", "save_to_disk", "callable"])
def test_every_source_of_records_gives_the_same_examples(trained, tmp_path, kind):
    run = trained("bert")
    data = make_source(kind, run.records, tmp_path)
    task = Task.from_transformers(run.folder, data)
    rows = task.train_data()
    assert len(rows) == ROWS
    for row, truth in zip((rows[i] for i in range(ROWS)), run.encoded, strict=True):
        assert row.keys() == truth.keys()
        assert all(torch.equal(row[name], truth[name].squeeze(0)) for name in truth)


def make_source(kind: str, records: list[dict[str, Any]], folder: Path) -> Any:
    if kind == "jsonl":
        return trainer_runs.write_jsonl(folder / "rows.jsonl", records)
    if kind == "csv":
        lines = ["label,text", *(f"{record['label']},{record['text']}" for record in records)]
        (folder / "rows.csv").write_text("\n".join(lines) + "\n")
        return str(folder / "rows.csv")
    if kind == "callable":
        return lambda: iter(records)
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(records)
    if kind == "save_to_disk":
        data.save_to_disk(folder / "data")
        return folder / "data"
    return data


def test_several_splits_are_rejected(trained, tmp_path):
    datasets = pytest.importorskip("datasets")
    run = trained("bert")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(run.records)})
    with pytest.raises(TaskError, match="has several splits: got train"):
        Task.from_transformers(run.folder, splits)
    splits.save_to_disk(tmp_path / "data")
    with pytest.raises(TaskError, match="has several splits: got train"):
        Task.from_transformers(run.folder, tmp_path / "data")


def test_descriptions_columns_and_queries_from_records(trained):
    run = trained("bert")
    task = Task.from_transformers(run.folder, run.records)
    example = task.train_data()[1]
    assert task.describe is not None and task.columns is not None and task.read_query is not None
    assert task.describe_example(example).text == f"fine: {run.records[1]['text']}"
    assert task.columns(example) == {"label": "fine"}
    again = task.read_query(run.records[1])
    assert all(torch.equal(again[name], value) for name, value in example.items())
    causal = trained("gpt2")
    task = Task.from_transformers(causal.folder, causal.records)
    shown = task.describe_example(task.train_data()[0])
    assert shown.text == causal.records[0]["text"]
    assert shown.tokens == ["[CLS]", *causal.records[0]["text"].split(), "[SEP]"]
    assert task.columns is None


def test_the_command_builds_an_index_that_opens_in_any_directory(trained, tmp_path, monkeypatch):
    run = trained("bert")
    monkeypatch.chdir(run.folder.parent)
    data = trainer_runs.write_jsonl(run.folder / "rows.jsonl", run.records)
    words = ["--from-transformers", run.folder.name, "--data", f"{run.folder.name}/{data.name}"]
    words += ["--task-arg", "rates=sum", "--dim", "32", "--no-yardstick", "--device", "cpu"]
    result = CliRunner().invoke(build_command, [*words, "--out", str(tmp_path / "index")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(query_command, ["index", "--ids", "0", "-k", "3", "--device", "cpu"])
    assert found.exit_code == 0, found.output
    index = InfluenceIndex.open(tmp_path / "index", device="cpu")
    expected = Task.from_transformers(run.folder, data, rates="sum").checkpoints
    assert [c.learning_rate for c in index.task.checkpoints] == [c.learning_rate for c in expected]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "'--task' or '--from-transformers'"),
        (["--task", "a.py:task", "--from-transformers", "run", "--data", "d"], "exclude each other"),
        (["--from-transformers", "run"], "needs '--data'"),
        (["--task", "a.py:task", "--data", "d"], "need '--from-transformers'"),
    ],
)
def test_the_command_needs_a_task_or_a_run_with_data(words, message):
    result = CliRunner().invoke(build_command, [*words, "--out", "index"])
    assert result.exit_code == 2
    assert message in result.stderr


def test_options_of_the_command_are_strings(trained, tmp_path):
    run = trained("gpt2")
    data = str(trainer_runs.write_jsonl(tmp_path / "rows.jsonl", run.records))
    arguments = {"run": str(run.folder), "data": data, "rates": "0.1,0.2,0.3", "max_length": "4", "parameters": "*wte*"}
    task = load_named_task(TRANSFORMERS_TASK, arguments, tmp_path / "index")
    assert [c.learning_rate for c in task.checkpoints] == [0.1, 0.2, 0.3]
    assert task.parameters == ["*wte*"]
    assert max(len(row["input_ids"]) for row in task.train_data()) == 4
    for name, value in (("novel", "1"), ("max_length", "many")):
        with pytest.raises(UsageError, match=name):
            load_named_task(TRANSFORMERS_TASK, {**arguments, name: value}, tmp_path / "index")


@pytest.mark.parametrize("suffix", ["2", "x", ""])
def test_only_the_exact_reference_of_the_built_in_task_is_trusted(tmp_path, suffix):
    reference = f"tracin_ann.task.integrations.transformers:{'' if not suffix else 'task'}{suffix}"
    with pytest.raises(UsageError, match="is not imported"):
        load_named_task(reference, {"run": "run", "data": "data"}, tmp_path)


@pytest.mark.parametrize("name", ["run", "data"])
def test_files_of_the_run_inside_the_index_are_rejected(trained, tmp_path, name):
    run = trained("bert")
    data = trainer_runs.write_jsonl(tmp_path / "rows.jsonl", run.records)
    paths = {"run": run.folder, "data": data}
    shutil.copytree(run.folder, tmp_path / "index" / "run")
    shutil.copy(data, tmp_path / "index" / "data")
    arguments = {key: str(value) for key, value in paths.items()}
    load_named_task(TRANSFORMERS_TASK, arguments, tmp_path / "index")
    with pytest.raises(UsageError, match=f"{name} inside the index"):
        load_named_task(TRANSFORMERS_TASK, {**arguments, name: str(tmp_path / "index" / name)}, tmp_path / "index")
