import contextlib
import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualxda_jax import checkpoint, types


def make_tree():
    info = types.SolveInfo(*(jnp.asarray(v) for v in (1.5, 1.0, 0.3, 7, True)))
    return {
        "solution": types.DualSolution(jnp.ones((5, 3)), jnp.ones((3, 2)), jnp.zeros(3), 1.0, info),
        "support": types.SupportModel(
            jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.arange(2), jnp.arange(2), jnp.ones((3, 4)), jnp.ones(3), 0.0, 9
        ),
        "features": types.Features(jnp.ones((4, 2), jnp.bfloat16), np.arange(4, dtype=np.int64)),
        "mixed": [1, 2.5, "text", None, True, (jnp.float32(3), np.zeros((0, 3)))],
        "key": jax.random.split(jax.random.key(3), 2),
        "by number": {7: np.asarray([True, False]), 3: jnp.ones(2)},
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype and x.shape == y.shape
        assert (x == y) if not hasattr(x, "dtype") else bool((x == y).all())


def test_all_types_come_back_with_and_without_like(tmp_path):
    tree = make_tree()
    checkpoint.save(tmp_path / "a" / "b", tree)
    assert_same(tree, checkpoint.load(tmp_path / "a" / "b"))
    assert_same(tree, checkpoint.load(tmp_path / "a" / "b", tree))
    assert checkpoint.load(tmp_path / "a" / "b")["support"].train_size == 9


def test_optimizer_states_need_like(tmp_path):
    params = {"w": jnp.ones((3, 2))}
    state = optax.adamw(1e-3).init(params)
    checkpoint.save(tmp_path / "x", state)
    assert_same(state, checkpoint.load(tmp_path / "x", like=jax.eval_shape(optax.adamw(1e-3).init, params)))
    with pytest.raises(checkpoint.CheckpointError, match="like"):
        checkpoint.load(tmp_path / "x")
    with pytest.raises(checkpoint.CheckpointError, match="structure"):
        checkpoint.load(tmp_path / "x", like=optax.sgd(1e-3, 0.9).init(params))


@pytest.mark.parametrize("damage", ["file", "truncated", "manifest", "no manifest"])
def test_damaged_checkpoints_do_not_load(damage, tmp_path):
    path = tmp_path / "x"
    checkpoint.save(path, {"a": np.random.default_rng(0).normal(size=(500, 100))})
    files = sorted(
        (f for f in path.rglob("*") if f.is_file() and f.name != "manifest.json"), key=lambda f: f.stat().st_size
    )
    if damage == "file":
        files[-1].unlink()
    elif damage == "truncated":
        files[-1].write_bytes(files[-1].read_bytes()[: files[-1].stat().st_size // 2])
    elif damage == "manifest":
        (path / "manifest.json").write_text("{")
    else:
        (path / "manifest.json").unlink()
    with pytest.raises(checkpoint.CheckpointError) as raised:
        checkpoint.load(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def flipped(path):
    """Write the manifest once for each of its bytes, with one bit of it changed."""
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    for place in range(len(content)):
        other = bytearray(content)
        other[place] ^= 1 << place % 8
        manifest.write_bytes(bytes(other))
        yield


def test_a_changed_bit_of_the_manifest_is_found(tmp_path):
    path = tmp_path / "x"
    checkpoint.save(path, {"x": np.zeros((0, 3), np.float32), "y": [1, None]}, fingerprint="abc")
    for _ in flipped(path):
        with pytest.raises(checkpoint.CheckpointError) as raised:
            checkpoint.load(path)
        assert "\n" not in str(raised.value) and str(path) in str(raised.value)


def as_before(path):
    """The manifest as it was without a checksum of its own."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": "dualxda-checkpoint-1"}))


def test_checkpoints_without_a_checksum_of_the_manifest_load(tmp_path):
    checkpoint.save(tmp_path / "x", make_tree(), fingerprint="abc")
    as_before(tmp_path / "x")
    assert_same(make_tree(), checkpoint.load(tmp_path / "x", fingerprint="abc"))


def test_whatever_a_manifest_says_is_one_kind_of_error(tmp_path):
    path = tmp_path / "x"
    info = types.SolveInfo(1.5, 1.0, 0.3, 7, True)
    checkpoint.save(path, {"x": np.zeros((0, 3), np.float32), "y": (1, None), "z": info}, fingerprint="abc")
    as_before(path)
    refused = 0
    for _ in flipped(path):
        try:
            checkpoint.load(path, fingerprint="abc")
        except checkpoint.CheckpointError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            refused += 1
    assert refused > 100


def test_existing_paths_and_foreign_folders(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint there"):
        checkpoint.load(path)
    checkpoint.save(path, {"a": 1})
    with pytest.raises(checkpoint.CheckpointError, match="overwrite=True"):
        checkpoint.save(path, {"a": 2})
    checkpoint.save(path, {"a": 3}, overwrite=True)
    assert checkpoint.load(path) == {"a": 3}
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(checkpoint.CheckpointError, match="not a checkpoint"):
        checkpoint.load(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="not a checkpoint"):
        checkpoint.save(tmp_path, {"a": 1}, overwrite=True)
    with pytest.raises(checkpoint.CheckpointError, match=r"tree\['f'\]"):
        checkpoint.save(tmp_path / "y", {"f": print})
    assert not (tmp_path / "y").exists()


def test_an_interrupted_overwrite_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x"
    checkpoint.save(path, {"a": jnp.ones(3)})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.folder.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, {"a": jnp.zeros(3)}, overwrite=True)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path / "new", {"a": jnp.zeros(3)})
    assert checkpoint.load(path)["a"].all()
    with pytest.raises(checkpoint.CheckpointError, match="half-written"):
        checkpoint.load(tmp_path / "new")
    checkpoint.save(path, {"a": jnp.zeros(3)}, overwrite=True)
    assert not checkpoint.load(path)["a"].any() and len(list(path.iterdir())) == 2


@pytest.mark.parametrize(
    "like",
    [
        {"a": jnp.ones((2, 3))},
        {"a": jnp.ones((3, 2), jnp.int32)},
        {"b": jnp.ones((3, 2))},
        [jnp.ones((3, 2))],
        {"a": 1.0},
    ],
)
def test_another_structure_than_like(like, tmp_path):
    checkpoint.save(tmp_path / "x", {"a": jnp.ones((3, 2))})
    with pytest.raises(checkpoint.CheckpointError, match="structure"):
        checkpoint.load(tmp_path / "x", like)


def test_static_fields_are_part_of_the_structure(tmp_path):
    support = make_tree()["support"]
    checkpoint.save(tmp_path / "x", support)
    with pytest.raises(checkpoint.CheckpointError, match="train_size"):
        checkpoint.load(tmp_path / "x", dataclasses.replace(support, train_size=8))


def test_stale_names_both_fingerprints(tmp_path):
    checkpoint.save(tmp_path / "x", {"a": 1}, fingerprint="a" * 64)
    assert checkpoint.load(tmp_path / "x", fingerprint="a" * 64) == {"a": 1}
    with pytest.raises(checkpoint.StaleCheckpoint, match=r"a{12}, expected b{12}"):
        checkpoint.load(tmp_path / "x", fingerprint="b" * 64)


def test_x64_arrays_are_not_rounded(tmp_path):
    with jax.enable_x64(True):
        checkpoint.save(tmp_path / "x", jnp.asarray(1 / 3, jnp.float64))
        assert checkpoint.load(tmp_path / "x") == 1 / 3
    with pytest.raises(checkpoint.CheckpointError, match="x64"):
        checkpoint.load(tmp_path / "x")


def test_restored_where_like_is_sharded(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.device_put(jnp.arange(16.0), sharding)
    checkpoint.save(tmp_path / "x", sharded)
    assert checkpoint.load(tmp_path / "x", like=sharded).sharding == sharding


def test_fingerprints_tell_everything_apart():
    a = np.arange(6, dtype=np.float32)
    parts = [
        (a,), (a.reshape(2, 3),), (a.astype(np.float64),), (a + 1,), (a, a), ([a],), ({"a": a},), ({"b": a},),
        (1,), (1.0,), (True,), ("1",), (b"1",), (None,), (), ((),), ([],), ("a", "b"), ("b", "a"), ("ab",),
        (types.Features(a, a),), (types.TopK(a, a),), (jax.random.key(0),), (jax.random.key(1),),
        (jax.random.key_data(jax.random.key(0)),), (optax.EmptyState(),),
    ]  # fmt: skip
    names = [checkpoint.fingerprint(*part) for part in parts]
    assert len(set(names)) == len(parts)
    assert checkpoint.fingerprint(jnp.asarray(a)) == names[0] == checkpoint.fingerprint(a[::1].copy())
    assert checkpoint.fingerprint({"x": 1, "y": 2}) == checkpoint.fingerprint({"y": 2, "x": 1})
    with pytest.raises(checkpoint.CheckpointError, match="function"):
        checkpoint.fingerprint({"f": lambda: 0})


def test_a_fingerprint_is_the_same_in_another_process():
    code = "from dualxda_jax import checkpoint; import numpy as np; "
    code += "print(checkpoint.fingerprint({'a': np.arange(3), 'b': ('x', 1.5)}, frozenset and 2))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == checkpoint.fingerprint({"a": np.arange(3), "b": ("x", 1.5)}, 2)


def test_the_manifest_is_plain_json(tmp_path):
    checkpoint.save(tmp_path / "x", make_tree(), fingerprint="abc")
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["fingerprint"] == "abc"


def test_a_full_disk_is_one_line_and_no_obstacle_later(tmp_path, monkeypatch, caplog):
    path = tmp_path / "x"
    with monkeypatch.context() as patch:
        usage = checkpoint.folder.shutil.disk_usage(tmp_path)
        patch.setattr(checkpoint.folder.shutil, "disk_usage", lambda path: usage._replace(free=11))
        with pytest.raises(checkpoint.CheckpointError, match="no space, its arrays take 12 bytes and 11 are free"):
            checkpoint.save(path, {"a": jnp.ones(3)})

    class Full:
        def save(self, *arguments):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nsource locations")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.folder, "_checkpointer", lambda: contextlib.nullcontext(Full()))
        with pytest.raises(checkpoint.CheckpointError, match="No space left on device") as raised:
            checkpoint.save(path, {"a": jnp.ones(3)}, overwrite=True)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    checkpoint.save(path, {"a": jnp.ones(3)}, overwrite=True)
    assert checkpoint.load(path)["a"].all()


@pytest.mark.parametrize(
    "leaf", [np.array([None]), np.array(["a"]), np.zeros(1, "datetime64[D]"), np.zeros(1, "i4,f4")]
)
def test_an_array_of_no_numbers_is_refused_by_name(leaf, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"^tree\['x'\]: an array of .* cannot be stored"):
        checkpoint.save(tmp_path / "c", {"x": leaf})
    assert not (tmp_path / "c").exists()
