# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "matplotlib", "pytest>=8"]
# ///
"""The specification of mnist.py, section by section.

MNIST_DIR=data MNIST_KILLS=60 python test_mnist.py    real MNIST too, and more kills
"""

import gzip
import json
import math
import multiprocessing
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
from http.client import IncompleteRead
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Thread
from types import ModuleType

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torchvision import datasets, transforms

import mnist

MNIST_DIR = os.getenv("MNIST_DIR")
KILLS = int(os.getenv("MNIST_KILLS", "4"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
SPLITS = ("train", "val", "test")
ERROR = "mnist.py: error: "
HERE = "--data-dir data --out out"
SMALL = "--device cpu --lr 0.1 --val-size 90 --batch-size 50"
BEST = Path("out/best_mnist_model.pth")

each = pytest.mark.parametrize
on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
forks = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="cannot fork"
)
torch.set_num_threads(1)
IMAGES, LABELS = mnist.draw_digits(500, seed=0)


# ------------------------------------------------------------------------------------- Fixtures
@pytest.fixture
def patch(monkeypatch):
    return monkeypatch.setattr


@pytest.fixture
def recorder(monkeypatch):
    """Put a function in place of another; return the list of its calls' arguments."""

    def replace(place, name, function):
        calls = []

        def noted(*args, **options):
            calls.append((*args, *options.values()))
            return function(*args, **options)

        monkeypatch.setattr(place, name, noted)
        return calls

    return replace


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
    """Run the command line on it; the clock stands still, matplotlib is hidden."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    return partial(main, HERE, SMALL)


@pytest.fixture
def saved(tmp_path):
    """A training state after three steps, and the path of its checkpoint."""
    state = new_state(schedule=("onecycle", 2, 3), fp16=True)
    mnist.train_one_epoch(state, mnist.batches(first(90), 30))
    path = tmp_path / "a.pth"
    mnist.save_checkpoint(path, known_history(1), {"seed": 1}, **state._asdict())
    return state, path


# -------------------------------------------------------------------------------------- Helpers
def write_mnist(raw, train=400):
    raw.mkdir(parents=True)
    arrays = (IMAGES[:train, 0], LABELS[:train], IMAGES[400:, 0], LABELS[400:])
    for name, array in zip(FILES, arrays, strict=True):
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (raw / name).write_bytes(head + array.byte().numpy().tobytes())


def main(*flags, module=mnist):
    """Run a command line; return what it exits with."""
    try:
        return module.main(" ".join(map(str, flags)).split())
    except SystemExit as stop:
        return stop.code


def adapted(*edits):
    """An edited copy of mnist.py, as people make them."""
    source = Path(mnist.__file__).read_text(encoding="utf-8")
    for old, new in edits:
        assert source.count(old) == 1, f"to be edited, but not in mnist.py once: {old}"
        source = source.replace(old, new)
    module = ModuleType("adapted")
    exec(source, vars(module))
    return module


def stop_in(epoch, monkeypatch, *flags, module=mnist):
    """Run a command line that Ctrl-C stops when this epoch is saved."""

    def keep_best(folder, history):
        if len(history) == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "keep_best", keep_best)
        assert main(*flags, module=module) == 130


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def weights_of(path):
    return torch.load(path)["model_state_dict"]


def metrics_of(out):
    return json.loads(Path(str(out), "metrics.json").read_text())


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def new_state(name="simple", lr=0.05, schedule=("constant", 1, 1), **options):
    torch.manual_seed(0)
    model = mnist.MODELS[name]().to(DEVICE)
    return mnist.make_state(model, lr, *schedule, **options)


def first(n):
    return IMAGES[:n].to(DEVICE), LABELS[:n].to(DEVICE)


def known_history(epochs):
    entry = {"lr": 0.4, "seconds": 12.34}
    for split in SPLITS:
        entry |= {f"{split}_loss": len(split) / 50, f"{split}_accuracy": 1 - len(split) / 500}
    return [{"epoch": epoch} | entry for epoch in range(1, epochs + 1)]


def leaves(model):
    return [m for m in model.modules() if not list(m.children())]


# ---------------------------------------------------------------------------------------- Model
class TestModel:
    @each("n", [1, 64])
    @each("name", mnist.MODELS)
    def test_a_network_gives_ten_logits_an_image(self, name, n):
        model = mnist.MODELS[name]().eval()
        assert model(torch.randn(n, 1, 28, 28)).shape == (n, 10)

    def test_the_simple_network_normalizes_after_each_convolution_but_the_last(self):
        layers = leaves(mnist.SimpleMNISTNet())
        after = [type(b) for a, b in pairwise(layers) if isinstance(a, nn.Conv2d)]
        assert after == [nn.BatchNorm2d] * 12 + [nn.AdaptiveAvgPool2d]

    def test_the_simple_network_has_relu_max_pooling_and_dropout(self):
        layers = leaves(mnist.SimpleMNISTNet())
        kinds = [type(m).__name__ for m in layers]
        counts = [kinds.count(kind) for kind in ("ReLU", "MaxPool2d", "Dropout")]
        assert (counts, len(layers)) == ([8, 2, 1], 37)
        assert [m.p for m in layers if isinstance(m, nn.Dropout)] == [0.05]

    def test_the_simple_network_adds_in_four_residual_blocks(self):
        layers = mnist.SimpleMNISTNet().eval().layers
        blocks = [m for m in layers if isinstance(m, mnist.ResidualBlock)]
        x = torch.randn(2, 24, 6, 6)
        assert len(blocks) == 4
        assert torch.equal(blocks[-1](x), (x + blocks[-1].branch(x)).relu())

    def test_the_wide_network_has_only_3x3_and_1x1_convolutions_relu_and_pooling(self):
        model = mnist.WideMNISTNet()
        kinds = {type(m).__name__ for m in leaves(model)}
        sizes = {w.shape[2:] for w in model.parameters()}
        assert kinds == {"Conv2d", "ReLU", "MaxPool2d", "AdaptiveAvgPool2d"}
        assert sizes == {(3, 3), (1, 1)}

    def test_the_simple_network_has_fewer_than_8000_parameters(self):
        model = mnist.SimpleMNISTNet().requires_grad_(False)
        assert model.count_parameters() == 7954 < model.budget == 8000

    @each(("budget", "verdict"), [(8000, "met"), (7955, "met"), (7954, "EXCEEDED")])
    def test_a_summary_says_whether_the_budget_is_met(self, capsys, budget, verdict):
        model = mnist.SimpleMNISTNet()
        model.budget = budget
        model.print_model_summary()
        line = f"SimpleMNISTNet: 7,954 parameters (budget: {budget:,}): {verdict}\n"
        assert capsys.readouterr().out.endswith(line)

    def test_a_summary_without_a_budget_says_nothing_of_it(self, capsys):
        mnist.WideMNISTNet().print_model_summary()
        assert capsys.readouterr().out.endswith("\nWideMNISTNet: 189,984 parameters\n")

    @each(
        ("name", "sizes"),
        [
            ("simple", "26 24 12 10 10 10 10 5 5 5 5 5 1"),
            ("wide", "26 24 22 11 11 9 7 1 1"),
        ],
    )
    def test_a_summary_has_a_row_a_layer(self, capsys, name, sizes):
        mnist.MODELS[name]().print_model_summary()
        *rows, total = capsys.readouterr().out.replace(",", "").splitlines()

        assert " ".join(re.findall(r" (\d+)\) ", "\n".join(rows))) == sizes
        assert sum(int(row.split()[-1]) for row in rows) == int(total.split()[1])
        assert re.fullmatch(r"Conv2d .*ReLU +\('N' (8|32) 26 26\) +\d+", rows[0])

    @each("kind", ["half", "double", "three channels", "pruned"])
    def test_a_summary_leaves_a_network_as_it_was(self, capsys, kind):
        model = mnist.SimpleMNISTNet()
        if kind == "three channels":
            model.layers[0][0] = nn.Conv2d(3, 8, 3, bias=False)
        elif kind == "pruned":
            prune.l1_unstructured(model.layers[0][0], "weight", 0.5)
        else:
            model = getattr(model, kind)()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        rng = torch.get_rng_state()

        model.print_model_summary()
        assert same_bits(before, model.state_dict())
        assert torch.equal(rng, torch.get_rng_state())
        assert model.training
        assert "SimpleMNISTNet: " in capsys.readouterr().out

    @each("amp", [None, torch.bfloat16, torch.float16])
    def test_one_batch_can_be_overfitted(self, amp):
        state = new_state(lr=0.1, fp16=amp == torch.float16)
        batch = [*mnist.batches(first(64), 64)]
        mnist.train_one_epoch(state, batch * 60, amp)
        loss, accuracy = mnist.train_one_epoch(state, batch, amp)
        assert accuracy == 1
        assert loss < 0.1

    def test_a_batch_can_be_overfitted_by_the_wide_network(self):
        state = new_state("wide", lr=0.002)
        batch = [*mnist.batches(first(5), 5)]
        mnist.train_one_epoch(state, batch * 150)
        assert mnist.train_one_epoch(state, batch)[1] == 1


# ----------------------------------------------------------------------------------------- Data
def map_of(draws, strength=1.0, size=28):
    """Where augment takes the middle pixels from, as a 2x2 matrix and a shift."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "rand", lambda *_, **__: torch.tensor([draws] * 2).T)
        patched.setattr(torch, "randn", torch.zeros)  # no elastic field
        ramp = (torch.arange(size) - (size - 1) / 2).expand(size, size)
        images = torch.stack([ramp, ramp.T])[:, None]  # of their own coordinates
        x, y = mnist.augment(images, strength)[:, 0]

    c = size // 2
    rows = [[m[c, c + 1] - m[c, c], m[c + 1, c] - m[c, c]] for m in (x, y)]
    shift = [m[c - 1 : c + 1, c - 1 : c + 1].mean() for m in (x, y)]
    return torch.tensor(rows), torch.tensor(shift)


class TestData:
    def test_missing_files_are_downloaded_whole_by_several_at_once(self, data_dir, patch):
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

    @each("error", [RuntimeError, IncompleteRead, TimeoutError, ConnectionResetError])
    def test_being_offline_is_a_connection_error(self, tmp_path, patch, error):
        def download(self):
            assert Path(self.root).parents[1] == tmp_path  # where a rename is atomic
            raise error(b"cut off")

        patch(datasets.MNIST, "download", download)
        with pytest.raises(ConnectionError, match=f"{FILES[3]} into {tmp_path}.*cut off"):
            mnist.load_mnist(tmp_path)

    @each("name", FILES)
    def test_a_damaged_file_is_an_os_error(self, data_dir, name):
        path = data_dir / "MNIST/raw" / name
        whole = path.read_bytes()
        others = [*contents(path.parent).values()]
        others.remove(whole)
        for content in (whole[:-9], whole + b"?", b"", b"\x1f" + whole[1:], *others):
            path.write_bytes(content)
            with pytest.raises(OSError, match="raw is damaged: delete it"):
                mnist.load_mnist(data_dir)

    @each("name", FILES[1::2])
    @each("label", [10, 255])
    def test_a_label_over_nine_is_refused_when_loaded(self, data_dir, name, label):
        path = data_dir / "MNIST/raw" / name
        path.write_bytes(path.read_bytes()[:-1] + bytes([label]))
        with pytest.raises(OSError, match="one label an image, below 10"):
            mnist.load_mnist(data_dir)

    @each("strength", [1.0, 0.5])
    @each("size", [28, 40])
    def test_a_pure_shift_moves_by_at_most_2_6_pixels(self, strength, size):
        for extreme, sign in ((1, 1), (0, -1)):
            matrix, right = map_of([0.5, 0.5, 0.5, extreme, 0.5], strength, size)
            _, down = map_of([0.5, 0.5, 0.5, 0.5, extreme], strength, size)
            moved = sign * strength * 2.6
            assert matrix.flatten().tolist() == pytest.approx([1, 0, 0, 1], abs=1e-4)
            assert [*right, *down] == pytest.approx([moved, 0, 0, moved], abs=1e-4)

    @each("strength", [1.0, 0.5])
    def test_a_pure_rotation_is_of_at_most_13_degrees(self, strength):
        matrix, _ = map_of([1, 0.5, 0.5, 0.5, 0.5], strength)
        angle = math.degrees(math.atan2(matrix[1, 0], matrix[0, 0]))
        assert angle == pytest.approx(13 * strength, abs=0.01)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(2), rtol=0, atol=1e-4)

    @each(("extreme", "factor"), [(1, 1.13), (0, 0.87)])
    def test_a_pure_scale_is_of_at_most_13_percent(self, extreme, factor):
        matrix, shift = map_of([0.5, extreme, 0.5, 0.5, 0.5])
        assert matrix.flatten().tolist() == pytest.approx([factor, 0, 0, factor], abs=1e-4)
        assert shift.tolist() == pytest.approx([0, 0], abs=1e-4)

    @each(("extreme", "slope"), [(1, 0.13), (0, -0.13)])
    def test_a_pure_shear_is_of_at_most_13_percent(self, extreme, slope):
        matrix, _ = map_of([0.5, 0.5, extreme, 0.5, 0.5])
        assert matrix.flatten().tolist() == pytest.approx([1, slope, 0, 1], abs=1e-4)

    def test_a_bend_is_a_smooth_field_of_0_3_pixels(self, patch):
        field = torch.zeros(1, 2, 5, 5)
        field[0, 0, :, 2] = 1  # the middle is moved along x
        patch(torch, "rand", lambda *_, **__: torch.full((5, 1), 0.5))
        patch(torch, "randn", lambda *size, **_: {(1, 2, 5, 5): field}[size])

        moved = mnist.augment(torch.arange(28.0).expand(1, 1, 28, 28), 0.5) - torch.arange(28)
        assert moved.mean((0, 1, 2))[[10, 13]].tolist() == pytest.approx([0.085, 0.15], abs=0.01)
        assert moved[..., 0].abs().max() < 0.05
        assert moved.diff().abs().max() < 0.05

    def test_strength_0_leaves_an_image(self):
        images = IMAGES[:9] / 255
        torch.testing.assert_close(mnist.augment(images, 0.0), images, rtol=0, atol=1e-4)

    @each("still", ["rand", "randn"])
    def test_two_images_are_distorted_differently(self, patch, still):
        half = {"rand": lambda *size, **_: torch.full(size, 0.5), "randn": torch.zeros}
        patch(torch, still, half[still])
        out = mnist.augment((IMAGES[:1] / 255).expand(64, 1, 28, 28))
        assert (out[1:] - out[:1]).abs().amax((1, 2, 3)).min() > 0.02

    def test_what_comes_in_from_outside_is_black(self):
        assert mnist.augment(torch.ones(64, 1, 28, 28))[:, 0, 0, 0].min() < 0.9

    def test_digits_are_drawn_by_a_seed(self):
        again, other = mnist.draw_digits(500, 0), mnist.draw_digits(500, 1)
        assert all(map(torch.equal, again, (IMAGES, LABELS)))
        assert not any(map(torch.equal, other, (IMAGES, LABELS)))

    def test_digits_are_drawn_as_their_labels(self, patch):
        patch(mnist, "augment", lambda images, strength: images)
        images, labels = mnist.draw_digits(500, 0)
        small = images[:, 0, 4:24:4, 8:20:4] // 255
        art = ["".join(" #"[p] for p in small[labels == n][0].flatten()) for n in (1, 7, 8)]

        assert art == [" # ##  #  # ###", "###  #  # #  # ", "#### ##### ####"]
        ink = [small[labels == n][0].sum().item() for n in range(10)]
        assert ink == [12, 8, 11, 11, 9, 11, 12, 7, 13, 12]

    @each("train", [False, True])
    def test_batches_hold_each_image_once_normalized(self, patch, train):
        patch(mnist, "augment", lambda images, strength: images)
        numbers = torch.arange(100)
        images = numbers.byte().view(100, 1, 1, 1).expand(100, 1, 28, 28)
        pairs = [*mnist.batches((images, numbers), 30, train=train)]
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))

        assert [len(labels) for _, labels in pairs] == [30, 30, 30] + [10] * (not train)
        assert torch.equal(((x[:, 0, 9, 9] * 0.3081 + 0.1307) * 255).round().long(), y)
        assert len(y.unique()) == len(y)
        assert torch.equal(y, y.sort()[0]) == (not train)

    @each(
        ("options", "strengths"),
        [({}, []), ({"train": True}, [1.0]), ({"train": True, "strength": 0.3}, [0.3])],
    )
    def test_batches_are_augmented_only_to_train(self, recorder, options, strengths):
        calls = recorder(mnist, "augment", lambda images, strength: images)
        next(mnist.batches(first(90), 30, **options))
        assert [strength for _, strength in calls] == strengths
        assert all(0 <= images.min() < images.max() <= 1 for images, _ in calls)

    def test_batches_take_one_image_to_test_and_a_full_batch_to_train(self):
        assert len(next(mnist.batches(first(1), 64))[1]) == 1
        for data, train in ((first(0), False), (first(63), True)):
            with pytest.raises(ValueError, match="do not fill a batch of 64"):
                next(mnist.batches(data, 64, train=train))

    def test_batches_refuse_images_of_floats(self):
        with pytest.raises(ValueError, match="uint8, not torch.float32"):
            next(mnist.batches((IMAGES / 255, LABELS), 64))

    @pytest.mark.skipif(not MNIST_DIR, reason="MNIST_DIR is not set")
    def test_one_epoch_of_real_mnist_reads_98_percent(self, tmp_path):
        command = f"{sys.executable} {mnist.__file__} --epochs 1 --data mnist --data-dir"
        assert Popen([*command.split(), MNIST_DIR, "--out", tmp_path]).wait() == 0
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
    def test_onecycle_peaks_after_a_fifth_and_ends_near_zero(self):
        values = [*rates("onecycle")]
        assert values[::20] == pytest.approx([0.004, 0.1, 0.085, 0.05, 0.015], rel=0.05)
        assert values[-1] < 0.0002

    def test_onecycle_takes_any_number_of_steps(self):
        assert all(max(rates("onecycle", 1, n)) <= 0.1 for n in range(1, 13))

    def test_step_multiplies_by_0_7_after_each_epoch(self):
        assert [*rates("step")][9::10] == pytest.approx([0.1 * 0.7**n for n in range(10)])

    def test_constant_stays(self):
        assert {*rates("constant")} == {0.1}

    def test_the_optimizer_is_sgd_with_nesterov_momentum(self):
        group = new_state().optimizer.param_groups[0]
        recipe = {"momentum": 0.9, "weight_decay": 5e-5, "nesterov": True}
        assert recipe.items() <= group.items()

    def test_only_fp16_scales_the_loss(self):
        enabled = [new_state(fp16=fp16).scaler.is_enabled() for fp16 in (False, True)]
        assert enabled == [False, True]
        assert not new_state().scaler.is_enabled()

    def test_a_step_that_overflows_is_skipped(self):
        state = new_state("wide", 0.01, ("onecycle", 1, 1), fp16=True)
        state.scaler._init_scale = 2.0**40
        batches = [*mnist.batches(first(8), 2)] * 2
        loss, _ = mnist.train_one_epoch(state, batches, torch.float16)
        assert math.isfinite(loss)
        assert 1 < state.scaler.get_scale() < 2.0**40

    def test_an_epoch_returns_means_over_uneven_batches(self):
        state = new_state("wide", lr=1e-12)
        parts = [part.split([4] * 9 + [3, 1]) for part in next(mnist.batches(first(40), 40))]
        trained = mnist.train_one_epoch(state, zip(*parts, strict=True))
        assert trained == pytest.approx(mnist.evaluate(state.model, first(40))[:2], rel=1e-4)

    def test_the_gradients_of_a_step_do_not_add_up(self):
        once, twice = new_state(), new_state()
        batch = [*mnist.batches(first(30), 30)]
        for state in (once, twice):
            mnist.train_one_epoch(state, batch)
        for p in twice.model.parameters():
            p.grad.fill_(9)
        for state in (once, twice):
            mnist.train_one_epoch(state, batch)
        assert same_bits(once.model.state_dict(), twice.model.state_dict())

    def test_a_terminal_shows_a_bar_within_40_columns(self, capsys, patch):
        state = new_state("wide", lr=1e-12)
        patch(os, "isatty", lambda stream: stream == 1)
        loader = mnist.batches(first(78), 2)
        loss, accuracy = mnist.train_one_epoch(state, loader, total=39, title="12/15")

        half, whole, _ = capsys.readouterr().out.split("\r")
        assert re.fullmatch(r"12/15 \[## {3}\] loss \d\.\d{4} acc \d+\.\d\d%", half)
        assert whole == f"12/15 [#####] loss {loss:.4f} acc {accuracy:.2%}"
        assert len(whole) < 40

    @each(("terminal", "total"), [(False, 2), (True, 0)])
    def test_without_a_terminal_or_a_total_there_is_no_bar(self, capsys, patch, terminal, total):
        patch(os, "isatty", lambda _: terminal)
        mnist.train_one_epoch(new_state("wide"), mnist.batches(first(78), 39), total=total)
        assert capsys.readouterr().out == ""

    def test_a_graph_is_recorded_once_after_three_steps(self, recorder):
        calls = recorder(mnist, "record", lambda step, *inputs: step)
        eager, graphed = new_state(), new_state()
        loader = [*mnist.batches(first(100), 10)]
        mnist.train_one_epoch(eager, loader)
        mnist.train_one_epoch(graphed, loader, graph=True)

        assert len(calls) == 1
        assert torch.equal(calls[0][1], loader[3][0])
        assert same_bits(eager.model.state_dict(), graphed.model.state_dict())

    @on_cuda
    @each("amp", [None, torch.bfloat16, torch.float16])
    @each("sizes", [[10] * 10, [10, 10, 10, 10, 7, 10, 1, 10]])
    def test_a_graphed_epoch_has_the_bits_of_an_eager_one(self, patch, amp, sizes):
        patch(torch.backends.cudnn, "deterministic", True)
        n, states = sum(sizes), []
        x, y = next(mnist.batches(first(n), n))
        loader = [*zip(x.split(sizes), y.split(sizes), strict=True)]
        for graph in (False, True):
            state = new_state(fp16=amp == torch.float16)
            torch.manual_seed(1)
            mnist.train_one_epoch(state, loader, amp, graph=graph)
            states.append(state.model.state_dict())
        assert same_bits(*states)

    def test_evaluate_returns_means_and_logits_in_evaluation_mode(self):
        model, (images, labels) = new_state("wide").model, first(78)
        loss, accuracy, logits = mnist.evaluate(model, (images, labels))

        expected = model((images / 255 - 0.1307) / 0.3081).detach()
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)
        assert loss == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-4)
        assert accuracy == (expected.argmax(1) == labels).sum().item() / 78
        assert not model.training
        assert not (logits.requires_grad or logits.is_inference())


