"""Use a trained model: load, generate, evaluate."""
