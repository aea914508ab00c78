"""The command: one line and a non-zero exit for what is wrong, help, and the report of a small run."""

import subprocess
import sys

import pytest

from dualxda_jax import __version__, cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of"),
        (["nonsense"], "nonsense"),
        (["demo", "--cost", "cheap"], "--cost"),
        (["demo", "--cost", "-1"], "cost: got -1.0, must be a positive number"),
        (["demo", "--limit", "0"], "limit: got 0, must be at least 1"),
        (["demo", "--network", "vgg"], "--network"),
        (["demo", "--no-such-option", "1"], "no-such-option"),
        (["demo", "--data", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_a_mistake_is_one_line_and_a_non_zero_exit(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    said = captured.err.splitlines()
    assert said[-1].startswith("dualxda: ") and message in said[-1]
    assert "Traceback" not in captured.err and not captured.out
    assert len([line for line in said if "dualxda:" in line]) == 1


def test_an_output_that_is_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "taken")]) == 1
    assert "must be a folder" in capsys.readouterr().err


def test_an_output_that_cannot_be_made_is_refused_before_any_work(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cli.pipeline.stages, "read", lambda config: pytest.fail("read the images"))
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "report")]) == 1
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and "Not a directory" in complaint


def test_a_truncated_file_is_refused(capsys, tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(100))
    assert cli.main(["demo", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip().count("dualxda:") == 1


@pytest.mark.parametrize("missing", ["tyro", "matplotlib", "jinja2"])
def test_a_missing_extra_is_named_before_any_work(missing, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert missing in said and 'pip install "dualxda-jax[' in said
    assert not list(tmp_path.iterdir())


def test_interruption_is_no_traceback(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parse", lambda arguments: interrupted)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_help_explains_every_option_of_the_demo():
    done = subprocess.run(
        [sys.executable, "-m", "dualxda_jax", "demo", "--help"], capture_output=True, text=True, check=True
    )
    for option in ("--data", "--out", "--cost", "--limit", "--seed"):
        assert option in done.stdout
