# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pytest>=8"]
# ///
"""The specification of mnist.py, section by section.

python test_mnist.py                               without MNIST: printed digits only
MNIST_DIR=data python test_mnist.py                real MNIST too, from data/MNIST/raw
MNIST_KILLS=60 python test_mnist.py -k killed      more of what is done by chance
"""

import copy
import gzip
import hashlib
import http.server
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import mnist

SOURCE, README = (
    Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("mnist.py", "README.md")
)
MNIST_DIR, KILLS = os.environ.get("MNIST_DIR"), int(os.environ.get("MNIST_KILLS", "4"))
torch.set_num_threads(1)  # on tensors as small as these, threads wait for each other
IMAGES, LABELS = mnist.draw_digits(500, seed=0)
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks a process with torch in it")


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A small MNIST of printed digits, 400 to train on, 100 to test on; no network; a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    arrays = (IMAGES[:400, 0], LABELS[:400], IMAGES[400:, 0], LABELS[400:])
    (raw := tmp_path / "data/MNIST/raw").mkdir(parents=True)
    for name, array in zip(mnist.FILES, arrays, strict=True):  # IDX: a magic number, sizes, values
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (raw / name).write_bytes(head + array.byte().numpy().tobytes())
    content = b"".join((raw / name).read_bytes() for name in mnist.FILES)
    monkeypatch.setattr(mnist, "CRC32", zlib.crc32(content))
    return tmp_path / "data"


@pytest.fixture
def flags(data_dir, monkeypatch):
    """Flags for a run of a second on the small MNIST, by a clock that stands."""
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    more = "--data-dir data --out out --device cpu --lr 0.1 --val-size 100 --batch-size 50"
    return [*more.split(), "--epochs", "2"]


