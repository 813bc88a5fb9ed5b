# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "matplotlib"]
# ///
"""MNIST in plain PyTorch: 7,954 parameters, 99.57 ± 0.03% (10 seeds; epoch by validation).

    python mnist.py --epochs 15 --device cuda    train, test and report
    python mnist.py --resume                     continue after an interruption

Sections: Model, Data, Training, Checkpoints, Report, Run, Command line.
"""

import copy
import io
import json
import math
import os
import socket
import sys
import time
import zipfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, accelerator, nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torchvision import datasets


# ---------------------------------------------------------------------------------------- Model
def conv_block(c_in: int, c_out: int, k: int, norm: bool = True) -> nn.Sequential:
    """Return convolution, batch norm, ReLU. No padding: digits have blank margins."""
    norms = [nn.BatchNorm2d(c_out)] if norm else []
    return nn.Sequential(nn.Conv2d(c_in, c_out, k, bias=False), *norms, nn.ReLU())


class ResidualBlock(nn.Module):
    """A skip connection (He et al., 2016) around a separable convolution (Chollet, 2017)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(c, c, 5, padding=2, groups=c, bias=False)
        pointwise = nn.Conv2d(c, c, 1, bias=False)
        self.branch = nn.Sequential(depthwise, nn.BatchNorm2d(c), pointwise, nn.BatchNorm2d(c))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.branch(x))


class Network(nn.Module):
    """Layers that map normalized images (N, 1, 28, 28) to logits (N, 10)."""

    budget = 0  # parameters, if limited

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)

    def count_parameters(self) -> int:
        """Return the number of parameters, frozen ones included."""
        return sum(p.numel() for p in self.parameters())

    def print_model_summary(self) -> None:
        """Print layers, output shapes and numbers of parameters."""
        x = torch.zeros(1, 1, 28, 28)
        for layer in copy.deepcopy(self).float().cpu().eval().layers:
            x = layer(x)
            names = ", ".join(type(m).__name__ for m in layer.modules() if not list(m.children()))
            count = sum(p.numel() for p in layer.parameters())
            print(f"{names:<48}{('N', *x.shape[1:])!s:<18}{count:>8,}")
        name, total = type(self).__name__, self.count_parameters()
        budget = f" (budget: {self.budget:,}): {'met' if total < self.budget else 'EXCEEDED'}"
        print(f"{name}: {total:,} parameters{budget if self.budget else ''}")


class SimpleMNISTNet(Network):
    """A residual network of 7,954 parameters."""

    budget = 8_000

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_block(1, 8, 3),  # 8 channels of 26x26
            conv_block(8, 12, 3),  # 12 of 24x24
            nn.MaxPool2d(2),  # 12 of 12x12
            conv_block(12, 16, 3),  # 16 of 10x10
            ResidualBlock(16),
            conv_block(16, 24, 1),  # 24 of 10x10
            ResidualBlock(24),
            nn.MaxPool2d(2),  # 24 of 5x5
            ResidualBlock(24),
            ResidualBlock(24),
            nn.Dropout(0.05),
            nn.Conv2d(24, 10, 1),  # 10 of 5x5
            nn.AdaptiveAvgPool2d(1),  # 10 of 1x1
        )


class WideMNISTNet(Network):
    """A plain network of 189,984 parameters: no biases, no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_block(1, 32, 3, norm=False),  # 32 channels of 26x26
            conv_block(32, 64, 3, norm=False),  # 64 of 24x24
            conv_block(64, 128, 3, norm=False),  # 128 of 22x22
            nn.MaxPool2d(2),  # 128 of 11x11
            conv_block(128, 32, 1, norm=False),  # 32 of 11x11
            conv_block(32, 64, 3, norm=False),  # 64 of 9x9
            conv_block(64, 128, 3, norm=False),  # 128 of 7x7
            nn.AdaptiveAvgPool2d(1),  # 128 of 1x1
            nn.Conv2d(128, 10, 1, bias=False),  # 10 of 1x1
        )
        for weight in self.parameters():  # He et al. (2015): stable without norm
            nn.init.kaiming_normal_(weight, nonlinearity="relu")


MODELS = {"simple": SimpleMNISTNet, "wide": WideMNISTNet}

