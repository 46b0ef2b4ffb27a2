"""Where runs are recorded besides their own folder."""

from dataclasses import dataclass, field
from typing import List, Optional


@dataclass
class Tracking:
    """Where runs are recorded besides their own folder."""

    name: str = "none"
    """`none` or `wandb`."""
    project: str = "mergelab"
    """WANDB_PROJECT stands in for this default."""
    entity: Optional[str] = None
    group: Optional[str] = None
    tags: List[str] = field(default_factory=list)
    mode: str = "auto"
    """`online`, `offline`, or `auto`: online where there is a key and the server answers."""
    timeout: float = 5.0
    """Seconds to wait for the server before going offline."""
    sync: bool = False
    """When all is done, upload what nodes without internet have recorded offline. (slurm)"""