@pytest.fixture
def train(flags, monkeypatch):
    """Run the command line in this process, without plots; return what it exits with."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    def run(*more, flags=flags):
        try:
            return mnist.main([*flags, *map(str, more)])
        except SystemExit as stop:
            return stop.code

    return run


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_run(one, other):
    """Whether two folders hold the very same run, bit for bit."""
    one, other = Path(one), Path(other)
    a, b = (torch.load(max(f.glob("*epoch_?.pth")), weights_only=True) for f in (one, other))
    momenta, others = (c["optimizer_state_dict"]["state"] for c in (a, b))
    assert same_bits(a["model_state_dict"], b["model_state_dict"])
    assert all(same_bits(momenta[i], others[i]) for i in momenta)
    return (one / "metrics.json").read_bytes() == (other / "metrics.json").read_bytes()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics_of(out):
    return json.loads(Path(out, "metrics.json").read_text(encoding="utf-8"))


def new_state(name="simple", lr=0.05, schedule="constant", epochs=1, steps=1, fp16=False):
    torch.manual_seed(0)
    return mnist.make_state(mnist.MODELS[name](), lr, schedule, epochs, steps, fp16)


def leaves(model):
    return [m for m in model.modules() if not list(m.children())]


class TestModel:
    def test_simple_net_has_every_listed_feature(self):
        model = mnist.SimpleMNISTNet()
        layers = leaves(model)
        convs = [m for m in layers if isinstance(m, nn.Conv2d)]
        followers = [b for a, b in zip(layers, layers[1:], strict=False) if a in convs[:-1]]
        assert all(isinstance(m, nn.BatchNorm2d) for m in followers)
        kinds = [type(m) for m in layers]
        assert {*kinds} == {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Dropout} | {
            nn.AdaptiveAvgPool2d,
            nn.Flatten,
        }
        assert [kinds.count(kind) for kind in (nn.MaxPool2d, nn.Dropout)] == [2, 1]
        assert [type(m) for m in model].count(mnist.ResidualBlock) == 4
        assert convs[-1].kernel_size == (1, 1) and convs[-1].out_channels == 10
        assert [c.padding[0] for c in convs] == [0, 0, 0, 2, 0, 0, *[2, 0] * 3, 0]
        assert model.count_parameters() == 7954 < 8000

    def test_a_residual_block_adds_its_input(self):
        block, x = mnist.ResidualBlock(4), torch.randn(2, 4, 6, 6)
        nn.init.zeros_(block[-1].weight)
        assert torch.equal(block(x), x.relu())

    def test_wide_net_is_its_list_of_layers(self):
        layers = leaves(mnist.WideMNISTNet())
        convs = [m for m in layers if isinstance(m, nn.Conv2d)]
        sizes = [(c.in_channels, c.out_channels, c.kernel_size[0], c.padding[0]) for c in convs]
        first = [(1, 32, 3, 0), (32, 64, 3, 0), (64, 128, 3, 0), (128, 32, 1, 0)]
        assert sizes == [*first, (32, 64, 3, 0), (64, 128, 3, 0), (128, 10, 1, 0)]
        names = "".join(type(m).__name__[0] for m in layers)  # Conv2d, ReLU, MaxPool2d, Adaptive...
        assert names == "CRCRCRMCRCRCRACF" and all(c.bias is None for c in convs)

    def test_summary_lists_layers_and_total_and_changes_nothing(self, capsys):
        model = mnist.SimpleMNISTNet()
        model[0].requires_grad_(False)  # frozen parameters count
        old = {k: v.clone() for k, v in model.state_dict().items()}
        model.print_model_summary()
        *rows, total = capsys.readouterr().out.replace(",", "").splitlines()
        assert sum(int(row.split()[-1]) for row in rows) == int(total.split()[1]) == 7954
        assert "ReLU" in rows[0] and "('N' 8 26 26)" in rows[0] and "budget: 8000" in total
        assert model.training and same_bits(old, model.state_dict())

    def test_layers_can_be_taken_out_and_networks_copied(self):
        model, x = mnist.SimpleMNISTNet().eval(), torch.randn(2, 1, 28, 28)
        assert model[:-3](x).shape == (2, 24, 5, 5) and isinstance(model[2], nn.MaxPool2d)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))

    @pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16, "wide"])
    def test_one_batch_can_be_overfitted(self, amp):
        name, lr, amp = ("wide", 0.004, None) if amp == "wide" else ("simple", 0.05, amp)
        state = new_state(name, lr, fp16=amp == torch.float16)
        batch, types = next(mnist.batches((IMAGES[:5], LABELS[:5]), 5)), set()
        state.model[-1].register_forward_hook(lambda *args: types.add(args[2].dtype))
        first, _ = mnist.train_one_epoch(state, [batch], amp)
        mnist.train_one_epoch(state, [batch] * 70, amp)
        loss, accuracy = mnist.train_one_epoch(state, [batch], amp)
        assert first > 1.5 and loss < 0.1 and accuracy == 1 and types == {amp or torch.float32}


@pytest.fixture
def server(data_dir, tmp_path, monkeypatch):
    """torchvision's own download, from a server on this machine in the network's place."""
    sums = []
    for name in mnist.FILES:
        content = gzip.compress((data_dir / "MNIST/raw" / name).read_bytes())
        (tmp_path / f"{name}.gz").write_bytes(content)
        sums.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    yield server
    server.shutdown()


class TestData:
    def test_mnist_is_downloaded_if_missing_by_several_at_once(self, server, capsys):
        Path("new/MNIST/raw").mkdir(parents=True)  # an empty folder is no hindrance
        threads = [threading.Thread(target=mnist.load_mnist, args=("new",)) for _ in range(4)]
        for step in (threading.Thread.start, threading.Thread.join):
            [step(thread) for thread in threads]
        assert "downloading MNIST to new/MNIST/raw" in capsys.readouterr().out
        assert {p.name for p in Path("new").rglob("*") if p.is_file()} == {*mnist.FILES}
        server.shutdown()
        (images, labels), test = mnist.load_mnist("new")  # now from disk
        assert torch.equal(images, IMAGES[:400]) and images.dtype == torch.uint8
        assert torch.equal(labels, LABELS[:400]) and labels.dtype == torch.int64
        assert torch.equal(test[0], IMAGES[400:]) and torch.equal(test[1], LABELS[400:])

    def test_a_full_disk_is_no_lack_of_network_and_leaves_no_part(self, server, monkeypatch):
        download = datasets.MNIST.download

        def fill(self):
            Path(self.raw_folder).mkdir(parents=True)
            Path(self.raw_folder, mnist.FILES[0]).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(datasets.MNIST, "download", fill)
        with pytest.raises(OSError, match="No space") as caught:
            mnist.load_mnist("new")
        assert not isinstance(caught.value, ConnectionError) and not contents(Path("new"))
        monkeypatch.setattr(datasets.MNIST, "download", download)
        assert len(mnist.load_mnist("new")) == 2

    def test_without_a_network_the_error_says_why_and_what_to_do(self, data_dir):
        with pytest.raises(ConnectionError, match=r"(?s)Error.*: put .*idx3.* into new/MNIST/raw"):
            mnist.load_mnist("new")
        assert not contents(Path("new"))

    @pytest.mark.parametrize("name", mnist.FILES)
    def test_damaged_files_are_an_error(self, data_dir, name):
        path, rng = data_dir / "MNIST/raw" / name, random.Random(name)
        whole = path.read_bytes()
        cases = [whole[:-9], whole + b"\0", b"", b"<html>"]
        for _ in range(9):
            cases.append(bytearray(whole))
            cases[-1][rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        for content in cases:
            path.write_bytes(content)
            with pytest.raises(OSError, match=r"MNIST/raw is damaged"):
                mnist.load_mnist(data_dir)

    def test_draw_digits_is_determined_by_its_seed(self):
        assert IMAGES.dtype == torch.uint8 and IMAGES.shape == (500, 1, 28, 28)
        assert LABELS.dtype == torch.int64 and LABELS.unique().tolist() == [*range(10)]
        again, other = mnist.draw_digits(500, seed=0), mnist.draw_digits(500, seed=1)
        assert torch.equal(IMAGES, again[0]) and torch.equal(LABELS, again[1])
        assert not torch.equal(IMAGES, other[0])

    def test_augment_turns_scales_shears_and_shifts_by_its_limits(self, monkeypatch):
        """Images of their own coordinates show the map: its slopes, and its shift in pixels."""
        ramp = (torch.arange(28) - 13.5).expand(28, 28)
        x, y = ramp[None, None], ramp.T[None, None]
        monkeypatch.setattr(torch, "randn", torch.zeros)
        for extreme, sign in ((torch.ones, 1), (torch.zeros, -1)):
            monkeypatch.setattr(torch, "rand", extreme)
            u, v = mnist.augment(x)[0, 0], mnist.augment(y)[0, 0]
            angle, scale, shear = sign * math.radians(10), 1 + sign * 0.1, sign * 0.1
            cos, sin = scale * math.cos(angle), scale * math.sin(angle)
            slopes = [(m[14, 15] - m[14, 14], m[15, 14] - m[14, 14]) for m in (u, v)]
            expected = [cos, shear * cos - sin, sin, shear * sin + cos]
            assert [float(s) for pair in slopes for s in pair] == pytest.approx(expected, abs=1e-4)
            middle = [float(m[13:15, 13:15].mean()) for m in (u, v)]
            assert middle == pytest.approx([2 * sign, 2 * sign], abs=1e-4)

    def test_augment_keeps_shape_range_and_ground_and_differs_per_image(self):
        same = (IMAGES[:1].float() / 255).expand(64, 1, 28, 28)
        out = mnist.augment(same)
        assert out.shape == same.shape and out.min() >= 0 and out.max() <= 1
        assert (out[1:] - out[:1]).abs().amax((1, 2, 3)).min() > 0.1
        corners = mnist.augment(torch.ones(64, 1, 28, 28))[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() == 0  # what comes in from outside is ground

    @pytest.mark.parametrize("train", [False, True])
    def test_batches_are_normalised_and_to_train_on_shuffled_and_full(self, train, monkeypatch):
        seen = []
        monkeypatch.setattr(mnist, "augment", lambda x: (seen.append(x), x)[1])
        images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 1, 28, 28)
        pairs = [*mnist.batches((images, torch.arange(100)), 30, train)]
        assert [len(y) for _, y in pairs] == [30, 30, 30, 10][: 3 if train else 4]
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        assert torch.equal(((x[:, 0, 14, 14] * 0.3081 + 0.1307) * 255).round().long(), y)
        assert len(y.unique()) == len(y) and torch.equal(y, y.sort()[0]) == (not train)
        assert len(seen) == (3 if train else 0) and all(0 <= x.min() <= x.max() < 1 for x in seen)

    @pytest.mark.skipif(not MNIST_DIR, reason="MNIST_DIR does not name a folder with MNIST/raw")
    def test_one_epoch_of_real_mnist_reads_over_98_percent(self, tmp_path):
        command = [sys.executable, mnist.__file__, "--data", "mnist", "--data-dir", MNIST_DIR]
        subprocess.run([*command, "--epochs", "1", "--out", tmp_path / "out"], check=True)
        assert metrics_of(tmp_path / "out")["test_accuracy"] > 0.98


def rates(schedule, epochs=10, steps=10):
    state = new_state(lr=0.1, schedule=schedule, epochs=epochs, steps=steps)
    for _ in range(epochs * steps):
        assert state.optimizer.param_groups[0]["momentum"] == 0.9
        yield state.optimizer.param_groups[0]["lr"]
        state.optimizer.step()
        state.scheduler.step()


class TestTraining:
    def test_the_schedules_follow_their_course_in_any_number_of_steps(self):
        values = [*rates("onecycle")]
        assert values[0] == pytest.approx(0.004) and values.index(max(values)) in (19, 20)
        assert max(values) == pytest.approx(0.1, rel=0.01) and values[-1] < 1e-4
        assert [*rates("step")][9::10] == pytest.approx([0.1 * 0.7**epoch for epoch in range(10)])
        assert {*rates("constant")} == {0.1}
        assert all(max(rates("onecycle", epochs=1, steps=n)) <= 0.1 for n in range(1, 13))
        with pytest.raises(KeyError, match="one_cycle"):
            new_state(schedule="one_cycle")

    def test_a_step_is_nesterov_sgd_with_weight_decay_on_fresh_gradients(self):
        state = new_state("wide", lr=0.01)
        other = copy.deepcopy(state.model)
        sgd = torch.optim.SGD(other.parameters(), 0.01, 0.9, weight_decay=5e-5, nesterov=True)
        loader = [*mnist.batches((IMAGES[:60], LABELS[:60]), 20)]
        mnist.train_one_epoch(state, loader)
        for x, y in loader:
            sgd.zero_grad()
            F.cross_entropy(other(x), y).backward()
            sgd.step()
        for ours, theirs in zip(state.model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
        decay = state.optimizer.param_groups[0]["weight_decay"]
        assert decay == 5e-5 and state.optimizer.param_groups[0]["nesterov"]

    def test_fp16_survives_an_overflow_in_its_first_step(self):
        state, batch = (
            new_state("wide", lr=0.01, fp16=True),
            [*mnist.batches((IMAGES[:8], LABELS[:8]), 2)],
        )
        state.scaler._init_scale = 2.0**40
        loss, _ = mnist.train_one_epoch(state, batch * 4, torch.float16)
        assert state.scaler.get_scale() < 2.0**40 and math.isfinite(loss)
        assert all(p.isfinite().all() for p in state.model.parameters())

    def test_training_and_evaluate_give_the_mean_loss_and_the_accuracy(self, capsys):
        state, data = new_state("wide", lr=1e-12), (IMAGES[:78], LABELS[:78])
        state.model.append(nn.Dropout(0.0))
        trained = mnist.train_one_epoch(state, mnist.batches(data, 2), steps=39)
        first, last = capsys.readouterr().out.split("\r")[:-1]
        assert re.fullmatch(r"\[#{10} {10}\] 20/39 loss \d\.\d{4} accuracy .+% 0 s left ", first)
        assert re.fullmatch(r"\[#{20}\] 39/39 loss .+", last)
        loss, accuracy, logits = mnist.evaluate(state.model, data)
        assert not state.model.training and logits.is_inference()
        expected = state.model((IMAGES[:78] / 255 - 0.1307) / 0.3081).detach()
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)
        means = F.cross_entropy(expected, LABELS[:78]), (expected.argmax(1) == LABELS[:78]) * 1.0
        assert (loss, accuracy) == pytest.approx([m.mean().item() for m in means], rel=1e-4)
        assert trained == pytest.approx((loss, accuracy), rel=1e-4)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    @pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
    def test_cuda_learns_and_resumes(self, train, amp):
        more = ("--device", "cuda", "--amp", amp, "--epochs", 8, "--out")
        assert train(*more, "whole") is None and train(*more, "parts") is None
        for path in ("parts/mnist_model_epoch_8.pth", "parts/best_mnist_model.pth"):
            Path(path).unlink()
        assert train("--out", "parts", "--resume") is None
        whole, parts = (metrics_of(out)["history"] for out in ("whole", "parts"))
        assert parts[-1]["train_loss"] == pytest.approx(whole[-1]["train_loss"], rel=0.3)
        assert len(parts) == 8 and whole[-1]["train_loss"] < whole[0]["train_loss"]


@pytest.fixture
def saved(tmp_path):
    state, config = new_state(schedule="onecycle", epochs=2, steps=3), {"model": "simple"}
    mnist.train_one_epoch(state, mnist.batches((IMAGES[:90], LABELS[:90]), 30))
    mnist.save_checkpoint(str(tmp_path / "a.pth"), known_history(1), config, **state._asdict())
    return state, tmp_path / "a.pth"


class TestCheckpoints:
    def test_a_checkpoint_restores_every_part(self, saved):
        (state, path), other = saved, new_state(schedule="onecycle", epochs=2, steps=3)
        checkpoint = mnist.load_checkpoint(path, **other._asdict())
        assert checkpoint["history"] == known_history(1) and checkpoint["config"]
        assert checkpoint["epoch"] == 1 and checkpoint["val_loss"] == 0.06
        assert same_bits(state.model.state_dict(), other.model.state_dict())
        assert state.scheduler.get_last_lr() == other.scheduler.get_last_lr()
        assert same_bits(*(s.optimizer.state_dict()["state"][0] for s in (state, other)))

    @pytest.mark.parametrize("fault", ["write", "replace"])
    def test_a_failed_write_leaves_the_old_file_and_nothing_else(
        self, tmp_path, monkeypatch, fault
    ):
        mnist.write_file(tmp_path / "file", b"old")
        monkeypatch.setattr(os, "fsync" if fault == "write" else "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mnist.write_file(tmp_path / "file", b"new")
        assert {*tmp_path.rglob("*")} == {tmp_path / "file"}
        assert (tmp_path / "file").read_bytes() == b"old"

    def test_damaged_checkpoints_are_refused_or_the_very_same(self, saved):
        (state, path), rng, refused = saved, random.Random(0), 0
        whole, good = path.read_bytes(), torch.load(path)["model_state_dict"]
        for i in range(200):
            content = bytearray(whole if i % 3 else whole[: rng.randrange(len(whole))])
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            try:
                assert mnist.load_checkpoint(path, model=state.model)["history"] == known_history(1)
            except OSError as error:
                assert str(error) == f"{path} is damaged, or no checkpoint of this network"
                refused += 1
            else:  # it was a bit of the container's that nobody reads
                assert same_bits(good, state.model.state_dict())
        assert refused > 150

    def test_foreign_checkpoints_are_refused_and_not_run(self, saved, tmp_path):
        good, touched = torch.load(saved[1], weights_only=True), tmp_path / "touched"
        evil = type("Evil", (), {"__reduce__": lambda _: (Path.touch, (touched,))})()
        foreign = [[], None, "text", evil, mnist.SimpleMNISTNet(), good["model_state_dict"]]
        keys = [key for key in good if key.endswith("state_dict") or key in ("history", "config")]
        foreign += [{k: v for k, v in good.items() if k != key} for key in keys]
        not_a_number = {k: v * float("nan") for k, v in good["model_state_dict"].items()}
        changes = [{"epoch": evil}, {"config": []}, {"model_state_dict": {}}, {"history": [{}]}]
        changes += [{"model_state_dict": not_a_number}]
        changes += [{"history": [known_history(1)[0] | {"lr": "\x1b[1m"}]}]
        foreign += [good | change for change in changes]
        for content in foreign:
            torch.save(content, saved[1])
            with pytest.raises(OSError, match="is damaged, or no checkpoint of this network"):
                mnist.load_checkpoint(saved[1], **new_state()._asdict())
        assert not touched.exists()


def known_history(epochs):
    entry = {"lr": 0.4, "seconds": 12.34}
    for split in mnist.SPLITS:
        entry |= {f"{split}_loss": len(split) / 50, f"{split}_accuracy": 1 - len(split) / 500}
    return [{"epoch": epoch} | entry for epoch in range(1, epochs + 1)]


def known_metrics(epochs):
    confusion = torch.diag(torch.full((10,), 100))
    confusion[4, 4], confusion[4, 9] = 70, 30
    confusion[7] = 0  # a class that is missing
    metrics = {"parameters": 7954, "data": "mnist", "test_accuracy": 0.97, "best_epoch": 1}
    return metrics | {"confusion": confusion.tolist(), "history": known_history(epochs)}


class TestReport:
    def test_the_report_of_a_known_run_and_its_width(self):
        report = mnist.make_report(known_metrics(1)).splitlines()
        assert report[0] == "mnist test accuracy 97.00% +- 1.11%"
        cells = "0.1000  99.00%  0.0600  99.40%  0.0800  99.20%"
        assert report[3:5] == [mnist.HEADER, f"    1 0.4000  {cells}    12.3  ###"]
        assert "    4    .    .    .    .   70    .    .    .    .   30  70.0%" in report
        assert report[6].split() == ["true", "predicted", "recall"]
        (metrics := known_metrics(100))["history"][0] |= {"val_accuracy": 0.1, "train_loss": 12.3}
        report = mnist.make_report(metrics)
        assert report.isascii() and max(map(len, report.splitlines())) <= 79

    def test_a_plot_shows_three_named_curves_of_both_figures(self, monkeypatch):
        figure = pytest.importorskip("matplotlib.figure").Figure
        saved, save = [], figure.savefig
        monkeypatch.setattr(
            figure, "savefig", lambda f, *a, **k: (saved.append(f), save(f, *a, **k))
        )
        assert mnist.draw_plot(known_history(9)).startswith(b"\x89PNG")
        for axes, key in zip(saved[0].axes, ("loss", "accuracy"), strict=True):
            assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", key)
            assert [text.get_text() for text in axes.get_legend().get_texts()] == [*mnist.SPLITS]
            for line, split in zip(axes.lines, mnist.SPLITS, strict=True):
                assert [*line.get_xdata()] == [*range(1, 10)]
                assert {*line.get_ydata()} == {known_history(1)[0][f"{split}_{key}"]}


BAD = "--epochs 0,--epochs x,--batch-size 0,--val-size 0,--lr 0,--lr -1,--amp x,--model x,--data x"

ERRORS = {
    "--batch-size 301": "leaves 300 images to train on, less than a batch",
    "--val-size 400": "leaves 0 images",
    "--out data/MNIST/raw/t10k-labels-idx1-ubyte": "File exists: .*t10k-labels",
    "--evaluate missing.pth": "No such file or directory: 'missing.pth'",
    "--evaluate data/MNIST/raw/t10k-labels-idx1-ubyte": "t10k-labels-idx1-ubyte is damaged, or",
    "--lr 1e9 --schedule constant": "try a lower --lr",
    "--data-dir empty --data mnist": "put train-images-idx3-ubyte.* into empty/MNIST/raw",
} | ({} if torch.cuda.is_available() else {"--device cuda": "there is no cuda device here"})


def start(flags, prepare=lambda: None):
    target = lambda: (prepare(), sys.exit(mnist.main(flags)))  # noqa: E731
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def end(process):
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def live_dangerously(seed):
    """Make this process be killed by chance in the midst of a write, or right after one."""
    rng, replace = random.Random(seed), os.replace

    def die():
        if rng.random() < 0.1:
            os.kill(os.getpid(), signal.SIGKILL)

    class File:
        def __init__(self, path, mode):
            self.file = open(path, mode)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            die()
            self.file.write(content[len(content) // 2 :])

        def __getattr__(self, name):
            return getattr(self.file, name)

    mnist.open = File  # in the place of the builtin
    os.replace = lambda old, new: (replace(old, new), die())


class TestCommandLine:
    @pytest.mark.parametrize("flag", BAD.split(","))
    def test_bad_flags_are_bad_usage(self, flag, capsys):
        with pytest.raises(SystemExit) as caught:
            mnist.main(flag.split())
        assert caught.value.code == 2 and flag.split()[0] in capsys.readouterr().err

    def test_defaults(self, monkeypatch):
        defaults = "simple auto data 5000 15 64 0.4 onecycle 1 cpu off model_checkpoints"
        cuda = torch.cuda.is_available()
        args = vars(mnist.parse_args(["--device", "cpu"]))
        assert [str(value) for value in args.values()][:12] == defaults.split()
        assert [*args.values()][12:] == [False, None, False]
        assert mnist.parse_args(["--model", "wide"]).lr == 0.05
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for bf16 in (True, False):
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, ok=bf16, **__: ok)
            args = mnist.parse_args([])
            expected = ("cuda", 128, "bf16" if bf16 else "fp16")
            assert (args.device, args.batch_size, args.amp) == expected
        assert mnist.parse_args(["--out", "~/x"]).out == Path.home() / "x"
        assert cuda in (True, False)

    def test_splits_are_the_first_the_next_and_the_test_images(self, flags):
        data = mnist.get_data(mnist.parse_args(flags))
        images, labels = IMAGES.split([300, 100, 100]), LABELS.split([300, 100, 100])
        for i, split in enumerate(("train", "val", "test")):
            assert torch.equal(data[split][0], images[i]) and torch.equal(data[split][1], labels[i])

    def test_a_run_writes_its_files_and_says_what_it_does(
        self, train, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.delitem(sys.modules, "matplotlib.figure")
        assert train() is None
        out, printed = tmp_path / "out", capsys.readouterr().out
        names = "mnist_model_epoch_1.pth mnist_model_epoch_2.pth best_mnist_model.pth metrics.json"
        plot = ["training_metrics.png"] if (out / "training_metrics.png").exists() else []
        assert {path.name for path in out.iterdir()} == {*names.split(), "report.txt", *plot}
        metrics = metrics_of(out)
        assert {*metrics["history"][1]} == {*mnist.METRICS}
        assert (metrics["parameters"], metrics["data"]) == (7954, "mnist")
        assert [sum(row) for row in metrics["confusion"]] == LABELS[400:].bincount().tolist()
        best = min(metrics["history"], key=lambda m: m["val_loss"])
        assert metrics["test_accuracy"] == best["test_accuracy"]
        assert (out / "report.txt").read_text() in printed and not re.search(".{80}", printed)
        assert "mnist on cpu, amp off, seed 1, into out\n" in printed
        keys = {f"{part}_state_dict" for part in ("model", "optimizer", "scheduler", "scaler")}
        checkpoint = torch.load(out / "best_mnist_model.pth", weights_only=True)
        assert keys | {*mnist.METRICS, "history", "config"} == checkpoint.keys()
        assert checkpoint["epoch"] == best["epoch"] == metrics["best_epoch"]
        assert {*checkpoint["config"]} == {*mnist.CONFIG} and checkpoint["config"]["lr"] == 0.1

    def test_a_checkpoint_works_with_standard_preprocessing(self, train, data_dir):
        train("--epochs", 15, "--lr", 0.02)
        model = mnist.SimpleMNISTNet().eval()
        content = torch.load("out/best_mnist_model.pth", weights_only=True)
        model.load_state_dict(content["model_state_dict"])
        normal = transforms.Normalize((0.1307,), (0.3081,))
        transform = transforms.Compose([transforms.ToTensor(), normal])
        test = datasets.MNIST(data_dir, train=False, transform=transform)
        with torch.inference_mode():
            hits = sum((model(x).argmax(1) == y).sum().item() for x, y in DataLoader(test, 32))
        assert hits / 100 == metrics_of("out")["test_accuracy"] > 0.2

    def test_the_best_epoch_is_the_lowest_loss_and_each_epoch_has_its_own_seed(
        self, train, monkeypatch
    ):
        losses, seen = iter([1, 3, 2, 4, 2, 4, 1, 5, 0, 5]), []  # of val and test in turn
        logits = torch.zeros(100, 10)
        monkeypatch.setattr(mnist, "evaluate", lambda *_: (next(losses, 9), 0.5, logits))
        monkeypatch.setattr(mnist, "augment", lambda x: (seen.append(x.sum().item()), x)[1])
        assert train("--epochs", 5) is None and len({*seen}) == len(seen) == 5 * 6
        metrics = metrics_of("out")
        assert metrics["best_epoch"] == 5 and metrics["history"][1]["val_loss"] == 2
        assert metrics["history"][0]["test_loss"] == 3
        rates = [epoch["lr"] for epoch in metrics["history"]]
        assert rates[0] == pytest.approx(0.004) and rates[1] == max(rates) and rates[4] < 0.03
        assert torch.load("out/best_mnist_model.pth")["epoch"] == 5
        losses = iter([1, 3, 2, 4, 2, 4])
        assert train("--epochs", 3, "--out", "other") is None
        assert metrics_of("other")["best_epoch"] == 1

    def test_layout_and_precision_are_what_the_flags_say(self, train, monkeypatch):
        made, make_state = [], mnist.make_state
        monkeypatch.setattr(
            mnist, "make_state", lambda *a: (made.append(make_state(*a)), made[-1])[1]
        )
        for amp in ("fp16", "off"):
            assert train("--amp", amp, "--epochs", 1, "--out", amp) is None
            assert made[-1].scaler.is_enabled() == (amp == "fp16")
            assert made[-1].model[1][0].weight.is_contiguous(memory_format=torch.channels_last)
            assert metrics_of(amp)["config"]["amp"] == amp

    def test_dry_run_can_be_tried_again_and_leaves_nothing(self, train, tmp_path, capsys):
        train("--epochs", 1)
        before = contents(tmp_path)
        for flags in (["--seed", 2], ["--model", "wide", "--epochs", 9]):
            capsys.readouterr()
            assert train("--dry-run", *flags) is None
            assert "\ndry run test accuracy" in capsys.readouterr().out
        assert contents(tmp_path) == before

    def test_a_new_run_never_writes_into_a_folder_with_a_checkpoint(self, train, tmp_path):
        Path("out").mkdir()  # an empty one will do, as will one that a failed run left
        assert "try a lower" in train("--lr", "1e9") and train("--epochs", 1) is None
        before = contents(tmp_path)
        shutil.rmtree("data")  # it is said before the data are looked for
        text = "mnist.py: error: out holds a run: add --resume, or choose another --out"
        assert train() == train("--lr", 0.2) == text
        assert {k: v for k, v in before.items() if "out" in k.parts} == contents(tmp_path)

    def test_resume_takes_the_settings_of_the_run(self, train, flags, tmp_path, capsys):
        more = ("--model", "wide", "--lr", 0.01, "--schedule", "step", "--epochs", 1)
        assert train(*more, "--resume") is None  # begins where there is nothing yet
        report, before = (tmp_path / "out/report.txt").read_text(), contents(tmp_path)
        where = flags[:6]
        best = tmp_path / "out/best_mnist_model.pth"
        for flag in (("--resume",), ("--evaluate", best)):
            capsys.readouterr()
            assert train(*flag, flags=where) is None
            assert report in capsys.readouterr().out and before == contents(tmp_path)
        best.unlink()  # made again from its epoch's file
        assert train("--resume", flags=where) is None and before == contents(tmp_path)

    def test_resume_names_a_flag_that_differs(self, train):
        train()
        clashes = "--lr 0.3 0.1,--batch-size 60 50,--epochs 4 2,--seed 2 1,--model wide simple"
        clashes += ",--amp bf16 off,--schedule step onecycle,--val-size 90 100"
        for flag, new, old in map(str.split, clashes.split(",")):
            text = f"mnist.py: error: {flag} is {new}, but the run in out has {old}: leave it out"
            assert train("--resume", flag, new).startswith(text)

    @pytest.mark.parametrize("schedule", ["step", "constant"])
    def test_without_onecycle_a_run_can_go_on_for_longer(self, train, schedule):
        more = ("--schedule", schedule, "--epochs")
        assert train(*more, 1) is None and train(*more, 3, "--resume") is None
        assert train(*more, 3, "--out", "whole") is None and same_run("out", "whole")

    def test_resume_goes_on_from_the_newest_checkpoint_and_tells_damage(self, train, capsys):
        train("--epochs", 10)
        newest = Path("out/mnist_model_epoch_10.pth")
        report, whole = Path("out/report.txt").read_text(), newest.read_bytes()
        for name in ("mnist_model_epoch_11 (1).pth", "mnist_model_epoch_12_backup.pth"):
            Path("out", name).write_bytes(b"not the run's")
        assert train("--epochs", 10, "--resume") is None
        newest.write_bytes(whole[:-9])
        assert f"{newest} is damaged" in train("--epochs", 10, "--resume")
        newest.unlink()
        capsys.readouterr()
        assert train("--epochs", 10, "--resume") is None
        printed = capsys.readouterr().out
        assert printed.count("\n    3 0.0") == 2  # the table is whole
        assert report == Path("out/report.txt").read_text()

    def test_a_config_of_another_program_is_refused(self, train, capsys):
        train("--epochs", 1)
        path = Path("out/mnist_model_epoch_1.pth")
        for change in ({"model": "x"}, {"model": []}, {"lr": "\x1b[1m"}, {"epochs": None}):
            checkpoint = torch.load(path)
            checkpoint["config"] = checkpoint["config"] | change
            torch.save(checkpoint, "other.pth")
            assert train("--evaluate", "other.pth") == 2
            assert "\x1b" not in capsys.readouterr().err
        checkpoint["config"] |= {"model": "wide", "lr": 0.1, "epochs": 1}
        torch.save(checkpoint, "other.pth")
        assert "no checkpoint of this network" in train("--evaluate", "other.pth")

    @pytest.mark.parametrize("more", ERRORS)
    def test_what_cannot_be_done_is_told_in_one_line(self, train, tmp_path, monkeypatch, more):
        message = train(*more.split())
        assert re.fullmatch(f"mnist.py: error: .*{ERRORS[more]}.*", message)
        assert not (tmp_path / "out/metrics.json").exists()

    def test_only_without_a_network_printed_digits_stand_in(self, train, monkeypatch, capsys):
        seeds = []
        digits = lambda n, seed: (seeds.append(seed), (IMAGES[:400], LABELS[:400]))[1]  # noqa: E731
        monkeypatch.setattr(mnist, "draw_digits", digits)
        assert train("--data-dir", "empty") is None and seeds == [0, 1]
        printed = capsys.readouterr().out
        assert "!" * 79 + "\nSYNTHETIC: printed digits, not MNIST: Error downloading" in printed
        assert "\nsynthetic test accuracy" in printed and not contents(Path("empty"))
        assert {path.name for path in Path("out").iterdir()} == {"synthetic"}
        assert train("--data", "synthetic") == train("--data-dir", "empty")  # both hold a run
        assert train("--data-dir", "empty", "--resume") is None
        assert train() is None and metrics_of("out")["data"] == "mnist"  # now it is there
        monkeypatch.setattr(datasets.MNIST, "download", lambda _: 1 / 0 if 0 else os.stat("gone"))
        assert "No such file" in train("--data-dir", "empty", "--out", "third")

    @needs_fork
    def test_a_run_killed_again_and_again_ends_with_the_same_bits(self, flags, tmp_path):
        flags += ["--epochs", "3", "--resume", "--out"]
        assert end(start([*flags, "whole"])) == 0
        rng, kills, finished = random.Random(7), 0, True
        while kills < KILLS or not finished:
            if finished:  # a new run takes the rest of the kills
                shutil.rmtree("killed", ignore_errors=True)
            status = end(start([*flags, "killed"], partial(live_dangerously, rng.random())))
            kills, finished = kills + (status == -9), status == 0
            for path in Path("killed").glob("*.pth"):
                mnist.load_checkpoint(path)
        assert same_run("whole", "killed")
        assert {p.name for p in Path("killed").iterdir()} == {
            p.name for p in Path("whole").iterdir()
        }

    @needs_fork
    def test_two_may_resume_at_once(self, flags, tmp_path):
        both = [start([*flags, "--resume"]) for _ in range(2)]
        assert [end(process) for process in both] == [0, 0]
        assert end(start([*flags, "--out", "alone"])) == 0 and same_run("out", "alone")

    @needs_fork
    def test_ctrl_c_and_lost_readers_show_no_traceback(self, flags, tmp_path, capfd):
        attentive = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        run = start([*flags, "--epochs", "999"], attentive)
        while not (tmp_path / "out/mnist_model_epoch_2.pth").exists():
            assert run.is_alive()
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGINT)
        assert end(run) == 130 and re.fullmatch("\n.*goes on\n", capfd.readouterr().err)
        assert end(start([*flags, "--dry-run"], partial(setattr, sys, "stdout", None))) == 0


USES = {  # what to copy, and a use of it
    "# -+ Model": "SimpleMNISTNet()(torch.zeros(1, 1, 28, 28))",
    "# -+ Data": "next(batches(draw_digits(9, 0), 9, train=True))",
    "# -+ Check": f"save_checkpoint('a.pth', {known_history(1)}, {{}})",
    "# -+ Report": f"SPLITS = {mnist.SPLITS}; make_report({known_metrics(3)})",
    "def augment": "augment(torch.rand(2, 1, 28, 28))",
}


class TestTheFileItself:
    @pytest.mark.parametrize("piece", USES)
    def test_each_piece_works_alone_with_the_imports(self, piece, data_dir):
        imports = re.search(r"^import argparse.*?(?=^# -)", SOURCE, re.S | re.M)[0]
        end = r"\n\n\n" if piece.startswith("def") else r"^(?=# -)"
        code = re.search(rf"^{piece}.*?{end}", SOURCE, re.S | re.M)[0]
        if "Report" in piece:
            code = f"SPLITS = {mnist.SPLITS}\n{code}"
        exec(imports + code + USES[piece], {})
