# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "pytest>=8"]
# ///
"""The specification of mnist.py, section by section.

python test_mnist.py                                     without MNIST: drawn digits only
MNIST_DIR=data python test_mnist.py                      real MNIST too, from data/MNIST/raw
"""

import copy
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

import mnist

HERE = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # on tensors as small as these, threads only wait for each
torch.set_num_threads(1)  # other: neither the subprocesses nor this process need more than one
IMAGES, LABELS = mnist.draw_digits(500, torch.Generator().manual_seed(0))
FILES = [f"{s}-{part}-ubyte" for s in ("train", "t10k") for part in ("images-idx3", "labels-idx1")]


@pytest.fixture(autouse=True)
def same_start_for_every_test():
    torch.manual_seed(0)
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def idx(array):
    """The bytes of an IDX file, MNIST's format: a magic number, the sizes, the values."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return head + array.byte().numpy().tobytes()


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """A small MNIST of drawn digits: 400 to train on, 100 to test on."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = (IMAGES[:400, 0], LABELS[:400], IMAGES[400:, 0], LABELS[400:])
    for name, array in zip(FILES, arrays, strict=True):
        (raw / name).write_bytes(idx(array))
    content = b"".join(array.numpy().tobytes() for array in arrays)
    monkeypatch.setattr(mnist, "MNIST_CRC32", zlib.crc32(content))
    return tmp_path / "data"


