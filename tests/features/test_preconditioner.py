"""Preconditioners: scores against float64 brute force with the moments of real AdamW runs, and the record of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
import oracle
from invocation import run
from tasks.toy import CONFIG, Toy, cross_entropy, make_rows, make_toy_task
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.analysis.explanation import explain
from tracin_ann.cli.info import main as info_command
from tracin_ann.errors import CheckpointError, GradientProofError, IndexMismatchError, UsageError
from tracin_ann.gradients import GradientEngine
from tracin_ann.operations.verification import AuditSample, audit, repair, verify
from tracin_ann.store.manifest import FEATURES, MANIFEST, Manifest
from tracin_ann.task import read_second_moments
from tracin_ann.task.integrations.param_groups import RateMeter

# Layer rules of linear, norm, embedding and convolution layers, tied weights, vmap(grad) and a loop.
CASES = [
    *((case, "adam", 0.5) for case in ("gpt tied", "conv2d", "no linear layer", "gru")),
    ("mlp", "trackstar", 1.0),
]
EVERY = QueryOptions(exact=True, k=20, score="tracin")
ADAM = replace(CONFIG, preconditioner="adam")


def train(case, folder):
    """Train a case's model with AdamW in two checkpoints; return them, and weights √η/√(√v̂ + ε) in float64."""
    model, chosen, rows = models.make_case(case, 0, 12)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=0.01, betas=(0.8, 0.95), eps=1e-4)
    batch = torch.utils.data.default_collate(rows)
    checkpoints, models_of, weights = [], [], []
    for c, rate in enumerate((0.3, 0.05)):
        for _ in range(c + 2):
            optimizer.zero_grad()
            chosen.loss(model, batch).sum().backward()
            optimizer.step()
        torch.save(model.state_dict(), folder / f"{c}.pt")
        torch.save(optimizer.state_dict(), folder / f"{c}.optimizer.pt")
        checkpoints.append(Checkpoint(folder / f"{c}.pt", rate, second_moments=folder / f"{c}.optimizer.pt"))
        other = models.make_case(case, 0, 12)[0]
        other.load_state_dict(model.state_dict())
        models_of.append(other)
        steps = sum(range(2, c + 3))
        moments = [optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.95**steps) for p in parameters]
        weights.append([rate**0.5, torch.cat([moment.sqrt().add(1e-4).flatten() for moment in moments])])
    task = Task(
        model=lambda: models.make_case(case, 0, 12)[0],
        loss=chosen.loss,
        train_data=lambda: rows[:9],
        query_data=lambda: rows[9:],
        checkpoints=checkpoints,
    )
    gradients = [oracle.gradients(each, chosen.loss, rows) for each in models_of]
    return task, gradients, weights


def weigh(gradients, weights, power):
    """Return √η g / (√v̂ + ε)^power of training rows and of queries, [C, N, P]."""
    weighted = torch.stack([root * g * d**-power for g, (root, d) in zip(gradients, weights, strict=True)])
    return weighted[:, :9], weighted[:, 9:]


def assert_close(found, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    assert np.abs(np.asarray(found) - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("case", "kind", "power"), CASES)
def test_scores_equal_the_weighted_inner_products(case, kind, power, tmp_path):
    task, gradients, weights = train(case, tmp_path)
    train_CNP, query_CQP = weigh(gradients, weights, power)
    config = replace(CONFIG, norms="exact", preconditioner=kind, yardstick=False)
    build(task, tmp_path / "out", config)
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu")
    expected_QN = torch.einsum("cqp,cnp->qn", query_CQP, train_CNP).numpy()
    for answer in index.query(range(3), options=EVERY):
        hits = [*answer.proponents, *answer.opponents]
        assert len(hits) == 9
        assert_close([hit.score for hit in hits], expected_QN[answer.query][[hit.row for hit in hits]], 1e-4)
    own_N = train_CNP.square().sum((0, 2)).numpy()
    for exact in (False, True):
        found = index.self_influence(exact=exact)
        assert_close([row.score for row in found], own_N[[row.row for row in found]], 1e-4)
    assert_close(explain(index, 4, 1).score, expected_QN[1, 4], 1e-3)


@pytest.mark.parametrize(
    ("case", "sketch"), [("gpt tied", "factored"), ("conv2d", "factored"), ("mlp", "kronecker"), ("mlp", "dense")]
)
def test_features_estimate_the_weighted_inner_products(case, sketch, tmp_path):
    """The error of the stored scores agrees with the variance of the sketch, as measured by the build."""
    task, gradients, weights = train(case, tmp_path)
    train_CNP, _ = weigh(gradients, weights, 0.5)
    report = build(task, tmp_path / "out", replace(ADAM, dim=1024, sketch=sketch))
    feature_NCD = InfluenceIndex.open(tmp_path / "out", task, device="cpu").view().take(range(9)).reshape(9, 2, 1024)
    products = np.einsum("ncd,mcd->cnm", feature_NCD, feature_NCD)
    true = torch.einsum("cnp,cmp->cnm", train_CNP, train_CNP).numpy()
    norms = np.sqrt(np.einsum("cnn->cn", true))
    assert np.abs(products - true).max() / (norms[:, :, None] * norms[:, None]).max() < 0.25
    assert report.manifest.build.spec.rank_one == frozenset()
    assert 0.3 < report.manifest.fidelity.error_scale < 3


@pytest.fixture
def trained(tmp_path):
    """Return a folder with a Toy trained by AdamW, its optimizer, and the weights √v̂ + ε by parameter name."""
    torch.manual_seed(0)
    model = Toy()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if n.endswith("weight")], "weight_decay": 0.1},
            {"params": [p for n, p in model.named_parameters() if n.endswith("bias")], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    batch = torch.utils.data.default_collate(make_rows(10))
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model, batch).mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), tmp_path / "last.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    named = {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters()}
    return tmp_path, named, optimizer