# ---------------------------------------------------------------------------------- Checkpoints
NOT_PLAIN = {
    "tensor": torch.ones(1),
    "number of NumPy": numpy.float64(1),
    "tuple": (1, 2),
    "nested": [numpy.float32(1)],
}


class TestCheckpoints:
    def test_a_file_is_written_whole_or_not_at_all(self, tmp_path, patch):
        path = tmp_path / "file"
        mnist.write_file(path, b"one")
        patch(os, "replace", lambda written, _: os.stat(written.parents[1] / "no"))
        with pytest.raises(FileNotFoundError):
            mnist.write_file(path, b"two")
        assert contents(tmp_path) == {path: b"one"}

    def test_a_file_is_on_the_disk_before_it_has_its_name(self, tmp_path, recorder, patch):
        order = []
        sync, replace = os.fsync, os.replace
        patch(os, "fsync", lambda file: order.append(os.fstat(file).st_size) or sync(file))
        patch(os, "replace", lambda *paths: order.append("named") or replace(*paths))
        mnist.write_file(tmp_path / "file", b"four")
        assert order == [4, "named"]

    def test_a_new_file_replaces_none(self, tmp_path):
        path = tmp_path / "file"
        mnist.write_file(path, b"one", new=True)
        with pytest.raises(FileExistsError, match=f"another run has written {path}"):
            mnist.write_file(path, b"two", new=True)
        assert contents(tmp_path) == {path: b"one"}

    def test_a_folder_that_cannot_be_removed_is_no_failure(self, tmp_path, patch):
        def deny(path, *_, **__):
            raise PermissionError(f"in use: {path}")

        patch(os, "rmdir", deny)
        mnist.write_file(tmp_path / "file", b"one")
        assert (tmp_path / "file").read_bytes() == b"one"

    def test_a_checkpoint_restores_every_part(self, saved):
        state, path = saved
        other = new_state(schedule=("onecycle", 2, 3), fp16=True)
        content = mnist.load_checkpoint(str(path), **other._asdict())

        assert content["history"] == known_history(1)
        assert known_history(1)[0].items() <= content.items()
        assert content["config"] == {"seed": 1}
        assert same_bits(state.model.state_dict(), other.model.state_dict())
        assert [p.state_dict() for p in state[2:]] == [p.state_dict() for p in other[2:]]
        assert same_bits(*(s.optimizer.state_dict()["state"][0] for s in (state, other)))

    @each("kind", NOT_PLAIN)
    def test_a_value_that_cannot_be_read_again_is_refused(self, saved, kind):
        history = known_history(1)
        history[0]["margin"] = NOT_PLAIN[kind]
        with pytest.raises(TypeError, match="float32" if kind == "nested" else "^margin must"):
            mnist.save_checkpoint(saved[1], history, {}, model=saved[0].model)

    def test_what_is_saved_is_read_again(self, saved):
        values = [-0.5, math.inf, True, None, "text", [1, [2.5]], {"a": [numpy.float64(1)]}]
        history = known_history(1)
        history[0] |= {str(i): value for i, value in enumerate(values)}
        mnist.save_checkpoint(saved[1], history, {"0": values}, model=saved[0].model)
        content = mnist.load_checkpoint(saved[1])
        assert content["history"] == history
        assert content["config"] == {"0": values}

    def test_damage_is_refused_and_changes_nothing(self, saved):
        state, path = saved
        whole, good = path.read_bytes(), weights_of(path)
        rng, refused = random.Random(0), 0
        for i in range(200):
            content = bytearray(whole if i % 3 else whole[: rng.randrange(len(whole))])
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            try:
                mnist.load_checkpoint(path, model=state.model)
            except OSError:
                refused += 1
            # Some bits of a file mean nothing; no other may change a weight.
            assert all(torch.equal(good[k], w.cpu()) for k, w in state.model.state_dict().items())
        assert refused > 150

    def test_code_in_a_checkpoint_is_not_run(self, saved, tmp_path):
        touched = tmp_path / "touched"
        evil = type("Evil", (), {"__reduce__": lambda _: (Path.touch, (touched,))})()
        for content in (evil, torch.load(saved[1]) | {"epoch": evil}):
            torch.save(content, saved[1])
            with pytest.raises(OSError, match="is damaged or does not fit: Unpickling"):
                mnist.load_checkpoint(saved[1])
        assert not touched.exists()

    def test_what_is_no_checkpoint_of_this_network_is_refused(self, saved):
        good = torch.load(saved[1])
        weights = good["model_state_dict"]
        fewer = {k: w for k, w in weights.items() if k != "layers.11.bias"}
        nan = weights | {"layers.11.bias": torch.full((10,), math.nan)}
        more = weights | {"x": torch.ones(1)}
        foreign = [[], weights, good | {"scheduler_state_dict": 0}]
        foreign += [good | {"model_state_dict": w} for w in (nan, fewer, more)]
        foreign += [good | {"config": None}, good | {"history": []}]

        for content in foreign:
            torch.save(content, saved[1])
            with pytest.raises(OSError, match="is damaged or does not fit"):
                mnist.load_checkpoint(saved[1], **new_state()._asdict())

    def test_a_part_that_was_not_saved_is_named(self, saved):
        with pytest.raises(OSError, match="modle_state_dict"):
            mnist.load_checkpoint(saved[1], modle=saved[0].model)

    def test_the_newest_checkpoint_is_that_of_the_last_epoch_else_the_best(self, tmp_path):
        for name in ("best_mnist_model_7", "mnist_model_epoch_7 (1)"):
            (tmp_path / f"{name}.pth").touch()
        assert mnist.newest_checkpoint(tmp_path) is None
        for name in ("best_mnist_model", "mnist_model_epoch_9", "mnist_model_epoch_10"):
            (tmp_path / f"{name}.pth").touch()
            assert mnist.newest_checkpoint(tmp_path) == tmp_path / f"{name}.pth"

    def test_the_best_is_that_of_the_lowest_loss_unless_deleted(self, tmp_path):
        history = known_history(4)
        history[1]["val_loss"] = 0.01
        for n in (4, 2, 1):
            (tmp_path / f"mnist_model_epoch_{n}.pth").write_text(str(n))
        mnist.keep_best(tmp_path, history)
        (tmp_path / "mnist_model_epoch_2.pth").unlink()
        mnist.keep_best(tmp_path, history)
        assert (tmp_path / "best_mnist_model.pth").read_text() == "2"


