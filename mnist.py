# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "matplotlib"]
# ///
"""MNIST in plain PyTorch: 7,954 parameters, 99.57 ± 0.04% (10 seeds; epoch by validation).

    python mnist.py --epochs 15 --device cuda    train, test and report on a GPU
    python mnist.py --resume                     go on after an interruption

Sections: Model, Data, Training, Checkpoints, Report, Run, Command line.
"""

import io
import json
import math
import os
import shutil
import socket
import sys
import time
import zipfile
from argparse import ArgumentParser, Namespace
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from textwrap import fill

# Before torch is loaded: idle threads that spin for long slow a busy machine tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
import torch.nn.functional as F
from torch import Tensor, accelerator, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torchvision import datasets


# ---------------------------------------------------------------------------------------- Model
def conv_block(c_in: int, c_out: int, k: int, norm: bool = True) -> nn.Sequential:
    """Return convolution, batch norm, ReLU. No padding: digits have margins."""
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
    """self.layers, from normalized images (N, 1, 28, 28) to logits (N, 10)."""

    budget = 0  # parameters must be fewer; 0: no limit

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)

    def count_parameters(self) -> int:
        """Return the number of parameters, frozen ones included."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def print_model_summary(self) -> None:
        """Print layers, output shapes and numbers of parameters."""
        first, training = next(self.parameters()), self.training
        x = first.new_zeros(1, first.shape[1] if first.dim() == 4 else 1, 28, 28)
        for layer in self.eval().layers:
            x = layer(x)
            names = ", ".join(type(m).__name__ for m in layer.modules() if not list(m.children()))
            count = sum(p.numel() for p in layer.parameters())
            print(f"{names:<48}{('N', *x.shape[1:])!s:<18}{count:>8,}")
        self.train(training)

        total = self.count_parameters()
        budget = f" (budget: {self.budget:,}): {'met' if total < self.budget else 'EXCEEDED'}"
        print(f"{type(self).__name__}: {total:,} parameters{budget if self.budget else ''}")


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
        # He et al. (2015): stable without norm.
        for weight in self.parameters():
            nn.init.kaiming_normal_(weight, nonlinearity="relu")


MODELS = {"simple": SimpleMNISTNet, "wide": WideMNISTNet}

# ----------------------------------------------------------------------------------------- Data
DATASET = datasets.MNIST  # or FashionMNIST, KMNIST
NAME = DATASET.__name__.lower()
MEAN, STD = 0.1307, 0.3081  # of MNIST
# Images (N, 1, H, W), uint8 until batches makes them float; int64 labels (N,).
Split = tuple[Tensor, Tensor]


def download_mnist(raw: Path) -> None:
    """Download into raw, whole files or none; ConnectionError if offline."""
    raw.mkdir(parents=True, exist_ok=True)
    folder = mkdtemp(dir=raw.parent)
    try:
        DATASET(folder, download=True)
        for path in Path(folder, DATASET.__name__, "raw").glob("*ubyte"):
            os.replace(path, raw / path.name)
    except (RuntimeError, ConnectionError, TimeoutError) as error:
        files = ", ".join(Path(name).stem for name, _ in DATASET.resources)
        raise ConnectionError(f"No download: put {files} into {raw}. {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_mnist(data_dir: str | Path = "data") -> list[Split]:
    """Return training and test set; OSError if unreadable or offline."""
    raw = Path(data_dir).expanduser() / DATASET.__name__ / "raw"
    if not all((raw / name).with_suffix("").exists() for name, _ in DATASET.resources):
        download_mnist(raw)

    try:
        sets = [DATASET(raw.parents[1], train=train) for train in (True, False)]
        for s in sets:
            if len(s.data) != len(s.targets) or s.targets.max() >= len(s.classes):
                raise ValueError(f"one label an image, below {len(s.classes)}")
    except Exception as error:  # damage can raise anything
        raise OSError(f"cannot read {raw}; if damaged, delete it: {error!r}") from error
    return [(s.data[:, None], s.targets) for s in sets]


def augment(images: Tensor, strength: float = 1.0) -> Tensor:
    """Turn, scale, shear, shift and bend float images (N, 1, H, W) at random.

    At strength 1 by up to 13 degrees, 13%, 13% and 2.6 pixels; at 0 not at all.
    """
    n, pixel = len(images), 2 / images.shape[-1]
    # The grid says, from -1 to 1, where each pixel is read.
    turn, spread, skew, dx, dy = strength * (2 * torch.rand(5, n, device=images.device) - 1)
    angle, scale, shear = turn * math.radians(13), 1 + spread * 0.13, skew * 0.13
    shift_x, shift_y = dx * 2.6 * pixel, dy * 2.6 * pixel
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), images.shape, align_corners=False)

    # Elastic distortion (Simard et al., 2003): 5x5 random displacements of about 0.3 pixels.
    field = strength * 0.3 * pixel * torch.randn(n, 2, 5, 5, device=images.device)
    field = F.interpolate(field, images.shape[2:], mode="bicubic", align_corners=True)
    return F.grid_sample(images, grid + field.permute(0, 2, 3, 1), align_corners=False)


def draw_digits(n: int, seed: int) -> Split:
    """Return n distorted digits of a tiny font. Seeds torch."""
    font = "75557 26227 71747 71717 55711 74717 74757 71222 75757 75717"
    rows = torch.tensor([[int(row) for row in digit] for digit in font.split()])
    pixels = (rows[:, None, :, None] >> torch.tensor([2, 1, 0])) & 1  # (10, 1, 5, 3)
    glyphs = F.pad(F.interpolate(pixels.float(), scale_factor=4), (8, 8, 4, 4))
    torch.manual_seed(seed)
    labels = torch.randint(10, (n,))
    images = [augment(glyphs[part], 3.0) for part in labels.split(1000)]
    return (torch.cat(images) * 255).byte(), labels


def batches(data: Split, size: int, train=False, strength=1.0) -> Iterator[Split]:
    """Yield normalized float images (size, 1, H, W) and labels (size,).

    train=True shuffles, augments, and leaves out an incomplete last batch.
    """
    images, labels = data
    n = len(labels)
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    if n < (size if train else 1):
        raise ValueError(f"{n} images do not fill a batch of {size}")

    order = torch.randperm(n)[: n // size * size] if train else torch.arange(n)
    # A GPU augments 50 batches in the time of one.
    chunk = 50 * size if images.is_cuda else size
    for index in order.to(labels.device).split(chunk):
        x = images[index] / 255
        if train:
            x = augment(x, strength)
        x = (x - MEAN) / STD
        yield from zip(x.split(size), labels[index].split(size), strict=True)


# ------------------------------------------------------------------------------------- Training
# The recipe, with the numbers in make_state: chosen on validation images.
RECIPES = {"simple": {"lr": 0.4, "strength": 1.0}, "wide": {"lr": 0.1, "strength": 2.0}}
GAMMA = {"step": 0.7, "constant": 1.0}  # the rate's factor each epoch
PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# All that a training step updates.
TrainState = namedtuple("TrainState", ["model", "optimizer", "scheduler", "scaler"])


def make_state(
    model: nn.Module, lr: float, schedule: str, epochs: int, steps: int, fp16=False
) -> TrainState:
    """Return what to train with; lr is the peak, steps are an epoch's."""
    sgd = SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-5, nesterov=True)
    if schedule == "onecycle":  # Smith and Topin (2018)
        total = max(10, epochs * steps + 1)  # it fails with fewer
        scheduler = OneCycleLR(sgd, lr, total, pct_start=0.2, cycle_momentum=False)
    else:
        scheduler = StepLR(sgd, steps, GAMMA[schedule])
    device = next(model.parameters()).device.type
    return TrainState(model, sgd, scheduler, torch.amp.GradScaler(device, enabled=fp16))


