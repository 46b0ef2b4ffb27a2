"""What sets fine-tunes apart from their base and from each other: measured, streaming, before a merge."""
