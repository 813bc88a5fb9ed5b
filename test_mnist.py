# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pytest>=8"]
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
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    more = "--data-dir data --out out --device cpu --lr 0.1 --val-size 100 --batch-size 50"
    return [*more.split(), "--epochs", "2"]


@pytest.fixture
def train(flags, monkeypatch):
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
    paths = [max(Path(folder).glob("*epoch_?.pth")) for folder in (one, other)]
    a, b = (torch.load(path, weights_only=True)["model_state_dict"] for path in paths)
    return same_bits(a, b) and metrics_of(one) == metrics_of(other)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics_of(out):
    return json.loads(Path(str(out), "metrics.json").read_text(encoding="utf-8"))


def new_state(name="simple", lr=0.05, schedule="constant", epochs=1, steps=1, fp16=False, **to):
    torch.manual_seed(0)
    model = mnist.MODELS[name]().to(**to or {"device": "cpu"})
    return mnist.make_state(model, lr, schedule, epochs, steps, fp16)


def leaves(model):
    return [m for m in model.modules() if not list(m.children())]


class TestModel:
    def test_simple_net_has_every_listed_feature(self):
        model = mnist.SimpleMNISTNet()
        kinds = [type(m).__name__ for m in leaves(model)]
        convs = [m for m in leaves(model) if isinstance(m, nn.Conv2d)]
        followers = [kinds[i + 1] for i, kind in enumerate(kinds) if kind == "Conv2d"]
        assert followers == ["BatchNorm2d"] * 12 + ["AdaptiveAvgPool2d"]
        others = {"ReLU", "MaxPool2d", "Dropout", "Flatten"}
        assert {*kinds} == {"Conv2d", "BatchNorm2d", "AdaptiveAvgPool2d"} | others
        assert [kinds.count(kind) for kind in ("MaxPool2d", "Dropout")] == [2, 1]
        assert [type(m) for m in model].count(mnist.ResidualBlock) == 4
        assert [c.padding[0] for c in convs] == [0, 0, 0, 2, 0, 0, *[2, 0] * 3, 0]
        assert model.count_parameters() == 7954 < 8000

    def test_a_residual_block_adds_its_input(self):
        block, x = mnist.ResidualBlock(4), torch.randn(2, 4, 6, 6)
        nn.init.zeros_(block[-1].weight)
        assert torch.equal(block(x), x.relu())

    def test_wide_net_is_its_list_of_layers(self):
        layers = leaves(mnist.WideMNISTNet())
        convs = [m for m in layers if isinstance(m, nn.Conv2d)]
        sizes = [f"{c.in_channels}-{c.out_channels}-{c.kernel_size[0]}" for c in convs]
        assert " ".join(sizes) == "1-32-3 32-64-3 64-128-3 128-32-1 32-64-3 64-128-3 128-10-1"
        names = "".join(type(m).__name__[0] for m in layers)  # Conv2d, ReLU, MaxPool2d, Adaptive...
        assert names == "CRCRCRMCRCRCRACF" and not any(c.padding[0] or c.bias for c in convs)

    def test_summary_lists_layers_and_total_and_changes_nothing(self, capsys):
        model = mnist.SimpleMNISTNet()
        model[0].requires_grad_(False)  # frozen parameters count
        old, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
        model.print_model_summary()
        *rows, total = capsys.readouterr().out.replace(",", "").splitlines()
        assert sum(int(row.split()[-1]) for row in rows) == int(total.split()[1]) == 7954
        assert "ReLU" in rows[0] and "('N' 8 26 26)" in rows[0] and "budget: 8000" in total
        assert model.training and torch.equal(rng, torch.get_rng_state())
        assert same_bits(old, model.state_dict())

    def test_layers_can_be_taken_out(self):
        model = mnist.SimpleMNISTNet()
        assert model[:-3](torch.randn(2, 1, 28, 28)).shape == (2, 24, 5, 5) and model[10].p == 0.05

    @pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16, "wide"])
    def test_one_batch_can_be_overfitted(self, amp):
        name, lr, amp = ("wide", 0.002, None) if amp == "wide" else ("simple", 0.05, amp)
        state = new_state(name, lr, fp16=amp == torch.float16, device=DEVICE)
        data = (IMAGES[:5].to(DEVICE), LABELS[:5].to(DEVICE))
        mnist.train_one_epoch(state, [*mnist.batches(data, 5)] * 100, amp)
        loss, accuracy = mnist.train_one_epoch(state, mnist.batches(data, 5), amp)
        assert loss < 0.1 and accuracy == 1


