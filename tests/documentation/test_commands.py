"""Commands in the documentation name scripts that exist and options that these scripts take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.documentation.pages import PAGES, ROOT, blocks, name_of, prose

# A script in a span of code or a line of a block, and what follows it.
_CALL = re.compile(r"(?:^|(?<=[\s/=]))((?:scripts|examples|\.ci)/[\w./-]*\w)((?:[ ][^`\n]*)?)")


def commands(page: Path) -> list[str]:
    """The lines of all bash blocks, and the spans of code in the prose."""
    lines = []
    for block in blocks(page, "bash"):
        lines += block.text.replace("\\\n", " ").splitlines()
    return lines + re.findall(r"`([^`\n]+)`", prose(page).replace("``", ""))


def options_in(arguments: str) -> set[str]:
    try:
        words = shlex.split(arguments, comments=True)
    except ValueError:  # a quotation that goes on in the next line
        words = arguments.split()
    return {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}


def known_options(script: Path) -> set[str]:
    return {"--help", *re.findall(r"(?<![\w-])--[a-z][\w-]*", script.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_scripts_that_exist_and_options_that_they_take(page):
    faults = []
    for command in commands(page):
        for name, arguments in _CALL.findall(command):
            script = ROOT / name
            if not script.exists():
                faults.append(f"{command}: there is no {name}")
            elif script.is_file() and script.suffix in ("", ".py"):
                unknown = options_in(arguments) - known_options(script)
                faults += [f"{command}: {name} does not take {option}" for option in unknown]
    assert not faults, "\n".join(faults)


def test_the_check_of_options_finds_a_wrong_one():
    script = ROOT / "scripts/finetune.py"
    assert {"--config", "--resume"} <= known_options(script)
    assert options_in(" --config FILE --rezume 'a.b=[c]'") - known_options(script) == {"--rezume"}
