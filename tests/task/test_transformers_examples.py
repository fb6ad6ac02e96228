"""Examples and losses of Hugging Face models: equal to the model's own loss, rows independent, masks fixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tracin_ann.errors import TaskError
from tracin_ann.task.integrations.architectures import KINDS, find_class, find_kind, make_model_from_config
from tracin_ann.task.integrations.examples import Columns, Describer, Encoder, Padding
from tracin_ann.task.integrations.losses import IGNORED, TOKEN_KINDS, make_loss

tf: Any = pytest.importorskip("transformers")
trainer_runs: Any = pytest.importorskip("trainer_runs", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
WORDS, CLASSES = 35, 3
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
SMALL_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
MULTI, SCORE = {"problem_type": "multi_label_classification"}, {"num_labels": 1}
Case = tuple[str, str, dict[str, Any], Callable[[Tensor, int], Tensor]]


def ignore_some(ids: Tensor, i: int) -> Tensor:
    return torch.where(torch.arange(len(ids)) % 3 == i % 3, IGNORED, ids % CLASSES)


# Architecture, config class, its settings, and the labels of row i.
CASES: dict[str, Case] = {
    "single label": ("BertForSequenceClassification", "BertConfig", BERT, lambda ids, i: torch.tensor(i % 3)),
    "several labels": (
        "BertForSequenceClassification",
        "BertConfig",
        BERT | MULTI,
        lambda ids, i: torch.tensor([1.0, 0.0, float(i % 2)]),
    ),
    "regression": (
        "BertForSequenceClassification",
        "BertConfig",
        BERT | SCORE,
        lambda ids, i: torch.tensor(0.3 * i),
    ),
    "decoder classifier": (
        "GPT2ForSequenceClassification",
        "GPT2Config",
        GPT2 | {"pad_token_id": 0},
        lambda ids, i: torch.tensor(i % 3),
    ),
    "tokens": ("BertForTokenClassification", "BertConfig", BERT, ignore_some),
    "masked": ("BertForMaskedLM", "BertConfig", BERT, lambda ids, i: torch.where(ids % 2 == 0, IGNORED, ids)),
    "causal": ("GPT2LMHeadModel", "GPT2Config", GPT2, lambda ids, i: ids.masked_fill(ids % 4 == 0, IGNORED)),
    "sequence to sequence": (
        "T5ForConditionalGeneration",
        "T5Config",
        SMALL_T5,
        lambda ids, i: (ids.flip(0) % 20 + 3)[: 1 + i],
    ),
}


def make_case(name: str) -> tuple[Any, Any, list[dict[str, Tensor]]]:
    """Return a model with random weights, its config, and examples of several lengths."""
    architecture, config_class, settings, make_labels = CASES[name]
    labels = {} if "num_labels" in settings else {"num_labels": CLASSES}
    config = getattr(tf, config_class)(vocab_size=WORDS, architectures=[architecture], **labels, **settings)
    model = make_model_from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    examples = []
    for i in range(6):
        ids = torch.randint(3, WORDS, (3 + i,))
        examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": make_labels(ids, i)})
    return model, config, examples


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_mean_loss_of_a_batch_of_one_is_the_models_own(name):
    model, config, examples = make_case(name)
    loss, _ = make_loss(find_kind(config), config, "mean")
    for example in examples:
        batch = Padding()([example])
        torch.testing.assert_close(loss(model, batch), model(**batch).loss.reshape(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_losses_of_a_batch_are_those_of_its_rows_alone(name):
    model, config, examples = make_case(name)
    loss, token_losses = make_loss(find_kind(config), config)
    together = loss(model, Padding()(examples))
    alone = torch.cat([loss(model, Padding()([example])) for example in examples])
    assert together.shape == (len(examples),)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (token_losses is not None) == (find_kind(config) in TOKEN_KINDS)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", ["tokens", "masked", "causal", "sequence to sequence"])
@torch.no_grad()
def test_losses_of_tokens_add_up_and_belong_to_the_tokens_that_are_predicted(name, reduction):
    model, config, examples = make_case(name)
    loss, token_losses = make_loss(find_kind(config), config, reduction)
    assert token_losses is not None
    batch = Padding()(examples)
    losses_BT = token_losses(model, batch)
    assert losses_BT.shape == batch["labels"].shape
    torch.testing.assert_close(losses_BT.sum(1), loss(model, batch))
    assert bool((losses_BT[batch["labels"] == IGNORED] == 0).all())
    if name == "causal":
        logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        counts_B = (batch["labels"][:, 1:] != IGNORED).sum(1)
        expected = -logits_BTV.log_softmax(-1)[0, 1, batch["input_ids"][0, 2]] / (
            counts_B[0] if reduction == "mean" else 1
        )
        is_counted = batch["labels"][0, 2] != IGNORED
        torch.testing.assert_close(losses_BT[0, 2], expected * is_counted)
        assert bool((losses_BT[:, 0] == 0).all())


def test_a_class_without_a_label_is_the_one_that_the_model_predicts():
    model, config, examples = make_case("single label")
    loss, _ = make_loss("sequence-classification", config)
    batch = Padding()(examples)
    predicted = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.argmax(1)
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    torch.testing.assert_close(loss(model, unlabelled), loss(model, {**batch, "labels": predicted}))
    assert bool((loss(model, unlabelled) > 0).all())


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return trainer_runs.make_tokenizer(tmp_path)


INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "labels"})


def test_masks_depend_on_the_tokens_and_the_seed_alone(tokenizer):
    config = tf.BertConfig(architectures=["BertForMaskedLM"])
    encoder = Encoder("masked-lm", config, INPUTS, tokenizer)
    texts = trainer_runs.write_texts(200, 5)
    rows = [encoder({"text": text}) for text in texts]
    plain = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]
    for text, row, ids in zip(texts, rows, plain, strict=True):
        again = encoder({"text": text, "position": 3})
        assert all(torch.equal(again[name], value) for name, value in row.items())
        chosen = row["labels"] != IGNORED
        assert int(chosen.sum()) >= 1
        assert not bool(chosen[0] | chosen[-1]), "special tokens are not masked"
        assert torch.equal(row["labels"][chosen], ids[chosen])
        assert torch.equal(row["input_ids"][~chosen], ids[~chosen])
    n_words = sum(len(ids) - 2 for ids in plain)
    chosen = torch.cat([row["labels"] != IGNORED for row in rows])
    ids = torch.cat([row["input_ids"] for row in rows])[chosen]
    assert 0.15 < float(chosen.sum()) / n_words < 0.4, "15% or at least one of a few words"
    assert 0.7 < float((ids == tokenizer.mask_token_id).float().mean()) < 0.9
    other = Encoder("masked-lm", config, INPUTS, tokenizer, seed=1)
    assert any(not torch.equal(other({"text": t})["labels"], r["labels"]) for t, r in zip(texts, rows, strict=True))


def test_labels_of_words_are_those_of_their_first_tokens(tokenizer):
    config = tf.BertConfig(architectures=["BertForTokenClassification"], id2label={0: "O", 1: "NAME"})
    encoder = Encoder("token-classification", config, INPUTS, tokenizer, columns=Columns("words", label="tags"))
    row = encoder({"words": ["w1", "w2 w3", "w4"], "tags": ["NAME", "O", 1]})
    assert row["labels"].tolist() == [IGNORED, 1, 0, IGNORED, 1, IGNORED]


def test_encoded_rows_keep_the_columns_that_the_model_takes(tokenizer):
    encoder = Encoder("causal-lm", tf.GPT2Config(), frozenset({"input_ids", "attention_mask", "labels"}), tokenizer)
    row = encoder({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "source": "book", "token_type_ids": [0, 0, 0]})
    assert {name: value.tolist() for name, value in row.items()} == {
        "input_ids": [5, 6, 0],
        "attention_mask": [1, 1, 0],
        "labels": [5, 6, IGNORED],
    }
    with pytest.raises(TaskError, match="column 'input_ids' of the data is not a list of numbers"):
        encoder({"input_ids": ["a"]})


def test_pairs_targets_and_truncation(tokenizer):
    pair = Encoder("sequence-classification", tf.BertConfig(), INPUTS, tokenizer, max_length=6)
    row = pair({"text": "w1 w2 w3", "text_pair": "w4 w5 w6", "label": "1"})
    assert len(row["input_ids"]) == 6
    assert row["labels"].item() == 1
    target = Encoder("seq2seq", tf.T5Config(), INPUTS - {"token_type_ids"}, tokenizer, columns=Columns(target="out"))
    row = target({"text": "w1", "out": "w2 w3"})
    assert row["labels"].tolist() == tokenizer("w2 w3")["input_ids"]
    shown = Describer(target)(row)
    assert (shown.text, list(shown.tokens or [])) == ("w1 -> w2 w3", ["[CLS]", "w2", "w3", "[SEP]"])
    with pytest.raises(TaskError, match="a row has no target: got columns text, expected 'out'"):
        target({"text": "w1"})


def test_pictures_are_processed_and_restored(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8},'
        ' "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    processor = tf.AutoImageProcessor.from_pretrained(tmp_path)
    config = tf.ViTConfig(image_size=8, patch_size=4, id2label={0: "red", 1: "blue"}, label2id={"red": 0, "blue": 1})
    encoder = Encoder("image-classification", config, frozenset({"pixel_values", "labels"}), None, processor)
    example = encoder({"image": image.new("RGB", (20, 10), (255, 0, 0)), "label": "red"})
    assert example["pixel_values"].shape == (3, 8, 8)
    torch.testing.assert_close(example["pixel_values"][:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    shown = Describer(encoder)(example)
    assert shown.text == "red"
    torch.testing.assert_close(shown.image[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(TaskError, match="a row has no image: got columns label"):
        encoder({"label": "red"})


def test_the_class_of_every_kind_is_found():
    names = {
        "sequence-classification": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
        "causal-lm": "LlamaForCausalLM",
        "seq2seq": "BartForConditionalGeneration",
        "image-classification": "ViTForImageClassification",
        "masked-lm": "BertForMaskedLM",
    }
    assert names.keys() == set(KINDS)
    for kind, name in names.items():
        config = getattr(tf, name.split("For")[0] + "Config")(architectures=[name])
        assert find_kind(config) == kind
        assert find_class(config).__name__ == name
        config.architectures = None
        assert find_class(config, kind).__name__ == name
