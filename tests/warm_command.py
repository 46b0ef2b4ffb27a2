"""The command, each time a fork of this process: `FOLDER CODE ARGUMENTS...` are the working directory, Python
to be run ahead of it, and what is typed. Its own arguments are modules to be imported besides.

What the hub's client has read of its environment it reads again; nothing else that looks at the
environment when it is imported may be imported here.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys

import huggingface_hub.constants
import mergekit.merge_methods  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
from forks import serve

import mergelab.cli.hydra_app  # noqa: F401
from mergelab.cli.main import main
from mergelab.jobs import STEPS

if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    STEPS.load()
    gc.freeze()
    if arguments := serve():
        folder, code, *typed = arguments
        importlib.reload(huggingface_hub.constants)
        os.chdir(folder)
        exec(code)
        sys.argv = ["mergelab", *typed]
        main()
