# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21"]
# ///
"""MNIST in one file: model, data, training, checkpoints, report, command line, in this order.

python mnist.py --epochs 15 --device cuda    train, test and report
python mnist.py --resume                     go on after an interruption
"""

import argparse
import io
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR
from torchvision import datasets

# ---------------------------------------------------------------------------------------- Model


class Network(nn.Sequential):
    """Layers in a row, from normalised images (N, 1, 28, 28), float, to logits (N, 10)."""

    def count_parameters(self) -> int:
        """Return the number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def print_model_summary(self) -> None:
        """Print each layer with its output shape and its number of parameters, and the total."""
        x, training = torch.zeros(1, 1, 28, 28).to(next(self.parameters())), self.training
        for layer in self.eval():  # so that batch norm's statistics stay as they are
            x, count = layer(x), sum(p.numel() for p in layer.parameters())
            parts = ", ".join(type(m).__name__ for m in layer.modules() if not [*m.children()])
            print(f"{parts:<48}{('N', *x.shape[1:])!s:<18}{count:>8,}")
        print(f"{type(self).__name__}: {self.train(training).count_parameters():,} parameters")


class SimpleMNISTNet(Network):
    """A network of 7,946 parameters; test accuracy 99.63 ± 0.04% in 15 epochs."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(1, 8, 3), nn.SiLU()),  # 8 channels of 26x26; norm is slow here
            conv_block(8, 12, 3, nn.MaxPool2d(2)),  # 12 of 12x12
            conv_block(12, 16, 3),  # 16 of 10x10
            separable_block(16),
            conv_block(16, 24, 1),  # 24 of 10x10
            separable_block(24),
            nn.MaxPool2d(2),  # 24 of 5x5
            separable_block(24),
            separable_block(24),
            nn.Conv2d(24, 10, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),  # 10 logits
        )


def conv_block(c_in: int, c_out: int, kernel: int, *more: nn.Module) -> nn.Sequential:
    """Return an unpadded convolution, as MNIST has empty margins; ``more``; batch norm; SiLU."""
    conv = nn.Conv2d(c_in, c_out, kernel, bias=False)
    return nn.Sequential(conv, *more, nn.BatchNorm2d(c_out), nn.SiLU())


def separable_block(c: int) -> nn.Sequential:
    """Return a depthwise 5x5 convolution, then a 1x1 across channels (Chollet, 2017), with norms.

    It sees far for few parameters. A residual connection around it gains nothing at this depth.
    """
    depthwise = nn.Conv2d(c, c, 5, padding=2, groups=c, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(c), conv_block(c, c, 1))


class WideMNISTNet(Network):
    """A plain network of 3x3 and 1x1 convolutions, without biases, padding or normalisation."""

    def __init__(self) -> None:
        widths = [(1, 32, 3), (32, 64, 3), (64, 128, 3), (128, 32, 1), (32, 64, 3), (64, 128, 3)]
        convs = [nn.Sequential(nn.Conv2d(*w, bias=False), nn.ReLU()) for w in widths]
        head = nn.AdaptiveAvgPool2d(1), nn.Conv2d(128, 10, 1, bias=False), nn.Flatten()
        super().__init__(*convs[:3], nn.MaxPool2d(2), *convs[3:], *head)
        for weight in self.parameters():  # He et al. (2015): the signal keeps its scale
            nn.init.kaiming_normal_(weight, nonlinearity="relu")


MODELS = {"simple": SimpleMNISTNet, "wide": WideMNISTNet}

# ----------------------------------------------------------------------------------------- Data

DATASET, CRC32 = datasets.MNIST, 0x3528FDDB  # the checksum of its images and labels, in a row