# --------------------------------------------------------------------------------------- Report
class TestReport:
    def test_a_table_has_a_row_an_epoch_and_marks_the_best_so_far(self):
        history = known_history(4)
        for m, loss in zip(history, (0.3, 0.2, 0.2, 0.1), strict=True):
            m["val_loss"] = loss
        header, *rows = mnist.make_table(history)

        assert header.split() == ["epoch", "lr", *SPLITS, "seconds", "val", "error"]
        row = "2* 0.4000  0.1000  99.00%  0.2000  99.40%  0.0800  99.20%    12.3  ###"
        assert rows[1].strip() == row
        assert "".join(row[4] for row in rows) == "** *"

    def test_a_table_fits_79_columns(self):
        history = known_history(120)
        history[0]["val_accuracy"] = 0.1
        assert max(map(len, mnist.make_table(history))) <= 79

    @each("n", [5, 26])
    def test_a_report_has_a_confusion_matrix_of_n_classes(self, n):
        confusion = torch.eye(n, dtype=int)
        confusion[4, 4], confusion[4, 3], confusion[2, 2] = 70, 30, 0
        metrics = {"parameters": 7954, "test_accuracy": 0.9712, "best_epoch": 3}
        metrics |= {"data": "synthetic", "confusion": confusion.tolist()}
        report = mnist.make_report(metrics).splitlines()

        assert report[0] == "synthetic test accuracy 97.12%"
        assert report[1] == "7,954 parameters, weights of epoch 3"
        assert report[4].split() == [*map(str, range(n))]
        assert report[9].split() == ["4", *"...", "30", "70", *"." * (n - 5), "70.0%"]
        assert [row.split()[-1] for row in report[5:8]] == ["100.0%", "100.0%", "0.0%"]
        assert {len(line) for line in report[5:]} == {len(report[3])}

    @each(("epochs", "step"), [(1, 1), (100, 6)])
    def test_a_plot_shows_loss_and_accuracy_of_each_split(self, recorder, epochs, step):
        figure = pytest.importorskip("matplotlib.figure").Figure
        calls = recorder(figure, "savefig", figure.savefig)
        history = known_history(epochs)
        assert mnist.draw_plot(history).startswith(b"\x89PNG")

        for axes, key in zip(calls[0][0].axes, ("loss", "accuracy"), strict=True):
            names = [text.get_text() for text in axes.get_legend().get_texts()]
            curves = [[m[f"{split}_{key}"] for m in history] for split in SPLITS]
            assert [axes.get_xlabel(), axes.get_ylabel(), *names] == ["epoch", key, *SPLITS]
            assert [line.get_ydata().tolist() for line in axes.lines] == curves
            assert len({line.get_linestyle() for line in axes.lines}) == 3
            assert axes.get_xticks().tolist() == [*range(1, epochs + 1, step)]


