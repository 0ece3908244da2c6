"""What happens around a training step: Lightning's loops, resuming, validation."""
