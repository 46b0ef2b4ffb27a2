"""What ends vLLM's groups of processes."""

import vllm


def cleanup_dist_env_and_memory() -> None:
    """Give everything back."""
    vllm.events.append("cleanup")