# ------------------------------------------------------------------------------------------ Run
SGD = "sgd = SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-5, nesterov=True)"
ONECYCLE = "OneCycleLR(sgd, lr, total, pct_start=0.2, cycle_momentum=False)"
COSINE = "torch.optim.lr_scheduler.CosineAnnealingLR(sgd, total)"
GROUPS = "SGD([{'params': [p]} for p in model.parameters()], lr, momentum=0.9)"
OPTIMIZERS = {
    "AdamW": [(SGD, "sgd = torch.optim.AdamW(model.parameters(), lr / 100)")],
    "RMSprop and cosine": [
        (SGD, "sgd = torch.optim.RMSprop(model.parameters(), lr / 100)"),
        (ONECYCLE, COSINE),
    ],
    "many groups": [(SGD, f"sgd = {GROUPS}")],
}
SEED = '    flag("--seed"'
SWITCH = 'flag("--mixup", action="store_true")'
SETTINGS = {
    "a float of 0": ("", 'flag("--smooth", type=float, default=0.0)', 0.0),
    "a float": ("--smooth 0.5", 'flag("--smooth", type=float, default=0.0)', 0.5),
    "a text": ("--smooth a=b", 'flag("--smooth", default="a -b")', "a=b"),
    "a default text": ("", 'flag("--smooth", default="a -b")', "a -b"),
    "nothing": ("", 'flag("--smooth", type=int)', None),
    "a switch off": ("", 'flag("--smooth", action="store_true")', False),
    "a switch on": ("--smooth", 'flag("--smooth", action="store_true")', True),
}
SECONDS = '        m["seconds"] ='
METRICS = {"a": "-0.5", "b": "math.nan", "c": "True", "d": "[1, 2.5]", "e": "None", "f": "'x'"}
DATASET = ("DATASET = datasets.MNIST", "DATASET = datasets.FashionMNIST")


