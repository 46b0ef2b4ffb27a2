"""What every part of mergelab stands on: errors, findings, files, hashes, the log of a run, the heartbeat."""