# ----------------------------------------------------------------------------------------- Data
DATASET = datasets.MNIST  # or FashionMNIST, KMNIST
FILES = [archive.removesuffix(".gz") for archive, _ in DATASET.resources]
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels, from 0 to 1
Split = tuple[Tensor, Tensor]  # uint8 (N, 1, H, W) and int64 (N,)


def load_mnist(data_dir: str | Path = "data") -> list[Split]:
    """Return training and test set; ConnectionError if offline."""
    raw, tensors = Path(data_dir, DATASET.__name__, "raw").expanduser(), []
    if not all((raw / name).exists() for name in FILES):
        raw.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(20)  # seconds; torchvision sets none
        try:
            with TemporaryDirectory(dir=raw.parent) as folder:
                DATASET(folder, download=True)
                for name in FILES:  # atomic
                    os.replace(Path(folder, DATASET.__name__, "raw", name), raw / name)
        except (RuntimeError, ConnectionError, TimeoutError, HTTPException) as error:
            raise ConnectionError(" ".join(f"cannot download: {error}".split())) from error
        finally:
            socket.setdefaulttimeout(None)
    try:
        for name, kind in zip(FILES, ["image", "label"] * 2, strict=True):
            tensors.append(getattr(datasets.mnist, f"read_{kind}_file")(raw / name))
            if kind == "label" and len(tensors[-1]) != len(tensors[-2]):
                raise ValueError("other labels")
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise OSError(f"{raw / name} is damaged: delete {raw} to download it again") from error
    return [(x[:, None], y) for x, y in (tensors[:2], tensors[2:])]


def augment(images: Tensor, strength: float = 1.0) -> Tensor:
    """Distort float images (N, 1, H, W), each differently; strength=0 leaves them."""
    n, pixel = len(images), 2 / images.shape[-1]  # the grid spans -1 to 1
    turn, grow, skew, right, down = strength * (2 * torch.rand(5, n, device=images.device) - 1)
    angle, scale, shear = turn * math.radians(13), 1 + grow * 0.13, skew * 0.13
    shift_x, shift_y = right * 2.6 * pixel, down * 2.6 * pixel
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), images.shape, align_corners=False)
    # Elastic distortion (Simard et al., 2003): 5x5 random displacements of about 0.3 pixels.
    field = strength * 0.3 * pixel * torch.randn(n, 2, 5, 5, device=images.device)
    field = F.interpolate(field, images.shape[2:], mode="bicubic", align_corners=True)
    return F.grid_sample(images, grid + field.permute(0, 2, 3, 1), align_corners=False)


def draw_digits(n: int, seed: int) -> Split:
    """Return n distorted digits of a 3x5 font, to try it offline."""
    font = "75557 26227 71747 71717 55711 74717 74757 71222 75757 75717"  # octal rows
    rows = torch.tensor([[int(row) for row in digit] for digit in font.split()])
    pixels = rows[:, None, :, None] >> torch.tensor([2, 1, 0]) & 1  # (10, 1, 5, 3)
    glyphs = F.pad(F.interpolate(pixels.float(), scale_factor=4), (8, 8, 4, 4))  # 28x28
    torch.manual_seed(seed)
    labels = torch.randint(10, (n,))
    images = torch.cat([augment(glyphs[chunk]) for chunk in labels.split(1000)])
    return (images * 255).byte(), labels


