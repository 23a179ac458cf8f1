"""Write the page of the command line from the commands' help."""

from pathlib import Path

from netfission.cli import COMMANDS, command_parser

PAGE = Path(__file__).parent / "reference" / "commands.md"


def main() -> None:
    """Write `reference/commands.md`."""
    parts = [
        "# Command line\n\nEvery command has `--help`. "
        "Commands with many settings also read them from a YAML file, by `--config`."
    ]
    for name in COMMANDS:
        text = command_parser(name).format_help().strip()
        parts.append(f"## netfission {name}\n\n```text\n{text}\n```")
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
