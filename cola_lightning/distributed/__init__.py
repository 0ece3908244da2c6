"""Strategies, sharding, precision, and agreement between ranks."""
