# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21"]
# ///
"""MNIST in one file of plain PyTorch: train a small network, test it honestly, use it.

    python mnist.py --epochs 15 --device cuda    train, test and report
    python mnist.py --resume                     go on after an interruption
    python mnist.py --predict photo.jpg          read your own handwriting

Sections: Model, Data, Training, Checkpoints, Report, Command line. Each uses only what stands
above it; Model, Data, Checkpoints and Report work alone, copied out with the imports.
"""

import argparse
import io
import json
import math
import os
import signal
import socket
import sys
import textwrap
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

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


class BatchNorm(nn.BatchNorm2d):
    """Batch norm (Ioffe and Szegedy, 2015) in which CPU threads share no cache line of 16 floats.

    In training k neighbouring pixels pass as k times C channels, each with its own statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        (n, c, h, w), k = x.shape, 16 // math.gcd(16, x.shape[1])
        if not self.training or x.device.type != "cpu" or n * h * w % k:
            return super().forward(x)
        rows = x.permute(0, 2, 3, 1).reshape(-1, k * c)
        mean, var = self.running_mean.repeat(k), self.running_var.repeat(k)
        y = F.batch_norm(rows, mean, var, self.weight.repeat(k), self.bias.repeat(k), True)
        self.running_mean.copy_(mean.view(k, c).mean(0))
        self.running_var.copy_(var.view(k, c).mean(0))
        return y.view(n, h, w, c).permute(0, 3, 1, 2)


class ConvBlock(nn.Sequential):
    """Unpadded convolution, as MNIST has empty margins; norm; ``more``; GELU (Hendrycks, 2016)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *more: nn.Module) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, bias=False)
        super().__init__(conv, BatchNorm(c_out), *more, nn.GELU())


class ResidualBlock(nn.Sequential):
    """gelu(x + branch(x)) (He et al., 2015); a depthwise 5x5, then a 1x1 (Chollet, 2017)."""

    def __init__(self, c: int) -> None:
        depthwise = nn.Conv2d(c, c, 5, padding=2, groups=c, bias=False)
        pointwise = nn.Conv2d(c, c, 1, bias=False)
        super().__init__(depthwise, BatchNorm(c), pointwise, BatchNorm(c))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + super().forward(x))


class SimpleMNISTNet(Network):
    """A residual network of under 8,000 parameters; ``dropout`` acts before the last layer."""

    def __init__(self, widths: tuple[int, ...] = (8, 12, 16, 24), dropout: float = 0.0) -> None:
        a, b, c, d = widths
        super().__init__(
            ConvBlock(1, a, 3), ConvBlock(a, b, 3, nn.MaxPool2d(2)),  # 28 and 26 pixels wide
            ConvBlock(b, c, 3), ResidualBlock(c), ConvBlock(c, d, 1),  # 12, then 10
            ResidualBlock(d), nn.MaxPool2d(2), ResidualBlock(d), ResidualBlock(d),  # 10, then 5
            nn.AdaptiveAvgPool2d(1), nn.Dropout(dropout), nn.Conv2d(d, 10, 1), nn.Flatten(),
        )  # fmt: skip


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

MNIST_CRC32 = 0x3528FDDB  # of its images and labels, one after the other