def load_mnist(data_dir: str | Path = "data") -> list[tuple[Tensor, Tensor]]:
    """Return the training and test images, uint8 (N, 1, 28, 28), and labels of DIR/MNIST/raw.

    Raises ConnectionError where they are neither there nor to be had, OSError where damaged.
    """
    root, raw = Path(data_dir), Path(data_dir, DATASET.__name__, "raw")
    found = root.is_file() or any(f for d in (root, root / "raw", raw) for f in d.glob("*ubyte*"))
    try:
        if not found:
            with tempfile.TemporaryDirectory() as folder:  # a failed download leaves nothing
                DATASET(folder, download=True)
                shutil.copytree(folder, root, dirs_exist_ok=True)
        sets = [DATASET(root, train, download=raw.exists()) for train in (True, False)]
        pairs = [(s.data[:, None], s.targets) for s in sets]
        if zlib.crc32(b"".join(t.numpy().tobytes() for p in pairs for t in p)) != CRC32:
            raise ValueError("the checksum is wrong")
        return pairs
    except Exception as error:  # whatever failed on the way
        text = f"put {{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte, whole, into {raw}: {error}"
        raise (OSError if found else ConnectionError)(text) from error


def draw_digits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return n bent digits of a 3x5 font, uint8 (n, 1, 28, 28), and labels, to try the program."""
    font = "75557262277174771717557117471774757712227575775717"  # an octal digit is a row
    bits = torch.tensor([[int(row) >> shift & 1 for shift in (2, 1, 0)] for row in font])
    glyphs = F.pad(F.interpolate(bits.view(10, 1, 5, 3).float(), (20, 12)), (8, 8, 4, 4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        labels = torch.randint(10, (n,))
        images = [augment(glyphs[part], strength=2) for part in labels.split(1000)]
    return (torch.cat(images) * 255).byte(), labels


def deskew(images: Tensor) -> Tensor:
    """Centre, deslant and scale digits by moments (Casey, 1970), uint8 (N, 1, 28, 28), on CPU."""
    points = (torch.cartesian_prod(torch.arange(28), torch.arange(28)) - 13.5) / 14  # y, x
    ink = images.flatten(1) / images.flatten(1).sum(1, keepdim=True).clamp(min=1)
    mean = ink @ points
    outer = mean[:, :, None] * mean[:, None]
    covariance = torch.einsum("nk,ki,kj->nij", ink, points, points) - outer
    # A ridge of 0.02 spares what is narrow by nature, a 1; the divisors are a common digit's roots.
    root = torch.linalg.cholesky(covariance + 0.02 * torch.eye(2)) / torch.tensor([0.41, 0.31])
    theta = torch.cat([root.flip(1, 2), mean.flip(1)[..., None]], 2)  # x, y
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().byte()


def augment(images: Tensor, strength: float = 1.0) -> Tensor:
    """Warp each image, float (N, 1, 28, 28) on 0, by an affine and elastic map of its own."""
    limits = torch.tensor([math.radians(10), 0.1, 0.1, 2 / 14, 2 / 14])  # 2 units span the image
    noise = strength * (2 * torch.rand(5, len(images), device=images.device) - 1)
    angle, scale, shear, shift_x, shift_y = noise * limits.to(noise)[:, None]
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    rows = [cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
    field = strength * 0.4 / 14 * torch.randn(len(images), 2, 5, 5, device=images.device)
    field = F.interpolate(field, images.shape[2:], mode="bicubic", align_corners=True)
    return F.grid_sample(images, grid + field.permute(0, 2, 3, 1), align_corners=False)


def batches(data: tuple[Tensor, Tensor], size: int, transform: Callable | None = None) -> Iterator:
    """Yield normalised images, float (size, 1, 28, 28), and labels; to train, give a transform."""
    n = len(data[1])  # in training, the order is random and the last, smaller batch is left out
    order = torch.randperm(n)[: n // size * size] if transform else torch.arange(n)
    for index in order.to(data[1].device).split(size):
        x = data[0][index].float() / 255
        x = transform(x) if transform else x
        yield (x - 0.1307) / 0.3081, data[1][index]  # mean and deviation of MNIST's pixels


# ------------------------------------------------------------------------------------- Training


def make_state(model: nn.Module, lr: float, schedule: str, epochs: int, steps: int) -> dict:
    """Return model, optimizer, scheduler and scaler by name; an epoch has ``steps`` steps."""
    sgd = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-5, nesterov=True, fused=True)
    scheduler: LRScheduler = StepLR(sgd, steps, 0.7 if schedule == "step" else 1.0)
    if schedule == "onecycle":  # of ten steps at least (Smith and Topin, 2018)
        total = max(10, epochs * steps + 1)
        scheduler = OneCycleLR(sgd, lr, total, pct_start=0.2, cycle_momentum=False)
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=False)
    return {"model": model, "optimizer": sgd, "scheduler": scheduler, "scaler": scaler}


def train_one_epoch(state: dict, loader: Iterable, amp: torch.dtype | None, bar: int = 0) -> tuple:
    """Train on each (x, y); return mean loss and accuracy. A ``bar`` of so many steps is drawn."""
    model, optimizer = state["model"].train(), state["optimizer"]
    loss_sum = correct = seen = 0  # the first two become tensors on the device: no step waits
    for step, (x, y) in enumerate(loader, 1):
        with torch.autocast(x.device.type, amp, enabled=amp is not None, cache_enabled=False):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        state["scaler"].scale(loss).backward()
        state["scaler"].step(optimizer)
        state["scaler"].update()
        state["scheduler"].step()
        loss_sum += loss.detach() * len(y)
        correct += (logits.argmax(1) == y).sum()
        seen += len(y)
        if bar and step % 20 == 0:
            print(f"[{'#' * (20 * step // bar):20}] {step}/{bar}", end="\r", flush=True)
    return float(loss_sum) / seen, float(correct) / seen


@torch.inference_mode()
def evaluate(model: nn.Module, data: tuple, amp: torch.dtype | None = None) -> tuple:
    """Return mean loss, accuracy and logits, float32 (N, 10), of (uint8 images, labels)."""
    model.eval()
    with torch.autocast(data[0].device.type, amp, enabled=amp is not None):
        logits = torch.cat([model(x) for x, _ in batches(data, 500)]).float()
    accuracy = (logits.argmax(1) == data[1]).float().mean().item()
    return F.cross_entropy(logits, data[1]).item(), accuracy, logits


# ---------------------------------------------------------------------------------- Checkpoints


def write_file(path: Path, content: bytes) -> None:
    """Replace a file in one step: whoever reads it, whenever a kill comes, finds it whole."""
    new = path.with_name(f"{path.name}.tmp")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # where it could not be written


def save_checkpoint(path: Path, state: dict, **facts: object) -> None:
    """Write ``{name}_state_dict`` of each part of the state, and the facts, plain values."""
    buffer = io.BytesIO()
    torch.save({f"{name}_state_dict": p.state_dict() for name, p in state.items()} | facts, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path, state: dict | None = None) -> dict:
    """Read a checkpoint, and into ``state`` what belongs there; ValueError if it can't be used."""
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # by its CRC-32 sums
            raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if len(checkpoint["history"]) != checkpoint["epoch"] or not checkpoint["config"].keys():
            raise ValueError("its history or config is not its own")
        for name, part in (state or {}).items():
            part.load_state_dict(checkpoint[f"{name}_state_dict"])
        return checkpoint
    except Exception as error:  # a damaged file can fail in any way
        cure = "delete it to --resume before it, or let python mnist.py make one in minutes"
        raise ValueError(f"no usable checkpoint {path} ({error!s:.120}): {cure}") from error