@pytest.fixture
def train(data_dir, tmp_path, monkeypatch):
    """Run the command line in this process on the small MNIST, into tmp_path/out; no plots."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    def run(*flags, out="out"):
        base = ["--data-dir", data_dir, "--out", tmp_path / out, "--device", "cpu"]
        base += ["--val-size", 100, "--epochs", 2, "--batch-size", 50]
        return mnist.main([str(flag) for flag in (*base, *flags)])

    return run


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_times(history):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


# ---------------------------------------------------------------------------------------- Model


@pytest.mark.parametrize("name", mnist.MODELS)
def test_models_map_images_to_ten_logits(name):
    assert mnist.MODELS[name]()(torch.randn(3, 1, 28, 28)).shape == (3, 10)


def test_simple_net_has_under_8000_parameters():
    model = mnist.SimpleMNISTNet()
    assert model.count_parameters() == sum(p.numel() for p in model.parameters()) < 8000


def test_simple_net_begins_as_specified_and_norms_every_convolution_but_the_last():
    leaves = [m for m in mnist.SimpleMNISTNet().modules() if not [*m.children()]]
    convs = [m for m in leaves if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs[:3]] == [(1, 8), (8, 12), (12, 16)]
    assert {c.kernel_size for c in convs[:3]} == {(3, 3)}
    for conv, after in itertools.pairwise(leaves):
        if isinstance(conv, nn.Conv2d) and conv is not convs[-1]:
            assert isinstance(after, nn.BatchNorm2d)
    assert convs[-1].kernel_size == (1, 1) and convs[-1].out_channels == 10


def test_wide_net_has_the_widths_of_its_design():
    convs = [m for m in mnist.WideMNISTNet().modules() if isinstance(m, nn.Conv2d)]
    widths = [convs[0].in_channels, *(c.out_channels for c in convs)]
    assert widths == [1, 32, 64, 128, 32, 64, 128, 10]


def test_wide_net_has_only_small_convolutions_and_no_bias_or_norm():
    model = mnist.WideMNISTNet()
    assert all(p.ndim == 4 and p.shape[2] in (1, 3) for p in model.parameters())


def test_wide_net_starts_with_he_initialisation():
    for weight in mnist.WideMNISTNet().parameters():
        if weight.numel() > 4000:
            expected = math.sqrt(2 / weight[0].numel())
            assert weight.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("channels", [8, 12, 16, 24])
def test_batch_norm_keeps_the_statistics_of_torchs_own(channels):
    ours, theirs = mnist.BatchNorm(channels), nn.BatchNorm2d(channels)
    for norm in (ours, theirs):
        torch.nn.init.uniform_(norm.weight), torch.nn.init.uniform_(norm.bias)
    theirs.load_state_dict(ours.state_dict())
    for scale in (1, 3):
        x = torch.randn(64, channels, 28, 28) * scale + 1
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0.1)  # of slightly fewer pixels
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        if one.ndim:
            torch.testing.assert_close(one, other, rtol=0.01, atol=0.01)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0.01, atol=0.02)


def test_batch_norm_takes_any_number_of_pixels():
    assert mnist.BatchNorm(12)(torch.randn(1, 12, 5, 5)).shape == (1, 12, 5, 5)


@pytest.mark.parametrize("name", mnist.MODELS)
def test_models_have_no_fully_connected_layer(name):
    assert not [m for m in mnist.MODELS[name]().modules() if isinstance(m, nn.Linear)]


def test_dropout_acts_in_training_only():
    model = mnist.SimpleMNISTNet(dropout=0.5)
    x = torch.randn(2, 1, 28, 28)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_summary_lists_layers_and_total_and_changes_nothing(capsys):
    model = mnist.SimpleMNISTNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.print_model_summary()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ConvBlock", "('N',", "8,", "26,", "26)", "88"]
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines[:-1]) == 7954
    assert "7,954 parameters" in lines[-1]
    assert model.training and same_bits(before, model.state_dict())


# ----------------------------------------------------------------------------------------- Data


def test_load_mnist_gives_uint8_images_and_int64_labels(data_dir):
    (images, labels), (test_images, test_labels) = mnist.load_mnist(data_dir)
    assert torch.equal(images, IMAGES[:400]) and torch.equal(labels, LABELS[:400])
    assert test_images.dtype == torch.uint8 and test_images.shape == (100, 1, 28, 28)
    assert test_labels.dtype == torch.int64 and test_labels.shape == (100,)


def test_load_mnist_downloads_what_is_missing(data_dir, tmp_path, monkeypatch):
    """torchvision's own download, from a server on this machine in the network's place."""
    files = {n: (data_dir / "MNIST/raw" / n).read_bytes() for n in FILES}
    packed = {f"/{name}.gz": gzip.compress(content) for name, content in files.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(packed[self.path])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    sums = [(path[1:], hashlib.md5(content).hexdigest()) for path, content in packed.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    (images, _), _ = mnist.load_mnist(tmp_path / "new")
    server.shutdown()
    assert torch.equal(images, IMAGES[:400])


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])


def test_load_mnist_without_files_or_network_says_what_to_do(tmp_path, no_network):
    with pytest.raises(ConnectionError, match=r"(?s)idx3.* into .*MNIST/raw.*refused"):
        mnist.load_mnist(tmp_path)


def test_load_mnist_with_a_file_missing_is_no_reason_to_fall_back(data_dir, no_network):
    (data_dir / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(OSError, match="MNIST/raw, whole") as caught:
        mnist.load_mnist(data_dir)
    assert not isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize("name", FILES)
def test_load_mnist_refuses_damaged_files(data_dir, name):
    path, rng = data_dir / "MNIST/raw" / name, random.Random(name)
    whole = path.read_bytes()
    flips = [bytearray(whole) for _ in range(40)]
    for damaged in flips:
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    cuts = [whole[: rng.randrange(len(whole))] for _ in range(10)]
    wrong_shape = idx(torch.zeros(10, 27, 28))
    for content in (*flips, *cuts, whole + b"\0", b"", b"<html>", wrong_shape):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"into .*MNIST/raw, whole") as caught:
            mnist.load_mnist(data_dir)
        assert not isinstance(caught.value, ConnectionError)


def test_draw_digits_gives_mnist_like_images_of_all_classes():
    assert IMAGES.dtype == torch.uint8 and IMAGES.shape == (500, 1, 28, 28)
    assert LABELS.dtype == torch.int64 and LABELS.unique().tolist() == [*range(10)]
    ink = IMAGES.float()
    assert ink.amax((1, 2, 3)).min() == 255 and 15 < ink.mean() < 50
    assert (ink.sum((1, 2, 3)) > 255 * 10).all()


def test_draw_digits_centres_by_mass():
    ink = IMAGES[:, 0].double()
    for axis in (1, 2):
        share = ink.sum(3 - axis) / ink.sum((1, 2))[:, None]
        assert ((share * torch.arange(28)).sum(1) - 13.5).abs().max() < 1


def test_draw_digits_is_deterministic_under_its_generator():
    again = mnist.draw_digits(500, torch.Generator().manual_seed(0))
    other = mnist.draw_digits(500, torch.Generator().manual_seed(1))
    assert torch.equal(IMAGES, again[0]) and torch.equal(LABELS, again[1])
    assert not torch.equal(IMAGES, other[0])


def test_augment_keeps_shape_and_range_and_differs_per_image():
    same = (IMAGES[:1].float() / 255).expand(8, 1, 28, 28)
    out = mnist.augment(same)
    assert out.shape == same.shape and out.dtype == same.dtype
    assert out.min() >= 0 and out.max() <= 1
    assert (out[1:] - out[:1]).abs().amax((1, 2, 3)).min() > 0.1


def test_augment_of_strength_zero_is_the_identity():
    images = IMAGES.float() / 255
    torch.testing.assert_close(mnist.augment(images, 0), images, rtol=0, atol=1e-4)


def test_augment_stays_within_its_limits():
    dot = torch.zeros(2000, 1, 28, 28)
    dot[:, :, 13:15, 13:15] = 1  # rotation, scale and shear leave the centre where it is
    weight = mnist.augment(dot)[:, 0]
    for axis in (1, 2):
        mass = weight.sum(3 - axis)
        shift = (mass * (torch.arange(28) - 13.5)).sum(1) / mass.sum(1)
        assert 1.8 < shift.abs().max() < 2.8  # in pixels: two, turned, scaled and sheared


def test_batches_yield_every_image_once_with_its_label():
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 1, 28, 28)
    epochs = []
    for transform in (None, lambda x: x):
        pairs = [*mnist.batches(images, torch.arange(100), 30, transform)]
        assert [len(y) for _, y in pairs] == [30, 30, 30, 10]
        epochs.append(torch.cat([y for _, y in pairs]).tolist())
        centres = torch.cat([x[:, 0, 14, 14] for x, _ in pairs]) * 0.3081 + 0.1307
        assert (centres * 255).round().int().tolist() == epochs[-1]
    assert epochs[0] == sorted(epochs[1]) and epochs[0] != epochs[1]


def test_batches_are_normalised_by_the_training_pixels_mean_and_deviation():
    x, _ = next(mnist.batches(IMAGES, LABELS, 10))
    torch.testing.assert_close(x * 0.3081 + 0.1307, IMAGES[:10] / 255)


# ------------------------------------------------------------------------------------- Training


def new_state(name="simple", lr=0.05, schedule="constant", epochs=1, steps=1):
    torch.manual_seed(0)
    return mnist.make_state(mnist.MODELS[name](), lr, schedule, epochs, steps)


@pytest.mark.parametrize(("name", "lr"), [("simple", 0.05), ("wide", 0.002)])
def test_one_batch_can_be_overfitted(name, lr):
    state, batch = new_state(name, lr), next(mnist.batches(IMAGES[:5], LABELS[:5], 5))
    first, _ = mnist.train_one_epoch(state, [batch])
    for _ in range(100):
        loss, accuracy = mnist.train_one_epoch(state, [batch])
    assert first > 1.5 and loss < 0.05 and accuracy == 1


def rates(schedule):
    state = new_state(lr=0.1, schedule=schedule, epochs=10, steps=10)
    out = []
    for _ in range(100):
        out.append(state["optimizer"].param_groups[0]["lr"])
        state["optimizer"].step()
        state["scheduler"].step()
    return out


def test_onecycle_warms_up_for_a_fifth_and_anneals_to_nothing():
    values = rates("onecycle")
    assert values[0] == pytest.approx(0.004) and values.index(max(values)) in (19, 20)
    assert max(values) == pytest.approx(0.1, rel=0.01) and values[-1] < 1e-4


def test_step_multiplies_by_seven_tenths_after_each_epoch():
    assert rates("step")[::10] == pytest.approx([0.1 * 0.7**epoch for epoch in range(10)])
    assert rates("step")[9] == pytest.approx(0.1)


def test_constant_stays():
    assert set(rates("constant")) == {0.1}


def test_training_reports_the_mean_over_images_of_loss_and_accuracy():
    model = mnist.WideMNISTNet()
    state = mnist.make_state(model, 1e-12, "constant", 1, 1)
    loss, accuracy, _ = mnist.evaluate(model, IMAGES[:100], LABELS[:100])
    trained = mnist.train_one_epoch(state, mnist.batches(IMAGES[:100], LABELS[:100], 30))
    assert trained == pytest.approx((loss, accuracy), rel=1e-4)


def test_evaluate_gives_loss_accuracy_and_logits_in_order():
    model = mnist.SimpleMNISTNet()
    loss, accuracy, logits = mnist.evaluate(model, IMAGES, LABELS)
    expected = model.eval()((IMAGES / 255 - 0.1307) / 0.3081).detach()
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)  # weights are about 0.1
    assert loss == pytest.approx(F.cross_entropy(expected, LABELS).item(), rel=1e-4)
    assert accuracy == pytest.approx((expected.argmax(1) == LABELS).float().mean().item())


def test_evaluate_changes_no_statistics():
    model = mnist.SimpleMNISTNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mnist.evaluate(model, IMAGES, LABELS)
    assert same_bits(before, model.state_dict())


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains(amp):
    torch.manual_seed(0)
    fp16 = amp == torch.float16
    state = mnist.make_state(mnist.SimpleMNISTNet(), 0.05, "constant", 1, 1, fp16)
    assert state["scaler"].is_enabled() == fp16
    batch = next(mnist.batches(IMAGES[:10], LABELS[:10], 10))
    losses = [mnist.train_one_epoch(state, [batch], amp)[0] for _ in range(15)]
    assert losses[-1] < losses[0] / 2


def test_progress_bar_tells_share_loss_rate_and_time_left(capsys):
    mnist.train_one_epoch(new_state(), mnist.batches(IMAGES[:100], LABELS[:100], 50), size=100)
    bar = capsys.readouterr().out
    assert re.search(r"\r\[#{10} {10}\]  50%  loss \d\.\d{4}  [\d,]+ images/s  \d+ s left", bar)


class Graph(TorchDispatchMode):
    """A CUDA graph's stand-in on the CPU: a replay repeats every operation on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made, self.replays = [], {}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for t in tensors:  # whatever comes from outside
            place = t.untyped_storage().data_ptr()
            if place not in self.made:
                self.before.setdefault(place, (t.detach(), t.detach().clone()))
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.made.setdefault(t.untyped_storage().data_ptr(), t)
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for t, value in self.before.values():  # a capture computes nothing
            t.copy_(value)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def train_with_graph(monkeypatch, graph, amp=None):
    stand_in = Graph()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    state = new_state(lr=0.1, schedule="onecycle", epochs=2, steps=10)
    torch.manual_seed(0)
    loader = mnist.batches(IMAGES[:290], LABELS[:290], 30, mnist.augment)
    results = mnist.train_one_epoch(state, loader, amp, graph=graph)
    return results, dict(state["model"].named_parameters()), stand_in.replays


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_captured_step_trains_as_one_launched_kernel_by_kernel(monkeypatch, amp):
    results, weights, replays = train_with_graph(monkeypatch, True, amp)
    assert replays == 9  # ten steps less the last, which is smaller
    plain, expected, _ = train_with_graph(monkeypatch, False, amp)
    assert results == plain and same_bits(weights, expected)


