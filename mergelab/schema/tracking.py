"""Where runs are recorded besides their own folder."""

from dataclasses import dataclass, field
from typing import List, Optional

from mergelab.schema.fields import NoEffect, limited, one_of, setting


@dataclass
class Tracking:
    """Where runs are recorded besides their own folder."""

    name: str = one_of("none", "wandb")
    """`none` or `wandb`."""
    project: str = "mergelab"
    """The environment variable WANDB_PROJECT replaces this default."""
    entity: Optional[str] = None
    group: Optional[str] = None
    tags: List[str] = field(default_factory=list)
    mode: str = one_of("auto", "online", "offline")
    """`online`, `offline`, or `auto`: online where there is a key and the server answers."""
    timeout: float = limited(5.0, above=0)
    """Seconds to wait for the server before going offline."""
    sync: bool = setting(
        False,
        no_effect=[
            NoEffect(
                "without a cluster, because this machine uploads what it records by itself",
                lambda run: not run.hardware.on_cluster,
            )
        ],
    )
    """At the end, upload what nodes without internet have recorded offline. (slurm)"""
