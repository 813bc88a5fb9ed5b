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
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import IncompleteRead
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torchvision import datasets, transforms

import mnist

MNIST_DIR, KILLS = os.getenv("MNIST_DIR"), int(os.getenv("MNIST_KILLS", "4"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPLITS, BEST = ("train", "val", "test"), Path("out/best_mnist_model.pth")
LAYERS = {"simple": "CBRCBRMCBRCBCBRCBRCBCBRMCBCBRCBCBRDCA", "wide": "CRCRCRMCRCRCRAC"}
ERROR = "mnist.py: error: "
HERE, SMALL = "--data-dir data --out out", "--device cpu --lr 0.1 --val-size 90 --batch-size 50"
each = pytest.mark.parametrize
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks with torch loaded")
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
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    arrays = (IMAGES[:400, 0], LABELS[:400], IMAGES[400:, 0], LABELS[400:])
    for name, array in zip(mnist.FILES, arrays, strict=True):
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (raw / name).write_bytes(head + array.byte().numpy().tobytes())
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
    state, path = new_state(schedule=("onecycle", 2, 3), fp16=True), tmp_path / "a.pth"
    state.model.to(memory_format=torch.channels_last)
    mnist.train_one_epoch(state, mnist.batches(first(90), 30))
    mnist.save_checkpoint(path, known_history(1), {"seed": 1}, **state._asdict())
    return state, path


# -------------------------------------------------------------------------------------- Helpers
def main(*flags):
    try:
        return mnist.main(" ".join(map(str, flags)).split())
    except SystemExit as stop:
        return stop.code


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


def start(flags, prepare=lambda: None):
    def target():
        prepare()
        sys.exit(main(HERE, SMALL, flags))

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def end(process):
    process.join(60)
    return process.exitcode  # None if it hangs


def die_by_chance(seed):
    """Arrange to be killed in the midst of a write, or right after a rename."""
    rng, write = random.Random(seed), Path.write_bytes

    def perhaps_after(action):
        def wrapped(*args):
            action(*args)
            if rng.random() < 0.1:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    def write_bytes(path, content):
        perhaps_after(write)(path, content[:9999])
        write(path, content)

    Path.write_bytes = write_bytes
    os.replace, os.link = perhaps_after(os.replace), perhaps_after(os.link)


# ---------------------------------------------------------------------------------------- Model
class TestModel:
    @each("n", [1, 64])
    def test_networks_give_ten_logits(self, n):
        for network in mnist.MODELS.values():
            assert network().eval()(torch.randn(n, 1, 28, 28)).shape == (n, 10)

    @each(("name", "initials"), LAYERS.items())
    def test_networks_are_their_layers(self, name, initials):
        layers = [m for m in mnist.MODELS[name]().modules() if not list(m.children())]
        assert "".join(type(m).__name__[0] for m in layers) == initials

    def test_simple_mnist_net_adds_in_four_blocks(self):
        layers, x = mnist.SimpleMNISTNet().eval().layers, torch.randn(2, 24, 6, 6)
        blocks = [m for m in layers if isinstance(m, mnist.ResidualBlock)]
        assert (len(blocks), layers[10].p) == (4, 0.05)
        assert torch.equal(blocks[-1](x), (x + blocks[-1].branch(x)).relu())

    def test_network_summary_and_budget(self, capsys):
        model = mnist.SimpleMNISTNet().half().requires_grad_(False)
        before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        assert model.count_parameters() == 7954 < model.budget == 8000
        for budget, verdict in ((8000, "met"), (7955, "met"), (7954, "EXCEEDED")):
            model.budget = budget
            model.print_model_summary()
            text = capsys.readouterr().out.replace(",", "")
            row, *rows, total = text.splitlines()
            assert total == f"SimpleMNISTNet: 7954 parameters (budget: {budget}): {verdict}"
        assert re.fullmatch(r"Conv2d BatchNorm2d ReLU +\('N' 8 26 26\) +88", row)
        assert 88 + sum(int(row.split()[-1]) for row in rows) == 7954
        assert " ".join(re.findall(r" (\d+)\) ", text)) == "26 24 12 10 10 10 10 5 5 5 5 5 1"
        assert model.training and torch.equal(rng, torch.get_rng_state())
        assert same_bits(before, model.state_dict())
        mnist.WideMNISTNet().print_model_summary()
        text = capsys.readouterr().out
        assert text.endswith("\nWideMNISTNet: 189,984 parameters\n")
        assert " ".join(re.findall(r" (\d+)\) ", text)) == "26 24 22 11 11 9 7 1 1"

    @each("amp", [None, torch.bfloat16, torch.float16, "wide"])
    def test_one_batch_can_be_overfitted(self, amp):
        state, n, steps = new_state(lr=0.1, fp16=amp == torch.float16), 64, 40
        if amp == "wide":
            state, n, steps, amp = new_state("wide", lr=0.002), 5, 100, None
        batch = [*mnist.batches(first(n), n)]
        mnist.train_one_epoch(state, batch * steps, amp)
        loss, accuracy = mnist.train_one_epoch(state, batch, amp)
        assert (accuracy, loss < 0.1) == (1, True)


# ----------------------------------------------------------------------------------------- Data
class TestData:
    def test_load_mnist_downloads_for_several(self, data_dir, patch):
        for path in (data_dir / "MNIST/raw").iterdir():
            Path(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        Path("new/MNIST/raw").mkdir(parents=True)
        Path("new/MNIST/raw", mnist.FILES[0]).touch()  # one alone does not count
        server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
        datasets.MNIST.mirrors.append(f"http://127.0.0.1:{server.server_port}/")
        patch(datasets.MNIST, "resources", [(f"{name}.gz", None) for name in mnist.FILES])
        Thread(target=server.serve_forever, daemon=True).start()
        with ThreadPoolExecutor() as pool:
            _, (train, test), *_ = pool.map(mnist.load_mnist, ["new"] * 4)
        assert {path.name for path in contents("new")} == {*mnist.FILES}
        for *parts, whole in zip(train, test, (IMAGES, LABELS), strict=True):
            assert torch.equal(torch.cat(parts), whole)

    def test_load_mnist_knows_when_it_is_offline(self, tmp_path, patch):
        def download(self):
            assert (socket.getdefaulttimeout(), Path(self.root).parents[1]) == (20, tmp_path)
            raise error(b"")

        patch(datasets.MNIST, "download", download)
        for error in (RuntimeError, IncompleteRead, TimeoutError, PermissionError):
            kind = error if error is PermissionError else ConnectionError
            with pytest.raises(kind):
                mnist.load_mnist(tmp_path)
            assert socket.getdefaulttimeout() is None

    @each("name", mnist.FILES)
    def test_load_mnist_names_a_damaged_file(self, data_dir, name):
        path = data_dir / "MNIST/raw" / name
        whole, others = path.read_bytes(), [*contents(path.parent).values()]
        others.remove(whole)
        for content in (whole[:-9], whole + b"?", b"", b"\x1f" + whole[1:], *others):
            path.write_bytes(content)
            with pytest.raises(OSError, match="ubyte is damaged: delete"):
                mnist.load_mnist(data_dir)

    @each("draws", [[1] * 5, [0] * 5, [0.9, 0.2, 0.7, 0.4, 0.1]])
    @each(("options", "size"), [({}, 28), ({"strength": 0.5}, 40)])
    def test_augment_moves_by_its_limits(self, patch, draws, options, size):
        # Images of their own coordinates show the map: its slopes, and its shift.
        patch(torch, "rand", lambda *_, **__: torch.tensor([draws] * 2).T)
        patch(torch, "randn", torch.zeros)  # no elastic field
        ramp = (torch.arange(size) - (size - 1) / 2).expand(size, size)
        maps = mnist.augment(torch.stack([ramp, ramp.T])[:, None], **options)[:, 0]
        k = options.get("strength", 1)
        turn, grow, shear, right, down = [k * (2 * value - 1) for value in draws]
        angle, scale, shear = math.radians(13) * turn, 1 + 0.13 * grow, 0.13 * shear
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        c = size // 2
        slopes = [m[c + i, c + 1 - i] - m[c, c] for m in maps for i in (0, 1)]
        expected = [cos, shear * cos - sin, sin, shear * sin + cos]
        assert [*map(float, slopes)] == pytest.approx(expected, abs=1e-4)
        middle = maps[:, c - 1 : c + 1, c - 1 : c + 1].mean((1, 2)).tolist()
        assert middle == pytest.approx([2.6 * right, 2.6 * down], abs=1e-4)

    def test_augment_moves_by_a_smooth_field(self, patch):
        field = torch.zeros(1, 2, 5, 5)
        field[0, 0, :, 2] = 1  # the middle is moved along x
        patch(torch, "rand", lambda *_, **__: torch.full((5, 1), 0.5))
        patch(torch, "randn", lambda *size, **_: {(1, 2, 5, 5): field}[size])
        moved = mnist.augment(torch.arange(28.0).expand(1, 1, 28, 28), 0.5) - torch.arange(28)
        assert moved.mean((0, 1, 2))[[10, 13]].tolist() == pytest.approx([0.085, 0.15], abs=0.01)
        assert max(moved[..., 0].abs().max(), moved.diff().abs().max()) < 0.05

    @each("still", ["rand", "randn"])
    def test_augment_draws_for_each_image(self, patch, still):
        half = {"rand": lambda *size, **_: torch.full(size, 0.5), "randn": torch.zeros}
        patch(torch, still, half[still])
        out = mnist.augment((IMAGES[:1].float() / 255).expand(64, 1, 28, 28))
        assert (out[1:] - out[:1]).abs().amax((1, 2, 3)).min() > 0.02
        assert mnist.augment(torch.ones(64, 1, 28, 28))[:, 0, 0, 0].min() < 0.9

    def test_draw_digits_knows_its_font(self, patch):
        assert all(map(torch.equal, mnist.draw_digits(500, 0), (IMAGES, LABELS)))
        assert not any(map(torch.equal, mnist.draw_digits(500, 1), (IMAGES, LABELS)))
        patch(mnist, "augment", lambda images: images)
        images, labels = mnist.draw_digits(500, 0)
        rows = images[:, 0, 4:24:4, 8:20:4] // 255 @ torch.tensor([4, 2, 1]).byte()
        font = "75557 26227 71747 71717 55711 74717 74757 71222 75757 75717"
        for digit, glyph in enumerate(font.split()):
            assert "".join(map(str, rows[labels == digit][0].tolist())) == glyph

    @each("options", [{}, {"train": True}, {"train": True, "strength": 0.3}])
    def test_batches_to_train_and_to_test(self, options, patch):
        seen, numbers, train = [], torch.arange(100), "train" in options
        patch(mnist, "augment", lambda x, k: seen.append((x, k)) or x)
        images = numbers.byte().view(100, 1, 1, 1).expand(100, 1, 28, 28)
        pairs = [*mnist.batches((images, numbers), 30, **options)]
        assert [len(y) for _, y in pairs] == [30, 30, 30, 10][: 3 if train else 4]
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        assert torch.equal(((x[:, 0, 9, 9] * 0.3081 + 0.1307) * 255).round().long(), y)
        assert (len(y.unique()), torch.equal(y, y.sort()[0])) == (len(y), not train)
        strengths = [k for x, k in seen if 0 <= x.min() <= x.max() < 1]
        assert strengths == [options.get("strength", 1)] * (3 if train else 0)
        assert len(next(mnist.batches(first(1), 64))[1]) == 1
        for data in ((IMAGES / 255, LABELS), first(0), first(63))[: 3 if train else 2]:
            with pytest.raises(ValueError, match="not 64 of uint8"):
                next(mnist.batches(data, 64, train=train))

    @pytest.mark.skipif(not MNIST_DIR, reason="MNIST_DIR is not set")
    def test_real_mnist_in_one_epoch(self, tmp_path):
        command = f"{sys.executable} {mnist.__file__} --epochs 1 --data mnist --data-dir"
        assert Popen([*command.split(), MNIST_DIR, "--out", tmp_path]).wait() == 0
        assert metrics_of(tmp_path)["test_accuracy"] > 0.98


# ------------------------------------------------------------------------------------- Training
def rates(schedule, epochs=10, steps=10):
    state = new_state(lr=0.1, schedule=(schedule, epochs, steps))
    for _ in range(epochs * steps):
        yield state.optimizer.param_groups[0]["lr"]
        state.optimizer.step()
        state.scheduler.step()


class TestTraining:
    def test_make_state_follows_each_schedule(self):
        values = [*rates("onecycle")]
        assert values[::20] == pytest.approx([0.004, 0.1, 0.085, 0.05, 0.015], rel=0.05)
        assert [*rates("step")][9::10] == pytest.approx([0.1 * 0.7**n for n in range(10)])
        assert {*rates("constant")} == {0.1}
        assert not new_state().scaler.is_enabled()
        assert all(max(rates("onecycle", 1, n)) <= 0.1 for n in range(1, 13))

    def test_make_state_survives_an_overflow(self):
        state = new_state("wide", 0.01, ("onecycle", 1, 1), fp16=True)
        momenta = [s["momentum_buffer"].any() for s in state.optimizer.state.values()]
        assert momenta == [False] * 7
        state.scaler._init_scale = 2.0**40
        batches = [*mnist.batches(first(8), 2)] * 2
        assert mnist.train_one_epoch(state, batches, torch.float16)[0] < math.inf
        assert 1 < state.scaler.get_scale() < 2.0**40
        recipe = {"momentum": 0.9, "weight_decay": 5e-5, "nesterov": True}
        assert recipe.items() <= state.optimizer.param_groups[0].items()

    def test_train_one_epoch_returns_means(self):
        state = new_state("wide", lr=1e-12)
        parts = [part.split([4] * 9 + [3, 1]) for part in next(mnist.batches(first(40), 40))]
        trained = mnist.train_one_epoch(state, zip(*parts, strict=True))
        assert trained == pytest.approx(mnist.evaluate(state.model, first(40))[:2], rel=1e-4)

    def test_train_one_epoch_draws_a_bar(self, capsys, patch):
        state = new_state("wide", lr=1e-12)
        mnist.train_one_epoch(state, mnist.batches(first(78), 39), total=2)  # none
        patch(sys.stdout, "isatty", lambda: True)
        mnist.train_one_epoch(state, mnist.batches(first(78), 39))  # none
        loss, accuracy = mnist.train_one_epoch(state, mnist.batches(first(78), 2), total=39)
        half, whole, _ = capsys.readouterr().out.split("\r")
        assert re.fullmatch(r"\[#### {4}\] loss \d\.\d{4} accuracy \d+\.\d\d%", half)
        assert whole == f"[########] loss {loss:.4f} accuracy {accuracy:.2%}"
        assert len(whole) < 40

    def test_evaluate_returns_means_and_logits(self):
        model, (images, labels) = new_state("wide").model, first(78)
        loss, accuracy, logits = mnist.evaluate(model, (images, labels))
        expected = model((images / 255 - 0.1307) / 0.3081).detach()
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)
        assert loss == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-4)
        assert accuracy == (expected.argmax(1) == labels).sum().item() / 78
        assert not (model.training or logits.requires_grad or logits.is_inference())


# ---------------------------------------------------------------------------------- Checkpoints
class TestCheckpoints:
    def test_save_checkpoint_keeps_every_part(self, saved):
        (state, path), other = saved, new_state(schedule=("onecycle", 2, 3), fp16=True)
        assert mnist.load_checkpoint(path, **other._asdict())["epoch"] == 1
        assert same_bits(state.model.state_dict(), other.model.state_dict())
        assert [p.state_dict() for p in state[2:]] == [p.state_dict() for p in other[2:]]
        assert same_bits(*(s.optimizer.state_dict()["state"][0] for s in (state, other)))
        assert all(weight.is_contiguous() for weight in weights_of(path).values())

    @each("links", [True, False])
    def test_write_file_is_whole_or_not(self, tmp_path, patch, links):
        path = tmp_path / "file"
        patch(os, "link", os.link if links else lambda *_: os.stat(path / "no"))
        mnist.write_file(path, b"one", new=True)
        with pytest.raises(OSError, match=f"cannot write {path}: another run has"):
            mnist.write_file(path, b"two", new=True)
        assert contents(tmp_path) == {path: b"one"}
        mnist.write_file(path, b"three")
        patch(os, "replace", lambda written, _: os.stat(written.parents[1] / "no"))
        with pytest.raises(OSError, match=f"cannot write {path}: .*{tmp_path}/no'"):
            mnist.write_file(path, b"four")
        assert contents(tmp_path) == {path: b"three"}

    def test_load_checkpoint_refuses_damage(self, saved):
        (state, path), rng, refused = saved, random.Random(0), 0
        whole, good = path.read_bytes(), weights_of(path)
        for i in range(200):
            content = bytearray(whole if i % 3 else whole[: rng.randrange(len(whole))])
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            try:
                mnist.load_checkpoint(path, model=state.model)
            except OSError:
                refused += 1
            assert same_bits(good, state.model.state_dict())  # or an idle bit
        assert refused > 150

    def test_load_checkpoint_runs_no_code(self, saved, tmp_path):
        good, touched = torch.load(saved[1]), tmp_path / "touched"
        evil = type("Evil", (), {"__reduce__": lambda _: (Path.touch, (touched,))})()
        weights = good["model_state_dict"]
        fewer = {k: w for k, w in weights.items() if k != "layers.11.bias"}
        nan = weights | {"layers.11.bias": torch.full((10,), math.nan)}
        foreign = [[], evil, weights, good | {"epoch": evil}, good | {"scheduler_state_dict": 0}]
        foreign += [good | {"model_state_dict": w} for w in (nan, fewer, weights | {"x": nan})]
        for content in foreign:
            torch.save(content, saved[1])
            with pytest.raises(OSError, match="not a checkpoint of this network"):
                mnist.load_checkpoint(saved[1], **new_state()._asdict())
        assert not touched.exists()

    def test_newest_checkpoint_takes_whole_names(self, tmp_path):
        for name in ("best_mnist_model_7", "mnist_model_epoch_7 (1)", "mnist_model_epoch_011"):
            (tmp_path / f"{name}.pth").touch()
        assert mnist.newest_checkpoint(tmp_path) is None
        for name in ("best_mnist_model", "mnist_model_epoch_9", "mnist_model_epoch_10"):
            (tmp_path / f"{name}.pth").touch()
            assert mnist.newest_checkpoint(tmp_path) == tmp_path / f"{name}.pth"

    def test_keep_best_takes_what_is_left(self, tmp_path):
        history, best = known_history(4), tmp_path / "best_mnist_model.pth"
        history[1]["val_loss"] = 0.01
        for n in (4, 2, 1):
            (tmp_path / f"mnist_model_epoch_{n}.pth").write_text(str(n))
        mnist.keep_best(tmp_path, history)
        (tmp_path / "mnist_model_epoch_2.pth").unlink()
        mnist.keep_best(tmp_path, history)
        assert best.read_text() == "2"
        best.unlink()
        mnist.keep_best(tmp_path, history)
        assert best.read_text() == "4"


# --------------------------------------------------------------------------------------- Report
class TestReport:
    def test_make_table_marks_the_best_so_far(self):
        history = known_history(4)
        for i, loss in enumerate((0.3, 0.2, 0.2, 0.1)):
            history[i]["val_loss"] = loss
        header, *rows = mnist.make_table(history)
        assert header.split() == ["epoch", "lr", *SPLITS, "seconds", "val", "error"]
        row = "2* 0.4000  0.1000  99.00%  0.2000  99.40%  0.0800  99.20%    12.3  ###"
        assert rows[1].strip() == row
        assert "".join(row[4] for row in rows) == "** *"
        history[0]["val_accuracy"] = 0.1
        assert max(map(len, mnist.make_table(history * 30))) <= 79

    @each("n", [5, 26])
    def test_make_report_of_n_classes(self, n):
        confusion = torch.eye(n, dtype=int)
        confusion[4, 4], confusion[4, 3], confusion[2, 2] = 70, 30, 0
        metrics = {"parameters": 7954, "test_accuracy": 0.9712, "best_epoch": 3}
        metrics |= {"data": "synthetic", "confusion": confusion.tolist()}
        report = mnist.make_report(metrics).splitlines()
        assert report[0] == "synthetic test accuracy 97.12%, of SYNTHETIC digits, not MNIST"
        assert report[1] == "7,954 parameters, weights of epoch 3"
        assert report[4].split() == [*map(str, range(n))]
        assert report[9].split() == ["4", *"...", "30", "70", *"." * (n - 5), "70.0%"]
        assert [row.split()[-1] for row in report[5:8]] == ["100.0%", "100.0%", "0.0%"]
        assert {len(line) for line in report[5:]} == {len(report[3])}

    @each(("epochs", "step"), [(1, 1), (100, 6)])
    def test_draw_plot_shows_six_curves(self, patch, epochs, step):
        figure = pytest.importorskip("matplotlib.figure").Figure
        seen, history, save = [], known_history(epochs), figure.savefig
        patch(
            figure, "savefig", lambda self, *a, **k: seen.extend(self.axes) or save(self, *a, **k)
        )
        assert mnist.draw_plot(history).startswith(b"\x89PNG")
        for axes, key in zip(seen, ("loss", "accuracy"), strict=True):
            names = [text.get_text() for text in axes.get_legend().get_texts()]
            assert (axes.get_xlabel(), axes.get_ylabel(), *names) == ("epoch", key, *SPLITS)
            curves = [[m[f"{split}_{key}"] for m in history] for split in SPLITS]
            assert [line.get_ydata().tolist() for line in axes.lines] == curves
            assert axes.get_xticks().tolist() == [*range(1, epochs + 1, step)]


# ------------------------------------------------------------------------------------------ Run
class TestRun:
    def test_read_settings_and_is_valid_refuse(self, run, capsys):
        run("--epochs 2 --seed -7")
        path = Path("out/mnist_model_epoch_2.pth")
        config, good = mnist.read_settings(path), torch.load(path)
        metrics = good["history"][1]
        cases = [{"history": history} for history in (None, [], [{"a": 1}, metrics], "text")]
        cases += [{"config": wrong} for wrong in (None, {}, config | {"a": 1})]
        for wrong in (None, "\x1b[31mred", [], -0.5, math.nan, True, "auto", torch.ones(2)):
            cases += [{"config": config | {k: wrong}} for k in config]
            cases += [{"history": [metrics | {k: wrong}, metrics]} for k in metrics]
            cases += [{k: wrong} for k in ("epoch", "val_loss", "test_accuracy")]
        capsys.readouterr()
        for case in cases:
            torch.save(good | case, path)
            before = contents(".")
            for flags in ("--resume", f"--evaluate {path}"):
                line = rf"{ERROR}{path} is damaged, or not [ -~]*"
                assert re.fullmatch(line, main(HERE, flags))
            assert contents(".") == before
        assert capsys.readouterr().out == ""

    def test_open_run_names_a_clash(self, run):
        run("--epochs 1")
        clashes = ["lr 0.3 0.1", "batch-size 60 50", "epochs 15 1", "seed 2 1"]
        clashes += ["amp bf16 off", "schedule step onecycle", "model wide simple"]
        for flag, new, old in map(str.split, clashes):
            text = f"{ERROR}--{flag} is {new}, but the run in out has {old}: leave it out"
            assert main(HERE, f"--resume --{flag} {new}") == text

    def test_open_run_takes_the_runs_settings(self, run, capsys):
        flags = "--model wide --schedule constant --epochs 1 --seed 5 --resume"
        assert run(flags, "--lr 0.01") is None
        assert "seed 5, nothing to resume in 'out'" in capsys.readouterr().out
        before = contents(".")
        assert main(HERE, "--resume --data auto --amp auto") is None
        assert before == contents(".")
        assert re.search(r"5, resuming 'out'\n(.*\n)*   1\*", capsys.readouterr().out)
        assert "--seed is 6, but" in main(HERE, "--resume --seed 6")

    def test_open_run_keeps_off_another_run(self, run, data_dir):
        Path("out").mkdir()  # an empty one will do
        assert "try a lower --lr" in run("--lr 1e9")
        assert run("--epochs 1") is None
        shutil.rmtree(data_dir)  # said before the data load
        for name in ("report.txt", "mnist_model_epoch_1.pth"):  # BEST alone is a run
            before = contents("out")
            assert run().startswith(f"{ERROR}out holds a run: add --resume")
            assert contents("out") == before
            Path("out", name).unlink()

    def test_open_run_offline(self, run, patch, capsys):
        drawn, data = [], (IMAGES, LABELS)
        patch(mnist, "draw_digits", lambda n, seed: drawn.append((n, seed)) or data)
        assert run("--epochs 1 --data-dir empty") is None
        assert drawn == [(6000, 0), (1000, 1)]
        banner = r"!{79}\nSYNTHETIC .*\n.{78}>\n.*'empty'/MNIST/raw\n!{79}\n"
        assert re.search(banner, capsys.readouterr().out)
        assert os.listdir("out") == ["synthetic"]
        assert "holds a run" in run("--data synthetic")
        assert "'gone'" in run("--data synthetic --evaluate gone")
        assert "cannot download" in run("--data mnist --data-dir empty")
        assert main("--data-dir empty --resume --out out") is None
        assert main("--data synthetic --resume --out out/synthetic") is None
        run("--epochs 1")
        assert metrics_of("out")["data"] == "mnist"
        assert "cannot download" in main("--data-dir empty --resume --out out")

    def test_get_data_splits_in_order(self, data_dir):
        flags = f"{HERE} --data mnist --val-size 90 --batch-size 310"
        data = mnist.get_data(mnist.parse_args(flags.split()))
        for tensor, i in ((IMAGES, 0), (LABELS, 1)):
            for split, part in zip(SPLITS, tensor.split([310, 90, 100]), strict=True):
                assert torch.equal(data[split][i], part)

    @each(("model", "amp"), [("simple", "bf16"), ("wide", "fp16")])
    def test_train_measures_each_split(self, run, patch, model, amp):
        logits = F.one_hot((LABELS[400:] + 1) % 10, 10).float()  # each one higher
        evaluate = {90: (90, 0.09, logits), 100: (math.nan, 0.1, logits)}
        patch(mnist, "evaluate", lambda _, data: evaluate[len(data[1])])
        answers = {(amp == "fp16", 0.65, mnist.PRECISIONS[amp], 6): (310, 0.31)}
        patch(mnist, "batches", lambda *_, train, strength: strength)
        patch(mnist, "train_one_epoch", lambda s, *rest: answers[(s.scaler.is_enabled(), *rest)])
        patch(mnist, "draw_plot", lambda history: str(len(history)).encode())
        patch(time, "perf_counter", iter([1, 3, 4, 7]).__next__)
        flags = f"--epochs 1 --amp {amp} --model {model}"
        assert "loss of epoch 1 is not finite" in run(flags)
        evaluate[100] = (100, 0.1, logits)
        run(flags)
        expected = {"epoch": 1, "lr": pytest.approx(0.004), "seconds": 3}
        for split, n in zip(SPLITS, (310, 90, 100), strict=True):
            expected |= {f"{split}_loss": n, f"{split}_accuracy": n / 1000}
        metrics, counts = metrics_of("out"), LABELS[400:].bincount()
        assert (metrics["history"], metrics["test_accuracy"]) == ([expected], 0.1)
        assert Path("out/training_metrics.png").read_bytes() == b"1"
        assert metrics["confusion"] == counts.diag().roll(1, 1).tolist()

    @each("losses", [[3, 2, 2, 1, 1], [1, 2, 1]])
    def test_train_keeps_the_lowest_loss(self, run, patch, losses):
        values = iter([value for loss in losses for value in (loss, 9 - loss)])
        calls, logits, best = iter(range(99)), torch.zeros(100, 10), losses.index(1) + 1
        patch(mnist, "evaluate", lambda *_: (next(values, 9), next(calls), logits))
        for flags in ("", "--resume"):
            run("--epochs", len(losses), flags)
            assert torch.load(BEST)["epoch"] == best
            expected = {"best_epoch": best, "test_accuracy": next(calls) - 1}
            assert expected.items() <= metrics_of("out").items()
            BEST.unlink()  # as if killed before

    def test_train_draws_anew_in_each_epoch(self, run, patch):
        seen, seeds, seed = [], [], torch.manual_seed
        patch(mnist, "augment", lambda x, k: seen.append((x, k)) or x)
        patch(torch, "manual_seed", lambda n: seeds.append(n) or seed(n))
        assert run("--epochs 5 --seed 3") is None
        assert seeds == [*range(30_000, 30_006)]
        assert [k for _, k in seen[::6]] == pytest.approx([0.93, 0.79, 0.65, 0.51, 0.37])
        assert len({x.sum().item() for x, _ in seen}) == len(seen) == 30
        rates = [m["lr"] for m in metrics_of("out")["history"]]
        assert rates[1] == max(rates) > 0.09 > 3 * rates[4]
        assert run("--epochs 1 --out ~/new --seed", 10**30) is None
        assert metrics_of("new")["config"]["seed"] == 10**30

    def test_train_resumes_with_the_same_bits(self, run):
        flags = "--schedule step --amp bf16 --resume --epochs"
        run(flags, 10)
        newest, before = Path("out/mnist_model_epoch_10.pth"), metrics_of("out")
        whole = weights_of(newest)
        newest.write_bytes(newest.read_bytes()[:-9])
        assert f"{newest} is damaged" in run(flags, 10)
        newest.unlink()
        last = torch.load("out/mnist_model_epoch_9.pth")
        for s in last["optimizer_state_dict"]["state"].values():
            s["momentum_buffer"] = s["momentum_buffer"].contiguous()  # as on a GPU
        torch.save(last, "out/mnist_model_epoch_9.pth")
        run(flags, 10)
        assert same_bits(whole, weights_of(newest))
        assert before == metrics_of("out")
        assert "--epochs is 9, but" in run(flags, 9)
        assert (run(flags, 11), len(contents("out"))) == (None, 14)

    def test_report_prints_what_it_writes(self, run, capsys):
        assert run("--epochs 2") is None
        printed, metrics = capsys.readouterr().out, metrics_of("out")
        names = "best_mnist_model metrics mnist_model_epoch_1 mnist_model_epoch_2 report"
        assert sorted(path.stem for path in contents("out")) == names.split()
        assert (metrics["parameters"], metrics["data"]) == (7954, "mnist")
        assert metrics["config"] == torch.load(BEST)["config"]
        table, report = Path("out/report.txt").read_text().split("\n\n", 1)
        assert printed.count(f"\n{table}\n") == 1
        assert printed.endswith(f"\n\n{report}\nfiles: 'out'\n")
        assert report.startswith(f"mnist test accuracy {metrics['test_accuracy']:.2%}\n7,954 ")
        start = "mnist: 310 train 90 val 100 test\ncpu, amp off, seed 1, new run in 'out'\nConv2d"
        assert printed.startswith(start)
        assert "\nno plot: import of matplotlib" in printed
        assert not re.search(".{80}", printed)
        before = contents(".")
        flags = "--val-size 59999 --seed 3 --batch-size 7 --dry-run --data-dir ~/data"
        assert main(f"--evaluate ~/{BEST}", flags) is None
        assert capsys.readouterr().out == report
        assert contents(".") == before

    def test_run_with_dry_run_leaves_nothing(self, run, capsys):
        before = contents(".")
        for flags in ("--model wide --epochs 9", "--resume"):
            assert run("--dry-run", flags) is None
            rest = r"  1\* .*\nno plot.*\n\ndry run: all parts work\n$"
            assert re.search(rest, capsys.readouterr().out)
            assert contents(".") == before

    def test_run_suits_standard_preprocessing(self, run, data_dir):
        run("--epochs 15 --lr 0.02")
        model = mnist.SimpleMNISTNet().eval()
        model.load_state_dict(weights_of(BEST))
        normalize = transforms.Normalize((0.1307,), (0.3081,))
        transform = transforms.Compose([transforms.ToTensor(), normalize])
        images = datasets.MNIST(data_dir, train=False, transform=transform)
        hits = sum(model(x[None]).argmax().item() == y for x, y in images)
        assert hits / 100 == metrics_of("out")["test_accuracy"] > 0.2

    @linux
    def test_run_killed_has_the_same_bits(self, data_dir, patch):
        patch(time, "perf_counter", lambda: 0.0)
        assert end(start("--epochs 3 --out whole")) == 0
        rng, kills, finished = random.Random(7), 0, True
        while kills < KILLS or not finished:
            if finished:  # a new run takes the rest
                shutil.rmtree("killed", ignore_errors=True)
            prepare = partial(die_by_chance, rng.random())
            status = end(start("--epochs 3 --resume --out killed", prepare))
            kills, finished = kills + (status == -9), status == 0
            assert all(map(mnist.load_checkpoint, Path("killed").glob("*.pth")))
        for name in ("mnist_model_epoch_3.pth", "best_mnist_model.pth"):
            assert same_bits(weights_of(f"whole/{name}"), weights_of(f"killed/{name}"))
        assert metrics_of("whole") == metrics_of("killed")

    @linux
    def test_run_owns_its_folder_or_is_killed(self, data_dir):
        rng = random.Random(3)
        for n in range(max(2, KILLS // 2)):
            one = start(f"--epochs 2 --seed 1 --out both{n}")
            time.sleep(rng.random() * 0.5)
            other = start(f"--epochs 2 --seed 2 --out both{n}")
            assert sorted([end(one), end(other)]) == [0, 1]
            seeds = [torch.load(p)["config"]["seed"] for p in Path(f"both{n}").glob("*.pth")]
            assert {*seeds} == {metrics_of(f"both{n}")["config"]["seed"]}


# --------------------------------------------------------------------------------- Command line
BAD = ["--epochs 0", "--epochs x", "--batch-size 0", "--val-size 0", "--lr -1"]
BAD += ["--lr nan", "--lr inf", "--amp x", "--data x", "--out ", "--evaluate "]
ERRORS = {
    "--out /dev/null": ".* File exists: '/dev/null'",
    "--out /proc": ".* '/proc(/tmp.*)?'",  # said before training
    "--evaluate gone": ".* No such file or directory: 'gone'",
    "--data-dir /dev/null": ".* Not a directory: .*",
    "--batch-size 999 --dry-run": "--batch-size 999 is .*",
    "--device tpu": "no tpu device available: leave out --device",
}


class TestCommandLine:
    @each("flag", BAD)
    def test_parse_args_names_bad_usage(self, flag, capsys):
        with pytest.raises(SystemExit, match="2"):
            mnist.parse_args(flag.split(" "))
        assert flag.split()[0] in capsys.readouterr().err.splitlines()[-1]

    def test_parse_args_has_defaults(self, data_dir, patch):
        def settled(*flags):
            args = mnist.parse_args(flags)
            args.out = Path(args.out)
            mnist.open_run(args)
            return [getattr(args, name) for name in ("device", *mnist.SETTINGS)]

        defaults = ["simple", "mnist", 5000, 15, 64, 0.4, "onecycle", 1, "off"]
        assert settled("--device", "cpu") == ["cpu", *defaults]
        assert settled("--model", "wide")[6] == 0.03
        patch(torch.accelerator, "is_available", lambda: True)
        patch(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        for bf16, amp in ((True, "bf16"), (False, "fp16")):
            patch(torch.cuda, "is_bf16_supported", lambda ok=bf16, **how: ok or any(how.values()))
            assert settled() == ["cuda", *defaults[:4], 128, *defaults[5:8], amp]

    @each("flags", ERRORS)
    def test_main_fails_in_one_line(self, run, flags):
        assert re.fullmatch(ERROR + ERRORS[flags], run(flags))

    @linux
    def test_main_logs_at_once_until_ctrl_c(self, data_dir):
        command = f"{sys.executable} -E {mnist.__file__} {HERE} {SMALL} --epochs 999"
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with Popen(command.split(), stdout=PIPE, stderr=PIPE, text=True, preexec_fn=heed) as child:
            lines = iter(child.stdout.readline, "")
            assert any(line.startswith("epoch ") for line in lines)
            assert next(lines).startswith("   1*")
            assert not Path("out/mnist_model_epoch_50.pth").exists()  # it did not wait
            child.send_signal(signal.SIGINT)
            assert child.communicate()[1].endswith("add --resume\n")
        assert child.returncode == 130


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
