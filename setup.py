"""The description that an index shows, made of README.md; all else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def description(readme: str) -> str:
    """The README without what only a checkout has.

    An index shows a relative link as one that leads nowhere: pictures are left out, and of links
    the words are left. What is in code stays.
    """
    parts = re.split(r"(```.*?```)", readme, flags=re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"^!\[[^\]]*\]\((?!https?://)[^)]*\)\n+", "", parts[i], flags=re.M)
        parts[i] = re.sub(r"\[([^\]]*)\]\((?!https?://|#)[^)]*\)", r"\1", parts[i])
    return "".join(parts)


if __name__ == "__main__":
    setup(
        long_description=description(Path("README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
