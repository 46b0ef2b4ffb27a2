"""The wheel, the two commands of the README, and the tools that keep the code in order."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import mergelab

ROOT = Path(__file__).parents[2]
OPTIONAL = ("vllm", "bitsandbytes")
"""Packages of extras."""


def test_the_wheel_works_outside_the_repository(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*install, str(ROOT)], check=True, capture_output=True, text=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    code = "import mergelab.composition as m; print(m.CONF)"
    where = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(where.stdout.strip()) == tmp_path / "site" / "mergelab" / "conf"
    done = subprocess.run(
        [sys.executable, "-m", "mergelab", "experts=math_code", "method=slerp", "eval=none"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("outputs/*/*/model/model.safetensors"))
    assert (tmp_path / "site" / "bin" / "mergelab").exists()


def commands(readme: str) -> list[str]:
    """The two lines with which a README opens."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    return re.findall(r"<!-- (?:run|tests) -->\n```bash\n(.*)\n```", text)


def test_both_readmes_open_with_the_same_two_lines() -> None:
    assert len(commands("README.md")) == 2
    assert commands("README.md") == commands("README.ja.md")


def code_blocks(readme: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL)


def test_the_readmes_show_the_same_commands() -> None:
    assert code_blocks("README.md") == code_blocks("README.ja.md")


def imported(folder: Path) -> dict[str, str]:
    """The packages that the code imports, anywhere in it, each with a module that does."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            found |= {name.partition(".")[0]: file.name for name in names}
    return found


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def dependencies() -> set[str]:
    """What pyproject.toml declares."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.partition("\ndependencies = [\n")[2].partition("\n]")[0]
    return {normal(name) for name in re.findall(r"\"([A-Za-z0-9_.-]+)", block)}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    declared = dependencies()
    homes = packages_distributions()
    used = set()
    for package, file in imported(ROOT / "mergelab").items():
        if package in sys.stdlib_module_names or package in ("mergelab", *OPTIONAL):
            continue
        owners = {normal(name) for name in homes[package]}
        assert owners & declared, f"{file} imports {package}, and pyproject.toml does not declare it"
        used |= owners & declared
    assert declared - used == set(), "declared, and not imported"


def test_the_constraints_hold_every_declared_dependency() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert dependencies() <= {normal(n) for n in re.findall(r"^([A-Za-z0-9_.-]+)==", pinned, re.MULTILINE)}


def test_the_version_is_one_and_needs_no_tag() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {mergelab.__version__}\n" in citation
    assert f"\n## [{mergelab.__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_host_names_in_the_files_that_install() -> None:
    for name in ("pyproject.toml", "constraints.txt", ".ci/run"):
        assert not re.search(r"https?://|--index|find-links", (ROOT / name).read_text(encoding="utf-8")), name
