"""One of two processes that solve together; run by test_two_processes.py with its number and a port."""

import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualxda_jax import svm

N, D, K = 1200, 6, 3


def main():
    number, port = int(sys.argv[1]), sys.argv[2]
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=number)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, N).astype(np.int32)
    features = np.maximum(rng.normal(size=(K, D))[labels] + 0.7 * rng.normal(size=(N, D)), 0.0).astype(np.float32)
    mine = slice(number * N // 2, (number + 1) * N // 2)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("data"))
    rows = [jax.make_array_from_process_local_data(place, a[mine]) for a in (features, labels)]
    assert not rows[0].is_fully_addressable
    config = svm.SolverConfig(tolerance=1e-5, block=64)
    together = svm.solve(*rows, num_classes=K, cost=1e-2, config=config)
    assert bool(together.info.converged)
    # Each process knows all samples here, to compare with.
    alone = svm.solve(features, labels, num_classes=K, cost=1e-2, config=config)
    np.testing.assert_allclose(together.info.dual, alone.info.dual, rtol=2e-5)
    scale = float(np.abs(alone.weights).max())
    np.testing.assert_allclose(together.weights, alone.weights, atol=1e-2 * scale)
    for shard in together.coefficients.addressable_shards:
        assert shard.data.shape[0] == N // jax.device_count()
        np.testing.assert_allclose(np.asarray(shard.data).sum(1), 0.0, atol=1e-8)
    print("same", jax.process_count(), jax.device_count())


main()