def batches(data: Split, size: int, *, train=False, strength=1.0) -> Iterator[Split]:
    """Yield normalized images (N <= size, 1, H, W), labels (N,); augmented to train."""
    (images, labels), n = data, len(data[1])
    if images.dtype != torch.uint8 or n < (size if train else 1):
        raise ValueError(f"got {n} {images.dtype} images, not {size} of uint8")
    order = torch.randperm(n)[: n // size * size] if train else torch.arange(n)
    for index in order.to(labels.device).split(size):
        x = images[index] / 255
        x = augment(x, strength) if train else x
        yield (x - MEAN) / STD, labels[index]


# ------------------------------------------------------------------------------------- Training
# The recipe, with the numbers in make_state: chosen on validation images.
RECIPES = {"simple": {"lr": 0.4, "strength": 1.0}, "wide": {"lr": 0.03, "strength": 1.0}}
GAMMA = {"step": 0.7, "constant": 1.0}  # factor on the rate, each epoch
PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainState(NamedTuple):
    """All that a training step updates."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler


def make_state(model, lr: float, schedule: str, epochs: int, steps: int, fp16=False) -> TrainState:
    """Return model, SGD, its schedule, and a scaler for fp16."""
    weights, device = list(model.parameters()), next(model.parameters()).device.type
    sgd = SGD(weights, lr, momentum=0.9, weight_decay=5e-5, nesterov=True, fused=device != "mps")
    # Or else, if fp16 overflows in step one, fused SGD would read unset momentum.
    for weight in weights:
        sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    if schedule == "onecycle":  # Smith and Topin (2018)
        total = max(10, epochs * steps + 1)  # fewer break its warm-up
        scheduler = lr_scheduler.OneCycleLR(sgd, lr, total, pct_start=0.2, cycle_momentum=False)
    else:
        scheduler = lr_scheduler.StepLR(sgd, steps, GAMMA[schedule])
    return TrainState(model, sgd, scheduler, torch.amp.GradScaler(device, enabled=fp16))


def train_one_epoch(state: TrainState, loader: Iterable, amp=None, total=0) -> tuple[float, float]:
    """Train; return mean loss and accuracy. With a total of steps, draw a bar."""
    model, optimizer, scheduler, scaler = state
    model.train()
    loss_sum, correct, seen = 0.0, 0.0, 0  # .item() would sync each step
    for step, (x, y) in enumerate(loader, 1):
        with torch.autocast(x.device.type, amp, enabled=amp is not None):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        loss_sum += loss.detach() * len(y)
        correct += (logits.argmax(1) == y).sum()
        seen += len(y)
        if total and getattr(sys.stdout, "isatty", bool)() and (step % 20 == 0 or step == total):
            bar = "#" * (8 * step // total)  # fits 40 columns
            bar = f"[{bar:8}] loss {loss_sum / seen:.4f} accuracy {correct / seen:.2%}"
            print(bar, end="\r", flush=True)
    return float(loss_sum) / seen, float(correct) / seen


@torch.no_grad()
def evaluate(model: nn.Module, data: Split) -> tuple[float, float, Tensor]:
    """Return mean loss, accuracy and logits (N, 10), without autocast."""
    model.eval()
    logits = torch.cat([model(x) for x, _ in batches(data, 500)])
    accuracy = (logits.argmax(1) == data[1]).sum().item() / len(logits)
    return F.cross_entropy(logits, data[1]).item(), accuracy, logits


# ---------------------------------------------------------------------------------- Checkpoints
EPOCH, BEST = "mnist_model_epoch_", "best_mnist_model.pth"


def write_file(path: Path, content: bytes, new: bool = False) -> None:
    """Write a whole file or none; with new=True, never replace one."""
    with TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        written = Path(folder, path.name)
        written.write_bytes(content)
        try:
            (os.link if new else os.replace)(written, path)  # links replace nothing
        except OSError as e:
            if not new or path.exists():
                raise OSError(f"cannot write {path}: {'another run has' if new else e}") from e
            os.replace(written, path)  # a file system without links


def save_checkpoint(path: str | Path, history: list, config: dict, new=False, **parts) -> None:
    """Save the state of model=... and others, with plain history and config."""
    content = {f"{name}_state_dict": part.state_dict() for name, part in parts.items()}
    weights, buffer = content["model_state_dict"], io.BytesIO()
    weights = {k: w.contiguous() for k, w in weights.items()}
    content |= history[-1] | {"model_state_dict": weights, "history": history, "config": config}
    torch.save(content, buffer)
    write_file(Path(path), buffer.getvalue(), new)


def load_checkpoint(path: str | Path, **parts: object) -> dict:
    """Restore model=... and others, executing no code; OSError if damaged."""
    content = Path(path).read_bytes()
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch.load skips CRCs
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if damaged or not all(w.isfinite().all() for w in saved["model_state_dict"].values()):
            raise ValueError("damage or NaN")
        for name, part in parts.items():
            part.load_state_dict(saved[f"{name}_state_dict"])
    except Exception as error:  # damage can fail in any way
        raise OSError(f"{path} is damaged, or not a checkpoint of this network") from error
    return saved


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the last epoch, else the best, if any."""
    numbers = [p.stem.removeprefix(EPOCH) for p in folder.glob(f"{EPOCH}*.pth")]
    epochs = [int(n) for n in numbers if n.isdecimal() and n == str(int(n))]
    newest = folder / (f"{EPOCH}{max(epochs)}.pth" if epochs else BEST)
    return newest if newest.exists() else None


def keep_best(folder: Path, history: list[dict]) -> None:
    """Copy the checkpoint of the lowest validation loss to BEST."""
    best = min(range(len(history)), key=lambda i: history[i]["val_loss"]) + 1
    sources = [folder / f"{EPOCH}{best}.pth", newest_checkpoint(folder)]
    sources = sources if best == len(history) else [folder / BEST, *sources]
    write_file(folder / BEST, next(p for p in sources if p.exists()).read_bytes())


# --------------------------------------------------------------------------------------- Report
def make_table(history: list[dict]) -> list[str]:
    """Return a header and a row an epoch: * is the best so far, # is 0.2%."""
    lines = ["epoch     lr           train             val            test seconds  val error"]
    for epoch, m in enumerate(history, 1):
        best = all(m["val_loss"] < earlier["val_loss"] for earlier in history[: epoch - 1])
        line = f"{epoch:4}{'*' if best else ' '} {m['lr']:6.4f}"
        for split in ("train", "val", "test"):
            line += f" {m[split + '_loss']:7.4f} {m[split + '_accuracy']:7.2%}"
        bar = "#" * min(9, round((1 - m["val_accuracy"]) / 0.002))
        lines.append(f"{line} {m['seconds']:7.1f}  {bar}")
    return lines


def make_report(m: dict) -> str:
    """Return the result and the confusion matrix as text."""
    note = ", of SYNTHETIC digits, not MNIST" if m["data"] == "synthetic" else ""
    confusion, labels = m["confusion"], range(len(m["confusion"]))
    lines = [
        f"{m['data']} test accuracy {m['test_accuracy']:.2%}{note}",
        f"{m['parameters']:,} parameters, weights of epoch {m['best_epoch']}",
        f"\ntrue  predicted{'':{5 * len(labels) - 9}}recall",
        "     " + "".join(f"{label:5}" for label in labels),
    ]
    for label, row in enumerate(confusion):
        cells = "".join(f"{count or '.':>5}" for count in row)
        lines.append(f"{label:5}{cells} {row[label] / max(1, sum(row)):6.1%}")
    return "\n".join(lines)


def draw_plot(history: list[dict]) -> bytes:
    """Return a PNG of loss and accuracy by epoch; needs matplotlib."""
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(10, 4), layout="constrained"), io.BytesIO()
    epochs = range(1, len(history) + 1)
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in ("train", "val", "test"):
            axes.plot(epochs, [m[f"{split}_{key}"] for m in history], ".-", label=split)
        axes.set(xlabel="epoch", ylabel=key, xticks=epochs[:: 1 + len(epochs) // 20])
        axes.legend()
    figure.savefig(buffer, dpi=150)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------ Run
ERROR = "mnist.py: error:"
SETTINGS = {  # of a run, kept in its checkpoints: choices or type, default, help
    "model": ([*MODELS], "simple", "network (simple)"),
    "data": (["auto", "mnist", "synthetic"], "mnist", "dataset (auto)"),
    "val_size": (int, 5000, "validation images (5000)"),
    "epochs": (int, 15, "epochs (15)"),
    "batch_size": (int, 64, "batch size (64, on CUDA 128)"),
    "lr": (float, 0.0, "peak learning rate (0.4, wide 0.03)"),
    "schedule": (["onecycle", *GAMMA], "onecycle", "rate schedule (onecycle)"),
    "seed": (int, 1, "random seed (1)"),
    "amp": (["auto", *PRECISIONS], "off", "mixed precision (auto: on CUDA)"),
}


def is_valid(name: str, value: object) -> bool:
    """Return whether it is a choice, or a number above 0; any seed."""
    kind = SETTINGS[name][0]
    if isinstance(kind, list):
        return value in kind and value != "auto"
    return type(value) is kind and (name == "seed" or 0 < value < math.inf)


def read_settings(path: Path) -> dict:
    """Return a checkpoint's settings; OSError if they are not a run's."""
    saved = load_checkpoint(path)
    with suppress(Exception):  # a foreign file can fail in any way
        config, history = saved["config"], saved["history"]
        valid = config.keys() == SETTINGS.keys() and all(map(is_valid, config, config.values()))
        valid &= all(type(n) in (int, float) and n >= 0 for m in history for n in m.values())
        if valid and make_table(history) and history[-1].items() <= saved.items():
            return config
    raise OSError(f"{path} is damaged, or not a checkpoint of this network with {[*SETTINGS]}")


def open_run(args: Namespace) -> Path | None:
    """Fill in the settings; return the checkpoint to test or resume."""
    path = Path(args.evaluate).expanduser() if args.evaluate else newest_checkpoint(args.out)
    if args.data in (None, "auto") and not path:
        try:
            load_mnist(args.data_dir)
        except ConnectionError as error:
            args.data, line = "synthetic", "!" * 79
            print(f"{line}\nSYNTHETIC digits, not MNIST: only a trial")
            print(f"{str(error)[-79:]}\nput it in {args.data_dir!a}/{DATASET.__name__}/raw\n{line}")
    if args.data == "synthetic" and not args.evaluate and args.out.name != "synthetic":
        args.out /= "synthetic"
        path = newest_checkpoint(args.out)
    if path and not (args.resume or args.evaluate):
        sys.exit(f"{ERROR} {args.out} holds a run: add --resume, or choose another --out")
    given = {k: v for k, v in vars(args).items() if v not in (None, "auto")}
    saved = read_settings(path) if path else {}
    for name, old in saved.items() if not args.evaluate else ():
        new = given.get(name, old)
        if new != old and not (name == "epochs" and new > old and saved["schedule"] in GAMMA):
            flag = f"--{name.replace('_', '-')}"
            sys.exit(f"{ERROR} {flag} is {new}, but the run in {args.out} has {old}: leave it out")
    settings = {name: row[1] for name, row in SETTINGS.items()}
    settings["lr"] = RECIPES[args.model or "simple"]["lr"]
    if args.device == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        settings |= {"batch_size": 128, "amp": "bf16" if bf16 else "fp16"}
    vars(args).update(settings | saved | given)
    return path


def get_data(args: Namespace) -> dict[str, Split]:
    """Return the splits on the device; for a dry run, a batch of each."""
    if args.data == "synthetic":
        train, test = draw_digits(6_000, seed=0), draw_digits(1_000, seed=1)
    else:
        train, test = load_mnist(args.data_dir)
    n = max(0, len(train[1]) - args.val_size)
    if n < args.batch_size and not args.evaluate:
        sys.exit(f"{ERROR} --batch-size {args.batch_size} is over the {n} that --val-size leaves")
    splits = {"train": [t[:n] for t in train], "val": [t[n:] for t in train], "test": test}
    limit = args.batch_size if args.dry_run and not args.evaluate else None
    return {k: tuple(t[:limit].to(args.device) for t in split) for k, split in splits.items()}


def train(args: Namespace, model: nn.Module, data: dict, path: Path | None) -> list[dict]:
    """Train the remaining epochs, from path if any; return history."""
    steps, amp, history = len(data["train"][1]) // args.batch_size, PRECISIONS[args.amp], []
    state = make_state(model, args.lr, args.schedule, args.epochs, steps, args.amp == "fp16")
    parts, config = state._asdict(), {k: getattr(args, k) for k in SETTINGS}
    if path:
        history = load_checkpoint(path, **parts)["history"]
        state.optimizer.param_groups[0]["fused"] = args.device != "mps"
        for w, s in state.optimizer.state.items():  # laid out like w
            s["momentum_buffer"] = torch.empty_like(w).copy_(s["momentum_buffer"])
        keep_best(args.out, history)  # in case of a kill
    print(*make_table(history), sep="\n", flush=True)
    for epoch in range(len(history) + 1, 2 if args.dry_run else args.epochs + 1):
        # A seed for each epoch: a resumed run draws the same numbers.
        torch.manual_seed((args.seed * 10_000 + epoch) % 2**64)
        start, m = time.perf_counter(), {"epoch": epoch, "lr": state.scheduler.get_last_lr()[0]}
        strength = RECIPES[args.model]["strength"] * (1 - 0.7 * (epoch - 0.5) / args.epochs)
        loader = batches(data["train"], args.batch_size, train=True, strength=strength)
        m["train_loss"], m["train_accuracy"] = train_one_epoch(state, loader, amp, steps)
        m["val_loss"], m["val_accuracy"], _ = evaluate(model, data["val"])
        m["test_loss"], m["test_accuracy"], _ = evaluate(model, data["test"])
        m["seconds"] = time.perf_counter() - start
        if not math.isfinite(m["train_loss"] + m["val_loss"] + m["test_loss"]):
            sys.exit(f"{ERROR} the loss of epoch {epoch} is not finite: try a lower --lr")
        history.append(m)
        print(make_table(history)[-1], flush=True)
        save_checkpoint(args.out / f"{EPOCH}{epoch}.pth", history, config, new=True, **parts)
        keep_best(args.out, history)
    return history


def report(args: Namespace, model: nn.Module, test: Split, path: Path, history: list) -> None:
    """Test a checkpoint; print the report and, after a run, save it."""
    best_epoch = len(load_checkpoint(path, model=model)["history"])
    _, accuracy, logits = evaluate(model, test)
    n = logits.shape[1]
    confusion = (test[1] * n + logits.argmax(1)).bincount(minlength=n * n).view(n, n).tolist()
    metrics = {"data": args.data, "parameters": model.count_parameters(), "history": history}
    metrics |= {"test_accuracy": accuracy, "best_epoch": best_epoch, "confusion": confusion}
    metrics["config"] = {k: getattr(args, k) for k in SETTINGS}
    text = make_report(metrics)
    if args.evaluate:
        return print(text)
    write_file(args.out / "metrics.json", json.dumps(metrics, indent=1).encode())
    write_file(args.out / "report.txt", "\n".join([*make_table(history), "", text, ""]).encode())
    try:
        write_file(args.out / "training_metrics.png", draw_plot(history))
    except Exception as error:  # no matplotlib, or broken
        print(f"no plot: {error}")
    print("\ndry run: all parts work" if args.dry_run else f"\n{text}\n\nfiles: {str(args.out)!a}")


def run(args: Namespace) -> None:
    """Train or resume a run, or test a checkpoint; report."""
    path, history = open_run(args), []
    data = get_data(args)
    torch.manual_seed(args.seed * 10_000 % 2**64)
    # channels_last is faster on a CPU, not on CUDA; on mps it has bugs.
    layout = torch.channels_last if args.device == "cpu" else torch.contiguous_format
    model = MODELS[args.model]().to(args.device, memory_format=layout)
    if not args.evaluate:
        where = "resuming" if path else "nothing to resume in" if args.resume else "new run in"
        print(f"{args.data}:", *(f"{len(y):,} {split}" for split, (_, y) in data.items()))
        print(f"{args.device}, amp {args.amp}, seed {args.seed}, {where} {str(args.out)!a}")
        model.print_model_summary()
        args.out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=args.out).close()  # unwritable: fail now
        history, path = train(args, model, data, path), args.out / BEST
    report(args, model, data["test"], path, history)


# --------------------------------------------------------------------------------- Command line
def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the flags; settings not given are None."""
    parser = ArgumentParser("mnist.py")
    add = parser.add_argument
    for name, (kind, _, text) in SETTINGS.items():
        options = {"choices": kind} if isinstance(kind, list) else {"type": kind, "metavar": "N"}
        add(f"--{name.replace('_', '-')}", **options, help=text)
    add("--data-dir", default="data", metavar="DIR", help="dataset root (data)")
    add("--device", default="auto", help="cpu, cuda, mps ... (auto)")
    add("--out", default="model_checkpoints", metavar="DIR", help="output folder (%(default)s)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--evaluate", metavar="CKPT", help="test a checkpoint only")
    add("--dry-run", action="store_true", help="one batch of each phase")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        given = name in SETTINGS and value not in (None, "auto")
        if value == "" or (given and not is_valid(name, value)):
            parser.error(f"--{name.replace('_', '-')} cannot be {value!r}")
    best = accelerator.current_accelerator().type if accelerator.is_available() else "cpu"
    args.device = best if args.device == "auto" else args.device
    if args.device not in ("cpu", best):
        sys.exit(f"{ERROR} no {args.device} device available: leave out --device")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run a command line; SystemExit if it fails. Seeds torch."""
    args = parse_args(argv)
    try:
        with TemporaryDirectory() if args.dry_run else nullcontext(args.out) as folder:
            args.out = Path(folder).expanduser()
            run(args)
    except KeyboardInterrupt:
        print("\nmnist.py: stopped: to continue a run, add --resume", file=sys.stderr)
        sys.exit(130)
    except (OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"{ERROR} {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
