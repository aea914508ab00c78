"""Rows over two processes joined by jax.distributed, each with its half."""

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_equals_one_process():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = [[sys.executable, str(SCRIPT), str(number), str(port)] for number in (0, 1)]
    both = [subprocess.Popen(c, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True) for c in run]
    try:
        said = [process.communicate(timeout=240)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    for process, text in zip(both, said, strict=True):
        assert process.returncode == 0 and "same 2 4" in text, text[-3000:]
