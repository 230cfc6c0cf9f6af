"""LoRA on packed layers: loading the initialization, and which PEFT methods work."""