def test_a_step_that_can_not_be_captured_is_told_and_taken_kernel_by_kernel(monkeypatch, capsys):
    def fail(stand_in, func, *_):
        raise RuntimeError(f"{func} is not permitted\nwhen stream is capturing")

    monkeypatch.setattr(Graph, "__torch_dispatch__", fail)
    results, weights, _ = train_with_graph(monkeypatch, True)
    told = r"notice: no CUDA graph, .*: aten\S+ is not permitted when stream is capturing\n"
    assert re.fullmatch(told, capsys.readouterr().out)
    plain, expected, _ = train_with_graph(monkeypatch, False)
    assert results == plain and same_bits(weights, expected)


# ---------------------------------------------------------------------------------- Checkpoints


def history_of(*validation):
    keys = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "seconds")
    entries = [dict.fromkeys(keys, 0.5) for _ in validation]
    for i, (accuracy, loss) in enumerate(validation):
        entries[i] |= {"epoch": i + 1, "val_accuracy": accuracy, "val_loss": loss}
    return entries


def save(path, state, epoch=1, **facts):
    history = history_of(*[(0.9, 0.1)] * epoch)
    config = {"model": "simple", "amp": "off", "data": "synthetic", "val_size": 100}
    facts = {"epoch": epoch, "history": history, "config": config} | facts
    mnist.save_checkpoint(path, state, **facts)
    return path


def test_a_checkpoint_restores_every_part(tmp_path):
    state = new_state(schedule="onecycle", epochs=2, steps=3)
    mnist.train_one_epoch(state, mnist.batches(IMAGES[:90], LABELS[:90], 30))
    path, other = save(tmp_path / "a.pth", state), new_state(schedule="onecycle", epochs=2, steps=3)
    facts = mnist.load_checkpoint(path, other)
    assert facts["epoch"] == 1 and facts["config"]["model"] == "simple"
    assert same_bits(state["model"].state_dict(), other["model"].state_dict())
    assert state["scheduler"].get_last_lr() == other["scheduler"].get_last_lr()
    momenta = [s["optimizer"].state_dict()["state"][0]["momentum_buffer"] for s in (state, other)]
    assert torch.equal(*momenta)


