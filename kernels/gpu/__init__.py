"""Attention with Contextual Position Encoding on GPUs (Hopper), in Pallas Mosaic GPU."""