def load_mnist(data_dir: str | Path = "data", download: bool = True) -> list[tuple[Tensor, Tensor]]:
    """Return MNIST's training and test (images, labels) from DIR/MNIST/raw, or download them.

    Images are uint8 (60000 or 10000, 1, 28, 28), labels int64 in 0..9. Raises ConnectionError
    where there are no files and none to be had, another OSError where they are damaged.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    try:
        sets = [datasets.MNIST(data_dir, train, download=download) for train in (True, False)]
        pairs = [(s.data[:, None], s.targets) for s in sets]
        if zlib.crc32(b"".join(t.numpy().tobytes() for p in pairs for t in p)) != MNIST_CRC32:
            raise ValueError("the checksum is wrong")
    except Exception as error:  # whatever failed on the way
        kind = OSError if any(raw.glob("*ubyte")) else ConnectionError
        files = "{train,t10k}-{images-idx3,labels-idx1}-ubyte"
        text = f"put {files} into {raw}, whole, or empty it and connect, to download them"
        raise kind(f"{text}: {error}") from error
    return pairs


# How digits are written, a line for each of 0 to 9: forms of one or two strokes, as the pen moves,
# points x, y of a 10x10 grid, y downwards. A point given twice is a corner.
FORMS = """\
5031232638597886837150 60412326385867757362604152 614022264968858270 4021242849788572504152
5059 6049 32505059 32505059|2979 4159
2240717356292989 1330607367390815467899 13316164381816466897 224061635639190726577998
21507254444475784928 22507163454575775928 3150716344344475784928 2241627344546576694928
30252585|6269 696060161686 21244574|7079 31255584|7269 697070161696 30345575|7168
70303024245375775928 3024245375775928|3080 7140316477594928 704034537577592917 90413465775828
603326395977553627 71402226385977755336 412226385978663527 604224275969765436 413224385978765437
20808049 20808049|3575 2220808049 22317181634549 213180718449 12223171735549|3575
71503133547678593836547371 50313354737150|54363859787654 714022435668593826447271
72503123456472717169 725031234564727176785938 704022345463|7069 7140233464717058 7141233445637159
"""


def draw_digits(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n digits that look handwritten; return uint8 (n, 1, 28, 28) and labels, int64 (n,).

    Forms are smoothed, shaken, slanted, turned and stroked by pens of random width, then fitted
    into 20x20 pixels and centred by mass in 28x28, as MNIST is (LeCun et al., 1998).
    """
    points, images = [], []
    for form in [form for line in FORMS.splitlines() for form in (line.split() * 12)[:12]]:
        for stroke in f"{form}|{form[:2]}".split("|")[:2]:  # where there is no second, a dot
            corners = stroke[:2] + stroke + stroke[-2:]  # its ends are corners too
            line = torch.tensor([int(digit) - 4.5 for digit in corners]).view(1, -1, 2).mT
            half = round(24 / (line.shape[2] - 1))  # a moving average rounds all but the corners
            line = F.interpolate(line, size=40, mode="linear", align_corners=True)
            points.append(F.avg_pool1d(line, 2 * half + 1, 1, half, count_include_pad=False)[0])
    splines = torch.stack(points).view(120, 2, 2, 40).transpose(1, 2).flatten(2)
    limits = torch.tensor([[0, 12], [-0.25, 0.25], [-0.25, 0.55], [0.75, 1.25], [0.85, 2.2]])
    low, high = limits.mT[..., None]
    labels, pixels = torch.randint(10, (n,), generator=generator), torch.arange(28) - 13.5
    for chunk in labels.split(200):
        noise = low + (high - low) * torch.rand(5, len(chunk), generator=generator)
        form, turn, slant, wide, radius = noise
        p = splines[chunk * 12 + form.long()]
        paper = 0.9 * torch.randn(len(chunk), 2, 10, 10, generator=generator)  # a shaky hand
        shake = F.grid_sample(paper, p.mT[:, None] / 4.5, "bicubic", "border", align_corners=True)
        shake = F.avg_pool1d(shake.view(-1, 2, 40), 9, 1, 4, count_include_pad=False)
        cos, sin = turn.cos(), turn.sin()
        turned = torch.stack([wide * cos, -sin - slant * cos, wide * sin, cos - slant * sin], 1)
        p = turned.view(-1, 2, 2) @ (p + shake.view(-1, 2, 80))
        radius, size = radius[:, None, None], p.amax(2, True) - p.amin(2, True)
        p = p * (20 - 2 * radius) / size.amax(1, True)
        length = F.pad(p.view(-1, 2, 2, 40).diff().norm(dim=1), (0, 1)).view(-1, 1, 80)
        p = p - (length * p).sum(2, True) / length.sum(2, True)
        for _ in range(2):  # again, centred by the mass of what was drawn
            # A sum of Gaussians along the stroke gives each pixel's distance from it, hence ink.
            x, y = (-(p[..., None] - pixels).square() / 2).exp().unbind(1)
            density = (y.mT * length) @ x / math.sqrt(2 * math.pi)
            ink = (radius + 0.5 - (-2 * density.clamp(1e-9, 1).log()).sqrt()).clamp(0, 1)
            mass = torch.stack([ink.sum(1), ink.sum(2)], 1) / ink.sum((1, 2))[:, None, None]
            p = p - (mass * pixels).sum(2, True)
        images.append((ink * 255).byte())
    return torch.cat(images)[:, None], labels


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
    images: Tensor, labels: Tensor, size: int, transform: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each image once, normalised, float (size, 1, 28, 28), with its label, int64 (size,).

    Takes uint8 (N, 1, 28, 28) and works on its device. To train, give a ``transform`` of float
    images in 0..1, such as augment: it makes the order a random one.
    """
    order = torch.randperm if transform else torch.arange
    for index in order(len(images), device=images.device).split(size):
        x = images[index].float() / 255
        x = transform(x) if transform else x
        yield (x - 0.1307) / 0.3081, labels[index]  # mean and deviation of the training pixels


# ------------------------------------------------------------------------------------- Training


def make_state(
    model: nn.Module, lr: float, schedule: str, epochs: int, steps: int, fp16: bool = False
) -> dict[str, Any]:
    """Return all that training changes: model, optimizer, scheduler and scaler (for float16).

    The schedule moves with every batch, ``steps`` an epoch: ``onecycle`` warms up for a fifth of
    the run, then anneals (Smith and Topin, 2018); ``step`` multiplies by 0.7 after each epoch.
    """
    sgd = SGD(model.parameters(), lr, 0.9, weight_decay=5e-5, nesterov=True, fused=True)
    scheduler: LRScheduler = StepLR(sgd, steps, 0.7 if schedule == "step" else 1.0)
    if schedule == "onecycle":
        total = epochs * steps + 1
        scheduler = OneCycleLR(sgd, lr, total, pct_start=0.2, cycle_momentum=False)
    scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=fp16)
    return {"model": model, "optimizer": sgd, "scheduler": scheduler, "scaler": scaler}


def capture(work: Callable[..., Tensor], x: Tensor, y: Tensor) -> Callable[..., Tensor]:
    """Return work(x, y) as a CUDA graph: all its kernels in one launch (Ng et al., 2021).

    The work is done three times before, to warm up. What is a number in Python, as a learning rate
    is, keeps its value of now: leave it outside. Raises RuntimeError where it can't be captured.
    """
    graph, inputs = torch.cuda.CUDAGraph(), (x.clone(), y.clone())
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries and memory are set up, off the default stream
        for _ in range(3):
            work(*inputs)
    with torch.cuda.graph(graph):  # waits for all that; from here on nothing is computed
        result = work(*inputs)

    def replay(x: Tensor, y: Tensor) -> Tensor:
        if x.shape != inputs[0].shape:  # the epoch's last batch
            return work(x, y)
        for held, new in zip(inputs, (x, y), strict=True):
            held.copy_(new)
        graph.replay()
        return result

    return replay


def train_one_epoch(
    state: dict[str, Any],
    loader: Iterable[Any],
    amp: torch.dtype | None = None,
    size: int = 0,
    graph: bool = False,
) -> list[float]:
    """Train on every batch (x, y) once; return the mean loss and the accuracy on the way.

    ``state`` is make_state's, ``amp`` autocast's dtype; a ``size`` in images draws a progress bar;
    with ``graph``, forward and backward pass are replayed as a CUDA graph.
    """
    model, optimizer, scheduler, scaler = state.values()

    def gradients(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, amp, enabled=amp is not None):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        return torch.stack([loss.detach() * len(y), (logits.argmax(1) == y).sum()])

    model.train()
    step: Callable[..., Tensor] = gradients
    start, seen, totals = time.perf_counter(), 0, torch.zeros(2)
    for i, (x, y) in enumerate(loader):
        if graph and i == 0:
            try:
                step = capture(gradients, x, y)
            except RuntimeError as error:
                print(f"notice: no CUDA graph, so a slower epoch: {' '.join(str(error).split())}")
        sums = step(x, y)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        seen, totals = seen + len(y), totals.to(sums) + sums  # on the device: reading waits for it
        if size and i % 50 == 0:
            rate, bar = seen / (time.perf_counter() - start), "#" * (20 * seen // size)
            text = f"{seen / size:4.0%}  loss {totals[0] / seen:.4f}  {rate:,.0f} images/s"
            print(f"\r[{bar:20}] {text}  {(size - seen) / rate:.0f} s left ", end="", flush=True)
    return (totals / seen).tolist()


@torch.inference_mode()
def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, amp: torch.dtype | None = None
) -> tuple[float, float, Tensor]:
    """Return the mean loss, the accuracy and the logits, float32 (N, 10), of uint8 images."""
    model.eval()
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        logits = torch.cat([model(x) for x, _ in batches(images, labels, 500)]).float()
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return F.cross_entropy(logits, labels).item(), accuracy, logits


# ---------------------------------------------------------------------------------- Checkpoints


def write_file(path: Path, content: bytes) -> None:
    """Replace a file in one step: whoever reads it, whenever a kill comes, finds it whole."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}); the old one is whole") from error


