"""LoRA on packed layers: the initialization that is loaded, and what PEFT may and may not do."""