class TestData:
    def test_mnist_is_downloaded_if_missing_by_several_at_once(self, data_dir, monkeypatch):
        sums = []
        for name in mnist.FILES:
            content = gzip.compress((data_dir / "MNIST/raw" / name).read_bytes())
            Path(f"{name}.gz").write_bytes(content)
            sums.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
        Path("new/MNIST/raw").mkdir(parents=True)
        Path("new/MNIST/raw", mnist.FILES[0]).touch()  # one alone does not count
        server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
        monkeypatch.setattr(datasets.MNIST, "resources", sums)
        with ThreadPoolExecutor() as pool:
            pool.submit(server.serve_forever)
            assert len([*pool.map(mnist.load_mnist, ["new"] * 4)]) == 4
            server.shutdown()
        assert {p.name for p in Path("new").rglob("*") if p.is_file()} == {*mnist.FILES}
        (images, labels), test = mnist.load_mnist("new")  # now from disk
        assert torch.equal(images, IMAGES[:400]) and images.dtype == torch.uint8
        assert torch.equal(labels, LABELS[:400]) and labels.dtype == torch.int64
        assert torch.equal(test[0], IMAGES[400:]) and torch.equal(test[1], LABELS[400:])

    @pytest.mark.parametrize("name", mnist.FILES)
    def test_damaged_files_are_an_error(self, data_dir, name):
        path = data_dir / "MNIST/raw" / name
        whole = path.read_bytes()
        for content in (whole[:-9], whole + b"?", b"", whole[:99] + b"?" + whole[100:]):
            path.write_bytes(content)
            with pytest.raises(OSError, match="MNIST/raw is damaged"):
                mnist.load_mnist(data_dir)

    def test_augment_turns_scales_shears_and_shifts_by_its_limits(self, monkeypatch):
        """Images of their own coordinates show the map: its slopes, and its shift in pixels."""
        ramp = (torch.arange(28) - 13.5).expand(28, 28)
        monkeypatch.setattr(torch, "randn", torch.zeros)  # no elastic field
        for extreme, k in ((torch.ones, 1), (torch.zeros, -1), (torch.ones, 0.5)):
            monkeypatch.setattr(torch, "rand", extreme)
            maps = mnist.augment(torch.stack([ramp, ramp.T])[:, None], abs(k))[:, 0]  # of x and y
            angle, scale, shear = k * math.radians(13), 1 + k * 0.13, k * 0.13
            cos, sin = scale * math.cos(angle), scale * math.sin(angle)
            slopes = [m[i, j] - m[14, 14] for m in maps for i, j in ((14, 15), (15, 14))]
            expected = [cos, shear * cos - sin, sin, shear * sin + cos]
            assert [*map(float, slopes)] == pytest.approx(expected, abs=1e-4)
            middle = maps[:, 13:15, 13:15].mean((1, 2)).tolist()
            assert middle == pytest.approx([2.6 * k, 2.6 * k], abs=1e-4)

    def test_augment_moves_pixels_by_a_smooth_field(self, monkeypatch):
        monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 0.5))  # not affine
        (field := torch.zeros(1, 2, 5, 5))[0, 0, :, 2] = 1  # the middle is moved along x
        monkeypatch.setattr(torch, "randn", lambda *_, **__: field)
        moved = mnist.augment(torch.arange(28.0).expand(1, 1, 28, 28), 0.5) - torch.arange(28)
        assert moved[..., 13].mean() == pytest.approx(0.15, abs=0.01)
        assert moved[..., 0].abs().max() < 0.01 and moved.diff().abs().max() < 0.05

    def test_augment_keeps_shape_range_and_ground_and_differs_per_image(self):
        out = mnist.augment((IMAGES[:1].float() / 255).expand(64, 1, 28, 28))
        assert out.shape == (64, 1, 28, 28) and out.min() >= 0 and out.max() <= 1
        assert (out[1:] - out[:1]).abs().amax((1, 2, 3)).min() > 0.1
        assert mnist.augment(torch.ones(64, 1, 28, 28))[:, 0, 0, 0].min() == 0  # from outside

    @pytest.mark.parametrize("train", [False, True])
    def test_batches_are_normalised_and_to_train_on_shuffled_and_full(self, train, monkeypatch):
        seen = []
        monkeypatch.setattr(mnist, "augment", lambda x, k: seen.append(x) or x)
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
        group = state.optimizer.param_groups[0]
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-5, True)
        yield group["lr"]
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

    def test_fp16_survives_an_overflow_in_its_first_step(self):
        state, data = new_state("wide", lr=0.01, fp16=True), (IMAGES[:8], LABELS[:8])
        assert [s["momentum_buffer"].any() for s in state.optimizer.state.values()] == [False] * 7
        state.scaler._init_scale = 2.0**40
        loss, _ = mnist.train_one_epoch(state, [*mnist.batches(data, 2)] * 4, torch.float16)
        assert 1 < state.scaler.get_scale() < 2.0**40 and math.isfinite(loss)

    def test_training_and_evaluate_give_the_mean_loss_and_the_accuracy(self, capsys):
        state, data = new_state("wide", lr=1e-12), (IMAGES[:78], LABELS[:78])
        trained = mnist.train_one_epoch(state, mnist.batches(data, 2), steps=39)
        first, last, _ = capsys.readouterr().out.split("\r")
        assert re.fullmatch(r"\[#{10} {10}\] 20/39 loss \d\.\d{4} accuracy .+%", first)
        assert last.startswith(f"[{'#' * 20}] 39/39 loss ")
        loss, accuracy, logits = mnist.evaluate(state.model, data)
        assert not state.model.training and logits.is_inference()
        expected = state.model((IMAGES[:78] / 255 - 0.1307) / 0.3081).detach()
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)
        means = F.cross_entropy(expected, LABELS[:78]), (expected.argmax(1) == LABELS[:78]) * 1.0
        assert (loss, accuracy) == pytest.approx([m.mean().item() for m in means], rel=1e-4)
        assert trained == pytest.approx((loss, accuracy), rel=1e-4)


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
        assert (checkpoint["history"], checkpoint["val_loss"]) == (known_history(1), 0.06)
        assert same_bits(state.model.state_dict(), other.model.state_dict())
        assert state.scheduler.get_last_lr() == other.scheduler.get_last_lr()
        assert same_bits(*(s.optimizer.state_dict()["state"][0] for s in (state, other)))

    def test_a_failed_write_leaves_the_old_file_alone(self, tmp_path, monkeypatch):
        mnist.write_file(tmp_path / "file", b"old")
        monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
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
                mnist.load_checkpoint(path, model=state.model)
            except OSError:
                refused += 1
            assert same_bits(good, state.model.state_dict())  # or a bit that nobody reads
        assert refused > 150

    def test_foreign_checkpoints_are_refused_and_not_run(self, saved, tmp_path):
        good, touched = torch.load(saved[1], weights_only=True), tmp_path / "touched"
        evil = type("Evil", (), {"__reduce__": lambda _: (Path.touch, (touched,))})()
        weights = good["model_state_dict"]
        foreign = [[], None, "text", evil, mnist.SimpleMNISTNet(), weights, good | {"epoch": evil}]
        foreign += [{k: v for k, v in good.items() if k != p} for p in {*good} - {*mnist.METRICS}]
        for content in foreign:
            torch.save(content, saved[1])
            with pytest.raises(OSError, match="is damaged, or not a checkpoint of this network"):
                mnist.load_checkpoint(saved[1], **new_state()._asdict())
        assert not touched.exists()