def save_checkpoint(path: Path, state: dict[str, Any], **facts: object) -> None:
    """Write ``{name}_state_dict`` of each part of the state, and the facts, plain values."""
    buffer = io.BytesIO()
    torch.save({f"{name}_state_dict": p.state_dict() for name, p in state.items()} | facts, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint, running no code of it, and into ``state``, if given, what belongs there.

    Raises OSError if it can't be read, ValueError if it is no whole checkpoint (its container
    holds a CRC-32 of every record) or does not fit the state.
    """
    content = path.read_bytes()
    try:
        if damaged := zipfile.ZipFile(io.BytesIO(content)).testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        )
        finite = all(t.isfinite().all() for t in checkpoint["model_state_dict"].values())
        if not finite or len(checkpoint["history"]) != checkpoint["epoch"]:
            raise ValueError("its weights are not finite, or its history is not its own")
        if not {"model", "amp"} <= checkpoint["config"].keys():
            raise ValueError("its config is not of this program")
        for name, part in (state or {}).items():
            part.load_state_dict(checkpoint[f"{name}_state_dict"])
            for p, slots in getattr(part, "state", {}).items():  # an optimizer does not check it
                if any(slot.shape != p.shape for slot in slots.values()):
                    raise ValueError("its optimizer's state is of another network")
    except Exception as error:  # a damaged file can fail in any way
        reason = " ".join((str(error) or repr(error)).split())[:120]
        raise ValueError(f"{path} is not a usable checkpoint: {reason}") from error
    return checkpoint


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint of the latest epoch, with a notice of each damaged one."""
    paths = folder.glob("mnist_model_epoch_*.pth")
    for path in sorted(paths, key=lambda p: (len(p.name), p.name), reverse=True):
        try:
            load_checkpoint(path)
            return path
        except ValueError as error:
            print(f"notice: {error}: going back to the one before it")
    return None


