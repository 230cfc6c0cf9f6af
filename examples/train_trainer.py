"""Fine-tune a classifier from a quantized directory with the plain Trainer of transformers.

    loftq quantize sentence-transformers/all-MiniLM-L6-v2 --bits 2 --rank 16 --output minilm-2bit
    python examples/train_trainer.py minilm-2bit reviews.jsonl --output reviews-adapter

A line of reviews.jsonl is {"text": "…", "label": 0}. Only `import loftq` and `load_start` are new; the rest is what
one writes for any model.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import loftq  # lets from_pretrained read the directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="made by `loftq quantize`")
    parser.add_argument("rows", help="JSON lines with text and label")
    parser.add_argument("--output", default="adapter")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    rows = load_dataset("json", data_files=options.rows, split="train")
    labels = max(rows["label"]) + 1
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), remove_columns="text")

    model = AutoModelForSequenceClassification.from_pretrained(options.directory, num_labels=labels)
    model = loftq.load_start(model, options.directory)  # the adapters, and the new head beside them
    model.print_trainable_parameters()

    arguments = TrainingArguments(
        output_dir=f"{options.output}-checkpoints",
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=32,
        logging_steps=10,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.model_accepts_loss_kwargs = False  # with several processes, transformers 5.23 would multiply the loss
    trainer.train()
    model.save_pretrained(options.output)  # the adapter with the head; PeftModel.from_pretrained puts it on again
    print(f"loss {trainer.state.log_history[-1]['train_loss']:.4f}; saved to {options.output}")


if __name__ == "__main__":
    main()