def known_history(epochs):
    entry = {"lr": 0.4, "seconds": 12.34}
    for split in mnist.SPLITS:
        entry |= {f"{split}_loss": len(split) / 50, f"{split}_accuracy": 1 - len(split) / 500}
    return [{"epoch": epoch} | entry for epoch in range(1, epochs + 1)]


def known_metrics(epochs):
    confusion = torch.diag(torch.full((10,), 100))
    confusion[4, 4], confusion[4, 9], confusion[7, 7] = 70, 30, 0  # 7 is missing
    metrics = {"parameters": 7954, "data": "mnist", "test_accuracy": 0.97, "best_epoch": 1}
    return metrics | {"confusion": confusion.tolist(), "history": known_history(epochs)}


class TestReport:
    def test_the_report_of_a_known_run_and_its_width(self):
        report = mnist.make_report(known_metrics(1)).splitlines()
        assert report[0] == "mnist test accuracy 97.00% +- 1.11%"
        cells = "0.1000  99.00%  0.0600  99.40%  0.0800  99.20%"
        assert report[3:5] == [mnist.HEADER, f"    1 0.4000  {cells}    12.3  ###"]
        assert "    4    .    .    .    .   70    .    .    .    .   30  70.0%" in report
        (metrics := known_metrics(100))["history"][0] |= {"val_accuracy": 0.1, "train_loss": 12.3}
        assert max(map(len, (report := mnist.make_report(metrics)).splitlines())) <= 79
        assert report.isascii() and "true  predicted" in report

    def test_a_plot_shows_three_named_curves_of_both_figures(self, monkeypatch):
        figure = pytest.importorskip("matplotlib.figure").Figure
        seen, save = [], figure.savefig
        note = lambda f, *a, **k: seen.append(f) or save(f, *a, **k)  # noqa: E731
        monkeypatch.setattr(figure, "savefig", note)
        assert mnist.draw_plot(known_history(9)).startswith(b"\x89PNG")
        for axes, key in zip(seen[0].axes, ("loss", "accuracy"), strict=True):
            names = [text.get_text() for text in axes.get_legend().get_texts()]
            assert (axes.get_xlabel(), axes.get_ylabel(), *names) == ("epoch", key, *mnist.SPLITS)
            for line, split in zip(axes.lines, mnist.SPLITS, strict=True):
                values = [entry[f"{split}_{key}"] for entry in known_history(9)]
                assert line.get_xydata().tolist() == [[*xy] for xy in enumerate(values, 1)]