def record(step: Callable, *inputs: Tensor) -> Callable:
    """Return step as a CUDA graph: kernels run again, Python does not."""
    recorded, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(*recorded)

    def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
        if inputs[0].shape != recorded[0].shape:
            return step(*inputs)
        for old, new in zip(recorded, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return outputs

    return replay


def train_one_epoch(
    state: TrainState, loader: Iterable[Split], amp=None, total=0, graph=False, title=""
) -> tuple[float, float]:
    """Train on each batch of images and labels; return mean loss and accuracy.

    amp: autocast's dtype. total: number of steps, for a bar in a terminal, after title.
    graph: on CUDA, replay forward and backward pass.
    """
    model, optimizer, scheduler, scaler = state
    model.train()

    def forward_backward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, amp, enabled=amp is not None):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        optimizer.zero_grad(set_to_none=False)  # a graph keeps its gradients
        scaler.scale(loss).backward()
        return loss.detach() * len(y), (logits.argmax(1) == y).sum()

    # Sums stay on the device: .item() would wait for it in each step.
    loss_sum, correct, seen = 0.0, 0.0, 0
    for step, (x, y) in enumerate(loader, 1):
        if graph and step == 4:  # three set things up
            forward_backward = record(forward_backward, x, y)
        loss, hits = forward_backward(x, y)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

        loss_sum += loss
        correct += hits
        seen += len(y)
        if total and os.isatty(1) and (step % 20 == 0 or step == total):
            bar = f"{title} [{'#' * (5 * step // total):5}] loss {loss_sum / seen:.4f}"
            print(f"{bar} acc {correct / seen:.2%}", end="\r", flush=True)
    return float(loss_sum) / seen, float(correct) / seen


