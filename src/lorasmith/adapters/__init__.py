"""LoRA on a module, by peft. Never: data, families, training."""
