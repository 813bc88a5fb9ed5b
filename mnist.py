# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21"]
# ///
"""MNIST in one file of plain PyTorch: train a small network, test it honestly, use it.

    python mnist.py --epochs 15 --device cuda    train, test and report
    python mnist.py --resume                     go on after an interruption

Sections: Model, Data, Training, Checkpoints, Report, Command line. Each uses only what stands
above it; Model, Data, Checkpoints and Report work alone, copied out with the imports.
"""

import argparse
import io
import json
import math
import os
import shlex
import signal
import socket
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler
from torchvision import datasets

# ---------------------------------------------------------------------------------------- Model


class Network(nn.Sequential):
    """Layers in a row, from normalised images (N, 1, 28, 28), float, to logits (N, 10)."""

    def count_parameters(self) -> int:
        """Return the number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @torch.no_grad()
    def print_model_summary(self) -> None:
        """Print each layer with its output shape and its number of parameters, and the total."""
        x, training = torch.zeros(1, 1, 28, 28).to(next(self.parameters())), self.training
        for layer in self.eval():  # so that batch norm's statistics stay as they are
            x, count = layer(x), sum(p.numel() for p in layer.parameters())
            print(f"{type(layer).__name__:<20}{('N', *x.shape[1:])!s:<20}{count:>10,}")
        print(f"{type(self).__name__:<40}{self.train(training).count_parameters():>10,} parameters")


class ConvBlock(nn.Sequential):
    """A convolution that keeps the size, batch norm (Ioffe and Szegedy, 2015), ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out), nn.ReLU())


class ResidualBlock(nn.Sequential):
    """relu(x + branch(x)) (He et al., 2015), (N, C, H, W) in and out.

    The branch is depthwise-separable without a ReLU inside (Xception, Chollet, 2017): a 5x5
    view for 25 + C weights a channel, where a full 5x5 convolution takes 25 C.
    """

    def __init__(self, c: int) -> None:
        depthwise = nn.Conv2d(c, c, 5, padding=2, groups=c, bias=False)
        pointwise = nn.Conv2d(c, c, 1, bias=False)
        super().__init__(depthwise, nn.BatchNorm2d(c), pointwise, nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + super().forward(x))


class SimpleMNISTNet(Network):
    """A residual network of under 8,000 parameters; ``dropout`` acts before the last layer."""

    def __init__(self, widths: tuple[int, ...] = (8, 12, 16, 24), dropout: float = 0.0) -> None:
        a, b, c, d = widths
        super().__init__(
            ConvBlock(1, a, 3), ConvBlock(a, b, 3), nn.MaxPool2d(2),  # 28x28
            ConvBlock(b, c, 3), ConvBlock(c, d, 1), ResidualBlock(d), nn.MaxPool2d(2),  # 14x14
            ResidualBlock(d), ResidualBlock(d), nn.AdaptiveAvgPool2d(1),  # 7x7
            nn.Dropout(dropout), nn.Conv2d(d, 10, 1), nn.Flatten(),
        )  # fmt: skip


class WideMNISTNet(Network):
    """A plain network of 3x3 and 1x1 convolutions, without biases or normalisation."""

    def __init__(self) -> None:
        def conv(c_in: int, c_out: int, kernel: int = 3) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, bias=False), nn.ReLU())

        super().__init__(
            conv(1, 32), conv(32, 64), conv(64, 128), nn.MaxPool2d(2),  # 28x28 to 22x22
            conv(128, 32, kernel=1), conv(32, 64), conv(64, 128), nn.AdaptiveAvgPool2d(1),  # 11x11
            nn.Conv2d(128, 10, 1, bias=False), nn.Flatten(),
        )  # fmt: skip
        for weight in self.parameters():  # He et al. (2015): the signal keeps its scale
            nn.init.kaiming_normal_(weight, nonlinearity="relu")


MODELS = {"simple": SimpleMNISTNet, "wide": WideMNISTNet}