BAD = "--epochs 0,--epochs x,--batch-size 0,--val-size 0,--lr 0,--lr -1,--amp x,--model x,--data x"

ERRORS = {
    "--batch-size 301": "leaves 300 images to train on, less than a batch",
    "--out data/MNIST/raw/t10k-labels-idx1-ubyte": "File exists: .*t10k-labels",
    "--evaluate missing.pth": "No such file or directory: 'missing.pth'",
    "--lr 1e9 --schedule constant": "try a lower --lr",
    "--data-dir empty --data mnist": "Error downloading .* put .*idx3-ubyte.* in empty/MNIST/raw",
} | ({} if torch.cuda.is_available() else {"--device cuda": "there is no cuda device here"})


def start(flags, prepare=lambda: None):
    target = lambda: (prepare(), sys.exit(mnist.main(flags)))  # noqa: E731
    (process := multiprocessing.get_context("fork").Process(target=target)).start()
    return process


def end(process):
    process.join(60)
    return process.exitcode  # None if it hangs


def live_dangerously(seed):  # to be killed by chance in the midst of a write, or right after one
    rng, replace = random.Random(seed), os.replace
    die = lambda: rng.random() < 0.1 and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731

    def write_bytes(path, content):
        for part in (content[:9999], content[9999:]):
            with path.open("ab") as file:
                file.write(part)
            die()

    Path.write_bytes = write_bytes
    os.replace = lambda old, new: (replace(old, new), die())


