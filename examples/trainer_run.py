"""A run of the Hugging Face Trainer: a small BERT on film reviews (SST-2), from its run folder to queries in 3 lines.

`python examples/trainer_run.py --data DIR` takes a minute; DIR holds sst2_train.tsv and sst2_dev.tsv, or the train.tsv
and dev.tsv of the GLUE download (`sentence<TAB>label` per line). Needs the extras `transformers` and `examples`, and
accelerate. To query the index afterwards: `tracin-query runs/trainer/4000-rows/index --ids 0-4`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tracin_ann import InfluenceIndex, QueryOptions, Task, build
from tracin_ann.report import write_report

ROWS, EPOCHS, NAMES = 4000, 4, ("negative", "positive")
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


# The task: the run folder and the data are all that it needs.


def task(out: str) -> Task:
    # With the rates summed since the checkpoint before, the last one counts although its schedule has decayed to 0.
    return Task.from_transformers(f"{out}/run", f"{out}/train.jsonl", f"{out}/dev.jsonl", rates="sum")


# Training: any script that uses the Trainer.


def read(data: str, part: str) -> list[dict[str, str | int]]:
    found = [path for name in (f"sst2_{part}.tsv", f"{part}.tsv") if (path := Path(data) / name).is_file()]
    if not found:
        raise SystemExit(f"no sst2_{part}.tsv or {part}.tsv in {data}")
    lines = [line.rsplit("\t", 1) for line in found[0].read_text(encoding="utf-8").splitlines()]
    return [{"text": text.strip(), "label": int(label)} for text, label in lines if label in ("0", "1")]


def make_tokenizer(texts: list[str]) -> tf.PreTrainedTokenizerFast:
    """Return a tokenizer with one token for every word that occurs at least twice."""
    counts = Counter(word for text in texts for word in text.split())
    words = [*SPECIAL.values(), *(word for word, n in counts.items() if n > 1)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(name, words.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **SPECIAL)


def train(data: str, out: str, rows: int, layers: int = 2) -> float:
    """Train, save the data and a checkpoint after each epoch, and return the accuracy on the dev set."""
    records = {"train": read(data, "train")[:rows], "dev": read(data, "dev")}
    Path(out).mkdir(parents=True, exist_ok=True)
    for part, each in records.items():
        Path(f"{out}/{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
    tf.set_seed(0)
    tokenizer = make_tokenizer([str(row["text"]) for row in records["train"]])
    encoded = {
        part: [{**tokenizer(row["text"], truncation=True), "labels": row["label"]} for row in each]
        for part, each in records.items()
    }
    config = tf.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.1,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )
    arguments = tf.TrainingArguments(
        f"{out}/run",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=32,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        save_strategy="epoch",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = tf.Trainer(
        tf.BertForSequenceClassification(config),
        arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded["dev"],
        processing_class=tokenizer,
        data_collator=tf.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
    )
    trainer.remove_callback(tf.PrinterCallback)
    trainer.train()
    return float(trainer.evaluate()["eval_accuracy"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the sentences")
    parser.add_argument("--out", default="runs/trainer", help="directory for the run, index and report")
    parser.add_argument("--rows", type=int, default=ROWS, help="training sentences to use")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model")
    options = parser.parse_args(arguments)
    out = str(Path(f"{options.out}/{options.rows}-rows").resolve())

    accuracy = train(options.data, out, options.rows, options.layers)
    print(f"trained on {options.rows:,} sentences; dev accuracy {accuracy:.1%}")

    build(f"{Path(__file__)}:task", f"{out}/index", arguments={"out": out})
    index = InfluenceIndex.open(f"{out}/index")
    answers = index.query(range(3), options=QueryOptions(k=3, rerank="exact"))
    for answer in answers:
        print(f"\ndev sentence {answer.query}, {index.describe('query', answer.members[0]).text}")
        for hit in answer.hits:
            print(f"  {hit.score:+9.4f}  {index.describe('train', hit.row).text}")
    print(f"\nreport: {write_report(answers, f'{out}/report.html', index, 'Reviews behind three predictions')}")


if __name__ == "__main__":
    main()
