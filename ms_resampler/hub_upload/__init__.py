"""Publishing a checkpoint on the Hub: stage, inspect, card, publish."""
