#!/usr/bin/env python3
"""Kills a run again and again, and starts two in one folder: python .ci/test_kills.py [KILLS]."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import mnist
from test_mnist import BEST, LAST, SMALL, data_dir, main, metrics_of, same_bits, weights_of  # noqa: F401

KILLS = int(os.getenv("MNIST_KILLS", "4"))


def play(folder, flags, seed):
    """Run a command line in this process, which may die by chance."""
    os.chdir(folder)
    time.perf_counter = lambda: 0.0
    rng = random.Random(seed)

    def perhaps_after(action):
        def wrapped(*args):
            action(*args)
            if seed and rng.random() < 0.1:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    os.fsync, os.replace = perhaps_after(os.fsync), perhaps_after(os.replace)
    sys.exit(main(SMALL, flags))


def start(folder, flags, seed=None):
    """Play in another process, forked from one that has used no GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "pytest"])
    process = context.Process(target=play, args=(folder, flags, seed))
    process.start()
    return process


def end(process):
    """Its exit status; None if it hangs."""
    process.join(60)
    return process.exitcode


def test_a_run_killed_again_and_again_has_the_same_bits(tmp_path, data_dir):  # noqa: F811
    assert end(start(tmp_path, "--epochs 3 --out whole")) == 0
    rng, kills, finished = random.Random(7), 0, True
    while kills < KILLS or not finished:
        if finished:  # a new run takes the rest
            shutil.rmtree("killed", ignore_errors=True)
        status = end(start(tmp_path, "--epochs 3 --resume --out killed", rng.random()))
        kills, finished = kills + (status == -9), status == 0
        assert all(map(mnist.load_checkpoint, Path("killed").glob("*.pth")))

    for path in (LAST, BEST):
        assert same_bits(weights_of(f"whole/{path.name}"), weights_of(f"killed/{path.name}"))
    assert metrics_of("whole") == metrics_of("killed")


def test_of_two_runs_in_one_folder_one_ends(tmp_path, data_dir):  # noqa: F811
    for n in range(max(2, KILLS // 2)):
        one = start(tmp_path, f"--epochs 2 --seed 1 --out both{n}")
        time.sleep(random.Random(n).random() / 2)
        other = start(tmp_path, f"--epochs 2 --seed 2 --out both{n}")
        assert sorted([end(one), end(other)]) == [0, 1]
        seeds = {torch.load(p)["config"]["seed"] for p in Path(f"both{n}").glob("*.pth")}
        assert seeds == {metrics_of(f"both{n}")["config"]["seed"]}


if __name__ == "__main__":
    os.environ["MNIST_KILLS"] = sys.argv[1] if len(sys.argv) > 1 else "4"
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider"]))
