"""The command: one line and a non-zero exit for what is wrong, help, and the report of a small run."""

import json
import subprocess
import sys

import jax
import pytest

from dualxda_jax import __version__, cli, pipeline


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
        (["demo", "--network", "vgg"], "'resnet-18'"),  # which an 80 columns wide terminal has on another line
        (["demo", "--cost", "9" * 90 + "x"], "9x'"),
        (["attribute"], "Missing from dualxda attribute: images [INT [INT ...]] (dualxda --help)"),
        (["attribute", "--images", "9" * 20], "images: got 99999999999999999999, must be"),
        (["bench", "--seed", "-1"], "seed: got -1, must be in 0..4294967295"),
        (["bench", "--seed", "9" * 20], "seed: got 99999999999999999999, must be in 0..4294967295"),
        (["bench", "--samples", str(10**13)], "Unable to allocate"),
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


@pytest.mark.parametrize(
    ("arguments", "environment", "kept"),
    [([], {}, True), (["--no-cache"], {}, False), ([], {"DUALXDA_NO_CACHE": "1"}, False), ([], {"own": "1"}, False)],
)
def test_compiled_programs_are_kept_unless_that_is_turned_off(arguments, environment, kept, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "dualxda" / "programs"
    own = "a folder of the user's" if "own" in environment else None
    monkeypatch.setattr(cli.programs, "folder", lambda: folder)
    for name in {*environment} - {"own"}:
        monkeypatch.setenv(name, environment[name])
    seen = []
    monkeypatch.setattr(pipeline, "fit", lambda *a, **k: seen.append(jax.config.jax_compilation_cache_dir) or tmp_path)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", own)
    try:
        assert cli.main(["fit", *arguments]) == 0
        assert jax.config.jax_compilation_cache_dir == own
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert seen == [str(folder) if kept else own] and folder.exists() == kept


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder where `dualxda fit` has been."""
    out = tmp_path_factory.mktemp("single")
    assert cli.main(["fit", "--limit", "150", "--out", str(out)]) == 0
    return out


def test_fit_attribute_and_explain_are_steps_on_the_same_stages(fitted, capsys, monkeypatch):
    monkeypatch.setattr(pipeline.stages, "train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(pipeline.stages, "fit", lambda *a, **k: pytest.fail("fitted again"))
    surrogate = json.loads((fitted / "surrogate.json").read_text())
    assert surrogate["converged"] and surrogate["gap"] <= 1e-4 and surrogate["agreement"] > 0.6
    same = ["--limit", "150", "--out", str(fitted)]
    assert cli.main(["attribute", *same, "--each-way", "2", "--images", "7", "3"]) == 0
    assert capsys.readouterr().out.strip() == str((fitted / "attributions.json").resolve())
    first, second = json.loads((fitted / "attributions.json").read_text())["queries"]
    assert (first["image"], second["image"]) == (3, 7)
    best, other = (sample["score"] for sample in first["proponents"])
    assert best >= other > 0 and all(sample["score"] < 0 for sample in first["opponents"])
    assert first["proponents"][0]["label"] == first["predicted"]
    assert cli.main(["explain", *same, "--each-way", "1", "--images", "3"]) == 0
    assert (fitted / "explained-3.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_leaves_the_pictures_of_explain_alone(fitted, monkeypatch):
    """Its own pictures are counted, those of explain named after the test image; they share a folder."""
    same = ["--limit", "150", "--out", str(fitted)]
    assert cli.main(["demo", *same]) == 0
    before = {path.name: path.read_bytes() for path in fitted.glob("*.png")}
    assert "query-10.png" in before
    assert cli.main(["explain", *same, "--each-way", "1", "--images", "10", "149"]) == 0
    explained = {path.name: path.read_bytes() for path in fitted.glob("*.png") if path.name not in before}
    assert len(explained) == 2
    assert cli.main(["demo", *same]) == 0
    assert {path.name: path.read_bytes() for path in fitted.glob("*.png")} == before | explained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attribute", "--images", "3", "150"], "images: got 150, must be in 0..149"),
        (["explain", "--images", "-1"], "images: got -1"),
        (["explain"], "images"),
        (["attribute", "--images", "1", "--each-way", "0"], "each_way: got 0"),
    ],
)
def test_test_images_that_are_not_there_are_one_line(arguments, message, fitted, capsys):
    assert cli.main([*arguments, "--limit", "150", "--out", str(fitted)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1] and said[-1].startswith("dualxda: ")


@pytest.mark.parametrize("command", ["attribute", "explain"])
@pytest.mark.parametrize(
    ("images", "stage", "message"),
    [
        ([], "read", "images: got none"),
        (["0", "-1"], "read", "images: got -1"),
        (["0", "100000"], "train", "images: got 100000, must be in 0..149"),
    ],
)
def test_such_images_are_refused_before_any_work(command, images, stage, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.stages, stage, lambda *a, **k: pytest.fail(f"went on to {stage}"))
    assert cli.main([command, "--limit", "150", "--out", str(tmp_path / "x"), "--images", *images]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["demo", "fit", "evaluate"])
def test_a_mistyped_folder_of_data_leaves_nothing(command, capsys, tmp_path):
    out = tmp_path / "a" / "b"
    assert cli.main([command, "--data", str(tmp_path / "mnits"), "--out", str(out)]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    out.mkdir(parents=True)
    assert cli.main([command, "--data", str(tmp_path / "mnits"), "--out", str(out)]) == 1
    assert out.is_dir()


def test_bench_times_each_step_of_the_core(capsys):
    sizes = ["--samples", "60", "--dim", "8", "--classes", "3", "--queries", "4", "--repeats", "1"]
    assert cli.main(["bench", *sizes]) == 0
    said = capsys.readouterr().out
    for step in ("fit dual SVM", "scores", "top samples", "relevance of pairs", "certified"):
        assert step in said
    assert cli.main(["bench", "--classes", "1"]) == 1
    assert "classes: got 1, must be 2 or more" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "taken")]) == 1
    assert "must be a folder" in capsys.readouterr().err


def test_an_output_that_cannot_be_made_is_refused_before_any_work(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(pipeline.stages, "read", lambda config: pytest.fail("read the images"))
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