def toy_task(folder, second_moments, rate=0.1, **changes):
    return make_toy_task(
        folder, Toy(), checkpoints=[Checkpoint(folder / "last.pt", rate, second_moments=second_moments)], **changes
    )


def denominators(folder, second_moments):
    """Return √v̂ + ε of all parameters as the library reads them."""
    model, names = Toy(), [name for name, _ in Toy().named_parameters()]
    given = Checkpoint(folder / "last.pt", 0.1, second_moments=second_moments)
    found = read_second_moments(given, model, names, names)
    return torch.cat([moment.denominator(torch.float64, torch.device("cpu")) for moment in found.values()])


def test_every_source_of_second_moments_gives_the_same_weights(trained):
    folder, named, optimizer = trained
    truth = torch.cat([(v.double() / (1 - 0.999**3)).sqrt().add(1e-8).flatten() for v in named.values()])
    groups = [{"beta2": 0.999, "eps": 1e-8, "step": 3.0, "names": list(named)}]
    save_file(named, folder / "moments.safetensors", {"format": "tracin-moments", "groups": json.dumps(groups)})
    corrected = {name: value / (1 - 0.999**3) for name, value in named.items()}
    save_file(corrected, folder / "corrected.safetensors")
    torch.save({"model": {}, "optimizer": optimizer.state_dict(), "epoch": 3}, folder / "all.pt")
    torch.save({"optimizer_states": [optimizer.state_dict()]}, folder / "last.ckpt")
    by_name = torch.optim.AdamW([(f"module.{n}", p) for n, p in reversed(list(Toy().named_parameters()))])
    state = by_name.state_dict()
    state["state"] = {i: {"step": 3, "exp_avg_sq": v} for i, v in enumerate(reversed(named.values()))}
    sources = [
        folder / "optimizer.pt",
        str(folder / "moments.safetensors"),
        folder / "corrected.safetensors",
        folder / "all.pt",
        folder / "last.ckpt",
        lambda: corrected,
        optimizer.state_dict,
        lambda: state,
    ]
    for source in sources:
        torch.testing.assert_close(denominators(folder, source), truth, rtol=1e-6, atol=0)


def test_the_moments_that_a_recorder_saves_are_read(tmp_path):
    """Two parameter groups with other β₂ and ε; the recorder writes the moments and their constants by name."""
    torch.manual_seed(0)
    model = Toy()
    first, second = list(model.first.parameters()), list(model.second.parameters())
    optimizer = torch.optim.AdamW([{"params": second, "betas": (0.9, 0.95)}, {"params": first, "eps": 1e-3}])
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model, torch.utils.data.default_collate(make_rows(10))).mean().backward()
        optimizer.step()
    moments, metadata = RateMeter(model, [optimizer]).read_moments()
    save_file(moments, tmp_path / "moments.safetensors", metadata)
    corrections = [*((0.999, 1e-3) for _ in first), *((0.95, 1e-8) for _ in second)]
    truth = [
        (optimizer.state[p]["exp_avg_sq"].double() / (1 - beta2**2)).sqrt().add(eps).flatten()
        for p, (beta2, eps) in zip([*first, *second], corrections, strict=True)
    ]
    torch.testing.assert_close(
        denominators(tmp_path, tmp_path / "moments.safetensors"), torch.cat(truth), rtol=1e-6, atol=0
    )


