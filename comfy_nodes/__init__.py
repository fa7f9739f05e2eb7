"""The home of the ComfyUI pack.

There are no nodes here yet, and therefore no ``NODE_CLASS_MAPPINGS``: ComfyUI will say that this folder holds none,
which is the truth. Until they come, an adapter in kohya layout works with ComfyUI's own ``Load LoRA`` node.
"""
