# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21"]
# ///
"""MNIST in plain PyTorch: 7,954 parameters, 99.57 ± 0.03% (10 seeds; epoch chosen on validation).

    python mnist.py --epochs 15 --device cuda    train, test and report
    python mnist.py --resume                     continue after an interruption

Sections: Model, Data, Training, Checkpoints, Report, Command line. Each uses only those above it.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import socket
import sys
import tempfile
import time
import zipfile
import zlib
from collections import namedtuple
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, accelerator, nn
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR, StepLR
from torchvision import datasets


# ---------------------------------------------------------------------------------------- Model
class Network(nn.Sequential):
    """Layers in a row, from normalised images, float32 (N, 1, 28, 28), to logits, (N, 10)."""

    def __getitem__(self, index: int | slice) -> nn.Module:
        return nn.Sequential(*self)[index]  # Sequential's own slicing calls type(self)(layers)

    def count_parameters(self) -> int:
        """Return the number of parameters, frozen ones included."""
        return sum(p.numel() for p in self.parameters())

    def print_model_summary(self) -> None:
        """Print each layer with its output shape and number of parameters, and the total."""
        x = torch.zeros(1, 1, 28, 28)
        for layer in copy.deepcopy(self).float().cpu().eval():  # a copy: this one stays as it is
            x = layer(x)
            parts = ", ".join(type(m).__name__ for m in layer.modules() if not list(m.children()))
            print(f"{parts:<48}{('N', *x.shape[1:])!s:<18}{Network.count_parameters(layer):>8,}")
        print(f"{type(self).__name__}: {self.count_parameters():,} parameters (budget: 8,000)")


class SimpleMNISTNet(Network):
    """A residual network of 7,954 parameters."""

    def __init__(self) -> None:
        super().__init__(
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
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),  # 10 logits
        )


def conv_block(c_in: int, c_out: int, k: int, norm: bool = True) -> nn.Sequential:
    """Return convolution, batch norm unless norm=False, and ReLU; unpadded: margins are empty."""
    conv = nn.Conv2d(c_in, c_out, k, bias=False)
    layers = [conv, nn.BatchNorm2d(c_out), nn.ReLU()] if norm else [conv, nn.ReLU()]
    return nn.Sequential(*layers)


class ResidualBlock(nn.Sequential):
    """A skip connection (He et al., 2015) around a separable convolution (Chollet, 2017)."""

    def __init__(self, c: int) -> None:
        depthwise = nn.Conv2d(c, c, 5, padding=2, groups=c, bias=False)
        pointwise = nn.Conv2d(c, c, 1, bias=False)
        super().__init__(depthwise, nn.BatchNorm2d(c), pointwise, nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + super().forward(x))


class WideMNISTNet(Network):
    """A plain network of 189,984 parameters: 3x3 and 1x1 convolutions without biases, and ReLU."""

    def __init__(self) -> None:
        super().__init__(
            conv_block(1, 32, 3, norm=False),  # 32 channels of 26x26
            conv_block(32, 64, 3, norm=False),  # 64 of 24x24
            conv_block(64, 128, 3, norm=False),  # 128 of 22x22
            nn.MaxPool2d(2),  # 128 of 11x11
            conv_block(128, 32, 1, norm=False),  # 32 of 11x11
            conv_block(32, 64, 3, norm=False),  # 64 of 9x9
            conv_block(64, 128, 3, norm=False),  # 128 of 7x7
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(128, 10, 1, bias=False),
            nn.Flatten(),  # 10 logits
        )
        for weight in self.parameters():  # He et al. (2015): the signal keeps its scale
            nn.init.kaiming_normal_(weight, nonlinearity="relu")


# ----------------------------------------------------------------------------------------- Data
DATASET, CRC32 = datasets.MNIST, 0xE6625E56  # the checksum of its four files, one after another
FILES = [f"{s}-{part}-ubyte" for s in ("train", "t10k") for part in ("images-idx3", "labels-idx1")]
Split = tuple[Tensor, Tensor]  # images, uint8 (N, 1, 28, 28), and labels, int64 (N,)


def load_mnist(data_dir: str | Path = "data") -> list[Split]:
    """Return training and test set, downloaded if missing; ConnectionError without a network."""
    raw = Path(os.path.expanduser(data_dir), DATASET.__name__, "raw")
    if not all((raw / name).exists() for name in FILES):
        print(f"downloading {DATASET.__name__} to {str(raw)!a}", flush=True)
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw.parent) as folder:
            try:
                DATASET(folder, download=True)
            except (RuntimeError, ConnectionError, TimeoutError) as error:
                raise ConnectionError(" ".join(f"{error}: put {FILES} in {raw}".split())) from error
            for name in FILES:  # moved in one step each, so none is ever there in part
                os.replace(Path(folder, DATASET.__name__, "raw", name), raw / name)
    if zlib.crc32(b"".join((raw / name).read_bytes() for name in FILES)) != CRC32:
        raise OSError(f"a file in {raw} is damaged: delete the folder to download it again")
    sets = [DATASET(raw.parents[1], train) for train in (True, False)]
    return [(s.data[:, None], s.targets) for s in sets]


def augment(images: Tensor, strength: float = 1.0) -> Tensor:
    """Distort float images, (N, 1, 28, 28), each at random; ``strength`` 0 leaves them alone."""
    n, pixel = len(images), 2 / 28  # affine_grid's coordinates span -1 to 1 over 28 pixels
    noise = strength * (2 * torch.rand(5, n, device=images.device) - 1)
    angle = noise[0] * math.radians(13)
    scale = 1 + noise[1] * 0.13
    shear = noise[2] * 0.13
    shift_x, shift_y = noise[3:] * 2.6 * pixel
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), images.shape, align_corners=False)
    # Simard et al. (2003): 5x5 random displacements of about 0.3 pixels, smoothly interpolated.
    field = strength * 0.3 * pixel * torch.randn(n, 2, 5, 5, device=images.device)
    field = F.interpolate(field, images.shape[2:], mode="bicubic", align_corners=True)
    return F.grid_sample(images, grid + field.permute(0, 2, 3, 1), align_corners=False)


def draw_digits(n: int, seed: int) -> Split:
    """Return n warped digits of a 3x5 font: they show that the program runs, no more."""
    font = "75557 26227 71747 71717 55711 74717 74757 71222 75757 75717"  # octal: a digit is a row
    pixels = torch.tensor([[[int(r) >> i & 1 for i in (2, 1, 0)] for r in d] for d in font.split()])
    glyphs = F.pad(F.interpolate(pixels[:, None].float(), scale_factor=4), (8, 8, 4, 4))
    labels = torch.randint(10, (n,), generator=torch.manual_seed(seed))  # seeds augment, too
    return (torch.cat([augment(glyphs[part]) for part in labels.split(1000)]) * 255).byte(), labels


def batches(data: Split, size: int, train: bool = False, strength: float = 1) -> Iterator[Split]:
    """Yield normalised images, (N <= size, 1, 28, 28), and labels; shuffled, augmented to train."""
    images, labels = data
    n = len(labels)
    order = torch.randperm(n)[: n // size * size] if train else torch.arange(n)
    for index in order.to(labels.device).split(size):
        x = images[index].float() / 255
        x = augment(x, strength) if train else x
        yield (x - 0.1307) / 0.3081, labels[index]  # mean and deviation of MNIST's pixels


# ------------------------------------------------------------------------------------- Training
TrainState = namedtuple("TrainState", "model optimizer scheduler scaler")  # what a step changes


def make_state(
    model: nn.Module, lr: float, schedule: str, epochs: int, steps: int, fp16: bool = False
) -> TrainState:
    """Return the model, SGD, a schedule for ``epochs`` of ``steps``, and a scaler for fp16."""
    weights = list(model.parameters())
    device = weights[0].device.type
    sgd = torch.optim.SGD(weights, lr, 0.9, weight_decay=5e-5, nesterov=True, fused=device != "mps")
    for weight in weights:  # or fused SGD reads uninitialised ones after a skipped fp16 step
        sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    total = max(10, epochs * steps + 1)  # OneCycleLR fails on very few steps
    scheduler = {  # one cycle: Smith and Topin (2018)
        "onecycle": lambda: OneCycleLR(sgd, lr, total, pct_start=0.2, cycle_momentum=False),
        "step": lambda: StepLR(sgd, step_size=steps, gamma=0.7),
        "constant": lambda: ConstantLR(sgd, factor=1.0),
    }[schedule]()
    return TrainState(model, sgd, scheduler, torch.amp.GradScaler(device, enabled=fp16))


def train_one_epoch(
    state: TrainState, loader: Iterable, amp: torch.dtype | None = None, steps: int = 0
) -> tuple[float, float]:
    """Train on each batch; return mean loss and accuracy. With ``steps``, draw a progress bar."""
    model, optimizer, scheduler, scaler = state
    model.train()
    loss_sum, correct, seen = 0.0, 0.0, 0  # sums stay on the device: .item() would wait for it
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
        if steps and (step % 20 == 0 or step == steps):
            bar = f"[{'#' * (20 * step // steps):20}] {step}/{steps} loss {loss_sum / seen:.4f}"
            print(f"{bar} accuracy {correct / seen:.2%}", end="\r", flush=True)
    return float(loss_sum) / seen, float(correct) / seen


@torch.inference_mode()
def evaluate(model: nn.Module, data: Split) -> tuple[float, float, Tensor]:
    """Return mean loss, accuracy and logits, (N, 10), in float32 whatever training ran in."""
    model.eval()
    logits = torch.cat([model(x) for x, _ in batches(data, 500)])
    accuracy = (logits.argmax(1) == data[1]).sum().item() / len(logits)
    return F.cross_entropy(logits, data[1]).item(), accuracy, logits


# ---------------------------------------------------------------------------------- Checkpoints
SPLITS = ("train", "val", "test")
METRICS = ["epoch", "lr", "seconds"] + [f"{s}_{k}" for s in SPLITS for k in ("loss", "accuracy")]


def write_file(path: Path, content: bytes) -> None:
    """Write atomically: a reader never sees a partial file, even after a kill."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
        Path(folder, path.name).write_bytes(content)
        os.replace(Path(folder, path.name), path)


