"""LoRA: fine-tune a small Llama with an adapter by the Trainer, and find the training passages behind test passages.

`python examples/lora_run.py --data DIR` takes a minute; DIR holds tinyshakespeare.txt, or the input.txt of the
char-rnn download. It needs `pip install 'tracin-ann[peft]' accelerate`. The base model is trained on most of the text,
the adapter on other passages. To query the index afterwards: `python query.py runs/lora/1000-rows/index --ids 0-4`; to
build an index: `python build_index.py --task examples/lora_run.py:task --task-arg data=DIR
--task-arg out=runs/lora/1000-rows --out runs/lora/1000-rows/index`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from tracin_ann import InfluenceIndex, QueryOptions, Task, build
from tracin_ann.report import write_report

Row = dict[str, Any]  # text: LENGTH characters; place: their offset in the text

# The task: the definition that an index is built from. It is read from the folder of the run.

ROWS, LENGTH, WIDTH, RATE = 1000, 64, 64, 5e-3
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def task(data: str, out: str = "runs/lora/1000-rows", rows: str = str(ROWS)) -> Task:
    _, train_rows, test_rows = read(data, int(rows))
    return Task.from_transformers(f"{out}/run", train_rows, test_rows, base=f"{out}/base")


# Its data, training, building the index, queries.


def read(data: str, rows: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Return passages spread over the first 80% of the text, over the next 15%, and 50 of the last 5%."""
    found = [path for name in ("tinyshakespeare.txt", "input.txt") if (path := Path(data) / name).is_file()]
    if not found:
        raise SystemExit(f"no tinyshakespeare.txt or input.txt in {data}")
    text = found[0].read_text(encoding="utf-8")
    ends = [len(text) * percent // 100 for percent in (0, 80, 95, 100)]

    def spread(part: int, n: int) -> list[Row]:
        places = torch.linspace(ends[part], ends[part + 1] - LENGTH, n).long().tolist()
        return [{"text": text[place : place + LENGTH], "place": place} for place in places]

    return spread(0, 8 * rows), spread(1, rows), spread(2, 50)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters."""
    characters = {character: place for place, character in enumerate(("<pad>", *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=LENGTH)


def run_trainer(model: Any, rows: list[Row], folder: str, epochs: int) -> Trainer:
    """Train, and save a checkpoint after each epoch in folders `checkpoint-STEP`."""
    tokenizer = make_tokenizer()
    encoded = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(row["text"])["input_ids"] for row in rows)]
    settings = TrainingArguments(
        output_dir=folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        save_strategy="epoch",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        log_level="error",
        seed=0,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=encoded, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def train(data: str, out: str, rows: int) -> int:
    """Train the base model and an adapter, and return the number of parameters of the adapter."""
    base_rows, train_rows, _ = read(data, rows)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(CHARACTERS) + 1, max_position_embeddings=LENGTH, pad_token_id=0, **sizes)
    run_trainer(LlamaForCausalLM(config), base_rows, f"{out}/base-run", 1).save_model(f"{out}/base")
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(f"{out}/base"), adapter)
    run_trainer(model, train_rows, f"{out}/run", 4)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the text")
    parser.add_argument("--out", default="runs/lora", help="directory for runs, index and report")
    parser.add_argument("--rows", type=int, default=ROWS, help="passages to train the adapter on")
    options = parser.parse_args(arguments)
    out = f"{options.out}/{options.rows}-rows"

    n_parameters = train(options.data, out, options.rows)
    print(f"trained an adapter of {n_parameters:,} parameters on {options.rows:,} passages of {LENGTH} characters")

    named = {"data": str(Path(options.data).resolve()), "out": out, "rows": str(options.rows)}
    build(f"{Path(__file__)}:task", f"{out}/index", arguments=named)
    index = InfluenceIndex.open(f"{out}/index")
    answers = index.query([0, 20, 40], options=QueryOptions(k=3, rerank="exact", candidates=50))
    for answer in answers:
        print(f"\n{answer.query}: {show(index, 'query', answer.members[0])}")
        for hit in answer.hits:
            print(f"  {hit.score:+.4f} {hit.id:>5}: {show(index, 'train', hit.row)}")
    print(f"\nreport: {write_report(answers, f'{out}/report.html', index, 'Training passages of a LoRA adapter')}")


def show(index: InfluenceIndex, side: Any, row: int) -> str:
    """Return the text of a row in one line."""
    return str(index.describe(side, row).text).replace("\n", " / ")


if __name__ == "__main__":
    main()