class TestRun:
    def test_the_last_training_images_are_for_validation(self, data_dir):
        flags = f"{HERE} --data mnist --val-size 90 --batch-size 310 --device cpu"
        args = mnist.parse_args(flags.split())
        data = mnist.split_data(args, *mnist.load_mnist(data_dir))
        for i, tensor in enumerate((IMAGES, LABELS)):
            for split, part in zip(SPLITS, tensor.split([310, 90, 100]), strict=True):
                assert torch.equal(data[split][i], part)

    def test_offline_a_new_run_trains_on_synthetic_digits_and_says_so(self, run, capsys):
        assert run("--epochs 1 --batch-size 2000 --data-dir empty") is None
        printed = capsys.readouterr().out
        assert re.search(r"!!! SYNTHETIC .*\nPut mnist's train-images", printed)
        assert "into empty/MNIST/raw." in printed
        assert "synthetic test accuracy" in printed
        assert metrics_of("out")["data"] == "synthetic"
        assert metrics_of("out")["config"]["images"] == 11_000

    def test_offline_what_needs_mnist_fails(self, run, data_dir):
        assert "into empty/MNIST/raw" in run("--data mnist --data-dir empty")
        run("--epochs 1")
        shutil.rmtree(data_dir)
        for flags in ("--resume", f"--evaluate {BEST}"):
            assert "into data/MNIST/raw" in main(HERE, flags)

    @each(("model", "amp"), [("simple", "bf16"), ("wide", "off"), ("simple", "fp16")])
    def test_an_epoch_is_measured_on_each_split(self, run, recorder, data_dir, model, amp):
        calls = recorder(mnist, "train_one_epoch", mnist.train_one_epoch)
        run(f"--epochs 1 --model {model} --amp {amp} --lr 0.01")
        net = mnist.MODELS[model]()
        mnist.load_checkpoint(BEST, model=net)
        known, test = mnist.load_mnist(data_dir)

        [m] = metrics_of("out")["history"]
        for split, data in (("val", [t[310:] for t in known]), ("test", test)):
            loss, accuracy, _ = mnist.evaluate(net, data)
            assert m[f"{split}_loss"] == pytest.approx(loss, rel=1e-4)
            assert m[f"{split}_accuracy"] == accuracy
        assert 0 < m["train_loss"] < 5
        assert m["train_accuracy"] * 300 == pytest.approx(round(m["train_accuracy"] * 300))
        state, _, precision, steps, *_ = calls[0]
        assert (precision, steps) == (mnist.PRECISIONS[amp], 6)
        assert state.scaler.is_enabled() == (amp == "fp16")

    def test_an_epoch_is_timed(self, run, patch):
        patch(time, "perf_counter", iter(range(5, 99, 3)).__next__)
        run("--epochs 1")
        assert metrics_of("out")["history"][0]["seconds"] == 3

    @each("losses", [[3, 2, 2, 1, 1], [1, 2, 1]])
    def test_the_epoch_of_the_lowest_validation_loss_is_reported(self, run, patch, losses):
        val = iter(losses)
        evaluate = mnist.evaluate

        def planned(model, data):
            _, accuracy, logits = evaluate(model, data)
            return (next(val) if len(data[1]) == 90 else 9.0), accuracy, logits

        patch(mnist, "evaluate", planned)
        run("--epochs", len(losses))
        metrics, best = metrics_of("out"), losses.index(1) + 1
        assert torch.load(BEST)["epoch"] == metrics["best_epoch"] == best
        assert metrics["test_accuracy"] == metrics["history"][best - 1]["test_accuracy"]

    def test_a_confusion_matrix_has_a_row_a_true_label(self, run, patch):
        logits = F.one_hot((LABELS[400:] + 1) % 10, 10).float()  # each one higher
        patch(mnist, "evaluate", lambda _, data: (1.0, 0.1, logits))
        run("--epochs 1")
        counts = LABELS[400:].bincount()
        assert metrics_of("out")["confusion"] == counts.diag().roll(1, 1).tolist()

    def test_an_epoch_draws_anew_and_distorts_less_and_less(self, run, recorder):
        images = recorder(mnist, "augment", lambda images, strength: images)
        seeds = recorder(torch, "manual_seed", torch.manual_seed)
        assert run("--epochs 5 --seed 3") is None

        assert seeds == [(n,) for n in range(30_000, 30_006)]
        strengths = [strength for _, strength in images[::6]]
        assert strengths == pytest.approx([0.93, 0.79, 0.65, 0.51, 0.37])
        assert len({x.sum().item() for x, _ in images}) == 30
        rates = [m["lr"] for m in metrics_of("out")["history"]]
        assert rates[1] == max(rates) > 0.09 > 3 * rates[4]

    def test_the_wide_network_is_distorted_twice_as_much(self, run, recorder):
        images = recorder(mnist, "augment", lambda images, strength: images)
        run("--epochs 1 --model wide --lr 0.01")
        assert images[0][1] == pytest.approx(2 * 0.65)

    @each(("model", "amp"), [("simple", "bf16"), ("wide", "off"), ("simple", "fp16")])
    @each("schedule", ["onecycle", "step"])
    def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(
        self, run, monkeypatch, model, amp, schedule
    ):
        flags = f"--epochs 3 --lr 0.01 --model {model} --amp {amp} --schedule {schedule}"
        run(flags, "--out whole")
        stop_in(2, monkeypatch, HERE, SMALL, flags)
        assert main(HERE, "--resume") is None

        assert metrics_of("whole") == metrics_of("out")
        for name in ("mnist_model_epoch_3.pth", "best_mnist_model.pth"):
            assert same_bits(weights_of(f"whole/{name}"), weights_of(f"out/{name}"))

    @each("name", OPTIMIZERS)
    def test_any_optimizer_and_schedule_trains_and_resumes(self, run, monkeypatch, name):
        module = adapted(*OPTIMIZERS[name])
        main(HERE, SMALL, "--epochs 3 --out whole", module=module)
        stop_in(2, monkeypatch, HERE, SMALL, "--epochs 3", module=module)
        main(HERE, "--resume", module=module)

        last = "mnist_model_epoch_3.pth"
        assert same_bits(weights_of(f"whole/{last}"), weights_of(f"out/{last}"))
        assert not same_bits(weights_of("out/mnist_model_epoch_1.pth"), weights_of(f"out/{last}"))

    @each("kind", SETTINGS)
    def test_a_flag_added_is_a_setting_of_the_run(self, run, monkeypatch, kind):
        given, line, value = SETTINGS[kind]
        module = adapted((SEED, f"    {line}\n{SEED}"))
        stop_in(1, monkeypatch, HERE, SMALL, "--epochs 2", given, module=module)
        assert main(HERE, "--resume", module=module) is None
        assert metrics_of("out")["config"]["smooth"] == value
        assert main(HERE, f"--evaluate {BEST}", module=module) is None

    def test_a_switch_that_the_run_did_not_have_is_a_clash(self, run):
        module = adapted((SEED, f"    {SWITCH}\n{SEED}"))
        main(HERE, SMALL, "--epochs 1", module=module)
        assert "--mixup is True, but" in main(HERE, "--resume --mixup", module=module)

    def test_a_metric_added_is_saved_and_read_again(self, run, monkeypatch):
        lines = "".join(f"        m['{k}'] = {v}\n" for k, v in METRICS.items())
        module = adapted((SECONDS, lines + SECONDS))
        stop_in(1, monkeypatch, HERE, SMALL, "--epochs 2", module=module)
        assert main(HERE, "--resume", module=module) is None
        assert main(HERE, f"--evaluate {BEST}", module=module) is None
        for m in metrics_of("out")["history"]:
            assert repr([m[k] for k in METRICS]) == "[-0.5, nan, True, [1, 2.5], None, 'x']"

    def test_another_data_set_is_named_and_kept_apart(self, run, capsys):
        module = adapted(DATASET)
        write_mnist(Path("data/FashionMNIST/raw"))
        assert main(HERE, SMALL, "--epochs 1", module=module) is None
        assert "\nfashionmnist test accuracy" in capsys.readouterr().out
        assert metrics_of("out")["data"] == torch.load(BEST)["config"]["data"] == "fashionmnist"
        for flags in ("--resume", f"--evaluate {BEST}"):
            line = rf"{ERROR}out/.*pth: argument --data: .*'fashionmnist'.*"
            assert re.fullmatch(line, main(HERE, flags))

    def test_a_run_does_not_go_on_with_other_data(self, run):
        run("--epochs 1 --schedule step")
        write_mnist(Path("other/MNIST/raw"), train=390)
        line = f"{ERROR}other holds other data than the run's"
        assert main(HERE, "--resume --epochs 2 --data-dir other") == line

    def test_a_damaged_newest_checkpoint_is_named(self, run):
        run("--epochs 2")
        newest = Path("out/mnist_model_epoch_2.pth")
        newest.write_bytes(newest.read_bytes()[:-9])
        assert run("--resume").startswith(f"{ERROR}{newest} is damaged")

    def test_a_loss_that_is_not_finite_ends_the_run(self, run):
        assert run("--lr 1e9") == f"{ERROR}the loss of epoch 1 is not finite: try a lower --lr"
        assert contents("out") == {}

    def test_an_epoch_is_saved_before_its_row_is_printed(self, run, patch):
        def broken(history):
            if history:
                raise BrokenPipeError("gone")
            return []

        patch(mnist, "make_table", broken)
        assert run("--epochs 2") == f"{ERROR}gone"
        assert BEST.exists()

    def test_a_run_prints_its_settings_its_table_and_the_report_it_writes(self, run, capsys):
        assert run("--epochs 2") is None
        printed, metrics = capsys.readouterr().out, metrics_of("out")
        names = "best_mnist_model metrics mnist_model_epoch_1 mnist_model_epoch_2 report"
        assert sorted(path.stem for path in contents("out")) == names.split()

        chosen = "model simple, data mnist, val_size 90, epochs 2, batch_size 50, lr 0.1,\n"
        chosen += "schedule onecycle, seed 1, amp off, images 400\n"
        threads = torch.get_num_threads()
        assert printed.startswith(f"new run in out\ncpu, {threads} threads\n{chosen}Conv2d")
        table, report = Path("out/report.txt").read_text().split("\n\n", 1)
        assert printed.count(f"\n{table}\n") == 1
        assert printed.endswith(f"\n\n{report}\nfiles: out\n")
        start = f"mnist test accuracy {metrics['test_accuracy']:.2%}\n7,954 "
        assert report.startswith(start)
        assert report.endswith(f"\n\n{chosen}")
        assert "\nno plot: import of matplotlib" in printed
        assert not re.search(".{80}", printed)

    def test_metrics_json_holds_the_run(self, run):
        run("--epochs 2")
        metrics = metrics_of("out")
        keys = "data config history parameters best_epoch test_accuracy confusion"
        assert [*metrics] == keys.split()
        assert metrics["parameters"] == 7954
        assert metrics["config"] == torch.load(BEST)["config"]
        assert [m["epoch"] for m in metrics["history"]] == [1, 2]

    def test_a_plot_is_drawn_where_matplotlib_is(self, data_dir):
        pytest.importorskip("matplotlib.figure")
        main(HERE, SMALL, "--epochs 1")
        assert Path("out/training_metrics.png").read_bytes().startswith(b"\x89PNG")

    def test_to_evaluate_prints_the_report_and_writes_nothing(self, run, capsys):
        run("--epochs 2")
        report = Path("out/report.txt").read_text().split("\n\n", 1)[1]
        before = contents(".")
        capsys.readouterr()
        flags = "--val-size 59999 --seed 3 --batch-size 7 --dry-run"
        assert main(f"{HERE} --evaluate ~/{BEST}", flags) is None
        assert report.startswith(capsys.readouterr().out)
        assert contents(".") == before

    @each("flags", ["--model wide --epochs 9", "--resume"])
    def test_a_dry_run_is_of_one_batch_and_leaves_nothing(self, run, capsys, recorder, flags):
        before = contents(".")
        calls = recorder(mnist, "batches", mnist.batches)
        assert run("--dry-run", flags) is None
        rest = r"  1\* .*\nno plot(.*\n)+\ndry run: all parts work, nothing is kept\n$"
        assert re.search(rest, capsys.readouterr().out)
        assert {len(labels) for (_, labels), *_ in calls} == {50}
        assert contents(".") == before

    def test_the_weights_suit_standard_preprocessing(self, run, data_dir):
        run("--epochs 25 --lr 0.05")
        model = mnist.SimpleMNISTNet().eval()
        model.load_state_dict(weights_of(BEST))
        normalize = transforms.Normalize((0.1307,), (0.3081,))
        transform = transforms.Compose([transforms.ToTensor(), normalize])
        images = datasets.MNIST(data_dir, train=False, transform=transform)
        hits = sum(model(x[None]).argmax().item() == y for x, y in images)
        assert hits / 100 == metrics_of("out")["test_accuracy"] > 0.15


