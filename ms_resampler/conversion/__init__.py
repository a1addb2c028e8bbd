"""Other checkpoints to ours and back: names as tables, weights streamed from shard to shard."""