def test_amsgrad_divides_by_the_largest_moment(trained):
    folder, named, _ = trained
    model = Toy()
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True, eps=1e-3)
    for scale in (10.0, 0.1):
        optimizer.zero_grad()
        (scale * cross_entropy(model, torch.utils.data.default_collate(make_rows(4)))).sum().backward()
        optimizer.step()
    largest = [optimizer.state[p]["max_exp_avg_sq"].double() / (1 - 0.999**2) for p in model.parameters()]
    truth = torch.cat([value.sqrt().add(1e-3).flatten() for value in largest])
    torch.testing.assert_close(denominators(folder, optimizer.state_dict), truth, rtol=1e-6, atol=0)


def test_the_groups_of_the_trainer_are_recognised():
    """The order of a Trainer's optimizer: parameters with weight decay, then biases and parameters of norm layers."""
    model = nn.Sequential()
    model.add_module("embeddings", nn.Embedding(5, 4))
    model.add_module("norm", nn.RMSNorm(4))
    model.add_module("dense", nn.Linear(4, 4))
    model.add_module("last", nn.LayerNorm(4))
    order = ["embeddings.weight", "dense.weight", "norm.weight", "dense.bias", "last.weight", "last.bias"]
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [named[n] for n in order[:2]]}, {"params": [named[n] for n in order[2:]]}]
    )
    state = optimizer.state_dict()
    state["state"] = {i: {"step": 1, "exp_avg_sq": torch.full_like(named[n], i)} for i, n in enumerate(order)}
    found = read_second_moments(Checkpoint("x.pt", 0.1, second_moments=lambda: state), model, list(named), list(named))
    assert {name: moment.value.flatten()[0].item() for name, moment in found.items()} == {
        name: order.index(name) for name in named
    }


def test_the_record_and_the_order_of_the_weights(trained):
    folder, named, _ = trained
    task = toy_task(folder, folder / "optimizer.pt")
    report = build(task, folder / "out", ADAM)
    spec = Manifest.read(folder / "out").build.spec
    assert spec == report.manifest.build.spec and spec.preconditioner == "adam"
    assert re.fullmatch("[0-9a-f]{32}", spec.checkpoints[0].second_moments)
    assert "weights:    preconditioner adam\n" in run(info_command, folder / "out").output
    assert audit(folder / "out", AuditSample(10), task).differences == ()
    build(task, folder / "plain", CONFIG)
    text = (folder / "plain" / MANIFEST).read_text()
    assert "preconditioner" not in text and "second_moments" not in text
    torch.save({name: v / (1 - 0.999**3) for name, v in named.items()}, folder / "by name.pt")
    other = toy_task(folder, folder / "by name.pt")
    build(other, folder / "named", ADAM)
    one, two = (InfluenceIndex.open(folder / name, t, device="cpu") for name, t in (("out", task), ("named", other)))
    assert one.view().take(range(10)) == pytest.approx(two.view().take(range(10)), rel=1e-5, abs=1e-6)


def test_the_audit_compares_weighted_rows(trained, monkeypatch):
    folder, *_ = trained
    monkeypatch.setattr(GradientEngine, "scale", lambda engine, grad_P: grad_P)
    with pytest.raises(GradientProofError, match=r"^row \d .* differs from plain autograd"):
        build(toy_task(folder, folder / "optimizer.pt"), folder / "out", ADAM)


def test_other_moments_or_another_preconditioner_are_rejected(trained):
    folder, named, _ = trained
    task = toy_task(folder, folder / "optimizer.pt")
    build(task, folder / "out", ADAM)
    other = toy_task(folder, lambda: {name: value + 1 for name, value in named.items()})
    with pytest.raises(
        IndexMismatchError, match="second moments of digest .* at checkpoint 0, the task has .*; restore"
    ):
        InfluenceIndex.open(folder / "out", other, device="cpu").query([0])
    for kind in ("trackstar", "none"):
        expected = f"preconditioner adam, this task has {kind}; pass --preconditioner adam or build"
        with pytest.raises(IndexMismatchError, match=expected):
            build(task, folder / "out", replace(CONFIG, preconditioner=kind))


def test_moments_that_change_while_an_index_is_open_are_rejected(trained):
    folder, named, optimizer = trained
    task = toy_task(folder, folder / "optimizer.pt")
    build(task, folder / "out", ADAM)
    index = InfluenceIndex.open(folder / "out", task, device="cpu")
    first = index.query([0])[0].proponents[0].score
    assert index.query([0])[0].proponents[0].score == pytest.approx(first, rel=1e-6)
    state = optimizer.state_dict()
    for kept in state["state"].values():
        kept["exp_avg_sq"] = kept["exp_avg_sq"] + 1
    torch.save(state, folder / "other.pt")
    (folder / "other.pt").replace(folder / "optimizer.pt")
    with pytest.raises(IndexMismatchError, match="second moments of digest"):
        index.query([0])


