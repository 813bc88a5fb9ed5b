#!/usr/bin/env python3
"""Runs the README's recipes on a small MNIST of synthetic digits: python .ci/test_readme.py."""

import re
import runpy
import socket
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision import datasets, transforms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import mnist
from test_mnist import (  # noqa: F401
    BEST,
    ERROR,
    IMAGES,
    LAST,
    SMALL,
    SPLITS,
    data_dir,
    known_history,
    metrics_of,
    run,
    same_bits,
    weights_of,
    write_mnist,
)
from test_mnist import main as call

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_of(start):
    """The README's Python that begins with these words."""
    return re.search(rf"```python\n({start}.*?)```", README, re.DOTALL)[1]


def predict(folder):
    """The names in the README's predict.py, as if saved in a folder."""
    names = {"__name__": "predict", "__file__": str(folder / "predict.py")}
    exec(code_of("import sys"), names)
    return names


def pictures_of(digit):
    """A digit as people hand it in."""
    ink = to_pil_image(digit).resize((280, 280))
    photo = ImageOps.expand(ImageOps.invert(ink), 90, 255)
    values, (_, top, _, bottom) = pil_to_tensor(photo)[0].int(), ink.getbbox()
    yield from (photo, ImageOps.invert(photo), ImageOps.expand(photo, 60, 40))  # on a table
    yield photo.crop((0, 90 + top, 460, 90 + bottom))  # it touches the border
    yield to_pil_image((values * torch.linspace(0.5, 1, 460)).byte())  # a shadow
    yield Image.fromarray((values * 200).numpy().astype("uint16"))
    yield Image.fromarray((values / 255).numpy())
    for level in (0, 255):  # on a transparent ground
        yield Image.merge("LA", (Image.new("L", ink.size, level), ink))
    yield Image.merge("LA", (photo, ImageOps.invert(photo).point(lambda v: 255 * (v > 0))))
    for pen in (ImageFilter.MaxFilter(9), ImageFilter.MinFilter(9)):  # thick, thin
        yield ImageOps.expand(ImageOps.invert(ink.filter(pen)), 90, 255)
    yield ImageOps.expand(photo.resize((120, 120)), 300, 255)
    ImageDraw.Draw(photo).ellipse((360, 360, 520, 560), 100)  # a hand
    yield photo


def test_a_download_does_not_wait_for_ever(monkeypatch):
    limit = Mock()
    monkeypatch.setattr(socket, "setdefaulttimeout", limit)
    monkeypatch.setattr(sys, "argv", ["mnist.py", "--evaluate", "gone"])
    with pytest.raises(SystemExit):
        runpy.run_path(mnist.__file__, run_name="__main__")
    limit.assert_called_once_with(20)


def test_a_seed_decides_the_first_weights(run, monkeypatch):  # noqa: F811
    seeds = Mock(side_effect=torch.manual_seed)
    monkeypatch.setattr(torch, "manual_seed", seeds)
    run("--epochs 2 --seed 3")
    assert [call.args for call in seeds.call_args_list] == [(30_000,), (30_001,), (30_002,)]


def test_the_statistics_of_one_seed_or_many(run, capsys):  # noqa: F811
    code = code_of("import glob")
    for seed in (1, 2):
        run("--epochs 1 --seed", seed, f"--out runs/{seed}")
        capsys.readouterr()
        exec(code, {})
        line = capsys.readouterr().out
        assert re.fullmatch(rf"[\d.]+% ± [\d.]+% \([\d.]+%\), n = {seed}\n", line)


def test_the_loop_runs(data_dir, capsys):  # noqa: F811
    exec(code_of("from mnist").replace("60_000", "400"), {})
    assert "test accuracy" in capsys.readouterr().out


@pytest.fixture
def adapted(monkeypatch):
    """Put an edited copy of mnist.py in its place, as people make them."""

    def edit(*changes):
        source = Path(mnist.__file__).read_text(encoding="utf-8")
        for old, new in changes:
            assert source.count(old) == 1, f"to be edited, but not once in mnist.py: {old}"
            source = source.replace(old, new)
        exec(source, names := {"__name__": "adapted"})
        monkeypatch.setattr(mnist, "main", names["main"])
        return names

    return edit


SGD = "SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-5, nesterov=True)"
ONECYCLE = "OneCycleLR(sgd, lr, total, pct_start=0.2, cycle_momentum=False)"
COSINE = "torch.optim.lr_scheduler.CosineAnnealingLR(sgd, total)"
OPTIMIZERS = [
    (SGD, "torch.optim.AdamW(model.parameters(), lr / 100)"),
    (SGD, "torch.optim.RMSprop(model.parameters(), lr / 100)"),
    (SGD, "SGD([{'params': [p]} for p in model.parameters()], lr, momentum=0.9)"),
    (ONECYCLE, COSINE),
]
SEED, SECONDS = '    add("--seed"', '        m["seconds"] ='
SWITCH = "action=__import__('argparse').BooleanOptionalAction"
SETTINGS = [  # as given by hand, as defined, as kept
    ("", "type=float, default=0.0", 0.0),
    ("--new 0.5", "type=float, default=0.0", 0.5),
    ("--new a=b", "default='a -b'", "a=b"),
    ("", "default='a -b'", "a -b"),
    ("", "type=int", None),
    ("", "action='store_true'", False),
    ("--new", "action='store_true'", True),
    ("--no-new", f"{SWITCH}, default=True", False),
    ("", f"{SWITCH}, default=True", True),
    ("--new", f"{SWITCH}, default=False", True),
]
METRICS = {"a": "-0.5", "b": "math.nan", "c": "True", "d": "[1, 2.5]", "e": "None", "f": "'x'"}


