"""Writes the page of the command line, from the commands' own help."""

from pathlib import Path

from netfission.cli import COMMANDS, parser

PAGE = Path(__file__).parent / "reference" / "commands.md"


def main() -> None:
    """Write `reference/commands.md`."""
    parts = [
        "# Command line\n\nEvery command takes `--help`; those of many settings also a file, by `--config`."
    ]
    parser()  # as the command does: a fault in any of them shows here
    for name, command in COMMANDS.items():
        own = command.parser()
        own.prog = f"netfission {name}"
        parts.append(f"## netfission {name}\n\n```text\n{own.format_help().strip()}\n```")
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
