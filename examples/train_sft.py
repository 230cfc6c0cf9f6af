"""Fine-tune a causal language model from a quantized directory with TRL's SFTTrainer.

    pip install trl
    loftq quantize org/model --bits 2 --rank 64 --output model-2bit
    python examples/train_sft.py model-2bit answers.jsonl --output answers-adapter

A line of answers.jsonl is {"prompt": "…", "completion": "…"}; {"messages": […]} works too, where the tokenizer has a
chat template.
"""

import argparse

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import loftq  # noqa: F401  # lets from_pretrained read the directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="made by `loftq quantize`")
    parser.add_argument("rows", help="JSON lines with prompt and completion, or messages")
    parser.add_argument("--output", default="adapter")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-length", type=int, default=512)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    model = AutoModelForCausalLM.from_pretrained(options.directory)  # packed layers, never a dense copy
    model = PeftModel.from_pretrained(model, options.directory, subfolder="loftq_init", is_trainable=True)

    arguments = SFTConfig(
        output_dir=f"{options.output}-checkpoints",
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        max_length=options.max_length,
        per_device_train_batch_size=4,
        logging_steps=10,
        use_cpu=not torch.accelerator.is_available(),
    )
    rows = load_dataset("json", data_files=options.rows, split="train")
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    model.save_pretrained(options.output)
    print(f"loss {trainer.state.log_history[-1]['train_loss']:.4f}; saved to {options.output}")


if __name__ == "__main__":
    main()