@torch.no_grad()
def evaluate(model: nn.Module, data: Split) -> tuple[float, float, Tensor]:
    """Return mean loss, accuracy and logits (N, 10), without autocast."""
    model.eval()
    logits = torch.cat([model(x) for x, _ in batches(data, 2500 if data[0].is_cuda else 500)])
    accuracy = (logits.argmax(1) == data[1]).sum().item() / len(logits)
    return F.cross_entropy(logits, data[1]).item(), accuracy, logits


# ---------------------------------------------------------------------------------- Checkpoints
EPOCH, BEST = "mnist_model_epoch_", "best_mnist_model.pth"


def write_file(path: Path, content: bytes, new: bool = False) -> None:
    """Write a whole file or none; if new, FileExistsError if there is one."""
    written = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with written.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut leaves an empty file

        if new and path.exists():
            raise FileExistsError(f"another run has written {path}")
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


def save_checkpoint(path, history: list, config: dict, new=False, **parts) -> None:
    """Save history, config, and the state of model=... and other parts."""
    for name, value in (config | history[-1]).items():
        if type(value) not in (bool, int, float, str, list, dict, type(None)):
            raise TypeError(f"{name} must be plain numbers, text or lists: {value!r}")
    # As metrics.json will have them: what JSON cannot hold fails here.
    history, config = json.loads(json.dumps([history, config]))

    content = {f"{name}_state_dict": part.state_dict() for name, part in parts.items()}
    content |= history[-1] | {"history": history, "config": config}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(Path(path), buffer.getvalue(), new)