def test_a_parameter_of_rate_0_needs_no_moments(trained):
    folder, named, _ = trained
    first = {name: value for name, value in named.items() if name.startswith("first")}
    rates = {"first.*": 0.1, "second.*": 0.0}
    task = toy_task(folder, lambda: first, rates)
    build(task, folder / "out", ADAM)
    index = InfluenceIndex.open(folder / "out", task, device="cpu")
    assert explain(index, 1, 1).by_parameter["second.weight"] == 0 != explain(index, 1, 1).by_parameter["first.weight"]


def test_a_repaired_index_has_the_same_features(trained):
    folder, *_ = trained
    build(toy_task(folder, folder / "optimizer.pt"), folder / "out", ADAM)
    (file,) = (folder / "out" / FEATURES).glob("*.h5")
    before = file.read_bytes()
    file.write_bytes(before[:-100])
    repair(folder / "out", toy_task(folder, folder / "optimizer.pt"), device="cpu")
    assert file.read_bytes() == before and verify(folder / "out").damage == ()


@pytest.mark.parametrize(("memory_bytes", "n_reads"), [(1 << 20, 2), (0, 6)])
def test_an_open_index_keeps_the_weights_that_fit_its_memory(trained, monkeypatch, memory_bytes, n_reads):
    """The check of the task reads the moments of both checkpoints once more."""
    folder, *_ = trained
    torch.save({name: value + 1 for name, value in Toy().state_dict().items()}, folder / "first.pt")
    given = {"second_moments": folder / "optimizer.pt"}
    checkpoints = [Checkpoint(folder / f"{name}.pt", 0.1, **given) for name in ("first", "last")]
    task = make_toy_task(folder, Toy(), checkpoints=checkpoints)
    build(task, folder / "out", ADAM)
    reads = []

    def read(*given):
        reads.append(given)
        return read_second_moments(*given)

    monkeypatch.setattr("tracin_ann.features.loaded_model.read_second_moments", read)
    index = InfluenceIndex.open(folder / "out", task, device="cpu", memory_bytes=memory_bytes)
    scores = [index.query([1])[0].proponents[0].score for _ in range(3)]
    assert scores[1:] == pytest.approx([scores[0]] * 2, rel=1e-6)
    assert len(reads) - 2 == n_reads