# --------------------------------------------------------------------------------------- Report

SPLITS = ("train", "val", "test")
HEADER = "epoch   rate           train      validation            test seconds  val error"


def make_row(entry: dict) -> str:
    """Return an epoch's line under HEADER; a # is 0.2% of validation error, nine are the most."""
    row = f"{entry['epoch']:5} {entry['lr']:.4f}"
    for split in SPLITS:
        row += f" {entry[split + '_loss']:7.4f} {entry[split + '_accuracy']:7.2%}"
    return f"{row} {entry['seconds']:7.1f}  {'#' * round(500 - 500 * entry['val_accuracy']):.9}"


def draw_image(image: Tensor) -> list[str]:
    """Return the middle of a uint8 (1, 28, 28) image in ASCII shades, 12 lines of 24."""
    cells = F.avg_pool2d(image[:, 2:26, 2:26].float(), (2, 1))  # a character is twice as tall
    return ["".join(" .:-=+*#%@"[int(v) * 10 // 256] for v in row) for row in cells[0].tolist()]


def make_report(metrics: dict, mistakes: list[tuple[Tensor, int, int]]) -> str:
    """Return the report on what metrics.json holds and mistakes of (image, label, answer)."""
    p, n = metrics["test_accuracy"], sum(map(sum, metrics["confusion"]))
    lines = [
        f"{metrics['data']} test accuracy {p:.2%} +- {1.96 * math.sqrt(p * (1 - p) / n):.2%}",
        f"(95% interval; {metrics['parameters']:,} parameters; epoch {metrics['best_epoch']})",
        f"\n{HEADER}",
        *map(make_row, metrics["history"]),
        f"\ntrue  answered{'':38}recall\n     " + "".join(f"{digit:5}" for digit in range(10)),
    ]
    for label, row in enumerate(metrics["confusion"]):
        cells = "".join(f"{count or '.':>5}" for count in row)
        lines.append(f"{label:5}{cells} {row[label] / max(1, sum(row)):6.1%}")
    for trio in (mistakes[:3], mistakes[3:]):
        lines.append("\n" + "  ".join(f"{y} -> {answer}".ljust(24) for _, y, answer in trio))
        lines += ["  ".join(row) for row in zip(*(draw_image(m[0]) for m in trio), strict=True)]
    return "\n".join(line.rstrip() for line in lines).rstrip()


def draw_plot(history: list[dict]) -> bytes:
    """Return a PNG of the loss and the accuracy, epoch by epoch; needs matplotlib."""
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(10, 4), layout="constrained"), io.BytesIO()
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in SPLITS:
            axes.plot([e["epoch"] for e in history], [e[f"{split}_{key}"] for e in history], ".-")
        axes.set(xlabel="epoch", ylabel=key)
        axes.legend(SPLITS)
    figure.savefig(buffer, dpi=150)
    return buffer.getvalue()


# --------------------------------------------------------------------------------- Command line

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# The flags that make a run what it is: a resumed one must have the same.
CONFIG = ("model", "data", "val_size", "epochs", "batch_size", "lr", "schedule", "seed", "amp")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, check and settle the flags; wrong ones end the program with status 2."""
    parser = argparse.ArgumentParser("mnist.py")
    add = parser.add_argument
    add("--model", choices=MODELS, default="simple", help="which network (%(default)s)")
    add("--data", choices=["auto", "mnist", "synthetic"], default="auto", help="what to train on")
    add("--data-dir", default="data", metavar="DIR", help="holds MNIST/raw (%(default)s)")
    add("--val-size", type=int, default=5000, metavar="N", help="images held out (%(default)s)")
    add("--epochs", type=int, default=15, metavar="N", help="times over the rest (%(default)s)")
    add("--batch-size", type=int, default=64, metavar="N", help="images a step (%(default)s)")
    add("--lr", type=float, metavar="F", help="highest learning rate (0.4; of wide 0.05)")
    add("--schedule", choices=["onecycle", "step", "constant"], default="onecycle", help="lr curve")
    add("--seed", type=int, default=1, metavar="N", help="another makes another run (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to run")
    add("--amp", choices=["auto", *AMP], default="auto", help="precision; auto: bf16 on CUDA")
    add("--out", type=Path, default="model_checkpoints", metavar="DIR", help="files (%(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--evaluate", type=Path, metavar="CKPT", help="test a checkpoint instead of training")
    add("--dry-run", action="store_true", help="one batch of everything; nothing is kept")
    args = parser.parse_args(argv)
    args.lr = {"wide": 0.05}.get(args.model, 0.4) if args.lr is None else args.lr
    for flag, low in {"val_size": 1, "epochs": 1, "batch_size": 1, "seed": 0, "lr": 1e-9}.items():
        if not low <= getattr(args, flag) <= 10**9:
            parser.error(f"--{flag.replace('_', '-')} must be a number from {low} to {10**9}")
    found = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type
    args.device = (found or "cpu") if args.device == "auto" else args.device
    if args.device not in ("cpu", found):
        raise ValueError(f"there is no {args.device} device here: leave out --device")
    args.amp = {"cuda": "bf16"}.get(args.device, "off") if args.amp == "auto" else args.amp
    if args.dry_run:
        args.epochs, args.val_size = 1, args.batch_size
    return args


def get_data(args: argparse.Namespace) -> tuple[str, dict]:
    """Return "mnist" or "synthetic", and (images, labels) of each split, on the device."""
    try:
        if args.data == "synthetic":
            raise ConnectionError("--data synthetic asks for them")
        name, (train, test) = DATASET.__name__.lower(), load_mnist(args.data_dir)
    except ConnectionError as error:
        if args.data == "mnist":
            raise
        print("!" * 79, "SYNTHETIC: printed digits, not MNIST, as", error, "!" * 79, sep="\n")
        name, train, test = "synthetic", draw_digits(60_000, seed=0), draw_digits(10_000, seed=1)
    if args.dry_run:
        train, test = ([t[: 2 * args.batch_size] for t in pair] for pair in (train, test))
    size = len(train[1]) - args.val_size
    if size < args.batch_size:
        raise ValueError(f"--val-size leaves {size} images, no batch: lower it or --batch-size")
    data = {"train": [t[:size] for t in train], "val": [t[size:] for t in train], "test": test}
    for split, (images, labels) in data.items():
        images = torch.cat([deskew(part) for part in images.split(1000)])
        data[split] = images.to(args.device), labels.to(args.device)
    return name, data


def run(args: argparse.Namespace, name: str, data: dict, out: Path) -> None:
    """Train a network, or go on with it, and report; write all files under ``out``."""
    config = {flag: getattr(args, flag) for flag in CONFIG} | {"data": name}
    steps, amp = len(data["train"][1]) // args.batch_size, AMP[args.amp]
    model = MODELS[args.model]().to(args.device, memory_format=torch.channels_last)
    model.print_model_summary()
    if args.device == "cuda":  # forward and backward pass become one launch each (Ng et al., 2021)
        sample = torch.zeros(args.batch_size, 1, 28, 28, device=args.device)
        with torch.autocast(args.device, amp, enabled=amp is not None, cache_enabled=False):
            model = torch.cuda.make_graphed_callables(model, (sample,))
    torch.manual_seed(args.seed * 10_000)
    model.load_state_dict(MODELS[args.model]().state_dict())  # as the capture has moved batch norm
    state = make_state(model, args.lr, args.schedule, args.epochs, steps)
    state["scaler"] = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    out.mkdir(parents=True, exist_ok=args.resume)  # the folder of a new run is its own
    paths = sorted(out.glob("mnist_model_epoch_*.pth"), key=lambda p: int(p.stem.split("_")[-1]))
    history = []
    if paths:
        before = load_checkpoint(paths[-1])["config"]
        for flag in CONFIG:
            if before.get(flag) != config[flag]:
                clash = f"--{flag.replace('_', '-')} is {config[flag]}, was {before.get(flag)}"
                raise ValueError(f"{clash} in {paths[-1]}: change it, or choose another --out")
        history = load_checkpoint(paths[-1], state)["history"]

    print(HEADER)
    bar = steps if sys.stdout and sys.stdout.isatty() else 0
    for epoch in range(len(history) + 1, args.epochs + 1):
        # The one seed of an epoch's order and augmentation, so resuming needs no other.
        torch.manual_seed(args.seed * 10_000 + epoch)
        start, lr = time.perf_counter(), state["scheduler"].get_last_lr()[0]
        loader = batches(data["train"], args.batch_size, augment)
        results = [train_one_epoch(state, loader, amp, bar)]
        results += [evaluate(model, data[split], amp) for split in ("val", "test")]
        entry = {"epoch": epoch, "lr": lr, "seconds": time.perf_counter() - start}
        for split, (loss, accuracy, *_) in zip(SPLITS, results, strict=True):
            entry |= {f"{split}_loss": loss, f"{split}_accuracy": accuracy}
        if not math.isfinite(entry["train_loss"] + entry["val_loss"]):
            raise ValueError(f"the loss of epoch {epoch} is not finite: try a lower --lr")
        print(make_row(entry), flush=True)
        history.append(entry)
        facts = entry | {"history": history, "config": config}
        if entry["val_loss"] <= min(e["val_loss"] for e in history):  # less noisy than accuracy
            save_checkpoint(out / "best_mnist_model.pth", state, **facts)
        # Last, as a kill between the two then repeats the epoch.
        save_checkpoint(out / f"mnist_model_epoch_{epoch}.pth", state, **facts)

    metrics, mistakes = assess(out / "best_mnist_model.pth", args.device, name, data["test"])
    metrics["history"] = history  # as the best epoch's knows no later ones
    report = make_report(metrics, mistakes)
    write_file(out / "metrics.json", json.dumps(metrics, indent=1).encode())
    write_file(out / "report.txt", f"{report}\n".encode())
    print(f"\n{report}", flush=True)
    try:
        write_file(out / "training_metrics.png", draw_plot(history))
    except ImportError:
        print("for training_metrics.png: pip install matplotlib, then --resume")


def assess(path: Path, device: str, name: str, data: tuple[Tensor, Tensor]) -> tuple[dict, list]:
    """Test a checkpoint; return what metrics.json holds and six mistakes."""
    checkpoint = load_checkpoint(path)
    config, (images, labels) = checkpoint["config"], data
    if set(CONFIG) - config.keys() or str(config["model"]) not in MODELS:
        raise ValueError(f"{path} holds no network of this program: its config is {config}")
    model = MODELS[config["model"]]().to(device, memory_format=torch.channels_last)
    load_checkpoint(path, {"model": model})
    answers = evaluate(model, data, AMP.get(str(config["amp"])))[2].argmax(1)
    confusion = (labels * 10 + answers).bincount(minlength=100).view(10, 10).tolist()
    metrics = {"parameters": model.count_parameters(), "config": config, "data": name}
    metrics |= {"history": checkpoint["history"], "best_epoch": checkpoint["epoch"]}
    wrong = (answers != labels).nonzero()[:, 0].tolist()
    metrics |= {"test_accuracy": 1 - len(wrong) / len(labels), "confusion": confusion}
    return metrics, [(images[i].cpu(), int(labels[i]), int(answers[i])) for i in wrong[:6]]


def main(argv: list[str] | None = None) -> str | int | None:
    """Run the command line; return what sys.exit takes: for an error, its line."""
    socket.setdefaulttimeout(20)  # seconds: a silent network is no reason to hang
    try:
        args = parse_args(argv)
        name, data = get_data(args)
        if args.evaluate:
            print(make_report(*assess(args.evaluate, args.device, name, data["test"])), flush=True)
            return None
        with tempfile.TemporaryDirectory() as folder:
            return run(args, name, data, Path(folder, "run") if args.dry_run else args.out)
    except KeyboardInterrupt:
        print("\nmnist.py: stopped: the same command with --resume goes on", file=sys.stderr)
        return 130
    except FileExistsError:
        text = "holds a run: --resume goes on with it, another --out starts one beside it"
        return f"mnist.py: error: {args.out} {text}"
    except BrokenPipeError:
        os._exit(1)  # nobody reads what is printed: nothing is left to say
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        return f"mnist.py: error: {' '.join(str(error).split())}"


if __name__ == "__main__":
    sys.exit(main())