def save_checkpoint(path: str | Path, history: list[dict], config: dict, **parts: object) -> None:
    """Write the state of ``model=...`` and other parts, and the METRICS of each epoch so far."""
    content = {f"{name}_state_dict": part.state_dict() for name, part in parts.items()}
    buffer = io.BytesIO()
    torch.save(content | history[-1] | {"history": history, "config": config}, buffer)
    write_file(Path(path), buffer.getvalue())


def load_checkpoint(path: str | Path, **parts: object) -> dict:
    """Read a checkpoint without running code in it, and load ``model=...`` and other parts."""
    content = Path(path).read_bytes()
    try:
        damaged = zipfile.ZipFile(io.BytesIO(content)).testzip()  # by the CRC-32 of its parts
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if damaged or not {"history", "config"} <= checkpoint.keys():
            raise ValueError("a wrong checksum, or another program's file")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[f"{name}_state_dict"])
    except Exception as error:  # a damaged or foreign file can fail in any way
        raise OSError(f"{path} is damaged, or not a checkpoint of this network") from error
    return checkpoint


# --------------------------------------------------------------------------------------- Report
HEADER = f"{'epoch':>5} {'lr':>6}" + "".join(f"{s:>16}" for s in SPLITS) + " seconds  val error"


def make_row(metrics: dict) -> str:
    """Return an epoch's line under HEADER: one # per 0.2% of validation error, at most nine."""
    row = f"{metrics['epoch']:5} {metrics['lr']:6.4f}"
    for split in SPLITS:
        row += f" {metrics[split + '_loss']:7.4f} {metrics[split + '_accuracy']:7.2%}"
    bar = "#" * min(9, round((1 - metrics["val_accuracy"]) / 0.002))
    return f"{row} {metrics['seconds']:7.1f}  {bar}"


