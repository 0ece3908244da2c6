"""CoLA-M (arXiv 2502.10940): activation checkpointing that keeps the low-rank latents."""
