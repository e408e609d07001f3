"""What measures and shows the project: synthetic films with known truth, a model trained on them, the demo."""
