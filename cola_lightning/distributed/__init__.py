"""Strategies, precision and what several processes have to agree on."""