class TestCommandLine:
    @pytest.mark.parametrize("flag", BAD.split(","))
    def test_bad_flags_are_bad_usage(self, train, flag, capsys):
        assert train(*flag.split()) == 2 and flag.split()[0] in capsys.readouterr().err

    def test_defaults(self, monkeypatch):
        args = mnist.parse_args(["--device", "cpu"])
        defaults = "simple data 5000 15 64 0.4 onecycle 1 cpu off model_checkpoints False None"
        assert " ".join(str(v) for k, v in vars(args).items() if k != "data") == f"{defaults} False"
        assert args.data == "auto" and mnist.parse_args(["--model", "wide"]).lr == 0.03
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        for bf16, amp in ((True, "bf16"), (False, "fp16")):
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, ok=bf16, **__: ok)
            args = mnist.parse_args([])
            assert (args.device, args.batch_size, args.amp) == ("cuda", 128, amp)

    def test_splits_are_the_first_the_next_and_the_test_images(self, flags):
        data = mnist.get_data(mnist.parse_args(flags))
        assert not torch.equal(IMAGES, mnist.draw_digits(500, seed=1)[0])
        images, labels = IMAGES.split([300, 100, 100]), LABELS.split([300, 100, 100])
        for i, split in enumerate(("train", "val", "test")):
            assert torch.equal(data[split][0], images[i]) and torch.equal(data[split][1], labels[i])

    def test_a_run_writes_its_files_and_says_what_it_does(self, train, monkeypatch, capsys):
        monkeypatch.delitem(sys.modules, "matplotlib.figure")
        assert train() is None
        printed, metrics = capsys.readouterr().out, metrics_of("out")
        names = {"mnist_model_epoch_1.pth", "mnist_model_epoch_2.pth", "best_mnist_model.pth"}
        files = {path.name for path in Path("out").iterdir()} - {"training_metrics.png"}
        assert files == names | {"metrics.json", "report.txt"}
        assert (metrics["parameters"], metrics["data"]) == (7954, "mnist")
        assert [sum(row) for row in metrics["confusion"]] == LABELS[400:].bincount().tolist()
        best = min(metrics["history"], key=lambda m: m["val_loss"])
        assert metrics["test_accuracy"] == best["test_accuracy"] and len(best) == 9
        assert Path("out/report.txt").read_text() in printed and not re.search(".{80}", printed)
        assert "mnist on cpu, amp off, seed 1; 'out'\n" in printed
        keys = {f"{part}_state_dict" for part in mnist.TrainState._fields}
        checkpoint = torch.load("out/best_mnist_model.pth", weights_only=True)
        assert keys | {*mnist.METRICS, "history", "config"} == checkpoint.keys()
        assert checkpoint["epoch"] == best["epoch"] == metrics["best_epoch"]
        weight = checkpoint["model_state_dict"]["1.0.weight"]
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert checkpoint["config"] == metrics["config"] and metrics["config"]["lr"] == 0.1
        assert not train("--amp=bf16", "--out=b")
        assert metrics_of("b")["history"] != metrics["history"]

    def test_a_checkpoint_works_with_standard_preprocessing(self, train, data_dir):
        train("--epochs", 15, "--lr", 0.02)
        model = mnist.SimpleMNISTNet().eval()
        content = torch.load("out/best_mnist_model.pth", weights_only=True)
        model.load_state_dict(content["model_state_dict"])
        normalize = transforms.Normalize((0.1307,), (0.3081,))
        transform = transforms.Compose([transforms.ToTensor(), normalize])
        loader = DataLoader(datasets.MNIST(data_dir, train=False, transform=transform), 32)
        hits = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
        assert hits / 100 == metrics_of("out")["test_accuracy"] > 0.2

    def test_best_is_the_lowest_validation_loss_and_epochs_differ(self, train, monkeypatch):
        seen, strengths, seeds, zeros = [], {}, [], torch.zeros(100, 10)
        reseed = lambda n, do=torch.manual_seed: seeds.append(n) or do(n)  # noqa: E731
        monkeypatch.setattr(torch, "manual_seed", reseed)
        note = lambda x, k: strengths.setdefault(k, seen.append(x.sum().item())) or x  # noqa: E731
        monkeypatch.setattr(mnist, "augment", note)
        for best, losses in ((5, [1, 3, 2, 4, 2, 4, 1, 5, 0, 5]), (1, [1, 3, 2, 0, 2, 4])):
            values = iter(losses)  # of val and test in turn
            monkeypatch.setattr(mnist, "evaluate", lambda *_, v=values: (next(v, 9), 0.5, zeros))
            assert train("--epochs", len(losses) // 2, "--seed", best, "--out", best) is None
            metrics = metrics_of(best)
            assert [epoch["val_loss"] for epoch in metrics["history"]] == losses[::2]
            assert metrics["best_epoch"] == best
            assert torch.load(f"{best}/best_mnist_model.pth")["epoch"] == best
        assert len({*seen}) == 48 and seeds == [*range(50_000, 50_006), *range(10_000, 10_004)]
        assert [*strengths][:5] == pytest.approx([0.93, 0.79, 0.65, 0.51, 0.37])
        rates = [epoch["lr"] for epoch in metrics_of(5)["history"]]
        assert rates[0] == pytest.approx(0.004) and rates[1] == max(rates) > 0.09 > 3 * rates[4]

    def test_dry_run_can_be_tried_again_and_leaves_nothing(self, train, tmp_path, capsys):
        train("--epochs", 1)
        before = contents(tmp_path)
        for flags in (["--seed", 2], ["--model", "wide", "--epochs", 9]):
            assert train("--dry-run", *flags) is None and contents(tmp_path) == before
        assert capsys.readouterr().out.count("\ndry run test accuracy") == 2

    def test_a_new_run_never_writes_into_a_folder_with_a_checkpoint(self, train, data_dir):
        Path("out").mkdir()  # an empty one will do, as will one that a failed run left
        assert "try a lower" in train("--lr", "1e9") and train("--epochs", 1) is None
        before = contents(Path("out"))
        shutil.rmtree(data_dir)  # it is said before the data are looked for
        text = "mnist.py: error: out holds a run: add --resume, or choose another --out"
        assert train() == train("--lr", 0.2) == text and before == contents(Path("out"))

    def test_resume_takes_the_settings_of_the_run(self, train, flags, tmp_path, capsys):
        more = "--model wide --lr 0.01 --schedule step --epochs 1 --resume"  # where nothing is yet
        assert train(*more.split()) is None
        best, before = tmp_path / "out/best_mnist_model.pth", contents(tmp_path)
        for flag in (["--evaluate", best], ["--resume"], ["--resume"]):
            capsys.readouterr()
            assert train(*flag, flags=flags[:6]) is None and before == contents(tmp_path)
            assert Path("out/report.txt").read_text() in capsys.readouterr().out
        Path("out/mnist_model_epoch_1.pth").unlink()  # as if killed between the two files
        assert "holds a run" in train() and train("--resume", flags=flags[:6]) is None

    def test_resume_names_a_flag_that_differs(self, train):
        train()
        clashes = "--lr 0.3 0.1,--batch-size 60 50,--epochs 4 2,--seed 2 1,--model wide simple"
        clashes += ",--amp bf16 off,--schedule step onecycle,--val-size 90 100"
        for flag, new, old in map(str.split, clashes.split(",")):
            text = f"mnist.py: error: {flag} is {new}, but the run in out has {old}: leave it out"
            assert train("--resume", flag, new).startswith(text)

    def test_without_onecycle_a_run_can_go_on_for_longer(self, train):
        more = ("--schedule", "step", "--epochs")
        assert train(*more, 1) is None and train(*more, 3, "--resume") is None
        assert [entry["epoch"] for entry in metrics_of("out")["history"]] == [1, 2, 3]

    def test_resume_goes_on_from_the_newest_checkpoint_and_tells_damage(self, train, capsys):
        train("--epochs", 10)
        newest, more = Path("out/mnist_model_epoch_10.pth"), ("--epochs", 10, "--resume")
        report, old = Path("out/report.txt").read_text(), os.stat("out/mnist_model_epoch_1.pth")
        Path("out/mnist_model_epoch_11 (1).pth").write_bytes(b"not the run's")
        newest.write_bytes(newest.read_bytes()[:-9])
        assert f"{newest} is damaged" in train(*more)
        newest.unlink()
        capsys.readouterr()
        assert train(*more) is None and report == Path("out/report.txt").read_text()
        assert capsys.readouterr().out.count("\n    3 0.0") == 2  # the table is whole
        assert os.stat("out/mnist_model_epoch_1.pth").st_ino == old.st_ino  # not trained again

    @pytest.mark.parametrize("more", ERRORS)
    def test_what_cannot_be_done_is_told_in_one_line(self, train, tmp_path, monkeypatch, more):
        message = train(*more.split())
        assert re.fullmatch(f"mnist.py: error: .*{ERRORS[more]}.*", message)
        assert not (tmp_path / "out/metrics.json").exists()

    def test_only_without_a_network_printed_digits_stand_in(self, train, monkeypatch, capsys):
        seeds, small = [], (IMAGES[:400], LABELS[:400])
        monkeypatch.setattr(mnist, "draw_digits", lambda n, seed: seeds.append(seed) or small)
        assert train("--data-dir", "empty") is None and seeds == [0, 1]
        printed = capsys.readouterr().out
        assert "!" * 79 + "\nSYNTHETIC: printed digits, not MNIST: Error downloading" in printed
        assert "\nsynthetic test accuracy" in printed and not contents(Path("empty"))
        assert [path.name for path in Path("out").iterdir()] == ["synthetic"]
        assert "holds a run" in train("--data", "synthetic")
        assert train("--data-dir", "empty", "--resume") is None
        assert train() is None and metrics_of("out")["data"] == "mnist"  # now it is there
        full = lambda self: Path(self.root, "a").write_text("a") and os.stat("gone")  # noqa: E731
        monkeypatch.setattr(datasets.MNIST, "download", full)
        assert "No such file" in train("--data-dir", "empty", "--out", "third")
        assert not contents(Path("empty"))

    @needs_fork
    def test_a_run_killed_again_and_again_ends_with_the_same_bits(self, flags):
        flags += ["--epochs", "3", "--resume", "--out"]
        assert end(start([*flags, "whole"])) == 0
        rng, kills, finished = random.Random(7), 0, True
        while kills < KILLS or not finished:
            if finished:  # a new run takes the rest of the kills
                shutil.rmtree("killed", ignore_errors=True)
            status = end(start([*flags, "killed"], partial(live_dangerously, rng.random())))
            kills, finished = kills + (status == -9), status == 0
            [mnist.load_checkpoint(path) for path in Path("killed").glob("*.pth")]
        assert same_run("whole", "killed")
        both = [start([*flags, "both"]) for _ in range(2)]  # at once
        assert [end(process) for process in both] == [0, 0] and same_run("whole", "both")

    @needs_fork
    def test_ctrl_c_is_told_without_a_traceback(self, flags, capfd):
        attentive = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        run = start([*flags, "--epochs", "999"], attentive)
        while run.is_alive() and not Path("out/mnist_model_epoch_2.pth").exists():
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGINT)
        assert end(run) == 130 and capfd.readouterr().err.endswith("add --resume\n")


