"""Pairs in, adapters out: the pair table, caches, objectives and the trainer."""
