"""The command itself: help, unknown commands, how fast it starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from scatterfold.tools.cli import COMMANDS

COMMAND_LINES = [
    ["train"],
    ["sample"],
    ["data"],
    ["data", "prepare"],
    ["convert"],
    ["plan"],
    ["plan", "calibrate"],
    ["plan", "validate"],
    ["launch"],
    ["sweep"],
    ["sweep", "report"],
    ["bench"],
    ["bench", "kernels"],
    ["bench", "kernels", "report"],
    ["doctor"],
]


def test_help_lists_the_commands_that_exist(scatterfold):
    outcome = scatterfold("--help")
    assert outcome.code == 0 and not outcome.err
    listed = outcome.out.split("Usage: scatterfold COMMAND")[1].split("Each command")[0]
    assert [line.split()[0] for line in listed.splitlines()[1:] if line.strip()] == list(COMMANDS)
    assert "Example:" in outcome.out


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_every_command_explains_itself_with_an_example(scatterfold, words):
    outcome = scatterfold(*words, "--help")
    assert outcome.code == 0 and not outcome.err
    example = outcome.out.split("Example:")[1]
    assert f"scatterfold {words[0]}" in example


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "trian is no command (did you mean train?)"),
        (["zzz"], "zzz is no command, allowed: train"),
        (["data", "prepair"], "data prepair is no command (did you mean prepare?)"),
        (["bench", "kernel"], "bench kernel is no command (did you mean kernels?)"),
        (["sweep", "reprot"], "sweep reprot is no command (did you mean report?)"),
        (["launch", "trian"], "'trian' cannot be launched (did you mean train?)"),
        (["launch", "--nproc", "2", "train"], "--nproc"),
        (["launch", "--nnodes", "two", "train"], "nnodes=two is no number of machines"),
    ],
    ids=str,
)
def test_an_unknown_command_is_one_line_and_exit_code_2(scatterfold, words, expected):
    outcome = scatterfold(*words)
    assert outcome.code == 2
    assert expected in outcome.line


def test_help_does_not_wait_for_torch_or_hydra(tmp_path):
    for words in (
        ["--help"],
        ["train", "--help"],
        ["sample", "--help"],
        ["sweep", "report", "--help"],
        ["doctor", "--help"],
    ):
        code = (
            "import sys; from scatterfold.tools.cli import main; code = main(sys.argv[1:]);"
            "print([name for name in ('torch', 'hydra', 'numpy') if name in sys.modules]); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"


def test_the_installed_command_runs(tmp_path):
    command = Path(sys.executable).with_name("scatterfold")
    done = subprocess.run([str(command), "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("scatterfold ")
