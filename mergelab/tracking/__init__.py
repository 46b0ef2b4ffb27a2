"""Recording runs in Weights & Biases."""