def best_epoch(history: list[dict[str, Any]]) -> int:
    """Return the epoch of the lowest validation loss, less noisy than accuracy; or the last."""
    return int(max(history, key=lambda e: (-(e["val_loss"] or 0), e["epoch"]))["epoch"])


# --------------------------------------------------------------------------------------- Report


def draw_image(image: Tensor) -> list[str]:
    """Return the middle of a uint8 (1, 28, 28) image in ASCII shades, 12 lines of 24."""
    cells = F.avg_pool2d(image[:, 2:26, 2:26].float(), (2, 1))  # a character is twice as tall
    return ["".join(" .:-=+*#%@"[int(v) * 10 // 256] for v in row) for row in cells[0].tolist()]


def draw_chart(history: list[dict[str, Any]], key: str, form: str) -> list[str]:
    """Return train_{key} (.) and test_{key} (o) against the epochs, which go down the page."""
    curves = [[e[f"{split}_{key}"] for e in history] for split in ("train", "test")]
    settled = [value for curve in curves for value in curve[len(curve) // 4 :]]
    low, high = min(settled), max(settled)  # what lies outside sits on the edge
    lines = ["", f"epoch  {key}: . training, o test", f"       {low:<31{form}}{high:>31{form}}"]
    for i in range(0, len(history), math.ceil(len(history) / 30)):
        row = [" "] * 62
        for mark, curve in zip(".o", curves, strict=True):
            row[round(61 * min(max((curve[i] - low) / (high - low or 1), 0), 1))] = mark
        lines.append(f"{i + 1:5} |{''.join(row)}|")
    return lines


def make_report(metrics: dict[str, Any], mistakes: list[tuple[Tensor, int, int, float]]) -> str:
    """Return the report of a run, at most 79 columns of ASCII.

    ``metrics`` is what metrics.json holds; a mistake is (image, label, answer, confidence).
    """
    history, config, table = metrics["history"], metrics["config"], metrics["confusion"]
    n, hits, z = sum(map(sum, table)), sum(table[i][i] for i in range(10)), 1.96
    share, scale = hits / n, 1 + z * z / n  # Wilson's (1927) 95% interval of a share
    middle, half = share + z * z / 2 / n, z * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2)
    interval = f"{(middle - half) / scale:.2%} to {(middle + half) / scale:.2%}"
    chosen = "best by validation" if config["val_size"] else "last, as nothing is held out"
    lines = [
        f"{metrics['data']} test accuracy {share:.2%} (95% interval {interval})",
        f"{n - hits} errors in {n:,}; {metrics['parameters']:,} parameters ({config['model']})",
        f"epoch {metrics['best_epoch']} of {config['epochs']}, the {chosen};"
        f" {sum(e['seconds'] for e in history):.0f} s on {config['device']}",
        *metrics["notice"].splitlines(),
    ]
    if (real := metrics["real_test_accuracy"]) is not None:
        lines.append(f"{real:.2%} of MNIST's real test images are read right, all of them unseen")
    lines += draw_chart(history, "loss", ".4f") + draw_chart(history, "accuracy", ".2%")
    lines += ["", f"true  answered{'':38} recall", " " * 5 + "".join(f"{i:5}" for i in range(10))]
    for i, row in enumerate(table):
        cells = "".join(f"{v or '.':>5}" for v in row)
        lines.append(f"{i:5}{cells} {row[i] / max(1, sum(row)):6.1%}")
    precision = (table[i][i] / max(1, sum(row[i] for row in table)) for i in range(10))
    cells = "".join(f"{f'{p * 100:.1f}'.replace('100.0', '100'):>5}" for p in precision)
    lines.append(f"prec.{cells}  %")
    for trio in (mistakes[:3], mistakes[3:6]):
        lines += ["", "  ".join(f"{f'{a} -> {b} {c:.1%}':24}" for _, a, b, c in trio)]
        lines += ["  ".join(cut) for cut in zip(*(draw_image(m[0]) for m in trio), strict=True)]
    return "\n".join(line.rstrip() for line in lines)


def draw_plot(history: list[dict[str, Any]]) -> bytes:
    """Return a PNG of loss and error, training against test, on log scales; needs matplotlib."""
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(10, 4), layout="constrained"), io.BytesIO()
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in ("train", "test"):
            values = [e[f"{split}_{key}"] for e in history]
            curve = values if key == "loss" else [100 * (1 - value) for value in values]
            axes.plot([e["epoch"] for e in history], curve, ".-")
        axes.set(xlabel="epoch", ylabel=key if key == "loss" else "error, %", yscale="log")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(["training (augmented)", "test"])
    figure.savefig(buffer, dpi=150)
    return buffer.getvalue()


def read_digit(path: str | Path) -> Tensor:
    """Turn a photo, scan or drawing of one digit into what MNIST holds, uint8 (1, 28, 28).

    A network misreads your digit if it does not look like its training images: light on black,
    fitted into 20x20 pixels, centred by mass (LeCun et al., 1998). Raises OSError if Pillow can't
    open the file, ValueError if it is blank.
    """
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    picture.thumbnail((140, 140))
    alpha = pil_to_tensor(picture.getchannel("A"))
    pixels = alpha if alpha.min() < 128 else pil_to_tensor(picture.convert("L"))
    grey = F.avg_pool2d(pixels / 255, 3, 1, 1, count_include_pad=False)
    edge = torch.cat([grey[0, 0], grey[0, -1], grey[0, :, 0], grey[0, :, -1]])
    grey = grey if edge.mean() > grey.mean() else 1 - grey  # dark ink on light paper
    paper = F.pad(grey, (70, 70, 70, 70), mode="replicate")
    for sign, size in ((1, (71, 1)), (1, (1, 71)), (-1, (71, 1)), (-1, (1, 71))):
        paper = sign * F.max_pool2d(sign * paper, size, 1)  # without anything dark and narrow
    ink = ((paper - grey) / paper.clamp(min=0.2))[0]  # ink takes a share of the light
    peak = ink.flatten().topk(max(1, ink.numel() // 200)).values[-1]
    if peak < 0.15:
        raise ValueError(f"nothing stands out in {path}")
    ink = ((ink / peak - 0.35) / 0.4).clamp(0, 1)
    rows, columns = ((ink > 0.5).any(d).nonzero() for d in (1, 0))
    ink = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    h, w = (max(1, round(20 * s / max(ink.shape))) for s in ink.shape)
    ink = F.interpolate(ink[None, None], (h, w), mode="bilinear", antialias=True)[0, 0]
    top, left = (28 - h) // 2, (28 - w) // 2
    ink = F.pad(ink / ink.max(), (left, 28 - w - left, top, 28 - h - top))
    mass = [(ink.sum(d) @ torch.arange(28.0) / ink.sum()).item() for d in (1, 0)]
    shift = [min(max(round(13.5 - m), -4), 4) for m in mass]  # 4 pixels are free on each side
    return (ink.roll(shift, (0, 1)) * 255).byte()[None]


# --------------------------------------------------------------------------------- Command line

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# The flags that make a run what it is. Without onecycle, the first may differ when it is resumed.
CONFIG = ("epochs", "model", "data", "val_size", "batch_size", "lr", "schedule", "seed", "amp")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags; wrong ones end the program with status 2."""
    form, none = argparse.ArgumentDefaultsHelpFormatter, argparse.SUPPRESS
    parser = argparse.ArgumentParser("mnist.py", formatter_class=form, argument_default=none)
    add = parser.add_argument_group("what to train").add_argument
    add("--model", choices=MODELS, default="simple", help="which network")
    add("--data", choices=["auto", "mnist", "synthetic"], default="auto", help="what to train on")
    add("--data-dir", default="data", metavar="DIR", help="folder of MNIST/raw, filled if empty")
    add("--val-size", type=int, default=5000, metavar="N", help="training images held out")
    add = parser.add_argument_group("how to train it").add_argument
    add("--epochs", type=int, default=15, metavar="N", help="times over the training images")
    add("--batch-size", type=int, default=64, metavar="N", help="images a step")
    add("--lr", type=float, metavar="F", help="highest learning rate (default: 0.4, wide: 0.05)")
    schedules = ["onecycle", "step", "constant"]
    add("--schedule", choices=schedules, default="onecycle", help="course of the learning rate")
    add("--seed", type=int, default=1, metavar="N", help="of the first run")
    add("--runs", type=int, default=1, metavar="N", help="runs, each with a seed of its own")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to run")
    add("--amp", choices=["auto", *AMP], default="auto", help="mixed precision; auto: on CUDA")
    add = parser.add_argument_group("what to do with it").add_argument
    add("--out", type=Path, default="model_checkpoints", metavar="DIR", help="folder for results")
    add("--resume", nargs="?", const="", metavar="CKPT", help="go on, from the newest by default")
    add("--evaluate", type=Path, metavar="CKPT", help="test a checkpoint instead of training")
    add("--predict", nargs="+", metavar="IMAGE", help="read image files instead of training")
    add("--dry-run", action="store_true", default=none, help="one small batch of everything")
    unset = dict.fromkeys(("lr", "resume", "evaluate", "predict"))
    args = parser.parse_args(argv, argparse.Namespace(dry_run=False, **unset))
    args.lr = {"wide": 0.05}.get(args.model, 0.4) if args.lr is None else args.lr
    lowest = {"val_size": 0, "seed": 0, "epochs": 1, "batch_size": 1, "runs": 1, "lr": 1e-9}
    for flag, low in lowest.items():
        if not low <= getattr(args, flag) < 2**40:
            parser.error(f"--{flag.replace('_', '-')} must be a number from {low} up")
    return args


def load_model(path: Path, device: str) -> tuple[Network, dict[str, Any]]:
    """Return the network of a checkpoint, on the device, and the checkpoint."""
    name = load_checkpoint(path)["config"].get("model")
    if name not in MODELS:
        raise ValueError(f"{path} holds a network that is not in this file")
    model = MODELS[name]().to(device, memory_format=torch.channels_last)
    return model, load_checkpoint(path, {"model": model})


def predict(paths: list[str], model: nn.Module, device: str) -> None:
    """Print each image file as the network sees it, and its three likeliest digits."""
    failed = 0
    for path in paths:
        try:
            image = read_digit(path)
        except (OSError, ValueError) as error:
            failed += 1
            print(f"{path}: not read: {error}")
            continue
        batch = image[None].to(device), torch.zeros(1, dtype=torch.long, device=device)
        shares, digits = evaluate(model, *batch)[2].softmax(1)[0].topk(3)
        answer = "  ".join(f"{d} {s:.1%}" for d, s in zip(digits, shares, strict=True))
        print(*draw_image(image), f"{path}: {answer}", sep="\n")
    if failed:
        raise ValueError(f"{failed} of {len(paths)} images could not be read")


def get_data(args: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the images and labels to train and to test on; settle ``args.data``."""
    asked, data, args.notice = args.data == "synthetic", {}, ""
    reason = "as asked for by --data synthetic"
    try:
        data["train"], data["test"] = load_mnist(args.data_dir, download=not asked)
    except ConnectionError as error:
        if args.data == "mnist":
            raise
        reason = reason if asked else f"as there is no MNIST: {error}"
    args.data = "mnist" if data and not asked else "synthetic"
    if args.data == "synthetic":
        notice = f"SYNTHETIC: drawn digits, so no figure here is one of MNIST, {reason}"
        args.notice = textwrap.fill(notice, 79, break_on_hyphens=False)
        print("!" * 79, args.notice, "!" * 79, sep="\n")
        data = {"real": data["test"]} if data else {}
        for name, n in (("train", 60_000), ("test", 10_000)):
            data[name] = draw_digits(n, torch.Generator().manual_seed(n))
    return data


def assess(
    path: Path, args: argparse.Namespace, data: dict[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """Test a checkpoint; return what metrics.json holds and the six most confident mistakes."""
    images, labels = data["test"]
    model, checkpoint = load_model(path, args.device)
    amp = AMP.get(checkpoint["config"]["amp"])
    _, accuracy, logits = evaluate(model, images, labels, amp)
    confidence, answers = logits.softmax(1).max(1)
    confusion = (labels * 10 + answers).bincount(minlength=100).view(10, 10).tolist()
    real = evaluate(model, *data["real"], amp)[1] if "real" in data else None
    metrics = {"parameters": model.count_parameters(), "config": checkpoint["config"]}
    metrics |= {"data": args.data, "notice": args.notice, "history": checkpoint["history"]}
    metrics |= {"best_epoch": checkpoint["epoch"], "test_accuracy": accuracy}
    metrics |= {"real_test_accuracy": real, "confusion": confusion}
    wrong = (answers != labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True)[:6]]
    columns = (images[worst].cpu(), *(t[worst].tolist() for t in (labels, answers, confidence)))
    return metrics, [*zip(*columns, strict=True)]


def restore(
    args: argparse.Namespace, state: dict[str, Any], config: dict[str, Any]
) -> list[dict[str, Any]]:
    """Read the run that goes on into the state; return its history, which is empty for a new one.

    Raises ValueError where --out or the checkpoint is of a run of other settings.
    """
    path = Path(args.resume) if args.resume else newest_checkpoint(args.out)
    before = load_checkpoint(path)["config"] if path else config
    for flag in CONFIG if args.schedule == "onecycle" or args.resume is None else CONFIG[1:]:
        if before.get(flag) != config[flag]:
            clash = f"--{flag.replace('_', '-')} is {config[flag]}, but was {before.get(flag)}"
            raise ValueError(f"{clash} in {path}: change the flag, or choose another --out")
    if args.resume is None:
        return []
    print(f"resuming from {path or 'nothing, as there is no checkpoint yet'}")
    history = load_checkpoint(path, state)["history"] if path else []
    if path and args.rank == 0:  # a kill may have come before the best epoch's second file
        best = path.with_name(f"mnist_model_epoch_{best_epoch(history)}.pth")
        write_file(args.out / "best_mnist_model.pth", best.read_bytes())
    return history


def fit(args: argparse.Namespace, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Do one run, or the rest of one, and write its files; return what metrics.json holds."""
    config = {flag: getattr(args, flag) for flag in (*CONFIG, "device")}
    size, amp, rank, world = len(data["train"][1]), AMP[args.amp], args.rank, args.world
    if args.model == "simple" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(4, torch.get_num_threads()))  # its tensors are small
    torch.manual_seed(args.seed * 10_000)
    model = MODELS[args.model]().to(args.device, memory_format=torch.channels_last)
    steps = math.ceil(size / args.batch_size)
    state = make_state(model, args.lr, args.schedule, args.epochs, steps, args.amp == "fp16")
    args.out.mkdir(parents=True, exist_ok=True)
    history, best = restore(args, state, config), args.out / "best_mnist_model.pth"
    parts = state | ({"model": DistributedDataParallel(model)} if world > 1 else {})
    graph = args.device == "cuda" and world == 1
    for epoch in range(len(history) + 1, args.epochs + 1):
        # The one seed of an epoch's order, augmentation and dropout, so resuming needs no other.
        torch.manual_seed(args.seed * 10_000 + epoch)
        start, loader = time.perf_counter(), batches(*data["train"], args.batch_size, augment)
        # This process's share, which is never empty.
        loader = ((x[rank % len(y) :: world], y[rank % len(y) :: world]) for x, y in loader)
        bar = sys.stdout.isatty() * size // world
        results: dict[str, Any] = {"train": train_one_epoch(parts, loader, amp, bar, graph)}
        rate = size / (time.perf_counter() - start)
        results["val"] = evaluate(model, *data["val"], amp) if args.val_size else (None, None)
        results["test"] = evaluate(model, *data["test"], amp)
        entry = {"epoch": epoch, "lr": state["scheduler"].get_last_lr()[0]}
        for name, (loss, accuracy, *_) in results.items():
            entry |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        history.append(entry | {"seconds": time.perf_counter() - start})
        if not math.isfinite(entry["train_loss"] + entry["test_loss"]):
            raise ValueError(f"the loss of epoch {epoch} is not finite: try a lower --lr")
        if rank == 0:
            facts = {k: v for k, v in entry.items() if "accuracy" in k or k == "epoch"}
            facts |= {"history": history, "config": config}
            save_checkpoint(args.out / f"mnist_model_epoch_{epoch}.pth", state, **facts)
            if best_epoch(history) == epoch:
                save_checkpoint(best, state, **facts)
        text = "".join(f"{k} {v[0]:.4f} {v[1]:.2%}  " for k, v in results.items() if v[0])
        text += f"{history[-1]['seconds']:.1f} s  {rate:,.0f} images/s"
        print(f"\repoch {epoch:2}/{args.epochs}  lr {entry['lr']:.4f}  {text}", flush=True)
    if rank:
        return {}
    metrics, mistakes = assess(best, args, data)
    metrics |= {"history": history, "config": config}  # the best epoch's know no later ones
    report = make_report(metrics, mistakes)
    write_file(args.out / "metrics.json", json.dumps(metrics, indent=1).encode())
    write_file(args.out / "report.txt", f"{report}\n".encode())
    print(f"\n{report}")
    try:
        write_file(args.out / "training_metrics.png", draw_plot(history))
    except ImportError:
        print("for training_metrics.png: pip install matplotlib, then --resume")
    return metrics


def run(args: argparse.Namespace) -> None:
    """Do what the flags say."""
    found = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type
    args.device = (found or "cpu") if args.device == "auto" else args.device
    if args.device not in ("cpu", found):
        raise ValueError(f"there is no {args.device} device here: leave out --device")
    args.amp = ("bf16" if args.device == "cuda" else "off") if args.amp == "auto" else args.amp
    if args.predict:
        path = args.evaluate or args.out / "best_mnist_model.pth"
        predict(args.predict, load_model(path, args.device)[0], args.device)
        return
    args.rank, args.world = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if args.world > 1:  # torchrun started this process beside others
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        sys.stdout = io.StringIO() if args.rank else sys.stdout  # only the first prints
    if args.rank:
        dist.barrier()  # until the first has downloaded
    data = get_data(args)
    if args.rank == 0 < args.world - 1:
        dist.barrier()
    if args.dry_run:
        args.epochs, args.out = 1, args.out / "dry_run"
        args.val_size = min(args.val_size, args.batch_size)
        n = args.batch_size + args.val_size
        data = {name: (images[:n], labels[:n]) for name, (images, labels) in data.items()}
    data = {name: (x.to(args.device), y.to(args.device)) for name, (x, y) in data.items()}
    images, labels = data["train"]
    size = len(labels) - args.val_size
    if size < args.batch_size:
        raise ValueError(f"{size} training images are less than a batch: lower --batch-size")
    data |= {"train": (images[:size], labels[:size]), "val": (images[size:], labels[size:])}
    if args.evaluate:
        print(make_report(*assess(args.evaluate, args, data)))
        return
    MODELS[args.model]().print_model_summary()
    out, results = args.out, []
    for seed in range(args.seed, args.seed + args.runs):
        args.seed, args.out = seed, out / f"seed_{seed}" if args.runs > 1 else out
        results.append(fit(args, data))
    if args.rank or args.runs == 1:
        return
    scores = torch.tensor([r["test_accuracy"] for r in results], dtype=torch.float64)
    summary = {"runs": results, "mean": scores.mean().item(), "std": scores.std().item()}
    write_file(out / "metrics.json", json.dumps(summary, indent=1).encode())
    print(f"\n{args.data} test accuracy, seed by seed: {'  '.join(f'{s:.2%}' for s in scores)}")
    print(f"mean {summary['mean']:.3%}, standard deviation {summary['std']:.3%}")


def main(argv: list[str] | None = None) -> str | None:
    """Run the command line; return what went wrong outside it, in one line."""
    args = parse_args(argv)
    socket.setdefaulttimeout(20)  # seconds: a silent network is no reason to hang

    def stop(number: int, _: object) -> None:
        text = f"stopped; {args.out} holds every finished epoch: the same with --resume goes on"
        print(f"\nmnist.py: {text}", file=sys.stderr)
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        run(args)
        return None
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        return f"mnist.py: error: {' '.join(str(error).split())}"
    except RuntimeError as error:  # what is left of gloo and nccl when another process dies
        if not (dist.is_initialized() and "Connection" in str(error)) and "NCCL" not in str(error):
            raise
        return "mnist.py: error: another process has ended, so this one does: go on with --resume"


if __name__ == "__main__":
    sys.exit(main())