@pytest.mark.parametrize("change", OPTIMIZERS)
def test_any_optimizer_and_schedule_trains_and_resumes(run, adapted, change):  # noqa: F811
    adapted(change)
    run("--epochs 3")
    whole = weights_of(LAST)
    LAST.unlink()
    assert call("--resume") is None
    assert same_bits(whole, weights_of(LAST))
    assert not same_bits(whole, weights_of("out/mnist_model_epoch_1.pth"))


@pytest.mark.parametrize(("given", "defined", "kept"), SETTINGS)
def test_a_flag_added_is_a_setting_of_the_run(run, adapted, given, defined, kept):  # noqa: F811
    adapted((SEED, f'    add("--new", {defined})\n{SEED}'))
    run("--epochs 3", given)
    LAST.unlink()
    assert call("--resume") is None
    assert metrics_of()["config"]["new"] == kept
    assert call(f"--evaluate {BEST}") is None
    if kept is False and "store_true" in defined:
        assert "--new is True, but" in call("--resume --new")


def test_a_metric_added_is_saved_and_read_again(run, adapted):  # noqa: F811
    lines = "".join(f"        m['{name}'] = {value}\n" for name, value in METRICS.items())
    adapted((SECONDS, lines + SECONDS))
    run("--epochs 3")
    LAST.unlink()
    assert call("--resume") is None
    assert call(f"--evaluate {BEST}") is None
    for m in metrics_of()["history"]:
        assert repr([m[name] for name in METRICS]) == "[-0.5, nan, True, [1, 2.5], None, 'x']"


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_another_data_set_is_a_change_of_one_word(run, adapted, capsys, name):  # noqa: F811
    write_mnist(Path(f"data/{name}/raw"))
    train, test = adapted(("datasets.MNIST  #", f"datasets.{name}  #"))["load_mnist"]("data")
    assert torch.equal(torch.cat([train[0], test[0]]), IMAGES)
    assert run("--epochs 1") is None
    assert f"\n{name.lower()} test accuracy" in capsys.readouterr().out
    assert metrics_of()["data"] == torch.load(BEST)["config"]["data"] == name.lower()


def test_a_checkpoint_of_another_data_set_is_refused(run, adapted, monkeypatch):  # noqa: F811
    write_mnist(Path("data/FashionMNIST/raw"))
    with monkeypatch.context() as patched:
        patched.setattr(mnist, "main", mnist.main)
        adapted(("datasets.MNIST  #", "datasets.FashionMNIST  #"))
        run("--epochs 1")
        patched.undo()
    for flags in ("--resume", f"--evaluate {BEST}"):
        line = rf"{ERROR}out/.*pth: argument --data: .*'fashionmnist'.*"
        assert re.fullmatch(line, call(flags))


def test_a_checkpoint_of_before_a_setting_is_still_evaluated(run):  # noqa: F811
    run("--epochs 1")
    content = torch.load(BEST)
    del content["config"]["images"], content["config"]["amp"]
    torch.save(content, BEST)
    assert call(f"--evaluate {BEST}") is None


def test_the_weights_suit_standard_preprocessing(run, data_dir):  # noqa: F811
    run("--epochs 25 --lr 0.05")
    model = mnist.SimpleMNISTNet().eval()
    model.load_state_dict(weights_of(BEST))
    normalize = transforms.Normalize((0.1307,), (0.3081,))
    transform = transforms.Compose([transforms.ToTensor(), normalize])
    images = datasets.MNIST(data_dir, train=False, transform=transform)
    hits = sum(model(x[None]).argmax().item() == y for x, y in images)
    assert hits / 100 == metrics_of()["test_accuracy"] > 0.15


def test_synthetic_digits_can_be_asked_for(data_dir, monkeypatch):  # noqa: F811
    monkeypatch.setattr(mnist, "draw_digits", lambda n, seed: (IMAGES, seed))
    asked = mnist.load_data(mnist.parse_args(["--data=synthetic"]))
    assert asked == ("synthetic", (IMAGES, 0), (IMAGES, 1))


def test_a_batch_may_hold_all_images(run):  # noqa: F811
    assert run("--epochs 1 --batch-size 310") is None


def test_a_test_loss_that_is_not_finite_ends_the_run(run, monkeypatch):  # noqa: F811
    logits = torch.zeros(100, 10)
    losses = {90: 1.0, 100: float("nan")}  # of validation and test set
    monkeypatch.setattr(mnist, "evaluate", lambda _, data: (losses[len(data[1])], 0.1, logits))
    assert "loss of epoch 1 is not finite" in run("--epochs 1")