# ----------------------------------------------------------------------------------------- Data

MNIST_CRC32 = {
    "train-images-idx3-ubyte": 0xE9F4D8B3, "train-labels-idx1-ubyte": 0xE0CB4AD2,
    "t10k-images-idx3-ubyte": 0x91373BDF, "t10k-labels-idx1-ubyte": 0x4AB9EFF9,
}  # fmt: skip


def load_mnist(data_dir: str | Path = "data") -> list[tuple[Tensor, Tensor]]:
    """Return MNIST's training and test (images, labels) from DIR/MNIST/raw, or download them.

    Images are uint8 (60000 or 10000, 1, 28, 28), labels int64 in 0..9. Raises ConnectionError
    where there are no files and none to be had, another OSError where they are damaged.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    found = [name for name in MNIST_CRC32 if (raw / name).exists()]
    for name in found:
        if zlib.crc32((raw / name).read_bytes()) != MNIST_CRC32[name]:
            raise OSError(f"{raw / name} is damaged: delete it and run again to download it")
    socket.setdefaulttimeout(20)  # seconds: a silent network is no reason to hang
    try:
        splits = [datasets.MNIST(data_dir, train, download=True) for train in (True, False)]
    except Exception as error:  # whatever failed on the way
        text = f"{raw} holds {len(found)} of MNIST's 4 files, and the download failed: {error}"
        raise (OSError if found else ConnectionError)(" ".join(text.split())) from error
    return [(split.data[:, None], split.targets) for split in splits]


def augment(images: Tensor, strength: float = 1.0) -> Tensor:
    """Warp each image by a random affine map of its own, all of them in one batched resampling.

    Rotation within 10 degrees, shift within 2 pixels, scale and shear within 10%, times
    ``strength``. Images are float (N, 1, 28, 28) with background 0, and so is the result.
    """
    limits = torch.tensor([math.radians(10), 0.1, 0.1, 2 / 14, 2 / 14])  # 2 units span the image
    noise = (torch.rand(5, len(images), device=images.device) * 2 - 1) * strength
    angle, scale, shear, shift_x, shift_y = noise * limits.to(noise)[:, None]
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    rows = [cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def batches(
    images: Tensor, labels: Tensor, batch_size: int, training: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each image once, normalised, float (n, 1, 28, 28), with its label, int64 (n,).

    Takes uint8 (N, 1, 28, 28) and works on its device; ``training`` shuffles and augments.
    """
    order = torch.randperm if training else torch.arange
    for index in order(len(images), device=images.device).split(batch_size):
        x = images[index].float() / 255
        x = augment(x) if training else x
        yield (x - 0.1307) / 0.3081, labels[index]  # mean and deviation of the training pixels


# ------------------------------------------------------------------------------------- Training


def make_state(
    model: nn.Module, lr: float, schedule: str, epochs: int, steps: int, fp16: bool = False
) -> dict[str, Any]:
    """Return all that training changes: model, optimizer, scheduler and scaler (for float16).

    The schedule moves with every batch, ``steps`` an epoch. ``onecycle`` warms up for a fifth of
    the run, then anneals along a cosine (Smith and Topin, 2018); ``step`` multiplies the rate by
    0.7 after each epoch; ``constant`` leaves it.
    """
    sgd = SGD(model.parameters(), lr, 0.9, weight_decay=5e-5, nesterov=True, fused=True)
    scheduler = lr_scheduler.StepLR(sgd, steps, 0.7 if schedule == "step" else 1.0)
    if schedule == "onecycle":
        limits = {"max_lr": lr, "total_steps": epochs * steps + 1, "pct_start": 0.2}
        scheduler = lr_scheduler.OneCycleLR(sgd, **limits, cycle_momentum=False)
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=fp16)
    return {"model": model, "optimizer": sgd, "scheduler": scheduler, "scaler": scaler}


