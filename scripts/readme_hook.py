"""Make the package's description of README.md: outside the repository its relative links lead nowhere.

With a `Repository` among `[project.urls]` they become links into it, without one they become plain text.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^]]*)\]\((?!https?:|#)([^)]+)\)")


def describe(readme: str, repository: str | None) -> str:
    """The README with every relative link led into `repository`, whose paths are those of GitHub and GitLab."""

    def lead(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if repository is None:
            return text
        return f"{image}[{text}]({repository.rstrip('/')}/{'raw' if image else 'blob'}/HEAD/{target})"

    return LINK.sub(lead, readme)


class CustomMetadataHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = describe(readme, metadata["urls"].get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
