"""Experiments on the sticker world, each a command."""