def train_one_epoch(
    state: dict[str, Any], loader: Iterable, amp: torch.dtype | None = None, size: int = 0
) -> tuple[float, float]:
    """Train on every batch (x, y) once; return the mean loss and the accuracy on the way.

    ``state`` is make_state's, ``amp`` autocast's dtype; a ``size`` in images draws a progress bar.
    """
    model, optimizer, scheduler, scaler = state.values()
    model.train()
    start, seen, totals = time.perf_counter(), 0, torch.zeros(2)
    for step, (x, y) in enumerate(loader):
        with torch.autocast(x.device.type, amp, enabled=amp is not None):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        sums = torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()])
        seen, totals = seen + len(y), totals.to(sums) + sums  # reading them here would wait
        if size and step % 50 == 0:
            rate, bar = seen / (time.perf_counter() - start), "#" * (20 * seen // size)
            text = f"{seen / size:4.0%}  loss {totals[0] / seen:.4f}  {rate:,.0f} images/s"
            print(f"\r[{bar:20}] {text}  {(size - seen) / rate:.0f} s left ", end="", flush=True)
    loss_mean, accuracy = (totals / seen).tolist()
    return loss_mean, accuracy


@torch.inference_mode()
def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, amp: torch.dtype | None = None
) -> tuple[float, float, Tensor]:
    """Return the mean loss, the accuracy and the logits, float32 (N, 10), of uint8 images."""
    model.eval()
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        logits = torch.cat([model(x) for x, _ in batches(images, labels, 1000)]).float()
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return F.cross_entropy(logits, labels).item(), accuracy, logits


# ---------------------------------------------------------------------------------- Checkpoints


