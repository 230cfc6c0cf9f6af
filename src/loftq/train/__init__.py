"""Fine-tuning: thin glue over Hugging Face Trainer and accelerate, one path for every method."""