def test_a_failed_write_leaves_the_old_file_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "file"
    mnist.write_file(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*file \(No space left on device\)"):
        mnist.write_file(path, b"new")
    assert path.read_bytes() == b"old"


class Evil:
    """Unpickled by a careless reader, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_hundreds_of_damaged_checkpoints_are_refused_or_harmless(tmp_path):
    state, rng = new_state(), random.Random(0)
    mnist.train_one_epoch(state, mnist.batches(IMAGES[:10], LABELS[:10], 10))
    weights = {name: value.clone() for name, value in state["model"].state_dict().items()}
    path = save(tmp_path / "a.pth", state)
    whole, refused, touched = path.read_bytes(), 0, tmp_path / "touched"
    damaged = [whole[: rng.randrange(len(whole))] for _ in range(80)]
    for _ in range(160):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    tensors = [
        m.start() for m in re.finditer(re.escape(weights["0.0.weight"].numpy().tobytes()), whole)
    ]
    for start in tensors:
        for offset in range(40):  # each in the middle of a weight
            flipped = bytearray(whole)
            flipped[start + offset] ^= 1
            damaged.append(bytes(flipped))
    good = torch.load(path, weights_only=True)
    remade = [good | {"model_state_dict": good["optimizer_state_dict"]}]
    remade += [{k: v for k, v in good.items() if k != key} for key in good if "accuracy" not in key]
    for change in (
        {"0.0.weight": torch.zeros(8, 1, 5, 5)},
        {"0.0.weight": weights["0.0.weight"] / 0},
    ):
        remade.append(good | {"model_state_dict": dict(weights) | change})
    remade.append(good | {"model_state_dict": mnist.WideMNISTNet().state_dict()})
    remade.append(copy.deepcopy(good))
    slots = remade[-1]["optimizer_state_dict"]["state"]
    slots[0], slots[3] = slots[3], slots[0]
    remade += [good | {"epoch": good["history"], "history": good["epoch"]}, good | {"epoch": 7}]
    remade += [
        good | {"config": {}},
        [],
        None,
        "text",
        Evil(touched),
        good | {"epoch": Evil(touched)},
    ]
    for content in remade:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        damaged.append(buffer.getvalue())
    damaged += [b"", b"text\n", whole + whole[:100], b"\0" * len(whole)]
    assert tensors and len(damaged) >= 280
    for content in damaged:
        path.write_bytes(content)
        fresh = new_state()
        try:
            mnist.load_checkpoint(path, fresh)
        except ValueError as error:
            assert str(error).startswith(f"{path} is not a usable checkpoint: ")
            assert "\n" not in str(error) and len(str(error)) < 300 + len(str(path))
            refused += 1
        else:
            assert same_bits(weights, fresh["model"].state_dict())
    assert refused > 0.9 * len(damaged) and not touched.exists()


def test_a_folder_or_a_missing_file_is_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "missing.pth"):
        with pytest.raises(OSError, match=str(path)):
            mnist.load_checkpoint(path)


def test_newest_checkpoint_goes_by_number_and_passes_over_damage(tmp_path, capsys):
    assert mnist.newest_checkpoint(tmp_path) is None
    for epoch in (9, 10, 11):
        save(tmp_path / f"mnist_model_epoch_{epoch}.pth", new_state(), epoch)
    (tmp_path / "mnist_model_epoch_11.pth").write_bytes(b"damaged")
    (tmp_path / "mnist_model_epoch_12.pth.tmp").write_bytes(b"left over")
    assert mnist.newest_checkpoint(tmp_path).name == "mnist_model_epoch_10.pth"
    assert "mnist_model_epoch_11.pth is not a usable checkpoint" in capsys.readouterr().out


def test_the_best_epoch_is_that_of_the_lowest_validation_loss():
    history = history_of((0.9, 0.3), (0.95, 0.1), (0.96, 0.2), (0.9, 0.1), (0.9, 0.2))
    assert mnist.best_epoch(history) == 4  # the later of two alike


def test_with_nothing_held_out_the_last_epoch_is_the_best():
    assert mnist.best_epoch(history_of((None, None), (None, None))) == 2


# --------------------------------------------------------------------------------------- Report


def metrics_of(history, confusion):
    config = {"model": "simple", "data": "mnist", "val_size": 5000, "device": "cpu"}
    config |= {"epochs": len(history)}
    facts = {"parameters": 7234, "config": config, "data": "mnist", "history": history}
    facts |= {"best_epoch": len(history), "confusion": confusion, "test_accuracy": 0.97}
    return facts | {"notice": "", "real_test_accuracy": None}


def known_history(epochs):
    return [
        {"epoch": e, "seconds": 2.0, "train_loss": 0.4 / e, "test_loss": 0.2 / e}
        | {"train_accuracy": 1 - 0.1 / e, "test_accuracy": 1 - 0.05 / e}
        for e in range(1, epochs + 1)
    ]


def test_the_report_of_a_known_run():
    confusion = torch.diag(torch.full((10,), 100))
    confusion[4, 4], confusion[4, 9] = 70, 30
    report = mnist.make_report(metrics_of(known_history(4), confusion.tolist()), []).splitlines()
    assert report[:3] == [
        "mnist test accuracy 97.00% (95% interval 95.75% to 97.89%)",
        "30 errors in 1,000; 7,234 parameters (simple)",
        "epoch 4 of 4, the best by validation; 8 s on cpu",
    ]
    assert report[4] == "epoch  loss: . training, o test"
    assert report[5].split() == ["0.0500", "0.2000"]
    assert report[6] == "    1 |" + " " * 61 + "o|"
    assert report[9].startswith("    4 |o") and report[9][7 + 20] == "."
    assert "    4    .    .    .    .   70    .    .    .    .   30  70.0%" in report
    assert f"prec.{'  100' * 9} 76.9  %" in report


def test_the_report_of_drawn_digits_says_so_and_why():
    metrics = metrics_of(known_history(2), torch.eye(10).int().tolist())
    notice = "SYNTHETIC: drawn digits,\nas there is no MNIST"
    metrics |= {"data": "synthetic", "notice": notice, "real_test_accuracy": 0.951}
    report = mnist.make_report(metrics, []).splitlines()
    assert report[0].startswith("synthetic test accuracy")
    assert report[3:5] == notice.splitlines()
    assert report[5].startswith("95.10% of MNIST's real test images are read right")


@pytest.mark.parametrize("epochs", [1, 15, 100])
def test_the_report_is_narrow_plain_ascii(epochs):
    mistakes = [(image, 4, 9, 0.987) for image in IMAGES[:6]]
    confusion = torch.full((10, 10), 1000).tolist()
    report = mnist.make_report(metrics_of(known_history(epochs), confusion), mistakes)
    assert report.isascii() and max(map(len, report.splitlines())) <= 79
    assert report.count("4 -> 9 98.7%") == 6


def test_a_plot_shows_both_curves_of_both_figures():
    pytest.importorskip("matplotlib")
    picture = Image.open(io.BytesIO(mnist.draw_plot(known_history(15)))).convert("RGB")
    picture = pil_to_tensor(picture)
    assert picture.shape == (3, 600, 1500)
    blue, orange = torch.tensor([[31, 119, 180], [255, 127, 14]], dtype=torch.uint8)
    for half in picture.split(750, 2):
        for colour in (blue, orange):
            assert (half == colour[:, None, None]).all(0).sum() > 100


def test_an_image_is_drawn_in_shades():
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[:, 2:4, 2:14] = 255
    drawn = mnist.draw_image(image)
    assert drawn == ["@" * 12 + " " * 12] + [" " * 24] * 11


def as_photo(image, margin=60):
    """Black ink on white paper, enlarged ten times, with a margin in pixels."""
    picture = ImageOps.invert(Image.fromarray(image[0].numpy())).resize((280, 280), Image.BICUBIC)
    return ImageOps.expand(picture, margin, 255)


def similarity(one, other):
    """The cosine between two images, a little blurred."""
    one, other = (F.avg_pool2d(i.float(), 3, 1, 1).flatten() for i in (one, other))
    return F.cosine_similarity(one, other, 0)


def guises_of(image):
    """A photo of a digit inverted, enlarged, off-centre, and as red ink on a clear ground."""
    photo = as_photo(image)
    alpha = Image.new("RGBA", photo.size, "red")
    alpha.putalpha(ImageOps.invert(photo))
    off_centre = ImageOps.expand(photo, (300, 10, 20, 200), 255)
    return ImageOps.invert(photo), photo.resize((1200, 1200)), off_centre, alpha


@pytest.mark.parametrize("number", range(10))
def test_a_digit_reads_alike_in_four_guises(tmp_path, number):
    image = IMAGES[number]
    for i, guise in enumerate(guises_of(image)):
        guise.save(tmp_path / f"{i}.png")
        seen = mnist.read_digit(tmp_path / f"{i}.png")
        assert seen.dtype == torch.uint8 and seen.shape == (1, 28, 28)
        assert similarity(seen, image) > 0.9, f"guise {i}"


@pytest.mark.parametrize("margin", [60, 700])
def test_a_digit_is_read_from_uneven_light(tmp_path, margin):
    photo = pil_to_tensor(as_photo(IMAGES[3], margin))[0] / 255
    light = torch.linspace(0.4, 1, len(photo))[:, None] * torch.linspace(0.7, 1, len(photo))
    noise = torch.randn(light.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    grey = ((photo * 0.8 + 0.2) * light + noise).clamp(0, 1) * 255
    Image.fromarray(grey.byte().numpy()).save(tmp_path / "photo.jpg")
    assert similarity(mnist.read_digit(tmp_path / "photo.jpg"), IMAGES[3]) > 0.9


def test_a_blank_image_is_refused(tmp_path):
    for shade in ("white", "black"):
        Image.new("L", (50, 70), shade).save(tmp_path / "blank.png")
        with pytest.raises(ValueError, match="nothing stands out"):
            mnist.read_digit(tmp_path / "blank.png")


# --------------------------------------------------------------------------------- Command line


@pytest.mark.parametrize(
    "flags",
    [
        ["--epochs", "0"], ["--batch-size", "0"], ["--lr", "0"], ["--lr", "nan"], ["--lr", "inf"],
        ["--runs", "-1"], ["--seed", "-1"],
        ["--seed", "9" * 20], ["--val-size", "-1"], ["--model", "huge"],
        ["--schedule", "x"], ["--amp", "fp8"], ["--device", "tpu"], ["--data", "x"],
        ["--epochs", "two"],
    ],
)  # fmt: skip
def test_bad_flags_are_bad_usage(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        mnist.main(flags)
    assert caught.value.code == 2 and flags[0] in capsys.readouterr().err


def test_each_network_has_a_learning_rate_of_its_own():
    rates = [mnist.parse_args(["--model", name]).lr for name in mnist.MODELS]
    assert rates == [0.4, 0.05] and mnist.parse_args(["--lr", "0.1"]).lr == 0.1


def test_a_run_writes_checkpoints_metrics_and_report(train, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    assert train("--epochs", 3) is None
    out = tmp_path / "out"
    names = [f"mnist_model_epoch_{n}.pth" for n in (1, 2, 3)]
    names += ["best_mnist_model.pth", "metrics.json", "report.txt"]
    names += ["training_metrics.png"] if importlib.util.find_spec("matplotlib") else []
    assert {p.name for p in out.iterdir()} == set(names)
    metrics = json.loads((out / "metrics.json").read_text())
    entry = (
        "epoch lr train_loss train_accuracy val_loss val_accuracy test_loss test_accuracy seconds"
    )
    assert [*metrics["history"][0]] == entry.split() and len(metrics["history"]) == 3
    assert metrics["parameters"] == 7954 and metrics["data"] == "mnist"
    assert torch.tensor(metrics["confusion"]).sum(1).tolist() == LABELS[400:].bincount().tolist()
    best = metrics["history"][mnist.best_epoch(metrics["history"]) - 1]
    assert metrics["best_epoch"] == best["epoch"]
    assert metrics["test_accuracy"] == pytest.approx(best["test_accuracy"])
    assert (out / "report.txt").read_text() in capsys.readouterr().out
    keys = "model_state_dict optimizer_state_dict scheduler_state_dict scaler_state_dict epoch"
    keys += " train_accuracy val_accuracy test_accuracy history config"
    checkpoint = torch.load(out / "best_mnist_model.pth", weights_only=True)
    assert set(checkpoint) == set(keys.split()) and checkpoint["epoch"] == best["epoch"]


def test_without_matplotlib_a_line_says_how_to_get_the_plot(train, tmp_path, capsys):
    assert train("--dry-run") is None
    assert "for training_metrics.png: pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "out/dry_run/training_metrics.png").exists()


def test_the_same_command_gives_the_same_bits(train, tmp_path):
    for out in ("a", "b"):
        assert train(out=out) is None
    a, b = (torch.load(tmp_path / out / "mnist_model_epoch_2.pth") for out in ("a", "b"))
    assert same_bits(a["model_state_dict"], b["model_state_dict"])
    assert without_times(a["history"]) == without_times(b["history"])


def test_the_small_network_takes_four_threads_at_most_unless_told_otherwise(train, monkeypatch):
    torch.set_num_threads(6)
    train("--dry-run")
    assert torch.get_num_threads() == 6  # as OMP_NUM_THREADS is set above
    monkeypatch.delenv("OMP_NUM_THREADS")
    train("--dry-run")
    assert torch.get_num_threads() == 4
    torch.set_num_threads(1)


def test_with_nothing_held_out_the_report_names_the_last_epoch(train, tmp_path):
    assert train("--val-size", 0) is None
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["best_epoch"] == 2 and metrics["history"][0]["val_accuracy"] is None
    assert (
        "epoch 2 of 2, the last, as nothing is held out"
        in (tmp_path / "out/report.txt").read_text()
    )


def test_runs_have_seeds_of_their_own_and_a_mean(train, tmp_path):
    assert train("--runs", 3, "--seed", 5) is None
    summary = json.loads((tmp_path / "out/metrics.json").read_text())
    scores = torch.tensor([run["test_accuracy"] for run in summary["runs"]]).double()
    assert [run["config"]["seed"] for run in summary["runs"]] == [5, 6, 7]
    assert summary["mean"] == pytest.approx(scores.mean().item())
    assert summary["std"] == pytest.approx(scores.std().item())
    assert (tmp_path / "out/seed_6/best_mnist_model.pth").exists()


def test_evaluate_reports_a_checkpoint_again(train, tmp_path, capsys):
    train("--model", "wide", "--schedule", "step", "--lr", 0.01, "--val-size", 300)
    headline = (tmp_path / "out/report.txt").read_text().splitlines()[0]
    capsys.readouterr()
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert train("--evaluate", tmp_path / "out/best_mnist_model.pth") is None
    out = capsys.readouterr().out
    assert out.startswith(headline) and " of 2, the best by validation" in out
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_evaluate_names_the_data_it_was_done_on(train, tmp_path, few_digits, capsys):
    train()
    path = tmp_path / "out/best_mnist_model.pth"
    assert train("--evaluate", path, "--data", "synthetic") is None
    assert "\nsynthetic test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("config", [None, [], {}, {"model": "simple"}])
def test_a_checkpoint_without_a_config_is_told_in_a_line(train, tmp_path, config):
    path = save(tmp_path / "a.pth", new_state(), config=config)
    for flag in ("--evaluate", "--resume"):
        assert "a.pth is not a usable checkpoint" in train(flag, path)


def test_evaluate_refuses_a_network_it_does_not_know(train, tmp_path):
    path = save(tmp_path / "a.pth", new_state(), config={"model": "resnet", "amp": "off"})
    assert "a network that is not in this file" in train("--evaluate", path)


def test_dry_run_does_a_bit_of_everything_beside_real_runs(train, tmp_path):
    assert train("--dry-run", "--epochs", 9) is None
    metrics = json.loads((tmp_path / "out/dry_run/metrics.json").read_text())
    assert len(metrics["history"]) == 1 and sum(map(sum, metrics["confusion"])) == 100


def test_predict_reads_good_files_and_names_bad_ones(train, tmp_path, capsys):
    train()
    as_photo(IMAGES[0]).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    capsys.readouterr()
    files = [tmp_path / "bad.png", tmp_path / "missing.png", tmp_path / "good.png"]
    assert "2 of 3 images could not be read" in train("--predict", *files)
    lines = capsys.readouterr().out.splitlines()
    assert f"{files[0]}: not read" in lines[0] and f"{files[1]}: not read" in lines[1]
    assert re.fullmatch(rf"{files[2]}: \d \d+\.\d%  \d \d+\.\d%  \d \d+\.\d%", lines[-1])
    assert len(lines) == 2 + 12 + 1


def test_predict_gives_one_answer_to_four_guises_of_a_digit(train, tmp_path, capsys):
    train("--epochs", 12, "--lr", 0.1)
    files = []
    for i, guise in enumerate(itertools.chain(*map(guises_of, IMAGES[:10]))):
        files.append(tmp_path / f"{i}.png")
        guise.save(files[-1])
    capsys.readouterr()
    assert train("--predict", *files) is None
    answers = re.findall(r"\.png: (\d)", capsys.readouterr().out)
    assert [set(answers[i : i + 4]) for i in range(0, 40, 4)] == [
        {str(label)} for label in LABELS[:10].tolist()
    ]


@pytest.fixture
def few_digits(monkeypatch):
    """The command line draws a hundredth of its digits."""
    draw = mnist.draw_digits
    monkeypatch.setattr(mnist, "draw_digits", lambda n, generator: draw(n // 100, generator))


def test_without_network_drawn_digits_take_mnists_place_loudly(
    train, tmp_path, no_network, few_digits, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert train("--data-dir", "empty") is None
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["data"] == "synthetic" and metrics["real_test_accuracy"] is None
    printed, report = capsys.readouterr().out, (tmp_path / "out/report.txt").read_text()
    assert report.startswith("synthetic test accuracy") and printed.startswith("!" * 79)
    for text in (printed, report):
        words = " ".join(text.split())
        assert "SYNTHETIC: drawn digits, so no figure here is one of MNIST" in words
        assert "refused" in words and "into empty/MNIST/raw" in words
        assert "{train,t10k}-{images-idx3,labels-idx1}-ubyte" in words


def test_mnist_asked_for_is_never_replaced(train, tmp_path, no_network):
    error = train("--data-dir", tmp_path / "empty", "--data", "mnist")
    assert error.startswith("mnist.py: error: ") and "MNIST/raw" in error


def test_drawn_digits_asked_for_are_tested_on_real_ones_too(
    train, tmp_path, no_network, few_digits
):
    assert train("--data", "synthetic", "--val-size", 0) is None
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    model, _ = mnist.load_model(tmp_path / "out/best_mnist_model.pth", "cpu")
    real = mnist.evaluate(model, IMAGES[400:], LABELS[400:])[1]
    assert metrics["real_test_accuracy"] == pytest.approx(real)
    assert sum(map(sum, metrics["confusion"])) == 100 and metrics["data"] == "synthetic"
    assert f"{real:.2%} of MNIST's real test images" in (tmp_path / "out/report.txt").read_text()


def test_damaged_files_are_no_reason_to_draw_digits(train, data_dir):
    (data_dir / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(b"")
    for data in ("auto", "mnist", "synthetic"):
        assert "MNIST/raw, whole" in train("--data", data)


def test_what_cannot_be_done_is_told_in_one_line(train, tmp_path):
    (tmp_path / "file").touch()
    cases = {
        "lower --batch-size": ["--batch-size", 301],
        "0 training images": ["--val-size", 400],
        "File exists": ["--out", tmp_path / "file"],
        "/proc/nowhere": ["--out", "/proc/nowhere"],
        "missing.pth": ["--evaluate", tmp_path / "missing.pth"],
        "best_mnist_model.pth": ["--predict", "x.png"],
    }
    if not torch.cuda.is_available():
        cases["there is no cuda device here"] = ["--device", "cuda"]
    for words, flags in cases.items():
        message = train(*flags)
        assert message.startswith("mnist.py: error: ") and "\n" not in message
        assert words in message
    assert not (tmp_path / "out/metrics.json").exists()


def test_a_diverging_run_stops_and_keeps_its_last_good_checkpoint(train, tmp_path):
    assert train("--schedule", "constant", "--epochs", 1) is None
    poisoned = torch.load(tmp_path / "out/mnist_model_epoch_1.pth")
    poisoned["optimizer_state_dict"]["param_groups"][0]["lr"] = 1e30
    torch.save(poisoned, tmp_path / "out/mnist_model_epoch_1.pth")
    message = train("--schedule", "constant", "--epochs", 3, "--resume")
    assert "the loss of epoch 2 is not finite: try a lower --lr" in message
    assert mnist.newest_checkpoint(tmp_path / "out").name == "mnist_model_epoch_1.pth"


def test_resume_with_nothing_there_starts_afresh_and_says_so(train, tmp_path, capsys):
    assert train("--resume") is None
    assert "resuming from nothing" in capsys.readouterr().out
    assert (tmp_path / "out/metrics.json").exists()


def test_resuming_a_finished_run_trains_nothing(train, tmp_path, capsys):
    train()
    report, before = (tmp_path / "out/report.txt").read_text(), {}
    for path in (tmp_path / "out").glob("*.pth"):
        before[path] = path.read_bytes()
    capsys.readouterr()
    assert train("--resume") is None
    out = capsys.readouterr().out
    assert report in out and "images/s" not in out
    assert before == {path: path.read_bytes() for path in before}


def test_resume_names_the_flag_that_clashes(train):
    train()
    clashes = {
        "--lr is 0.3, but was 0.4 in ": ["--lr", 0.3],
        "--batch-size is 60, but was 50": ["--batch-size", 60],
        "--epochs is 4, but was 2": ["--epochs", 4],
        "--seed is 2, but was 1": ["--seed", 2],
        "--model is wide, but was simple": ["--model", "wide"],
        "--amp is bf16, but was off": ["--amp", "bf16"],
    }
    for words, flags in clashes.items():
        assert words in train("--resume", *flags)
        assert words in train(*flags)  # nor does a new run write over an older, different one


def test_resume_takes_a_named_checkpoint_to_another_folder(train, tmp_path):
    train("--epochs", 3, out="whole")
    named = tmp_path / "whole/mnist_model_epoch_1.pth"
    assert train("--epochs", 3, "--resume", named, out="other") is None
    a, b = (torch.load(tmp_path / o / "mnist_model_epoch_3.pth") for o in ("whole", "other"))
    assert same_bits(a["model_state_dict"], b["model_state_dict"])


def test_a_constant_rate_can_be_resumed_for_longer(train, tmp_path):
    train("--schedule", "constant", "--epochs", 3, out="whole")
    train("--schedule", "constant", "--epochs", 2)
    assert train("--schedule", "constant", "--epochs", 3, "--resume") is None
    assert json.loads((tmp_path / "out/metrics.json").read_text())["config"]["epochs"] == 3
    a, b = (torch.load(tmp_path / o / "mnist_model_epoch_3.pth") for o in ("whole", "out"))
    assert same_bits(a["model_state_dict"], b["model_state_dict"])


FORKS = """
    mnist.MNIST_CRC32 = {sums}

    def start(flags, die_at=None, stderr=None, limit=None):  # torch is loaded: kills are cheap
        pid = os.fork()
        if pid:
            return pid
        faulthandler.dump_traceback_later(60, exit=True)  # a child that hangs fails the test
        sys.stdout = open(os.devnull, "w")
        sys.stderr = open(stderr, "w", buffering=1) if stderr else sys.stderr
        if limit:  # in bytes, of every file: to a program it looks like a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        fsync, calls = os.fsync, []
        def dying(file):  # in the middle of the n-th write, or right after it
            calls.append(file)
            if die_at is not None and len(calls) > die_at // 2:
                die_at % 2 and fsync(file)
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(file)
        os.fsync = dying
        try:
            error = mnist.main(flags)
        except SystemExit as stop:
            os._exit(stop.code)
        print(error or "", file=sys.stderr)
        os._exit(1 if error else 0)

    def start_two(flags, stderr=None):  # as torchrun does
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        os.environ["WORLD_SIZE"], pids = "2", []
        for rank in (0, 1):
            os.environ["RANK"] = str(rank)
            pids.append(start(flags, stderr=stderr and f"{stderr}{rank}"))
        return pids
"""


@pytest.fixture(scope="session")
def forks():
    """A process that has torch loaded and runs each script it is sent in a fork of its own."""
    server = """if True:
        import faulthandler, os, resource, signal, socket, sys, time, mnist
        sys.modules["matplotlib.figure"] = None  # no plots
        for path in sys.stdin:
            pid = os.fork()
            if not pid:
                exec(open(path.strip()).read())
                os._exit(0)
            print(os.waitpid(pid, 0)[1], flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", server], cwd=HERE, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def fork_script(forks, data_dir, tmp_path):
    def run(body):
        prelude = textwrap.dedent(FORKS).replace("{sums}", repr(mnist.MNIST_CRC32))
        (tmp_path / "script.py").write_text(prelude + textwrap.dedent(body))
        print(tmp_path / "script.py", file=forks.stdin, flush=True)
        assert forks.stdout.readline() == "0\n"

    return run


KILLS = int(os.environ.get("MNIST_KILLS", "20"))


def test_a_run_killed_again_and_again_ends_with_the_bits_of_an_unbroken_one(
    fork_script, data_dir, tmp_path
):
    flags = ["--data-dir", str(data_dir), "--device", "cpu", "--val-size", "300"]
    flags += ["--epochs", "3", "--batch-size", "50", "--out"]
    fork_script(f"""
        import random, shutil
        flags, folder, kills, rng = {flags}, {str(tmp_path)!r}, {KILLS}, random.Random(7)
        began = time.time()
        _, status = os.waitpid(start([*flags, folder + "/whole"]), 0)
        assert status == 0
        whole, done, round = time.time() - began, 0, 0
        while done < kills:  # once a run has finished, a new one takes the rest of the kills
            shutil.rmtree(folder + "/killed", ignore_errors=True)
            finished = False
            while not finished:
                in_write = rng.random() < 0.4 and done < kills
                resume = [*flags, folder + "/killed", "--resume"]
                pid = start(resume, rng.randrange(8) if in_write else None)
                if not in_write and done < kills:
                    time.sleep(rng.random() * whole)
                    os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                done += os.WIFSIGNALED(status)
                finished = os.WIFEXITED(status)
                assert not finished or os.WEXITSTATUS(status) == 0
        assert done >= kills
    """)
    for name in ("mnist_model_epoch_3.pth", "best_mnist_model.pth"):
        a, b = (torch.load(tmp_path / o / name, weights_only=True) for o in ("whole", "killed"))
        assert same_bits(a["model_state_dict"], b["model_state_dict"])
        assert a["epoch"] == b["epoch"] and a["config"] == b["config"]
        assert without_times(a["history"]) == without_times(b["history"])
        for i, part in a["optimizer_state_dict"]["state"].items():
            other = b["optimizer_state_dict"]["state"][i]
            assert torch.equal(part["momentum_buffer"], other["momentum_buffer"])
    a, b = (json.loads((tmp_path / o / "metrics.json").read_text()) for o in ("whole", "killed"))
    assert without_times(a.pop("history")) == without_times(b.pop("history")) and a == b


def test_several_runs_killed_in_the_second_go_on_with_the_second(fork_script, data_dir, tmp_path):
    flags = ["--data-dir", str(data_dir), "--device", "cpu", "--val-size", "100", "--epochs", "2"]
    flags += ["--batch-size", "50", "--runs", "3", "--out"]
    fork_script(f"""
        flags, folder = {flags}, {str(tmp_path)!r}
        assert os.waitpid(start([*flags, folder + "/whole"]), 0)[1] == 0
        # the 8th write: a run makes 5 or 6, a checkpoint an epoch, the best, metrics, report
        _, status = os.waitpid(start([*flags, folder + "/killed"], die_at=15), 0)
        assert os.WIFSIGNALED(status)
        assert os.path.exists(folder + "/killed/seed_2")
        assert not os.path.exists(folder + "/killed/seed_3")
        stamp = os.stat(folder + "/killed/seed_1/mnist_model_epoch_2.pth").st_mtime_ns
        assert os.waitpid(start([*flags, folder + "/killed", "--resume"]), 0)[1] == 0
        assert stamp == os.stat(folder + "/killed/seed_1/mnist_model_epoch_2.pth").st_mtime_ns
    """)
    a, b = (json.loads((tmp_path / o / "metrics.json").read_text()) for o in ("whole", "killed"))
    assert (a["mean"], a["std"]) == (b["mean"], b["std"])
    for one, other in zip(a["runs"], b["runs"], strict=True):
        assert without_times(one["history"]) == without_times(other["history"])


def test_signals_stop_at_once_and_say_how_to_go_on(fork_script, data_dir, tmp_path):
    flags = ["--data-dir", str(data_dir), "--device", "cpu", "--val-size", "100"]
    flags += ["--epochs", "500", "--batch-size", "50", "--out", str(tmp_path / "out"), "--resume"]
    fork_script(f"""
        out = {str(tmp_path / "out")!r}
        os.mkdir(out)
        for number in (signal.SIGINT, signal.SIGTERM):
            pid, before = start({flags}, stderr=f"{{out}}{{number:d}}"), len(os.listdir(out))
            while len(os.listdir(out)) < before + 3:
                time.sleep(0.02)
            began = time.time()
            os.kill(pid, number)
            _, status = os.waitpid(pid, 0)
            assert os.WEXITSTATUS(status) == 128 + number and time.time() - began < 2
    """)
    for number in (signal.SIGINT, signal.SIGTERM):
        errors = (tmp_path / f"out{number:d}").read_text()
        message = f"mnist.py: stopped; {tmp_path / 'out'} holds every finished epoch: the same"
        assert errors == f"\n{message} with --resume goes on\n"
    assert mnist.newest_checkpoint(tmp_path / "out") is not None


def test_a_full_disk_is_told_in_a_line_and_harms_nothing(fork_script, data_dir, tmp_path):
    flags = ["--data-dir", str(data_dir), "--device", "cpu", "--val-size", "100", "--batch-size"]
    flags += ["50", "--schedule", "constant", "--out", str(tmp_path / "out"), "--epochs"]
    assert mnist.main([*flags, "1"]) is None
    before = {p: p.read_bytes() for p in (tmp_path / "out").glob("*.pth")}
    fork_script(f"""
        flags = {[*flags, "2", "--resume"]}
        _, status = os.waitpid(start(flags, stderr={str(tmp_path / "errors")!r}, limit=20_000), 0)
        assert os.WEXITSTATUS(status) == 1
    """)
    errors = (tmp_path / "errors").read_text()
    assert re.fullmatch(r"mnist.py: error: cannot write .*pth \(File too large\).*\n", errors)
    assert before == {p: p.read_bytes() for p in (tmp_path / "out").glob("*.pth")}


def test_two_processes_train_as_one_does_and_resume_its_run(fork_script, data_dir, tmp_path):
    flags = ["--data-dir", str(data_dir), "--device", "cpu", "--val-size", "339", "--model", "wide"]
    flags += ["--batch-size", "20", "--schedule", "constant", "--lr", "0.01", "--resume"]
    fork_script(f"""
        flags, one, two = {flags}, {str(tmp_path / "one")!r}, {str(tmp_path / "two")!r}
        assert os.waitpid(start([*flags, "--out", one, "--epochs", "2"]), 0)[1] == 0
        assert os.waitpid(start([*flags, "--out", two, "--epochs", "1"]), 0)[1] == 0
        for pid in start_two([*flags, "--out", two, "--epochs", "2"]):
            assert os.waitpid(pid, 0)[1] == 0
    """)
    a, b = (torch.load(tmp_path / o / "mnist_model_epoch_2.pth") for o in ("one", "two"))
    for name, weight in a["model_state_dict"].items():
        torch.testing.assert_close(
            weight, b["model_state_dict"][name], rtol=0, atol=2e-3
        )  # weights are about 0.1
    for one, two in zip(a["history"], b["history"], strict=True):
        assert one["test_loss"] == pytest.approx(two["test_loss"], rel=1e-3)
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=0.1)
    assert len(json.loads((tmp_path / "two/metrics.json").read_text())["history"]) == 2


def test_when_one_of_two_processes_dies_the_other_says_so(fork_script, data_dir, tmp_path):
    flags = ["--data-dir", str(data_dir), "--device", "cpu", "--epochs", "500", "--val-size", "100"]
    flags += ["--batch-size", "50", "--out", str(tmp_path / "out")]
    fork_script(f"""
        out, pids = {str(tmp_path / "out")!r}, start_two({flags}, {str(tmp_path / "errors")!r})
        while not os.path.exists(out + "/mnist_model_epoch_2.pth"):
            time.sleep(0.02)
        os.kill(pids[1], signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pids[1], 0)[1])
        assert os.WEXITSTATUS(os.waitpid(pids[0], 0)[1]) == 1
    """)
    errors = (tmp_path / "errors0").read_text().splitlines()
    assert "mnist.py: error: another process has ended" in errors[-1]
    assert mnist.newest_checkpoint(tmp_path / "out") is not None


def test_help_fits_on_a_screen_and_names_every_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        mnist.main(["--help"])
    text = capsys.readouterr().out
    assert text.count("\n") <= 40 and "None" not in text and "False" not in text
    texts = dict(
        re.findall(r"^  --([\w-]+) (.*?)(?=^  --|\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    )
    without = {"resume", "evaluate", "predict", "dry-run"}
    assert {flag for flag, text in texts.items() if "default: " not in text} == without
    assert len(texts) == 17 == README.count("\n| `--")


# ------------------------------------------------------------------------------- The file itself

SOURCE = (HERE / "mnist.py").read_text()
README = (HERE / "README.md").read_text()
SAVED = "'a.pth', {'model': nn.Linear(1, 1)}, epoch=0, history=[], config={}"
KNOWN = metrics_of(known_history(3), torch.eye(10).int().tolist())
USES = [  # where to begin copying, where to stop, and a use of what was copied
    ("# -+ Model", "# -+ Data", "SimpleMNISTNet()(torch.zeros(1, 1, 28, 28))"),
    ("# -+ Data", "# -+ Tr", "next(batches(*draw_digits(9, torch.Generator()), 9, augment))"),
    ("# -+ Check", "# -+ Rep", f"save_checkpoint({SAVED}); newest_checkpoint(Path('.'))"),
    ("# -+ Report", "# -+ Comm", f"make_report({KNOWN}, [(torch.ones(1, 28, 28), 1, 2, 0.5)])"),
    ("def augment", "\n\n", "augment(torch.rand(2, 1, 28, 28))"),
    ("# How digits", "def augment", "draw_digits(9, torch.Generator())"),
    (
        "def batches",
        "\n\n",
        "next(batches(torch.ones(9, 1, 28, 28), torch.ones(9), 3, lambda x: x))",
    ),
]


def test_each_section_and_piece_works_alone_with_the_imports(tmp_path):
    cut = partial(re.search, string=SOURCE, flags=re.DOTALL | re.MULTILINE)
    imports, script = cut("^import argparse.*?(?=^# -)")[0], tmp_path / "copied.py"
    for start, end, use in USES:
        piece = cut(f"^{start}.*?(?=^{end})")[0]
        with script.open("a") as file:  # each in a namespace of its own
            print(f"exec({imports + piece + use!r}, dict())", file=file)
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)


def test_the_python_of_the_readme_runs(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, {})
        assert 0 <= float(capsys.readouterr().out) <= 1


CHANGES = re.findall(r"`python mnist.py([^`]*)`:\n\n```diff\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(("flags", "change"), CHANGES)
def test_the_changes_of_the_readme_make_it_anothers(flags, change, data_dir, tmp_path, monkeypatch):
    """Each diff, of three lines at most, applies to mnist.py, and the changed file trains."""
    lines, source = change.splitlines(), SOURCE
    assert sum(line[0] == "+" for line in lines) <= 3 and sum(line[0] == "-" for line in lines) <= 3
    old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
    new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
    assert source.count(old) == 1
    space = {"__name__": "changed"}
    exec(source.replace(old, new), space)
    monkeypatch.setitem(space, "MNIST_CRC32", mnist.MNIST_CRC32)
    if "FashionMNIST" in change:
        (data_dir / "MNIST").rename(data_dir / "FashionMNIST")
    more = ["--data-dir", data_dir, "--data", "mnist", "--device", "cpu", "--epochs", 2]
    more += ["--val-size", 100, "--batch-size", 50, "--out", tmp_path / "out"]
    assert space["main"]([*flags.split(), *map(str, more)]) is None
    history = json.loads((tmp_path / "out/metrics.json").read_text())["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]


def test_there_are_three_such_changes():
    assert len(CHANGES) == 3


# ------------------------------------------------------------------------------------ Real data

MNIST_DIR = os.environ.get("MNIST_DIR")
real = pytest.mark.skipif(not MNIST_DIR, reason="MNIST_DIR does not name a folder with MNIST/raw")


@real
def test_real_mnist_is_what_it_is_known_to_be():
    (images, labels), (test_images, test_labels) = mnist.load_mnist(MNIST_DIR)
    assert images.shape == (60000, 1, 28, 28) and test_images.shape == (10000, 1, 28, 28)
    assert images.float().div(255).mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert images.float().div(255).std().item() == pytest.approx(0.3081, abs=1e-4)
    counts = "5923 6742 5958 6131 5842 5421 5918 6265 5851 5949"
    assert " ".join(map(str, labels.bincount().tolist())) == counts
    assert len(test_labels) == 10000


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    """The folder that one epoch on real MNIST leaves behind."""
    out = tmp_path_factory.mktemp("real")
    command = [sys.executable, HERE / "mnist.py", "--data", "mnist", "--data-dir", MNIST_DIR]
    run = subprocess.run([*command, "--epochs", "1", "--out", out], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return out


@real
def test_one_epoch_of_real_mnist_reads_over_98_percent(one_epoch):
    metrics = json.loads((one_epoch / "metrics.json").read_text())
    assert metrics["data"] == "mnist" and metrics["test_accuracy"] > 0.98


@real
@pytest.mark.parametrize("guise", ["clean", "photo"])
def test_predict_reads_printed_digits_it_was_never_trained_on(one_epoch, tmp_path, capsys, guise):
    """Thirty digits in Pillow's own font, small to large, upright and turned by 10 degrees."""
    generator, files = torch.Generator().manual_seed(0), []
    for i, (size, turn) in enumerate(itertools.product(range(10), (-10, 0, 10))):
        page = Image.new("L", (200 + 30 * size, 240), 255)
        font = ImageFont.load_default(60 + 12 * size)
        if i % 10 == 1:  # the font's has a flag; MNIST's, being American, have none
            ImageDraw.Draw(page).line((100, 60, 104, 180), fill=0, width=8 + 2 * size)
        else:
            ImageDraw.Draw(page).text((60, 40), str(i % 10), fill=0, font=font)
        page = page.rotate(turn, Image.BICUBIC, fillcolor=255)
        if guise == "photo":  # grey ink, a shadow, the sensor's noise
            light = torch.linspace(0.5, 1, 240)[:, None] * torch.linspace(0.8, 1, page.width)
            noise = torch.randn(240, page.width, generator=generator) * 5
            grey = (40 + 0.8 * pil_to_tensor(page)[0]) * light + noise
            page = Image.fromarray(grey.clamp(0, 255).byte().numpy()).convert("RGB")
        files.append(tmp_path / f"{i}.png")
        page.save(files[-1])
    assert mnist.main(["--out", str(one_epoch), "--predict", *map(str, files)]) is None
    answers = re.findall(r"(\d+)\.png: (\d)", capsys.readouterr().out)
    assert len(answers) == 30
    assert sum(int(name) % 10 == int(answer) for name, answer in answers) >= 27


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
