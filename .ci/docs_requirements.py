"""Print the packages of the extra `docs`, one a line: the site needs none of the others."""

import re
from pathlib import Path

text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
extra = re.search(r"^docs = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
assert extra, "pyproject.toml has no extra docs"
print("\n".join(re.findall(r'"([^"]+)"', extra[1])))
