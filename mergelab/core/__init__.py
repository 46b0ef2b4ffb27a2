"""What every part of mergelab stands on: errors, findings, files, hashes, the log of a run, the heartbeat."""

import logging

logging.getLogger("mergelab").addHandler(logging.NullHandler())  # without a handler, logging prints warnings
