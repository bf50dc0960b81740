"""The lines and the findings of one preflight."""

from rlhf_recipes.console import print_lines
from rlhf_recipes.preflight.finding import Finding


class Report:
    """Collect the lines and the findings of one preflight."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}
        self.findings: list[Finding] = []

    def write(self, title: str) -> None:
        """Print the lines as a block, and the findings below it."""
        block = [f"  {name:<12}{text}" for name, text in self.lines.items()]
        found = [f"{finding.level.capitalize()}: {finding.message}" for finding in self.findings]
        print_lines(title, *block, *found)

    @property
    def errors(self) -> list[str]:
        """Return the messages of the errors."""
        return [finding.message for finding in self.findings if finding.level == "error"]
