# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "matplotlib", "pytest>=8"]
# ///
"""The specification of mnist.py, section by section.

MNIST_DIR=data python test_mnist.py                real MNIST too, from data/MNIST/raw
MNIST_KILLS=60 python test_mnist.py -k killed      more of what is done by chance
"""

import gzip
import hashlib
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
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import IncompleteRead
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import mnist

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
MNIST_DIR, KILLS = os.environ.get("MNIST_DIR"), int(os.environ.get("MNIST_KILLS", "4"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPLITS, ERROR = ("train", "val", "test"), "mnist.py: error: "
HERE, SMALL = "--data-dir data --out out", "--device cpu --lr 0.1 --val-size 90 --batch-size 50"
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks a process with torch in it")
torch.set_num_threads(1)  # on tensors as small as these, threads wait for each other
IMAGES, LABELS = mnist.draw_digits(500, seed=0)


# ------------------------------------------------------------------------------------- Fixtures
@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A small MNIST, 400 to train on and 100 to test on, in a new working folder; no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    arrays = (IMAGES[:400, 0], LABELS[:400], IMAGES[400:, 0], LABELS[400:])
    for name, array in zip(mnist.FILES, arrays, strict=True):
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (raw / name).write_bytes(head + array.byte().numpy().tobytes())
    return tmp_path / "data"


@pytest.fixture
def run_small(data_dir, monkeypatch):
    """Run the command line on the small MNIST, for two epochs; return its exit status or message.

    The clock stands still, so that equal runs have equal files; matplotlib, being slow, is hidden.
    """
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    return partial(run_main, HERE, SMALL, "--epochs 2")


@pytest.fixture
def saved(tmp_path):
    """A training state after three steps, and the path of its checkpoint."""
    state, path = new_state(schedule="onecycle", epochs=2, steps=3), tmp_path / "a.pth"
    mnist.train_one_epoch(state, mnist.batches((IMAGES[:90], LABELS[:90]), 30))
    mnist.save_checkpoint(str(path), known_history(1), {"seed": 1}, **state._asdict())
    return state, path


# -------------------------------------------------------------------------------------- Helpers
def run_main(*flags):
    try:
        return mnist.main(" ".join(map(str, flags)).split())
    except SystemExit as stop:
        return stop.code


def settled(flags):
    args = mnist.parse_args(flags.split())
    args.out = Path(args.out)
    mnist.open_run(args)
    return args


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def load(path):
    return torch.load(path, weights_only=True)


def metrics_of(out):
    return json.loads(Path(str(out), "metrics.json").read_text(encoding="utf-8"))


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def new_state(name="simple", lr=0.05, schedule="constant", epochs=1, steps=1, fp16=False, to="cpu"):
    torch.manual_seed(0)
    return mnist.make_state(mnist.MODELS[name]().to(to), lr, schedule, epochs, steps, fp16)


def leaves(model):
    return [m for m in model.modules() if not list(m.children())]


def known_history(epochs):
    entry = {"lr": 0.4, "seconds": 12.34}
    for split in SPLITS:
        entry |= {f"{split}_loss": len(split) / 50, f"{split}_accuracy": 1 - len(split) / 500}
    return [{"epoch": epoch} | entry for epoch in range(1, epochs + 1)]


def start(flags, prepare=lambda: None):
    def target():
        prepare()
        sys.exit(run_main(HERE, SMALL, flags))

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def end(process):
    process.join(60)
    return process.exitcode  # None if it hangs


def die_by_chance(seed):
    """Arrange to be killed in the midst of a write, or right after a file is in its place."""
    rng = random.Random(seed)

    def perhaps_after(action):
        def wrapped(*args):
            action(*args)
            if rng.random() < 0.1:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    def append(path, content):
        with path.open("ab") as file:
            file.write(content)

    def write_bytes(path, content):
        for part in (content[:9999], content[9999:]):
            perhaps_after(append)(path, part)

    Path.write_bytes = write_bytes
    os.replace, os.link = perhaps_after(os.replace), perhaps_after(os.link)


# ---------------------------------------------------------------------------------------- Model
class TestModel:
    @pytest.mark.parametrize("n", [1, 64])
    def test_both_networks_give_ten_logits(self, n):
        for network in mnist.MODELS.values():
            assert network().eval()(torch.randn(n, 1, 28, 28)).shape == (n, 10)

    def test_simple_mnist_net_has_every_listed_feature(self):
        model = mnist.SimpleMNISTNet()
        kinds = [type(m).__name__ for m in leaves(model)]
        convs = [m for m in leaves(model) if isinstance(m, nn.Conv2d)]
        followers = [kinds[i + 1] for i, kind in enumerate(kinds) if kind == "Conv2d"]
        assert followers == ["BatchNorm2d"] * 12 + ["AdaptiveAvgPool2d"]
        assert {*kinds} == {*followers, "Conv2d", "ReLU", "MaxPool2d", "Dropout"}
        assert kinds.count("MaxPool2d") == 2
        assert [m.p for m in leaves(model) if isinstance(m, nn.Dropout)] == [0.05]
        assert [type(m) for m in model.layers].count(mnist.ResidualBlock) == 4
        assert [c.padding[0] for c in convs] == [0, 0, 0, 2, 0, 0, *[2, 0] * 3, 0]

    def test_wide_mnist_net_is_a_list_of_conv_block_without_norm(self):
        layers = leaves(mnist.WideMNISTNet())
        convs = [m for m in layers if isinstance(m, nn.Conv2d)]
        sizes = [f"{c.in_channels}-{c.out_channels}-{c.kernel_size[0]}" for c in convs]
        assert " ".join(sizes) == "1-32-3 32-64-3 64-128-3 128-32-1 32-64-3 64-128-3 128-10-1"
        names = "".join(type(m).__name__[0] for m in layers)  # Conv2d, ReLU, MaxPool2d, Adaptive...
        assert names == "CRCRCRMCRCRCRAC"
        assert not any(c.padding[0] or c.bias for c in convs)

    def test_residual_block_adds_its_input(self):
        block, x = mnist.ResidualBlock(4), torch.randn(2, 4, 6, 6)
        nn.init.zeros_(block.branch[-1].weight)
        assert torch.equal(block(x), x.relu())

    def test_network_counts_parameters_and_knows_its_budget(self, capsys):
        model = mnist.SimpleMNISTNet().requires_grad_(False)  # frozen ones count
        assert model.count_parameters() == 7954 < model.budget == 8000
        for budget, verdict in ((8000, "met"), (7955, "met"), (7954, "EXCEEDED")):
            model.budget = budget
            model.print_model_summary()
            total = f"\nSimpleMNISTNet: 7,954 parameters (budget: {budget:,}): {verdict}\n"
            assert capsys.readouterr().out.endswith(total)
        mnist.WideMNISTNet().print_model_summary()
        assert capsys.readouterr().out.endswith("\nWideMNISTNet: 189,984 parameters\n")

    def test_network_lists_its_layers_and_is_not_changed(self, capsys):
        model, rng = mnist.SimpleMNISTNet().half(), torch.get_rng_state()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.print_model_summary()
        *rows, _ = capsys.readouterr().out.replace(",", "").splitlines()
        assert sum(int(row.split()[-1]) for row in rows) == 7954
        assert re.match(r"Conv2d BatchNorm2d ReLU +\('N' 8 26 26\) +88", rows[0])
        assert model.training
        assert torch.equal(rng, torch.get_rng_state())
        assert same_bits(before, model.state_dict())

    def test_network_can_be_sliced(self):
        model, x = mnist.SimpleMNISTNet(), torch.randn(2, 1, 28, 28)
        assert model.layers[:-2](x).shape == (2, 24, 5, 5)
        assert model.layers[4].branch[:1](model.layers[:4](x)).shape == (2, 16, 10, 10)

    @pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16, "wide"])
    def test_one_batch_can_be_overfitted(self, amp):
        name, lr, n, amp = ("wide", 0.002, 5, None) if amp == "wide" else ("simple", 0.1, 64, amp)
        state = new_state(name, lr, fp16=amp == torch.float16, to=DEVICE)
        data = (IMAGES[:n].to(DEVICE), LABELS[:n].to(DEVICE))
        mnist.train_one_epoch(state, [*mnist.batches(data, n)] * (100 if n == 5 else 40), amp)
        loss, accuracy = mnist.train_one_epoch(state, mnist.batches(data, n), amp)
        assert accuracy == 1
        assert loss < 0.1