def load_checkpoint(path: str | Path, **parts: object) -> dict:
    """Return a checkpoint, and restore model=... and other parts from it.

    Runs none of its code. OSError if it is missing, damaged or does not fit.
    """
    content = Path(path).expanduser().read_bytes()
    try:
        # torch.load does not check the CRCs of the zip.
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        finite = all(w.isfinite().all() for w in saved["model_state_dict"].values())
        consistent = len(saved["history"]) == saved["epoch"] and type(saved["config"]) is dict
        if damaged or not finite or not consistent:
            raise ValueError("checksum or weights")
        for name, part in parts.items():
            part.load_state_dict(saved[f"{name}_state_dict"])
    except Exception as error:
        raise OSError(f"{path} is damaged or does not fit: {error!r:.150}") from error
    return saved


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the last epoch, else the best, if any."""
    numbers = [p.stem.removeprefix(EPOCH) for p in folder.glob(f"{EPOCH}*.pth")]
    epochs = [n for n in numbers if n.isdecimal()]  # no copy such as "2 (1)"
    newest = folder / (f"{EPOCH}{max(epochs, key=int)}.pth" if epochs else BEST)
    return newest if newest.exists() else None


def keep_best(folder: Path, history: list[dict]) -> None:
    """Copy the checkpoint of the lowest validation loss to BEST."""
    best = min(history, key=lambda m: m["val_loss"])["epoch"]
    source = folder / f"{EPOCH}{best}.pth"
    if source.exists():  # not deleted by hand
        write_file(folder / BEST, source.read_bytes())


# --------------------------------------------------------------------------------------- Report
def make_table(history: list[dict]) -> list[str]:
    """Return a header and rows; * is the best so far, # 0.2% of error."""
    lines = ["epoch     lr           train             val            test seconds  val error"]
    lowest = math.inf
    for m in history:
        line = f"{m['epoch']:4}{'*' if m['val_loss'] < lowest else ' '} {m['lr']:6.4f}"
        for split in ("train", "val", "test"):
            line += f" {m[split + '_loss']:7.4f} {m[split + '_accuracy']:7.2%}"
        bar = "#" * min(9, round((1 - m["val_accuracy"]) / 0.002))
        lines.append(f"{line} {m['seconds']:7.1f}  {bar}")
        lowest = min(lowest, m["val_loss"])
    return lines