def without(named, name):
    return {other: value for other, value in named.items() if other != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: None, "last.pt has no second moments: got a preconditioner and second_moments=None, expected"),
        (lambda named: "nowhere.pt", "second moments nowhere.pt cannot be read: got no file, expected the state"),
        (lambda named: lambda: {}, "has no second moments: got dict of 0 entries, expected the state dict"),
        (lambda named: lambda: [{}, {}], "has no second moments: got list of 2 entries, expected"),
        (
            lambda named: lambda: without(named, "first.bias"),
            "has no second moment of parameter first.bias: got no entry, expected shape [6]",
        ),
        (
            lambda named: lambda: {**named, "first.bias": torch.ones(7)},
            "has no second moment of parameter first.bias: got shape [7], expected shape [6]",
        ),
        (
            lambda named: lambda: {name: -value for name, value in named.items()},
            "the second moment of parameter first.weight cannot be used: got entries from -",
        ),
        (
            lambda named: lambda: {**named, "first.bias": torch.full((6,), torch.inf)},
            "the second moment of parameter first.bias cannot be used: got entries from inf to inf, ε = 1e-08",
        ),
        (
            lambda named: torch.optim.Adam(named.values(), lr=1).state_dict,
            "has no second moment of parameter first.weight: got no entry, expected shape [6, 5]; exclude it",
        ),
        (
            lambda named: torch.optim.SGD(Toy().parameters(), momentum=0.9).state_dict,
            "has no second moment of parameter first.weight: got no entry",
        ),
        (
            lambda named: lambda: {"param_groups": [{"params": [0], "lr": 1}], "state": {0: {"momentum": 1}}},
            "the order of the parameters in the second moments of checkpoint",
        ),
        (
            lambda named: torch.optim.Adam([{"params": [p]} for p in Toy().parameters()]).state_dict,
            "is not known: got 4 parameters without names in 4 groups, expected the model's 4 trainable parameters in",
        ),
    ],
)
def test_moments_that_cannot_be_used_are_rejected_in_one_line(trained, change, message):
    folder, named, _ = trained
    with pytest.raises(CheckpointError) as caught:
        build(toy_task(folder, change(named)), folder / "out", ADAM)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def test_an_unknown_preconditioner_is_rejected():
    with pytest.raises(
        UsageError, match="^bad --preconditioner: got 'sgd', expected none or adam or trackstar; change"
    ):
        BuildConfig(preconditioner="sgd")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_the_moments_of_a_trainer_run_have_the_names_of_their_parameters(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    small = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0}
    model = {
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**small)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, tie_word_embeddings=True)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=8)
        ),
    }[kind]()
    ids = torch.randint(1, 20, (12, 6), generator=torch.Generator().manual_seed(1))
    labels = [int(row[0]) % 2 for row in ids] if kind == "bert" else list(ids)
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=4,
        save_steps=4,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    moments = {name: trainer.optimizer.optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    given = Checkpoint(tmp_path, 0.1, second_moments=tmp_path / "checkpoint-4" / "optimizer.pt")
    found = read_second_moments(given, model, list(moments), list(moments))
    assert all(torch.equal(found[name].value, moment) for name, moment in moments.items())
    assert {moment.correction for moment in found.values()} == {1 - 0.999**4}
    assert {moment.eps for moment in found.values()} == {1e-8}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_task_of_a_trainer_run_has_its_second_moments(tmp_path):
    pytest.importorskip("transformers")
    trainer_runs = pytest.importorskip("trainer_runs")
    records = trainer_runs.train("gpt2", tmp_path / "run").records
    task = Task.from_transformers(tmp_path / "run", records)
    build(task, tmp_path / "out", replace(ADAM, dim=64))
    scores = np.zeros((2, len(records)))
    for answer in InfluenceIndex.open(tmp_path / "out", task, device="cpu").query(range(2), options=EVERY):
        for hit in (*answer.proponents, *answer.opponents):
            scores[answer.query, hit.row] = hit.score
    expected = np.zeros_like(scores)
    for checkpoint in task.checkpoints:
        model = task.model()
        task.load(model, str(checkpoint.path))
        named = dict(model.named_parameters())
        moments = read_second_moments(checkpoint, model, list(named), list(named)).values()
        weight_P = torch.cat([m.denominator(torch.float64, torch.device("cpu")).rsqrt() for m in moments])
        data = task.train_data()
        rows = [data[i] for i in range(len(data))]
        weighted = oracle.gradients(model, task.loss, rows, list(named), task.collate) * weight_P
        expected += checkpoint.learning_rate * (weighted[:2] @ weighted.T).numpy()
    assert_close(scores, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_adapter_of_a_trainer_run_has_its_second_moments(tmp_path):
    """The optimizer of a Trainer has the adapter's parameters in the order of the model that PEFT makes."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    trainer_runs = pytest.importorskip("trainer_runs")
    base = tmp_path / "base"

    def add_adapter(plain):
        plain.save_pretrained(base)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(type(plain).from_pretrained(base), config)

    trained = trainer_runs.train("llama", tmp_path / "run", change=add_adapter, learning_rate=0.05)
    task = Task.from_transformers(trained.folder, trained.records)
    build(task, tmp_path / "out", replace(ADAM, dim=64))
    scores = np.zeros((2, len(trained.records)))
    for answer in InfluenceIndex.open(tmp_path / "out", task, device="cpu").query(range(2), options=EVERY):
        for hit in (*answer.proponents, *answer.opponents):
            scores[answer.query, hit.row] = hit.score
    expected = np.zeros_like(scores)
    for checkpoint, folder in zip(task.checkpoints, sorted(trained.folder.glob("checkpoint-*")), strict=True):
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        model = peft.PeftModel.from_pretrained(plain, folder, is_trainable=True, autocast_adapter_dtype=False).double()
        parameters = [p for p in model.eval().parameters() if p.requires_grad]
        state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        kept = [state[i] for i in range(len(parameters))]
        moments = [own["exp_avg_sq"].double() / (1 - 0.999 ** float(own["step"])) for own in kept]
        weight_P = torch.cat([moment.sqrt().add(1e-8).rsqrt().flatten() for moment in moments])
        rows = []
        for row in trained.encoded:
            loss = model(**row).loss * (row["labels"].numel() - 1)
            rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]))
        weighted = torch.stack(rows) * weight_P
        expected += checkpoint.learning_rate * (weighted[:2] @ weighted.T).numpy()
    assert_close(scores, expected, 1e-4)