def write_file(path: Path, content: bytes) -> None:
    """Replace a file in one step: whoever reads it, whenever a kill comes, finds it whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(path: Path, state: dict[str, Any], **facts: Any) -> None:
    """Write ``{name}_state_dict`` of each part of the state, and the facts, plain values."""
    buffer = io.BytesIO()
    torch.save({f"{name}_state_dict": p.state_dict() for name, p in state.items()} | facts, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint, and into ``state``, if given, what belongs there, on whatever device.

    Runs no code of the file. Raises OSError if it can't be read, ValueError if it is no whole
    checkpoint (its container holds a CRC-32 of every record) or does not fit the state.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        if damaged := zipfile.ZipFile(content).testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")
        content.seek(0)
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        for name, part in (state or {}).items():
            part.load_state_dict(checkpoint[f"{name}_state_dict"])
        if [e["epoch"] for e in checkpoint["history"]] != [*range(1, checkpoint["epoch"] + 1)]:
            raise ValueError("its history does not lead to its epoch")
        if not all(t.isfinite().all() for t in checkpoint["model_state_dict"].values()):
            raise ValueError("its weights are not finite")
    except Exception as error:  # a damaged file can fail in any way
        reason = " ".join((str(error) or repr(error)).split())[:120]
        raise ValueError(f"{path} is not a usable checkpoint: {reason}") from error
    return checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint of the latest epoch, with a notice of each damaged one."""
    names = folder.glob("mnist_model_epoch_*.pth")
    for path in sorted(names, key=lambda p: (len(p.name), p.name), reverse=True):
        try:
            load_checkpoint(path)
            return path
        except ValueError as error:
            print(f"notice: {error}: going back to the one before it")
    return None


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the entry of the best validation accuracy, then loss; without any, the last."""
    return max(history, key=lambda e: (e["val_accuracy"] or 0, -(e["val_loss"] or 0), e["epoch"]))


# --------------------------------------------------------------------------------------- Report


def draw_image(image: Tensor) -> list[str]:
    """Return the middle of a uint8 (1, 28, 28) image in ASCII shades, 12 lines of 24."""
    cells = F.avg_pool2d(image[:, 2:26, 2:26].float(), (2, 1))  # a character is twice as tall
    return ["".join(" .:-=+*#%@"[int(v) * 10 // 256] for v in row) for row in cells[0].tolist()]


def draw_chart(history: list[dict[str, Any]], key: str, form: str) -> list[str]:
    """Return train_{key} (.) and test_{key} (o) against the epochs, which go down the page.

    The scale is that of the last three quarters of the run; what lies outside sits on its edge.
    """
    settled = [e[f"{s}_{key}"] for e in history[len(history) // 4 :] for s in ("train", "test")]
    low, high = min(settled), max(settled)
    lines = ["", f"epoch  {key}: . training, o test", f"       {low:<32{form}}{high:>32{form}}"]
    for entry in history[:: math.ceil(len(history) / 30)]:
        row = [" "] * 64
        for split, mark in {"train": ".", "test": "o"}.items():
            place = (entry[f"{split}_{key}"] - low) / (high - low or 1)
            row[round(63 * min(max(place, 0), 1))] = mark
        lines.append(f"{entry['epoch']:5} |{''.join(row)}|")
    return lines


def make_report(metrics: dict[str, Any], mistakes: list[tuple[Tensor, int, int, float]]) -> str:
    """Return the report of a run, at most 79 columns of ASCII.

    ``metrics`` is what metrics.json holds; a mistake is (image, label, answer, confidence).
    """
    history, config, table = metrics["history"], metrics["config"], metrics["confusion"]
    n, hits, z = sum(map(sum, table)), sum(table[i][i] for i in range(10)), 1.96
    share, scale = hits / n, 1 + z * z / n  # Wilson's (1927) 95% interval of a share
    centre = (share + z * z / 2 / n) / scale
    spread = z / scale * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    chosen = "best by validation" if config["val_size"] else "the last, as none are held out"
    lines = [
        f"{config['data']} test accuracy {share:.2%}, {n - hits} errors in {n:,}"
        f" (95% interval {centre - spread:.2%} to {centre + spread:.2%})",
        f"{config['model']}, {metrics['parameters']:,} parameters, epoch {metrics['best_epoch']} of"
        f" {len(history)} ({chosen}), {sum(e['seconds'] for e in history):.0f} s",
        *draw_chart(history, "loss", ".4f"),
        *draw_chart(history, "accuracy", ".2%"),
        f"\ntrue  answered{'':38} recall",
        "     " + "".join(f"{i:5}" for i in range(10)),
    ]
    for i, row in enumerate(table):
        cells = "".join(f"{v or '.':>5}" for v in row)
        lines.append(f"{i:5}{cells} {row[i] / max(1, sum(row)):6.1%}")
    precision = (table[i][i] / max(1, sum(row[i] for row in table)) for i in range(10))
    lines += ["prec." + "".join(f"{p * 100:5.1f}" for p in precision) + "  %"]
    for trio in (mistakes[:3], mistakes[3:6]):
        lines += ["", "  ".join(f"{f'{a} -> {b} {c:.1%}':24}" for _, a, b, c in trio)]
        lines += ["  ".join(cut) for cut in zip(*(draw_image(m[0]) for m in trio), strict=True)]
    return "\n".join(line.rstrip() for line in lines)


# --------------------------------------------------------------------------------- Command line

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG = ("model", "data", "val_size", "epochs", "batch_size", "lr", "schedule", "seed", "amp")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags; wrong ones end the program with status 2."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("mnist.py", formatter_class=form)
    add = parser.add_argument
    add("--model", choices=MODELS, default="simple", help="which network")
    add("--data", choices=["auto", "mnist", "synthetic"], default="auto", help="what to train on")
    add("--data-dir", default="data", metavar="DIR", help="folder of MNIST/raw, filled if empty")
    add("--val-size", type=int, default=5000, metavar="N", help="training images held out")
    add("--epochs", type=int, default=15, metavar="N", help="times over the training images")
    add("--batch-size", type=int, default=64, metavar="N", help="images a step")
    add("--lr", type=float, default=0.2, metavar="F", help="highest learning rate")
    add("--schedule", choices=["onecycle", "step", "constant"], default="onecycle", help="of it")
    add("--seed", type=int, default=1, metavar="N", help="of the first run")
    add("--runs", type=int, default=1, metavar="N", help="runs, each with a seed of its own")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where")
    add("--amp", choices=["auto", *AMP], default="auto", help="mixed precision; auto: on CUDA")
    add("--out", type=Path, default="model_checkpoints", metavar="DIR", help="folder for results")
    add("--resume", nargs="?", const="", metavar="CKPT", help="go on, from the newest by default")
    add("--evaluate", type=Path, metavar="CKPT", help="test a checkpoint instead of training")
    add("--dry-run", action="store_true", help="one small batch of everything")
    args = parser.parse_args(argv)
    lowest = {"val_size": 0, "seed": 0, "epochs": 1, "batch_size": 1, "runs": 1, "lr": 1e-9}
    for flag, low in lowest.items():
        if not low <= getattr(args, flag) < math.inf:
            parser.error(f"--{flag.replace('_', '-')} must be at least {low}")
    return args


def assess(path: Path, images: Tensor, labels: Tensor) -> tuple[dict[str, Any], list[tuple]]:
    """Test a checkpoint; return what metrics.json holds and the six most confident mistakes."""
    checkpoint = load_checkpoint(path)
    config, model = checkpoint["config"], MODELS[checkpoint["config"]["model"]]()
    load_checkpoint(path, {"model": model.to(images.device)})
    _, accuracy, logits = evaluate(model, images, labels, AMP[config["amp"]])
    confidence, answers = logits.softmax(1).max(1)
    confusion = (labels * 10 + answers).bincount(minlength=100).view(10, 10).tolist()
    metrics = {"parameters": model.count_parameters(), "config": config, "data": config["data"]}
    metrics |= {"history": checkpoint["history"], "best_epoch": checkpoint["epoch"]}
    metrics |= {"test_accuracy": accuracy, "confusion": confusion}
    wrong = (answers != labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True)[:6]]
    columns = (images[worst].cpu(), *(t[worst].tolist() for t in (labels, answers, confidence)))
    return metrics, [*zip(*columns, strict=True)]


def fit(args: argparse.Namespace, train: list, val: list, test: list) -> dict[str, Any]:
    """Do one run, or the rest of one; return what metrics.json holds."""
    config, size = {flag: getattr(args, flag) for flag in CONFIG}, len(train[1])
    torch.manual_seed(args.seed * 10_000)
    model = MODELS[args.model]().to(args.device, memory_format=torch.channels_last)
    steps, amp = math.ceil(size / args.batch_size), AMP[args.amp]
    state = make_state(model, args.lr, args.schedule, args.epochs, steps, args.amp == "fp16")
    args.out.mkdir(parents=True, exist_ok=True)
    best, history = args.out / "best_mnist_model.pth", []
    if path := Path(args.resume) if args.resume else newest_checkpoint(args.out):
        for flag, before in load_checkpoint(path)["config"].items():
            if before != config[flag] and (flag != "epochs" or args.schedule == "onecycle"):
                clash = f"--{flag.replace('_', '-')} is {config[flag]}, but {before} in {path}"
                raise ValueError(f"{clash}: change the flag, or choose another --out")
    if args.resume is not None:
        print(f"going on from {path}" if path else f"nothing to resume in {args.out}: starting")
    if args.resume is not None and path:
        history = load_checkpoint(path, state)["history"]
        number = best_epoch(history)["epoch"]  # the kill may have come before best was written
        write_file(best, path.with_name(f"mnist_model_epoch_{number}.pth").read_bytes())
    for epoch in range(len(history) + 1, args.epochs + 1):
        # The one seed of an epoch's order, augmentation and dropout, so resuming needs no other.
        torch.manual_seed(args.seed * 10_000 + epoch)
        row: dict[str, Any] = {"epoch": epoch, "lr": state["scheduler"].get_last_lr()[0]}
        start, loader = time.perf_counter(), batches(*train, args.batch_size, training=True)
        results = {"train": train_one_epoch(state, loader, amp, sys.stdout.isatty() * size)}
        rate = size / (time.perf_counter() - start)
        results["val"] = evaluate(model, *val, amp) if len(val[1]) else (None, None)
        results["test"] = evaluate(model, *test, amp)
        for name, result in results.items():
            row |= {f"{name}_loss": result[0], f"{name}_accuracy": result[1]}
        row["seconds"] = time.perf_counter() - start
        if not math.isfinite(row["train_loss"] + row["test_loss"]):
            raise ValueError(f"the loss of epoch {epoch} is not finite: try a lower --lr")
        history.append(row)
        facts = {k: row[k] for k in row if k == "epoch" or k.endswith("_accuracy")}
        for path in (args.out / f"mnist_model_epoch_{epoch}.pth", best):
            if path != best or row is best_epoch(history):
                save_checkpoint(path, state, **facts, history=history, config=config)
        text = (f"{k} {v[0]:.4f} {v[1]:.2%}  " for k, v in results.items() if v[0] is not None)
        text = f"{''.join(text)}lr {row['lr']:.4f}  {row['seconds']:.1f} s  {rate:,.0f} images/s"
        print(f"\repoch {epoch:2}/{args.epochs}  {text}", flush=True)
    metrics, mistakes = assess(best, *test)
    metrics["history"], report = history, make_report(metrics | {"history": history}, mistakes)
    write_file(args.out / "metrics.json", json.dumps(metrics, indent=1).encode())
    write_file(args.out / "report.txt", f"{report}\n".encode())
    print(f"\n{report}")
    return metrics


def run(args: argparse.Namespace) -> None:
    """Do what the flags say."""
    found = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type
    args.device = (found or "cpu") if args.device == "auto" else args.device
    if args.device not in ("cpu", found):
        raise ValueError(f"there is no {args.device} device here: leave out --device")
    args.amp = ("bf16" if args.device == "cuda" else "off") if args.amp == "auto" else args.amp
    train, test = load_mnist(args.data_dir)
    args.data = "mnist"
    if args.dry_run:
        args.epochs, args.val_size = 1, min(args.val_size, args.batch_size)
        train = [t[: args.batch_size + args.val_size] for t in train]
        test = [t[: args.batch_size] for t in test]
    size = len(train[1]) - args.val_size
    if size < args.batch_size:
        raise ValueError(f"{size} images to train on are less than a batch: lower --batch-size")
    train, test = [t.to(args.device) for t in train], [t.to(args.device) for t in test]
    train, val = [t[:size] for t in train], [t[size:] for t in train]
    if args.evaluate:
        print(make_report(*assess(args.evaluate, *test)))
        return
    MODELS[args.model]().print_model_summary()
    out, results = args.out, []
    for seed in range(args.seed, args.seed + args.runs):
        args.seed, args.out = seed, out / f"seed_{seed}" if args.runs > 1 else out
        results.append(fit(args, train, val, test))
    if args.runs > 1:
        scores = torch.tensor([r["test_accuracy"] for r in results], dtype=torch.float64)
        mean, std = scores.mean().item(), scores.std().item()
        summary = {"runs": results, "mean": mean, "std": std}
        write_file(out / "metrics.json", json.dumps(summary, indent=1).encode())
        print(f"\n{args.data} test accuracy of {args.runs} runs: {mean:.3%} +- {std:.3%}")
        print("  ".join(f"{score:.2%}" for score in scores))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit status. What goes wrong outside is told in a line."""
    args = parse_args(argv)
    out, command = args.out, ["python", "mnist.py", *(sys.argv[1:] if argv is None else argv)]
    command += [] if "--resume" in command else ["--resume"]

    def stop(number: int, _: object) -> None:
        print(f"\nmnist.py: stopped; finished epochs are in {out}. To go on: {shlex.join(command)}")
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        run(args)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        print(f"mnist.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
