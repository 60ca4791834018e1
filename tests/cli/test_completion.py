"""`jaxmodel completion`: what the script does in a shell."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.cli.conftest import call, run


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    if (found := shutil.which("bash")) is None:
        pytest.skip("there is no bash")
    return found


@pytest.mark.parametrize(
    ("line", "offers", "hides"),
    [
        ("jaxmodel tr", {"train"}, {"eval"}),
        ("jaxmodel ", {"completion", "launch", "resume", "summary"}, set()),
        ("jaxmodel train --wei", {"--weights", "--weight-decay"}, {"--width"}),
        ("jaxmodel resume --me", {"--mesh"}, {"--model"}),
        ("jaxmodel train --optimizer ada", {"adamw", "adamw8", "adafactor"}, {"sgd"}),
    ],
)
def test_bash_completes(bash, capsys, line, offers, hides):
    script = call(capsys, "completion", "bash").out
    program = f"""{script}
        rule=$(complete -p jaxmodel); function=${{rule#*-F }}; function=${{function%% *}}
        COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}
        read -ra COMP_WORDS <<< "$COMP_LINE"
        [[ $COMP_LINE == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        "$function" jaxmodel
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run([bash], input=program, capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert offers <= found and not hides & found, done


def test_other_shells_and_what_is_none(capsys):
    assert call(capsys, "completion", "zsh").out.startswith("#compdef jaxmodel")
    assert "complete --no-files --command" in call(capsys, "completion", "fish").out
    code, _, said = run(capsys, "completion", "powershell")
    assert code == 2 and "powershell" in said and "bash" in said and said.count("\n") == 1
    code, _, said = run(capsys, "completion")
    assert code == 2 and "Missing from jaxmodel completion: SHELL" in said
