"""The parser that all commands share: flags with types, settings from YAML files, errors of one line."""

import inspect
import re
import sys
import textwrap
from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields
from functools import reduce
from operator import or_
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Any, Literal, NoReturn, Protocol, Union, get_args, get_origin, get_type_hints

from netfission.config import DataConfig, FissionConfig, MethodConfig, ModelConfig, RunConfig, TrainingConfig
from netfission.utils.errors import invalid
from netfission.utils.typed import PLAIN, typed

# The settings of a run, by the title of their group in a command's help.
PARTS = {
    "data": DataConfig,
    "model": ModelConfig,
    "fission": FissionConfig,
    "method": MethodConfig,
    "training": TrainingConfig,
}

OfFile = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]  # path and content → the settings that count

_NEGATIVE = re.compile(r"-\.?(\d|inf)")
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "{true,false}"}


class _Group(Protocol):
    def add_argument(self, *names: str, **settings: Any) -> Action: ...


class Parser(ArgumentParser):
    """A command's parser. Flags are written with hyphens, and accepted with underscores, too.

    Values are checked against type hints, as the entries of `--config` files are. A flag overrides the file,
    and the file overrides the default.

    Args:
        description: what the command does.
        config: whether the command accepts `--config FILE`.
        of_file: returns which settings of such a file count, by its path and content; default all.
        settings: of `argparse.ArgumentParser`.

    Example:
        >>> parser = Parser("Count.")
        >>> parser.add("--batch-size", int, 64, "images per batch")
        >>> parser.parse_args(["--batch_size", "8"])
        Namespace(batch_size=8)
        >>> parser.parse_args(["--batch-size", "x"])
        Traceback (most recent call last):
        ValueError: --batch-size must be an integer, got 'x'
    """

    def __init__(
        self,
        description: str | None = None,
        *,
        config: bool = False,
        of_file: OfFile | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(
            description=description,
            formatter_class=_HelpFormatter,
            argument_default=SUPPRESS,
            exit_on_error=False,
            allow_abbrev=False,
            **settings,
        )
        self._of_file = of_file
        self._kinds: dict[str, Any] = {}  # type hint by destination
        self._flags: set[str] = set()  # destinations of flags
        self._values: dict[str, Any] = {}  # default by destination
        self._several: set[str] = set()  # destinations of flags with several values
        self._settings: set[str] = set()  # destinations of settings of runs
        if config:
            self._kinds["config"] = str
            self.add_argument("--config", metavar="FILE", help="YAML file of settings; flags override it")

    def add(
        self,
        name: str,
        kind: Any,
        default: Any = None,
        help: str = "",
        *,
        group: _Group | None = None,
        metavar: str | None = None,
        several: bool = False,
        filled: bool = True,
    ) -> None:
        """Add a flag or a positional argument.

        Args:
            name: `--flag-name`, or the name of a positional argument.
            kind: its type hint; of `several` values that of one. A flag of kind `True` accepts no value.
            default: value of a flag that is not given.
            help: one line; the default is appended unless the line states it.
            group: what `add_argument_group` returned; default the parser's own options.
            metavar: what stands for the value in the help; default by `kind`.
            several: whether one or more values follow; a repeated flag adds to them, a file has a list.
            filled: whether the parsed arguments have the default of a flag that is not given, or lack it.
        """
        container = group or self
        settings: dict[str, Any] = {}
        if kind is True:
            kind, default, settings["action"] = bool, False, "store_true"
        else:
            settings["metavar"] = metavar or (_metavar(kind) if name.startswith("-") else name.upper())
            if default is not None and "default" not in help:
                help = f"{help} (default: {_as_text(default)})"
        if several:
            settings["nargs"] = "+"
            if name.startswith("-"):
                settings["action"] = "extend"
        added = container.add_argument(name, help=help.replace("%", "%%"), **settings)
        self._kinds[added.dest] = kind
        if added.option_strings:
            self._flags.add(added.dest)
            if filled:
                self._values[added.dest] = default
            if several:
                self._several.add(added.dest)

    def add_settings(
        self,
        title: str,
        kind: type,
        *,
        skip: AbstractSet[str] = frozenset(),
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a group with a flag for each field of a dataclass, explained by its docstring.

        The parsed arguments have only the fields that are given, so that the dataclass has the defaults.

        Args:
            title: of the group.
            kind: the dataclass; its docstring explains the fields under `Args:`.
            skip: fields to leave out.
            defaults: field → the command's default, to be shown in place of the dataclass's.
        """
        group = self.add_argument_group(title)
        hints, explained = get_type_hints(kind), _explained(kind)
        for field in fields(kind):
            if field.name not in skip:
                flag, text = flag_name(field.name), explained.get(field.name, "")
                default = field.default
                if defaults is not None and field.name in defaults:
                    text, default = text.partition("; default")[0], defaults[field.name]
                self.add(flag, hints[field.name], default, text, group=group, filled=False)
                self._settings.add(field.name)

    def parse_args(  # type: ignore[override]  # one namespace out, none in
        self, args: Sequence[str] | None = None
    ) -> Namespace:
        """Parse a command's arguments.

        Args:
            args: after the command's name; default `sys.argv[1:]`.

        Returns:
            Every argument's value by its name with underscores; without settings that are not given. Of a
            command with settings of runs also `flags`, the names of those that are given by flags, and
            `file`, those that the file has.

        Raises:
            ValueError: an argument is missing, unknown, or not what it must be.
        """
        try:
            given, rest = self.parse_known_args(
                list(self._hyphenated(sys.argv[1:] if args is None else args))
            )
        except ArgumentError as error:
            raise self._in_plain_words(error) from None
        if rest:
            raise self._unknown("argument", rest[0], ())
        texts = vars(given)
        from_file = self._read(texts.pop("config", None))
        values = self._values | from_file
        for name, text in texts.items():
            shown = flag_name(name) if name in self._flags else name
            if name == "out" and text == "":
                raise invalid(shown, "the name of what to write", text)
            values[name] = text if text is True else _from_command_line(self._kinds[name], text, shown)
        if self._settings:
            values["flags"] = self._settings & texts.keys()
            values["file"] = {name: from_file[name] for name in self._settings & from_file.keys()}
        return Namespace(**values)

    def in_flags(self, message: str) -> str:
        """Write the settings in an error's message as flags: its first word, and words with underscores.

        Example:
            >>> parser = Parser()
            >>> parser.add("--epochs", int)
            >>> parser.add("--max-cost", float)
            >>> parser.in_flags("epochs must be 1 unless max_cost is given")
            '--epochs must be 1 unless --max-cost is given'
        """
        words = message.split(" ")
        if words[1:2] == ["must"] and words[0] in self._flags:
            words[0] = flag_name(words[0])
        return " ".join(flag_name(word) if "_" in word and word in self._flags else word for word in words)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print and exit with, as Python 3.13 and newer do by themselves."""
        raise ArgumentError(None, message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print a help; argparse would pass over an error of writing, such as of a full disk."""
        (file or sys.stdout).write(message)

    def format_help(self) -> str:
        """The help, whose first line names the positional arguments alone."""
        places = [action for action in self._get_positional_actions() if action.metavar]
        names = (f"{place.metavar} ..." if place.nargs == "+" else str(place.metavar) for place in places)
        self.usage = self.usage or " ".join([self.prog, *names, "[options]"])
        return super().format_help()

    def _hyphenated(self, arguments: Sequence[str]) -> Iterator[str]:
        """Return the arguments, flags with hyphens; ValueError if a flag is unknown."""
        rest = list(arguments)
        while rest:
            argument = rest.pop(0)
            if argument == "--":
                yield from [argument, *rest]
                return
            if not argument.startswith("--"):
                yield argument
                continue
            name, equals, value = argument.partition("=")
            flag = name.replace("_", "-")
            if flag not in self._option_string_actions:
                raise self._unknown("flag", name, self._option_string_actions)
            if not equals and rest and _NEGATIVE.match(rest[0]):  # argparse takes -1e-3 for a flag
                equals, value = "=", rest.pop(0)
            yield f"{flag}{equals}{value}"

    def _in_plain_words(self, error: ArgumentError) -> Exception:
        flag = error.argument_name or ""
        action = self._option_string_actions.get(flag)
        if action is None:
            missing = error.message.removeprefix("the following arguments are required: ")
            if missing == error.message:
                return error
            return invalid(missing, "given", found="nothing", hint=f"see {self.prog} --help")
        if action.nargs == 0:
            return invalid(flag, "given without a value", found="one")
        return invalid(flag, in_words(self._kinds[action.dest]), found="nothing")

    def _unknown(self, what: str, name: str, known: Iterable[str]) -> ValueError:
        """The error for a flag, argument or setting that the command does not accept."""
        from difflib import get_close_matches

        bare = {option.lstrip("-"): option for option in known}
        written = name.lstrip("-").replace("_", "-") if what == "flag" else name
        close = get_close_matches(written, bare, n=1)
        hint = f"did you mean {bare[close[0]]}?" if close else f"see {self.prog} --help"
        return invalid(what, f"one that {self.prog} accepts", name, hint=hint)

    def _read(self, path: str | None) -> dict[str, Any]:
        """The settings in a YAML file, each of its type."""
        if path is None:
            return {}
        from netfission.utils.yaml_text import parse_yaml, read_text

        try:
            content = parse_yaml(read_text(Path(path)))
        except OSError as error:
            raise invalid(
                "--config", "a file that can be read", found=f"{path} ({error.strerror})"
            ) from error
        except ValueError as error:
            raise invalid(path, "YAML", found=f"damaged text ({error})") from error
        if content is None:  # an empty file
            return {}
        if not isinstance(content, Mapping):
            raise invalid(path, "a mapping from settings to values", content)
        if self._of_file is not None:
            content = self._of_file(path, content)
        for name in content:
            if name not in self._flags:
                raise self._unknown(f"{path}: setting", str(name), sorted(self._flags))
        return {
            name: _of_kind(self._kind_in_file(name), value, f"{path}: {name}")
            for name, value in content.items()
        }

    def _kind_in_file(self, name: str) -> Any:
        kind = self._kinds[name]
        return GenericAlias(list, (kind,)) if name in self._several else kind


class _HelpFormatter(RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Break the help between words, so that names with hyphens stay whole."""
        return textwrap.wrap(text, width, break_on_hyphens=False)


def flag_name(name: str) -> str:
    """The flag of a setting.

    Example:
        >>> flag_name("max_cost")
        '--max-cost'
    """
    return "--" + name.replace("_", "-")


def in_words(kind: Any) -> str:
    """A type hint in words, as they follow "must be".

    Example:
        >>> in_words(list[int | str] | None)
        'a list, each item an integer or text'
    """
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(inner)}"
    if get_origin(kind) is list:
        return f"a list, each item {in_words(inner[0])}"
    if inner:
        options = [in_words(option) for option in inner if option is not NoneType]
        return (", or " if any("," in option for option in options) else " or ").join(options)
    return PLAIN[kind]


def run_config(settings: Namespace) -> RunConfig:
    """Return the settings of the run that `train` is asked for, over those of the recipe if it names one."""
    given = run_settings(settings, {"resume", "recipe"})
    if settings.recipe is None:
        return RunConfig.from_dict(given)
    from netfission.methods.effects import with_recipe

    return RunConfig.from_dict(with_recipe(settings.recipe, given))


def run_settings(settings: Namespace, others: AbstractSet[str]) -> dict[str, Any]:
    """Return the settings of runs among those of a command, which has `out` and `others` as well."""
    left_out = {"out", "flags", "file", *others}
    given = {name: value for name, value in vars(settings).items() if name not in left_out}
    paths = {"data": absolute_data(given.get("data", DataConfig.data))}
    scheme, _, folder = given.get("model", "").partition("/")
    if scheme == "hf" and folder and Path(folder).is_dir():
        paths["model"] = f"hf/{Path(folder).resolve()}"
    if weights := given.get("weights"):
        paths["weights"] = str(Path(weights).resolve())
    return given | paths


def absolute_data(data: str) -> str:
    """Return a data set's name as it is, and a folder's path in full, so that runs find it from anywhere."""
    from netfission.data.sources import is_named

    is_path = data and not is_named(data) and Path(data).exists()
    return str(Path(data).resolve()) if is_path else data


def _explained(kind: type) -> dict[str, str]:
    """The entries under `Args:` of a docstring, each in one line."""
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(kind) or "", re.MULTILINE)
    return {name: " ".join(text.split()).removesuffix(".") for name, text in entries}


def _from_command_line(kind: Any, text: str | list[str], shown: str) -> Any:
    """The value that was typed after a flag."""
    if isinstance(text, list):
        return [_from_command_line(kind, item, shown) for item in text]
    required = _without_none(kind)
    if required is not kind and text in ("null", "None"):
        return None
    if required is str or get_origin(required) is Literal:
        return typed(required, text, shown)
    from netfission.utils.yaml_text import parse_yaml

    try:
        return typed(required, parse_yaml(text), shown)
    except ValueError:
        raise invalid(shown, in_words(required), text) from None


def _of_kind(kind: Any, value: Any, shown: str) -> Any:
    """A file's value."""
    required = _without_none(kind)
    return None if value is None and required is not kind else typed(required, value, shown)


def _without_none(kind: Any) -> Any:
    """A type hint without the option None."""
    options = get_args(kind)
    if get_origin(kind) not in (Union, UnionType) or NoneType not in options:
        return kind
    return reduce(or_, (option for option in options if option is not NoneType))


def _metavar(kind: Any) -> str:
    required = _without_none(kind)
    if get_origin(required) is Literal:
        return "{" + ",".join(get_args(required)) + "}"
    is_list = any(get_origin(option) is list for option in (required, *get_args(required)))
    return "LIST" if is_list else _METAVARS[required]


def _as_text(value: Any) -> str:
    """A default as it is written after a flag."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