def test_a_run_goes_on_on_another_device(run, monkeypatch):  # noqa: F811
    run("--epochs 2 --batch-size 128")  # as by default on CUDA
    Path("out/mnist_model_epoch_2.pth").unlink()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert call("--resume") is None


def test_a_new_run_has_the_defaults_of_its_network(data_dir):  # noqa: F811
    argv = ["--model=wide", "--device=cpu"]
    args, path = mnist.open_run(mnist.parse_args(argv), argv)
    assert (args.lr, path) == (0.05, None)


def test_a_run_draws_a_plot(data_dir):  # noqa: F811
    pytest.importorskip("matplotlib.figure")
    call(SMALL, "--epochs 1")
    assert Path("out/training_metrics.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("epochs", "ticks"), [(1, [1]), (45, [*range(1, 46, 3)])])
def test_a_plot_shows_loss_and_accuracy_of_each_split(monkeypatch, epochs, ticks):
    figure = pytest.importorskip("matplotlib.figure").Figure
    save = Mock(side_effect=figure.savefig)
    monkeypatch.setattr(figure, "savefig", lambda *args, **options: save(*args, **options))
    history = known_history(epochs)
    assert mnist.draw_plot(history).startswith(b"\x89PNG")

    for axes, key in zip(save.call_args.args[0].axes, ("loss", "accuracy"), strict=True):
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert [*names, axes.get_xlabel(), axes.get_ylabel()] == [*SPLITS, "epoch", key]
        curves = [[m[f"{split}_{key}"] for m in history] for split in SPLITS]
        assert [line.get_ydata().tolist() for line in axes.lines] == curves
        assert len({line.get_linestyle() for line in axes.lines}) == 3
        assert axes.get_xticks().tolist() == ticks


def test_predict_sees_a_digit_however_given(tmp_path):
    prepare = predict(tmp_path)["prepare"]
    for image in IMAGES[:5]:
        seen = torch.cat([prepare(picture) for picture in pictures_of(image)])
        assert (seen.shape[1:], seen.max()) == ((28, 28), 1)
        flat = seen.flatten(1)
        assert F.cosine_similarity(flat, flat[:1]).min() > 0.8
        centre = seen[0].sum(0) @ torch.arange(28.0) / seen[0].sum()
        assert centre.item() == pytest.approx(13.5, abs=0.6)


def test_predict_says_what_is_wrong_with_a_picture(run, tmp_path, capsys):  # noqa: F811
    run("--epochs 1 --out model_checkpoints")
    Image.new("L", (200, 300), 255).save("blank.png")
    line = Image.new("L", (900, 300), 255)
    ImageDraw.Draw(line).line((40, 150, 860, 150), 0, 5)
    line.save("line.png")
    to_pil_image((200 + 8 * torch.randn(300, 300)).byte()).save("grain.png")
    to_pil_image(IMAGES[0]).save("digit.png")
    main = predict(tmp_path)["main"]
    capsys.readouterr()
    main(["digit.png"])
    assert re.fullmatch(r"digit.png: \d, \d+% sure\n", capsys.readouterr().out)
    for path in ("blank.png", "line.png", "grain.png"):
        main([path, "digit.png"])
        assert f"{path}: nothing stands out from the paper" in capsys.readouterr().out
    main(["none"])
    assert "none: [Errno 2]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "cause"), [("", "No such file"), ("--model wide", "Missing key")]
)
def test_predict_says_which_network_it_needs(run, tmp_path, flags, cause):  # noqa: F811
    if flags:
        run("--epochs 1 --lr 0.001 --out model_checkpoints", flags)
    names = {"__name__": "__main__", "__file__": str(tmp_path / "predict.py")}
    with pytest.raises(SystemExit, match=f"train the default network first: .*{cause}"):
        exec(code_of("import sys"), names)


def ruled(digit, kind):
    """A digit on a page of 520x520, with lines."""
    page = Image.new("L", (520, 520), 235)
    page.paste(40, (120, 120), to_pil_image(digit).resize((280, 280)))
    _, top, _, bottom = ImageOps.invert(page).point(lambda v: 255 * (v > 100)).getbbox()
    draw = ImageDraw.Draw(page)
    lines = {"near": [top - 6, bottom + 6], "foot": [bottom - 1], "through": [260]}
    for y in lines.get(kind, []):
        draw.line((0, y, 520, y), 90, 2)
    if kind == "frame":
        draw.rectangle((12, 12, 507, 507), outline=60, width=4)
    return page


@pytest.mark.parametrize("kind", ["near", "foot", "through", "frame"])
def test_predict_sees_through_ruled_lines(tmp_path, kind):
    prepare = predict(tmp_path)["prepare"]
    for image in IMAGES[:9]:
        seen, plain = (prepare(ruled(image, k)).flatten() for k in (kind, "none"))
        assert F.cosine_similarity(seen, plain, dim=0) > 0.8


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
