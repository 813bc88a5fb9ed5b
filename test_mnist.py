# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pytest>=8"]
# ///
"""The specification of mnist.py, section by section.

python test_mnist.py                               without MNIST: printed digits only
MNIST_DIR=data python test_mnist.py                real MNIST too, from data/MNIST/raw
MNIST_KILLS=60 python test_mnist.py -k killed      more of what is done by chance
"""

import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import os
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
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import mnist

SOURCE, README = (Path(__file__).with_name(n).read_text() for n in ("mnist.py", "README.md"))
MNIST_DIR, KILLS = os.environ.get("MNIST_DIR"), int(os.environ.get("MNIST_KILLS", "4"))
torch.set_num_threads(1)  # on tensors as small as these, threads wait for each other
IMAGES, LABELS = mnist.draw_digits(500, seed=0)
DIFF = r"`python mnist.py([^`]*)`:\n\n```diff\n(.*?)```"
FILES = [f"{s}-{part}-ubyte" for s in ("train", "t10k") for part in ("images-idx3", "labels-idx1")]


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A small MNIST of printed digits, 400 to train on, 100 to test on; no network; a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    arrays = (IMAGES[:400, 0], LABELS[:400], IMAGES[400:, 0], LABELS[400:])
    (raw := tmp_path / "data/MNIST/raw").mkdir(parents=True)
    for name, array in zip(FILES, arrays, strict=True):  # IDX: a magic number, sizes, values
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (raw / name).write_bytes(head + array.byte().numpy().tobytes())
    content = b"".join(array.numpy().tobytes() for array in arrays)
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
    """Run the command line in this process; no plots."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    return lambda *more: mnist.main([*flags, *map(str, more)])


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


def new_state(name="simple", lr=0.05, schedule="constant", epochs=1, steps=1):
    torch.manual_seed(0)
    return mnist.make_state(mnist.MODELS[name](), lr, schedule, epochs, steps)


class TestModel:
    @pytest.mark.parametrize("name", mnist.MODELS)
    def test_models_map_images_to_ten_logits(self, name):
        assert mnist.MODELS[name]()(torch.randn(3, 1, 28, 28)).shape == (3, 10)

    def test_simple_net_has_under_8000_parameters(self):
        model = mnist.SimpleMNISTNet()
        assert model.count_parameters() == sum(p.numel() for p in model.parameters()) < 8000

    @pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16, "wide"])
    def test_one_batch_can_be_overfitted(self, amp):
        name, lr, amp = ("wide", 0.004, None) if amp == "wide" else ("simple", 0.05, amp)
        state, batch = new_state(name, lr), next(mnist.batches((IMAGES[:5], LABELS[:5]), 5))
        state["scaler"] = torch.amp.GradScaler("cpu", enabled=amp == torch.float16)
        first, _ = mnist.train_one_epoch(state, [batch], amp)
        mnist.train_one_epoch(state, [batch] * 70, amp)
        loss, accuracy = mnist.train_one_epoch(state, [batch], amp)
        assert first > 1.5 and loss < 0.1 and accuracy == 1

    def test_wide_net_has_small_convolutions_alone_of_its_widths_and_he_initialisation(self):
        weights = [*mnist.WideMNISTNet().parameters()]
        assert all(w.ndim == 4 and w.shape[2] in (1, 3) for w in weights)
        assert [w.shape[0] for w in weights] == [32, 64, 128, 32, 64, 128, 10]
        assert weights[1].std().item() == pytest.approx((2 / 32 / 9) ** 0.5, rel=0.1)

    def test_summary_lists_layers_and_total_and_changes_nothing(self, capsys):
        model = mnist.SimpleMNISTNet()
        old = {k: v.clone() for k, v in model.state_dict().items()}
        model.print_model_summary()
        *layers, total = capsys.readouterr().out.replace(",", "").splitlines()
        assert sum(int(line.split()[-1]) for line in layers) == int(total.split()[1]) == 7946
        assert "SiLU" in layers[0] and model.training and same_bits(old, model.state_dict())


class TestData:
    def test_mnist_is_downloaded_if_missing(self, data_dir, tmp_path, monkeypatch):
        """torchvision's own download, from a server on this machine in the network's place."""
        sums = []
        for name in FILES:
            content = gzip.compress((data_dir / "MNIST/raw" / name).read_bytes())
            (tmp_path / f"{name}.gz").write_bytes(content)
            sums.append((f"{name}.gz", hashlib.md5(content).hexdigest()))
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(datasets.MNIST, "resources", sums)
        mnist.load_mnist(tmp_path / "new")
        server.shutdown()
        (images, labels), _ = mnist.load_mnist(tmp_path / "new")  # now from disk
        assert torch.equal(images, IMAGES[:400]) and images.dtype == torch.uint8
        assert torch.equal(labels, LABELS[:400]) and labels.dtype == torch.int64

    def test_no_files_and_no_network_leave_nothing_behind(self, data_dir):
        with pytest.raises(ConnectionError, match=r"(?s)idx3.* into new/MNIST/raw.*Error"):
            mnist.load_mnist("new")
        assert not Path("new").exists()

    @pytest.mark.parametrize("name", FILES)
    def test_damaged_or_misplaced_files_are_an_error(self, data_dir, name):
        path, rng = data_dir / "MNIST/raw" / name, random.Random(name)
        before, whole = {*data_dir.rglob("*")}, path.read_bytes()
        cases = [(folder, whole) for folder in (data_dir / "MNIST", path.parent, path)]
        cases += [(data_dir, c) for c in (whole[:-9], whole + b"\0", b"", b"<html>")]
        for _ in range(11):
            flipped = bytearray(whole)
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            cases.append((data_dir, flipped))
        for folder, content in cases:
            path.write_bytes(content)
            with pytest.raises(OSError, match=r"whole, into .*MNIST/raw") as caught:
                mnist.load_mnist(folder)
            assert not isinstance(caught.value, ConnectionError)
        assert before == {*data_dir.rglob("*")}

    def test_draw_digits_is_determined_by_its_seed_and_leaves_torchs_generator_alone(self):
        assert IMAGES.dtype == torch.uint8 and IMAGES.shape == (500, 1, 28, 28)
        assert LABELS.dtype == torch.int64 and LABELS.unique().tolist() == [*range(10)]
        before = torch.get_rng_state()
        again, other = mnist.draw_digits(500, seed=0), mnist.draw_digits(500, seed=1)
        assert torch.equal(IMAGES, again[0]) and torch.equal(LABELS, again[1])
        assert not torch.equal(IMAGES, other[0]) and torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize(("stretch", "slant", "shift"), [(1, 0, 0.3), (1, 0.3, 0), (1.2, 0, 0)])
    def test_deskew_undoes_an_affine_map_and_leaves_blanks(self, stretch, slant, shift):
        theta = torch.tensor([[stretch, slant, shift], [0, 1, shift]]).expand(500, 2, 3)
        grid = F.affine_grid(theta, IMAGES.shape, align_corners=False)
        images = mnist.deskew(IMAGES)
        changed = F.grid_sample(images.float(), grid, align_corners=False).round().byte()
        pairs = ((images, changed), (mnist.deskew(images), mnist.deskew(changed)))
        flat = [[image.float().flatten(1) for image in pair] for pair in pairs]
        before, after = (F.cosine_similarity(*pair).mean() for pair in flat)
        assert after > 0.95 and 1 - after < (1 - before) / 3 and images.dtype == torch.uint8
        assert not mnist.deskew(torch.zeros_like(images)).any()

    def test_augment_keeps_shape_and_range_and_differs_per_image(self):
        same = (IMAGES[:1].float() / 255).expand(8, 1, 28, 28)
        out = mnist.augment(same)
        assert out.shape == same.shape and out.min() >= 0 and out.max() <= 1
        assert (out[1:] - out[:1]).abs().amax((1, 2, 3)).min() > 0.1
        torch.testing.assert_close(mnist.augment(same, strength=0), same, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("transform", [None, lambda x: x])
    def test_batches_are_normalised_and_to_train_on_shuffled_and_full(self, transform):
        images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 1, 28, 28)
        pairs = [*mnist.batches((images, torch.arange(100)), 30, transform)]
        assert [len(y) for _, y in pairs] == [30, 30, 30, 10][: 3 if transform else 4]
        x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        assert torch.equal(((x[:, 0, 14, 14] * 0.3081 + 0.1307) * 255).round().long(), y)
        assert len(y.unique()) == len(y) and torch.equal(y, y.sort()[0]) == (transform is None)

    @pytest.mark.skipif(not MNIST_DIR, reason="MNIST_DIR does not name a folder with MNIST/raw")
    def test_one_epoch_of_real_mnist_reads_over_98_percent(self, tmp_path):
        command = [sys.executable, mnist.__file__, "--data", "mnist", "--data-dir", MNIST_DIR]
        subprocess.run([*command, "--epochs", "1", "--out", tmp_path / "out"], check=True)
        assert json.loads((tmp_path / "out/metrics.json").read_text())["test_accuracy"] > 0.98


def rates(schedule, epochs=10, steps=10):
    state = new_state(lr=0.1, schedule=schedule, epochs=epochs, steps=steps)
    for _ in range(epochs * steps):
        yield state["optimizer"].param_groups[0]["lr"]
        state["optimizer"].step()
        state["scheduler"].step()


class TestTraining:
    def test_the_schedules_follow_their_course_in_any_number_of_steps(self):
        values = [*rates("onecycle")]
        assert values[0] == pytest.approx(0.004) and values.index(max(values)) in (19, 20)
        assert max(values) == pytest.approx(0.1, rel=0.01) and values[-1] < 1e-4
        assert [*rates("step")][9::10] == pytest.approx([0.1 * 0.7**epoch for epoch in range(10)])
        assert {*rates("constant")} == {0.1}
        assert all(max(rates("onecycle", epochs=1, steps=n)) <= 0.1 for n in range(1, 13))

    def test_training_and_evaluate_give_the_mean_loss_and_the_accuracy(self, capsys):
        state, data = new_state("wide", lr=1e-12), (IMAGES[:80], LABELS[:80])
        trained = mnist.train_one_epoch(state, mnist.batches(data, 2), None, bar=40)
        assert capsys.readouterr().out == f"[{'#' * 10:20}] 20/40\r[{'#' * 20}] 40/40\r"
        loss, accuracy, logits = mnist.evaluate(state["model"], data)
        expected = state["model"].eval()((IMAGES[:80] / 255 - 0.1307) / 0.3081).detach()
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)
        means = F.cross_entropy(expected, LABELS[:80]), (expected.argmax(1) == LABELS[:80]) * 1.0
        assert (loss, accuracy) == pytest.approx([m.mean().item() for m in means], rel=1e-4)
        assert trained == pytest.approx((loss, accuracy), rel=1e-4)

    def test_on_cuda_the_model_is_graphed_once_in_train_mode(self, flags, monkeypatch):
        equal = {"__eq__": lambda _, other: other in ("cpu", "cuda"), "__hash__": str.__hash__}
        calls, as_cuda = [], type("CUDA", (str,), equal)("cpu")

        def graph(model, samples):
            calls.append((model.training, [sample.shape for sample in samples]))
            model(*samples)  # a warm-up moves batch norm's statistics
            return model

        monkeypatch.setattr(torch.cuda, "make_graphed_callables", graph)
        for device, out in (("cpu", "eager"), (as_cuda, "graphed")):
            args = mnist.parse_args(flags)
            args.device = device
            mnist.run(args, *mnist.get_data(args), Path(out))
        assert calls == [(True, [(50, 1, 28, 28)])]
        assert same_run("eager", "graphed")

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    @pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
    def test_cuda_trains_graphed_as_eagerly_and_resumes(self, train, monkeypatch, amp):
        more = ("--device", "cuda", "--amp", amp, "--epochs", 8, "--out")
        assert train(*more, "graphed") is None
        Path("graphed/mnist_model_epoch_8.pth").unlink()
        assert train(*more, "graphed", "--resume") is None
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda model, samples: model)
        assert train(*more, "eager") is None
        found = (json.loads(Path(out, "metrics.json").read_text()) for out in ("graphed", "eager"))
        losses = [metrics["history"][-1]["train_loss"] for metrics in found]
        assert losses[0] == pytest.approx(losses[1], rel=0.3) and losses[0] < 1.5


@pytest.fixture
def saved(tmp_path):
    state, config = new_state(schedule="onecycle", epochs=2, steps=3), {"model": "simple"}
    mnist.train_one_epoch(state, mnist.batches((IMAGES[:90], LABELS[:90]), 30), None)
    mnist.save_checkpoint(tmp_path / "a.pth", state, epoch=1, history=[{}], config=config)
    return state, tmp_path / "a.pth"


class TestCheckpoints:
    def test_a_checkpoint_restores_every_part(self, saved):
        (state, path), other = saved, new_state(schedule="onecycle", epochs=2, steps=3)
        assert mnist.load_checkpoint(path, other)["epoch"] == 1
        assert same_bits(state["model"].state_dict(), other["model"].state_dict())
        assert state["scheduler"].get_last_lr() == other["scheduler"].get_last_lr()
        assert same_bits(*(s["optimizer"].state_dict()["state"][0] for s in (state, other)))

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
        mnist.write_file(tmp_path / "file", b"old")
        monkeypatch.delattr(os, "replace")
        with pytest.raises(AttributeError):
            mnist.write_file(tmp_path / "file", b"new")
        assert contents(tmp_path) == {tmp_path / "file": b"old"}

    def test_damaged_checkpoints_are_refused_or_the_very_same(self, saved):
        (state, path), rng, refused = saved, random.Random(0), 0
        whole, good = path.read_bytes(), torch.load(path)["model_state_dict"]
        for i in range(200):
            content = bytearray(whole if i % 3 else whole[: rng.randrange(len(whole))])
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            try:
                assert mnist.load_checkpoint(path, state)["history"] == [{}]
            except ValueError as error:
                assert str(error).startswith(f"no usable checkpoint {path} (")
                refused += 1
            else:  # it was a bit of the container's that nobody reads
                assert same_bits(good, state["model"].state_dict())
        assert refused > 170

    def test_foreign_checkpoints_are_refused_and_not_run(self, saved, tmp_path):
        good, touched = torch.load(saved[1], weights_only=True), tmp_path / "touched"
        evil = type("Evil", (), {"__reduce__": lambda _: (Path.touch, (touched,))})()
        foreign = [[], None, "text", evil]
        foreign += [{k: v for k, v in good.items() if k != key} for key in good]
        changes = [{"epoch": evil}, {"epoch": 7}, {"config": []}, {"model_state_dict": {}}]
        foreign += [good | change for change in changes]
        for content in foreign:
            torch.save(content, saved[1])
            with pytest.raises(ValueError, match="no usable checkpoint"):
                mnist.load_checkpoint(saved[1], new_state())
        assert not touched.exists()


def known_metrics(epochs):
    entry = {"lr": 0.4, "seconds": 12.34}
    for split in mnist.SPLITS:
        entry |= {f"{split}_loss": len(split) / 50, f"{split}_accuracy": 1 - len(split) / 500}
    confusion = torch.diag(torch.full((10,), 100))
    confusion[4, 4], confusion[4, 9] = 70, 30
    metrics = {"parameters": 7946, "data": "mnist", "test_accuracy": 0.97, "best_epoch": 1}
    history = [{"epoch": e} | entry for e in range(1, epochs + 1)]
    return metrics | {"confusion": confusion.tolist(), "history": history}


class TestReport:
    def test_the_report_of_a_known_run_and_its_width(self):
        report = mnist.make_report(known_metrics(1), [(IMAGES[0], 4, 9)] * 2).splitlines()
        assert report[0] == "mnist test accuracy 97.00% +- 1.06%"
        cells = "0.1000  99.00%  0.0600  99.40%  0.0800  99.20%"
        assert report[3:5] == [mnist.HEADER, f"    1 0.4000  {cells}    12.3  ###"]
        assert "    4    .    .    .    .   70    .    .    .    .   30  70.0%" in report
        assert report[19] == "4 -> 9                    4 -> 9"
        drawn = "\n".join(f"{line}  {line}".rstrip() for line in mnist.draw_image(IMAGES[0]))
        assert "\n".join(report[20:]) == drawn.rstrip()
        (metrics := known_metrics(100))["history"][0] |= {"val_accuracy": 0.1, "train_loss": 12.3}
        report = mnist.make_report(metrics, [(image, 4, 7) for image in IMAGES[:6]])
        assert report.isascii() and max(map(len, report.splitlines())) <= 79

    def test_a_plot_shows_three_curves_of_both_figures(self):
        pytest.importorskip("matplotlib")
        png = mnist.draw_plot(known_metrics(9)["history"])
        picture = pil_to_tensor(Image.open(io.BytesIO(png)).convert("RGB"))
        for colour in torch.tensor([[31, 119, 180], [255, 127, 14], [44, 160, 44]]):
            alike = (picture == colour[:, None, None]).all(0)
            assert all(half.sum() > 100 for half in alike.chunk(2, 1))


BAD = "--epochs 0,--epochs x,--batch-size 0,--val-size 0,--lr 0,--lr nan,--lr inf,--seed -1,--amp x"

ERRORS = {
    "--batch-size 301": "leaves 300 images, no batch: lower it or --batch-size",
    "--out data/MNIST/raw/t10k-labels-idx1-ubyte": "holds a run",
    "--evaluate missing.pth": "let python mnist.py make one in minutes",
    "--lr 1e9 --schedule constant": "try a lower --lr",
    "--data-dir empty --data mnist": "MNIST/raw",
} | ({} if torch.cuda.is_available() else {"--device cuda": "there is no cuda device here"})


def start(flags, prepare=lambda: None):
    target = lambda: (prepare(), sys.exit(mnist.main(flags)))  # noqa: E731
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def live_dangerously(seed):
    """Make this process be killed by chance in the midst of a write, or right after one."""
    rng, replace = random.Random(seed), os.replace
    die = lambda _: rng.random() < 0.1 and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    os.fsync, os.replace = die, lambda old, new: (replace(old, new), die(0))


class TestCommandLine:
    @pytest.mark.parametrize("flag", BAD.split(","))
    def test_bad_flags_are_bad_usage(self, flag, capsys):
        with pytest.raises(SystemExit) as caught:
            mnist.main(flag.split())
        assert caught.value.code == 2 and flag.split()[0] in capsys.readouterr().err

    def test_a_run_writes_its_files(self, train, tmp_path, monkeypatch, capsys):
        monkeypatch.delitem(sys.modules, "matplotlib.figure")
        assert train() is None
        out, printed = tmp_path / "out", capsys.readouterr().out
        names = "mnist_model_epoch_1.pth mnist_model_epoch_2.pth best_mnist_model.pth metrics.json"
        plot = [] if "pip install matplotlib" in printed else ["training_metrics.png"]
        assert {path.name for path in out.iterdir()} == {*names.split(), "report.txt", *plot}
        metrics = json.loads((out / "metrics.json").read_text())
        entry = "epoch lr train_loss train_accuracy val_loss val_accuracy test_loss test_accuracy"
        assert {*metrics["history"][1]} == {*entry.split(), "seconds"}
        assert (metrics["parameters"], metrics["data"]) == (7946, "mnist")
        assert [sum(row) for row in metrics["confusion"]] == LABELS[400:].bincount().tolist()
        best = min(metrics["history"], key=lambda e: e["val_loss"])
        assert metrics["test_accuracy"] == pytest.approx(best["test_accuracy"])
        assert (out / "report.txt").read_text() in printed and not re.search(".{80}", printed)
        keys = {f"{part}_state_dict" for part in ("model", "optimizer", "scheduler", "scaler")}
        checkpoint = torch.load(out / "best_mnist_model.pth", weights_only=True)
        assert keys | {*entry.split(), "history", "config"} <= checkpoint.keys()
        assert checkpoint["epoch"] == best["epoch"] == metrics["best_epoch"]

    def test_dry_run_can_be_tried_again_and_leaves_nothing(self, train, tmp_path, capsys):
        before = contents(tmp_path)
        for flags in (["--seed", 2], ["--model", "wide", "--epochs", 9]):
            assert train("--dry-run", *flags) is None
            assert capsys.readouterr().out.count("test accuracy") == 1
        assert contents(tmp_path) == before and not (tmp_path / "out").exists()

    @pytest.mark.parametrize("left", ["*", "best_mnist_model.pth", "metrics.json", "nothing"])
    def test_a_new_run_never_writes_into_a_folder_there(self, train, tmp_path, left):
        train("--epochs", 1)
        for path in {*(tmp_path / "out").iterdir()} - {*(tmp_path / "out").glob(left)}:
            path.unlink()
        before = contents(tmp_path)
        for flags in ([], ["--lr", 0.2]):
            text = "holds a run: --resume goes on with it, another --out starts one beside it"
            assert train(*flags) == f"mnist.py: error: out {text}"
        assert before == contents(tmp_path)

    def test_resume_and_evaluate_report_again(self, train, tmp_path, capsys):
        more = ("--model", "wide", "--lr", 0.01, "--epochs", 1, "--schedule", "step")
        assert train(*more, "--resume") is None  # begins where there is nothing yet
        report, before = (tmp_path / "out/report.txt").read_text(), contents(tmp_path)
        for flags in (("--resume",), ("--evaluate", tmp_path / "out/best_mnist_model.pth")):
            capsys.readouterr()
            assert train(*more, *flags) is None
            assert report in capsys.readouterr().out and before == contents(tmp_path)

    def test_resume_names_what_clashes_and_damage_and_without_it_goes_on(self, train):
        train()
        clashes = "--lr 0.3 0.1,--batch-size 60 50,--epochs 4 2,--seed 2 1,--model wide simple"
        for flag, new, old in map(str.split, f"{clashes},--amp bf16 off".split(",")):
            assert f"error: {flag} is {new}, was {old} in " in train("--resume", flag, new)
        shutil.copytree("out", "whole")
        newest = Path("out/mnist_model_epoch_2.pth")
        newest.write_bytes(newest.read_bytes()[:-9])
        assert f"no usable checkpoint {newest} (" in train("--resume")
        newest.unlink()
        assert train("--resume") is None and same_run("out", "whole")

    @pytest.mark.parametrize("change", [{"model": "x"}, {"model": []}, {"model": "wide"}, None])
    def test_a_config_edited_by_hand_is_told_in_a_line(self, train, tmp_path, change):
        train("--epochs", 1)
        path = tmp_path / "out/mnist_model_epoch_1.pth"
        checkpoint = torch.load(path)
        checkpoint["config"] = checkpoint["config"] | change if change else {"seed": 1}
        torch.save(checkpoint, path)
        assert "error: --model is simple, was" in train("--epochs", 1, "--resume")
        assert re.match("mnist.py: error: .*mnist_model_epoch_1.pth", train("--evaluate", path))

    @pytest.mark.parametrize("more", ERRORS)
    def test_what_cannot_be_done_is_told_in_one_line(self, train, tmp_path, monkeypatch, more):
        message = train(*more.split())
        assert re.fullmatch(f"mnist.py: error: .*{ERRORS[more]}.*", message)
        assert not (tmp_path / "out/metrics.json").exists()

    @pytest.mark.parametrize("more", ["--data-dir empty", "--data synthetic"])
    def test_printed_digits_are_loud(self, train, tmp_path, monkeypatch, capsys, more):
        monkeypatch.setattr(mnist, "draw_digits", lambda n, seed: (IMAGES[:400], LABELS[:400]))
        assert train(*more.split()) is None
        printed = capsys.readouterr().out
        assert printed.startswith("!" * 79 + "\nSYNTHETIC: printed digits, not MNIST")
        assert "into empty/MNIST/raw" in printed or "--data synthetic asks for them" in printed
        assert "\nsynthetic test accuracy" in printed and not Path("empty").exists()

    def test_a_run_killed_again_and_again_ends_with_the_same_bits(self, flags, tmp_path):
        flags += ["--epochs", "3", "--resume", "--out"]
        start([*flags, "whole"]).join()
        rng, kills, finished = random.Random(7), 0, True
        while kills < KILLS or not finished:
            if finished:  # a new run takes the rest of the kills
                shutil.rmtree("killed", ignore_errors=True)
            process = start([*flags, "killed"], partial(live_dangerously, rng.random()))
            process.join()
            kills, finished = kills + (process.exitcode == -9), process.exitcode == 0
        assert same_run("whole", "killed")

    def test_of_two_runs_at_once_one_gets_the_folder(self, flags, tmp_path, capfd):
        both = [start(flags) for _ in range(2)]
        assert sorted(process.join() or process.exitcode for process in both) == [0, 1]
        assert "out holds a run" in capfd.readouterr().err

    def test_ctrl_c_and_lost_readers_show_no_traceback(self, flags, tmp_path, capfd):
        attentive = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        run = start([*flags, "--epochs", "999"], attentive)
        while not (tmp_path / "out/mnist_model_epoch_2.pth").exists():
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGINT)
        run.join()
        assert run.exitcode == 130 and re.fullmatch("\n.*goes on\n", capfd.readouterr().err)
        reader, writer = os.pipe()
        os.close(reader)
        for stdout, status in ((os.fdopen(writer, "w"), 1), (None, 0)):
            run = start([*flags, "--dry-run"], partial(setattr, sys, "stdout", stdout))
            run.join()
            assert (run.exitcode, capfd.readouterr().err) == (status, "")


USES = {  # what to copy, and a use of it
    "# -+ Model": "SimpleMNISTNet()(torch.zeros(1, 1, 28, 28))",
    "# -+ Data": "next(batches(draw_digits(9, 0), 9, augment))",
    "# -+ Check": "save_checkpoint(Path('a.pth'), {}, epoch=0, history=[], config={})",
    "# -+ Report": f"make_report({known_metrics(3)}, [(torch.ones(1, 28, 28), 1, 2)])",
    "def augment": "augment(torch.rand(2, 1, 28, 28))",
}


def pictures_of(digit):
    """Pictures of a digit as people give it, by the names of their files."""
    photo = ImageOps.expand(ImageOps.invert(to_pil_image(digit)).resize((280, 280)), 90, 255)
    values = pil_to_tensor(photo)[0].int()
    yield from (("photo.jpg", photo), ("inverted.png", ImageOps.invert(photo)))
    yield "16bit.png", Image.fromarray((values * 200).numpy().astype("uint16"))
    yield "float.tiff", Image.fromarray((values / 255).numpy())
    yield "shadow.jpg", to_pil_image((values * torch.linspace(0.5, 1, 460)).byte())
    yield "table.jpg", ImageOps.expand(photo, 60, 40)
    yield "small.png", ImageOps.expand(photo.resize((230, 230)), 400, 255)
    ImageDraw.Draw(photo).ellipse((360, 360, 520, 560), 100)
    yield "hand.jpg", photo


class TestTheFileItself:
    @pytest.mark.parametrize("piece", USES)
    def test_each_piece_works_alone_with_the_imports(self, piece, data_dir):
        imports = re.search(r"^import argparse.*?(?=^# -)", SOURCE, re.S | re.M)[0]
        end = r"\n\n\n" if piece.startswith("def") else r"^(?=# -)"
        exec(imports + re.search(rf"^{piece}.*?{end}", SOURCE, re.S | re.M)[0] + USES[piece], {})

    @pytest.mark.parametrize(("more", "diff"), re.findall(DIFF, README, re.S))
    def test_the_diffs_of_the_readme_make_it_anothers(self, more, diff, flags, data_dir, tmp_path):
        assert len(re.findall("^[-+]", diff, re.M)) <= 4
        source, space = SOURCE, {"__name__": "changed"}
        for hunk in diff.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(x[1:] for x in lines if x[0] in (" ", sign)) for sign in "-+")
            assert source.count(old) == 1
            source = source.replace(old, new)
        exec(source, space)
        space["CRC32"] = mnist.CRC32
        if "FashionMNIST" in diff:
            (data_dir / "MNIST").rename(data_dir / "FashionMNIST")
        assert space["main"]([*flags, *more.split(), "--epochs", "3"]) is None
        metrics = json.loads((tmp_path / "out/metrics.json").read_text())
        assert metrics["history"][2]["train_loss"] < metrics["history"][0]["train_loss"]
        assert metrics["data"] == ("fashionmnist" if "FashionMNIST" in diff else "mnist")

    def test_the_loop_of_the_readme_runs(self, data_dir, tmp_path, monkeypatch, capsys):
        exec(re.search(r"```python\n(from .*?)```", README, re.S)[1], {})
        assert 0 <= float(capsys.readouterr().out) <= 1

    def test_the_recipe_for_many_seeds(self, train, tmp_path, monkeypatch, capsys):
        recipe = r"for seed in (.*?); do python mnist.py (.*?); done\npython - <<END\n(.*?)END"
        seeds, more, code = re.search(recipe, README, re.S).groups()
        for seed in seeds.split()[:3]:
            assert train(*more.replace("$seed", seed).split()) is None
        capsys.readouterr()
        exec(code, {})
        assert re.fullmatch(r"[\d.]+% ± [\d.]+% \([\d.]+%\)\n", capsys.readouterr().out)

    def test_predict_sees_a_digit_however_given(self, train, tmp_path, monkeypatch, capsys):
        code = re.search(r"```python\n(# predict.py\n.*?)```", README, re.S)[1]
        train("--out", tmp_path / "model_checkpoints", "--epochs", 1)
        Image.new("L", (200, 300), 255).save("blank", "PNG")
        names = ["none", "blank"]
        for i, image in enumerate(IMAGES[:3]):
            for name, picture in pictures_of(image):
                picture.save(f"{i}{name}")
                names.append(f"{i}{name}")
        monkeypatch.setattr(sys, "argv", ["predict.py", *names])
        capsys.readouterr()
        exec(code, {})
        out = capsys.readouterr().out
        assert "none: [Errno 2]" in out and "blank: nothing stands out" in out
        drawn = re.findall(r"(?:^[ .:=+*#%@-]{24}\n){12}", out, re.M)
        shades = torch.tensor([[" .:-=+*#%@".find(c) for c in picture] for picture in drawn])
        shades = shades.view(3, 8, -1).float()
        assert F.cosine_similarity(shades, shades[:, :1], dim=2).mean() > 0.95
        shutil.rmtree("model_checkpoints")
        exec(code, {})
        assert "let python mnist.py make one in minutes" in capsys.readouterr().out


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