def pictures_of(digit):
    photo = ImageOps.expand(ImageOps.invert(ink := to_pil_image(digit).resize((280, 280))), 90, 255)
    values, (_, top, _, bottom) = pil_to_tensor(photo)[0].int(), ink.getbbox()
    yield from (photo, ImageOps.invert(photo), ImageOps.expand(photo, 60, 40))  # on a dark table
    yield photo.crop((0, 90 + top, 460, 90 + bottom))  # it touches the border
    yield to_pil_image((values * torch.linspace(0.5, 1, 460)).byte())  # a shadow
    yield Image.fromarray((values * 200).numpy().astype("uint16"))
    yield Image.fromarray((values / 255).numpy())
    yield from (Image.merge("LA", (ink.point(lambda _, v=v: v), ink)) for v in (0, 255))
    for pen in (ImageFilter.MaxFilter(9), ImageFilter.MinFilter(9)):  # thick, thin
        yield ImageOps.expand(ImageOps.invert(ink.filter(pen)), 90, 255)
    yield ImageOps.expand(photo.resize((120, 120)), 300, 255)
    ImageDraw.Draw(photo).ellipse((360, 360, 520, 560), 100)  # a hand
    yield photo


class TestTheFileItself:
    def test_the_recipe_for_many_seeds(self, train, capsys):
        *loop, code = re.search(r"for seed in (.*?); .*?END\n(.*?)END", README, re.S).groups()
        for seed in loop[0].split()[:3]:
            assert train("--seed", seed, "--out", f"runs/{seed}") is None
        capsys.readouterr()
        exec(code, {})
        assert re.fullmatch(r"[\d.]+% ± [\d.]+% \([\d.]+%\)\n", capsys.readouterr().out)

    def test_the_loop_of_the_readme_runs_and_its_diff_applies(self, data_dir, capsys):
        source = Path(mnist.__file__).read_text(encoding="utf-8")
        assert all(line in source for line in re.findall("(?m)^-(DATA.*| {4}.*)$", README))
        code = re.search(r"```python\n(import torch\n.*?)```", README, re.S)[1]
        exec(code.replace("937", "6"), {})
        assert capsys.readouterr().out.count("\n") == 4

    def test_predict_sees_a_digit_however_given(self, train, monkeypatch, capsys):
        train("--out", "model_checkpoints", "--epochs", 1)
        Image.new("L", (200, 300), 255).save("blank.png")
        to_pil_image((200 + 8 * torch.randn(300, 300)).byte()).save("grain.png")
        monkeypatch.setattr(sys, "argv", ["predict.py", "none", "blank.png", "grain.png"])
        exec(re.search(r"```python\n(import sys.*?)```", README, re.S)[1], names := {})
        out = capsys.readouterr().out
        assert "'none': [Errno 2]" in out and out.count("nothing stands out") == 2
        for image in IMAGES[:5]:
            seen = torch.cat([names["prepare"](picture) for picture in pictures_of(image)])
            assert seen.shape[1:] == (28, 28) and seen.max() == 1
            assert F.cosine_similarity(seen.flatten(1), seen[:1].flatten(1)).min() > 0.8
            centre = seen[0].sum(0) @ torch.arange(28.0) / seen[0].sum()
            assert centre.item() == pytest.approx(13.5, abs=0.6)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
