# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "matplotlib", "pytest>=8"]
# ///
"""The specification of mnist.py, section by section.

MNIST_DIR=data python test_mnist.py    with one epoch of real MNIST
"""

import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Thread
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from pytest import approx, raises
from torch.nn.utils import prune
from torchvision import datasets

import mnist

MNIST_DIR = os.getenv("MNIST_DIR")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILES = [Path(name).stem for name, _ in datasets.MNIST.resources]
SPLITS = ("train", "val", "test")
ERROR = "mnist.py: error: "
HERE = ["--data-dir=data", "--out=out", "--device=cpu"]
SMALL = "--lr 0.1 --val-size 90 --batch-size 50"
BEST = Path("out/best_mnist_model.pth")
LAST = Path("out/mnist_model_epoch_3.pth")

each = pytest.mark.parametrize
torch.set_num_threads(1)
IMAGES, LABELS = mnist.draw_digits(500, seed=0)


# ------------------------------------------------------------------------------------- Fixtures
@pytest.fixture
def patch(monkeypatch):
    return monkeypatch.setattr


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A small MNIST, 400 + 100 images, in a new working folder; no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    write_mnist(tmp_path / "data/MNIST/raw")
    return tmp_path / "data"


@pytest.fixture
def run(data_dir, monkeypatch):
    """Train on it; the clock stands still, matplotlib is hidden."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    return partial(main, SMALL)


@pytest.fixture
def saved(tmp_path):
    """A training state after three steps, and the path of its checkpoint."""
    state, path = new_state(fp16=True), tmp_path / "a.pth"
    mnist.train_one_epoch(state, mnist.batches(first(90), 30))
    history = known_history(1)
    mnist.save_checkpoint(path, history, {"seed": 1}, **state._asdict())
    return state, path


# -------------------------------------------------------------------------------------- Helpers
def write_mnist(raw, train=400):
    raw.mkdir(parents=True)
    arrays = (IMAGES[:train, 0], LABELS[:train], IMAGES[400:, 0], LABELS[400:])
    for name, array in zip(FILES, arrays, strict=True):
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (raw / name).write_bytes(head + array.byte().numpy().tobytes())


def main(*flags):
    """Run a command line on ./data and ./out; return what it exits with."""
    try:
        return mnist.main([*HERE, *" ".join(map(str, flags)).split()])
    except SystemExit as stop:
        return stop.code


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def weights_of(path):
    return torch.load(path)["model_state_dict"]


def metrics_of(out="out"):
    return json.loads(Path(out, "metrics.json").read_text())


def contents(folder):
    paths = Path(folder).rglob("*")
    return {path: path.read_bytes() for path in paths if path.is_file()}


def new_state(name="simple", lr=0.05, schedule=("constant", 1, 1), **options):
    torch.manual_seed(0)
    model = mnist.MODELS[name]().to(DEVICE)
    return mnist.make_state(model, lr, *schedule, **options)


def first(n):
    return IMAGES[:n].to(DEVICE), LABELS[:n].to(DEVICE)


def known_history(epochs):
    entry = {"lr": 0.4, "seconds": 12.34}
    entry |= {f"{split}_loss": len(split) / 50 for split in SPLITS}
    entry |= {f"{split}_accuracy": 1 - len(split) / 500 for split in SPLITS}
    return [{"epoch": epoch} | entry for epoch in range(1, epochs + 1)]


def leaves(model):
    return [m for m in model.modules() if not list(m.children())]


# ---------------------------------------------------------------------------------------- Model
SIZES = {"simple": "26 24 12 10 10 10 10 5 5 5 5 5 1", "wide": "26 24 22 11 11 9 7 1 1"}


class TestModel:
    @each("n", [1, 64])
    @each("name", mnist.MODELS)
    def test_a_network_gives_ten_logits_an_image(self, name, n):
        model = mnist.MODELS[name]().eval()
        assert model(torch.randn(n, 1, 28, 28)).shape == (n, 10)

    def test_simple_has_a_norm_after_each_convolution(self):
        layers = leaves(mnist.SimpleMNISTNet())
        kinds = [type(m).__name__ for m in layers]
        after = [b for a, b in pairwise(kinds) if a == "Conv2d"]
        assert after == ["BatchNorm2d"] * 12 + ["AdaptiveAvgPool2d"]
        assert [kinds.count(k) for k in ("ReLU", "MaxPool2d", "Dropout")] == [8, 2, 1]
        assert layers[-3].p == 0.05

    def test_simple_has_four_residual_blocks(self):
        layers = mnist.SimpleMNISTNet().eval().layers
        *others, block = [m for m in layers if isinstance(m, mnist.ResidualBlock)]
        x = torch.randn(2, 24, 6, 6)
        assert len(others) == 3
        assert torch.equal(block(x), (x + block.branch(x)).relu())

    def test_wide_has_only_3x3_and_1x1_convolutions(self):
        model = mnist.WideMNISTNet()
        kinds = {type(m).__name__ for m in leaves(model)}
        assert kinds == {"Conv2d", "ReLU", "MaxPool2d", "AdaptiveAvgPool2d"}
        assert {w.shape[2:] for w in model.parameters()} == {(3, 3), (1, 1)}
        weight = model.layers[2][0].weight  # initialized as by He et al. (2015)
        assert weight.std().item() == approx((2 / weight[0].numel()) ** 0.5, rel=0.02)

    @each(("budget", "verdict"), [(8000, "met"), (7955, "met"), (7954, "EXCEEDED")])
    def test_simple_is_held_to_its_budget(self, capsys, budget, verdict):
        model = mnist.SimpleMNISTNet().requires_grad_(False)
        assert model.count_parameters() == 7954 < model.budget == 8000
        model.budget = budget
        model.print_model_summary()
        total = f": 7,954 parameters (budget: {budget:,}): {verdict}\n"
        assert capsys.readouterr().out.endswith(total)

    @each("name", mnist.MODELS)
    def test_a_summary_has_a_row_a_layer(self, capsys, name):
        mnist.MODELS[name]().print_model_summary()
        text = capsys.readouterr().out.replace(",", "")
        *counts, total = re.findall(r"(\d+)(?:\n| param)", text)
        assert " ".join(re.findall(r" (\d+)\) ", text)) == SIZES[name]
        assert sum(map(int, counts)) == int(total)
        assert ("budget" in text) == (name == "simple")

    def test_a_summary_leaves_any_network_as_it_was(self):
        model = mnist.SimpleMNISTNet()
        model.layers[0] = mnist.conv_block(3, 8, 3)
        prune.l1_unstructured(model.layers[0][0], "weight", 0.5)
        model = model.double()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        rng = torch.get_rng_state()

        model.print_model_summary()
        assert model.training
        assert same_bits(before, model.state_dict())
        assert torch.equal(rng, torch.get_rng_state())

    @each("amp", [None, torch.bfloat16, torch.float16])
    def test_one_batch_can_be_overfitted(self, amp):
        state = new_state(lr=0.1, fp16=amp == torch.float16)
        batch = [*mnist.batches(first(64), 64)]
        mnist.train_one_epoch(state, batch * 50, amp)
        loss, accuracy = mnist.train_one_epoch(state, batch, amp)
        assert accuracy == 1
        assert loss < 0.1


# ----------------------------------------------------------------------------------------- Data
MAPS = {  # draws of turn, scale, shear, right, down: the matrix and the shift
    (1.0, 0.5, 0.5, 0.5, 0.5): (0.974, -0.225, 0.225, 0.974, 0, 0),  # 13 degrees
    (0.5, 1.0, 0.5, 0.5, 0.5): (1.13, 0, 0, 1.13, 0, 0),
    (0.5, 0.5, 1.0, 0.5, 0.5): (1, 0.13, 0, 1, 0, 0),
    (0.5, 0.5, 0.5, 1.0, 0.0): (1, 0, 0, 1, 2.6, -2.6),
}


class TestData:
    def test_several_download_missing_files(self, data_dir, patch):
        for path in (data_dir / "MNIST/raw").iterdir():
            Path(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        Path("new/MNIST/raw").mkdir(parents=True)
        Path("new/MNIST/raw", FILES[0]).touch()  # one file alone is too few
        server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
        datasets.MNIST.mirrors.append(f"http://127.0.0.1:{server.server_port}/")
        patch(datasets.MNIST, "resources", [(f"{name}.gz", None) for name in FILES])
        Thread(target=server.serve_forever, daemon=True).start()

        with ThreadPoolExecutor() as pool:
            _, (train, test), *_ = pool.map(mnist.load_mnist, ["new"] * 4)
        assert {path.name for path in contents("new")} == {*FILES}
        for *parts, whole in zip(train, test, (IMAGES, LABELS), strict=True):
            assert torch.equal(torch.cat(parts), whole)

    @each("error", [RuntimeError, TimeoutError, PermissionError])
    def test_offline_is_a_connection_error(self, tmp_path, patch, error):
        def download(self):
            assert Path(self.root).parents[1] == tmp_path  # to rename is atomic
            raise error("cut off")

        patch(datasets.MNIST, "download", download)
        kind = PermissionError if error is PermissionError else ConnectionError
        with raises(kind, match="cut off"):
            mnist.load_mnist(tmp_path)
        assert os.listdir(tmp_path / "MNIST") == ["raw"]

    @each("name", FILES)
    def test_a_damaged_file_is_an_os_error(self, data_dir, name):
        path = data_dir / "MNIST/raw" / name
        whole = path.read_bytes()
        others = [*contents(path.parent).values()]
        others.remove(whole)
        ten = [whole[:-1] + bytes([10])] * ("labels" in name)
        for content in (whole[:-9], whole + b"?", b"", b"\x1f" + whole[1:], *others, *ten):
            path.write_bytes(content)
            with raises(OSError, match="raw; if damaged, delete it"):
                mnist.load_mnist(data_dir)

    @each("draws", MAPS)
    @each(("strength", "size"), [(1.0, 28), (0.5, 40)])
    def test_an_image_is_moved_by_the_draws(self, patch, draws, strength, size):
        scaled = [0.5 + (draw - 0.5) / strength for draw in draws]
        patch(torch, "rand", lambda *_, **__: torch.tensor([scaled] * 2).T)
        patch(torch, "randn", torch.zeros)  # no bend
        ramp = (torch.arange(size) - (size - 1) / 2).expand(size, size)
        images = torch.stack([ramp, ramp.T])[:, None]  # of their own coordinates

        out = mnist.augment(images) if strength == 1 else mnist.augment(images, strength)
        x, y = out[:, 0]
        c = size // 2
        slopes = [(m[c + i, c + 1 - i] - m[c, c]).item() for m in (x, y) for i in (0, 1)]
        shift = [m[c - 1 : c + 1, c - 1 : c + 1].mean().item() for m in (x, y)]
        assert slopes + shift == approx(MAPS[draws], abs=1e-3)

    def test_a_bend_is_a_smooth_field_of_0_3_pixels(self, patch):
        field = torch.zeros(1, 2, 5, 5)
        field[0, 0, :, 2] = 1  # the middle is moved along x
        patch(torch, "rand", lambda *_, **__: torch.full((5, 1), 0.5))
        patch(torch, "randn", lambda *size, **_: {(1, 2, 5, 5): field}[size])
        ramp = torch.arange(28.0).expand(1, 1, 28, 28)

        moved = (mnist.augment(ramp, 0.5) - ramp)[0, 0]
        assert moved.mean(0)[[10, 13]].tolist() == approx([0.085, 0.15], abs=0.01)
        assert moved[:, 0].abs().max() < 0.05
        assert moved.diff().abs().max() < 0.05

    def test_strength_0_leaves_an_image(self):
        images = IMAGES[:9] / 255
        assert (mnist.augment(images, 0.0) - images).abs().max() < 1e-4

    def test_what_comes_in_from_outside_is_black(self):
        assert mnist.augment(torch.ones(64, 1, 28, 28))[:, 0, 0, 0].min() < 0.9

    @each("still", ["rand", "randn"])
    def test_two_images_are_distorted_differently(self, patch, still):
        patch(torch, still, lambda *size, **_: torch.full(size, 0.5))
        out = mnist.augment((IMAGES[:1] / 255).expand(64, 1, 28, 28))
        assert (out[1:] - out[:1]).abs().amax((1, 2, 3)).min() > 0.02

    def test_digits_are_drawn_as_their_labels(self, patch):
        assert torch.equal(mnist.draw_digits(500, 0)[0], IMAGES)
        assert not torch.equal(mnist.draw_digits(500, 1)[0], IMAGES)
        patch(mnist, "augment", lambda x, k: x)
        images, labels = mnist.draw_digits(500, 0)
        small = images[:, 0, 4:24:4, 8:20:4] // 255

        ink = [small[labels == n][0].sum().item() for n in range(10)]
        assert ink == [12, 8, 11, 11, 9, 11, 12, 7, 13, 12]
        two = "".join(" #"[pixel] for pixel in small[labels == 2][0].flatten())
        assert two == "###  #####  ###"

    @each("options", [{}, {"train": True}, {"train": True, "strength": 0.3}])
    def test_batches_hold_no_image_twice(self, patch, options):
        train, augment = bool(options), Mock(side_effect=lambda x, k: x)
        patch(mnist, "augment", augment)
        numbers = torch.arange(100)
        images = numbers.byte().view(100, 1, 1, 1).expand(100, 1, 28, 28)
        pairs = [*mnist.batches((images, numbers), 30, **options)]
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))

        assert [len(labels) for _, labels in pairs] == [30, 30, 30] + [10] * (not train)
        pixels = (x[:, 0, 9, 9] * 0.3081 + 0.1307) * 255
        assert torch.equal(pixels.round().long(), y)
        assert len(y.unique()) == len(y)
        assert torch.equal(y, y.sort()[0]) == (not train)  # shuffled to train
        strengths = [call.args[1] for call in augment.call_args_list]
        assert strengths == [options.get("strength", 1)] * 3 * train

    def test_batches_refuse_floats_and_too_few(self):
        assert len(next(mnist.batches(first(1), 64))[1]) == 1
        for data, train in ((first(0), False), (first(63), True)):
            with raises(ValueError, match="do not fill a batch of 64"):
                next(mnist.batches(data, 64, train=train))
        with raises(ValueError, match="must be uint8, not"):
            next(mnist.batches((IMAGES / 255, LABELS), 64))

    @pytest.mark.skipif(not MNIST_DIR, reason="MNIST_DIR is not set")
    def test_one_epoch_of_real_mnist_reads_98_percent(self, tmp_path):
        flags = f"--epochs 1 --data mnist --data-dir {MNIST_DIR} --out {tmp_path}"
        assert main(flags) is None
        assert metrics_of(tmp_path)["test_accuracy"] > 0.98


# ------------------------------------------------------------------------------------- Training
def rates(schedule, epochs=10, steps=10):
    """The learning rate of each step."""
    state = new_state(lr=0.1, schedule=(schedule, epochs, steps))
    for _ in range(epochs * steps):
        yield state.optimizer.param_groups[0]["lr"]
        state.optimizer.step()
        state.scheduler.step()


class TestTraining:
    def test_the_rate_follows_its_schedule(self):
        values = [*rates("onecycle")]
        assert values[::20] == approx([0.004, 0.1, 0.085, 0.05, 0.015], rel=0.05)
        assert values[-1] < 0.0002
        assert [*rates("step")][9::10] == approx([0.1 * 0.7**n for n in range(10)])
        assert {*rates("constant")} == {0.1}
        assert all(max(rates("onecycle", 1, n)) <= 0.1 for n in range(1, 13))

    def test_the_optimizer_is_sgd_with_momentum(self):
        recipe = {"momentum": 0.9, "weight_decay": 5e-5, "nesterov": True}
        assert recipe.items() <= new_state().optimizer.param_groups[0].items()

    def test_a_step_that_overflows_fp16_is_skipped(self):
        assert not new_state().scaler.is_enabled()
        state = new_state("wide", 0.01, ("onecycle", 1, 1), fp16=True)
        state.scaler._init_scale = 2.0**40
        loader = [*mnist.batches(first(8), 2)] * 2
        assert math.isfinite(mnist.train_one_epoch(state, loader, torch.float16)[0])
        assert 1 < state.scaler.get_scale() < 2.0**40

    def test_an_epoch_returns_means_of_all_images(self):
        state = new_state("wide", lr=1e-12)
        x, y = next(mnist.batches(first(40), 40))
        loader = zip(x.split(9), y.split(9), strict=True)
        expected = mnist.evaluate(state.model, first(40))[:2]
        assert mnist.train_one_epoch(state, loader) == approx(expected, rel=1e-4)

    def test_a_terminal_shows_a_bar_of_40_columns(self, capsys, patch):
        state = new_state("wide", lr=1e-12)
        mnist.train_one_epoch(state, mnist.batches(first(78), 39), total=2)
        patch(os, "isatty", lambda stream: stream == 1)
        mnist.train_one_epoch(state, mnist.batches(first(78), 39))
        assert capsys.readouterr().out == ""  # no terminal, or no total

        loader, title = mnist.batches(first(78), 2), "12/15"
        result = mnist.train_one_epoch(state, loader, total=39, title=title)
        half, whole, _ = capsys.readouterr().out.split("\r")
        assert re.match(r"12/15 \[##   \] loss \d\.\d{4} acc \d+\.\d\d%$", half)
        assert whole == "12/15 [#####] loss {:.4f} acc {:.2%}".format(*result)
        assert len(whole) < 40

    def test_a_graph_is_recorded_after_three_steps(self, patch):
        record = Mock(side_effect=lambda step, *inputs: step)
        patch(mnist, "record", record)
        loader = [*mnist.batches(first(100), 10)]
        eager, graphed = new_state(), new_state()
        for state, graph in ((eager, False), (graphed, True)):
            torch.manual_seed(1)
            mnist.train_one_epoch(state, loader, graph=graph)

        record.assert_called_once()
        assert torch.equal(record.call_args.args[1], loader[3][0])
        assert same_bits(eager.model.state_dict(), graphed.model.state_dict())

    def test_evaluate_returns_means_and_logits(self):
        model, (images, labels) = new_state("wide").model, first(78)
        loss, accuracy, logits = mnist.evaluate(model, (images, labels))
        expected = model((images / 255 - 0.1307) / 0.3081).detach()

        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)
        assert loss == approx(F.cross_entropy(expected, labels).item(), rel=1e-4)
        assert accuracy == (expected.argmax(1) == labels).sum().item() / 78
        assert not model.training
        assert not (logits.requires_grad or logits.is_inference())


# ---------------------------------------------------------------------------------- Checkpoints
DOUBLE = torch.ones(1).double().numpy()[0]  # of NumPy


class TestCheckpoints:
    def test_a_file_is_written_whole_or_not_at_all(self, tmp_path, patch):
        path = tmp_path / "file"
        mnist.write_file(path, b"one", new=True)
        with raises(FileExistsError, match=f"another run has written {path}"):
            mnist.write_file(path, b"two", new=True)
        patch(os, "replace", lambda written, _: os.stat(tmp_path / "no"))
        with raises(FileNotFoundError):
            mnist.write_file(path, b"two")
        assert contents(tmp_path) == {path: b"one"}

    def test_a_file_is_on_disk_before_it_has_its_name(self, tmp_path, patch):
        order, replace = [], os.replace
        patch(os, "fsync", lambda file: order.append(os.fstat(file).st_size))
        patch(os, "replace", lambda *paths: order.append("named") or replace(*paths))
        mnist.write_file(tmp_path / "file", b"four")
        assert order == [4, "named"]

    def test_a_checkpoint_restores_every_part(self, saved):
        (state, path), other = saved, new_state(fp16=True)
        content = mnist.load_checkpoint(str(path), **other._asdict())
        assert content["history"] == known_history(1)
        assert known_history(1)[0].items() <= content.items()
        assert content["config"] == {"seed": 1}

        assert same_bits(state.model.state_dict(), other.model.state_dict())
        momenta = [s.optimizer.state_dict()["state"][0] for s in (state, other)]
        assert same_bits(*momenta)
        for part, restored in zip(state[2:], other[2:], strict=True):
            assert part.state_dict() == restored.state_dict()

    @each("value", [torch.ones(1), DOUBLE, (1, 2), Path("x")])
    def test_a_value_that_is_not_plain_is_named(self, saved, value):
        [m], bad = known_history(1), {"margin": value}
        for history, config in (([m | bad], {}), ([m], bad)):
            with raises(TypeError, match="margin must be plain numbers"):
                mnist.save_checkpoint(saved[1], history, config, model=saved[0].model)

    def test_what_is_saved_is_read_again(self, saved):
        values = [-0.5, math.inf, True, None, "text", [1, [2.5]], {"a": [DOUBLE]}]
        history, config = known_history(1), {"0": values}
        history[0] |= {str(i): value for i, value in enumerate(values)}
        mnist.save_checkpoint(saved[1], history, config, model=saved[0].model)
        content = mnist.load_checkpoint(saved[1])
        assert (content["history"], content["config"]) == (history, config)

    def test_damage_is_refused_and_changes_nothing(self, saved):
        model, path = new_state().model, saved[1]
        old = {k: w.clone() for k, w in model.state_dict().items()}
        new = saved[0].model.state_dict()
        whole, rng, refused = path.read_bytes(), random.Random(0), 0
        for i in range(200):
            size = len(whole) if i % 3 else rng.randrange(1, len(whole))
            content = bytearray(whole[:size])
            content[rng.randrange(size)] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            try:
                mnist.load_checkpoint(path, model=model)
            except OSError:
                refused += 1

            weights = model.state_dict()  # some bits mean nothing
            assert same_bits(old, weights) or same_bits(new, weights)
        assert refused > 150

    def test_what_is_no_checkpoint_is_refused_not_run(self, saved, tmp_path):
        touched = tmp_path / "touched"
        reduce = {"__reduce__": lambda _: (Path.touch, (touched,))}
        evil, good = type("Evil", (), reduce)(), torch.load(saved[1])
        weights = good["model_state_dict"]
        fewer = {k: w for k, w in weights.items() if k != "layers.11.bias"}
        nan = weights | {"layers.11.bias": torch.full((10,), math.nan)}
        bad = [{"epoch": evil}, {"scheduler_state_dict": 0}]
        bad += [{"config": None}, {"history": []}]
        bad += [{"model_state_dict": w} for w in (nan, fewer, weights | {"x": nan})]

        for content in ([], evil, weights, *(good | part for part in bad)):
            torch.save(content, saved[1])
            with raises(OSError, match="is damaged or does not fit: "):
                mnist.load_checkpoint(saved[1], **new_state()._asdict())
        assert not touched.exists()

    def test_the_newest_is_the_last_else_the_best(self, tmp_path):
        for name in ("best_mnist_model_7", "mnist_model_epoch_7 (1)"):
            (tmp_path / f"{name}.pth").touch()
        assert mnist.newest_checkpoint(tmp_path) is None
        for name in ("best_mnist_model", "mnist_model_epoch_9", "mnist_model_epoch_10"):
            (tmp_path / f"{name}.pth").touch()
            assert mnist.newest_checkpoint(tmp_path).stem == name

    def test_the_best_is_of_the_lowest_loss(self, tmp_path):
        history = known_history(4)
        history[1]["val_loss"] = 0.01
        for n in (4, 2, 1):
            (tmp_path / f"mnist_model_epoch_{n}.pth").write_text(str(n))
        mnist.keep_best(tmp_path, history)
        (tmp_path / "mnist_model_epoch_2.pth").unlink()  # by hand
        mnist.keep_best(tmp_path, history)
        assert (tmp_path / BEST.name).read_text() == "2"


# --------------------------------------------------------------------------------------- Report
class TestReport:
    def test_a_table_marks_the_best_so_far(self):
        history = known_history(5)
        for m, loss in zip(history, (0.2, 0.3, 0.25, 0.2, 0.1), strict=True):
            m["val_loss"] = loss
        header, *rows = mnist.make_table(history)
        assert header.split()[2:5] == [*SPLITS]
        row = "1* 0.4000  0.1000  99.00%  0.2000  99.40%  0.0800  99.20%    12.3  ###"
        assert rows[0].strip() == row
        assert "".join(row[4] for row in rows) == "*   *"
        history[0]["val_accuracy"] = 0.1
        assert max(map(len, mnist.make_table(history * 30))) <= 79

    @each("n", [5, 26])
    def test_a_report_has_a_confusion_matrix(self, n):
        confusion = torch.eye(n, dtype=int)
        confusion[4, 4], confusion[4, 3], confusion[2, 2] = 70, 30, 0
        metrics = {"data": "synthetic", "parameters": 7954, "best_epoch": 3}
        metrics |= {"test_accuracy": 0.9712, "confusion": confusion.tolist()}
        report = mnist.make_report(metrics).splitlines()

        assert report[0] == "synthetic test accuracy 97.12%"
        assert report[1] == "7,954 parameters, weights of epoch 3"
        assert report[4].split() == [*map(str, range(n))]
        assert report[9].split() == ["4", *"...", "30", "70", *"." * (n - 5), "70.0%"]
        assert [row[-6:] for row in report[5:8]] == ["100.0%", "100.0%", "  0.0%"]
        assert {len(line) for line in report[5:]} == {len(report[3])}


# ------------------------------------------------------------------------------------------ Run
KINDS = ["simple bf16 onecycle", "simple fp16 step", "wide off onecycle"]


class TestRun:
    def test_offline_only_a_new_run_draws_digits(self, run, capsys):
        flags = "--epochs 1 --batch-size 2000 --data-dir empty"
        run("--epochs 1 --out other")
        for more in ("--data mnist", "--out other --resume"):
            assert "into empty/MNIST/raw" in main("--data-dir empty", more)
        assert run(flags) is None
        printed, metrics = capsys.readouterr().out, metrics_of()
        assert re.search(r"SYNTHETIC .*\nNo download: put train-images-", printed)
        assert "synthetic test accuracy" in printed
        assert metrics["config"]["images"] == 11_000

    @each("kind", KINDS)
    def test_an_epoch_is_measured_on_each_split(self, run, patch, kind):
        model, amp, _ = kind.split()
        train = Mock(side_effect=mnist.train_one_epoch)
        patch(mnist, "train_one_epoch", train)
        patch(time, "perf_counter", iter([5, 8]).__next__)
        run(f"--epochs 1 --model {model} --amp {amp} --lr 0.01")
        net = mnist.MODELS[model]()
        mnist.load_checkpoint(BEST, model=net)
        known, test = mnist.load_mnist("data")

        metrics = metrics_of()
        [m] = metrics["history"]
        for split, data in (("val", [t[310:] for t in known]), ("test", test)):
            loss, accuracy, logits = mnist.evaluate(net, data)
            assert m[f"{split}_loss"] == approx(loss, rel=1e-4)
            assert m[f"{split}_accuracy"] == accuracy
        counts = torch.zeros(10, 10, dtype=int)
        for true, seen in zip(test[1], logits.argmax(1), strict=True):
            counts[true, seen] += 1
        assert metrics["confusion"] == counts.tolist()
        state, _, precision, steps, *_ = train.call_args.args
        assert (precision, steps) == (mnist.PRECISIONS[amp], 6)
        assert state.scaler.is_enabled() == (amp == "fp16")
        assert m["seconds"] == 3

    @each("losses", [[3, 2, 2, 1, 1], [1, 2, 1]])
    def test_the_lowest_validation_loss_chooses(self, run, patch, losses):
        val, evaluate = iter(losses), mnist.evaluate

        def planned(model, data):
            _, accuracy, logits = evaluate(model, data)
            return next(val) if len(data[1]) == 90 else 9.0, accuracy, logits

        patch(mnist, "evaluate", planned)
        run("--epochs", len(losses))
        metrics, best = metrics_of(), losses.index(1)
        assert torch.load(BEST)["epoch"] == metrics["best_epoch"] == best + 1
        assert metrics["test_accuracy"] == metrics["history"][best]["test_accuracy"]

    @each(("model", "factor"), [("simple", 1), ("wide", 2)])
    def test_epochs_distort_less_and_less(self, run, patch, model, factor):
        augment = Mock(side_effect=lambda x, k: x)
        patch(mnist, "augment", augment)
        run(f"--epochs 5 --seed 3 --lr 0.01 --model {model}")
        calls = [call.args for call in augment.call_args_list]
        assert len({images.sum().item() for images, _ in calls}) == 30
        strengths = [strength / factor for _, strength in calls[::6]]
        assert strengths == approx([0.93, 0.79, 0.65, 0.51, 0.37])
        rates = [m["lr"] for m in metrics_of()["history"]]
        assert rates == approx([4e-4, 0.01, 8.5e-3, 5e-3, 1.5e-3], rel=0.1)

    @each("kind", KINDS)
    def test_a_resumed_run_ends_as_a_whole_one(self, run, kind):
        model, amp, schedule = kind.split()
        run(f"--epochs 3 --lr 0.01 --model {model} --amp {amp} --schedule {schedule}")
        whole, metrics = weights_of(LAST), metrics_of()
        LAST.unlink()
        assert main("--resume") is None
        assert same_bits(whole, weights_of(LAST))
        assert metrics == metrics_of()

    def test_a_run_does_not_go_on_with_other_data(self, run):
        run("--epochs 1 --schedule step")
        write_mnist(Path("other/MNIST/raw"), train=390)
        error = main("--resume --epochs 2 --data-dir other")
        assert error == f"{ERROR}other holds other data than the run's"

    def test_a_loss_that_is_not_finite_ends_the_run(self, run):
        assert "loss of epoch 1 is not finite: try a lower" in run("--lr 1e9")
        assert contents("out") == {}

    def test_an_epoch_is_saved_before_printed(self, run, patch):
        patch(mnist, "make_table", Mock(side_effect=[[], BrokenPipeError("gone")]))
        assert run("--epochs 2") == f"{ERROR}gone"
        assert BEST.exists()

    def test_a_run_prints_what_it_writes(self, run, capsys):
        assert run("--epochs 2") is None
        printed, metrics = capsys.readouterr().out, metrics_of()
        chosen = (
            "model simple, data mnist, val_size 90, epochs 2, batch_size 50, lr 0.1,\n"
            "schedule onecycle, seed 1, amp off, images 400\n"
        )
        assert printed.startswith(f"new run in out\ndevice cpu, threads 1\n{chosen}Conv2d")

        table, report = Path("out/report.txt").read_text().split("\n\n", 1)
        assert printed.count(f"\n{table}\n") == 1
        assert printed.endswith(f"\n\n{report}\nfiles: out\n")
        assert report.startswith(f"mnist test accuracy {metrics['test_accuracy']:.2%}\n")
        assert report.endswith(f"\n\n{chosen}")
        assert "\nno plot: import of matplotlib" in printed
        assert not re.search(".{80}", printed)
        names = "best_mnist_model metrics mnist_model_epoch_1 mnist_model_epoch_2 report"
        assert sorted(path.stem for path in contents("out")) == names.split()
        keys = "data config history parameters best_epoch test_accuracy confusion"
        assert [*metrics] == keys.split()
        assert metrics["parameters"] == 7954
        assert metrics["config"] == torch.load(BEST)["config"]

    def test_to_evaluate_writes_nothing(self, run, capsys):
        run("--epochs 2")
        report = Path("out/report.txt").read_text().split("\n\n", 1)[1]
        before, _ = contents("."), capsys.readouterr()
        flags = "--val-size 59999 --seed 3 --batch-size 7 --dry-run"
        assert main(f"--evaluate ~/{BEST}", flags) is None
        printed = capsys.readouterr().out
        assert "recall" in printed
        assert report.startswith(printed)
        assert contents(".") == before

    @each("flags", ["--model wide --epochs 9", "--resume"])
    def test_a_dry_run_leaves_nothing(self, run, capsys, patch, flags):
        batches = Mock(side_effect=mnist.batches)
        patch(mnist, "batches", batches)
        before = contents(".")
        assert run("--dry-run", flags) is None
        printed = capsys.readouterr().out

        assert re.search(r"error\n   1\* .*\nno plot", printed)
        assert printed.endswith("\ndry run: all parts work, nothing is kept\n")
        assert {len(call.args[0][1]) for call in batches.call_args_list} == {50}
        assert contents(".") == before
        assert not Path(re.search(r"files: (.*)", printed)[1]).exists()


# --------------------------------------------------------------------------------- Command line
BAD = "epochs=0 epochs=x batch-size=0 val-size=0 lr=-1 lr=nan lr=inf lr=0 amp=x data=x"
ERRORS = {
    "--out /dev/null": ".* File exists: '/dev/null'",
    "--data-dir /dev/null": ".* Not a directory: '/dev/null.*'",
    "--batch-size 999 --dry-run": "--val-size leaves 310 images, .*",
}
CLASHES = ["lr 0.3 0.1", "batch-size 60 50", "epochs 15 1", "seed 2 1"]
CLASHES += ["amp bf16 off", "schedule step onecycle", "model wide simple"]
IMPOSSIBLE = [("lr", "\x1b[31mred"), ("epochs", [1, 2]), ("model", 0), ("seed", 0.5)]


class TestCommandLine:
    @each("flag", [*BAD.split(), "device=tpu"])
    def test_bad_usage_is_named_with_status_2(self, flag, capsys):
        assert main(f"--{flag}") == 2
        assert f"--{flag.split('=')[0]}" in capsys.readouterr().err.splitlines()[-1]

    def test_defaults_follow_the_device(self, patch):
        args = mnist.parse_args(["--device", "cpu"])
        kept = {"model": "simple", "data": "auto", "val_size": 5000, "epochs": 15}
        kept |= {"batch_size": 64, "lr": 0.4, "schedule": "onecycle", "seed": 1}
        assert args.settings == kept | {"amp": "off"}
        assert (str(args.out), str(args.data_dir)) == ("model_checkpoints", "data")
        assert mnist.parse_args(["--model=wide", "--device=cpu"]).lr == 0.05

        cuda = Mock(return_value=torch.device("cuda"))
        patch(torch.accelerator, "is_available", lambda: True)
        patch(torch.accelerator, "current_accelerator", cuda)
        for bf16, amp in ((True, "bf16"), (False, "fp16")):
            emulated = Mock(side_effect=lambda including_emulation, ok=bf16: ok)
            patch(torch.cuda, "is_bf16_supported", emulated)
            args = mnist.parse_args([])
            assert [args.device, args.batch_size, args.amp] == ["cuda", 128, amp]
            emulated.assert_called_once_with(including_emulation=False)

    def test_idle_threads_do_not_spin_for_long(self):
        source = Path(mnist.__file__).read_text(encoding="utf-8")
        before = source[: source.index("\nimport torch\n")]
        assert re.search(r"setdefault\(.GOMP_SPINCOUNT., .[3-9]000.\)", before)

    @each("flags", ERRORS)
    def test_what_fails_is_said_in_one_line(self, run, flags):
        assert re.fullmatch(ERROR + ERRORS[flags], run(flags))

    def test_a_folder_with_a_run_is_left_alone(self, run, data_dir):
        run("--epochs 1")
        shutil.rmtree(data_dir)  # said before the data is loaded
        for name in ("report.txt", "mnist_model_epoch_1.pth"):  # BEST is a run
            before = contents("out")
            assert run().startswith(f"{ERROR}out holds a run: add --resume")
            assert contents("out") == before
            Path("out", name).unlink()

    def test_a_resumed_run_has_its_own_settings(self, run, capsys):
        run("--model wide --schedule constant --epochs 1 --seed 5 --lr 0.01 --resume")
        printed = capsys.readouterr().out
        assert printed.startswith("NOTHING TO RESUME: new run in out\n")
        assert main("--resume") is None
        printed = capsys.readouterr().out
        assert printed.startswith("resuming out/mnist_model_epoch_1.pth\n")
        assert "lr 0.01, schedule\nconstant, seed 5," in printed
        assert re.search(r"error\n   1\* ", printed)

    @each("clash", CLASHES)
    def test_a_flag_unlike_the_run_is_a_clash(self, run, clash):
        run("--epochs 1")
        flag, new, old = clash.split()
        error = main(f"--resume --{flag} {new}")
        assert f"--{flag} is {new}, but out/mnist_model_epoch_1.pth has {old}" in error

    def test_a_finished_run_can_be_made_longer(self, run):
        run("--epochs 2 --schedule step")
        before = contents(".")
        BEST.unlink()  # as if killed before it was written
        assert main("--resume") is None
        assert contents(".") == before
        assert "--epochs is 1, but" in main("--resume --epochs 1")
        assert main("--resume --epochs 3") is None
        assert len(metrics_of()["history"]) == 3

    @each(("name", "value"), IMPOSSIBLE)
    def test_impossible_settings_are_refused(self, run, name, value):
        run("--epochs 1")
        content = torch.load(BEST)
        content["config"][name] = value
        path = "out/mnist_model_epoch_1.pth"
        torch.save(content, path)
        flag = name.replace("_", "-")
        for flags in ("--resume", f"--evaluate {path}"):
            assert re.match(f"{ERROR}{path}: argument --{flag}: [ -~]+$", main(flags))

    @pytest.mark.skipif(os.name == "nt", reason="sends a signal")
    def test_ctrl_c_says_how_to_go_on(self, data_dir):
        flags = f"--data mnist --data-dir ~/data --out ~/runs/3 --epochs 999 --seed {10**30}"
        command = [sys.executable, "-E", mnist.__file__, *HERE, *f"{SMALL} {flags}".split()]
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        pipes = {"stdout": PIPE, "stderr": PIPE, "text": True}
        with Popen(command, preexec_fn=heed, **pipes) as child:
            while not child.stdout.readline().startswith("epoch "):
                assert child.poll() is None
            assert child.stdout.readline().startswith("   1*")
            assert not Path("runs/3/mnist_model_epoch_50.pth").exists()  # at once
            child.send_signal(signal.SIGINT)
            hint = f"goes on with the run in {data_dir.parent / 'runs/3'}\n"
            assert child.communicate()[1] == f"\nstopped: --resume {hint}"

        assert child.returncode == 130


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
