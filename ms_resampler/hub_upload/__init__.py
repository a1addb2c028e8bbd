"""From a checkpoint folder to one that a stranger can load: staging, and later publishing."""