# ----------------------------------------------------------------------------------------- Data
class TestData:
    def test_load_mnist_downloads_what_is_missing_for_several_at_once(self, data_dir, monkeypatch):
        sums = []
        for name in mnist.FILES:
            content = gzip.compress((data_dir / "MNIST/raw" / name).read_bytes())
            Path(f"{name}.gz").write_bytes(content)
            sums.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
        Path("new/MNIST/raw").mkdir(parents=True)
        Path("new/MNIST/raw", mnist.FILES[0]).touch()  # one alone does not count
        server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
        mirrors = ["http://127.0.0.1:9/", f"http://127.0.0.1:{server.server_port}/"]  # one is down
        monkeypatch.setattr(datasets.MNIST, "mirrors", mirrors)
        monkeypatch.setattr(datasets.MNIST, "resources", sums)
        with ThreadPoolExecutor() as pool:
            pool.submit(server.serve_forever)
            assert len([*pool.map(mnist.load_mnist, ["new"] * 4)]) == 4
            server.shutdown()
        assert {p.name for p in Path("new").rglob("*") if p.is_file()} == {*mnist.FILES}
        train, test = mnist.load_mnist("new")  # now from disk
        assert (train[0].dtype, train[1].dtype) == (torch.uint8, torch.int64)
        assert torch.equal(torch.cat([train[0], test[0]]), IMAGES)
        assert torch.equal(torch.cat([train[1], test[1]]), LABELS)

    @pytest.mark.parametrize("error", [RuntimeError, IncompleteRead, TimeoutError, PermissionError])
    def test_load_mnist_takes_20_seconds_of_silence_for_no_network(
        self, tmp_path, monkeypatch, error
    ):
        def download(self):
            limits.append(socket.getdefaulttimeout())
            raise error(b"")

        limits = []
        monkeypatch.setattr(datasets.MNIST, "download", download)
        with pytest.raises(OSError) as caught:  # noqa: PT011
            mnist.load_mnist(tmp_path)
        assert isinstance(caught.value, ConnectionError) == (error != PermissionError)
        assert (limits, socket.getdefaulttimeout()) == ([20], None)
        assert not contents(tmp_path)

    @pytest.mark.parametrize("name", mnist.FILES)
    def test_load_mnist_names_a_damaged_or_swapped_file(self, data_dir, name):
        raw = data_dir / "MNIST/raw"
        whole, other = ((raw / file).read_bytes() for file in (name, mnist.FILES[name[0] == "t"]))
        for content in (whole[:-9], whole + b"?", b"", b"\x1f\x8b" + whole[2:], other):
            if content != whole:
                (raw / name).write_bytes(content)
                with pytest.raises(OSError, match="ubyte is damaged: delete"):
                    mnist.load_mnist(data_dir)

    @pytest.mark.parametrize("strength", [1, 0.5])
    @pytest.mark.parametrize("draws", [[1.0] * 5, [0.0] * 5, [0.9, 0.2, 0.7, 0.4, 0.1]])
    def test_augment_turns_scales_shears_and_shifts_by_its_limits(
        self, monkeypatch, draws, strength
    ):
        """Images of their own coordinates show the map: its slopes, and its shift in pixels."""
        ramp, draw = (torch.arange(28) - 13.5).expand(28, 28), torch.tensor(draws)[:, None]
        monkeypatch.setattr(torch, "rand", lambda *size, **_: draw.expand(size))
        monkeypatch.setattr(torch, "randn", torch.zeros)  # no elastic field
        maps = mnist.augment(torch.stack([ramp, ramp.T])[:, None], strength)[:, 0]  # of x and y
        turn, grow, shear, right, down = [strength * (2 * value - 1) for value in draws]
        angle, scale, shear = math.radians(13) * turn, 1 + 0.13 * grow, 0.13 * shear
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        slopes = [m[i, j] - m[14, 14] for m in maps for i, j in ((14, 15), (15, 14))]
        expected = [cos, shear * cos - sin, sin, shear * sin + cos]
        assert [*map(float, slopes)] == pytest.approx(expected, abs=1e-4)
        middle = maps[:, 13:15, 13:15].mean((1, 2)).tolist()
        assert middle == pytest.approx([2.6 * right, 2.6 * down], abs=1e-4)

    def test_augment_moves_pixels_by_a_smooth_field(self, monkeypatch):
        field = torch.zeros(1, 2, 5, 5)
        field[0, 0, :, 2] = 1  # the middle is moved along x
        monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 0.5))  # not affine
        monkeypatch.setattr(torch, "randn", lambda *_, **__: field)
        moved = mnist.augment(torch.arange(28.0).expand(1, 1, 28, 28), 0.5) - torch.arange(28)
        assert moved[..., 13].mean() == pytest.approx(0.15, abs=0.01)
        assert moved[..., 0].abs().max() < 0.01
        assert moved.diff().abs().max() < 0.05

    @pytest.mark.parametrize("still", ["rand", "randn"])
    def test_augment_draws_the_map_and_the_field_for_each_image(self, monkeypatch, still):
        constant = {"rand": lambda *size, **_: torch.full(size, 0.5), "randn": torch.zeros}
        monkeypatch.setattr(torch, still, constant[still])  # the other one is left
        out = mnist.augment((IMAGES[:1].float() / 255).expand(64, 1, 28, 28))
        assert (out[1:] - out[:1]).abs().amax((1, 2, 3)).min() > 0.02

    def test_augment_keeps_shape_and_range_and_shifts_by_pixels_at_any_size(self, monkeypatch):
        out = mnist.augment(torch.ones(64, 1, 40, 40))
        assert out.shape == (64, 1, 40, 40)
        assert 0 == out[:, 0, 0, 0].min() <= out.min() <= out.max() <= 1.0001  # black from outside
        right = torch.tensor([0.5, 0.5, 0.5, 1, 0.5])[:, None]
        monkeypatch.setattr(torch, "rand", lambda *_, **__: right)
        monkeypatch.setattr(torch, "randn", torch.zeros)
        moved = mnist.augment(torch.arange(40.0).expand(1, 1, 40, 40))[0, 0, 9, 9] - 9
        assert moved.item() == pytest.approx(2.6, abs=1e-3)

    def test_draw_digits_draws_each_digit_in_its_class(self, monkeypatch):
        glyphs = """
            ### .#. ### ### #.# ### ### ### ### ###
            #.# ##. ..# ..# #.# #.. #.. ..# #.# #.#
            #.# .#. ### ### ### ### ### .#. ### ###
            #.# .#. #.. ..# ..# ..# #.# .#. #.# ..#
            ### ### ### ### ..# ### ### .#. ### ###"""
        monkeypatch.setattr(mnist, "augment", lambda images: images)
        images, labels = mnist.draw_digits(200, seed=0)
        small = images[:, 0, 4:24:4, 8:20:4]  # a pixel of the font is 4x4
        seen = [small[labels == digit][0] for digit in range(10)]
        rows = [" ".join("".join(".#"[v // 255] for v in d[i]) for d in seen) for i in range(5)]
        assert rows == [line.strip() for line in glyphs.splitlines()[1:]]

    def test_draw_digits_depends_on_its_seed_alone(self):
        assert all(map(torch.equal, mnist.draw_digits(500, seed=0), (IMAGES, LABELS)))
        assert not any(map(torch.equal, mnist.draw_digits(500, seed=1), (IMAGES, LABELS)))

    @pytest.mark.parametrize("train", [False, True])
    def test_batches_are_normalized_and_to_train_shuffled_and_full(self, train, monkeypatch):
        def note(x, strength):
            augmented.append((x.min() >= 0 and x.max() < 1, strength))
            return x

        augmented = []
        monkeypatch.setattr(mnist, "augment", note)
        images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 1, 28, 28)
        pairs = [*mnist.batches((images, torch.arange(100)), 30, train=train, strength=0.3)]
        assert [len(y) for _, y in pairs] == [30, 30, 30, 10][: 3 if train else 4]
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        assert torch.equal(((x[:, 0, 14, 14] * 0.3081 + 0.1307) * 255).round().long(), y)
        assert len(y.unique()) == len(y)
        assert torch.equal(y, y.sort()[0]) == (not train)
        assert augmented == ([(True, 0.3)] * 3 if train else [])

    def test_batches_refuse_floats_and_too_few_images(self):
        for images, train in ((IMAGES / 255, False), (IMAGES[:0], False), (IMAGES[:63], True)):
            with pytest.raises(ValueError, match="not 64 of uint8"):
                next(mnist.batches((images, LABELS[: len(images)]), 64, train=train))

    @pytest.mark.skipif(not MNIST_DIR, reason="MNIST_DIR does not name a folder with MNIST/raw")
    def test_one_epoch_of_real_mnist_reads_over_98_percent(self, tmp_path):
        command = [sys.executable, mnist.__file__, "--data", "mnist", "--data-dir", MNIST_DIR]
        subprocess.run([*command, "--epochs", "1", "--out", tmp_path / "out"], check=True)
        assert metrics_of(tmp_path / "out")["test_accuracy"] > 0.98


# ------------------------------------------------------------------------------------- Training
def rates(schedule, epochs=10, steps=10):
    state = new_state(lr=0.1, schedule=schedule, epochs=epochs, steps=steps)
    for _ in range(epochs * steps):
        group = state.optimizer.param_groups[0]
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-5, True)
        yield group["lr"]
        state.optimizer.step()
        state.scheduler.step()


class TestTraining:
    def test_make_state_follows_each_schedule_in_any_number_of_steps(self):
        values = [*rates("onecycle")]
        assert values[0] == pytest.approx(0.004)
        assert values.index(max(values)) in (19, 20)
        assert max(values) == pytest.approx(0.1, rel=0.01)
        assert values[-1] < 1e-4
        assert [*rates("step")][9::10] == pytest.approx([0.1 * 0.7**epoch for epoch in range(10)])
        assert {*rates("constant")} == {0.1}
        assert all(max(rates("onecycle", epochs=1, steps=n)) <= 0.1 for n in range(1, 13))

    def test_make_state_survives_an_overflow_in_the_first_fp16_step(self):
        state, data = new_state("wide", lr=0.01, fp16=True), (IMAGES[:8], LABELS[:8])
        assert [s["momentum_buffer"].any() for s in state.optimizer.state.values()] == [False] * 7
        state.scaler._init_scale = 2.0**40
        loss, _ = mnist.train_one_epoch(state, [*mnist.batches(data, 2)] * 4, torch.float16)
        assert 1 < state.scaler.get_scale() < 2.0**40
        assert math.isfinite(loss)

    def test_train_one_epoch_returns_mean_loss_and_accuracy_of_all_images(self):
        state, data = new_state("wide", lr=1e-12), (IMAGES[:40], LABELS[:40])
        parts = [part.split([4] * 9 + [3, 1]) for part in next(mnist.batches(data, 40))]
        trained = mnist.train_one_epoch(state, zip(*parts, strict=True))  # of unequal batches
        assert trained == pytest.approx(mnist.evaluate(state.model, data)[:2], rel=1e-4)

    def test_train_one_epoch_draws_a_bar_on_a_terminal_of_40_columns(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        state, data = new_state("wide", lr=1e-12), (IMAGES[:78], LABELS[:78])
        loss, accuracy = mnist.train_one_epoch(state, mnist.batches(data, 2), total=39)
        first, last, _ = capsys.readouterr().out.split("\r")
        assert re.fullmatch(r"\[#### {4}\] loss \d\.\d{4} accuracy \d+\.\d\d%", first)
        assert last == f"[########] loss {loss:.4f} accuracy {accuracy:.2%}"
        assert len(last) < 40

    def test_train_one_epoch_draws_no_bar_elsewhere(self, monkeypatch):
        written = []
        log = type("Log", (), {"write": lambda _, text: written.append(text), "flush": id})
        monkeypatch.setattr(sys, "stdout", log())  # as in some notebooks, without isatty
        mnist.train_one_epoch(new_state(), mnist.batches((IMAGES[:4], LABELS[:4]), 2), total=2)
        assert written == []

    def test_evaluate_returns_mean_loss_accuracy_and_ordinary_logits(self):
        model, data = new_state("wide").model, (IMAGES[:78], LABELS[:78])
        loss, accuracy, logits = mnist.evaluate(model, data)
        expected = model((IMAGES[:78] / 255 - 0.1307) / 0.3081).detach()
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)
        assert loss == pytest.approx(F.cross_entropy(expected, LABELS[:78]).item(), rel=1e-4)
        assert accuracy == pytest.approx((expected.argmax(1) == LABELS[:78]).float().mean().item())
        assert not model.training
        assert not (logits.requires_grad or logits.is_inference())


# ---------------------------------------------------------------------------------- Checkpoints
class TestCheckpoints:
    def test_save_checkpoint_and_load_checkpoint_restore_every_part(self, saved):
        (state, path), other = saved, new_state(schedule="onecycle", epochs=2, steps=3)
        content = mnist.load_checkpoint(path, **other._asdict())
        assert (content["history"], content["config"]) == (known_history(1), {"seed": 1})
        assert (content["epoch"], content["val_loss"], content["test_accuracy"]) == (1, 0.06, 0.992)
        assert same_bits(state.model.state_dict(), other.model.state_dict())
        assert state.scheduler.get_last_lr() == other.scheduler.get_last_lr()
        assert same_bits(*(s.optimizer.state_dict()["state"][0] for s in (state, other)))

    def test_save_checkpoint_writes_contiguous_weights(self, tmp_path):
        model = mnist.SimpleMNISTNet().to(memory_format=torch.channels_last)
        mnist.save_checkpoint(tmp_path / "a.pth", known_history(1), {}, model=model)
        weights = load(tmp_path / "a.pth")["model_state_dict"]
        assert all(weight.is_contiguous() for weight in weights.values())

    def test_write_file_leaves_the_old_file_alone_if_it_fails(self, tmp_path, monkeypatch):
        mnist.write_file(tmp_path / "file", b"old")
        monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mnist.write_file(tmp_path / "file", b"new")
        assert contents(tmp_path) == {tmp_path / "file": b"old"}

    @pytest.mark.parametrize("links", [True, False])
    def test_write_file_replaces_a_file_unless_it_must_be_new(self, tmp_path, monkeypatch, links):
        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        path = tmp_path / "file"
        monkeypatch.setattr(os, "link", os.link if links else refuse)
        mnist.write_file(path, b"one", new=True)
        with pytest.raises(OSError, match=f"cannot write {path}"):
            mnist.write_file(path, b"two", new=True)
        assert contents(tmp_path) == {path: b"one"}
        mnist.write_file(path, b"three")
        assert contents(tmp_path) == {path: b"three"}

    def test_load_checkpoint_refuses_damage_or_restores_the_very_same(self, saved):
        (state, path), rng, refused = saved, random.Random(0), 0
        whole, good = path.read_bytes(), load(path)["model_state_dict"]
        for i in range(200):
            content = bytearray(whole if i % 3 else whole[: rng.randrange(len(whole))])
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            try:
                mnist.load_checkpoint(path, model=state.model)
            except OSError:
                refused += 1
            assert same_bits(good, state.model.state_dict())  # or a bit that nobody reads
        assert refused > 150

    def test_load_checkpoint_refuses_foreign_files_and_does_not_run_them(self, saved, tmp_path):
        good, touched = load(saved[1]), tmp_path / "touched"
        evil = type("Evil", (), {"__reduce__": lambda _: (Path.touch, (touched,))})()
        weights = good["model_state_dict"]
        nan = {k: w * math.nan for k, w in weights.items()}
        fewer = {k: w for k, w in weights.items() if k != "layers.11.bias"}
        foreign = [[], None, "text", evil, mnist.SimpleMNISTNet(), weights, good | {"epoch": evil}]
        foreign += [good | {"model_state_dict": w} for w in (nan, fewer, weights | {"more": nan})]
        foreign += [{k: v for k, v in good.items() if k != p} for p in good if p[-5:] == "_dict"]
        for content in foreign:
            torch.save(content, saved[1])
            with pytest.raises(OSError, match="is damaged, or not a checkpoint of this network"):
                mnist.load_checkpoint(saved[1], **new_state()._asdict())
        assert not touched.exists()

    def test_newest_checkpoint_takes_whole_names_alone(self, tmp_path):
        assert mnist.newest_checkpoint(tmp_path / "none") is None
        for name in ("seed7_best_mnist_model_7", "mnist_model_epoch_7 (1)", "mnist_model_epoch_07"):
            (tmp_path / f"{name}.pth").touch()
        assert mnist.newest_checkpoint(tmp_path) is None
        for name in ("best_mnist_model", "mnist_model_epoch_9", "mnist_model_epoch_10"):
            (tmp_path / f"{name}.pth").touch()
            assert mnist.newest_checkpoint(tmp_path) == tmp_path / f"{name}.pth"

    def test_keep_best_copies_what_is_left_of_the_best(self, tmp_path):
        history, best = known_history(4), tmp_path / "best_mnist_model.pth"
        history[1]["val_loss"] = 0.01
        for n in (4, 2, 1):
            (tmp_path / f"mnist_model_epoch_{n}.pth").write_text(str(n))
        mnist.keep_best(tmp_path, history)
        (tmp_path / "mnist_model_epoch_2.pth").unlink()
        mnist.keep_best(tmp_path, history)  # it stays
        assert best.read_text() == "2"
        best.unlink()
        mnist.keep_best(tmp_path, history)  # the newest is better than none
        assert best.read_text() == "4"


# --------------------------------------------------------------------------------------- Report
class TestReport:
    def test_make_table_has_a_row_an_epoch_and_marks_the_best_so_far(self):
        history = known_history(4)
        for epoch, loss in zip(history, (0.3, 0.2, 0.25, 0.1), strict=True):
            epoch["val_loss"] = loss
        header, *rows = mnist.make_table(history)
        assert header.split() == ["epoch", "lr", *SPLITS, "seconds", "val", "error"]
        cells = "0.4000  0.1000  99.00%  0.2000  99.40%  0.0800  99.20%    12.3  ###"
        assert rows[1] == f"   2* {cells}"
        assert [row[:5] for row in rows] == ["   1*", "   2*", "   3 ", "   4*"]
        history[0] |= {"val_accuracy": 0.1, "train_loss": 12.3}
        assert max(map(len, mnist.make_table(history * 30))) <= 79

    @pytest.mark.parametrize(("classes", "data"), [(5, "synthetic"), (10, "mnist"), (26, "mnist")])
    def test_make_report_shows_result_and_confusion_of_any_number_of_classes(self, classes, data):
        confusion = torch.diag(torch.full((classes,), 100))
        confusion[4, 4], confusion[4, 3], confusion[2, 2] = 70, 30, 0  # no image of class 2
        metrics = {"parameters": 7954, "data": data, "test_accuracy": 0.9712, "best_epoch": 3}
        report = mnist.make_report(metrics | {"confusion": confusion.tolist()}).splitlines()
        note = ", of SYNTHETIC digits, not MNIST" if data == "synthetic" else ""
        assert report[0] == f"{data} test accuracy 97.12%{note}"
        assert report[1] == "7,954 parameters, weights of epoch 3"
        assert report[3] == f"true  predicted{' ' * (5 * classes - 9)}recall"
        assert report[4].split() == [str(digit) for digit in range(classes)]
        assert report[9].split() == ["4", *"...", "30", "70", *"." * (classes - 5), "70.0%"]
        assert (report[7].split()[-1], report[8].split()[-1]) == ("0.0%", "100.0%")

    @pytest.mark.parametrize("epochs", [1, 100])
    def test_draw_plot_shows_three_named_curves_of_both_figures(self, monkeypatch, epochs):
        def note(figure, *args, **kwargs):
            seen.append(figure)
            save(figure, *args, **kwargs)

        figure = pytest.importorskip("matplotlib.figure").Figure
        seen, save = [], figure.savefig
        monkeypatch.setattr(figure, "savefig", note)
        assert mnist.draw_plot(known_history(epochs)).startswith(b"\x89PNG")
        assert [axes.get_yscale() for axes in seen[0].axes] == ["log", "linear"]
        for axes, key in zip(seen[0].axes, ("loss", "accuracy"), strict=True):
            names = [text.get_text() for text in axes.get_legend().get_texts()]
            assert (axes.get_xlabel(), axes.get_ylabel(), *names) == ("epoch", key, *SPLITS)
            assert all(tick == int(tick) for tick in axes.get_xticks())
            for line, split in zip(axes.lines, SPLITS, strict=True):
                values = [entry[f"{split}_{key}"] for entry in known_history(epochs)]
                assert line.get_xydata().tolist() == [[*xy] for xy in enumerate(values, 1)]


# ------------------------------------------------------------------------------------------ Run
def mutilated(content, rng):
    """Return a copy of a checkpoint with one value of a wrong kind, or under another name."""
    copy = content | {"history": [dict(m) for m in content["history"]]}
    copy["config"] = dict(content["config"])
    place = rng.choice([copy, copy["config"], *copy["history"]])
    key = rng.choice([key for key in place if not key.endswith(("_state_dict", "seed", "epoch"))])
    wrong = [None, "\x1b[31mred", [], {}, -1, math.nan, "7", torch.ones(2), True]
    if rng.random() < 0.2:
        place[f"{key}\x1b"] = place.pop(key)
    else:
        place[key] = rng.choice(wrong)
    return copy


class TestRun:
    def test_is_valid_knows_choices_and_positive_numbers(self):
        good = [("model", "wide"), ("epochs", 1), ("lr", 0.1), ("seed", 0), ("seed", -(10**18))]
        bad = [("model", "tiny"), ("data", "auto"), ("amp", None), ("lr", math.inf), ("lr", 1)]
        bad += [("epochs", value) for value in (0, 1.0, "1", True, None)]
        assert all(mnist.is_valid(*setting) for setting in good)
        assert not any(mnist.is_valid(*setting) for setting in bad)

    def test_read_settings_refuses_whatever_no_run_writes(self, run_small, capsys):
        assert run_small() is None
        path, rng = Path("out/mnist_model_epoch_2.pth"), random.Random(1)
        good = load(path)
        assert mnist.read_settings(path) == good["config"]
        cases = [good | {"history": history} for history in (None, [], [{"a": 1}], [{}], "text")]
        configs = (None, [], {}, good["config"] | {"evaluate": "other.pth"})
        cases += [good | {"config": config} for config in configs]
        cases += [mutilated(good, rng) for _ in range(100)]
        capsys.readouterr()
        for content in cases:
            torch.save(content, path)
            before = contents(".")
            for flags in ("--resume", f"--evaluate {path}"):
                message = run_main(HERE, flags)
                assert re.fullmatch(f"{ERROR}{path} is damaged, or not a checkpoint.*", message)
                assert message.isprintable()
            assert contents(".") == before
        assert capsys.readouterr().out == ""

    def test_open_run_names_a_flag_that_differs(self, run_small):
        run_small()
        clashes = ["lr 0.3 0.1", "batch-size 60 50", "epochs 15 2", "seed 2 1", "model wide simple"]
        clashes += ["amp bf16 off", "schedule step onecycle", "val-size 91 90"]
        for flag, new, old in map(str.split, clashes):
            text = f"{ERROR}--{flag} is {new}, but the run in out has {old}: leave it out"
            assert run_small(f"--resume --{flag} {new}") == text

    def test_open_run_takes_the_settings_of_the_run(self, run_small, capsys):
        flags = "--model wide --lr 0.01 --schedule step --epochs 1 --seed -5 --resume"
        assert run_small(flags) is None
        assert "new run in 'out'" in capsys.readouterr().out
        before = contents(".")
        assert run_main(HERE, "--resume --data auto --amp auto") is None
        assert before == contents(".")
        printed = capsys.readouterr().out
        assert "seed -5, resuming 'out'" in printed
        assert all(line in printed for line in Path("out/report.txt").read_text().split("\n"))

    @pytest.mark.parametrize("schedule", ["step", "constant"])
    def test_open_run_lets_a_run_without_an_end_go_on_for_longer(self, run_small, schedule):
        assert run_small(f"--schedule {schedule} --epochs 1") is None
        assert run_small(f"--schedule {schedule} --epochs 3 --resume") is None
        assert [m["epoch"] for m in metrics_of("out")["history"]] == [1, 2, 3]

    def test_open_run_never_starts_in_a_folder_that_holds_a_checkpoint(self, run_small, data_dir):
        Path("out").mkdir()  # an empty one will do, as will one that a failed run left
        assert "try a lower --lr" in run_small("--lr 1e9")
        assert run_small("--epochs 1") is None
        shutil.rmtree(data_dir)  # it is said before the data are looked for
        text = f"{ERROR}out holds a run: add --resume, or choose another --out"
        for name in ("report.txt", "mnist_model_epoch_1.pth"):  # the best one alone is a run
            before = contents("out")
            assert run_small() == run_small("--lr 0.2") == text
            assert contents("out") == before
            Path("out", name).unlink()

    def test_open_run_trains_on_synthetic_digits_only_offline(self, run_small, monkeypatch, capsys):
        def draw(n, seed):
            drawn.append((n, seed))
            return IMAGES, LABELS

        drawn = []
        monkeypatch.setattr(mnist, "draw_digits", draw)
        assert run_small("--data-dir empty") is None
        assert drawn == [(6000, 0), (1000, 1)]
        printed = capsys.readouterr().out
        banner = (
            r"!{79}\nSYNTHETIC digits, not MNIST.*\ncannot download: .*\n.* in empty/.*\n!{79}\n"
        )
        assert re.search(banner, printed)
        assert "\nsynthetic test accuracy" in printed
        assert not re.search(".{80}", printed)
        assert [path.name for path in Path("out").iterdir()] == ["synthetic"]
        assert "holds a run" in run_small("--data synthetic")
        assert run_small("--data-dir empty --resume") is None
        assert run_main("--data-dir empty --out out/synthetic --resume") is None
        assert run_small() is None  # now it is there
        assert metrics_of("out")["data"] == "mnist"
        assert "cannot download" in run_main("--data-dir empty --out out --resume")

    def test_get_data_gives_the_first_the_next_and_the_test_images(self, data_dir):
        data = mnist.get_data(settled(f"{HERE} {SMALL}"))
        images, labels = IMAGES.split([310, 90, 100]), LABELS.split([310, 90, 100])
        for i, split in enumerate(SPLITS):
            assert torch.equal(data[split][0], images[i])
            assert torch.equal(data[split][1], labels[i])

    def test_train_measures_each_split_on_its_own_images(self, run_small, monkeypatch):
        def evaluate(model, data):
            return len(data[1]), len(data[1]) / 1000, torch.zeros(100, 10)

        monkeypatch.setattr(mnist, "evaluate", evaluate)
        monkeypatch.setattr(mnist, "train_one_epoch", lambda *_: (310, 0.31))
        assert run_small("--epochs 1") is None
        expected = {"epoch": 1, "lr": pytest.approx(0.004), "seconds": 0}
        for split, n in zip(SPLITS, (310, 90, 100), strict=True):
            expected |= {f"{split}_loss": n, f"{split}_accuracy": n / 1000}
        assert metrics_of("out")["history"] == [expected]

    @pytest.mark.parametrize(("best", "losses"), [(4, [3, 2, 2, 1, 1]), (1, [1, 2, 1])])
    def test_train_keeps_the_epoch_of_the_lowest_validation_loss(
        self, run_small, monkeypatch, best, losses
    ):
        values = iter([value for loss in losses for value in (loss, 9 - loss)])  # val, test
        results = (torch.zeros(100, 10),)
        monkeypatch.setattr(mnist, "evaluate", lambda *_: (next(values, 9), 0.5, *results))
        assert run_small("--epochs", len(losses)) is None
        content, newest = (
            load("out/best_mnist_model.pth"),
            load(mnist.newest_checkpoint(Path("out"))),
        )
        assert (content["epoch"], content["val_loss"]) == (best, losses[best - 1])
        assert [m["val_loss"] for m in newest["history"]] == losses
        assert metrics_of("out")["best_epoch"] == best
        assert f"weights of epoch {best}\n" in Path("out/report.txt").read_text()

    def test_train_draws_other_numbers_in_each_epoch_and_fades(self, run_small, monkeypatch):
        def note(x, strength):
            sums.append(x.sum().item())
            strengths.append(strength)
            return x

        def reseed(n):
            seeds.append(n)
            return seed(n)

        sums, strengths, seeds, seed = [], [], [], torch.manual_seed
        monkeypatch.setattr(mnist, "augment", note)
        monkeypatch.setattr(torch, "manual_seed", reseed)
        assert run_small("--epochs 5 --seed 3") is None
        assert seeds == [*range(30_000, 30_006)]
        assert strengths[::6] == pytest.approx([0.93, 0.79, 0.65, 0.51, 0.37])
        assert len({*sums}) == len(sums) == 30
        rates = [m["lr"] for m in metrics_of("out")["history"]]
        assert rates[0] == pytest.approx(0.004)
        assert rates[1] == max(rates) > 0.09 > 3 * rates[4]
        assert run_small("--epochs 1 --out new --seed", 10**30) is None  # any integer will do

    def test_train_goes_on_from_the_newest_checkpoint_with_the_same_bits(self, run_small, capsys):
        flags = "--epochs 10 --amp bf16 --resume"
        assert run_small(flags) is None
        newest, first = (Path(f"out/mnist_model_epoch_{n}.pth") for n in (10, 1))
        before, whole, inode = contents("out"), load(newest), first.stat().st_ino
        newest.write_bytes(newest.read_bytes()[:-9])
        assert f"{newest} is damaged" in run_small(flags)
        newest.unlink()
        Path("out/best_mnist_model.pth").unlink()
        capsys.readouterr()
        assert run_small(flags) is None
        assert capsys.readouterr().out.count("\n   1") == 1  # the table is whole
        assert same_bits(whole["model_state_dict"], load(newest)["model_state_dict"])
        assert contents("out").keys() == before.keys()
        assert before[Path("out/metrics.json")] == Path("out/metrics.json").read_bytes()
        assert first.stat().st_ino == inode  # not trained again

    def test_train_uses_autocast_channels_last_and_this_devices_sgd(self, run_small, monkeypatch):
        def note(state, loader, amp, total):
            weight, group = state.model.layers[1][0].weight, state.optimizer.param_groups[0]
            layout = weight.is_contiguous(memory_format=torch.channels_last)
            seen.append((amp, total, layout, group["fused"], state.scaler.is_enabled()))
            return train_one_epoch(state, loader, amp, total)

        seen, train_one_epoch, path = [], mnist.train_one_epoch, "out/mnist_model_epoch_1.pth"
        monkeypatch.setattr(mnist, "train_one_epoch", note)
        assert run_small("--amp bf16 --schedule step --epochs 1") is None
        content = load(path)
        content["optimizer_state_dict"]["param_groups"][0]["fused"] = False  # as from an mps
        torch.save(content, path)
        assert run_small("--amp bf16 --schedule step --epochs 2 --resume") is None
        assert run_small("--amp fp16 --epochs 1 --out b") is None
        assert seen[:2] == [(torch.bfloat16, 6, True, True, False)] * 2
        assert seen[2:] == [(torch.float16, 6, True, True, True)]

    def test_report_writes_its_files_and_prints_what_it_writes(self, run_small, capsys):
        assert run_small() is None
        printed, metrics = capsys.readouterr().out, metrics_of("out")
        names = {"mnist_model_epoch_1.pth", "mnist_model_epoch_2.pth", "best_mnist_model.pth"}
        assert {p.name for p in Path("out").iterdir()} == names | {"metrics.json", "report.txt"}
        assert (metrics["parameters"], metrics["data"]) == (7954, "mnist")
        assert metrics["config"] == load("out/best_mnist_model.pth")["config"]
        best = min(metrics["history"], key=lambda m: m["val_loss"])
        assert metrics["test_accuracy"] == best["test_accuracy"]
        table, report = Path("out/report.txt").read_text().split("\n\n", 1)
        assert printed.count(f"\n{table}\n") == 1  # and not a second time
        assert printed.endswith(f"\n\n{report}\nfiles: 'out'\n")
        assert printed.startswith("mnist: 310 train 90 val 100 test\ncpu, amp off, seed 1, new run")
        assert not re.search(".{80}", printed)

    def test_report_counts_true_classes_in_rows(self, run_small, monkeypatch):
        logits = F.one_hot((LABELS[400:] + 1) % 10, 10).float()  # each one higher
        monkeypatch.setattr(mnist, "evaluate", lambda model, data: (1, 0.5, logits))
        assert run_small("--epochs 1") is None
        counts = LABELS[400:].bincount().diag().roll(1, 1)
        assert metrics_of("out")["confusion"] == counts.tolist()

    def test_report_of_a_checkpoint_alone_writes_nothing(self, run_small, capsys):
        assert run_small("--model wide --lr 0.01 --epochs 1") is None
        report = Path("out/report.txt").read_text().split("\n\n", 1)[1]
        shutil.copy("out/best_mnist_model.pth", "mine.pth")
        before = contents(".")
        capsys.readouterr()
        flags = "--data-dir data --evaluate mine.pth --val-size 59999 --seed 3 --batch-size 1000"
        assert run_main(flags) is None
        assert capsys.readouterr().out == report
        assert contents(".") == before

    def test_report_draws_the_plot_or_says_why_not(self, run_small, monkeypatch, capsys):
        pytest.importorskip("matplotlib")
        assert run_small("--epochs 1 --out without") is None
        assert "\nno plot: import of matplotlib" in capsys.readouterr().out
        monkeypatch.delitem(sys.modules, "matplotlib.figure")
        assert run_small("--epochs 1") is None
        assert Path("out/training_metrics.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        "flags", ["--model wide --epochs 9", "--resume", "--evaluate best.pth"]
    )
    def test_run_with_dry_run_tries_everything_and_leaves_nothing(self, run_small, capsys, flags):
        run_small("--epochs 1")
        shutil.copy("out/best_mnist_model.pth", "best.pth")
        before = contents(".")
        capsys.readouterr()
        assert run_small("--dry-run", flags) is None
        assert ("dry run: all parts work" in capsys.readouterr().out) == ("best" not in flags)
        assert contents(".") == before

    def test_a_checkpoint_works_with_standard_preprocessing(self, run_small, data_dir):
        run_small("--epochs 15 --lr 0.02")
        model = mnist.SimpleMNISTNet().eval()
        model.load_state_dict(load("out/best_mnist_model.pth")["model_state_dict"])
        normalize = transforms.Normalize((0.1307,), (0.3081,))
        transform = transforms.Compose([transforms.ToTensor(), normalize])
        loader = DataLoader(datasets.MNIST(data_dir, train=False, transform=transform), 32)
        hits = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
        assert hits / 100 == metrics_of("out")["test_accuracy"] > 0.2

    @needs_fork
    def test_a_run_killed_again_and_again_ends_with_the_same_bits(self, data_dir, monkeypatch):
        monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
        assert end(start("--epochs 3 --out whole")) == 0
        rng, kills, finished = random.Random(7), 0, True
        while kills < KILLS or not finished:
            if finished:  # a new run takes the rest of the kills
                shutil.rmtree("killed", ignore_errors=True)
            prepare = partial(die_by_chance, rng.random())
            status = end(start("--epochs 3 --resume --out killed", prepare))
            kills, finished = kills + (status == -9), status == 0
            assert all(mnist.load_checkpoint(path) for path in Path("killed").glob("*.pth"))
        for name in ("mnist_model_epoch_3.pth", "best_mnist_model.pth"):
            weights = [load(f"{out}/{name}")["model_state_dict"] for out in ("whole", "killed")]
            assert same_bits(*weights)
        assert metrics_of("whole") == metrics_of("killed")

    @needs_fork
    def test_of_two_runs_in_one_folder_one_is_stopped_or_killed(self, data_dir):
        rng = random.Random(3)
        for n in range(max(2, KILLS // 2)):
            one = start(f"--epochs 2 --seed 1 --out both{n}")
            time.sleep(rng.random() * 0.5)
            other = start(f"--epochs 2 --seed 2 --out both{n}")
            assert sorted([end(one), end(other)]) == [0, 1]
            seeds = {load(path)["config"]["seed"] for path in Path(f"both{n}").glob("*.pth")}
            assert seeds == {metrics_of(f"both{n}")["config"]["seed"]}


# --------------------------------------------------------------------------------- Command line
BAD = [
    "--epochs 0",
    "--epochs x",
    "--batch-size 0",
    "--val-size 0",
    "--lr 0",
    "--lr -1",
    "--lr nan",
]
BAD += ["--lr inf", "--amp x", "--model x", "--data x", "--seed 1.5", "--out ", "--evaluate "]
ERRORS = {
    "--out data/MNIST/raw/t10k-labels-idx1-ubyte": r"\[Errno 17\] File exists: .*t10k-labels.*",
    "--evaluate missing.pth": r"\[Errno 2\] No such file or directory: 'missing.pth'",
    "--lr 1e9 --schedule constant": "the loss of epoch 1 is not finite: try a lower --lr",
    "--data-dir empty --data mnist": "cannot download: .*",
    "--batch-size 311": "--batch-size 311 is over the 310 that --val-size leaves",
    "--batch-size 10000000000 --dry-run": "--batch-size 10000000000 is over the 310 .*",
    "--val-size 400": "--batch-size 50 is over the 0 that --val-size leaves",
    "--device tpu": "no tpu device available: leave out --device",
}


class TestCommandLine:
    @pytest.mark.parametrize("flag", BAD)
    def test_parse_args_refuses_bad_usage_and_names_the_flag(self, flag, capsys):
        with pytest.raises(SystemExit, match="2"):
            mnist.parse_args(flag.split(" "))
        assert flag.split()[0] in capsys.readouterr().err.splitlines()[-1]

    def test_parse_args_and_open_run_fill_in_the_defaults(self, data_dir):
        args = settled("--device cpu")
        assert (args.resume, args.evaluate, args.dry_run) == (False, None, False)
        assert (args.data_dir, str(args.out)) == ("data", "model_checkpoints")
        settings = ["simple", "mnist", 5000, 15, 64, 0.4, "onecycle", 1, "off"]
        assert [getattr(args, name) for name in mnist.SETTINGS] == settings
        assert settled("--model wide").lr == 0.03

    @pytest.mark.parametrize(("bf16", "amp"), [(True, "bf16"), (False, "fp16")])
    def test_parse_args_and_open_run_find_cuda(self, data_dir, monkeypatch, bf16, amp):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
        args = settled("")
        assert (args.device, args.batch_size, args.amp) == ("cuda", 128, amp)

    @pytest.mark.parametrize("flags", ERRORS)
    def test_main_says_what_cannot_be_done_in_one_line(self, run_small, flags):
        assert re.fullmatch(ERROR + ERRORS[flags], run_small(flags))
        assert not Path("out/metrics.json").exists()

    def test_main_fails_before_training_where_nothing_can_be_written(self, run_small, monkeypatch):
        monkeypatch.setattr(mnist, "TemporaryFile", lambda dir: os.stat(dir / "gone"))
        monkeypatch.setattr(mnist, "train", None)
        assert run_small() == f"{ERROR}[Errno 2] No such file or directory: 'out/gone'"

    def test_main_needs_a_temporary_folder_for_a_dry_run_alone(self, run_small, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", "/nowhere")
        assert run_small("--epochs 1") is None
        assert "No such file" in run_small("--dry-run")

    def test_main_reads_sys_argv_when_called_and_lines_are_in_a_log_at_once(self, data_dir):
        flags = f"{HERE} {SMALL} --epochs 9999".split()
        command = [sys.executable, mnist.__file__, *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            lines = iter(run.stdout.readline, "")
            assert any(line.startswith("epoch ") for line in lines)
            assert next(lines).startswith("   1*")
            run.kill()

    @needs_fork
    def test_main_says_how_to_go_on_after_ctrl_c(self, data_dir, capfd):
        attentive = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        run = start("--epochs 999", attentive)
        while run.is_alive() and not Path("out/mnist_model_epoch_2.pth").exists():
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGINT)
        assert end(run) == 130
        assert capfd.readouterr().err.endswith("add --resume\n")


# --------------------------------------------------------------------------------------- README
def pictures_of(digit):
    ink = to_pil_image(digit).resize((280, 280))
    photo = ImageOps.expand(ImageOps.invert(ink), 90, 255)
    values, (_, top, _, bottom) = pil_to_tensor(photo)[0].int(), ink.getbbox()
    yield from (photo, ImageOps.invert(photo), ImageOps.expand(photo, 60, 40))  # on a dark table
    yield photo.crop((0, 90 + top, 460, 90 + bottom))  # it touches the border
    yield to_pil_image((values * torch.linspace(0.5, 1, 460)).byte())  # a shadow
    yield Image.fromarray((values * 200).numpy().astype("uint16"))
    yield Image.fromarray((values / 255).numpy())
    for level in (0, 255):  # on a transparent ground
        yield Image.merge("LA", (Image.new("L", ink.size, level), ink))
    for pen in (ImageFilter.MaxFilter(9), ImageFilter.MinFilter(9)):  # thick, thin
        yield ImageOps.expand(ImageOps.invert(ink.filter(pen)), 90, 255)
    yield ImageOps.expand(photo.resize((120, 120)), 300, 255)
    ImageDraw.Draw(photo).ellipse((360, 360, 520, 560), 100)  # a hand
    yield photo


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
