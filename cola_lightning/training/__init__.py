"""The LightningModule, and what surrounds a training step: accumulation, clipping, validation, stopping, resuming."""