def make_report(metrics: dict) -> str:
    """Return the result and the confusion matrix as text."""
    confusion = metrics["confusion"]
    lines = [
        f"{metrics['data']} test accuracy {metrics['test_accuracy']:.2%}",
        f"{metrics['parameters']:,} parameters, weights of epoch {metrics['best_epoch']}",
        "",
        "true  predicted".ljust(6 + 5 * len(confusion)) + "recall",
        "     " + "".join(f"{label:5}" for label in range(len(confusion))),
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
        for split, style in (("train", ".:"), ("val", ".-"), ("test", ".--")):
            axes.plot(epochs, [m[f"{split}_{key}"] for m in history], style, label=split)
        axes.set(xlabel="epoch", ylabel=key, xticks=epochs[:: 1 + len(epochs) // 20])
        axes.legend()
    figure.savefig(buffer, dpi=150)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------ Run
# Flags of a command. All others are settings of the run, saved in its checkpoints.
COMMAND = ("data_dir", "device", "out", "resume", "evaluate", "dry_run")


def fail(message: object) -> None:
    """Exit with status 1 and one line."""
    sys.exit(f"mnist.py: error: {' '.join(str(message).split())}")


def load_data(args: Namespace) -> tuple[str, Split, Split]:
    """Return the name of the data, and training and test set."""
    if args.data != "synthetic":
        try:
            return NAME, *load_mnist(args.data_dir)
        except ConnectionError as error:
            if args.data != "auto":
                raise
            print(f"\n!!! SYNTHETIC digits, only a trial !!!\n{error}\n")
    return "synthetic", draw_digits(11_000, seed=0), draw_digits(1_000, seed=1)


def split_data(args: Namespace, known: Split, test: Split) -> dict[str, Split]:
    """Return the splits on the device; for a dry run, a batch of each."""
    n = max(0, len(known[1]) - args.val_size)
    if n < args.batch_size and not args.evaluate:
        fail(f"--val-size leaves {n} images, fewer than --batch-size")

    splits = {"train": [t[:n] for t in known], "val": [t[n:] for t in known], "test": test}
    limit = args.batch_size if args.dry_run and not args.evaluate else None
    return {k: tuple(t[:limit].to(args.device) for t in v) for k, v in splits.items()}


def train(args: Namespace, config: dict, model: Network, data: dict, path=None) -> list:
    """Start, or go on from path; train; return the history."""
    steps = len(data["train"][1]) // args.batch_size
    state = make_state(model, args.lr, args.schedule, args.epochs, steps, args.amp == "fp16")
    parts = state._asdict()
    saved = load_checkpoint(path, **parts) if path else {"history": [], "config": {}}
    history = saved["history"]
    if saved["config"].get("images", config["images"]) != config["images"]:
        fail(f"{args.data_dir} holds other data than the run's")

    print(*make_table(history), sep="\n", flush=True)
    for epoch in range(len(history) + 1, args.epochs + 1):
        # A seed for each epoch: a resumed run draws the same numbers.
        torch.manual_seed((args.seed * 10_000 + epoch) % 2**64)
        start = time.perf_counter()
        m = {"epoch": epoch, "lr": state.scheduler.get_last_lr()[0]}

        # Augmentation fades to 30%: the last epochs see images nearly as they are.
        strength = RECIPES[args.model]["strength"] * (1 - 0.7 * (epoch - 0.5) / args.epochs)
        loader = batches(data["train"], args.batch_size, train=True, strength=strength)
        title, graph = f"{epoch}/{args.epochs}", args.device == "cuda"
        trained = train_one_epoch(state, loader, PRECISIONS[args.amp], steps, graph, title)
        m["train_loss"], m["train_accuracy"] = trained
        m["val_loss"], m["val_accuracy"], _ = evaluate(model, data["val"])
        m["test_loss"], m["test_accuracy"], _ = evaluate(model, data["test"])
        m["seconds"] = time.perf_counter() - start
        if not math.isfinite(m["train_loss"] + m["val_loss"] + m["test_loss"]):
            fail(f"the loss of epoch {epoch} is not finite: try a lower --lr")

        history.append(m)
        save_checkpoint(args.out / f"{EPOCH}{epoch}.pth", history, config, new=True, **parts)
        keep_best(args.out, history)
        print(make_table(history)[-1], flush=True)
    return history


def measure(model: nn.Module, test: Split, path: Path) -> dict:
    """Return the metrics of a checkpoint on the test set."""
    saved = load_checkpoint(path, model=model)
    _, accuracy, logits = evaluate(model, test)
    n = logits.shape[1]
    confusion = (n * test[1] + logits.argmax(1)).bincount(minlength=n * n).view(n, n)
    metrics = {"parameters": model.count_parameters(), "best_epoch": saved["epoch"]}
    return metrics | {"test_accuracy": accuracy, "confusion": confusion.tolist()}


def run(args: Namespace, path: Path | None) -> None:
    """Train, from path if any, and report; or only test path."""
    name, known, test = load_data(args)
    data = split_data(args, known, test)
    torch.manual_seed(args.seed * 10_000 % 2**64)
    torch.backends.cudnn.deterministic = True
    # channels_last is a third faster; on mps it has bugs.
    layout = torch.contiguous_format if args.device == "mps" else torch.channels_last
    model = MODELS[args.model]().to(args.device, memory_format=layout)
    if args.evaluate:
        print(make_report({"data": name} | measure(model, data["test"], path)))
        return

    config = args.settings | {"data": name, "images": len(known[1])}
    chosen = fill(", ".join(f"{k} {v}" for k, v in config.items()), 79, break_on_hyphens=False)
    new = "NOTHING TO RESUME: new run in" if args.resume else "new run in"
    print(f"resuming {path}" if path else f"{new} {args.out}")
    print(f"device {args.device}, threads {torch.get_num_threads()}\n{chosen}")
    model.print_model_summary()

    args.out.mkdir(parents=True, exist_ok=True)
    history = train(args, config, model, data, path)
    metrics = {"data": name, "config": config, "history": history}
    keep_best(args.out, history)  # a kill may have come before it
    metrics |= measure(model, data["test"], args.out / BEST)
    report = f"{make_report(metrics)}\n\n{chosen}\n"
    write_file(args.out / "metrics.json", json.dumps(metrics, indent=1).encode())
    write_file(args.out / "report.txt", "\n".join([*make_table(history), "", report]).encode())
    try:
        write_file(args.out / "training_metrics.png", draw_plot(history))
    except Exception as error:  # no matplotlib
        print(f"no plot: {error}")
    print(f"\n{report}\nfiles: {args.out}")


# --------------------------------------------------------------------------------- Command line
def parse_args(argv: list[str], source: Path | None = None) -> Namespace:
    """Return all flags; if one is bad, exit, and blame the source."""
    device = accelerator.current_accelerator().type if accelerator.is_available() else "cpu"
    parser = ArgumentParser("mnist.py", description="Train on MNIST, test, report.")
    if source:
        parser.error = lambda message: fail(f"{source}: {message}")
    add = parser.add_argument
    add("--model", choices=MODELS, default="simple", help="network (%(default)s)")
    add("--data", choices=["auto", NAME, "synthetic"], default="auto", help="(%(default)s)")
    add("--val-size", type=int, default=5000, help="held-out images (%(default)s)")
    add("--epochs", type=int, default=15, help="(%(default)s)")
    add("--batch-size", type=int, help="images per step (64, on CUDA 128)")
    add("--lr", type=float, help="peak rate (0.4; wide 0.05, on CUDA 0.1)")
    add("--schedule", choices=["onecycle", *GAMMA], default="onecycle", help="(%(default)s)")
    add("--seed", type=int, default=1, help="(%(default)s)")
    add("--amp", choices=PRECISIONS, help="precision (off, on CUDA bf16)")
    add("--data-dir", type=Path, default="data", help="of the data (%(default)s)")
    add("--device", choices=sorted({"cpu", device}), default=device, help="(%(default)s)")
    add("--out", type=Path, default="model_checkpoints", help="of the run (%(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--evaluate", type=Path, metavar="CKPT", help="test a checkpoint only")
    add("--dry-run", action="store_true", help="one batch, nothing kept")
    args = parser.parse_args(argv)

    for name in ("val_size", "epochs", "batch_size", "lr"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"argument --{name.replace('_', '-')}: must be above 0")
    cuda = args.device == "cuda"
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    args.batch_size = args.batch_size or (128 if cuda else 64)
    # Without norm, gradients of fewer images are too noisy for a high rate.
    scale = args.batch_size / 128 if args.model == "wide" else 1
    args.lr = args.lr or RECIPES[args.model]["lr"] * scale
    args.amp = args.amp or ("bf16" if bf16 else "fp16" if cuda else "off")
    args.out = args.out.expanduser()
    args.settings = {k: v for k, v in vars(args).items() if k not in COMMAND}
    return args


def open_run(args: Namespace, argv: list[str]) -> tuple[Namespace, Path | None]:
    """Return the flags, the others as in the run, and its checkpoint."""
    path = args.evaluate or newest_checkpoint(args.out)
    config = load_checkpoint(path)["config"] if path else {}
    if path and not (args.evaluate or args.resume):
        fail(f"{args.out} holds a run: add --resume, or choose another --out")

    flags = []
    for name, default in parse_args([]).settings.items():
        value, option = config.get(name), name.replace("_", "-")
        if isinstance(value, bool) and value != default:
            flags.append(f"--{option}" if value else f"--no-{option}")
        elif not isinstance(value, bool | None):
            flags.append(f"--{option}={value}")
    args = parse_args([*flags, *argv], source=path)  # argv counts

    for name, new in args.settings.items() if args.resume else ():
        old, option = config.get(name, new), name.replace("_", "-")
        if new != old and not (name == "epochs" and new > old and args.schedule in GAMMA):
            fail(f"--{option} is {new}, but {path} has {old}: omit it")
    return args, path


def main(argv: list[str] | None = None) -> None:
    """Run a command line; SystemExit if it fails. Seeds torch."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)

    try:
        if args.dry_run and not args.evaluate:
            with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                run(parse_args([*argv, "--epochs=1", f"--out={folder}"]), None)
            print("\ndry run: all parts work, nothing is kept")
        else:
            run(*open_run(args, argv))
    except KeyboardInterrupt:
        print(f"\nstopped: --resume goes on with the run in {args.out}", file=sys.stderr)
        sys.exit(130)
    except (OSError, torch.OutOfMemoryError) as error:
        fail(error)


if __name__ == "__main__":
    socket.setdefaulttimeout(20)  # seconds; a download must not wait for ever
    main()
