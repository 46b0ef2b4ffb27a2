"""What a heavy library says about a model's metadata, remembered on the disk.

To ask transformers takes seconds, nearly all of it for importing torch. The answer depends on a config and on
headers alone, so a second plan of the same models takes it from the cache folder and imports neither.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergelab.core import cache_dir
from mergelab.core.hashing import digest, folder_stamp
from mergelab.core.run_dir import read_memo, write_json

log = logging.getLogger(__name__)

LIBRARIES = ("transformers", "torch", "mergekit")
FOLDER = "answers"


def remembered(question: str, about: Any, answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer to a question, from the cache or newly computed.

    Args:
        question: its name, such as `tensors`.
        about: everything that the answer depends on besides the libraries' versions and the code of its
            package, as a value that JSON can write.
        answer: computes it; the result has to survive JSON. What it raises is not remembered.
    """
    code = sys.modules[answer.__module__].__file__ or ""
    depends = [question, about, [version(n) for n in LIBRARIES], folder_stamp(Path(code).parent)]
    file = cache_dir.home() / FOLDER / f"{digest(depends)}.json"
    if known := read_memo(file).get("answer"):
        return dict(known)
    found = answer()
    try:
        write_json(file, {"question": question, "answer": found})
    except OSError as e:  # a cache folder that cannot be written costs time, nothing else
        log.warning("cannot write %s: %s", file, e.strerror)
    return found