def make_report(metrics: dict) -> str:
    """Return the text of report.txt from the content of metrics.json."""
    accuracy, count = metrics["test_accuracy"], sum(sum(row) for row in metrics["confusion"])
    margin = 1.96 * math.sqrt(accuracy * (1 - accuracy) / count)  # of a 95% interval
    lines = [
        f"{metrics['data']} test accuracy {accuracy:.2%} +- {margin:.2%}",
        f"{metrics['parameters']:,} parameters, weights of epoch {metrics['best_epoch']}",
        "",
        HEADER,
        *map(make_row, metrics["history"]),
        "",
        f"true  predicted{'':41}recall",
        "     " + "".join(f"{digit:5}" for digit in range(10)),
    ]
    for label, row in enumerate(metrics["confusion"]):
        cells = "".join(f"{n or '.':>5}" for n in row)
        lines.append(f"{label:5}{cells} {row[label] / max(1, sum(row)):6.1%}")
    return "\n".join(lines)


def draw_plot(history: list[dict]) -> bytes:
    """Return a PNG of the loss and the accuracy, epoch by epoch; needs matplotlib."""
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(10, 4), layout="constrained"), io.BytesIO()
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in SPLITS:
            axes.plot([m["epoch"] for m in history], [m[f"{split}_{key}"] for m in history], ".-")
        axes.set(xlabel="epoch", ylabel=key)
        axes.legend(SPLITS)
    figure.savefig(buffer, dpi=150)
    return buffer.getvalue()


