"""The data of the tasks beside this file. A copy of it lies in each folder of tasks.

lm_eval calls `load` for a task whose YAML says `custom_dataset: !function local_data.load`. Its
usual way, the `json` builder of datasets, wants absolute paths and keeps copies in another cache;
this one works wherever the folder is moved and writes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset, DatasetDict


def load(file: str, **_metadata: object) -> DatasetDict:
    """The JSON lines of `file` as the split `test`."""
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return DatasetDict({"test": Dataset.from_list(rows)})
