"""Run folders of the Trainer: tiny models of five kinds, trained for a few updates with warm-up and cosine decay."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from runs import collect_scores
from tracin_ann import InfluenceIndex

WORDS = [f"w{i}" for i in range(30)]
ROWS, UPDATES, SAVE_EVERY = 12, 6, 2


@dataclass
class Run:
    """A trained run.

    Attributes:
        folder: the output_dir.
        records: raw rows, as a user has them.
        encoded: the model's inputs of each row, a batch of one with labels, made without the library.
        at_save: the rate of the scheduler when each checkpoint was saved, by step.
        used: the rate of each update, from 1.
    """

    folder: Path
    records: list[dict[str, Any]]
    encoded: list[dict[str, Any]]
    at_save: dict[int, float] = field(default_factory=dict)
    used: list[float] = field(default_factory=list)


def make_tokenizer(folder: Path) -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=16,
    )
    fast.save_pretrained(folder)
    return fast


def write_texts(n_rows: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (n_rows,), generator=generator).tolist()
    return [" ".join(WORDS[int(i)] for i in torch.randint(0, 30, (n,), generator=generator)) for n in lengths]


def _size(**changes: int) -> dict[str, int]:
    return {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, **changes}


def make_model(name: str) -> Any:
    vocabulary = len(WORDS) + 5
    torch.manual_seed(0)
    if name == "bert":
        names = {"id2label": {0: "bad", 1: "fine", 2: "good"}, "label2id": {"bad": 0, "fine": 1, "good": 2}}
        config = tf.BertConfig(vocab_size=vocabulary, max_position_embeddings=32, pad_token_id=0, **_size(), **names)
        return tf.BertForSequenceClassification(config)
    if name == "gpt2":
        config = tf.GPT2Config(
            vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=3
        )
        return tf.GPT2LMHeadModel(config)
    if name == "llama":
        config = tf.LlamaConfig(vocab_size=vocabulary, max_position_embeddings=32, num_key_value_heads=1, **_size())
        return tf.LlamaForCausalLM(config)
    if name == "t5":
        config = tf.T5Config(
            vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        return tf.T5ForConditionalGeneration(config)
    assert name == "vit"
    return tf.ViTForImageClassification(tf.ViTConfig(image_size=8, patch_size=4, num_labels=3, **_size()))


def make_rows(name: str, tokenizer: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return raw records, and for each a batch of one with labels."""
    if name == "vit":
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(ROWS, 3, 8, 8, generator=generator)
        records = [{"pixel_values": image.numpy(), "label": i % 3} for i, image in enumerate(images)]
        return records, [
            {"pixel_values": image[None], "labels": torch.tensor([i % 3])} for i, image in enumerate(images)
        ]
    texts, targets = write_texts(ROWS, 1), write_texts(ROWS, 2)
    encoded = [dict(tokenizer(text, return_tensors="pt")) for text in texts]
    if name == "bert":
        labels = ["bad", "fine", "good"]
        records = [{"text": text, "label": labels[i % 3]} for i, text in enumerate(texts)]
        return records, [{**each, "labels": torch.tensor([i % 3])} for i, each in enumerate(encoded)]
    for each in encoded:
        each.pop("token_type_ids", None)
    if name == "t5":
        records = [{"text": text, "target": target} for text, target in zip(texts, targets, strict=True)]
        return records, [
            {**each, "labels": tokenizer(target, return_tensors="pt")["input_ids"]}
            for each, target in zip(encoded, targets, strict=True)
        ]
    return [{"text": text} for text in texts], [{**each, "labels": each["input_ids"].clone()} for each in encoded]


def pad_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate single rows, padded on the right."""
    batch = {}
    for name, first in rows[0].items():
        tensors = [torch.as_tensor(row[name]) for row in rows]
        value = -100 if name == "labels" else 0
        is_sequence = first.dim() == 1
        batch[name] = (
            torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
            if is_sequence
            else torch.stack(tensors)
        )
    return batch


def train(
    name: str,
    folder: Path,
    callbacks: Sequence[Any] = (),
    change: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Run:
    """Train a model of a kind by the Trainer, and record the rates of its scheduler and optimizer.

    Args:
        name: bert, gpt2, llama, t5 or vit.
        folder: the output_dir.
        callbacks: of the Trainer.
        change: changes the model before training; may return another one.
        options: of TrainingArguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = None if name == "vit" else make_tokenizer(folder)
    records, encoded = make_rows(name, tokenizer)
    run = Run(folder, records, encoded)

    class Recorder(tf.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.at_save[state.global_step] = kwargs["lr_scheduler"].get_last_lr()[0]

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.used.append(kwargs["optimizer"].param_groups[0]["lr"])

    model = make_model(name)
    if change is not None:
        model = change(model) or model
    settings = {
        "max_steps": UPDATES,
        "save_steps": SAVE_EVERY,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        **options,
    }
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
        **settings,
    )
    trainer = tf.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{key: value[0] for key, value in each.items()} for each in encoded],
        data_collator=pad_rows,
        callbacks=[Recorder(), *callbacks],
    )
    # The progress of the Trainer is printed to stdout.
    trainer.remove_callback(tf.PrinterCallback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return run


def exact_scores(index: InfluenceIndex) -> np.ndarray:
    """Return the TracIn scores [N, N] of all pairs of rows of an index of a run."""
    return collect_scores(index, ROWS, ROWS, score="tracin")


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
