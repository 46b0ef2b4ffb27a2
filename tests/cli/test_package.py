"""The wheel, the two commands of the README, and the tools that keep the code in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_works_outside_the_repository(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*install, str(ROOT)], check=True, capture_output=True, text=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    code = "import mergelab.cli.main as m; print(m.CONF)"
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


def test_no_host_names_in_the_files_that_install() -> None:
    for name in ("pyproject.toml", "constraints.txt", ".ci/run"):
        assert not re.search(r"https?://|--index|find-links", (ROOT / name).read_text(encoding="utf-8")), name