# --------------------------------------------------------------------------------- Command line
ERROR = "mnist.py: error:"
MODELS = {"simple": SimpleMNISTNet, "wide": WideMNISTNet}
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Flags that must not change within a run: checkpoints hold them, and --resume reads them there.
CONFIG = ("model", "data", "val_size", "epochs", "batch_size", "lr", "schedule", "seed", "amp")


def parse_args(argv: list[str], **defaults: object) -> argparse.Namespace:
    """Parse and check the flags, and fill in the automatic ones; bad usage exits with status 2."""
    parser = argparse.ArgumentParser("mnist.py")
    add, schedules = parser.add_argument, ["onecycle", "step", "constant"]
    add("--model", choices=MODELS, default="simple", help="network (%(default)s)")
    add("--data", choices=["auto", "mnist", "synthetic"], default="auto", help="images to train on")
    add("--data-dir", default="data", metavar="DIR", help="holds MNIST/raw (%(default)s)")
    add("--val-size", type=int, default=5000, metavar="N", help="validation images (%(default)s)")
    add("--epochs", type=int, default=15, metavar="N", help="training epochs (%(default)s)")
    add("--batch-size", type=int, metavar="N", help="training batch size (64; on CUDA 128)")
    add("--lr", type=float, metavar="F", help="highest learning rate (0.4; for wide 0.03)")
    add("--schedule", choices=schedules, default="onecycle", help="learning rate (%(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="random seed (%(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to run")
    add("--amp", choices=["auto", *AMP], default="auto", help="precision (auto: 16 bits on CUDA)")
    add("--out", default="model_checkpoints", metavar="DIR", help="output folder (%(default)s)")
    add("--resume", action="store_true", help="continue (or start) the run in --out")
    add("--evaluate", metavar="CKPT", help="test a checkpoint instead of training")
    add("--dry-run", action="store_true", help="try one batch of everything; keep no output")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    best = accelerator.current_accelerator().type if accelerator.is_available() else "cpu"
    args.device = best if args.device == "auto" else args.device
    if args.device not in ("cpu", best):
        raise SystemExit(f"{ERROR} there is no {args.device} device here: leave out --device")
    if args.amp == "auto" and args.device == "cuda":
        args.amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    args.amp = "off" if args.amp == "auto" else args.amp
    if (args.device, args.amp) == ("mps", "fp16") and not args.evaluate:
        parser.error("--amp fp16 is not reliable on mps: use bf16 or off")
    if not all(n is None or n > 0 for n in (args.val_size, args.epochs, args.batch_size, args.lr)):
        parser.error("--val-size, --epochs, --batch-size and --lr must be above 0")
    args.batch_size = args.batch_size or (128 if args.device == "cuda" else 64)
    args.lr = args.lr or (0.03 if args.model == "wide" else 0.4)
    if args.dry_run:
        args.epochs, args.val_size = 1, args.batch_size
    args.out = Path(os.path.expanduser(args.out), "synthetic" if args.data == "synthetic" else "")
    return args


def open_run(argv: list[str]) -> tuple[argparse.Namespace, Path | None]:
    """Return the flags, and the checkpoint to test or resume; its flags become the defaults."""
    args = parse_args(argv)
    found = {path.stem.split("_")[-1]: path for path in args.out.glob("*mnist_model*.pth")}
    newest = max(found, key=lambda epoch: int(epoch) if epoch.isdecimal() else 0, default=None)
    if not args.evaluate and (args.dry_run or not found):
        return args, None
    if not (args.resume or args.evaluate):
        raise SystemExit(f"{ERROR} {args.out} holds a run: add --resume, or choose another --out")
    path = Path(args.evaluate or found[newest])
    config = load_checkpoint(path)["config"]
    args = parse_args(argv, **config)
    args.out = path.parent
    for flag in CONFIG if args.resume else ():
        old, new = config[flag], getattr(args, flag)
        if new not in (old, "auto") and (flag != "epochs" or args.schedule == "onecycle"):
            text = f"--{flag.replace('_', '-')} is {new}, but the run in {args.out} has {old}"
            raise SystemExit(f"{ERROR} {text}: leave it out, or choose another --out")
    return args, path


def get_data(args: argparse.Namespace) -> dict[str, Split]:
    """Return the splits "train", "val" and "test" on the device."""
    if args.data == "synthetic":
        train, test = draw_digits(60_000, seed=0), draw_digits(10_000, seed=1)
    else:
        train, test = load_mnist(args.data_dir)
    size = args.batch_size if args.dry_run else len(train[1]) - args.val_size
    if size < args.batch_size:
        raise SystemExit(f"{ERROR} --val-size leaves {size} images to train on, less than a batch")
    splits = {"train": [t[:size] for t in train], "val": [t[-args.val_size :] for t in train]}
    splits["test"] = [t[: args.batch_size] for t in test] if args.dry_run else test
    return {name: tuple(t.to(args.device) for t in split) for name, split in splits.items()}


def train(args: argparse.Namespace, model: nn.Module, data: dict, path: Path | None) -> list[dict]:
    """Train, from the checkpoint at ``path`` if any; save each epoch; return the history."""
    steps = len(data["train"][1]) // args.batch_size
    state = make_state(model, args.lr, args.schedule, args.epochs, steps, args.amp == "fp16")
    parts, config = state._asdict(), {flag: getattr(args, flag) for flag in CONFIG}
    history = load_checkpoint(path, **parts)["history"] if path else []
    bar = steps if sys.stdout and sys.stdout.isatty() else 0
    print(HEADER, *map(make_row, history), sep="\n")
    for epoch in range(len(history) + 1, args.epochs + 1):
        # Each epoch has its own seed, so that a resumed run draws the same random numbers.
        torch.manual_seed(args.seed * 10_000 + epoch)
        start, lr = time.perf_counter(), state.scheduler.get_last_lr()[0]
        strength = 1 - 0.7 * (epoch - 0.5) / args.epochs  # augmentation fades
        loader = batches(data["train"], args.batch_size, train=True, strength=strength)
        scores = [*train_one_epoch(state, loader, AMP[args.amp], bar)]
        scores += [*evaluate(model, data["val"])[:2], *evaluate(model, data["test"])[:2]]
        metrics = dict(zip(METRICS, [epoch, lr, time.perf_counter() - start, *scores], strict=True))
        if not math.isfinite(metrics["train_loss"] + metrics["val_loss"]):
            raise SystemExit(f"{ERROR} the loss of epoch {epoch} is not finite: try a lower --lr")
        print(make_row(metrics), flush=True)
        history.append(metrics)
        if metrics is min(history, key=lambda m: m["val_loss"]):  # less noisy than the accuracy
            save_checkpoint(args.out / "best_mnist_model.pth", history, config, **parts)
        # Written last: if killed before this, resuming repeats the epoch.
        save_checkpoint(args.out / f"mnist_model_epoch_{epoch}.pth", history, config, **parts)
    return history


def report(args: argparse.Namespace, model: nn.Module, data: Split, history: list | None) -> None:
    """Test --evaluate's checkpoint, or the run's best; print the report; save it after a run."""
    checkpoint = load_checkpoint(args.evaluate or args.out / "best_mnist_model.pth", model=model)
    _, accuracy, logits = evaluate(model, data)
    confusion = (data[1] * 10 + logits.argmax(1)).bincount(minlength=100).view(10, 10).tolist()
    metrics = dict(data=args.data, parameters=model.count_parameters(), test_accuracy=accuracy)
    metrics |= dict(history=history or checkpoint["history"], best_epoch=len(checkpoint["history"]))
    metrics |= dict(config={flag: getattr(args, flag) for flag in CONFIG}, confusion=confusion)
    text = make_report(metrics)
    print(f"\n{text}", flush=True)
    if history:
        write_file(args.out / "metrics.json", json.dumps(metrics, indent=1).encode())
        write_file(args.out / "report.txt", f"{text}\n".encode())
        with contextlib.suppress(ImportError):  # matplotlib is optional
            write_file(args.out / "training_metrics.png", draw_plot(history))


def main(argv: list[str] = sys.argv[1:]) -> None:
    """Train (or resume) and report, or test a checkpoint; errors are raised as SystemExit."""
    try:
        args, path = open_run(argv)
        try:
            data = get_data(args)
        except ConnectionError as error:
            if args.data != "auto":
                raise
            print("!" * 79, f"SYNTHETIC: printed digits, not MNIST: {error}", "!" * 79, sep="\n")
            return main([*argv, "--data=synthetic"])
        args.data = "dry run" if args.dry_run else "mnist" if args.data == "auto" else args.data
        print(f"{args.data} on {args.device}, amp {args.amp}, seed {args.seed}; {str(args.out)!a}")
        torch.manual_seed(args.seed * 10_000)
        # channels_last is faster on a CPU, not on CUDA; on mps it has bugs.
        layout = torch.channels_last if args.device == "cpu" else torch.contiguous_format
        model, history = MODELS[args.model]().to(args.device, memory_format=layout), None
        with tempfile.TemporaryDirectory() as folder:  # a dry run's output, deleted afterwards
            args.out = Path(folder) if args.dry_run else args.out
            if not args.evaluate:
                model.print_model_summary()
                args.out.mkdir(parents=True, exist_ok=True)
                history = train(args, model, data, path)
            report(args, model, data["test"], history)
    except KeyboardInterrupt:
        print("\nmnist.py: stopped: to continue training, add --resume", file=sys.stderr)
        sys.exit(130)
    except (OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"{ERROR} {' '.join(str(error).split())}")


if __name__ == "__main__":
    socket.setdefaulttimeout(20)  # seconds: a silent server is no reason to wait for ever
    main()
