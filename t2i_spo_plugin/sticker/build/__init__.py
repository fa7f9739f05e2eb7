"""Rebuilds what the sticker world ships: the atlas, the models, their reports. Each module is one resumable
command."""
