"""Command line of a recipe: settings from flags and YAML, checked alike, and errors told in one line."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from routed_peft.mistakes import end_bars, explain


def parse_settings(*kinds: type, **defaults: Any) -> tuple[Any, ...]:
    """Return the settings of a recipe, from the flags of this process and the YAML file that `--config` names.

    Keys, types and choices of the file are checked as those of flags are. Flags win over the file. A mapping ``env`` in the
    file sets environment variables, as in `trl.TrlParser`. The fields of the dataclasses ``kinds`` are the settings, and
    ``defaults`` are values in place of theirs.

    Raises:
        ValueError: for an unknown key or flag, a value of the wrong type, or one that is no choice.
    """
    parser = _Parser(kinds, allow_abbrev=False)  # type: ignore[arg-type]
    parser.set_defaults(**defaults)
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    before.add_argument("--config")
    given, flags = before.parse_known_args()
    if given.config is not None:
        try:
            parser.read(_load(given.config))
        except ValueError as error:
            raise ValueError(f"{given.config}: {error}") from error
    settings: tuple[Any, ...] = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    return settings


def run_recipe(main: Callable[[], object]) -> None:
    """Run a recipe, and end with exit code 1 and one line where it raises; `--debug` shows the traceback.

    Of several processes the main one writes the line.
    """
    place = sys.argv.index("--debug") if "--debug" in sys.argv else None
    # with a value it is a Trainer's
    debug = place is not None and (sys.argv[place + 1 :] or ["--"])[0].startswith("--")
    if place is not None and debug:
        del sys.argv[place]
    try:
        main()
    except Exception as error:
        if debug:
            raise
        if os.environ.get("RANK", "0") == "0":
            end_bars()
            sys.stderr.write(f"{Path(sys.argv[0]).name}: {explain(error)}\n")
        raise SystemExit(1) from error


class _Parser(HfArgumentParser):
    """Parser that raises ValueError for every mistake, and reads a mapping as it reads flags."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("--")), unknown[0])
            self.refuse(flag.split("=")[0], [f"--{action.dest}" for action in self._actions])
        for name, value in vars(found).items():
            if any(isinstance(one, float) and one != one for one in (value if isinstance(value, list) else [value])):
                raise ValueError(f"`{name}` must be a number, got nan")
        return found, []

    def refuse(self, name: str, known: list[str]) -> NoReturn:
        """Raise ValueError for an unknown name, with the nearest one that is known."""
        near = difflib.get_close_matches(name, known, 1)
        raise ValueError(f"unknown setting {name!r}: " + (f"did you mean {near[0]!r}?" if near else "see `--help`"))

    def read(self, config: Mapping[str, Any]) -> None:
        """Make the values of a mapping the defaults, checked as flags are."""
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        actions = {action.dest: action for action in reversed(self._actions) if action.dest in hints}
        values: dict[str, Any] = {}  # those that no flag can hold
        flags: list[str] = []
        for name, value in config.items():
            if name not in actions:
                self.refuse(str(name), list(actions))
            action, kinds = actions[name], {get_origin(kind) or kind for kind in (hints[name], *get_args(hints[name]))}
            several, as_is = isinstance(value, list) and action.nargs == "+", {*kinds} & {dict, list, NoneType}
            if several and value:
                flags += [f"--{name}", *(_text(name, item, {str}) for item in value)]
            elif several or type(value) in as_is or (value is None and action.default is None):
                values[name] = value
            else:
                flags.append(f"--{name}={_text(name, value, kinds)}")
        required = {action for action in self._actions if action.required}
        for action in required:
            action.required = False
        found = vars(self.parse_known_args(flags)[0])
        for action in required:
            action.required = action.dest not in config
        for name in config.keys() - values.keys():  # an integer stays one, where a flag would make it a float
            values[name] = config[name] if config[name] == found[name] and found[name] is not True else found[name]
        self.set_defaults(**values)


def _text(name: str, value: Any, kinds: set[Any]) -> str:
    """Return a value of YAML as the text of a flag."""
    if isinstance(value, bool) and bool not in kinds:
        if name == "resume_from_checkpoint":
            return str(value).lower()
        word = "yes or true" if value else "no or false"
        raise ValueError(f"`{name}` must not be {word} without quotes, which YAML takes for a truth value: quote the "
                         "word")  # fmt: skip
    if value is None or isinstance(value, dict | list):
        got = "nothing" if value is None else f"a {'list' if isinstance(value, list) else 'mapping'}"
        raise ValueError(f"`{name}` must be one value, got {got}: write one, or leave the line out")
    return str(value)


class _Loader(yaml.SafeLoader):
    """Loader that refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"`{twice[0]}` is given twice: leave one of them out")
        return super().construct_mapping(node, deep)


def _load(file: str) -> dict[str, Any]:
    """Return the settings in a YAML file, and set the environment variables in its ``env``."""
    try:
        config = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not readable YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"must hold settings as `name: value`, got {type(config).__name__}")
    environment = config.pop("env", {})
    if not isinstance(environment, dict):
        raise ValueError(f"`env` must map names to values, got {environment!r}")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return config
