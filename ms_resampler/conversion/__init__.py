"""Converts other checkpoints to ours and back: tables map names, and weights are streamed shard by shard."""
