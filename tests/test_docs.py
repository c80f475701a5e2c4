"""What the README and docs/ say is so: targets, options, names and links exist, no option is left out."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import outsize
from outsize.plan import Plan, Predicted

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_TOOLS = {"cd", "git", "pip"}


def blocks(language: str) -> list[str]:
    """Return the README's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_commands() -> list[list[str]]:
    """Return the words of each command that the README's shell blocks show, without comments."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@cache
def help_of(*command: str) -> str:
    """Return what `outsize COMMAND --help` prints, undecorated and on wide lines."""
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    program = [sys.executable, "-m", "outsize", *command, "--help"]
    return subprocess.check_output(program, text=True, env=environment, cwd=ROOT)


def options_of(*command: str) -> set[str]:
    """Return the options of a command: all that stand at the beginning of a row of its help."""
    starts = re.findall(r"^[\s│*]*((?:--?[a-z][a-z-]*[\s,/]+)+)", help_of(*command), re.MULTILINE)
    return {name for start in starts for name in re.findall(r"--[a-z][a-z-]*", start)}


@cache
def subcommands(*command: str) -> list[str]:
    """Return the names in the panel "Commands" of `outsize COMMAND --help`."""
    _, _, panel = help_of(*command).partition("Commands")
    return re.findall(r"^│?\s+([a-z][a-z-]*)\s{2,}", panel, re.MULTILINE)


def commands(*group: str) -> list[tuple[str, ...]]:
    """Return every command, such as ("train",) and ("checkpoint", "list")."""
    found = [(*group, name) for name in subcommands(*group)]
    return [each for command in found for each in (commands(*command) or [command])]


def command_of(words: list[str]) -> tuple[str, ...]:
    """Return the command that a line `outsize ...` calls."""
    return next(command for command in commands() if command == tuple(words[1 : 1 + len(command)]))


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def links(page: Path) -> list[str]:
    """Return the places in this repository that a page links to, without the part after `#`."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [link.partition("#")[0] for link in found if not link.startswith(("http:", "https:", "#"))]


def test_the_two_commands_come_first() -> None:
    assert [words[:2] for words in shell_commands()[:2]] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("words", shell_commands(), ids=" ".join)
def test_shown_commands_exist(words: list[str]) -> None:
    if words[0] == "make":
        assert set(words[1:]) <= targets()
    elif words[0] == "outsize":
        assert {word for word in words if word.startswith("--")} <= options_of(*command_of(words))
    else:
        assert words[0] in OTHER_TOOLS


@pytest.mark.parametrize("block", blocks("python"))
def test_shown_python_uses_names_that_exist(block: str) -> None:
    compile(block, "README.md", "exec")
    for name in re.findall(r"\boutsize\.(\w+)", block):
        assert callable(getattr(outsize, name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def test_every_option_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    assert {"train", "generate"} <= set(subcommands())
    for command in commands():
        section = page.partition(f"## `outsize {' '.join(command)}`")[2].partition("\n##")[0]
        missing = options_of(*command) - set(re.findall(r"--[a-z][a-z-]*", section))
        assert not missing, f"docs/cli.md does not tell about {missing} of {command}; run `make docs`"


def test_every_target_says_what_it_does() -> None:
    shown = subprocess.check_output(["make", "--no-print-directory", "help"], text=True, cwd=ROOT)
    assert set(re.findall(r"^make ([a-z-]+) +\S", shown, re.MULTILINE)) == targets()


def test_every_key_of_a_plan_is_documented() -> None:
    said = (ROOT / "docs" / "plan.md").read_text()
    keys = {field.name for kind in (Plan, Predicted) for field in fields(kind)}
    assert sorted(key for key in keys if f"`{key}`" not in said) == []