# --------------------------------------------------------------------------------- Command line
BAD = ["--epochs 0", "--epochs x", "--batch-size 0", "--val-size 0", "--lr -1", "--lr nan"]
BAD += ["--lr inf", "--lr 0", "--amp x", "--data x", "--device tpu"]
ERRORS = {
    "--out /dev/null": ".* File exists: '/dev/null'",
    "--evaluate gone": ".* No such file or directory: 'gone'",
    "--data-dir /dev/null": ".* Not a directory: .*",
    "--batch-size 999 --dry-run": "--val-size leaves 310 images, fewer than --batch-size",
}
CLASHES = ["lr 0.3 0.1", "batch-size 60 50", "epochs 15 1", "seed 2 1"]
CLASHES += ["amp bf16 off", "schedule step onecycle", "model wide simple"]
HOSTILE = [("lr", "\x1b[31mred"), ("epochs", -1), ("epochs", [1, 2]), ("amp", "auto")]
HOSTILE += [("model", None), ("batch_size", math.nan), ("seed", 0.5), ("val_size", True)]


class TestCommandLine:
    @each("flag", BAD)
    def test_bad_usage_is_named_with_status_2(self, flag, capsys):
        assert main(flag) == 2
        assert flag.split()[0] in capsys.readouterr().err.splitlines()[-1]

    @each(("flags", "lr"), [("", 0.4), ("--model wide", 0.1)])
    def test_defaults_on_a_cpu(self, flags, lr):
        args = mnist.parse_args(["--device", "cpu", *flags.split()])
        values = [args.val_size, args.epochs, args.batch_size, args.schedule, args.seed]
        assert values == [5000, 15, 64, "onecycle", 1]
        assert [args.lr, args.amp, args.data] == [lr, "off", "auto"]
        assert [args.out, args.data_dir] == [Path("model_checkpoints"), Path("data")]

    @each(("native", "amp"), [(True, "bf16"), (False, "fp16")])
    def test_defaults_on_cuda(self, patch, native, amp):
        def supported(including_emulation=True):
            return native or including_emulation

        patch(torch.accelerator, "is_available", lambda: True)
        patch(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        patch(torch.cuda, "is_bf16_supported", supported)
        args = mnist.parse_args([])
        assert [args.device, args.batch_size, args.amp] == ["cuda", 128, amp]
        assert mnist.parse_args(["--device", "cpu"]).batch_size == 64

    def test_idle_threads_are_told_not_to_spin_for_long(self):
        assert 1000 <= int(os.environ["GOMP_SPINCOUNT"]) <= 10_000

    @each("flags", ERRORS)
    def test_what_cannot_be_done_is_said_in_one_line(self, run, flags):
        assert re.fullmatch(ERROR + ERRORS[flags], run(flags))

    def test_home_and_big_seeds_are_understood(self, run):
        assert run("--epochs 1 --out ~/new --data-dir ~/data --seed", 10**30) is None
        assert metrics_of("new")["config"]["seed"] == 10**30

    def test_a_folder_that_holds_a_run_is_left_alone(self, run, data_dir):
        run("--epochs 1")
        shutil.rmtree(data_dir)  # said before the data is loaded
        for name in ("report.txt", "mnist_model_epoch_1.pth"):  # the best alone is a run
            before = contents("out")
            assert run().startswith(f"{ERROR}out holds a run: add --resume")
            assert contents("out") == before
            Path("out", name).unlink()

    def test_nothing_to_resume_is_a_new_run_and_said_loudly(self, run, capsys):
        assert run("--resume --epochs 1") is None
        assert capsys.readouterr().out.startswith("NOTHING TO RESUME: new run in out\n")

    def test_a_resumed_run_has_its_own_settings(self, run, monkeypatch, capsys):
        flags = "--model wide --schedule constant --epochs 2 --seed 5 --lr 0.01"
        stop_in(1, monkeypatch, HERE, SMALL, flags)
        capsys.readouterr()
        assert main(HERE, "--resume") is None
        printed = capsys.readouterr().out
        assert printed.startswith("resuming out/mnist_model_epoch_1.pth\n")
        assert "epochs 2, batch_size 50, lr 0.01,\nschedule constant, seed 5," in printed
        assert re.search(r"error\n   1\* .*\n   2\*? ", printed)

    @each("clash", CLASHES)
    def test_a_flag_that_differs_from_the_run_is_a_clash(self, run, clash):
        run("--epochs 1")
        flag, new, old = clash.split()
        line = f"--{flag} is {new}, but out/mnist_model_epoch_1.pth has {old}: omit it"
        assert main(HERE, f"--resume --{flag} {new}") == ERROR + line

    def test_a_run_of_step_or_constant_can_be_made_longer_not_shorter(self, run):
        run("--epochs 2 --schedule step")
        assert "--epochs is 1, but" in main(HERE, "--resume --epochs 1")
        assert main(HERE, "--resume --epochs 3") is None
        assert len(metrics_of("out")["history"]) == 3

    def test_a_finished_run_that_is_resumed_stays_as_it_is(self, run):
        run("--epochs 2")
        before = contents(".")
        BEST.unlink()  # as if killed before it was written
        assert main(HERE, "--resume") is None
        assert contents(".") == before

    @each(("name", "value"), HOSTILE)
    def test_settings_that_cannot_be_are_refused_in_one_line(self, run, name, value):
        run("--epochs 1")
        path = Path("out/mnist_model_epoch_1.pth")
        content = torch.load(path)
        content["config"][name] = value
        torch.save(content, path)
        flag = name.replace("_", "-")
        for flags in ("--resume", f"--evaluate {path}"):
            assert re.fullmatch(rf"{ERROR}{path}: argument --{flag}: [ -~]+", main(HERE, flags))

    def test_a_checkpoint_without_new_settings_is_still_evaluated(self, run):
        run("--epochs 1")
        content = torch.load(BEST)
        del content["config"]["images"], content["config"]["schedule"]
        torch.save(content, BEST)
        assert main(HERE, f"--evaluate {BEST}") is None

    @pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
    def test_rows_are_logged_at_once_and_ctrl_c_says_how_to_go_on(self, data_dir):
        flags = f"--data-dir data --out runs/3 {SMALL} --epochs 999"
        command = f"{sys.executable} -E {mnist.__file__} {flags}"
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with Popen(command.split(), stdout=PIPE, stderr=PIPE, text=True, preexec_fn=heed) as child:
            while not child.stdout.readline().startswith("epoch "):
                assert child.poll() is None
            assert child.stdout.readline().startswith("   1*")
            assert not Path("runs/3/mnist_model_epoch_50.pth").exists()  # it did not wait
            child.send_signal(signal.SIGINT)
            assert child.communicate()[1] == "\nstopped: add --resume to go on in runs/3\n"
        assert child.returncode == 130


# ------------------------------------------------------------------------------------- Accidents
def play(folder, flags, seed=None):
    """Run a command line in a process of its own, which may die by chance."""
    os.chdir(folder)
    time.perf_counter = lambda: 0.0
    if seed is not None:
        die_by_chance(random.Random(seed))
    sys.exit(main(HERE, SMALL, flags))


def die_by_chance(rng):
    """Arrange to be killed in the midst of a write, or right after a rename."""

    def perhaps_after(action):
        def wrapped(*args):
            action(*args)
            if rng.random() < 0.1:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    os.fsync, os.replace = perhaps_after(os.fsync), perhaps_after(os.replace)


def start(*args):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_mnist"])
    process = context.Process(target=play, args=args)
    process.start()
    return process


def end(process):
    process.join(60)
    return process.exitcode  # None if it hangs


@forks
class TestAccidents:
    def test_a_run_killed_again_and_again_has_the_same_bits(self, data_dir):
        here = data_dir.parent
        assert end(start(here, "--epochs 3 --out whole")) == 0
        rng, kills, finished = random.Random(7), 0, True
        while kills < KILLS or not finished:
            if finished:  # a new run takes the rest
                shutil.rmtree("killed", ignore_errors=True)
            status = end(start(here, "--epochs 3 --resume --out killed", rng.random()))
            kills, finished = kills + (status == -9), status == 0
            assert all(map(mnist.load_checkpoint, Path("killed").glob("*.pth")))

        for name in ("mnist_model_epoch_3.pth", "best_mnist_model.pth"):
            assert same_bits(weights_of(f"whole/{name}"), weights_of(f"killed/{name}"))
        assert metrics_of("whole") == metrics_of("killed")

    def test_of_two_runs_in_one_folder_one_ends(self, data_dir):
        rng, here = random.Random(3), data_dir.parent
        for n in range(max(2, KILLS // 2)):
            one = start(here, f"--epochs 2 --seed 1 --out both{n}")
            time.sleep(rng.random() * 0.5)
            other = start(here, f"--epochs 2 --seed 2 --out both{n}")
            assert sorted([end(one), end(other)]) == [0, 1]
            seeds = {torch.load(p)["config"]["seed"] for p in Path(f"both{n}").glob("*.pth")}
            assert seeds == {metrics_of(f"both{n}")["config"]["seed"]}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
