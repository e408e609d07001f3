"""The source checkpoint: its files read safely, its LoRA, and the model computed plainly."""
