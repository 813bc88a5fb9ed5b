#!/usr/bin/env python3
"""Runs the README's recipes on a small MNIST of synthetic digits: python .ci/test_readme.py."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import mnist
from test_mnist import IMAGES, data_dir, run  # noqa: F401

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


def test_the_statistics_of_one_seed_or_many(run, capsys):  # noqa: F811
    code = re.search(r"<<END\n(.*?)END", README, re.DOTALL)[1]
    for seed in (1, 2):
        run("--epochs 1 --seed", seed, f"--out runs/{seed}")
        capsys.readouterr()
        exec(code, {})
        line = capsys.readouterr().out
        assert re.fullmatch(rf"[\d.]+% ± [\d.]+% \([\d.]+%\), n = {seed}\n", line)


def test_the_loop_runs_and_the_diff_applies(data_dir, capsys):  # noqa: F811
    removed = re.findall(r"(?m)^-(\w.*)$", README)
    assert removed
    assert all(line in Path(mnist.__file__).read_text() for line in removed)
    exec(code_of("import torch").replace("937", "6"), {})
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_another_data_set_is_a_change_of_one_word(data_dir, name):  # noqa: F811
    source = Path(mnist.__file__).read_text(encoding="utf-8")
    names = {"__name__": "other"}
    exec(source.replace("DATASET = datasets.MNIST", f"DATASET = datasets.{name}"), names)
    (data_dir / "MNIST").rename(data_dir / name)
    train, test = names["load_mnist"](data_dir)
    assert torch.equal(torch.cat([train[0], test[0]]), IMAGES)


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
    assert main(["digit.png"]) == 0
    assert re.fullmatch(r"'digit.png': \d, \d+% sure\n", capsys.readouterr().out)
    for path in ("blank.png", "line.png", "grain.png"):
        assert main([path, "digit.png"]) == 1
        assert f"'{path}': nothing stands out from the paper" in capsys.readouterr().out
    assert main(["none"]) == 1
    assert "'none': [Errno 2]" in capsys.readouterr().out


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
