"""Traffic with the hub: checkpoints to this machine, finished models from it."""
