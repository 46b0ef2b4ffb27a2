"""The command line: what was typed becomes a `Run`, what goes wrong one short message and an exit status: 0
done, 1 a step failed, 2 the input was wrong, 130 interrupted.

`composition` composes and `execution` executes, as they do for the Python API. Nothing heavy is imported
here: `--help` and `--cfg` must answer at once.
"""

import atexit
import gc
import os
import sys
import warnings
from pathlib import Path

from mergelab import __version__


def _help_wanted(arguments: list[str]) -> bool:
    return any(a in ("--help", "-h") for a in arguments)


def _config_dirs(arguments: list[str]) -> list[Path]:
    """The user's own folders of groups, as given with --config-dir."""
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    known, _ = parser.parse_known_args(arguments)
    return [Path(known.config_dir)] if known.config_dir else []


def _show_help(arguments: list[str]) -> None:
    from omegaconf import DictConfig, OmegaConf

    from mergelab.cli import help as page
    from mergelab.core.conf_dir import CONF

    defaults = OmegaConf.load(CONF / "config.yaml").defaults
    chosen = {str(k): str(v) for d in defaults if isinstance(d, DictConfig) for k, v in d.items()}
    page.show([*_config_dirs(arguments), CONF], chosen)


def monitor() -> None:
    """`mergelab-monitor [FOLDER] [--once] [monitor.KEY=VALUE ...]`: the command with job=monitor."""
    words = {"--once": "monitor.once=true"}
    given = [
        words.get(a, a if "=" in a or a.startswith("-") else f"monitor.folder='{a}'") for a in sys.argv[1:]
    ]
    sys.argv[1:] = ["job=monitor", *given]
    main()


def main() -> None:
    """Run the command line and exit with its status."""
    # Python searches what torch and its kin have imported for garbage, again and again while they are
    # imported and once more at the end: 0.6 s for nothing.
    gc.set_threshold(50_000, 20, 50)
    atexit.register(gc.freeze)
    arguments = sys.argv[1:]
    if "--version" in arguments:
        print(f"mergelab {__version__}")
        sys.exit(0)
    if _help_wanted(arguments):
        _show_help(arguments)
        sys.exit(0)
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    """Compose and run; returns the exit status."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from mergelab import composition
    from mergelab.cli.hydra_app import run_hydra
    from mergelab.cli.reporting import report
    from mergelab.core.errors import InputError, MergelabError

    debugging = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra prints a traceback and exits with 1 unless it is asked to raise.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")  # but in a run's log
    try:
        composition.register(next(map(str, _config_dirs(arguments)), None))
    except InputError as e:  # a file in the user's folder
        return report(e)
    try:
        run_hydra()
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as e:  # while composing
        if debugging:
            raise
        return report(e)
    except (MergelabError, KeyboardInterrupt) as e:
        return report(e)
    return 0
