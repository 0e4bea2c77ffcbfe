"""Tests of the scripts: pytest -q -n 2 test_scripts.py (80 s on two cores)

A script is one flat file without a main(), so it is tested by running it with tiny settings: once
as a command, and once as a notebook cell in this process, where what it defines is compared with
answers found in another way (torch.distributions, autograd, closed forms, explicit recursions). SE
is a standard error of a Monte-Carlo mean. The seeds are fixed, so a tolerance of 4 or 5 SE never
fails by chance.

A test is called test_<script>_..., test_theory_... or, with the script as its parameter,
test_all_...: -k dsm_2d runs the tests of that script.
"""
import contextlib
import gzip
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from functools import partial
from itertools import combinations, permutations
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"   # networks this small only wait for a second thread

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageSequence
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist
from sklearn.datasets import load_digits
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

HERE = Path(__file__).resolve().parent
TINY = {   # settings with which a script takes seconds
    "dsm_2d": "--n 300 --batch 64 --steps 30 --T 6 --n_samples 64",
    "dsm_homework": "--n 100 --batch 40 --epochs 3 --num_steps 12 --n_samples 200",
    "implicit_sm": "--n 300 --n_few 10 --batch 64 --steps 20 --hidden 16 --K 20 --n_samples 64",
    "ncsn_mnist": "--data digits --T 6 --filters 4 --blocks 4 --epochs 2 --batch 250 "
                  "--n_samples 24",
    "sliced_sm": "--n 300 --batch 32 --steps 30 --dim 3 --d_max 2 --K 5 --n_samples 64",
}
OUTPUT = {   # shape of samples.npy and the pictures
    "dsm_2d": ((64, 2), ["denoise_scatter.png", "generation.gif", "generation.png", "quiver.png",
                         "samplers.png", "training.png"]),
    "dsm_homework": ((200, 2), ["fields.png", "grid.png", "sigma_row.png", "trajectories.png"]),
    "implicit_sm": ((64, 2), ["few_points.png", "geometry.png", "kernels.png", "scores.png"]),
    "ncsn_mnist": ((24, 1, 8, 8), ["annealing.gif", "annealing.png", "interpolation.png",
                                   "neighbours.png", "samplers.png", "samples.png",
                                   "training.png"]),
    "sliced_sm": ((64, 2), ["fields.png", "training.png", "traps.png"]),
}
BAD = {   # settings to be refused in a message with the first flag and its value
    "dsm_2d": ["--n 0", "--n many", "--T 1", "--sigma_min 0", "--sigma_min -1", "--sigma_min nan",
               "--sigma_min 3 --sigma_max 3", "--sigma_min 4 --sigma_max 3", "--sigma_max inf",
               "--steps 0", "--batch 0", "--batch 301", "--lr 0", "--lr nan", "--K 0", "--kappa 0",
               "--kappa 2", "--kappa nan", "--viz_sigma 0.005", "--viz_sigma 1000", "--eta -1",
               "--eta nan", "--n_samples 1", "--seed -1", "--data cubes", "--schedule steep",
               "--w_mode heavy", "--sampler magic", "--hidden 0", "--layers 0"],
    "dsm_homework": ["--n 9", "--sigma 0", "--sigma -1", "--sigma nan", "--epochs 0", "--batch 81",
                     "--lr 0", "--num_steps 0", "--eta 0", "--eta -1", "--eta nan", "--eta 0.08",
                     "--eta 5 --sigma 1", "--n_samples 1", "--seed -1", "--hidden 0",
                     "--layers 0", "--n many"],
    "implicit_sm": ["--n 1", "--n many", "--n_few 1", "--n_few 301", "--n_hutchinson 0",
                    "--n_hutchinson 1.5", "--sigma 0", "--sigma 2", "--sigma nan", "--hidden 0",
                    "--layers 0", "--steps 0", "--batch 0", "--batch 301", "--lr 0", "--lr nan",
                    "--K 0", "--eta 0", "--eta 4", "--eta nan", "--n_samples 1", "--seed -1",
                    "--activation step"],
    "ncsn_mnist": ["--data cifar", "--net cnn", "--sampler magic", "--device abacus",
                   "--device cuda", "--T 1", "--T many", "--sigma_min 0", "--sigma_min 3",
                   "--sigma_min nan", "--sigma_max 0.5", "--sigma_max inf", "--filters 0",
                   "--blocks 0", "--epochs 0", "--batch 0", "--batch 1501", "--lr 0", "--lr nan",
                   "--lr_muon 0", "--lr_muon 2", "--K 0", "--kappa 0", "--kappa 2",
                   "--n_samples 23", "--seed -1", "--load nowhere.pt", "--digit 7",
                   "--guidance 1", "--digit 10 --labels", "--guidance -1 --labels",
                   "--guidance nan --labels"],
    "sliced_sm": ["--n 9", "--dim 0", "--dim two", "--n_slices 0", "--n_slices -3", "--h 0",
                  "--h -0.1", "--h nan", "--sigma 0", "--sigma inf", "--hidden 0", "--layers 0",
                  "--steps 0", "--batch 0", "--batch 301", "--lr nan", "--d_max 1", "--K 0",
                  "--eta 0", "--eta 0.16", "--eta 1.9", "--n_samples 1", "--seed -1",
                  "--data circle", "--loss sliced", "--slices cube"],
}
ONE_DENSITY = ["implicit_sm", "sliced_sm"]   # scripts whose scores take no sigma
IMAGES = ["ncsn_mnist"]   # scripts on a fixed set of images: no exact score, grey, a checkpoint
HOMEWORK_IMPORTS = """
import math
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.data as data
from typing import List, Tuple
"""
scratch = tempfile.TemporaryDirectory()


def cells(name, until=None):
    """The text of a script, or of its cells before the one with the name `until`."""
    text = (HERE / f"{name}.py").read_text(encoding="utf-8")
    if until is None:
        return text
    before, found, _ = text.partition(f"\n# %% {until}\n")
    assert found, f"{name}.py has no cell {until}"
    return before


def undrawn():
    """While it lasts, pictures are saved, but stay white: half of a tiny run is drawing."""
    return mock.patch.object(Figure, "draw", lambda figure, renderer: None)


def execute(name, text, flags="", outdir=None):
    """What a script's text defines, run in this process with tiny settings but for `flags`."""
    names = {"__name__": "__main__"}
    outdir = str(outdir or tempfile.mkdtemp(dir=scratch.name))
    argv = [f"{name}.py", "--outdir", outdir, *TINY[name].split(), *flags.split()]
    with mock.patch.object(sys, "argv", argv), undrawn():
        exec(compile(text, str(HERE / f"{name}.py"), "exec"), names)
    plt.close("all")
    return SimpleNamespace(**names)


def run(name, flags="", until="Pictures", outdir=None):
    """What the cells before `until` define; None: what the whole script defines."""
    return execute(name, cells(name, until), flags, outdir)


def run_whole(name, flags=""):
    """What the whole script defines; `printed` is its output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        script = run(name, flags, until=None)
    script.printed = output.getvalue()
    return script


def with_default(text, flag, value):
    """A script's text with another default of a flag, as a reader edits it in a notebook."""
    line = re.search(rf'^parser\.add_argument\("{flag}".*$', text, re.M)[0]
    default = re.search(r'default=("?)[^",)]+"?', line)
    if default:
        quote = default[1]
        edited = line.replace(default[0], f"default={quote}{value}{quote}")
    else:
        edited = line.replace(f'"{flag}"', f'"{flag}", default={value}')
    return text.replace(line, edited)


def pasted_script(name):
    """What a script defines as a notebook cell, with its output `printed` and its open `figures`.

    The command line is the kernel's; the tiny settings are written into the text.
    """
    text = cells(name)
    words = TINY[name].split() + ["--outdir", tempfile.mkdtemp(dir=scratch.name)]
    for flag, value in zip(words[::2], words[1::2]):
        text = with_default(text, flag, value)
    cell = {"__name__": "__main__"}   # no __file__
    with (mock.patch.object(sys, "argv", ["colab_kernel_launcher.py", "-f", "kernel.json"]),
          contextlib.redirect_stdout(io.StringIO()) as output, undrawn()):
        exec(compile(text, str(HERE / f"{name}.py"), "exec"), cell)
    figures = plt.get_fignums()
    plt.close("all")
    return SimpleNamespace(**cell, printed=output.getvalue(), figures=figures)


def class_text(name, class_name):
    """The text of one class of a script."""
    found = re.search(rf"^class {class_name}\b.*?(?=\n\n\n)", cells(name), re.S | re.M)
    return found[0]


def pasted(text):
    """What a text defines in the homework's notebook: with its imports and nothing else."""
    names = {}
    exec(HOMEWORK_IMPORTS + text, names)
    return SimpleNamespace(**names)


def within(values, expected, se=4):
    """Asserts that the mean of independent `values` (n, ...) is `expected`, to `se` SE."""
    error = values.std(0) / math.sqrt(len(values))
    deviation = (values.mean(0) - expected) / error
    torch.testing.assert_close(deviation, torch.zeros_like(error), rtol=0, atol=se)


close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def contents(folder):
    """Name and bytes of the files in a folder; none of a folder that is not there."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("*")}


@contextlib.contextmanager
def kept_schedulers():
    """A list of the schedulers of learning rates that are made while it lasts."""
    made = []
    real = torch.optim.lr_scheduler.OneCycleLR

    def keep(*args, **settings):
        made.append(real(*args, **settings))
        return made[-1]

    with mock.patch.object(torch.optim.lr_scheduler, "OneCycleLR", keep):
        yield made


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# %% Every script: as a command, as a notebook cell, with wrong settings
@pytest.fixture(scope="session", params=TINY)
def command(request, tmp_path_factory):
    """The real command, without a display; its folder's name needs quotes and Unicode."""
    name = request.param
    cwd = tmp_path_factory.mktemp("cwd")
    outdir = tmp_path_factory.mktemp("results") / "my 輸出"
    environment = dict(os.environ)
    environment.pop("MPLBACKEND")
    environment.pop("DISPLAY", None)
    words = [sys.executable, str(HERE / f"{name}.py"), *TINY[name].split(), "--outdir", str(outdir)]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, encoding="utf-8",
                          errors="replace", timeout=300)
    return SimpleNamespace(name=name, outdir=outdir, cwd=cwd, done=done)


def test_all_command_ends_with_its_summary(command):
    """The last line of a user's run is key=value pairs, in summary.json, too, all finite."""
    assert command.done.returncode == 0, command.done.stderr
    last = dict(pair.split("=") for pair in command.done.stdout.splitlines()[-1].split(" "))
    text = (command.outdir / "summary.json").read_text()
    summary = json.loads(text, parse_constant=pytest.fail)   # NaN and Infinity
    assert last == {key: str(value) for key, value in summary["figures"].items()}
    assert summary["settings"]["seed"] == int(last["seed"])


def test_all_command_writes_its_files_and_no_others(command):
    """All output is in outdir, under its final name: nothing in the working folder."""
    shape, pictures = OUTPUT[command.name]
    files = [*pictures, "model.pt", "samples.npy", "summary.json"]
    if command.name in IMAGES:
        files.append("checkpoint.pt")
    assert sorted(os.listdir(command.outdir)) == sorted(files)
    assert os.listdir(command.cwd) == []
    samples = np.load(command.outdir / "samples.npy")
    assert samples.shape == shape and np.isfinite(samples).all()
    weights = torch.load(command.outdir / "model.pt", weights_only=True)
    assert weights and all(torch.isfinite(value).all() for value in weights.values())


def test_all_pictures_show_something(command):
    """Each picture is large enough to read and shows colour or, of images, much that is grey."""
    for name in OUTPUT[command.name][1]:
        pixels = np.asarray(Image.open(command.outdir / name).convert("RGB")) / 255
        assert min(pixels.shape[:2]) >= 200, name
        colourful = (np.ptp(pixels, axis=2) > 0.2).mean() > 0.003
        grey = (abs(pixels.mean(2) - 0.5) < 0.4).mean() > 0.1
        assert colourful or command.name in IMAGES and grey, name


def test_all_movies_show_each_state_and_rest_at_the_last(command):
    """0.1 s for each of the 7 states; the equal frames at the end are stored as a longer one."""
    for name in OUTPUT[command.name][1]:
        if name.endswith(".gif"):
            with Image.open(command.outdir / name) as movie:
                durations = [frame.info["duration"] for frame in ImageSequence.Iterator(movie)]
                assert movie.info["loop"] == 0
            assert durations[:6] == 6 * [100] and 7 <= len(durations) <= 8
            assert durations[-1] >= 700


def test_all_same_settings_give_same_bytes(command, request):
    """The command's samples.npy is that of the notebook cell, whatever its process did before."""
    twin = Path(request.getfixturevalue(command.name).args.outdir)
    assert (twin / "samples.npy").read_bytes() == (command.outdir / "samples.npy").read_bytes()


@pytest.mark.parametrize("name", TINY)
def test_all_other_seed_gives_other_samples(name, request):
    """--seed reaches the data, unless these are fixed, the network and the sampling."""
    here, there = request.getfixturevalue(name), run(name, "--seed 1")
    assert (here.x_data != there.x_data).any() == (name not in IMAGES)
    at_the_end_of_the_scale = (here.samples == there.samples) & (here.samples.abs() == 1)
    assert ((here.samples != there.samples) | at_the_end_of_the_scale).all()
    assert all((a != b).any() for a, b in zip(here.model.parameters(), there.model.parameters()))


@pytest.mark.parametrize("name", TINY)
def test_all_notebook_cell(name, request):
    """Pasted into a notebook a script ignores the kernel's argv and leaves names and figures."""
    cell = request.getfixturevalue(name)
    pictures = [picture for picture in OUTPUT[name][1] if not picture.endswith(".gif")]
    files = contents(cell.args.outdir)
    assert sorted(file for file in files if file.endswith(".png")) == pictures
    assert len(cell.figures) == len(pictures)   # a movie is closed
    assert cell.samples.shape == OUTPUT[name][0]
    x = cell.x_data[:5]
    place = [x] if name in ONE_DENSITY else [x, getattr(cell.args, "sigma", 0.5)]
    for field in ["score"] if name in IMAGES else ["score", "exact_score"]:
        s_x = getattr(cell, field)(*place)
        assert s_x.shape == x.shape and torch.isfinite(s_x).all()


@pytest.mark.parametrize("name, flags", [(name, flags) for name in BAD for flags in BAD[name]])
def test_all_bad_setting_is_refused(name, flags, tmp_path, capsys):
    """A wrong setting ends in argparse's way, naming flag and value, before a folder is made."""
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a cuda device")
    with pytest.raises(SystemExit) as stop:
        run(name, flags, outdir=tmp_path / "out")
    message = capsys.readouterr().err.splitlines()[-1]   # above it the usage names every flag
    flag, value, *_ = flags.split()
    assert stop.value.code == 2
    assert f"argument {flag}:" in message and value in message.split(flag)[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TINY)
def test_all_outdir_that_is_a_file(name, tmp_path, capsys):
    """An outdir that cannot be made is refused before the training, and the file left alone."""
    file = tmp_path / "thesis.txt"
    file.write_text("ten years of work")
    with pytest.raises(SystemExit) as stop:
        run(name, outdir=file)
    assert stop.value.code == 2
    assert "argument --outdir:" in capsys.readouterr().err.splitlines()[-1]
    assert file.read_text() == "ten years of work"


def test_all_lesson_alone(command, capsys):
    """Without pictures and extras: the same samples, and the same summary but for its times."""
    lesson, _, rest = cells(command.name).partition("\n# %% Pictures\n")
    result = rest.partition("\n# %% Result\n")[2]
    assert "Extra" not in lesson and "summary" in result
    alone = execute(command.name, lesson + "\n" + result)
    assert (contents(alone.args.outdir)["samples.npy"]
            == contents(command.outdir)["samples.npy"])
    last_lines = [capsys.readouterr().out.splitlines()[-1], command.done.stdout.splitlines()[-1]]
    here, there = [re.sub(r"\w+_s=\S+", "", line).split() for line in last_lines]
    assert here == there


SHARED = [   # first and last line of what scripts have letter for letter, if they have it
    ("def number(kind, low, high):", "    return parse"),
    ("in_notebook = ", "args = parser"),
    ("try:  ", "    parser.error(f\"argument --outdir: cannot write"),
    ("#     sum over x of p(x | noisy_x)", "#   = grad q_sigma(noisy_x)"),
    ("def sorted_projections(x):", "    return (x @ directions)"),
    ("def mean_sw2(sets, other_sets):", "    return np.mean(distances)"),
    ("BLUE, ORANGE, GREY = ", "plt.rcParams.update("),
    ("def dots(ax, x, colour):", "    ax.scatter("),
    ("def denoise(", "    return x + sigma"),
    ("def ancestral_step(", "    return x_clean"),
    ("def ancestral_sampling(", "    return path"),
    ("def langevin_step(", "    return x + kappa"),
    ("def annealed_langevin_dynamics(", "    return path"),
    ("print(f\"\\npictures in", "print(\" \".join("),
    ("# What `uv run` installs", "# ///"),
]


def passage(name, first, last):
    """The lines of a script from the one that begins with `first` to the next one with `last`."""
    lines = (HERE / f"{name}.py").read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(first)]
    if not starts:
        return None
    end = next(i for i in range(starts[0] + 1, len(lines)) if lines[i].startswith(last))
    return lines[starts[0]:end + 1]


@pytest.mark.parametrize("name", TINY)
def test_all_shared_passages_are_alike(name):
    """Scripts that need the same lines have the same lines; dsm_2d.py has all of them."""
    assert all(passage("dsm_2d", *ends) for ends in SHARED)
    for first, last in SHARED:
        ours, model = passage(name, first, last), passage("dsm_2d", first, last)
        if first.startswith("print("):   # the names of the pictures differ, the last line does not
            assert ours and ours[-1] == model[-1]
        else:
            assert ours is None or ours == model, first


@pytest.mark.parametrize("name", TINY)
def test_all_inline_metadata_hold_the_pins(name):
    """uv run and pip install the same versions."""
    text = (HERE / f"{name}.py").read_text(encoding="utf-8")
    pins = re.findall(r'^#     "(.*)",$', text.partition("# /// script")[2], re.M)
    wanted = (HERE / "requirements.txt").read_text().split("# only for")[0].splitlines()
    assert pins == [line for line in wanted if line and line[0] != "#"]


# %% dsm_2d.py: data and exact score
DATA = ["gmm2", "circles", "moons", "swiss_roll"]
SPREAD = {"circles": 0.06, "moons": 0.06, "swiss_roll": 0.03}


@pytest.fixture(scope="session")
def dsm_2d():
    return pasted_script("dsm_2d")


@pytest.fixture(scope="session", params=DATA)
def data(request):
    """The name of a data set and the script's cells up to its exact score."""
    return request.param, run("dsm_2d", f"--data {request.param}", until="Noise levels")


def centres_and_covs(name, n=600):
    """The four laws written anew: means (M, 2), covariances (M, 2, 2) of equal Gaussians."""
    if name == "gmm2":
        covs = [[[1, 0.3], [0.3, 1.2]], [[0.6, -0.2], [-0.2, 0.8]]]
        return torch.tensor([[0, 0], [3, 3]]).double(), torch.tensor(covs).double()

    def ring(angle):
        return torch.stack([angle.cos(), angle.sin()], 1)

    closed = torch.linspace(0, 1, n // 2, dtype=torch.float64)
    opened = torch.arange(n // 2, dtype=torch.float64) / (n // 2)
    t = 1.5 * math.pi * (1 + 2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    if name == "circles":
        curve = torch.cat([ring(2 * math.pi * opened), 0.5 * ring(2 * math.pi * opened)])
    elif name == "moons":
        moon = ring(math.pi * closed)
        curve = torch.cat([moon, torch.tensor([1, 0.5]).double() - moon])
    else:
        curve = t[:, None] * ring(t) / 7
    return curve, SPREAD[name] ** 2 * torch.eye(2).double().expand(n, 2, 2)


def law(name, sigma):
    """A data set convolved with N(0, sigma^2 I) as a torch distribution."""
    centres, covs = centres_and_covs(name)
    noisy = MultivariateNormal(centres, covs + sigma**2 * torch.eye(2).double())
    return MixtureSameFamily(Categorical(torch.ones(len(centres)).double()), noisy)


def law_score(name, x, sigma):
    """Its score (B, 2) by autograd."""
    with torch.enable_grad():
        x = x.double().detach().requires_grad_()
        return torch.autograd.grad(law(name, sigma).log_prob(x).sum(), x)[0]


@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0])
def test_dsm_2d_exact_score_is_the_gradient_of_the_density(data, sigma):
    name, script = data
    x = torch.cat([law(name, sigma).sample((40,)), 3 * normal(20, 2)]).float()
    tolerance = {"rtol": 2e-3, "atol": 2e-3 / sigma}
    torch.testing.assert_close(script.exact_score(x, sigma), law_score(name, x, sigma).float(),
                               **tolerance)
    torch.testing.assert_close(script.exact_log_density(x, sigma),
                               law(name, sigma).log_prob(x.double()).float(), **tolerance)


def test_dsm_2d_exact_score_far_away(data):
    """At distance 100 the score still points back at its full length."""
    name, script = data
    angle = torch.linspace(0, 6, 20)
    x = 100 * torch.stack([angle.cos(), angle.sin()], 1)
    torch.testing.assert_close(script.exact_score(x, 0.1), law_score(name, x, 0.1).float(),
                               rtol=5e-3, atol=5e-2)


def test_dsm_2d_data_have_the_moments_of_the_law(data):
    name, script = data
    centres, covs = centres_and_covs(name)
    x = script.sample_data(20000).double()
    assert x.shape == (20000, 2) and script.x_data.shape == (300, 2)
    within(x, centres.mean(0), se=5)
    second = covs + centres[:, :, None] * centres[:, None]
    within(x[:, :, None] * x[:, None], second.mean(0), se=5)


def test_dsm_2d_data_lie_off_the_curve_by_their_spread(data):
    name, script = data
    if name == "gmm2":
        pytest.skip("its covariances are in the moments")
    curve = centres_and_covs(name, 6000)[0]
    distance = torch.cdist(script.sample_data(4000).double(), curve).amin(1)
    assert distance.square().mean().sqrt().item() == pytest.approx(SPREAD[name], rel=0.05)


def test_dsm_2d_data_are_independent(data):
    """Of 100 points the number on one side varies as a coin's: points on a grid would not."""
    name, script = data
    draws = torch.stack([script.sample_data(100) for _ in range(400)])
    side = (draws[:, :, 0] > draws[:, :, 0].median()).double()
    assert side.sum(1).var().item() == pytest.approx(25, rel=4 * math.sqrt(2 / 400))


# %% dsm_2d.py: noise levels
def straightened(name, sigma, low, high):
    """What falls in equal steps if the schedule has the spacing of its name."""
    u = ((sigma - low) / (high - low)).clip(0, 1)
    if name == "linear":
        return u
    if name == "quadratic":
        return np.sqrt(u)
    if name == "cosine":
        return np.arccos(1 - 2 * u)
    return np.log(sigma)


@pytest.mark.parametrize("name", ["geometric", "linear", "quadratic", "cosine", "adaptive"])
def test_dsm_2d_schedule_descends_with_the_spacing_of_its_name(dsm_2d, name):
    sigma = dsm_2d.sigma_schedule(name, 30, 0.05, 7.0).double().numpy()
    assert sigma.shape == (30,) and (np.diff(sigma) < 0).all()
    assert sigma[[0, -1]] == pytest.approx([7.0, 0.05], rel=1e-5)
    steps = np.diff(straightened(name, sigma, 0.05, 7.0))
    assert steps == pytest.approx(np.full(29, steps.mean()), rel=1e-2)


def test_dsm_2d_8_1_range_of_the_levels():
    """From 0.01 to the largest pairwise distance, adaptive between quantiles, or as asked for."""
    script = run("dsm_2d", until="Model")
    distances = pdist(script.x_data.double())
    levels = script.sigmas.tolist()
    assert (levels[-1], levels[0]) == pytest.approx((0.01, distances.max()), rel=1e-5)
    assert script.viz_sigma == pytest.approx(0.1)
    assert script.largest_ratio == pytest.approx((distances.max() / 0.01) ** (1 / 5), rel=1e-5)
    script = run("dsm_2d", "--schedule adaptive", until="Model")
    quantiles = np.quantile(distances, [0.01, 0.99])
    assert (script.sigma_min, script.sigma_max) == pytest.approx(quantiles, rel=1e-4)
    script = run("dsm_2d", "--sigma_min 0.2 --sigma_max 0.4 --viz_sigma 0.3", until="Model")
    assert script.sigmas[[0, -1]].tolist() == pytest.approx([0.4, 0.2])
    assert script.viz_sigma == 0.3
    assert run("dsm_2d", "--sigma_min 0.2 --sigma_max 0.4", until="Model").viz_sigma == 0.4


def test_dsm_2d_doubled_points_do_not_make_the_smallest_level_zero():
    """003's adaptive schedule takes the logarithm of 0 there."""
    text = cells("dsm_2d", until="Model").replace("x_data = sample_data(args.n)",
                                                  "x_data = sample_data(100).repeat(3, 1)")
    names = execute("dsm_2d", text, "--schedule adaptive")
    assert names.sigma_min > 0.05


@pytest.mark.parametrize("flags, warned", [("--kappa 0.2", True), ("--kappa 0.3", False)])
def test_dsm_2d_8_4_warns_where_langevin_cannot_keep_up(flags, warned, capsys):
    """|1 - kappa|^K ratio is 0.8 * 1.33 or 0.7 * 1.33."""
    run("dsm_2d", flags + " --K 1 --sigma_max 1 --sigma_min 0.1 --T 9", until="Check")
    assert ("warning: annealed Langevin (ald)" in capsys.readouterr().out) == warned


# %% dsm_2d.py: model
def test_dsm_2d_embedding_separates_levels(dsm_2d):
    """Levels that 003's sin(2^k pi sigma) takes for one another differ; neighbours look alike."""
    embed = dsm_2d.FourierTimeEmbedding(8)
    assert embed(torch.zeros(5)).shape == (5, 16)
    assert pdist(embed(torch.tensor([2.0, 4.0, 10.0, 50.0]).log())).min() > 0.3
    assert pdist(embed(torch.tensor([1.0, 1.05]).log())).max() < 0.1
    wave = dsm_2d.FourierTimeEmbedding(2, 3.0)(torch.tensor([0.4]))[0]
    expected = [math.sin(0.6), math.sin(1.2), math.cos(0.6), math.cos(1.2)]
    assert wave.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("trained", [False, True])
def test_dsm_2d_7_1_model_is_preconditioned(dsm_2d, trained):
    """score = (D - x)/sigma^2 with the D of Karras et al. 2022; untrained: one Gaussian's."""
    mean, sigma_data = torch.tensor([3.0, -1.0]), torch.tensor(1.7)
    model = dsm_2d.ScoreMLP(16, mean=mean, sigma_data=sigma_data).double()
    if trained:
        torch.nn.init.normal_(model.net[-1].weight)
    seen = []

    def remember(net, inputs, output):
        seen.extend([inputs[0], output])

    model.net.register_forward_hook(remember)
    x, sigma = mean + normal(9, 2), torch.logspace(-2, 1, 9).double()
    s, centred = model(x, sigma.log()), x - mean
    s2, d2 = sigma[:, None] ** 2, sigma_data.double() ** 2
    c_skip, c_out, c_in = d2 / (s2 + d2), (s2 * d2 / (s2 + d2)).sqrt(), 1 / (s2 + d2).sqrt()
    close(seen[0][:, :2], c_in * centred, rtol=1e-6, atol=1e-6)
    close(s, (c_skip * centred + c_out * seen[1] - centred) / s2, rtol=1e-6, atol=1e-6)
    if not trained:
        close(s, -centred / (s2 + d2), rtol=1e-6, atol=1e-6)


def test_dsm_2d_network_sees_the_point_its_waves_and_the_level(dsm_2d):
    """34 features: x, sin and cos of 8 random waves of x, and the embedding; so many layers."""
    model, seen = dsm_2d.ScoreMLP(5, time_dim=3, num_layers=4), []

    def remember(net, inputs, output):
        seen.append(inputs[0])

    model.net.register_forward_hook(remember)
    x, log_sigma = torch.randn(7, 2), torch.linspace(-2, 1, 7)
    model(x, log_sigma)
    scaled = x / (1 + (2 * log_sigma).exp())[:, None].sqrt()
    waves = scaled @ model.directions
    parts = [scaled, waves.sin(), waves.cos(), model.embedding(log_sigma)]
    torch.testing.assert_close(seen[0], torch.cat(parts, dim=1))
    assert sum(isinstance(layer, torch.nn.Linear) for layer in model.net) == 5
    assert dsm_2d.model.directions.std() == pytest.approx(1, abs=0.5)
    assert dsm_2d.model.directions.min() < 0


def test_dsm_2d_model_knows_the_moments_of_the_data(dsm_2d):
    torch.testing.assert_close(dsm_2d.model.mean, dsm_2d.x_data.mean(0))
    torch.testing.assert_close(dsm_2d.model.sigma_data, dsm_2d.x_data.std())


def test_dsm_2d_model_file_can_be_loaded_and_used(dsm_2d):
    weights = torch.load(Path(dsm_2d.args.outdir) / "model.pt", weights_only=True)
    model = dsm_2d.ScoreMLP()
    model.load_state_dict(weights)
    x = torch.randn(5, 2)
    close(model(x, torch.full((5,), math.log(0.3))), dsm_2d.score(x, 0.3))


# %% dsm_2d.py: loss, floor, training
POWER = {"none": 0, "sigma": 1, "sigma2": 2, "inv_sigma2": -2}


@pytest.mark.parametrize("w_mode", POWER)
@pytest.mark.parametrize("exact", [False, True], ids=["linear", "exact"])
def test_dsm_2d_4_4_loss_value(dsm_2d, w_mode, exact):
    """On Gaussian data the loss of s = -A x, and of the exact score, is its closed form."""
    sigmas, variances = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.5, 0.3])
    A = torch.tensor([[0.9, 0.2], [-0.3, 0.4]])

    def linear(x, log_sigma):
        return -x @ A.T

    def exact_gaussian(x, log_sigma):
        return -x / (variances + (2 * log_sigma).exp()[:, None])

    x, levels = torch.randn(200, 4000, 2), []
    for s in sigmas:
        if exact:
            levels.append(0.5 * (variances / (s**2 * (s**2 + variances))).sum())
        else:     # E|A x_noisy - eps/sigma|^2 = |A|^2 + |I/sigma - sigma A|^2
            levels.append(0.5 * (A.square().sum() + (torch.eye(2) / s - s * A).square().sum()))
    model = exact_gaussian if exact else linear
    x = x * variances.sqrt() if exact else x
    losses = [dsm_2d.dsm_loss_multi_sigma(model, batch, sigmas, w_mode) for batch in x]
    expected = sum(s ** POWER[w_mode] * level for s, level in zip(sigmas, levels)) / 3
    within(torch.stack(losses), expected)


@pytest.mark.parametrize("a, sign", [(0.2, -1), (0.45, -1), (0.55, 1), (2.0, 1)])
def test_dsm_2d_gradient_of_the_loss_has_the_right_sign(dsm_2d, a, sign):
    """For N(0, I) at sigma = 1 the score is -x/2: the loss of -a x falls up to a = 1/2."""
    a = torch.tensor(a, requires_grad=True)
    x = torch.randn(40000, 2)

    def model(x, log_sigma):
        return -a * x

    dsm_2d.dsm_loss_multi_sigma(model, x, torch.ones(1)).backward()
    assert sign * a.grad > 0


def test_dsm_2d_4_5_loss_uses_mirrored_noise(dsm_2d):
    """Each x comes with +eps and -eps at one level; all levels come equally often."""
    x, sigmas, seen = torch.randn(3000, 2), torch.tensor([1.0, 0.1, 0.01]), []

    def model(*inputs):
        seen.extend(inputs)
        return torch.zeros(6000, 2)

    dsm_2d.dsm_loss_multi_sigma(model, x, sigmas)
    x_noisy, sigma = seen[0].view(2, 3000, 2), seen[1].exp().view(2, 3000)
    torch.testing.assert_close(x_noisy.mean(0), x)
    torch.testing.assert_close(sigma[0], sigma[1])
    noise = (x_noisy[0] - x) / sigma[0][:, None]
    for level in sigmas:
        here = (sigma[0] / level - 1).abs() < 1e-4
        assert here.double().mean().item() == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / 3000))
        within(noise[here].square(), torch.ones(2))
        within(noise[here], torch.zeros(2))


def test_dsm_2d_loss_refuses_an_unknown_weight(dsm_2d):
    with pytest.raises(KeyError, match="sigma3"):
        dsm_2d.level_weight(torch.ones(4), "sigma3")


@pytest.mark.parametrize("w_mode", POWER)
def test_dsm_2d_4_3_floor_is_the_loss_of_the_exact_score(dsm_2d, w_mode):
    sigmas, values = torch.tensor([3.0, 1.0, 0.4]), []
    for sigma in sigmas.tolist():
        x = law("gmm2", 0).sample((20000,))
        eps = torch.randn_like(x)
        s = law_score("gmm2", x + sigma * eps, sigma)
        square = (s + eps / sigma).square().sum(1)
        values.append(0.5 * sigma ** POWER[w_mode] * square)
    floors = torch.tensor([dsm_2d.loss_floor(sigmas, w_mode) for _ in range(20)])
    expected = torch.stack(values).mean(0)
    error = (floors.var() / 20 + expected.var() / len(expected)).sqrt()
    assert floors.mean().item() == pytest.approx(expected.mean().item(), abs=5 * error.item())


def test_dsm_2d_floor_of_000():
    """000's unweighted loss stays near 478.57 although it is learned: that is its floor."""
    flags = "--w_mode none --T 8 --sigma_min 0.02 --sigma_max 0.8 --steps 1"
    assert run("dsm_2d", flags, until="Sampling").floor_of_loss == pytest.approx(478.57, abs=0.3)


def test_dsm_2d_score_errors_are_relative_to_the_exact_score(dsm_2d):
    """A score that is 10 % too long has the error 0.1 at every sigma, s = 0 has 1."""
    def too_long(x, log_sigma):
        return 1.1 * law_score("gmm2", x, log_sigma[0].exp().item()).float()

    def nothing(x, log_sigma):
        return torch.zeros_like(x)

    assert 10 < dsm_2d.sigma_max < 20
    assert dsm_2d.check_sigmas == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    assert dsm_2d.score_errors(too_long) == pytest.approx([0.1] * 10, rel=0.02)
    assert dsm_2d.score_errors(nothing) == pytest.approx([1.0] * 10)
    assert dsm_2d.score_err == pytest.approx(np.mean(dsm_2d.score_errors(dsm_2d.model)))


def test_dsm_2d_score_errors_are_of_points_of_the_noisy_data(dsm_2d):
    centres, covs = centres_and_covs("gmm2")
    second = (covs + centres[:, :, None] * centres[:, None]).mean(0)
    for sigma, x in zip(dsm_2d.check_sigmas, dsm_2d.check_points):
        x = x.double()
        assert x.shape == (4000, 2)
        within(x, centres.mean(0), se=5)
        within(x[:, :, None] * x[:, None], second + sigma**2 * torch.eye(2).double(), se=5)


def test_dsm_2d_narrow_range_is_checked_in_its_middle():
    script = run("dsm_2d", "--sigma_min 0.3 --sigma_max 0.4", until="Sampling")
    assert script.check_sigmas == pytest.approx([math.sqrt(0.12)])


def test_dsm_2d_weights_are_averaged_over_the_second_half(dsm_2d):
    """Nothing of the start is left in a short run; the average is what is sampled and saved."""
    assert dsm_2d.model is dsm_2d.ema.module
    assert int(dsm_2d.ema.n_averaged) == 15
    average = [torch.zeros(3)]
    dsm_2d.ema.multi_avg_fn(average, [torch.ones(3)], torch.tensor(5))
    torch.testing.assert_close(average[0], torch.full((3,), 0.01))


def test_dsm_2d_learning_rate_rises_and_falls(dsm_2d):
    script = run("dsm_2d", "--steps 40", until="Sampling")
    assert script.scheduler.total_steps == 40
    assert script.optimizer.param_groups[0]["lr"] < 0.01 * script.args.lr
    assert script.scheduler._schedule_phases[0]["end_step"] == pytest.approx(5)


def test_dsm_2d_history_is_loss_and_error_of_the_last_interval(dsm_2d):
    assert dsm_2d.history["step"] == list(range(0, 31, 3))
    means = [np.mean(dsm_2d.losses[i:i + 3]) for i in range(0, 30, 3)]
    assert dsm_2d.history["loss"] == pytest.approx([dsm_2d.loss_before] + means)
    assert dsm_2d.history["error"][0] == pytest.approx(np.mean(dsm_2d.errors_before))
    assert dsm_2d.history["error"][1] == pytest.approx(np.mean(dsm_2d.errors_before), rel=0.2)


def test_dsm_2d_training_learns():
    """A short run learns the score of gmm2 to 20 % where noise and data are of one size."""
    script = run("dsm_2d", "--n 20000 --batch 256 --T 20 --steps 400 --n_samples 500")
    errors = dict(zip(script.check_sigmas, script.errors))
    assert max(errors[0.5], errors[1.0], errors[2.0]) < 0.2
    assert script.errors_before[0] == pytest.approx(0.86, abs=0.03)
    assert script.sw2 < 2 * script.sw2_floor


def test_dsm_2d_loss_that_is_not_finite_stops_the_run(tmp_path):
    text = cells("dsm_2d").replace("return (0.5 * level_weight",
                                   "return math.inf * (0.5 * level_weight")
    with pytest.raises(SystemExit, match="the loss is inf at step 1: try a --lr below 0.015"):
        execute("dsm_2d", text, outdir=tmp_path)
    assert os.listdir(tmp_path) == []


def test_dsm_2d_sampler_that_leaves_the_finite_stops_the_run(tmp_path):
    text = cells("dsm_2d").replace("return x + sigma**2 * score(x, sigma)",
                                   "return x + math.nan * score(x, sigma)")
    with pytest.raises(SystemExit, match=r"--sampler pc: points are not finite at sigma = \d"):
        execute("dsm_2d", text, outdir=tmp_path)
    assert os.listdir(tmp_path) == ["model.pt"]


# %% dsm_2d.py: samplers; for data N(0, v) the exact score -x/(sigma^2 + v) makes them linear
def gaussian(v):
    def score(x, sigma):
        return -x / (sigma**2 + v)
    return score


def mixed(x, sigma):
    """A score that is not linear."""
    return law_score("gmm2", x, sigma)


def after_langevin(u, sigma, v, kappa, K):
    """The variance u after K steps at one level, theory.md 8.4."""
    a = 1 - kappa * sigma**2 / (sigma**2 + v)
    stationary = (sigma**2 + v) / (1 - kappa * sigma**2 / (2 * (sigma**2 + v)))
    return a ** (2 * K) * (u - stationary) + stationary


def after_rho(u, sigma, sigma_next, v, rho):
    """The variance after x -> D + rho (sigma_next/sigma)(x - D) + sigma_next sqrt(1 - rho^2) z."""
    D = v / (sigma**2 + v)
    return (D + rho * sigma_next / sigma * (1 - D)) ** 2 * u + sigma_next**2 * (1 - rho**2)


@pytest.mark.parametrize("v", [0, 0.3, 2])
@pytest.mark.parametrize("name", ["ald", "pc", "ancestral", "ddim"])
def test_dsm_2d_7_3_sampler_variances(dsm_2d, name, v):
    """Every state has the variance that theory.md 7 and 8 predict; a point (v = 0) is found."""
    sigmas, u, kappa, K = [3.0, 2.0, 1.0, 0.6, 0.2], 16.0, dsm_2d.args.kappa, dsm_2d.args.K
    expected = [] if name == "ald" else [u]
    if name == "ald":
        for sigma in sigmas:
            u = after_langevin(u, sigma, v, kappa, K)
            expected.append(u)
    else:
        for sigma, sigma_next in zip(sigmas, sigmas[1:]):
            u = after_rho(u, sigma, sigma_next, v, 1 if name == "ddim" else sigma_next / sigma)
            u = after_langevin(u, sigma_next, v, kappa, 1) if name == "pc" else u
            expected.append(u)
    expected.append(u * (v / (0.2**2 + v)) ** 2)
    x = 4 * normal(20000, 1, seed=1)   # not the numbers that the sampler draws
    path = dsm_2d.run_sampler(name, gaussian(v), x, sigmas)
    assert len(path) == 6
    variances = [x.square().mean().item() for x in path]
    assert variances == pytest.approx(expected, rel=0.04, abs=1e-20)   # 4 SE = 4 sqrt(2/20000)


def consistent_annealed_sampling(score, x, sigmas, ddim):
    """theory.md 7.3, written with rho; rho = 1 is DDIM, rho = sigma_next/sigma is DDPM."""
    path = [x]
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        r = 1 if ddim else sigma_next / sigma
        kappa = 1 - r * sigma_next / sigma
        noise = sigma_next * math.sqrt(1 - r**2) * torch.randn_like(x)
        x = x + kappa * sigma**2 * score(x, sigma) + noise
        path.append(x)
    return path


@pytest.mark.parametrize("ddim", [False, True])
def test_dsm_2d_7_3_one_formula_for_ddpm_and_ddim(dsm_2d, ddim):
    x, sigmas = normal(30, 2), [2.0, 1.2, 0.5]
    torch.manual_seed(1)
    ours = dsm_2d.ancestral_sampling(mixed, x, sigmas, ddim)
    torch.manual_seed(1)
    theirs = consistent_annealed_sampling(mixed, x, sigmas, ddim)
    for state, wanted in zip(ours[:-1], theirs, strict=True):
        close(state, wanted)
    close(ours[-1], theirs[-1] + 0.5**2 * mixed(theirs[-1], 0.5))


@pytest.mark.parametrize("kappa", [0.05, 0.4, 1.5])
def test_dsm_2d_8_4_langevin_stationary_variance(dsm_2d, kappa):
    """At one level Langevin dynamics forgets its start and settles at V/(1 - kappa/2V)."""
    x, V = 10 + normal(20000, 1), 1.5
    path = dsm_2d.annealed_langevin_dynamics(gaussian(0.5), x, [1.0], 200, kappa)
    assert path[0].square().mean().item() == pytest.approx(V / (1 - kappa / (2 * V)), rel=0.04)
    close(path[1], path[0] - path[0] / V)


def test_dsm_2d_7_3_step_loses_kappa_squared_of_the_posterior_variance(dsm_2d):
    """Variance with the true x_0 less that of the sampler's step, for three points of data."""
    x0 = THREE_POINTS[torch.randint(3, (100000,), generator=generator(1))]
    sigma, sigma_next = 1.0, 0.6
    x = x0 + sigma * normal(100000, 1, seed=2)
    slope = (three_score(x + 1e-4, sigma) - three_score(x - 1e-4, sigma)) / 2e-4
    posterior_variance = (sigma**2 + sigma**4 * slope).mean().item()
    for ddim, rho in [(True, 1.0), (False, 0.6)]:
        torch.manual_seed(3)
        ours = dsm_2d.ancestral_step(three_score, x, sigma, sigma_next, ddim)
        torch.manual_seed(3)
        z = torch.randn_like(x)
        kappa = 1 - rho * sigma_next / sigma
        right = (1 - kappa) * x + kappa * x0 + sigma_next * math.sqrt(1 - rho**2) * z
        within(right - ours, torch.zeros(1).double())    # the same mean
        within(right**2 - ours**2, kappa**2 * posterior_variance)


def variances_of_n_0_1(T, rho):
    """What T levels from 10 to 0.01 make of N(0, 1), with a last denoising step; rho(s, s_next)."""
    levels, u = np.geomspace(10, 0.01, T), 101.0
    for sigma, sigma_next in zip(levels, levels[1:]):
        u = after_rho(u, sigma, sigma_next, 1, rho(sigma, sigma_next))
    return u / (1 + 0.01**2) ** 2


def test_theory_7_3_few_levels_lose_variance():
    """The figures of theory.md, by the recursion that the samplers' variances are tested with."""
    def keep_all(sigma, sigma_next):
        return 1

    def keep_ratio(sigma, sigma_next):
        return sigma_next / sigma

    def keep_nothing(sigma, sigma_next):
        return 0

    for T, expected in [(50, [0.93, 0.87, 0.47]), (200, [0.98, 0.97, 0.49])]:
        found = [variances_of_n_0_1(T, rho) for rho in (keep_all, keep_ratio, keep_nothing)]
        assert found == pytest.approx(expected, abs=6e-3)


def test_dsm_2d_7_3_one_langevin_step_a_level(dsm_2d):
    """A sampler with a fixed kappa; with the ancestral noise the variance keeps 14.8 sigma^2."""
    excess = []
    for T in (100, 200, 400):
        levels, u = np.geomspace(10, 0.01, T), 101.0
        for sigma in levels:
            u = after_langevin(u, sigma, 1, 0.4, 1)
        excess.append(u - 1)
    assert excess == pytest.approx([0.246, 0.113, 0.054], abs=1e-3)
    levels, u = np.geomspace(10, 0.01, 6000), 100.0
    for sigma, sigma_next in zip(levels, levels[1:]):
        kappa = (sigma_next / sigma) ** 2 * (1 - (sigma_next / sigma) ** 2) / 2
        u = after_langevin(u, sigma, 0, kappa, 1)
    assert u / 0.01**2 == pytest.approx(1 + 2 * math.log(1000), rel=0.03)
    x = 10 * normal(20000, 1)
    levels = np.geomspace(10, 0.1, 200).tolist()
    for sigma, sigma_next in zip(levels, levels[1:]):
        kappa = (sigma_next / sigma) ** 2 * (1 - (sigma_next / sigma) ** 2) / 2
        x = dsm_2d.langevin_step(gaussian(0), x, sigma, kappa)
    assert x.square().mean().item() / 0.1**2 > 1 + 2 * math.log(100)


def test_dsm_2d_7_4_noise_of_003_is_too_much(dsm_2d):
    """Data at one point, 300 levels from 50 to 0.01: Var/sigma^2 with 003's noise and with ours."""
    levels, kappa = np.geomspace(50, 0.01, 300).tolist(), 0.16
    alone = both = right = 50 * normal(3000, 1)
    for sigma, sigma_next in zip(levels, levels[1:]):
        shrink = (sigma_next / sigma) ** 2
        alone = shrink * alone + sigma_next * torch.randn_like(alone)
        both = shrink * both + sigma_next * torch.randn_like(both)
        both = dsm_2d.langevin_step(gaussian(0), both, sigma_next, kappa)
        right = dsm_2d.ancestral_step(gaussian(0), right, sigma, sigma_next)
    found = [x.square().mean().item() / 0.01**2 for x in (alone, both, right)]
    assert found == pytest.approx([18.06, 3.08, 1], rel=4 * math.sqrt(2 / 3000))


@pytest.mark.parametrize("many", [False, True])
def test_dsm_2d_8_4_langevin_is_stable_below_kappa_2(dsm_2d, many):
    """Data at one point or three: far chains come back for kappa = 1.9, run away for 2.1."""
    points = THREE_POINTS if many else torch.zeros(1, 1).double()

    def score(x, sigma):
        shares = (-(x - points.T) ** 2 / (2 * sigma**2)).softmax(1)
        return (shares @ points - x) / sigma**2

    for sigma in (0.1, 3.0):
        x = 1000 + torch.zeros(50, 1).double()
        for kappa, far in [(1.9, False), (2.1, True)]:
            end = dsm_2d.annealed_langevin_dynamics(score, x, [sigma], 120, kappa)[0]
            bound = (kappa * points.max() + sigma * math.sqrt(2 * kappa)) / (1 - abs(1 - kappa))
            assert end.abs().min() > 1e6 if far else end.abs().mean() < bound


def test_theory_8_4_noise_over_the_levels():
    """Var/sigma^2 of data at one point tends to the closed form, or grows without end."""
    def ratio(kappa, K, gamma):
        r = 1.0
        for _ in range(400):
            r = after_langevin(gamma**2 * r, 1, 0, kappa, K)
        return r

    for kappa, K, gamma in [(0.4, 1, 1.1), (0.2, 5, 1.5), (1.3, 2, 1.2)]:
        rest = (1 - kappa) ** (2 * K)
        limit = (1 - rest) / (1 - rest * gamma**2) / (1 - kappa / 2)
        assert ratio(kappa, K, gamma) == pytest.approx(limit, rel=1e-6)
    assert ratio(0.2, 1, 1.3) > 1e6


@pytest.mark.parametrize("name, ratio", [("ddim", 2), ("heun", 4)])
def test_dsm_2d_7_2_order_of_the_ode_samplers(dsm_2d, name, ratio):
    """Twice the steps halve DDIM's distance to the probability flow and quarter Heun's."""
    x, errors = normal(50, 2), []
    for T in (41, 81):
        sigmas = np.geomspace(10, 0.01, T).tolist()
        state = dsm_2d.run_sampler(name, gaussian(1), x, sigmas)[T - 1]
        exact = x * math.sqrt((0.01**2 + 1) / (10**2 + 1))
        errors.append((state / exact - 1).abs().max().item())
    assert errors[0] < 0.1 and errors[0] / errors[1] == pytest.approx(ratio, rel=0.12)


def test_dsm_2d_7_2_flow_keeps_quantiles(dsm_2d):
    """Heun's points on the line lie at the same quantile of q_sigma at every level."""
    def quantile(x, sigma):
        return torch.special.ndtr((x - THREE_POINTS.T) / sigma).mean(1)

    levels = np.geomspace(3, 0.2, 60).tolist()
    x = torch.linspace(-6, 6, 25, dtype=torch.float64)[:, None]
    path = dsm_2d.heun_sampling(three_score, x, levels)
    for i in (20, 40, 59):
        close(quantile(path[i], levels[i]), quantile(x, 3), rtol=0, atol=1e-3)


def test_dsm_2d_7_2_steps_of_the_ode_samplers(dsm_2d):
    """DDIM's step is Euler's for dx/dsigma = -sigma s, Heun's the trapezoid; both denoise last."""
    x, a, b = normal(30, 2), 2.0, 1.2
    euler = x + (b - a) * -a * mixed(x, a)
    trapezoid = x + (b - a) * (-a * mixed(x, a) - b * mixed(euler, b)) / 2
    for name, expected in [("ddim", euler), ("heun", trapezoid)]:
        path = dsm_2d.run_sampler(name, mixed, x, [a, b])
        for state, wanted in zip(path, [x, expected, expected + b**2 * mixed(expected, b)],
                                 strict=True):
            close(state, wanted)


SAMPLERS = ["ancestral", "ddim", "heun", "ald", "pc"]


@pytest.mark.parametrize("shape", [(7, 3), (7, 1, 4, 4)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_dsm_2d_samplers_take_any_shape(dsm_2d, name, shape):
    path = dsm_2d.run_sampler(name, gaussian(1), normal(*shape), [2.0, 1.0])
    assert all(x.shape == shape for x in path)


@pytest.mark.parametrize("name", SAMPLERS)
def test_dsm_2d_calls_and_levels_are_as_printed(dsm_2d, name):
    levels, seen = dsm_2d.sampling_levels(name), []

    def counting(x, sigma):
        seen.append(sigma)
        return -x

    dsm_2d.run_sampler(name, counting, normal(2, 2), levels)
    assert len(seen) == dsm_2d.calls[name] and set(seen) == set(levels)
    assert len(levels) == (3 if name == "heun" else 6)
    ends = dsm_2d.sigmas[[0, -1]].tolist()
    assert [levels[0], levels[-1]] == pytest.approx(ends, rel=1e-5)


def test_dsm_2d_score_keeps_no_graph(dsm_2d):
    """003's samplers keep a graph over all their steps."""
    x = torch.randn(5, 2)
    assert not dsm_2d.score(x, 0.3).requires_grad
    close(dsm_2d.score(x, 0.3), dsm_2d.model(x, torch.full((5,), math.log(0.3))))


def test_dsm_2d_start_has_the_moments_of_the_noisy_data(dsm_2d):
    x = dsm_2d.start.sample((40000,)).double()
    data = dsm_2d.x_data.double()
    mean, cov = data.mean(0), torch.cov(data.T) + dsm_2d.sigma_max**2 * torch.eye(2).double()
    within(x, mean)
    within((x - mean)[:, :, None] * (x - mean)[:, None], cov)


def test_dsm_2d_samples_are_the_end_of_the_path(dsm_2d):
    assert len(dsm_2d.sample_sets) == 8 and len(dsm_2d.path) == 7
    close(dsm_2d.samples, dsm_2d.path[-1])
    saved = np.load(Path(dsm_2d.args.outdir) / "samples.npy")
    assert (saved == dsm_2d.samples.numpy()).all()


# %% dsm_2d.py: distance between sets
def test_dsm_2d_sw2_along_one_direction_is_the_best_assignment(dsm_2d):
    x, y = normal(40, 2).float(), 0.5 * normal(40, 2, seed=1).float() + 1
    ours, theirs = dsm_2d.sorted_projections(x), dsm_2d.sorted_projections(y)
    assert ours.shape == (32, 40)
    for i in (0, 5, 31):
        angle = math.pi * i / 32
        u = torch.tensor([math.cos(angle), math.sin(angle)])
        cost = ((x @ u)[:, None] - (y @ u)[None]).square().numpy()
        rows, columns = linear_sum_assignment(cost)
        square = (ours - theirs)[i].square().mean().item()
        assert square == pytest.approx(cost[rows, columns].mean(), rel=1e-4)


def test_dsm_2d_7_7_sw2_of_a_shift(dsm_2d):
    """A set shifted by c is at the distance |c|/sqrt(2); pairs are averaged."""
    x = normal(500, 2).float()
    shifts = torch.tensor([[0.0, 0.0], [0.3, -0.4], [0.0, 2.0]])
    sets = [dsm_2d.sorted_projections(x + shift) for shift in shifts]
    assert dsm_2d.mean_sw2(sets[:1], sets[:1]) == 0
    assert dsm_2d.mean_sw2(sets[:1], sets[1:2]) == pytest.approx(0.5 / math.sqrt(2), abs=1e-5)
    assert dsm_2d.mean_sw2(sets[:1], sets[1:]) == pytest.approx(2.5 / 2 / math.sqrt(2), abs=1e-5)
    assert dsm_2d.mean_sw2(sets[1:], sets[:1]) == pytest.approx(2.5 / 2 / math.sqrt(2), abs=1e-5)


def test_dsm_2d_reported_sw2_is_that_of_the_samples(dsm_2d):
    """64 pairs each; the floor is what i.i.d. sets of 64 points of gmm2 have."""
    generated = [dsm_2d.sorted_projections(x) for x in dsm_2d.sample_sets]
    assert dsm_2d.sw2 == pytest.approx(dsm_2d.mean_sw2(generated, dsm_2d.fresh))
    assert len(dsm_2d.fresh) == len(dsm_2d.perfect) == 8
    sets = [dsm_2d.sorted_projections(law("gmm2", 0).sample((64,)).float()) for _ in range(40)]
    floor = dsm_2d.mean_sw2(sets[:20], sets[20:])
    assert dsm_2d.sw2_floor == pytest.approx(floor, rel=0.25)


# %% dsm_2d.py: extras
def learned_field(x, sigma):
    """A field that is no gradient: its divergence is 2 x_1 + cos x_2 + sigma."""
    return torch.stack([x[:, 0] ** 2 + x[:, 1], x[:, 1].sin() + sigma * x[:, 1]], dim=1)


def test_dsm_2d_given_points_are_measured_as_printed(dsm_2d):
    """The last row of the table: distances over the floor, and the spread of the drawn together."""
    header = "noise forgotten: SW2/floor    spread (data: 1.00)\n"
    row = [float(word) for word in dsm_2d.printed.partition(header)[2].splitlines()[2].split()]
    sw2 = [dsm_2d.mean_sw2([dsm_2d.sorted_projections(x)], dsm_2d.fresh)
           for x in [dsm_2d.back, dsm_2d.forgotten]]
    moved = (dsm_2d.back - dsm_2d.x_init).norm(dim=1).mean()
    spread = dsm_2d.forgotten.std() / dsm_2d.x_data.std()
    expected = [sw2[0] / dsm_2d.sw2_floor, moved, sw2[1] / dsm_2d.sw2_floor, spread]
    assert row[1:] == pytest.approx([float(value) for value in expected], abs=0.006)


def test_dsm_2d_denoising_picture_takes_tweedies_step(dsm_2d):
    assert dsm_2d.eta == dsm_2d.viz_sigma**2 == pytest.approx(dsm_2d.settings["eta"])


def test_dsm_2d_7_2_flow_and_its_divergence(dsm_2d):
    """f = -sigma s and div f; the caller's tensor is not changed, no graph is kept."""
    x = normal(9, 2)
    f, div_f = dsm_2d.flow(learned_field, x, 0.7)
    close(f, -0.7 * learned_field(x, 0.7))
    close(div_f, -0.7 * (2 * x[:, 0] + x[:, 1].cos() + 0.7))
    assert not (x.requires_grad or f.requires_grad or div_f.requires_grad)


def test_dsm_2d_7_2_likelihood_takes_heuns_step_for_point_and_integral(dsm_2d):
    """One step of Heun's rule, written out, for the point and for the integral."""
    x, (a, b) = normal(9, 2), (0.5, 0.8)

    def log_q_max(x):
        return -x.square().sum(1)

    f, div_f = dsm_2d.flow(learned_field, x, a)
    f_there, div_f_there = dsm_2d.flow(learned_field, x + 0.3 * f, b)
    expected = log_q_max(x + 0.15 * (f + f_there)) + 0.15 * (div_f + div_f_there)
    close(dsm_2d.log_likelihood(learned_field, x, [b, a], log_q_max), expected)


def test_dsm_2d_7_2_likelihood_by_the_exact_score(dsm_2d):
    """With the exact score log q comes out to 1e-3 at 160 levels; the error falls as 1/T^2."""
    x = law("gmm2", 0.01).sample((200,))
    exact, errors = law("gmm2", 0.01).log_prob(x), []

    def score(x, sigma):
        log_q = law("gmm2", sigma).log_prob(x)
        return torch.autograd.grad(log_q.sum(), x, create_graph=True)[0]

    for T in (40, 80, 160):
        levels = np.geomspace(10, 0.01, T).tolist()
        found = dsm_2d.log_likelihood(score, x, levels, law("gmm2", 10).log_prob)
        errors.append((found - exact).mean().abs().item())
    assert errors[2] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.2)


def test_dsm_2d_printed_likelihood_is_that_of_fresh_noisy_points(dsm_2d):
    """2000 points of q at sigma_min; means, difference and standard error as printed."""
    printed = re.search(r"learned (\S+), exact (\S+),\ndifference (\S+) \+- (\S+) ",
                        dsm_2d.printed.partition("log density at 2000")[2])
    learned, exact, difference, standard_error = [float(value) for value in printed.groups()]
    noisy = law("gmm2", dsm_2d.sigma_min)
    assert exact == pytest.approx(noisy.log_prob(noisy.sample((20000,))).mean().item(), abs=0.1)
    assert difference == pytest.approx(learned - exact, abs=2e-3)
    expected = dsm_2d.difference.std().item() / math.sqrt(2000)
    assert standard_error == pytest.approx(expected, abs=1e-3)
    levels = dsm_2d.likelihood_levels
    assert len(levels) == 40 and levels[0] == pytest.approx(dsm_2d.sigma_max, rel=1e-5)
    assert levels[-1] == pytest.approx(dsm_2d.sigma_min, rel=1e-5)


def test_dsm_2d_7_5_printed_answers_are_those_at_the_printed_point(dsm_2d):
    """At x_t = (1, 2) with alpha_t = 0.8 and sigma_t = 0.6; eps and score as printed."""
    text = dsm_2d.printed.partition("At x_t = (1, 2), where alpha_t = 0.8 and sigma_t = 0.6")[2]
    eps = dsm_2d.eps64(torch.tensor([[1.0, 2.0]]).double(), 0.8, 0.6)[0]
    printed = re.search(r"\nscore = \((\S+), (\S+)\), from which eps = \((\S+), (\S+)\)", text)
    values = torch.tensor([float(value) for value in printed.groups()])
    expected = torch.cat([-eps / 0.6, eps]).float()
    torch.testing.assert_close(values, expected, rtol=0, atol=6e-4)


def test_dsm_2d_7_6_start_from_data_adds_the_noise_of_its_level(dsm_2d):
    x_init, seen = normal(500, 2), []

    def looking(x, sigma):
        seen.append((x, sigma))
        return -x

    torch.manual_seed(3)
    dsm_2d.sample_with_initialization(looking, x_init, [1.5, 0.5])
    torch.manual_seed(3)
    close(seen[0][0], x_init + 1.5 * torch.randn_like(x_init))
    assert seen[0][1] == 1.5 and {sigma for _, sigma in seen} == {1.5, 0.5}
    seen.clear()
    dsm_2d.sample_with_initialization(looking, x_init, [1.5, 0.5], with_noise=False)
    close(seen[0][0], x_init)


ALPHA_SIGMA = [(0.8, 0.6), (0.6, 0.8), (0.9, 1.7)]   # the last does not preserve variance


@pytest.mark.parametrize("alpha, sigma", ALPHA_SIGMA)
@pytest.mark.parametrize("source, target", list(permutations(["score", "eps", "x0", "v"], 2)))
def test_dsm_2d_7_5_convert(dsm_2d, source, target, alpha, sigma):
    """Each quantity becomes each other one as defined from x = alpha x0 + sigma eps, and back."""
    x0, eps = normal(6, 2), normal(6, 2, seed=1)
    x = alpha * x0 + sigma * eps
    truth = {"score": -eps / sigma, "eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}
    result = dsm_2d.convert(truth[source], x, alpha, sigma, source, target)
    close(result, truth[target], rtol=1e-12, atol=1e-12)
    back = dsm_2d.convert(result, x, alpha, sigma, target, source)
    close(back, truth[source], rtol=1e-12, atol=1e-12)


def test_dsm_2d_vp_schedule_is_ddpms_within_the_trained_levels(dsm_2d):
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[::-1]
    ratio = np.sqrt(1 / alpha_bar - 1)
    inside = alpha_bar[(ratio >= 0.1) & (ratio <= 20)]
    alphas, sigmas = dsm_2d.vp_schedule(0.1, 20.0)
    assert alphas == pytest.approx(np.sqrt(inside)[::5], rel=1e-12)
    assert np.square(alphas) + np.square(sigmas) == pytest.approx(np.ones(len(alphas)))


@pytest.mark.parametrize("ddim", [False, True])
def test_dsm_2d_7_5_ddpm_sampler_is_that_of_the_papers(dsm_2d, ddim):
    """50 steps of DDPM's own schedule, in the terms of Ho et al. and of Song et al."""
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    times = list(range(400, 350, -1))
    alphas = [math.sqrt(alpha_bar[t]) for t in times]
    sigmas = [math.sqrt(1 - alpha_bar[t]) for t in times]

    def eps_model(x, alpha, sigma):
        return -sigma * mixed(x / alpha, sigma / alpha) / alpha

    start = x = normal(20, 2)
    torch.manual_seed(7)
    path = dsm_2d.ddpm_sampling(eps_model, x, alphas, sigmas, ddim)
    torch.manual_seed(7)
    for i, t in enumerate(times[:-1]):
        a, s, before = alphas[i], sigmas[i], alpha_bar[t - 1]
        eps, z = eps_model(x, a, s), torch.randn_like(x)
        if ddim:   # Song et al. 2021, eq. 12 with sigma_t = 0
            x = math.sqrt(before) * (x - s * eps) / a + math.sqrt(1 - before) * eps
        else:      # Ho et al. 2020, algorithm 2 with the posterior variance of eq. 7
            variance = beta[t] * (1 - before) / (1 - alpha_bar[t])
            mean = (x - beta[t] / s * eps) / math.sqrt(1 - beta[t])
            x = mean + math.sqrt(variance) * z
        close(path[i + 1], x)
    assert len(path) == 51 and (path[0] == start).all()
    close(path[-1], (x - sigmas[-1] * eps_model(x, alphas[-1], sigmas[-1])) / alphas[-1])


def test_dsm_2d_7_5_network_is_a_ddpm(dsm_2d):
    """eps64 is the network's noise at x_t, and both paths agree to round-off."""
    x, alpha, sigma = normal(9, 2), 0.8, 0.6
    expected = -sigma * dsm_2d.score((x / alpha).float(), sigma / alpha) / alpha
    ours = dsm_2d.eps64(x, alpha, sigma).float()
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    for ddim in (False, True):
        assert 0 < dsm_2d.compare_with_ddpm(dsm_2d.alphas, dsm_2d.vp_sigmas, ddim) < 1e-10


# %% dsm_homework.py: note 001 task 2
@pytest.fixture(scope="session")
def dsm_homework():
    return pasted_script("dsm_homework")


@pytest.fixture(scope="session")
def matcher_class():
    """The class's text alone, with the imports of the homework's notebook."""
    text = class_text("dsm_homework", "DenoisingScoreMatcher")
    return pasted(text).DenoisingScoreMatcher


def moons(sigma):
    """The two moons with noise 0.1, convolved with N(0, sigma^2 I), as a torch distribution."""
    angle = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    centres = torch.cat([upper, torch.tensor([1, 0.5]).double() - upper])
    noisy = MultivariateNormal(centres, (0.01 + sigma**2) * torch.eye(2).double())
    return MixtureSameFamily(Categorical(torch.ones(400).double()), noisy)


def moons_score(x, sigma):
    x = x.double().requires_grad_()
    return torch.autograd.grad(moons(sigma).log_prob(x).sum(), x)[0]


@pytest.mark.parametrize("network, shape", [(torch.nn.Linear(2, 2), (2,)),
                                            (torch.nn.Conv2d(1, 1, 3, padding=1), (1, 4, 4))])
def test_dsm_homework_class_stands_alone(matcher_class, network, shape):
    """What the homework asserts, with the class's text alone."""
    matcher = matcher_class(score_model=network, input_shape=shape, sigma=0.1)
    x = torch.rand(16, *shape)
    assert matcher(x).size() == x.size()
    assert matcher.loss(x)["total_loss"].size() == ()
    samples = matcher.sample(4)
    assert samples.size() == (4, *shape) and not samples.requires_grad
    assert matcher.device == torch.device("cpu")
    assert torch.equal(matcher.state_dict()["sigma"], torch.tensor(0.1))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
def test_dsm_homework_class_refuses_sigma(matcher_class, sigma):
    with pytest.raises(ValueError, match="not positive"):
        matcher_class(torch.nn.Linear(2, 2), (2,), sigma)


def test_dsm_homework_training_helper(matcher_class):
    """A helper that only knows loss(batch)["total_loss"] and sample(n) trains the class.

    N(0, I) with noise of sigma 1 has the score -x/2.
    """
    matcher = matcher_class(torch.nn.Linear(2, 2), (2,), 1.0)
    optimizer = torch.optim.SGD(matcher.parameters(), 0.05)
    x = normal(2000, 2).float()
    for _ in range(300):
        optimizer.zero_grad()
        matcher.loss(x)["total_loss"].backward()
        optimizer.step()
    close(matcher.score_model.weight.detach(), -torch.eye(2) / 2, rtol=0, atol=0.08)
    assert matcher.sample(7).shape == (7, 2)


@pytest.mark.parametrize("sigma, d", [(0.1, 2), (0.5, 3)])
@pytest.mark.parametrize("a", [0.3, 0.8, 2.0])
def test_dsm_homework_loss_on_a_quadratic(matcher_class, sigma, d, a):
    """s = -a x on N(0, I): E|s + eps/sigma|^2 = d (a^2 (1 + sigma^2) - 2 a + 1/sigma^2)."""
    slope = torch.tensor(a, dtype=torch.float64, requires_grad=True)

    def score_model(x):
        return -slope * x

    matcher = matcher_class(score_model, (d,), sigma).double()
    x = normal(40000, d, seed=1)
    within(matcher(x).sum(1).detach(), d * (a**2 * (1 + sigma**2) - 2 * a + 1 / sigma**2))
    gradient = torch.autograd.grad(matcher.loss(x)["total_loss"], slope)[0].item()
    assert gradient == pytest.approx(2 * d * (a * (1 + sigma**2) - 1), abs=0.15 / sigma)
    torch.manual_seed(1)
    loss = matcher.loss(x)["total_loss"].item()
    torch.manual_seed(1)
    assert loss == pytest.approx(matcher(x).sum(1).mean().item())


def test_dsm_homework_data(dsm_homework):
    """80 % of make_moons(noise=0.1) train and 20 % test, float32, with their labels."""
    arrays = dsm_homework.generate_moons_data(2000)
    assert [len(array) for array in arrays] == [1600, 1600, 400, 400]
    assert arrays[0].dtype == np.float32
    x = torch.tensor(np.concatenate([arrays[0], arrays[2]])).double()
    label = np.concatenate([arrays[1], arrays[3]])
    distance = torch.cdist(x, moons(0.0).component_distribution.mean)
    assert distance.amin(1).square().mean().sqrt().item() == pytest.approx(0.1, rel=0.06)
    assert ((distance.argmin(1) >= 200).numpy() == (label == 1)).mean() > 0.99


@pytest.mark.parametrize("sigma", [0.0, 0.1, 1.0])
def test_dsm_homework_exact_score_is_the_gradient_of_the_density(dsm_homework, sigma):
    x = torch.cat([moons(sigma).sample((50,)), 20 * normal(10, 2)])
    s = moons_score(x, sigma).float()
    torch.testing.assert_close(dsm_homework.exact_score(x.float(), sigma), s, rtol=2e-3, atol=5e-3)


def test_dsm_homework_sample_data(dsm_homework):
    """Draws have the moments of the law, and are independent: one side's share is a coin's."""
    x = dsm_homework.sample_data(20000).double()
    within(x, moons(0.0).mean, se=5)
    assert x.var(0).numpy() == pytest.approx(moons(0.0).variance.numpy(), rel=0.05)
    draws = torch.stack([dsm_homework.sample_data(100) for _ in range(400)])
    side = (draws[:, :, 0] > draws[:, :, 0].median()).double()
    assert side.sum(1).var().item() == pytest.approx(25, rel=4 * math.sqrt(2 / 400))


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_dsm_homework_4_3_floor_is_the_loss_of_the_exact_score(dsm_homework, sigma):
    x, eps = moons(0.0).sample((20000,)).float(), normal(20000, 2, seed=5).float()
    exact = dsm_homework.exact_score(x + sigma * eps, sigma)
    loss = (exact + eps / sigma).square().sum(1).mean().item()
    floor = 2 / sigma**2 - dsm_homework.score_power(sigma)
    assert floor == pytest.approx(loss, rel=0.03)
    if sigma == dsm_homework.args.sigma:
        assert dsm_homework.floor_of_loss == pytest.approx(floor, rel=0.02)


@pytest.mark.parametrize("factor, error", [(1, 0), (0, 1), (1.3, 0.3)])
def test_dsm_homework_relative_error(dsm_homework, factor, error):
    def score_model(x):
        with torch.enable_grad():
            return factor * moons_score(x, 0.2).float()

    x = moons(0.2).sample((200,)).float()
    matcher = dsm_homework.DenoisingScoreMatcher(score_model, (2,), 0.2)
    measured = dsm_homework.relative_error(matcher, x)
    assert measured == pytest.approx(error, abs=1e-3)


def test_dsm_homework_network(dsm_homework):
    """layers hidden layers of width hidden, and as many activations."""
    layers = list(dsm_homework.make_score_model())
    linear = [tuple(layer.weight.shape) for layer in layers[::2]]
    assert linear == [(48, 2), (48, 48), (48, 48), (48, 48), (2, 48)]
    assert [type(layer) for layer in layers[1::2]] == 4 * [torch.nn.SiLU]


def test_dsm_homework_learning_rate_rises_and_falls(dsm_homework):
    """Up for 15 % of the 20 steps of 10 epochs, then down to next to nothing."""
    with kept_schedulers() as made:
        dsm_homework.train(dsm_homework.matcher, 10)
    assert made[0]._schedule_phases[0]["end_step"] == pytest.approx(0.15 * 20 - 1)
    assert made[0].get_last_lr()[0] < 0.01 * dsm_homework.args.lr


def test_dsm_homework_learns():
    """A short run gets the score to 30 % under q_sigma (s = 0 has 100 %), and says so."""
    script = run("dsm_homework", "--n 2000 --batch 400 --epochs 80 --sigma 0.3", until="Sampling")
    x = moons(0.3).sample((4000,))
    s = moons_score(x, 0.3)
    error = ((script.score(x.float()) - s).norm() / s.norm()).item()
    assert error < 0.3
    last = script.history[-1]
    assert last["error"] == script.score_err == pytest.approx(error, rel=0.1)
    epochs = [row["epoch"] for row in script.history]
    assert epochs == [8, 16, 24, 32, 40, 48, 56, 64, 72, 80]
    for name in ["loss", "test_loss"]:
        assert last[name] == pytest.approx(script.floor_of_loss, rel=0.12)
    expected = script.floor_of_loss + error**2 * s.square().sum(1).mean().item()
    assert last["test_loss"] == pytest.approx(expected, rel=0.03)


def test_dsm_homework_score_knows_one_sigma(dsm_homework):
    x = dsm_homework.x_data
    assert torch.equal(dsm_homework.score(x), dsm_homework.model(x))
    with pytest.raises(ValueError, match="0.1 only"):
        dsm_homework.score(x, 0.2)


def test_dsm_homework_sample_starts_from_the_uniform_law(matcher_class):
    """Without a score and with a tiny step U[-1, 1] is what comes out."""
    def score_model(x):
        return 0 * x

    x = matcher_class(score_model, (2,), 1.0).sample(20000, 1, 1e-12).double()
    assert x.min() >= -1.001 and x.max() <= 1.001
    within(x, 0.0)
    within(x.square(), 1 / 3)


def test_dsm_homework_tweedie(dsm_homework):
    """With the exact score the step is the mean of x given noisy_x: nothing is left to explain."""
    x = moons(0.0).sample((4000,))

    def score_model(x):
        return dsm_homework.exact_score(x, 0.1)

    matcher = dsm_homework.DenoisingScoreMatcher(score_model, (2,), 0.1)
    mean = dsm_homework.tweedie(matcher, (x + 0.1 * normal(4000, 2, seed=5)).float())
    residual = x - mean
    within(residual, 0.0)
    within(residual * mean, 0.0)


def test_dsm_homework_fresh_projections(dsm_homework):
    """Eight different sets, sorted, with the variance of the noisy data along each direction."""
    sets = torch.stack(dsm_homework.fresh_projections(0.5))               # (8, 32, 200)
    assert sets.shape == (8, 32, 200) and (sets.diff(dim=2) >= 0).all()
    variance = sets[:, [0, 16]].transpose(0, 1).flatten(1).var(1)  # along both axes
    expected = moons(0.5).variance.numpy()
    assert variance.numpy() == pytest.approx(expected, rel=0.2)
    assert (sets[0] != sets[1]).any()


def test_dsm_homework_figures(dsm_homework):
    """SW2, floor and their Tweedie twins are recomputed from the sets."""
    projected = [dsm_homework.sorted_projections(x) for x in dsm_homework.sample_sets]
    assert len(projected) == 4 and torch.equal(dsm_homework.samples, dsm_homework.sample_sets[3])
    sw2 = dsm_homework.mean_sw2(projected, dsm_homework.fresh_projections(0.1))
    assert dsm_homework.sw2 == pytest.approx(sw2, rel=0.25)
    for sigma, printed in [(0.1, dsm_homework.sw2_floor), (0, dsm_homework.clean_floor)]:
        fresh = dsm_homework.fresh_projections(sigma)
        floor = dsm_homework.mean_sw2(dsm_homework.fresh_projections(sigma), fresh)
        assert printed == pytest.approx(floor, rel=0.4)
    with torch.no_grad():
        clean = [x + 0.01 * dsm_homework.model(x) for x in dsm_homework.sample_sets]
    clean = [dsm_homework.sorted_projections(x) for x in clean]
    expected = dsm_homework.mean_sw2(clean, dsm_homework.fresh_projections(0))
    assert dsm_homework.sw2_tweedie == pytest.approx(expected, rel=0.25)


def test_dsm_homework_upper_share(dsm_homework):
    centres = moons(0.0).component_distribution.mean.float()
    assert dsm_homework.upper_share(centres[:200]) == 1
    assert dsm_homework.upper_share(centres[100:300]) == 0.5


def test_dsm_homework_chains_that_leave(dsm_homework):
    """A chain has left when it is further out than 6 (1 + sigma), or is not a number."""
    x = torch.tensor([[0, 6.5], [0, 6.7], [math.nan, 0], [math.inf, 0], [0, 0]])
    assert dsm_homework.has_left(x).tolist() == [False, True, True, True, False]


def test_dsm_homework_run_chains(dsm_homework):
    """The states at 10, 100 and 1000 steps are those of one long walk of the class."""
    x0 = normal(200, 2, seed=3).float()
    torch.manual_seed(4)
    states = dsm_homework.run_chains(dsm_homework.matcher, x0, 0.01)
    torch.manual_seed(4)
    x = x0
    for steps in range(1, 1001):
        x = dsm_homework.matcher.langevin_dynamics(x, 1, 0.01)
        if steps in [10, 100, 1000]:
            assert torch.equal(states.pop(steps), x)
    assert not states


@pytest.mark.parametrize("eta, step", [(6.0, 3), (2.0, None)])
def test_dsm_homework_first_to_leave(dsm_homework, eta, step):
    """With s = -x a step multiplies by 1 - eta/2: by -2 a chain leaves from 1, by 0 it does not."""
    matcher = dsm_homework.DenoisingScoreMatcher(torch.neg, (2,), 0.1)
    with mock.patch.object(torch, "randn_like", torch.zeros_like):
        assert dsm_homework.first_to_leave(matcher, torch.eye(2), eta) == step


def test_dsm_homework_grid(dsm_homework):
    """Its step sizes are 1/80, 1/8, 5/8 and 2 times the limit 0.08; its figures are true."""
    etas = pytest.approx([0.001, 0.01, 0.05, 0.16])
    assert dsm_homework.etas == list(dsm_homework.chains) == etas
    assert [list(states) for states in dsm_homework.chains.values()] == 4 * [[10, 100, 1000]]
    noisy = moons(dsm_homework.args.sigma).component_distribution
    right = scipy.stats.norm.sf(1.1, noisy.mean[:, 0], noisy.variance[:, 0].sqrt()).mean()
    assert right == pytest.approx(0.25, abs=0.01)
    assert dsm_homework.in_data == pytest.approx(right, abs=4 * math.sqrt(0.25 * 0.75 / 20000))
    first = dsm_homework.chains[dsm_homework.etas[0]][10]                    # still near U[-1, 1]
    assert abs(first.mean().item()) < 0.15 and first.std().item() == pytest.approx(0.58, rel=0.1)
    x = dsm_homework.samples
    row = dsm_homework.measure_chains(x)
    sw2 = dsm_homework.mean_sw2([dsm_homework.sorted_projections(x)], dsm_homework.fresh_noisy)
    assert row["ratio"] == sw2 / dsm_homework.sw2_floor
    assert row["upper"] == dsm_homework.upper_share(x)
    assert row["right"] == pytest.approx((x[:, 0] > 1.1).double().mean().item())
    assert row["left"] == 0
    row = dsm_homework.measure_chains(torch.cat([x[:150], 1000 + x[:50]]))
    assert row["left"] == 0.25
    assert all(math.isnan(row[name]) for name in ["ratio", "upper", "right"])


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_dsm_homework_exact_density(dsm_homework, sigma):
    """It is proportional to the density."""
    x = moons(sigma).sample((100,))
    ratio = dsm_homework.exact_density(x.float(), sigma) / moons(sigma).log_prob(x).exp()
    assert (ratio / ratio[0]).numpy() == pytest.approx(1, rel=1e-3)


def test_dsm_homework_levels_are_measured_at_noisy_data(dsm_homework):
    seen = []

    def keep(matcher, x):
        seen.append(x)
        return 0.0

    matcher = dsm_homework.trained[1.0][0]
    with mock.patch.dict(dsm_homework.measure_level.__globals__, relative_error=keep):
        dsm_homework.measure_level(matcher, dsm_homework.samples)
    x = seen[0].double()
    within(x, moons(1.0).mean)
    within((x - moons(1.0).mean).square(), moons(1.0).variance)


def test_dsm_homework_uncertainty_of_the_test_loss(dsm_homework):
    """The standard error of |eps/sigma|^2 over 20 draws for each of the 20 test points."""
    values = (normal(100000, 2) / dsm_homework.args.sigma).square().sum(1)
    assert dsm_homework.uncertainty == pytest.approx(values.std().item() / math.sqrt(400), rel=0.03)


def test_dsm_homework_loss_at_test_points(dsm_homework):
    """Over the test points: of s = 0 it is 2/sigma^2, within the spread of 20 x 20 draws."""
    matcher = dsm_homework.DenoisingScoreMatcher(torch.zeros_like, (2,), 0.5)
    loss = dsm_homework.loss_at_test_points(matcher)
    assert loss == pytest.approx(2 / 0.25, rel=4 / math.sqrt(20 * 20))
    torch.manual_seed(3)
    points = []
    matcher.score_model = points.append
    with pytest.raises(TypeError):
        dsm_homework.loss_at_test_points(matcher)
    mean = points[0].view(20, 20, 2).mean(0)
    close(mean, dsm_homework.x_test, rtol=0, atol=4.5 * 0.5 / math.sqrt(20))


def test_dsm_homework_measure_level(dsm_homework):
    """With the exact score and perfect samples of q_0.3 the row says so."""
    def score_model(x):
        return dsm_homework.exact_score(x, 0.3)

    matcher = dsm_homework.DenoisingScoreMatcher(score_model, (2,), 0.3)
    x = moons(0.3).sample((200,)).float()
    row = dsm_homework.measure_level(matcher, x)
    assert row["error"] == pytest.approx(0, abs=1e-6) == row["plane"]
    assert 0.5 < row["noisy"] < 2
    fresh, floor = dsm_homework.fresh_clean, dsm_homework.clean_floor
    for name, points in [("clean", x), ("tweedie", x + 0.09 * score_model(x))]:
        sw2 = dsm_homework.mean_sw2([dsm_homework.sorted_projections(points)], fresh)
        assert row[name] == pytest.approx(sw2 / floor)
    assert row["upper"] == dsm_homework.upper_share(x)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_dsm_homework_measure_level_sees_errors(dsm_homework, factor):
    """Under q_sigma and on the plane the error of factor * s is |factor - 1|."""
    def score_model(x):
        return factor * dsm_homework.exact_score(x, 0.3)

    matcher = dsm_homework.DenoisingScoreMatcher(score_model, (2,), 0.3)
    row = dsm_homework.measure_level(matcher, 3 + dsm_homework.samples)
    assert row["error"] == row["plane"] == pytest.approx(abs(factor - 1))
    assert min(row["noisy"], row["clean"]) > 5


@pytest.mark.parametrize("sigma, epochs, steps", [(0.03, 3, 12), (0.3, 1, 4)])
def test_dsm_homework_train_and_sample(dsm_homework, sigma, epochs, steps):
    """A new network at the new level; above 0.1 a third of the way; an eighth of the limit."""
    with (mock.patch.object(dsm_homework.DenoisingScoreMatcher, "sample",
                            autospec=True, return_value="samples") as sample,
          mock.patch.dict(dsm_homework.train_and_sample.__globals__,
                          train=mock.Mock()) as names):
        matcher, samples = dsm_homework.train_and_sample(sigma)
        assert names["train"].call_args[0] == (matcher, epochs)
    assert matcher.sigma.item() == pytest.approx(sigma) and samples == "samples"
    assert matcher.score_model is not dsm_homework.model
    assert sample.call_args[0][1:] == (200, steps, pytest.approx(4 * (sigma**2 + 0.1**2) / 8))
    assert list(dsm_homework.trained) == [0.1, 0.03, 0.3, 1.0]


# %% dsm_homework.py: Langevin dynamics, theory.md 6
@pytest.mark.parametrize("eta", [0.1, 1.0, 1.9, 3.5])
def test_dsm_homework_6_2_langevin_variance(dsm_homework, matcher_class, eta):
    """On N(0, V) the variance follows its recursion and settles at V/(1 - eta/4V)."""
    V = 1.3

    def score(x):
        return -x / V

    x = 3 * normal(20000, 1, seed=3)
    expected = [9.0]
    for _ in range(100):
        expected.append((1 - eta / (2 * V)) ** 2 * expected[-1] + eta)
    matcher = matcher_class(score, (1,), 1.0)
    for count in (1, 3, 100):
        for state in [dsm_homework.langevin(score, x, count, eta),
                      matcher.langevin_dynamics(x, count, eta)]:
            assert state.square().mean().item() == pytest.approx(expected[count], rel=0.04)
    assert expected[-1] == pytest.approx(V / (1 - eta / (4 * V)), rel=0.02)


def test_dsm_homework_6_1_one_step(matcher_class):
    """x + (eta/2) s + sqrt(eta) z: half the step on the score, the root on the noise."""
    def score(x):
        return 7 - x

    x = normal(5, 2)
    matcher = matcher_class(score, (2,), 1.0)
    torch.manual_seed(2)
    state = matcher.langevin_dynamics(x, 1, 0.3)
    close(state, x + 0.15 * (7 - x) + math.sqrt(0.3) * normal(5, 2, seed=2))
    assert torch.equal(matcher.langevin_dynamics(x, 0, 0.3), x)


def test_dsm_homework_6_2_stability_limit(dsm_homework, matcher_class):
    """With the exact score of the moons far chains return below 4 (sigma^2 + tau^2), not above."""
    def score(x):
        return dsm_homework.exact_score(x, 0.1)

    assert dsm_homework.limit == pytest.approx(0.08)
    matcher = matcher_class(score, (2,), 0.1)
    far = 1e4 * normal(20, 2).float()
    assert (matcher.langevin_dynamics(far, 100, 0.95 * 0.08).norm(dim=1) < 1e3).all()
    assert (matcher.langevin_dynamics(far, 100, 1.05 * 0.08).norm(dim=1) > 1e6).all()


def test_dsm_homework_6_4_temperature(dsm_homework):
    """Temperature T samples q^(1/T): on N(0, V) the variance is T V/(1 - eta/4V)."""
    x = dsm_homework.langevin(torch.neg, normal(20000, 1, seed=3), 60, 0.5, temperature=0.3)
    assert x.square().mean().item() == pytest.approx(0.3 / (1 - 0.125), rel=0.04)


def test_dsm_homework_6_5_preconditioning(dsm_homework):
    """One step adds M s eta/2 and noise of covariance eta M; with M = Sigma no axis is special."""
    M = torch.tensor([[1.0, 0.5], [0.5, 2.0]]).double()

    def score(x):
        return torch.sin(3 * x) - x

    x = torch.tensor([[0.4, -0.7]]).double().repeat(40000, 1)
    step = dsm_homework.preconditioned_langevin(score, x, 1, 0.2, M) - x
    within(step, 0.1 * M @ score(x[0]))
    close(torch.cov(step.T), 0.2 * M, rtol=0.05, atol=0.005)

    def gaussian(x):
        return -x @ M.inverse()

    x = dsm_homework.preconditioned_langevin(gaussian, x, 60, 0.5, M)
    close(torch.cov(x.T), M / (1 - 0.125), rtol=0.05, atol=0.03)


def test_dsm_homework_6_3_gaussians(dsm_homework):
    """Of the extras' Gaussians: variances, and scores that are gradients of their log density."""
    assert dsm_homework.variances.tolist() == pytest.approx([1, 0.02])
    x = normal(6, 2).float().requires_grad_()
    for name in ["gaussian", "normal"]:
        log_density = getattr(dsm_homework, f"{name}_log_density")
        score = getattr(dsm_homework, f"{name}_score")
        gradient = torch.autograd.grad(log_density(x).sum(), x)[0]
        torch.testing.assert_close(score(x), gradient)
    close(dsm_homework.normal_score(x), -x)
    close(dsm_homework.gaussian_score(x), -x / torch.tensor([1, 0.02]), rtol=1e-5)


def test_dsm_homework_6_3_mala_is_exact(dsm_homework):
    """MALA keeps a mixture where Langevin dynamics is far off; each chain has its own test."""
    means = torch.tensor([[0.0, 0], [1.5, 0]]).double()
    law_ = MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7]).double()),
                             MultivariateNormal(means, 0.3 * torch.eye(2).double()))

    def score(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(law_.log_prob(x).sum(), x)[0]

    x = law_.sample((20000,))
    y, acceptance = dsm_homework.mala(law_.log_prob, score, x, 25, 0.6)
    within(y, law_.mean)
    within((y - law_.mean).square(), law_.variance)
    langevin = dsm_homework.langevin(score, x, 25, 0.6)
    assert (langevin - law_.mean).square().mean(0)[1] > 1.5 * 0.3
    y, acceptance = dsm_homework.mala(law_.log_prob, score, x, 1, 0.6)
    moved = (y != x).any(1).double().mean().item()
    assert moved == pytest.approx(acceptance, abs=1e-6) and 0.5 < acceptance < 0.95


def test_dsm_homework_6_3_mala_acceptance(dsm_homework):
    """In d = 100 the acceptance is 2 Phi(-sqrt((eta/V)^3 d)/8), whatever V."""
    V, eta = 2.5, 1.5

    def log_density(x):
        return -x.square().sum(1) / (2 * V)

    def score(x):
        return -x / V

    x = math.sqrt(V) * normal(1000, 100, seed=3)
    _, acceptance = dsm_homework.mala(log_density, score, x, 30, eta)
    formula = 2 * scipy.stats.norm.cdf(-math.sqrt((eta / V) ** 3 * 100) / 8)
    assert acceptance == pytest.approx(formula, abs=0.02)


@pytest.mark.parametrize("d", [1, 4])
def test_theory_6_3_mean_and_variance_of_the_log_ratio(d):
    """On N(0, V I): E L = -a and Var L = 2a (1 + (eta/V)^3/32) with a = (eta/V)^3 d/32."""
    V, eta = 2.5, 3.0
    law_ = MultivariateNormal(torch.zeros(d).double(), V * torch.eye(d).double())
    x = law_.sample((50000,))
    y = x - eta / 2 * x / V + math.sqrt(eta) * normal(50000, d, seed=1)
    there, back = y - x + eta / 2 * x / V, x - y + eta / 2 * y / V
    L = (there.square().sum(1) - back.square().sum(1)) / (2 * eta)
    L = L + law_.log_prob(y) - law_.log_prob(x)
    a = (eta / V) ** 3 * d / 32
    within(L, torch.tensor(-a).double())
    variance = 2 * a * (1 + (eta / V) ** 3 / 32)
    within((L + a).square(), torch.tensor(variance).double(), se=5)


def test_theory_6_1_fokker_planck():
    """With q = N(0, 1) the known law of x_t solves the equation; with 003's sign it does not."""
    def density(t, x):
        variance = 1 + 0.5 * math.exp(-2 * t)
        square = (x - 2 * math.exp(-t)) ** 2 / variance
        return (-square / 2).exp() / math.sqrt(2 * math.pi * variance)

    x = torch.linspace(-4, 5, 50, dtype=torch.float64, requires_grad=True)
    p = density(0.3, x)
    slope = torch.autograd.grad(p.sum(), x, create_graph=True)[0]
    change = (density(0.3 + 1e-5, x) - density(0.3 - 1e-5, x)).detach() / 2e-5
    for sign in (-1, 1):
        flux = slope + sign * p * -x
        right = torch.autograd.grad(flux.sum(), x, retain_graph=True)[0]
        assert ((right - change).abs().max() < 1e-8).item() == (sign == -1)


def test_theory_6_1_kl_falls():
    """The equation's change of KL(p | q) is -E|grad log p - grad log q|^2, for two mixtures."""
    x = LINE.clone().requires_grad_()
    laws = [mixture_1d([0.3, 0.7], torch.tensor([[-2.0], [1.0]]).double(), 0.8),
            mixture_1d([0.6, 0.4], torch.tensor([[-1.0], [1.5]]).double(), 1.3)]
    log_p, log_q = [law_.log_prob(x) for law_ in laws]
    s_p, s_q = [torch.autograd.grad(f.sum(), x, create_graph=True)[0][:, 0]
                for f in (log_p, log_q)]
    change = torch.autograd.grad((log_p.exp() * (s_p - s_q)).sum(), x)[0][:, 0]
    falls = (change * (log_p - log_q)).sum().item()
    assert falls == pytest.approx(-(log_p.exp() * (s_p - s_q) ** 2).sum().item(), rel=1e-6)


@pytest.mark.parametrize("sigma, barrier, time", [(0.1, 11.7, 2.0e5), (1.0, 5.6, 1.3e3)])
def test_theory_6_2_barrier(sigma, barrier, time):
    """Modes at -5 and 5 of width 1: mean time from one to the other, by a chain on a grid."""
    x = torch.linspace(-13, 5, 4001, dtype=torch.float64)
    means = torch.tensor([[-5.0], [5.0]]).double()
    log_q = mixture_1d([0.5, 0.5], means, 1 + sigma**2).log_prob(x[:, None])
    at_0 = mixture_1d([0.5, 0.5], means, 1 + sigma**2).log_prob(torch.zeros(1).double())
    assert (log_q[-1] - at_0).item() == pytest.approx(barrier, abs=0.05)
    half = (log_q.diff() / 2).exp().numpy() / (18 / 4000) ** 2
    up, down = half, np.append(0, 1 / half[:-1] / (18 / 4000) ** 4)   # rates to the neighbours
    bands = np.stack([np.append(0, up[:-1]), -up - down, np.append(down[1:], 0)])
    times = scipy.linalg.solve_banded((1, 1), bands, -np.ones(4000))  # the end, x = 5, absorbs
    assert np.interp(-5, x[:-1], times) == pytest.approx(time, rel=0.02)


@pytest.mark.parametrize("power, exponent", [(0, 1), (1, 0), (-1, 2)])
def test_dsm_homework_6_5_limit_and_slowest_axis(dsm_homework, power, exponent):
    """M = C^power is stable below 4/eig_max; the axes differ by cond(C)^exponent, 2 for 003's."""
    C = torch.tensor([[1.0, 0.3], [0.3, 0.2]]).double()
    M = torch.linalg.matrix_power(C, power)
    eig, axes = torch.linalg.eig(M @ C.inverse())
    eig, axes = eig.real, axes.real.T

    def score(x):
        return -x @ C.inverse()

    def factors(step, count):
        """By which factor chains with the same noise that start apart along each axis differ."""
        ends = []
        for start in (axes, 0 * axes):
            torch.manual_seed(1)
            ends.append(dsm_homework.preconditioned_langevin(score, start, count, step, M))
        return (ends[0] - ends[1]).norm(dim=1)

    limit = 4 / eig.max().item()
    assert factors(0.97 * limit, 100).max() < 0.5
    assert factors(1.03 * limit, 100).max() > 100
    slowest = factors(limit / 2, 1).max().item()
    assert slowest == pytest.approx(1 - 1 / torch.linalg.cond(C).item() ** exponent, abs=1e-9)


def test_theory_6_6_denoised_points_are_too_narrow():
    """Three points: D = x + sigma^2 s has their variance minus the mean of Var(x | noisy_x)."""
    q = mixture_1d([1.0, 1.0, 1.0], THREE_POINTS, 1.0).log_prob(LINE).exp()
    posterior = (-(LINE - THREE_POINTS.T).square() / 2).softmax(1)
    inner = posterior @ THREE_POINTS**2 - (posterior @ THREE_POINTS) ** 2
    denoised = LINE + three_score(LINE, 1.0)
    weight = q[:, None] * 18 / 36000
    mean = (weight * denoised).sum()
    variance = (weight * (denoised - mean) ** 2).sum()
    close(variance, THREE_POINTS.var(correction=0) - (weight * inner).sum(), atol=1e-8, rtol=0)



def rows(printed, name):
    """The numbers of the printed rows that begin with `name`, without the name."""
    lines = [line[len(name):] for line in printed.splitlines() if line.startswith(name)]
    return [[float(word) for word in line.split()] for line in lines]


def test_dsm_homework_6_5_printed_tables(dsm_homework):
    """Along the long axis: the recursion from variance 1/3; across: the formula; MALA: right."""
    expected = {"Langevin  ": [(0.01, 1, 0.01, 1), (0.05, 1, 0.05, 1)],
                "temperature 1/2": [(0.01, 0.5, 0.01, 1)],
                "M = covariance": [(0.5, 1, 0.5, 1)],
                "M = its inverse (003)": [(0.0002, 1, 0.0002, 1)]}
    for name, settings in expected.items():
        for row, (eta, temperature, step, V) in zip(rows(dsm_homework.printed, name), settings):
            variance = 1 / 3
            for _ in range(100):
                variance = (1 - step / (2 * V)) ** 2 * variance + step * temperature
            assert row[0] == pytest.approx(eta) and row[2] == pytest.approx(variance, rel=0.05)
            assert row[1] in [0.125, 0.625]
            assert row[4] == pytest.approx(temperature / (1 - row[1]), abs=1e-3)
            error = (row[3] / row[4] - 1) / math.sqrt(2 / 20000)
            assert row[5] == pytest.approx(error, abs=0.3) and abs(row[5]) < 4
        assert len(rows(dsm_homework.printed, name)) == len(settings)
    mala = rows(dsm_homework.printed, "MALA  ")
    assert [row[0] for row in mala] == [0.01, 0.05]
    last = rows(dsm_homework.printed, "MALA, M = covariance")[0]
    assert last[0] == 2.5 and last[2] == pytest.approx(1, abs=0.05)
    for row, accepted in zip([*mala, last], [0.97, 0.71, 0.56]):
        assert row[3] == pytest.approx(1, abs=0.05)
        assert row[4] == pytest.approx(accepted, abs=0.02)
    start = dsm_homework.start
    assert -1 <= start.min() < -0.99 and 0.99 < start.max() <= 1
    table = dsm_homework.printed.partition("MALA on N(0, I)")[2]
    assert len(rows(table, 17 * " ")) == 6
    for d, eta, measured, formula in rows(table, 17 * " "):
        exact = 2 * scipy.stats.norm.cdf(-math.sqrt(d * eta**3) / 8)
        assert formula == pytest.approx(exact, abs=1e-3)
        assert measured == pytest.approx(formula, abs=0.02)


# %% implicit_sm.py: data and its exact score
@pytest.fixture(scope="session")
def implicit_sm():
    return pasted_script("implicit_sm")


def mixture(means, weights, stds):
    """A mixture of round Gaussians as a torch distribution."""
    means, weights, stds = [torch.as_tensor(value).double() for value in (means, weights, stds)]
    covs = stds[:, None, None] ** 2 * torch.eye(means.shape[1]).double()
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covs))


def autograd_score(log_prob, x):
    """grad log p at x (B, d) by autograd."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(log_prob(x).sum(), x)[0]


def swirl(x):
    """A smooth field (B, d) -> (B, d) that is no gradient; each coordinate depends on all of x."""
    mix = torch.linspace(-1, 1, x.shape[1] ** 2).to(x).view(x.shape[1], -1)
    return (x @ mix).sin() + x.square().sum(1, keepdim=True) * x.flip(1)


def jacobians(field, x):
    """(B, d, d) by the plain loop over points and coordinates."""
    def at_point(y):
        return field(y[None])[0]
    return torch.stack([torch.autograd.functional.jacobian(at_point, point) for point in x])


LAW_1D = mixture([[-1.2], [1.0]], [0.4, 0.6], [0.35, 0.5])
LAW_2D = mixture([[-2.0, 0.0], [2.0, 0.0]], [0.5, 0.5], [1.0, 1.0])


@pytest.mark.parametrize("name, law", [("law_1d", LAW_1D), ("law_2d", LAW_2D)])
def test_implicit_sm_mixtures(implicit_sm, name, law):
    """Density, score and draws of both laws are those of torch.distributions, near and far."""
    ours = getattr(implicit_sm, name)
    x = torch.cat([law.sample((30,)), 30 * normal(10, law.mean.shape[0])])
    close(ours.density(x), law.log_prob(x).exp(), rtol=1e-6, atol=1e-12)
    close(ours.score(x), autograd_score(law.log_prob, x), rtol=1e-5, atol=1e-5)
    draws = ours.sample(20000).double()
    within(draws, law.mean)
    within((draws - law.mean).square(), law.variance)
    within((draws - law.mean) ** 3, (law.sample((200000,)) - law.mean).pow(3).mean(0), se=5)


def test_implicit_sm_gmm_score_as_in_003(implicit_sm):
    """003's call, with lists and one point; far from all means the score is not swallowed."""
    means = [torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 0.0])]
    far = implicit_sm.gmm_score(torch.tensor([10.0, 0.0]), means, [0.5, 0.5])
    torch.testing.assert_close(far, torch.tensor([-8.0, 0.0]))
    x = normal(5, 2)
    unequal = implicit_sm.gmm_score(x, torch.stack(means), [0.2, 0.8], [0.5, 2.0])
    law = mixture(torch.stack(means), [0.2, 0.8], [0.5, 2.0])
    close(unequal, autograd_score(law.log_prob, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("x", [torch.zeros(5, 3), torch.zeros(3), torch.zeros(5, 1)])
def test_implicit_sm_point_of_wrong_dimension(implicit_sm, x):
    """An error, for the score and for the analysis, instead of a broadcast."""
    with pytest.raises(ValueError, match="dimension"):
        implicit_sm.exact_score(x)
    with pytest.raises(ValueError, match="dimension"):
        implicit_sm.analyze_score_geometry(implicit_sm.exact_score, x)


def test_implicit_sm_relu_is_warned_of(capsys):
    """--activation relu is allowed, and the warning says why it is no good; nobody else sees it."""
    run("implicit_sm", "--activation relu", until="Data")
    assert "gradient of the loss is wrong" in capsys.readouterr().out
    run("implicit_sm", until="Data")
    assert capsys.readouterr().out == ""


# %% implicit_sm.py: the identity
GRID = np.linspace(-12, 12, 240001)   # the trapezoidal rule on it is exact to 1e-9


def expectation(f):
    """E f(x) under the 1-D law in numpy alone: f takes x and the score p'/p there."""
    parts = []
    for mean, weight, std in ((-1.2, 0.4, 0.35), (1.0, 0.6, 0.5)):
        parts.append(weight * scipy.stats.norm.pdf(GRID, mean, std))
    p = sum(parts)
    slope = parts[0] * (-1.2 - GRID) / 0.35**2 + parts[1] * (1.0 - GRID) / 0.5**2
    return np.trapezoid(p * f(GRID, slope / np.maximum(p, 1e-300)), GRID)


IDENTITY = [   # s, the same in numpy, its slope
    (torch.tanh, np.tanh, "1 / np.cosh(x)**2"),
    (torch.sinh, np.sinh, "np.cosh(x)"),
    (torch.square, np.square, "2 * x"),
]


@pytest.mark.parametrize("torch_s, s, slope", IDENTITY)
def test_implicit_sm_3_1_identity(implicit_sm, torch_s, s, slope):
    """explicit = implicit + I/2 to 1e-8; both sides of the script are another quadrature's."""
    def half_square(x, score):
        return 0.5 * score**2

    def squared_error(x, score):
        return 0.5 * (s(x) - score) ** 2

    def implicit(x, score):
        return 0.5 * s(x) ** 2 + eval(slope, {"np": np, "x": x})

    x = torch.linspace(-9, 9, 18001, dtype=torch.float64, requires_grad=True)
    p, s_exact = LAW_1D.log_prob(x[:, None]).exp(), autograd_score(LAW_1D.log_prob, x[:, None])
    sides = implicit_sm.both_sides(torch_s(x), x, p, s_exact[:, 0])
    assert sides[0] == pytest.approx(expectation(squared_error), abs=1e-6)
    assert sides[1] == pytest.approx(expectation(implicit), abs=1e-6)
    half_fisher = expectation(half_square)
    expected = expectation(implicit) + half_fisher
    assert expectation(squared_error) == pytest.approx(expected, abs=1e-8)
    assert implicit_sm.half_fisher_1d == pytest.approx(half_fisher, abs=1e-6)
    assert implicit_sm.largest_difference < 1e-8


def test_implicit_sm_3_1_kink(implicit_sm):
    """|x - 0.3|, with a kink, satisfies it too."""
    def explicit(x, score):
        return 0.5 * (abs(x - 0.3) - score) ** 2

    def implicit_and_fisher(x, score):
        return 0.5 * (x - 0.3) ** 2 + np.sign((x - 0.3).round(9)) + 0.5 * score**2

    assert expectation(explicit) == pytest.approx(expectation(implicit_and_fisher), abs=1e-8)


def rows_between(printed, first, last):
    """The numbers of the lines between those that begin with `first` and with `last`."""
    text = printed.partition("\n" + first)[2].partition("\n" + last)[0]
    return [line.split() for line in text.splitlines()[1:] if line]


def test_implicit_sm_3_3_printed_identity(implicit_sm):
    """explicit - implicit is I/2 in each row, of the s that is named; 003's constant is none."""
    table = rows_between("\n" + implicit_sm.printed, "s(x)      implicit     explicit", "Exp(1)")
    assert len(table) == 4
    constants = []
    for row in table:
        implicit, explicit, shifted, gap, constant = [float(word) for word in row[-5:]]
        assert shifted == pytest.approx(implicit + 2.54988, abs=2e-5) == explicit and gap < 1e-8
        assert constant == pytest.approx(2 * explicit - implicit, abs=2e-5)
        constants.append(constant)
    assert np.ptp(constants) > 1
    assert float(table[3][-4]) == 0                      # of the exact score

    def square(x, score):
        return 0.5 * x**4 + 2 * x

    def wave(x, score):
        return 0.5 * np.sin(3 * x) ** 2 + 3 * np.cos(3 * x)

    assert float(table[1][-5]) == pytest.approx(expectation(square), abs=2e-5)
    assert float(table[2][-5]) == pytest.approx(expectation(wave), abs=2e-5)


def test_implicit_sm_3_5_exponential_law(implicit_sm):
    """For Exp(1) and s = -c: explicit (1 - c)^2/2, implicit c^2/2, difference -c."""
    text = implicit_sm.printed.partition("Exp(1), I/2 = 0.5\n")[2].splitlines()[1:4]
    for c, line in enumerate(text):
        values = [float(word) for word in line.split()]
        expected = [-c, c**2 / 2, (1 - c) ** 2 / 2, c**2 / 2 + 0.5, -c, -c]
        assert values == pytest.approx(expected, abs=2e-5)


# %% implicit_sm.py: losses
def implicit_losses(script):
    """The three losses of the script, by name."""
    return {"exact": script.compute_score_matching_loss,
            "hutchinson": partial(script.compute_score_matching_loss_hutchinson, n_hutchinson=2),
            "denoising": script.implicit_loss_by_denoising}


@pytest.mark.parametrize("name", ["compute_score_matching_loss",
                                  "compute_score_matching_loss_hutchinson"])
def test_implicit_sm_loss_stands_alone(name):
    """The function's text alone works, with torch imported and a network of one's own."""
    text = cells("implicit_sm").partition(f"\ndef {name}(")[2].partition("\n\n\n")[0]
    names = {"torch": torch}
    exec(f"@torch.enable_grad()\ndef {name}({text}", names)
    loss = names[name](torch.nn.Linear(2, 2), torch.randn(6, 2))
    assert loss.shape == () and loss.requires_grad


@pytest.mark.parametrize("d", [1, 2, 5])
def test_implicit_sm_3_4_exact_trace(implicit_sm, d):
    """The mean of |s|^2/2 + tr ds/dx, with the trace of two other ways; under no_grad, too."""
    x = normal(7, d)

    def at_point(y):
        return swirl(y[None])[0]

    for J in (torch.vmap(torch.func.jacrev(at_point))(x), jacobians(swirl, x)):
        traces = torch.stack([torch.trace(j) for j in J])
        expected = (0.5 * swirl(x).square().sum(1) + traces).mean()
        close(implicit_sm.compute_score_matching_loss(swirl, x), expected)
        with torch.no_grad():
            close(implicit_sm.compute_score_matching_loss(swirl, x), expected)


@pytest.mark.parametrize("d, n_hutchinson", [(1, 1), (2, 1), (2, 3), (4, 1)])
def test_implicit_sm_3_4_hutchinson(implicit_sm, d, n_hutchinson):
    """Its mean is the exact loss; its variance 2(|A|^2 - sum a_ii^2)/m with A = sym ds/dx."""
    x = normal(1, d)
    draws = []
    for _ in range(500):
        with torch.no_grad():
            draws.append(implicit_sm.compute_score_matching_loss_hutchinson(swirl, x, n_hutchinson))
    draws, exact = torch.stack(draws), implicit_sm.compute_score_matching_loss(swirl, x)
    A = jacobians(swirl, x)[0]
    A = (A + A.T) / 2
    if d == 1:
        close(draws, exact.expand(500))
    else:
        within(draws, exact)
        variance = 2 * (A.square().sum() - A.diagonal().square().sum()) / n_hutchinson
        within((draws - draws.mean()).square(), variance)


@pytest.mark.parametrize("name, a, sign", [
    ("exact", 0.9, -1), ("exact", 1.1, 1), ("hutchinson", 0.9, -1), ("hutchinson", 1.1, 1),
    ("denoising", 0.7, -1), ("denoising", 0.9, 1)])
def test_implicit_sm_sign_of_the_gradient(implicit_sm, name, a, sign):
    """On N(0, I) the loss of s = -a x falls up to a = 1; with noise of 1/2, up to 0.8."""
    a = torch.tensor(a, dtype=torch.float64, requires_grad=True)

    def model(x):
        return -a * x

    implicit_losses(implicit_sm)[name](model, normal(20000, 2)).backward()
    assert sign * a.grad > 0


@pytest.mark.parametrize("name", ["exact", "hutchinson", "denoising"])
def test_implicit_sm_losses_leave_the_data_alone(implicit_sm, name):
    """No loss and no analysis changes the caller's tensor or leaves requires_grad on it."""
    x = normal(5, 2)
    before = x.clone()
    implicit_losses(implicit_sm)[name](implicit_sm.exact_score, x)
    implicit_sm.analyze_score_geometry(implicit_sm.exact_score, x)
    assert torch.equal(x, before) and not x.requires_grad and x.grad is None
    assert not implicit_sm.x_data.requires_grad and not implicit_sm.x_data_1d.requires_grad


@pytest.mark.parametrize("name", ["exact", "hutchinson"])
def test_implicit_sm_losses_reach_the_parameters(implicit_sm, name):
    """The gradient in the parameters is that of the loss written with autograd.grad."""
    network = torch.nn.Sequential(torch.nn.Linear(1, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    network = network.double()
    x = normal(6, 1).requires_grad_()                    # in 1-D Hutchinson's trace is exact
    s = network(x)
    slope, = torch.autograd.grad(s.sum(), x, create_graph=True)
    theirs = (0.5 * s.square().sum(1) + slope[:, 0]).mean()
    ours = implicit_losses(implicit_sm)[name](network, x.detach())
    parameters = list(network.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters, materialize_grads=True),
                    torch.autograd.grad(theirs, parameters, materialize_grads=True)):
        close(a, b)


def test_implicit_sm_3_8_denoising_loss(implicit_sm):
    """For s = -a x on N(0, I) it is the implicit loss under N(0, 1 + sigma^2)."""
    a, sigma = 0.7, 0.5

    def model(x):
        return -a * x

    x = normal(40000, 3, seed=4)
    loss = implicit_sm.implicit_loss_by_denoising(model, x).item()
    assert loss == pytest.approx(3 * (0.5 * a**2 * (1 + sigma**2) - a), abs=0.03)


# %% implicit_sm.py: training and sampling
def test_implicit_sm_untrained_network(implicit_sm):
    """Before training, s = -(x - mean)/std^2 of the data; layers, widths and units as asked for."""
    x = (3 + normal(200, 2) * torch.tensor([2.0, 0.5]).double()).float()
    network = implicit_sm.new_network(x, "tanh")
    torch.testing.assert_close(network(x), -(x - x.mean(0)) / x.var(0))
    shapes = [tuple(layer.weight.shape) for layer in network.net[::2]]
    assert shapes == [(16, 2), (16, 16), (2, 16)]
    assert [type(layer) for layer in network.net[1::2]] == 2 * [torch.nn.Tanh]
    torch.nn.init.ones_(network.net[-1].bias)            # what the network adds, over std
    torch.testing.assert_close(network(x), -(x - x.mean(0)) / x.var(0) + 1 / x.std(0))


@pytest.fixture(scope="session")
def trained():
    """A run long enough to learn something."""
    flags = "--n 20000 --n_few 30 --batch 256 --steps 150 --hidden 32 --n_samples 500"
    return run_whole("implicit_sm", flags)


def relative_error_under(law, field, n=20000):
    """sqrt(E|s - s*|^2 / E|s*|^2) of a float32 field under a torch distribution."""
    x = law.sample((n,))
    exact = autograd_score(law.log_prob, x)
    return ((field(x.float()) - exact).norm() / exact.norm()).item()


def test_implicit_sm_training_learns(trained):
    """150 steps learn the scores roughly, and the reported errors are those under the laws."""
    measured = [trained.measured_1d, trained.measured_2d, trained.measured_hutchinson]
    models = [trained.model_1d, trained.model, trained.model_hutchinson]
    for reported, model, law, most in zip(measured, models, [LAW_1D, LAW_2D, LAW_2D],
                                          [0.4, 0.25, 0.25]):
        error = relative_error_under(law, model)
        assert error < most and reported["error"] == pytest.approx(error, rel=0.1)
        x = law.sample((20000,)).float()
        loss = trained.compute_score_matching_loss(model, x).item()
        assert reported["fresh"] == pytest.approx(loss, abs=0.15)
        explicit = 0.5 * error**2 * autograd_score(law.log_prob, x.double()).square().sum(1).mean()
        assert reported["fresh"] - reported["fresh_exact"] == pytest.approx(explicit, rel=0.5)
    assert trained.history_1d["step"][-1] == 150 and len(trained.history_1d["loss"]) == 22
    assert trained.history_2d["fresh_loss"][-1] == pytest.approx(measured[1]["fresh"], abs=0.1)
    assert trained.half_fisher_2d == pytest.approx(0.8628, abs=2e-4)
    assert all(not parameter.requires_grad for parameter in trained.model.parameters())


def test_implicit_sm_table_of_losses_has_those_of_model_and_exact_score(implicit_sm):
    """For N(0, 1) and s = -2x: E = 2 x^2 - 2 at each set, the exact score's x^2/2 - 1, error 1."""
    law = implicit_sm.Mixture([[0.0]], [1.0], [1.0])
    x_train, x_fresh = normal(50, 1).float(), normal(70, 1, seed=1).float()

    def twice(x):
        return -2 * x

    measured = implicit_sm.measure(twice, law, x_train, x_fresh)
    for name, x in [("train", x_train), ("fresh", x_fresh)]:
        square = x.square().mean().item()
        assert measured[name] == pytest.approx(2 * square - 2, rel=1e-5)
        assert measured[name + "_exact"] == pytest.approx(square / 2 - 1, rel=1e-5)
    assert measured["error"] == pytest.approx(1, rel=1e-5)

    def another_loss(model, x):
        return model(x).mean()

    measured = implicit_sm.measure(twice, law, x_train, x_fresh, another_loss)
    assert measured["train"] == pytest.approx(-2 * x_train.mean().item(), rel=1e-5)
    assert measured["train_exact"] == pytest.approx(-x_train.mean().item(), rel=1e-5)
    assert measured["fresh"] == pytest.approx(2 * square - 2, rel=1e-5)


def test_implicit_sm_printed_table_tells_learning_by_heart(trained):
    """30 points: far below the exact score's loss there, far above it at fresh points."""
    table = rows_between(trained.printed, "30 points in 1-D", "(The second row")
    by_heart, denoised = [[float(cell) for cell in row[-5:]] for row in table]
    assert by_heart[0] < by_heart[1] - 0.5 and by_heart[2] > by_heart[3] + 0.5
    assert denoised[0] == pytest.approx(denoised[1], abs=0.3)
    assert denoised[2] == pytest.approx(denoised[3], abs=0.3)


@pytest.mark.parametrize("d", [1, 3])
def test_implicit_sm_3_7_no_least_value(implicit_sm, d):
    """s = -a (x - nearest point) has the loss -a d on the points, for every a."""
    points = normal(20, d)
    for a in (1.0, 1000.0):
        def model(x):
            nearest = torch.cdist(x, points).argmin(dim=1)
            return -a * (x - points[nearest])
        loss = implicit_sm.compute_score_matching_loss(model, points)
        assert loss.item() == pytest.approx(-a * d)


def test_implicit_sm_3_7_few_points(trained):
    """The implicit loss falls below the least value, rises on fresh points; denoising is sound."""
    assert trained.history_few["loss"][-1] < -2.55 < -2 < trained.history_few["fresh_loss"][-1]
    x = trained.x_few
    few = trained.measure(trained.model_few, trained.law_1d, x, trained.x_fresh_1d)
    noisy = trained.measure(trained.model_denoising, trained.noisy_law, x, trained.x_fresh_noisy)
    assert few["error"] > 0.6 > 0.5 > noisy["error"]
    assert noisy["fresh_exact"] == pytest.approx(-0.691, abs=0.05)
    law = mixture([[-1.2], [1.0]], [0.4, 0.6], [(0.35**2 + 0.25) ** 0.5, 0.5**0.5])
    x = trained.x_fresh_noisy.double()
    within(x, law.mean)
    within((x - law.mean).square(), law.variance)
    exact = autograd_score(law.log_prob, x).float()
    torch.testing.assert_close(trained.noisy_law.score(x.float()), exact, rtol=1e-3, atol=1e-3)


def test_implicit_sm_3_8_bridge(trained):
    """Both sides of the bridge, printed with their difference, agree within 4 standard errors."""
    table = rows_between(trained.printed, "s                       by derivatives", "\n")
    assert len(table) == 2
    for row in table:
        derivatives, denoising, difference, standard_error = [float(word) for word in row[-4:]]
        assert difference == pytest.approx(derivatives - denoising, abs=2e-3)
        assert abs(difference) < 4 * standard_error < 0.3


@pytest.mark.parametrize("unit, biased", [("relu", True), ("softplus", False), ("silu", False)])
def test_implicit_sm_3_6_gradient_of_the_trace(implicit_sm, unit, biased):
    """With relu autograd misses -p(theta) = -0.381 of -0.648, with smooth units nothing."""
    act = getattr(torch.nn.functional, unit)
    autograd, difference = implicit_sm.unit_slopes(act, 400_000)
    missing = -scipy.stats.norm.pdf(0.3) if biased else 0.0
    assert difference - autograd == pytest.approx(missing, abs=0.02)
    if biased:
        assert difference == pytest.approx(-0.648, abs=0.02)


def test_implicit_sm_relu_does_not_learn(trained):
    """The printed error of a ReLU network is far above that of the smooth one."""
    table = rows_between(trained.printed, "unit    by autograd", "\n")
    errors = {row[0]: float(row[-1]) for row in table}
    assert errors["silu"] < 0.4 and errors["relu"] > 0.6


def test_implicit_sm_model_file(implicit_sm):
    """model.pt holds the network behind score."""
    saved = torch.load(Path(implicit_sm.args.outdir) / "model.pt", weights_only=True)
    network = implicit_sm.new_network(torch.zeros(2, 2))
    network.load_state_dict(saved)
    x = implicit_sm.x_data
    assert torch.equal(network(x), implicit_sm.score(x))


def test_implicit_sm_divergence(implicit_sm):
    """A loss that is no longer finite stops the run in one line that names the step."""
    def infinite(model, x):
        return model(x).mean() * math.inf

    x = implicit_sm.x_data
    with pytest.raises(SystemExit, match=r"^the loss is .* at step 1: .*--lr below 0.02"):
        implicit_sm.train(implicit_sm.new_network(x), infinite, x, x)


def test_implicit_sm_learning_rate_rises_and_falls(implicit_sm):
    """Up for 15 % of the steps, then down to next to nothing."""
    x = implicit_sm.x_data
    with kept_schedulers() as made:
        loss = implicit_sm.compute_score_matching_loss
        implicit_sm.train(implicit_sm.new_network(x), loss, x, x)
    assert made[0]._schedule_phases[0]["end_step"] == pytest.approx(0.15 * 20 - 1)
    assert made[0].get_last_lr()[0] < 0.01 * implicit_sm.args.lr


def test_implicit_sm_chains_start_from_one_gaussian_as_wide_as_the_data():
    script = run("implicit_sm", "--K 1 --eta 1e-6 --n_samples 4000", until="Check")
    scaled = (script.samples - script.x_data.mean(0)) / script.x_data.std(0)
    for i in range(2):
        assert scipy.stats.kstest(scaled[:, i], scipy.stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_implicit_sm_6_2_langevin(implicit_sm, eta):
    """For s = -x it forgets its start and settles at the variance 1/(1 - eta/4)."""
    x = implicit_sm.langevin_dynamics(torch.neg, 5 + normal(20000, 1, seed=3), 150, eta)
    within(x.square()[:, 0], 1 / (1 - eta / 4))
    x = normal(4, 2, seed=3)
    torch.manual_seed(1)
    step = implicit_sm.langevin_dynamics(torch.neg, x, 1, 0.3)
    close(step, 0.85 * x + math.sqrt(0.3) * normal(4, 2, seed=1))


def test_implicit_sm_figures(trained):
    """SW2 and its floor are those of the four sets of samples."""
    assert len(trained.sample_sets) == 4 and torch.equal(trained.samples, trained.sample_sets[3])
    projected = [trained.sorted_projections(x) for x in trained.sample_sets]
    fresh = [trained.sorted_projections(LAW_2D.sample((500,)).float()) for _ in range(8)]
    perfect = [trained.sorted_projections(LAW_2D.sample((500,)).float()) for _ in range(8)]
    assert trained.sw2 == pytest.approx(trained.mean_sw2(projected, fresh), rel=0.25)
    assert trained.sw2_floor == pytest.approx(trained.mean_sw2(perfect, fresh), rel=0.25)


# %% implicit_sm.py: geometry
MODE = 1.9986513   # x = 2 tanh 2x
TABLE = [   # theory.md 9: point, |score|, eigenvalues, kind
    (-2.0, 0.0013414, (-1, -0.9946362), "not critical"),
    (-MODE, 0, (-1, -0.9946072), "peak"),
    (MODE, 0, (-1, -0.9946072), "peak"),
    (0.0, 0, (-1, 3), "saddle"),
    (0.4406868, 0.97353, (-1, 1), "not critical"),
    (-0.4406868, 0.97353, (-1, 1), "not critical")]


@pytest.mark.parametrize("x1, size, eigenvalues, kind", TABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_implicit_sm_9_2_geometry_table(implicit_sm, x1, size, eigenvalues, kind, dtype):
    """The two-mode example in exact numbers, one point at a time as in 003."""
    x = torch.tensor([x1, 0.0], dtype=dtype)
    g = implicit_sm.analyze_score_geometry(implicit_sm.exact_score, x)
    slope = 4 / math.cosh(2 * x1) ** 2 - 1               # s = -x + m tanh(m x)
    wanted = torch.diag(torch.tensor([slope, -1.0], dtype=dtype))
    assert g["kind"] == kind
    assert g["score"].norm().item() == pytest.approx(size, abs=1e-5)
    assert g["eigenvalues"].tolist() == pytest.approx(sorted(eigenvalues), abs=1e-5)
    close(g["hessian"], wanted, rtol=1e-5, atol=1e-5)
    close(g["divergence"], wanted.trace(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("matrix, kind", [
    ([[-1, 0], [0, -1]], "peak"), ([[1, 0], [0, 1]], "valley"), ([[1, 0], [0, -1]], "saddle"),
    ([[-1, 0], [0, 0]], "degenerate"), ([[-1, 5], [-5, -1]], "peak"),
    ([[-1, 2], [0, -1]], "peak")])
def test_implicit_sm_9_1_kinds(implicit_sm, matrix, kind):
    """Linear fields at 0, spirals and asymmetric ones too: the Jacobian is not symmetrised."""
    J = torch.tensor(matrix, dtype=torch.float32)

    def field(x):
        return x @ J.T

    g = implicit_sm.analyze_score_geometry(field, torch.zeros(2))
    assert g["kind"] == kind
    torch.testing.assert_close(g["hessian"], J)
    elsewhere = implicit_sm.analyze_score_geometry(field, torch.ones(2))
    assert elsewhere["kind"] == "not critical"


@pytest.mark.parametrize("size, kind", [(0.9e-4, "peak"), (1.1e-4, "not critical")])
def test_implicit_sm_9_1_tolerance(implicit_sm, size, kind):
    """A score below 1e-4 counts as 0, and so does an eigenvalue."""
    minus = torch.tensor([-1.0, -1.0])
    assert implicit_sm.kind_of_point(torch.tensor([size, 0.0]), minus) == kind
    flat = implicit_sm.kind_of_point(torch.zeros(2), torch.tensor([-size, -1.0]))
    assert flat == ("degenerate" if kind == "peak" else "peak")


def test_implicit_sm_9_2_printed_points(implicit_sm):
    """003's "peak" and a point of divergence 0, both not critical; an exact score is a gradient."""
    table = rows_between(implicit_sm.printed, "field     point", "\n")
    assert table[0][1:3] == ["(-2.00000,", "0.00000)"] and table[0][-2:] == ["not", "critical"]
    assert table[1][1:3] == ["(", "0.44069,"] and table[1][-2:] == ["not", "critical"]
    assert float(table[1][-3]) == pytest.approx(0, abs=1e-4)
    rest = rows_between(implicit_sm.printed, "field     |J - J^T|", "\n")
    assert float(rest[0][1]) < 1e-4 and float(rest[0][2]) < 1e-3
    J = implicit_sm.geometries["learned"]["hessian"]
    asymmetry = (J - J.transpose(1, 2)).square().sum().sqrt() / J.square().sum().sqrt()
    assert rest[1][1] == f"{asymmetry:.0e}"


def test_implicit_sm_field_of_wrong_shape(implicit_sm):
    def field(x):
        return x[:, :1]

    with pytest.raises(ValueError, match=r"\(5, 1\)"):
        implicit_sm.analyze_score_geometry(field, torch.zeros(5, 2))


def test_implicit_sm_analysis_of_many_points(implicit_sm):
    """A batch gives each point its own answer: Jacobians of the loop, divergence their trace."""
    x = normal(6, 3)
    g, J = implicit_sm.analyze_score_geometry(swirl, x), jacobians(swirl, x)
    close(g["hessian"], J)
    close(g["score"], swirl(x))
    close(g["divergence"], torch.stack([torch.trace(j) for j in J]))
    for ours, j in zip(g["eigenvalues"], J):
        theirs = torch.linalg.eigvals(j)
        close(torch.view_as_real(ours.to(torch.complex128)).sort(0).values,
              torch.view_as_real(theirs).sort(0).values, rtol=1e-8, atol=1e-8)
    assert len(g["kind"]) == 6 and (g["eigenvalues"].real.diff(dim=1) >= 0).all()


def test_implicit_sm_9_2_critical_points(implicit_sm):
    """Newton finds both modes and the saddle, each once, and nothing where nothing is."""
    assert implicit_sm.geometries["exact"]["kind"] == ["peak", "saddle", "peak"]
    wanted = torch.tensor([[-MODE, 0], [0, 0], [MODE, 0]])
    torch.testing.assert_close(implicit_sm.critical["exact"], wanted, rtol=0, atol=1e-5)

    def nowhere(x):
        return 1 + x**2

    assert implicit_sm.find_critical_points(nowhere, implicit_sm.grid(9, 7)).shape == (0, 2)


def test_implicit_sm_9_3_level_set(implicit_sm):
    """The curve lies on one level of log p through (0, 1); the exact score is orthogonal to it."""
    points = torch.cat([implicit_sm.level_set(), torch.tensor([[0.0, 1.0]])]).double()
    level = LAW_2D.log_prob(points)
    close(level, level[-1:].expand(len(level)), rtol=0, atol=1e-5)
    assert implicit_sm.level_set_cosine(implicit_sm.exact_score) < 1e-3

    def turned(x):
        s = implicit_sm.exact_score(x)
        return torch.stack([-s[:, 1], s[:, 0]], dim=1)

    assert implicit_sm.level_set_cosine(turned) == pytest.approx(1, abs=1e-3)


def test_implicit_sm_9_3_moments_of_the_score(implicit_sm):
    """E s = 0, E s x^T = -I and I = diag(0.7256, 1), over draws of torch.distributions."""
    x = LAW_2D.sample((40000,))
    s = implicit_sm.exact_score(x)
    within(s, torch.zeros(2).double())
    within(s[:, :, None] * x[:, None], -torch.eye(2).double())
    fisher = torch.diag(torch.tensor([0.7256104, 1.0]).double())
    within(s[:, :, None] * s[:, None], fisher)


def test_implicit_sm_9_3_printed_moments(implicit_sm):
    """Means over the data, what they should be, and by how many standard errors they are off."""
    table = rows_between(implicit_sm.printed, "means over the 300 data points", "\n")
    s, x = implicit_sm.exact_score(implicit_sm.x_data), implicit_sm.x_data
    values = [s[:, 0], s[:, 0] * x[:, 0], s[:, 0] * x[:, 1], s[:, 0] ** 2, s[:, 1] ** 2]
    for row, value, exact in zip(table, values, [0, -1, 0, 0.7256, 1], strict=True):
        mean, wanted, off = [float(word) for word in row[-3:]]
        error = value.std().item() / math.sqrt(300)
        assert mean == pytest.approx(value.mean().item(), abs=1e-4) and wanted == exact
        assert off == pytest.approx((value.mean().item() - exact) / error, abs=0.06)
        assert abs(off) < 4


# %% implicit_sm.py: other noise
SCIPY = {"Gaussian": scipy.stats.norm, "logistic": scipy.stats.logistic,
         "Student-t": scipy.stats.t(5), "Laplace": scipy.stats.laplace,
         "triangular": scipy.stats.triang(0.5, loc=-1, scale=2),
         "uniform": scipy.stats.uniform(loc=-1, scale=2)}
FISHER = {"Gaussian": 1, "logistic": math.pi**2 / 9, "Student-t": 1.25, "Laplace": 2,
          "uniform": 0}


@pytest.mark.parametrize("name", SCIPY)
def test_implicit_sm_10_kernel(implicit_sm, name):
    """Each kernel is scipy's with the standard deviation sigma: density, target, draws."""
    kernel, law = implicit_sm.kernels[name], SCIPY[name]
    a, h = 0.5 / law.std(), 1e-6
    t = np.linspace(-0.95, 0.95, 40) * (1 if name in ("triangular", "uniform") else 6)
    ours = kernel.log_prob(torch.tensor(a * t)).numpy()
    assert ours + math.log(a) == pytest.approx(law.logpdf(t), abs=1e-5)
    target = implicit_sm.target_of(kernel, torch.tensor(a * t)).numpy()
    slope = (law.logpdf(t + h) - law.logpdf(t - h)) / (2 * h * a)
    assert target == pytest.approx(slope, abs=1e-4)
    draws = kernel.sample((5000,))
    assert scipy.stats.kstest(draws / a, law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", SCIPY)
def test_implicit_sm_10_1_mean_target(implicit_sm, name):
    """q's score by another quadrature; E[d log k | y] is the same, but for uniform noise."""
    a, noise = 0.5 / SCIPY[name].std(), SCIPY[name]
    y = torch.tensor([-2.0, -0.4, 0.3, 1.7])
    reach = implicit_sm.reaches.get(name, 10.0)
    q, exact, mean_target = implicit_sm.noisy_density(implicit_sm.kernels[name], reach, y)
    for i, at in enumerate(y.tolist()):
        k = noise.pdf((at - GRID) / a) / a

        def density(x, score):
            return k

        def derivative(x, score):
            return k * score

        wanted = expectation(derivative) / expectation(density)
        assert exact[i].item() == pytest.approx(wanted, rel=2e-3, abs=2e-3)
    wanted = np.zeros(4) if name == "uniform" else exact.numpy()
    assert mean_target.numpy() == pytest.approx(wanted, abs=1e-3)


def test_implicit_sm_10_2_score_under_uniform_noise(implicit_sm):
    """[p(y + a) - p(y - a)] / integral of p from y - a to y + a."""
    a, y = math.sqrt(3) * 0.5, torch.tensor([-2.0, -0.4, 0.3, 1.7])
    exact = implicit_sm.noisy_density(implicit_sm.kernels["uniform"], a, y)[1]

    def p(x):
        return LAW_1D.log_prob(x.double()[:, None]).exp()

    def P(x):
        below = scipy.stats.norm.cdf(x[:, None].numpy(), [-1.2, 1.0], [0.35, 0.5])
        return torch.tensor(below @ [0.4, 0.6])

    wanted = (p(y + a) - p(y - a)) / (P(y + a) - P(y - a))
    torch.testing.assert_close(exact.double(), wanted, rtol=2e-3, atol=2e-3)


def test_implicit_sm_10_2_logistic_noise_cannot_overflow(implicit_sm):
    """Far out log k is -|n|/scale - log(scale) and the target -sign(n)/scale, in float32, too."""
    n = torch.tensor([-50.0, 50.0])
    kernel = implicit_sm.Logistic(0.05)
    assert kernel.log_prob(n).tolist() == pytest.approx(2 * [-1000 - math.log(0.05)])
    assert implicit_sm.target_of(kernel, n).tolist() == pytest.approx([20, -20])


def test_implicit_sm_10_2_fisher_information(implicit_sm):
    """E target^2 sigma^2 as known; of triangular noise it grows with the number of cells."""
    for name, kernel in implicit_sm.kernels.items():
        reach = implicit_sm.reaches.get(name, 10.0)
        coarse, fine = [implicit_sm.fisher_information(kernel, reach, n) for n in (1000, 100_000)]
        if name == "triangular":                         # the sum ends at half a cell: ln(100) more
            assert fine - coarse == pytest.approx(2 * math.log(100) / (6 * 0.25), rel=0.01)
        else:
            assert fine * 0.25 == pytest.approx(FISHER[name], abs=1e-3)
            assert coarse == pytest.approx(fine, rel=1e-2)


def test_implicit_sm_10_kernel_denoising_loss(implicit_sm):
    """|s(x + n) - t|^2/2 and |s(x - n) + t|^2/2, summed over coordinates, else averaged."""
    x, n = normal(6, 2), normal(6, 2, seed=1)
    kernel = implicit_sm.kernels["logistic"]
    target = implicit_sm.target_of(kernel, n)
    expected = (swirl(x + n) - target).square().sum() + (swirl(x - n) + target).square().sum()
    with mock.patch.object(implicit_sm.Logistic, "sample", return_value=n):
        close(implicit_sm.kernel_denoising_loss(swirl, x, kernel), expected / 24)


def test_implicit_sm_10_2_table_of_kernels(trained):
    """Five kernels teach the score, uniform noise does not; the printed verdicts say so."""
    assert list(trained.kernel_errors) == list(SCIPY)
    table = {row[0]: row for row in rows_between(trained.printed, "kernel  ", "Uniform")}
    y = torch.linspace(-5, 5, 401)
    for name, error in trained.kernel_errors.items():
        assert error > 0.95 if name == "uniform" else error < 0.35
        information = float(table[name][1].replace("infinite", "inf"))
        assert information == pytest.approx(FISHER.get(name, math.inf), abs=1e-3)
        assert float(table[name][-1]) == pytest.approx(error, abs=6e-4)
        assert ("NO" in table[name][2]) == (name == "uniform")
        assert ("NO" in table[name][4]) == (name == "triangular") == (table[name][1] == "infinite")
    q, exact, _ = trained.noisy_density(trained.kernels["Laplace"], 10.0, y)
    learned = trained.learned_scores["Laplace"]
    error = ((q * (learned - exact) ** 2).mean() / (q * exact**2).mean()).sqrt().item()
    assert trained.kernel_errors["Laplace"] == pytest.approx(error, rel=1e-4)
    assert trained.error_under(q, 0 * exact, exact) == pytest.approx(1)


# %% sliced_sm.py: losses
SLICES = ["rademacher", "gaussian", "sphere"]
SLICED = ["sliced_score_matching_loss", "variance_reduced_loss", "finite_difference_loss"]
MIX_IN, MIX_OUT = normal(3, 4, seed=21), normal(4, 3, seed=22)


def curved(x):
    """A score in 3-D that is neither linear nor a gradient."""
    return torch.tanh(x @ MIX_IN) @ MIX_OUT - x


@pytest.fixture(scope="session")
def sliced_sm():
    return pasted_script("sliced_sm")


def dense_jacobians(score_fn, x):
    """ds/dx at each point, (B, d, d), by another route than the script's."""
    def at_point(y):
        return score_fn(y[None])[0]
    return torch.func.vmap(torch.func.jacfwd(at_point))(x)


def implicit(score_fn, x):
    """tr J + |s|^2/2, (B,)."""
    trace = dense_jacobians(score_fn, x).diagonal(dim1=1, dim2=2).sum(1)
    return trace + score_fn(x).square().sum(1) / 2


@pytest.mark.parametrize("slices", SLICES)
def test_sliced_sm_5_2_slices_have_their_second_moment(sliced_sm, slices):
    """E[v v'] = I, with lengths of the law, and every point has its own direction."""
    v = sliced_sm.draws[slices](torch.zeros(40000, 3, dtype=torch.float64))
    assert v.shape == (40000, 3)
    within(v[:, [0, 0, 1]] * v[:, [1, 2, 2]], 0.0)
    within(v, 0.0)
    if slices == "gaussian":
        within(v.square(), 1.0)
        within(v**4, 3.0)
    else:
        close(v.square().sum(1), torch.full((40000,), 3.0).double())
    assert (v[0] != v[1]).any()


def test_sliced_sm_loss_stands_alone():
    """The text of the function of 003's name works, with torch imported and a network."""
    text = cells("sliced_sm").partition("\ndef sliced_score_matching_loss(")[2]
    names = {"torch": torch}
    exec("def sliced_score_matching_loss(" + text.partition("\n\n\n")[0], names)
    loss = names["sliced_score_matching_loss"](torch.nn.Linear(2, 2), torch.randn(6, 2), n_slices=3)
    assert loss.shape == () and loss.requires_grad


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("name", SLICED)
def test_sliced_sm_5_1_loss_is_unbiased(sliced_sm, name, slices):
    """With all three laws of slices the mean over them is tr J + |s|^2/2 itself."""
    x = normal(1, 3).expand(40000, 3)
    settings = {"h": 1e-3} if name == "finite_difference_loss" else {}
    values = getattr(sliced_sm, name)(curved, x, n_slices=2, reduction="none",
                                      draw=sliced_sm.draws[slices], **settings)
    within(values.detach(), implicit(curved, x[:1])[0])


@pytest.mark.parametrize("name", SLICED + ["exact_trace_loss", "denoising_loss"])
def test_sliced_sm_reductions(sliced_sm, name):
    """The default is the mean of the values at the points."""
    x, loss = normal(50, 3, seed=8), getattr(sliced_sm, name)
    torch.manual_seed(5)
    values = loss(curved, x, reduction="none")
    torch.manual_seed(5)
    close(loss(curved, x).detach(), values.mean().detach())
    assert values.shape == (50,)


def test_sliced_sm_exact_trace(sliced_sm):
    """At once and in a loop; explicit differs from it by a term without s only."""
    x = normal(20000, 3)
    values = sliced_sm.exact_trace_loss(curved, x[:50], reduction="none").detach()
    close(values, implicit(curved, x[:50]))
    close(sliced_sm.exact_trace_loop_loss(curved, x[:50]).detach(), values.mean())
    explicit = sliced_sm.explicit_loss(curved, x, exact_score=torch.neg, reduction="none")
    within(explicit - implicit(curved, x), torch.tensor(3 / 2).double())     # x from N(0, I)
    mean = sliced_sm.explicit_loss(curved, x, exact_score=torch.neg)
    close(mean, explicit.mean())


def given_slices(v):
    """A draw that gives the slices v (m, B, d), one after the other."""
    rest = list(v)

    def draw(x):
        return rest.pop(0)

    return draw


@pytest.mark.parametrize("m", [1, 5])
def test_sliced_sm_5_3_losses_with_the_same_slices(sliced_sm, m):
    """ssm_vr is |s|^2/2 plus Hutchinson's estimate; ssm has the mean of (v's)^2/2 instead."""
    x = normal(7, 3)
    v, s = normal(m, 7, 3, seed=3), curved(x)
    hutchinson = torch.einsum("mbi,bij,mbj->mb", v, dense_jacobians(curved, x), v).mean(0)
    expected = {"variance_reduced_loss": s.square().sum(1) / 2,
                "sliced_score_matching_loss": (v * s).sum(-1).square().mean(0) / 2}
    for name, rest in expected.items():
        values = getattr(sliced_sm, name)(curved, x, m, given_slices(v), reduction="none")
        close(values.detach(), hutchinson + rest)


def test_sliced_sm_5_6_finite_differences_tend_to_ssm(sliced_sm):
    """fd_ssm - ssm = h^2 (g'''/6 + g g''/2) + O(h^4) with g(t) = v's(x + t v)."""
    x, v = normal(9, 3), normal(1, 9, 3, seed=4)
    ssm = sliced_sm.sliced_score_matching_loss(curved, x, 1, given_slices(v), reduction="none")

    def gap(h):
        fd = sliced_sm.finite_difference_loss(curved, x, 1, given_slices(v), h, reduction="none")
        return (fd - ssm).detach()

    def g(t, x, v):
        return (curved((x + t * v)[None])[0] * v).sum()

    derivatives_of_g = [g]
    for _ in range(3):
        derivatives_of_g.append(torch.func.grad(derivatives_of_g[-1]))
    g0, _, g2, g3 = [torch.func.vmap(partial(f, torch.tensor(0.0).double()))(x, v[0])
                     for f in derivatives_of_g]
    close(gap(1e-3) / 1e-6, g3 / 6 + g0 * g2 / 2, rtol=1e-3, atol=1e-3)
    assert (gap(0.02).norm() / gap(0.01).norm()).item() == pytest.approx(4, abs=0.05)


@pytest.mark.parametrize("name", ["explicit", "exact", "ssm", "ssm_vr", "fd_ssm", "dsm"])
@pytest.mark.parametrize("slices", SLICES)
def test_sliced_sm_sign_of_the_gradient(sliced_sm, name, slices):
    """On N(0, I) the loss of s = -a x falls up to a = 1 (dsm: 1/(1 + sigma^2)) and rises after."""
    draw = {"draw": sliced_sm.draws[slices], "n_slices": 3}
    settings = {"explicit": {"exact_score": torch.neg}, "exact": {}, "ssm": draw, "ssm_vr": draw,
                "fd_ssm": draw, "dsm": {"sigma": 1.0}}[name]
    loss = sliced_sm.losses_for(sliced_sm.laws["moons"])[name].func if name != "exact" else (
        sliced_sm.exact_trace_loss)
    x = normal(20000, 3, seed=9)
    for factor, sign in [(0.5, -1), (0.9, -1), (1.1, 1), (2, 1)]:
        best = 0.5 if name == "dsm" else 1.0
        a = torch.tensor(factor * best, requires_grad=True, dtype=torch.float64)

        def model(x):
            return -a * x

        loss(model, x, **settings).backward()
        assert sign * a.grad > 0


@pytest.mark.parametrize("d", [2, 10])
def test_sliced_sm_5_3_unit_slices_need_their_factor(sliced_sm, d):
    """On N(0, I) the best s = -a x has a = 1; with unit slices 1/d in ssm_vr, and 1 in ssm."""
    x = normal(4000, d, seed=9)
    x = x * (d / x.square().sum(1, keepdim=True)).sqrt()                     # E|x|^2 = d exactly
    v = normal(8, 4000, d, seed=10)
    v = v / v.norm(dim=2, keepdim=True)

    def best(loss, v):
        slopes = []
        for start in (0.0, 1.0):
            a = torch.tensor(start, dtype=torch.float64, requires_grad=True)

            def model(x):
                return -a * x

            loss(model, x, len(v), given_slices(v)).backward()
            slopes.append(a.grad.item())
        return slopes[0] / (slopes[0] - slopes[1])

    ssm, ssm_vr = sliced_sm.sliced_score_matching_loss, sliced_sm.variance_reduced_loss
    assert best(ssm_vr, v) == pytest.approx(1 / d, abs=1e-3)
    assert best(ssm_vr, math.sqrt(d) * v) == pytest.approx(1, abs=1e-3)
    assert best(ssm, v) == pytest.approx(best(ssm, math.sqrt(d) * v))
    assert best(ssm, v) == pytest.approx(1, abs=0.05)
    v = sliced_sm.unit_sphere(torch.zeros(100, d))
    torch.testing.assert_close(v.norm(dim=1), torch.ones(100))


def test_sliced_sm_denoising_value(sliced_sm):
    """On N(0, I) dsm of s = -a x has its closed form, sliced or not; each eps comes with -eps."""
    a, sigma, x = 0.7, 0.5, normal(40000, 3, seed=9)

    def model(x):
        return -a * x

    expected = torch.tensor(1.5 * (a**2 + (1 / sigma - a * sigma) ** 2)).double()
    within(sliced_sm.denoising_loss(model, x, sigma, reduction="none"), expected)
    eps = normal(40000, 3, seed=11)
    for draw in sliced_sm.draws.values():
        settings = {"eps": eps, "draw": draw, "sigma": sigma}
        values = sliced_sm.sliced_denoising_loss(model, x, reduction="none", **settings)
        within(values, expected, se=5)
    seen = []

    def remember(x):
        seen.append(x)
        return x

    sliced_sm.denoising_loss(remember, x, sigma)
    close(seen[0].mean(0), x)
    within((seen[0][0] - x) ** 2, torch.tensor(sigma**2).double())


def test_sliced_sm_defaults_are_those_of_the_settings(sliced_sm):
    """Pasted alone, dsm has sigma = 0.1 and fd_ssm has h = 0.01."""
    x = normal(9, 3)
    for name, setting in [("denoising_loss", {"sigma": 0.1}),
                          ("finite_difference_loss", {"h": 0.01})]:
        torch.manual_seed(4)
        ours = getattr(sliced_sm, name)(curved, x)
        torch.manual_seed(4)
        close(ours, getattr(sliced_sm, name)(curved, x, **setting))


def test_sliced_sm_losses_leave_the_data_alone(sliced_sm):
    """They do not mark or change the caller's x."""
    x = normal(5, 3)
    before = x.clone()
    for name in SLICED + ["exact_trace_loss", "exact_trace_loop_loss", "denoising_loss"]:
        getattr(sliced_sm, name)(curved, x)
    assert torch.equal(x, before) and not x.requires_grad and x.grad is None


# %% sliced_sm.py: variances
@pytest.mark.parametrize("slices", SLICES)
def test_sliced_sm_5_4_slicing_variance(sliced_sm, slices):
    """Var of v'Av over v, against draws; 0 for signs and a diagonal A, the sphere and A = I."""
    A = normal(3, 3, seed=5)
    v = sliced_sm.draws[slices](torch.zeros(200000, 3, dtype=torch.float64))
    values = torch.einsum("bi,ij,bj->b", v, A, v)
    expected = sliced_sm.slicing_variance(A[None], slices)
    within((values - values.mean()) ** 2, expected[0], se=5)
    blind = {"rademacher": torch.diag(A[0]), "sphere": 2 * torch.eye(3).double()}
    if slices in blind:
        zero = sliced_sm.slicing_variance(blind[slices][None], slices)
        close(zero, torch.zeros(1).double())


@pytest.mark.parametrize("name", ["variance_reduced_loss", "sliced_score_matching_loss"])
@pytest.mark.parametrize("slices", SLICES)
def test_sliced_sm_5_5_law_of_total_variance(sliced_sm, name, slices):
    """For s = Cx on N(0, I) measured and law agree within 10 %; 003's Var/m is far off."""
    x, C = normal(40000, 3, seed=6), normal(3, 3, seed=7)

    def model(x):
        return x @ C.T

    s, without = model(x), implicit(model, x)
    A = C.expand(40000, 3, 3)
    if name == "sliced_score_matching_loss":
        A = A + sliced_sm.outer(s) / 2
    values = sliced_sm.ten_slices(getattr(sliced_sm, name), model, x,
                                  draw=sliced_sm.draws[slices])
    assert values.shape == (10, 40000) and not values.requires_grad
    measured, law = sliced_sm.measured_and_expected(values, without, A, slices)
    assert measured == pytest.approx(law, rel=0.1)
    assert measured[2] > 3 * without.var().item() / 10
    assert measured[1] == pytest.approx(values[:3].mean(0).var().item())


def test_theory_5_5_best_number_of_slices():
    """Points cost a = 1.4, slices 1: of all m those of the text's formula have least variance."""
    m = np.arange(1, 50)
    for per_point, per_slice, best in [(29.6, 56.4 - 29.6, 1), (29.6, 399 - 29.6, 4)]:
        variance = (per_point + per_slice / m) * (1.4 + m)
        assert m[variance.argmin()] == best
        assert math.sqrt(1.4 * per_slice / per_point) == pytest.approx(best, abs=0.5)



def test_sliced_sm_5_4_variance_reduction_at_the_optimum(sliced_sm):
    """On N(0, I_d) with s = -x Gaussian slices add d(d - 2)/2 more to ssm: in d = 1 it is less."""
    for d in (1, 2, 5):
        x, J = normal(200000, d), -torch.eye(d).double()
        ssm = sliced_sm.slicing_variance(J + sliced_sm.outer(x) / 2, "gaussian")
        ssm_vr = sliced_sm.slicing_variance(J[None], "gaussian")
        within(ssm - ssm_vr, torch.tensor(d * (d - 2) / 2).double(), se=5)


# %% sliced_sm.py: data, model, figures
@pytest.mark.parametrize("name", ["moons", "gmm2", 1, 5])
def test_sliced_sm_mixtures(sliced_sm, name):
    """The score is that of torch.distributions, with noise and without; draws have its moments."""
    if isinstance(name, int):
        law = sliced_sm.correlated_mixture(name)
    else:
        law = sliced_sm.plane_mixture(name)
        centres, covs = centres_and_covs(name, 80)
        torch.testing.assert_close(law.centres.double(), centres.double(), rtol=1e-5, atol=1e-6)
        factor = (0.2 / 0.06) ** 2 if name == "moons" else 1
        torch.testing.assert_close(law.covs.double(), covs.double() * factor, rtol=1e-5, atol=1e-6)
    centres, covs = law.centres.double(), law.covs.double()
    d = centres.shape[1]
    x = 2 * normal(60, d)
    for sigma in (0.0, 0.7):
        noisy = MultivariateNormal(centres, covs + sigma**2 * torch.eye(d).double())
        exact = MixtureSameFamily(Categorical(torch.ones(len(centres)).double()), noisy)
        theirs = autograd_score(exact.log_prob, x).float()
        torch.testing.assert_close(law.score(x.float(), sigma), theirs, rtol=1e-3, atol=2e-3)
    draws = law.sample(20000).double()
    within(draws, centres.mean(0), se=5)
    second = covs + centres[:, :, None] * centres[:, None]
    within(draws[:, :, None] * draws[:, None], second.mean(0), se=5)


def test_sliced_sm_correlated_mixture(sliced_sm):
    """Centres at the distance 2, variances from 0.3 to 2 along axes of their own."""
    law = sliced_sm.correlated_mixture(6)
    torch.testing.assert_close(law.centres.norm(dim=1), torch.full((3,), 2.0))
    variances = torch.linalg.eigvalsh(law.covs)
    expected = torch.tensor(np.geomspace(0.3, 2, 6)).float().expand(3, 6)
    torch.testing.assert_close(variances, expected, rtol=1e-4, atol=1e-5)
    centres = torch.cat([sliced_sm.correlated_mixture(3).centres for _ in range(200)])
    within(centres, 0.0)                                 # in all directions


def test_sliced_sm_model_starts_as_a_gaussian(sliced_sm):
    """Before training the score is that of one round Gaussian with the data's mean and variance."""
    x = 3 + 2 * torch.randn(500, 4)
    model = sliced_sm.ScoreNet(x, 8, 2)
    torch.testing.assert_close(model(x), -(x - x.mean(0)) / x.var(0).mean())
    torch.nn.init.ones_(model.net[-1].bias)
    scale = x.var(0).mean().sqrt()
    torch.testing.assert_close(model(x), -(x - x.mean(0)) / scale**2 + 1 / scale)


def test_sliced_sm_reported_errors(sliced_sm):
    """The last error of every run is that of its network against the exact score."""
    for (law_name, name), network in sliced_sm.networks.items():
        law, history = sliced_sm.laws[law_name], sliced_sm.histories[law_name, name]
        assert history["step"][-1] == 30 and (np.diff(history["seconds"]) > 0).all()
        for key, sigma in [("error_p", 0.0), ("error_q", sliced_sm.args.sigma)]:
            x = sliced_sm.check_points[law_name, sigma]
            exact = law.score(x, sigma)
            with torch.no_grad():
                error = ((network(x) - exact).square().sum() / exact.square().sum()).sqrt().item()
            assert history[key][-1] == pytest.approx(error, rel=1e-4)
    spread = sliced_sm.check_points["moons", sliced_sm.args.sigma].var(0)
    variance = sliced_sm.laws["moons"].sample(4000).var(0) + sliced_sm.args.sigma**2
    torch.testing.assert_close(spread, variance, rtol=0.15, atol=0)
    saved = torch.load(Path(sliced_sm.args.outdir) / "model.pt", weights_only=True)
    weight = sliced_sm.networks["moons", "ssm_vr"].net[2].weight
    assert torch.equal(saved["net.2.weight"], weight)


def test_sliced_sm_training_is_the_same_but_for_the_loss(sliced_sm):
    """All runs see the same start, batches and slices, so fd_ssm stays on ssm."""
    for law_name in sliced_sm.laws:
        fd = sliced_sm.histories[law_name, "fd_ssm"]["error_p"]
        ssm = sliced_sm.histories[law_name, "ssm"]["error_p"]
        assert fd == pytest.approx(ssm, rel=0.01)


def test_sliced_sm_figures(sliced_sm):
    """SW2 and its floor are those of the four sets of samples."""
    assert len(sliced_sm.sample_sets) == 4
    assert torch.equal(sliced_sm.samples, sliced_sm.sample_sets[-1])
    projected = [sliced_sm.sorted_projections(x) for x in sliced_sm.sample_sets]
    fresh = sliced_sm.fresh_sets()
    assert sliced_sm.sw2 == pytest.approx(sliced_sm.mean_sw2(projected, fresh), rel=0.4)
    floor = sliced_sm.mean_sw2(sliced_sm.fresh_sets(), fresh)
    assert sliced_sm.sw2_floor == pytest.approx(floor, rel=0.4)
    loss = sliced_sm.exact_trace_loss(sliced_sm.model, sliced_sm.x_data).item()
    assert sliced_sm.loss_reached == pytest.approx(loss, rel=1e-4)
    assert sliced_sm.loss_floor < sliced_sm.loss_reached


def test_sliced_sm_learning_rate_rises_and_falls(sliced_sm):
    """Up for 15 % of the steps, then down to next to nothing."""
    with kept_schedulers() as made:
        sliced_sm.train(sliced_sm.losses_for(sliced_sm.laws["moons"])["dsm"], "moons", "dsm")
    assert made[0]._schedule_phases[0]["end_step"] == pytest.approx(0.15 * 30 - 1)
    assert made[0].get_last_lr()[0] < 0.01 * sliced_sm.args.lr


@pytest.mark.parametrize("name", ["sliced_score_matching_loss", "variance_reduced_loss",
                                  "finite_difference_loss"])
def test_sliced_sm_losses_draw_one_normal_slice_by_default(sliced_sm, name):
    x = sliced_sm.x_data[:20]
    loss = getattr(sliced_sm, name)
    values = []
    for settings in [{}, {"n_slices": 1, "draw": torch.randn_like}]:
        torch.manual_seed(3)
        values.append(loss(sliced_sm.model, x, **settings).item())
    assert values[0] == values[1]


def test_sliced_sm_5_5_finite_differences_vary_like_ssm(sliced_sm):
    """They are ssm but for h^2, and the formula for their variance is the same."""
    slices = sliced_sm.args.slices
    assert (sliced_sm.variances[f"fd_ssm, {slices}"][1]
            == pytest.approx(sliced_sm.variances[f"ssm, {slices}"][1]))


def test_sliced_sm_every_loss_learns():
    """120 steps learn the scores to 35 %, dsm those of q_sigma; h = 0.1 will do."""
    flags = "--data gmm2 --n 20000 --batch 128 --steps 120 --sigma 0.5 --h 0.1 --dim 1"
    script = run("sliced_sm", flags, until="Sampling")
    for (_, name), history in script.histories.items():
        assert history["error_q" if name == "dsm" else "error_p"][-1] < 0.35, name


def test_sliced_sm_5_5_error_of_denoising_in_the_table_of_variances(sliced_sm):
    """e = s(x + sigma eps) + eps/sigma with normal eps; dsm without slices is |e|^2/2."""
    x, eps = sliced_sm.train_points["correlated"][:5000], sliced_sm.eps
    sigma, network = sliced_sm.args.sigma, sliced_sm.networks["correlated", "ssm_vr"]
    with torch.no_grad():
        e = network(x + sigma * eps) + eps / sigma
    torch.testing.assert_close(sliced_sm.e, e)
    torch.testing.assert_close(sliced_sm.dsm_losses, (e**2).sum(1) / 2)
    within(eps, 0.0)
    within(eps**2, 1.0)


def test_sliced_sm_traps_are_trained_as_named(sliced_sm):
    """The step h, the activation and the slices of each trap."""
    seen = []

    def remember(loss_function, law_name, title, activation=torch.nn.SiLU):
        seen.append((loss_function.keywords, activation))

    with mock.patch.dict(sliced_sm.train_traps.__globals__, {"train": remember}):
        names = list(sliced_sm.train_traps())
    for name, (settings, activation) in zip(names, seen, strict=True):
        if "h =" in name:
            assert settings["h"] == float(name.split("h = ")[1])
        assert (activation is torch.nn.ReLU) == ("ReLU" in name)
        assert (settings.get("draw") is sliced_sm.unit_sphere) == ("unit" in name)


def test_sliced_sm_timing(sliced_sm):
    """Each method has a time in each dimension, and the row of dsm is 1."""
    assert list(sliced_sm.seconds) == [2]
    assert set(sliced_sm.seconds[2]) == set(sliced_sm.methods)
    assert all(value > 0 for value in sliced_sm.seconds[2].values())
    table = sliced_sm.printed.partition("Time of a training step")[2].splitlines()
    assert table[1].split() == ["d", "2"] and table[2].split() == ["dsm", "1.00"]
    x, model = torch.randn(4, 2), sliced_sm.ScoreNet(torch.randn(9, 2), 8, 2)
    for name in ["exact", "exact, loop"]:
        loss = sliced_sm.methods[name](model, x)
        torch.testing.assert_close(loss, implicit(model, x).mean())


def test_sliced_sm_traps(sliced_sm):
    """What the last extra prints: the order 2, the factor of unit slices, the errors."""
    assert sliced_sm.order == pytest.approx(2, abs=0.1)
    assert set(sliced_sm.traps) == {"ssm_vr, unit slices", "ssm_vr, ReLU", "dsm, ReLU",
                                    "fd_ssm, ReLU, h = 0.01", "fd_ssm, ReLU, h = 0.03"}
    for name, (network, history) in sliced_sm.traps.items():
        x = sliced_sm.check_points["moons", 0.0]
        exact = sliced_sm.laws["moons"].score(x)
        with torch.no_grad():
            error = ((network(x) - exact).norm() / exact.norm()).item()
        assert history["error_p"][-1] == pytest.approx(error, rel=1e-4)
        units = {torch.nn.ReLU} if "ReLU" in name else {torch.nn.SiLU}
        assert {type(layer) for layer in network.net[1::2]} == units

    def third(x):
        return sliced_sm.exact_score(x) / 3

    assert sliced_sm.fitted_factor(third, "moons") == pytest.approx(1 / 3)


def test_sliced_sm_3_6_relu_and_finite_differences(sliced_sm):
    """s = relu(x - 0.3) on N(0, 1): autograd misses -p(0.3) of the slope -0.648, fd_ssm not."""
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = normal(10**6, 1, seed=12)

    def model(x):
        return (x - theta).relu()

    slope, = torch.autograd.grad(sliced_sm.variance_reduced_loss(model, x), theta)
    assert slope.item() == pytest.approx(-0.2668, abs=0.005)
    loss = sliced_sm.finite_difference_loss(model, x, draw=sliced_sm.rademacher, h=0.01)
    slope, = torch.autograd.grad(loss, theta)
    assert slope.item() == pytest.approx(-0.6482, abs=0.03)


def test_sliced_sm_5_7_variance_of_finite_differences_at_a_kink(sliced_sm):
    """For s = relu(x - theta) on N(0, 1) the gradient of fd_ssm has a variance near p(theta)/2h."""
    x = normal(200000, 1, seed=12)
    for h in (0.01, 0.04):
        theta = torch.full_like(x, 0.3, requires_grad=True)

        def model(y):
            return (y - theta).relu()

        values = sliced_sm.finite_difference_loss(model, x, 1, sliced_sm.rademacher, h,
                                                  reduction="none")
        slope, = torch.autograd.grad(values.sum(), theta)
        p = math.exp(-0.045) / math.sqrt(2 * math.pi)
        assert 2 * h * slope.var().item() == pytest.approx(p, rel=0.1)


@pytest.mark.parametrize("slices", ["gaussian", "rademacher"])
def test_sliced_sm_5_8_slices_only_add_variance(sliced_sm, slices):
    """At one noisy point a slice of dsm has the mean of |e|^2/2 and adds |e|^4/2 (signs: less)."""
    x, eps = normal(1, 4).expand(100000, 4), normal(1, 4, seed=1).expand(100000, 4)
    values = sliced_sm.sliced_denoising_loss(torch.sin, x, eps, sliced_sm.draws[slices], 0.5,
                                             reduction="none")
    e = torch.sin(x[0] + 0.5 * eps[0]) + eps[0] / 0.5
    square = e.square().sum()
    expected = square**2 / 2 - (e**4).sum() / 2 * (slices == "rademacher")
    within(values, square / 2)
    within((values - square / 2) ** 2, expected, se=5)



@pytest.mark.parametrize("eta", [0.1, 0.4])
def test_sliced_sm_6_2_langevin(sliced_sm, eta):
    """For s = -x/V it forgets its start and settles at V/(1 - eta/4V)."""
    def score(x):
        return -x / 0.5

    x = sliced_sm.langevin_dynamics(score, 5 + normal(20000, 1, seed=3), 150, eta)
    within(x.square(), torch.tensor(0.5 / (1 - eta / 2)).double())
    x = normal(4, 2, seed=3)
    torch.manual_seed(1)
    step = sliced_sm.langevin_dynamics(score, x, 1, eta)
    close(step, x - eta * x + math.sqrt(eta) * normal(4, 2, seed=1))


def test_sliced_sm_divergence(sliced_sm):
    """A loss that is no longer finite stops the run in one line with loss, data and step."""
    def infinite(model, x):
        return model(x).mean() * math.inf

    with pytest.raises(SystemExit, match=r"^trial on moons: the loss is .* at step 1: .*--lr"):
        sliced_sm.train(infinite, "moons", "trial")


# %% theory.md: identities that no script computes, and its links
def test_theory_2_1_variance_preservation():
    """alpha^2 C + sigma^2 I is C only for C = sigma^2/(1 - alpha^2) I; DDPM moves C to I."""
    root = torch.tensor([2.0, 0.5]).double()
    alpha = sigma = math.sqrt(0.5)
    x_t = alpha * root * normal(200000, 2) + sigma * normal(200000, 2, seed=1)
    within(x_t.square(), torch.tensor([2.5, 0.625]).double())
    assert (root**2 != torch.tensor([2.5, 0.625])).all()
    x_t = alpha * normal(200000, 2) + sigma * normal(200000, 2, seed=1)
    within(x_t.square(), torch.ones(2).double())
    C, alpha_bar = torch.diag(root**2), 1.0
    for beta in (0.1, 0.3, 0.2):
        C, alpha_bar = (1 - beta) * C + beta * torch.eye(2).double(), alpha_bar * (1 - beta)
    close(C, torch.eye(2).double() + alpha_bar * (torch.diag(root**2) - torch.eye(2).double()))


def test_theory_2_1_weaker_readings():
    """Kept variances multiply correlations by alpha^2; the total is kept by the mean variance."""
    alpha, sigma = 0.8, 0.9
    v = sigma**2 / (1 - alpha**2)
    root = torch.tensor([[1.0, 0.0], [0.6, 0.8]]).double() * math.sqrt(v)   # correlation 0.6
    x_t = alpha * normal(200000, 2) @ root.T + sigma * normal(200000, 2, seed=1)
    within(x_t.square(), torch.tensor([v, v]).double())
    within(x_t[:, 0] * x_t[:, 1] / v, torch.tensor(alpha**2 * 0.6).double())
    x_0 = normal(200000, 2) * torch.tensor([2.0, 0.5]).double()             # mean variance 2.125
    x_t = math.sqrt(1 - sigma**2 / 2.125) * x_0 + sigma * normal(200000, 2, seed=1)
    within(x_t.square().sum(1), torch.tensor(4.25).double())


def transition(alpha_s, sigma_s, alpha_t, sigma_t):
    """alpha and variance of q(x_t | x_s), theory.md 2.2."""
    return alpha_t / alpha_s, sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2


ALPHAS = (0.9, 0.5, 0.6, 1.1)   # alpha_s, sigma_s, alpha_t, sigma_t with SNR_t < SNR_s


def test_theory_2_2_transition():
    """The Markov kernel gives q(x_t | x_0); so does every rho, but only that one leaves x_0 out."""
    (a_s, s_s, a_t, s_t), x0 = ALPHAS, normal(200000, 1)
    x_s = a_s * x0 + s_s * normal(200000, 1, seed=1)
    a, variance = transition(*ALPHAS)
    expected = torch.tensor([s_t**2]).double()
    markov = math.sqrt((a_t / s_t) ** 2 / (a_s / s_s) ** 2)
    for rho in (-0.5, 0.0, markov, 1.0):
        z = normal(200000, 1, seed=2)
        x_t = a_t * x0 + rho * s_t / s_s * (x_s - a_s * x0) + math.sqrt(1 - rho**2) * s_t * z
        within((x_t - a_t * x0).square(), expected)      # the same marginals
        within((x_t - a_t * x0) * x0, torch.zeros(1).double())
        rest = x_t - a * x_s
        assert abs((rest * x0).mean() / (x0 * x0).mean()) < 0.02
        correlation = (rest * (x_s - a_s * x0)).mean().item()
        assert (abs(correlation) < 0.01) == (rho == markov)
    x_t = a * x_s + math.sqrt(variance) * normal(200000, 1, seed=3)
    within((x_t - a_t * x0).square(), expected)


def test_theory_2_2_standard_chain():
    """With alpha^2 = 1 - sigma^2 the steps are DDPM's with beta = 1 - alpha_t^2/alpha_s^2."""
    alphas, x_0 = [1.0, 0.9, 0.5, 0.2], 1.7
    x, z = torch.full((200000,), x_0).double(), normal(3, 200000)
    for i in range(3):
        beta = 1 - (alphas[i + 1] / alphas[i]) ** 2
        sigmas = [math.sqrt(1 - alpha**2) for alpha in alphas[i:i + 2]]
        a, variance = transition(alphas[i], sigmas[0], alphas[i + 1], sigmas[1])
        assert (a, variance) == pytest.approx((math.sqrt(1 - beta), beta))
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * z[i]
        within(x, torch.tensor(alphas[i + 1] * x_0).double())
        within((x - alphas[i + 1] * x_0).square(), torch.tensor(1 - alphas[i + 1] ** 2).double())


def test_theory_2_2_steps_compose():
    """From s to u and on to t is the transition from s to t; from s = 0 it is the marginal."""
    s, u, t = (0.9, 0.5), (0.8, 0.7), (0.6, 1.1)          # alpha and sigma, SNR falling
    (a_1, v_1), (a_2, v_2) = transition(*s, *u), transition(*u, *t)
    assert transition(*s, *t) == pytest.approx((a_2 * a_1, v_2 + a_2**2 * v_1))
    assert transition(1.0, 0.0, *t) == pytest.approx((0.6, 1.1**2))


@pytest.mark.parametrize("levels", [ALPHAS, (0.6, 0.8, 0.9, 0.5)])
@pytest.mark.parametrize("omega", [0.5, -2.0])
def test_theory_2_2_markov_kernel_by_its_blur(levels, omega):
    """f has the prescribed mean for every x_0; where the SNR rises, it exceeds 1 in modulus."""
    a_s, s_s, a_t, s_t = levels
    a, variance = transition(*levels)
    y = np.linspace(-12, 12, 20001)
    for x_0 in (-1.3, 0.0, 2.0):
        f = np.exp(1j * a * omega * (a_s * x_0 + s_s * y) - variance * omega**2 / 2)
        blurred = np.trapezoid(scipy.stats.norm.pdf(y) * f, y)
        prescribed = np.exp(1j * a_t * omega * x_0 - s_t**2 * omega**2 / 2)
        assert blurred == pytest.approx(prescribed, abs=1e-10)
        assert (abs(f) <= 1).all() == (a_t / s_t <= a_s / s_s)


def test_theory_2_3_posterior():
    """q(x_s | x_t, x_0) by Bayes' rule, against the formulas with rho and with x_t, and the KL."""
    a_s, s_s, a_t, s_t = ALPHAS
    a, variance = transition(*ALPHAS)
    x0, guess, x_t = 0.7, -0.4, 1.9
    # the product of N(x_s; a_s x0, s_s^2) and N(x_t; a x_s, variance)
    precision = 1 / s_s**2 + a**2 / variance

    def mean(x0):
        return (a_s * x0 / s_s**2 + a * x_t / variance) / precision

    rho = a_t * s_s / (a_s * s_t)
    assert mean(x0) == pytest.approx(a_s * x0 + rho * s_s / s_t * (x_t - a_t * x0))
    by_x_t = a * s_s**2 / s_t**2 * x_t + a_s * variance / s_t**2 * x0
    assert mean(x0) == pytest.approx(by_x_t)
    assert 1 / precision == pytest.approx((1 - rho**2) * s_s**2)
    assert 1 / precision == pytest.approx(s_s**2 * variance / s_t**2)
    snr = (a_s / s_s) ** 2 - (a_t / s_t) ** 2
    divergence = (mean(x0) - mean(guess)) ** 2 * precision / 2
    assert divergence == pytest.approx(snr / 2 * (x0 - guess) ** 2)


@pytest.mark.parametrize("rho", [-0.4, 0.0, 0.7, 1.0])
def test_theory_2_3_any_rho(rho):
    """What x_t and x_0 do not tell of x_s has variance (1 - rho^2) s_s^2, and no part of x_t."""
    a_s, s_s, a_t, s_t = ALPHAS
    x_0, y, z = normal(3, 100000)
    x_s = a_s * x_0 + s_s * y
    x_t = a_t * x_0 + rho * s_t / s_s * (x_s - a_s * x_0) + math.sqrt(1 - rho**2) * s_t * z
    rest = x_s - a_s * x_0 - rho * s_s / s_t * (x_t - a_t * x_0)
    if rho == 1:
        close(rest, torch.zeros_like(rest))
    else:
        within(rest.square(), torch.tensor((1 - rho**2) * s_s**2).double())
        within(rest * x_t, torch.tensor(0.0).double())


def test_theory_2_3_price_of_a_guess():
    """KL of the ways back with x_0 and with a guess: the formula, least at the Markov rho."""
    a_s, s_s, a_t, s_t = ALPHAS
    x_0, guess, x_t = 0.7, -0.4, 1.9
    snr_s, snr_t = (a_s / s_s) ** 2, (a_t / s_t) ** 2
    markov = a_t * s_s / (a_s * s_t)
    rho = torch.cat([torch.linspace(-0.9, 0.9, 181), torch.tensor([markov])]).double()
    std = (1 - rho**2).sqrt() * s_s
    ways = [torch.distributions.Normal(a_s * x + rho * s_s / s_t * (x_t - a_t * x), std)
            for x in (x_0, guess)]
    kl = torch.distributions.kl_divergence(*ways)
    square = (math.sqrt(snr_s) - rho * math.sqrt(snr_t)) ** 2
    close(kl, square / (2 * (1 - rho**2)) * (x_0 - guess) ** 2)
    assert kl.argmin() == 181
    assert kl.min().item() == pytest.approx((snr_s - snr_t) / 2 * (x_0 - guess) ** 2)


def test_theory_3_2_any_dimension():
    """By quadrature in the plane, for a field that is no gradient; E s* = 0, E[s* x^T] = -I."""
    line = torch.linspace(-8, 8, 201, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    law = mixture([[-1.0, 0.5], [1.0, 0.0]], [0.3, 0.7], [0.6, 0.9])
    weight = law.log_prob(x).exp() * 0.08**2
    exact = autograd_score(law.log_prob, x)
    x.requires_grad_()
    s = swirl(x)
    divergence = 0
    for i in range(2):
        divergence = divergence + torch.autograd.grad(s[:, i].sum(), x, retain_graph=True)[0][:, i]
    x, s = x.detach(), s.detach()
    explicit = 0.5 * (weight * (s - exact).square().sum(1)).sum()
    implicit = (weight * (0.5 * s.square().sum(1) + divergence)).sum()
    half_fisher = 0.5 * (weight * exact.square().sum(1)).sum()
    assert abs((weight * divergence).sum()) > 0.1
    close(explicit, implicit + half_fisher, rtol=1e-8, atol=1e-8)
    close(weight @ exact, torch.zeros(2).double(), rtol=0, atol=1e-8)
    close((weight[:, None] * exact).T @ x, -torch.eye(2).double(), rtol=0, atol=1e-8)


def test_theory_3_3_infimum():
    """Laplace's law, I = 1: the implicit loss of s = -tanh(b x) falls towards -1/2 as b grows."""
    x = np.linspace(0, 40, 400001)                       # both halves are alike, with s* = -1 here
    p = np.exp(-x)
    losses = []
    for b in (5, 20, 80):
        s = -np.tanh(b * x)
        implicit = np.trapezoid(p * (0.5 * s**2 - b * (1 - s**2)), x)
        explicit = np.trapezoid(p * 0.5 * (s + 1) ** 2, x)
        assert explicit == pytest.approx(implicit + 0.5, abs=1e-5)
        losses.append(implicit)
    assert losses[0] > losses[1] > losses[2] > -0.5 and losses[2] == pytest.approx(-0.5, abs=0.01)


def test_theory_3_5_boundary_term_and_weight():
    """p ~ exp(x_1) on the unit disc: the edge adds its term, and a weight that is 0 there none."""
    nodes, weights = np.polynomial.legendre.leggauss(30)
    angle = np.arange(100) * 2 * np.pi / 100
    r, angle = np.meshgrid((nodes + 1) / 2, angle)
    x_1, x_2 = r * np.cos(angle), r * np.sin(angle)
    mass = weights / 2 * r * 2 * np.pi / 100 * np.exp(x_1)   # of p, but for its constant
    total = mass.sum()

    def E(values):
        return (mass * values).sum() / total

    def field(x_1, x_2):
        return x_1**2, np.sin(x_2) + x_1

    s_1, s_2 = field(x_1, x_2)
    divergence = 2 * x_1 + np.cos(x_2)
    error, square = (s_1 - 1) ** 2 + s_2**2, s_1**2 + s_2**2      # s* = (1, 0)
    edge_1, edge_2 = np.cos(angle[:, 0]), np.sin(angle[:, 0])
    f_1, f_2 = field(edge_1, edge_2)
    edge = (np.exp(edge_1) * (f_1 * edge_1 + f_2 * edge_2)).sum() * 2 * np.pi / 100 / total
    assert E(error / 2) == pytest.approx(E(square / 2 + divergence) + 0.5 - edge, abs=1e-10)
    assert abs(edge) > 0.1
    g = 1 - r**2
    implicit = E(g * square / 2 + g * divergence - 2 * (x_1 * s_1 + x_2 * s_2))
    assert E(g * error / 2) == pytest.approx(implicit + E(g / 2), abs=1e-10)


def test_theory_3_5_weight_for_the_exponential_law():
    """For Exp(1) and s = -a the weight g = x moves the least implicit loss from a = 0 to 1."""
    x, a = np.linspace(0, 50, 100001), np.linspace(-1, 2, 61)
    p = np.exp(-x)
    plain = [np.trapezoid(p * value**2 / 2, x) for value in a]
    weighted = [np.trapezoid(p * (x * value**2 / 2 - value), x) for value in a]
    assert a[np.argmin(plain)] == pytest.approx(0, abs=1e-9)
    assert a[np.argmin(weighted)] == pytest.approx(1, abs=1e-9)


THREE_POINTS = torch.tensor([[-1.0], [0.2], [1.5]], dtype=torch.float64)   # equally likely
LINE = torch.linspace(-9, 9, 36001, dtype=torch.float64)[:, None]


def mixture_1d(weights, means, variance):
    """Gaussians of one variance in 1-D, as a torch distribution over (..., 1)."""
    parts = MultivariateNormal(means, variance * torch.eye(1).double())
    return MixtureSameFamily(Categorical(torch.tensor(weights).double()), parts)


def normal_law(mean, variance):
    return mixture_1d([1.0], torch.tensor([[mean]]).double(), variance)


def three_score(x, sigma):
    x = x.detach().clone().requires_grad_()
    log_q = mixture_1d([1.0, 1.0, 1.0], THREE_POINTS, sigma**2).log_prob(x)
    return torch.autograd.grad(log_q.sum(), x)[0]


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_theory_4_1_to_4_3_denoising(sigma):
    """Three points, by quadrature: loss = excess + floor, Tweedie's mean and covariance."""
    q = mixture_1d([1.0, 1.0, 1.0], THREE_POINTS, sigma**2).log_prob(LINE).exp()
    s, dx = three_score(LINE, sigma), 18 / 36000
    joint = (-(LINE - THREE_POINTS.T).square() / (2 * sigma**2)).exp()           # (N, 3)
    joint = joint / math.sqrt(2 * math.pi * sigma**2) / 3
    posterior = joint / joint.sum(1, keepdim=True)
    mean = posterior @ THREE_POINTS
    variance = posterior @ THREE_POINTS**2 - mean**2
    close(mean, LINE + sigma**2 * s, rtol=1e-8, atol=1e-8)
    slope = (three_score(LINE + 1e-5, sigma) - three_score(LINE - 1e-5, sigma)) / 2e-5
    close(variance, sigma**2 + sigma**4 * slope, rtol=1e-5, atol=1e-7)

    def E(values):
        return (q[:, None] * values).sum().item() * dx

    floor = E(variance) / (2 * sigma**4)                 # in three forms
    assert floor == pytest.approx((1 / sigma**2 - E(s**2)) / 2, abs=1e-8)
    assert floor == pytest.approx(E(1 / sigma**2 + slope) / 2, abs=1e-6)
    field = torch.sin(2 * LINE) - LINE
    targets = (THREE_POINTS.T - LINE) / sigma**2
    loss = 0.5 * (joint * (field - targets).square()).sum().item() * dx
    assert loss == pytest.approx(0.5 * E((field - s) ** 2) + floor, abs=1e-8)


def circle(variance):
    """The unit circle with Gaussian noise, as a torch distribution."""
    angle = torch.linspace(0, 2 * math.pi, 501, dtype=torch.float64)[:-1]
    centres = torch.stack([angle.cos(), angle.sin()], 1)
    noisy = MultivariateNormal(centres, variance * torch.eye(2).double())
    return MixtureSameFamily(Categorical(torch.ones(500).double()), noisy)


@pytest.mark.parametrize("tau, sigma", [(0, 0.05), (0.01, 0.1), (0.03, 0.03), (0.06, 0.01)])
def test_theory_4_3_floor_near_a_circle(tau, sigma):
    """sigma^2 phi is 1/2 on it, and 1/2 + tau^2/(2 (sigma^2 + tau^2)) for data spread by tau."""
    variance = sigma**2 + tau**2
    width = 8 * math.sqrt(variance)
    r = torch.linspace(1 - width, 1 + width, 1001, dtype=torch.float64)
    x = torch.stack([r, 0 * r], 1).requires_grad_()
    log_q = circle(variance).log_prob(x)
    s = torch.autograd.grad(log_q.sum(), x)[0]
    weight = r * log_q.detach().exp()                       # the radius under q_sigma
    power = (weight * s.square().sum(1)).sum() / weight.sum()
    expected = 0.5 + tau**2 / (2 * variance)
    assert (2 - sigma**2 * power.item()) / 2 == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize("sigma, expected", [(0.1, -50.3), (0.05, -200.3), (0.025, -800.3)])
def test_theory_4_4_score_at_a_fixed_point(sigma, expected):
    """At radius 1.5 the score of the noisy unit circle grows as 1/sigma^2."""
    x = torch.tensor([[1.5, 0.0]], dtype=torch.float64, requires_grad=True)
    s = torch.autograd.grad(circle(sigma**2).log_prob(x).sum(), x)[0]
    assert s[0].tolist() == pytest.approx([expected, 0], abs=0.05)


def test_theory_4_3_floor_of_few_points_vanishes():
    """Three points: sigma^2 phi falls to 0 below their spacing; a density would have 1/2."""
    shares = []
    for sigma in (0.5, 0.2, 0.05):
        q = mixture_1d([1.0, 1.0, 1.0], THREE_POINTS, sigma**2).log_prob(LINE).exp()
        power = (q * three_score(LINE, sigma)[:, 0] ** 2).sum().item() * 18 / 36000
        shares.append((1 - sigma**2 * power) / 2)
    assert shares[0] > 0.1 > 0.02 > shares[1] > 1e-6 > abs(shares[2])


def slopes(a, sigma, x, eps):
    """Gradient in a of |s + eps/sigma|^2/2 with s = -a noisy_x, at each point."""
    a = torch.full_like(x, a, requires_grad=True)
    loss = (-a * (x + sigma * eps) + eps / sigma).square().sum() / 2
    return torch.autograd.grad(loss, a)[0]


def test_theory_4_4_weight_and_density_of_levels():
    """Mean: lambda nu only. Second moment: the sum of g^2 E|gradient|^2/nu, least for the best."""
    a, levels = 0.4, torch.tensor([2.0, 0.5, 0.2]).double()
    g, measured = torch.tensor([0.2, 0.5, 0.3]).double(), []
    b, c = a * levels**2 - 1, 2 * a * levels - 1 / levels
    square = 3 * a**2 + 3 * b**2 + 2 * a * b + c**2
    mean = (g * (a * (1 + levels**2) - 1)).sum()
    best = g * square.sqrt() / (g * square.sqrt()).sum()
    for p in (torch.ones(3).double() / 3, g, best):
        i = torch.multinomial(p, 200000, replacement=True)
        x, eps = normal(200000, seed=1), normal(200000, seed=2)
        values = (g / p)[i] * slopes(a, levels[i], x, eps)
        within(values, mean)
        within(values.square(), (g**2 / p * square).sum(), se=5)
        measured.append(values.var().item())
    assert measured[2] < 0.95 * min(measured[:2])


@pytest.mark.parametrize("sigma, ratio", [(0.01, 0.0005), (0.1, 0.05), (0.3, 0.38), (1.0, 1.54),
                                          (3.0, 1.98)])
def test_dsm_2d_4_5_price_of_mirrored_noise(dsm_2d, sigma, ratio):
    """Variance of the gradient from eps and -eps, and from two eps, for N(0, I) and s = -a x."""
    a, x, n = 0.5 / (1 + sigma**2), normal(100000, 2, seed=3), 100000
    slope = torch.full((n, 1), a, dtype=torch.float64, requires_grad=True)

    def model(x, log_sigma):
        return -torch.cat([slope, slope]) * x

    loss = dsm_2d.dsm_loss_multi_sigma(model, x, torch.tensor([sigma]).double())
    pair = n * torch.autograd.grad(loss, slope)[0][:, 0]
    two = [sigma**2 * slopes(a, sigma, x, normal(n, 2, seed=i)).sum(1) for i in (1, 2)]
    two = (two[0] + two[1]) / 2
    b, c = a * sigma**4 - sigma**2, 2 * a * sigma**3 - sigma
    expected = torch.tensor([2 * a**2 * sigma**4 + 2 * b**2,
                             2 * a**2 * sigma**4 + b**2 + c**2 / 2]).double()
    centred = torch.stack([pair - pair.mean(), two - two.mean()], 1)
    within(centred.square(), 2 * expected, se=5)              # two coordinates
    assert (expected[0] / expected[1]).item() == pytest.approx(ratio, rel=0.03)


def test_theory_4_6_noise_prediction():
    """DDPM's E|eps - b x_t|^2 is 2 sigma^2 (excess + floor) of s = -b x_t/sigma, on N(0, V)."""
    alpha, sigma, V, b = 0.6, 0.8, 1.5, 0.5
    eps = normal(200000, seed=1)
    x_t = alpha * math.sqrt(V) * normal(200000) + sigma * eps
    variance = alpha**2 * V + sigma**2
    excess = (b / sigma - 1 / variance) ** 2 * variance / 2
    floor = alpha**2 * V / (2 * sigma**2 * variance)
    within((eps - b * x_t).square(), torch.tensor(2 * sigma**2 * (excess + floor)).double())



def test_theory_4_1_fisher_is_not_kl():
    """Data N(0, 1), model exp(-theta x^4/4): KL is least at 1/3, the Fisher divergence at 1/5."""
    x = torch.linspace(-9, 9, 601, dtype=torch.float64)
    theta = torch.linspace(0.1, 0.5, 2001, dtype=torch.float64)[:, None]
    p = (-x**2 / 2).exp() / (-x**2 / 2).exp().sum()
    kl = (p * theta * x**4 / 4).sum(1) + torch.logsumexp(-theta * x**4 / 4, 1)
    fisher = (p * (-theta * x**3 + x).square()).sum(1)
    assert theta[kl.argmin()].item() == pytest.approx(1 / 3, abs=5e-4)
    assert theta[fisher.argmin()].item() == pytest.approx(1 / 5, abs=5e-4)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_theory_8_1_how_far_the_start_is_off(sigma):
    """Three points: the start with their moments is nearest; the bounds of the others hold."""
    q = mixture_1d([1.0, 1.0, 1.0], THREE_POINTS, sigma**2)
    x = 2 * LINE

    def kl(mean, variance):
        start = normal_law(mean, variance)
        log_q = q.log_prob(x)
        return (log_q.exp() * (log_q - start.log_prob(x))).sum().item() * 36 / 36000

    mean, C = THREE_POINTS.mean().item(), THREE_POINTS.var(unbiased=False).item()
    bounds = [C / (2 * sigma**2), (C + mean**2) / (2 * sigma**2)]
    assert 0 < kl(mean, C + sigma**2) < kl(mean, sigma**2) < bounds[0]
    assert kl(mean, sigma**2) < kl(0.0, sigma**2) < bounds[1]
    for other_mean, other_variance in [(mean + 0.05, C + sigma**2), (mean, 1.1 * (C + sigma**2))]:
        assert kl(other_mean, other_variance) > kl(mean, C + sigma**2)


def test_theory_8_1_starts_of_gmm2():
    """The three divergences at sigma = 9.69, by a sum over the plane."""
    q, line = law("gmm2", 9.69), torch.linspace(-60, 60, 401, dtype=torch.float64)
    centres, covs = centres_and_covs("gmm2")
    mean = centres.mean(0)
    C = covs.mean(0) + (centres - mean).T @ (centres - mean) / 2
    assert C.trace() / (2 * 9.69**2) == pytest.approx(0.034, abs=5e-4)
    x = torch.cartesian_prod(line, line)
    round_cov = 9.69**2 * torch.eye(2).double()
    log_q = q.log_prob(x)
    for start, expected in [(MultivariateNormal(mean, C + round_cov), 1e-6),
                            (MultivariateNormal(mean, round_cov), 8e-4),
                            (MultivariateNormal(0 * mean, round_cov), 0.025)]:
        kl = (log_q.exp() * (log_q - start.log_prob(x))).sum() * 0.3**2
        assert kl.item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_theory_8_1_share_of_another_point(sigma):
    """Mean softmax share of x_j at points noised from x_i, at most exp(-d^2/8 sigma^2)/2."""
    k = (-(LINE - THREE_POINTS.T).square() / (2 * sigma**2)).exp()
    k = k / math.sqrt(2 * math.pi * sigma**2)
    shares = k.T @ (k / k.sum(1, keepdim=True)) * 18 / 36000                     # (from i, of j)
    close(shares.sum(1), torch.ones(3).double(), rtol=0, atol=1e-8)
    bound = (-(THREE_POINTS - THREE_POINTS.T).square() / (8 * sigma**2)).exp() / 2
    for i, j in permutations(range(3), 2):
        assert 0 < shares[i, j] < bound[i, j]
    assert shares[0, 1] > 0.5 * bound[0, 1]


def test_theory_8_2_ratio_of_levels():
    """Half of the inner shell is within 3 standard deviations of the outer one; KL instead."""
    for d in (50, 784):
        gamma = math.sqrt(2 * d) / (math.sqrt(2 * d) - 3)
        inner = scipy.stats.chi(d, scale=1 / gamma)
        edge = math.sqrt(d) - 3 / math.sqrt(2)
        assert inner.sf(edge) == pytest.approx(0.5, abs=0.03)
    assert gamma == pytest.approx(1.082, abs=1e-3)
    assert 1 + math.log(10 / 0.02) / math.log(gamma) == pytest.approx(80, abs=0.5)

    def kl(d, gamma):
        upper, lower = [MultivariateNormal(torch.zeros(d), scale_tril=scale * torch.eye(d))
                        for scale in (gamma, 1.0)]
        return torch.distributions.kl_divergence(upper, lower).item()

    assert kl(2, 1.77) == pytest.approx(2 * ((1.77**2 - 1) / 2 - math.log(1.77)), rel=1e-5)
    assert kl(2, 1.77) == pytest.approx(1, abs=0.01)
    gamma = math.sqrt(2e8) / (math.sqrt(2e8) - 3)
    assert 1e8 * ((gamma**2 - 1) / 2 - math.log(gamma)) == pytest.approx(4.5, rel=1e-3)


def test_theory_8_4_step_rule_of_001():
    """N(0, 1/4) after 10 levels down to 0.01 with 100 steps of eta = 0.1 (sigma/sigma_max)^2."""
    deviations = []
    for sigma_max in (1, 2, 3, 10):
        u, kappa = sigma_max**2, 0.05 / sigma_max**2
        for sigma in np.geomspace(sigma_max, 0.01, 10):
            u = after_langevin(u, sigma, 0.25, kappa, 100)
        deviations.append(math.sqrt(u))
    assert deviations == pytest.approx([0.53, 0.69, 1.2, 8.6], rel=0.01)
    remains = [(1 - 0.05 / top**2) ** 100 * (top / 0.01) ** (1 / 9) for top in (2.8, 2.9)]
    assert remains[0] < 1 < remains[1]


def test_theory_9_2_two_modes():
    """Two peaks along mu for |mu| > 1 only; the barrier; the flat top at |mu| = 1."""
    x = torch.linspace(-4, 4, 8001, dtype=torch.float64)[:, None]
    for length, modes in [(0.5, 1), (0.95, 1), (1.05, 2), (2.0, 2)]:
        means = torch.tensor([[-length], [length]]).double()
        log_p = mixture_1d([1.0, 1.0], means, 1.0).log_prob(x)
        assert ((log_p[1:-1] > log_p[:-2]) & (log_p[1:-1] > log_p[2:])).sum() == modes
    assert (log_p.max() - log_p[4000]).item() == pytest.approx(1.3072, abs=1e-4)
    flat = mixture_1d([1.0, 1.0], torch.tensor([[-1.0], [1.0]]).double(), 1.0)
    fall = flat.log_prob(torch.tensor([[0.2], [0.0]]).double())
    assert (fall[0] - fall[1]).item() == pytest.approx(-0.2**4 / 12, rel=0.05)


def test_theory_9_3_fisher_information_of_location():
    """E s^2 = -E s' = 0.7256104, above 1/Var, by quadrature; that of N(0, v) in v is 1/2v^2."""
    p = mixture_1d([1.0, 1.0], torch.tensor([[-2.0], [2.0]]).double(), 1.0)
    weights = p.log_prob(LINE).exp() * 18 / 36000
    s, x = autograd_score(p.log_prob, LINE)[:, 0], LINE[:, 0]
    assert (weights * s**2).sum().item() == pytest.approx(0.7256104, abs=1e-7)
    assert (weights / torch.cosh(2 * x) ** 2).sum().item() == pytest.approx(0.0685974, abs=1e-7)
    assert (weights * x**2).sum().item() == pytest.approx(5, abs=1e-7)
    gauss = normal_law(0.0, 0.7).log_prob(LINE).exp() * 18 / 36000

    def mean_log_density(v):
        return (gauss * torch.distributions.Normal(0 * v, v.sqrt()).log_prob(x)).sum()

    v = torch.tensor(0.7, dtype=torch.float64)
    by_v = torch.autograd.functional.hessian(mean_log_density, v)
    assert -by_v.item() == pytest.approx(1 / (2 * 0.7**2), rel=1e-6)


def test_theory_9_3_direction_and_length():
    """Ascent is 67 degrees off the peak; the length of a score says nothing about the density."""
    def score(law, *point):
        return autograd_score(law.log_prob, torch.tensor([point]).double())[0]

    cov = torch.diag(torch.tensor([9, 0.25]).double())
    gauss = MultivariateNormal(torch.zeros(2).double(), cov)
    s, to_peak = score(gauss, 3.0, 1.0), torch.tensor([-3.0, -1.0]).double()
    angle = torch.acos(torch.cosine_similarity(s, to_peak, dim=0)) * 180 / math.pi
    assert angle.item() == pytest.approx(67, abs=0.5)
    lengths = [score(gauss, 10.0, 0.0).norm().item(), score(gauss, 0.0, 1.0).norm().item()]
    assert lengths == pytest.approx([1.1, 4], rel=0.02)
    cauchy = torch.distributions.Cauchy(0.0, 1.0)
    assert score(cauchy, 100.0).item() == pytest.approx(-0.02, rel=1e-3)
    assert score(cauchy, 1.0).abs() > 40 * score(cauchy, 100.0).abs()

    def round_law(x):
        return -x.square().sum(1) ** 2

    x = normal(20, 2)
    s = autograd_score(round_law, x)
    close(torch.cosine_similarity(s, -x, dim=1), torch.ones(20).double())
    assert (autograd_score(round_law, 2 * x).norm(dim=1) > s.norm(dim=1)).all()


def test_theory_9_3_score_as_velocity_is_heat_running_backwards():
    """N(0, b - 2t) solves dp/dt = -(p v)' with v = (log p)'."""
    x, b, t = torch.linspace(-6, 6, 41, dtype=torch.float64)[:, None], 1.5, 0.3

    def density(x, t):
        return normal_law(0.0, b - 2 * t).log_prob(x).exp()

    def flux(x):
        return density(x, t) * -x[:, 0] / (b - 2 * t)

    by_time = (density(x, t + 1e-5) - density(x, t - 1e-5)) / 2e-5
    by_place = (flux(x + 1e-5) - flux(x - 1e-5)) / 2e-5
    assert by_time.abs().max() > 0.1
    close(by_time, -by_place, rtol=1e-6, atol=1e-8)


def test_theory_10_1_edges_of_the_noise():
    """k ~ (1 - n^2)^b: I(k) is finite above b = 1, grows as a logarithm at 1, as a power below."""
    def information(b, cut):
        """E (d log k)^2 on |n| < 1 - cut; n = 1 - exp(-u), in equal steps of u."""
        edge = torch.linspace(0, -math.log(cut), 20001, dtype=torch.float64).neg().exp()
        n = 1 - edge
        k = 0.5 * torch.tensor(scipy.stats.beta(b + 1, b + 1).pdf((1 + n) / 2))
        slope = -2 * b * n / (1 - n**2)
        return 2 * torch.trapezoid(k * slope**2 * edge, -edge.log()).item()

    variance = 1 / 7                                     # of b = 2
    assert information(2, 1e-9) * variance == pytest.approx(10 / 7, rel=1e-4)
    decades = [information(1, 10.0**-n) for n in (6, 7, 8)]
    assert decades[2] - decades[1] == pytest.approx(decades[1] - decades[0], rel=1e-3)
    assert decades[1] - decades[0] > 1
    halves = [information(0.5, 10.0**-n) for n in (6, 7, 8)]
    assert (halves[2] - halves[1]) / (halves[1] - halves[0]) == pytest.approx(10**0.5, rel=0.01)


def test_theory_10_2_score_after_a_blur():
    """Blur alone: G^-T grad log p(G^-1 y). With Gaussian noise denoising has the score as mean."""
    G = torch.tensor([[0.8, 0.3], [0.1, 0.5]]).double()
    cov = torch.tensor([[1.5, 0.4], [0.4, 0.6]]).double()
    p = MultivariateNormal(torch.tensor([1.0, -2.0]).double(), cov)
    y = normal(6, 2)
    blurred = MultivariateNormal(G @ p.mean, G @ cov @ G.T)
    behind = y @ G.inverse().T
    close(autograd_score(blurred.log_prob, y), autograd_score(p.log_prob, behind) @ G.inverse())
    eps, sigma = normal(100000, 2, seed=1), 0.5
    noisy = p.sample((100000,)) @ G.T + sigma * eps
    wider = blurred.covariance_matrix + sigma**2 * torch.eye(2).double()
    q = MultivariateNormal(blurred.mean, wider)
    rest = -eps / sigma - autograd_score(q.log_prob, noisy)
    within(rest[:, :, None] * noisy[:, None], torch.zeros(2, 2).double())
    within(rest, torch.zeros(2).double())


def test_theory_10_3_only_gaussian_noise_denoises_by_the_score():
    """Two points of data: (E[x|y] - y) / score is sigma^2 for Gaussian noise, else it varies."""
    y = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    x = torch.tensor([-1.0, 1.5]).double()

    def ratio(log_k):
        posterior = log_k(y - x).softmax(1)

        def log_q(y):
            return log_k(y - x).exp().sum(1).log()

        return (posterior @ x - y[:, 0]) / autograd_score(log_q, y)[:, 0]

    def logistic(n):
        return -2 * torch.cosh(n / 2).log()

    def gaussian_noise(n):
        return -n**2 / (2 * 0.64)

    close(ratio(gaussian_noise), torch.full((9,), 0.64, dtype=torch.float64))
    assert ratio(logistic).max() > 1.05 * ratio(logistic).min() > 0


def test_theory_11_2_kl_over_the_levels():
    """d KL(q_sigma | r_sigma)/d(sigma^2) = -E|grad log q - grad log r|^2/2, for two mixtures."""
    x = torch.linspace(-12, 12, 20001, dtype=torch.float64)[:, None]
    means = torch.tensor([[-2.0], [1.0]]).double()

    def log_density(weights, variance, x):
        return mixture_1d(weights, means, variance).log_prob(x)

    def kl(variance):
        log_q = log_density([0.3, 0.7], variance, x)
        log_r = log_density([0.6, 0.4], variance, x)
        return (log_q.exp() * (log_q - log_r)).sum().item() * 24 / 20000

    def field(weights, variance):
        y = x.clone().requires_grad_()
        return torch.autograd.grad(log_density(weights, variance, y).sum(), y)[0][:, 0]

    square = (field([0.3, 0.7], 1.5) - field([0.6, 0.4], 1.5)) ** 2
    fisher = (log_density([0.3, 0.7], 1.5, x).exp() * square).sum().item() * 24 / 20000
    assert (kl(1.501) - kl(1.499)) / 0.002 == pytest.approx(-fisher / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["VE", "VP", "sub-VP"])
def test_theory_11_2_equation_of_a_gaussian_diffusion(name):
    """f = alpha'/alpha, g^2 = (sigma^2)' - 2 f sigma^2 for three processes with beta = 2t."""
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    beta, kept = 2 * t, (-t**2).exp()                    # kept = exp(-integral of beta)
    alpha, variance, f, g2 = {
        "VE": (t**0, t**3, 0 * t, 3 * t**2),             # sigma^2 = t^3
        "VP": (kept.sqrt(), 1 - kept, -beta / 2, beta),
        "sub-VP": (kept.sqrt(), (1 - kept) ** 2, -beta / 2, beta * (1 - kept**2)),
    }[name]
    alpha_slope = torch.autograd.grad(alpha, t, retain_graph=True)[0]
    variance_slope = torch.autograd.grad(variance, t, retain_graph=True)[0]
    close(f, alpha_slope / alpha)
    close(g2, variance_slope - 2 * f * variance)


def three_points_cdf(x, sigma):
    return (1 + torch.erf((x - THREE_POINTS) / (sigma * math.sqrt(2)))).mean(0) / 2


@pytest.mark.parametrize("zeta", [0, 0.5, 1, 2])
def test_theory_11_2_family_has_the_same_laws(zeta):
    """Small steps down from q_3 end in q_0.4 for every zeta, with the exact score of 3 points."""
    points, sigmas = THREE_POINTS[:, 0], np.geomspace(3, 0.4, 81).tolist()
    x = points[torch.randint(3, (4000,), generator=generator())] + 3 * normal(4000, seed=1)
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        share = (-(x[:, None] - points) ** 2 / (2 * sigma**2)).softmax(1)
        score, delta = (share @ points - x) / sigma**2, sigma**2 - sigma_next**2
        noise = zeta * math.sqrt(delta) * normal(4000, seed=2 + i)
        x = x + (1 + zeta**2) / 2 * delta * score + noise
    edges = torch.linspace(-1.5, 2, 8).double()
    within((x[:, None] < edges).double(), three_points_cdf(edges, 0.4))


def test_theory_11_2_rho_and_zeta():
    """rho = gamma^(-zeta^2) is exact for a denoiser that is constant; (1 - rho^2)/(gamma^2 - 1)."""
    sigma, sigma_next, n = 2.0, 1.6, 100000
    gamma = sigma / sigma_next
    for zeta in (0.5, 1.0, 2.0):
        factor, variance, fine = 1.0, 0.0, np.geomspace(sigma, sigma_next, n + 1)
        shrink = 1 - (1 + zeta**2) / 2 * (1 - (fine[1] / fine[0]) ** 2)   # D = 0: s = -x/sigma^2
        for noise in zeta**2 * (fine[:-1] ** 2 - fine[1:] ** 2):
            factor, variance = factor * shrink, variance * shrink**2 + noise
        rho = gamma ** -(zeta**2)
        assert factor == pytest.approx(rho / gamma, rel=1e-4)             # of x - D
        assert variance == pytest.approx(sigma_next**2 * (1 - rho**2), rel=1e-4)
    for rho in (0.0, 1 / gamma, 0.95, 1.0):              # Euler-Maruyama with the same noise
        zeta2 = (1 - rho**2) / (gamma**2 - 1)
        drift = (1 - rho / gamma) * sigma**2             # of 7.3
        euler = (1 + zeta2) / 2 * (sigma**2 - sigma_next**2)
        assert drift - euler == pytest.approx((gamma - rho) ** 2 * sigma_next**2 / 2)


@pytest.mark.parametrize("ddim, zeta", [(True, 0), (False, 1)])
@pytest.mark.parametrize("v", [0.0, 0.5])
def test_dsm_2d_11_2_fresh_noise_forgets_an_offset(dsm_2d, ddim, zeta, v):
    """An offset at the first level arrives times (V_end/V_start)^((1 + zeta^2)/2)."""
    x, sigmas, ends = normal(5, 2), np.geomspace(2, 0.5, 2000).tolist(), []
    for offset in (0.0, 1.0):
        torch.manual_seed(1)                             # the same noise, which then cancels
        ends.append(dsm_2d.ancestral_sampling(gaussian(v), x + offset, sigmas, ddim)[-2])
    arrived = ((0.5**2 + v) / (2**2 + v)) ** ((1 + zeta**2) / 2)
    close(ends[1] - ends[0], torch.full((5, 2), arrived).double(), rtol=2e-3, atol=0)


def gaussian_kl(u, v):
    """KL(N(0, u) | N(0, v))."""
    return (u / v - 1 - math.log(u / v)) / 2


@pytest.mark.parametrize("zeta", [0, 0.5, 1, 2])
def test_theory_11_2_noise_brings_laws_together(zeta):
    """d KL(r|q)/d sigma^2 = zeta^2/2 E_r|grad log r/q|^2 along the family, r = N(0, u), q_sigma."""
    V, u, h = 1.5, 2.4, 1e-5

    def kl_after(step):                                  # the variance equation, one Heun step
        slope = (1 + zeta**2) * u / V - zeta**2
        slope_there = (1 + zeta**2) * (u + step * slope) / (V + step) - zeta**2
        return gaussian_kl(u + step * (slope + slope_there) / 2, V + step)

    slope = (kl_after(h) - kl_after(-h)) / (2 * h)
    assert slope == pytest.approx(zeta**2 / 2 * u * (1 / V - 1 / u) ** 2, abs=1e-8)


@pytest.mark.parametrize("error", [-0.3, 0.2])
def test_theory_11_2_score_error_bounds_the_error_of_the_samples(error):
    """Girsanov's bound for N(0, 1), a score that is off by a factor, and three zeta."""
    sigmas = np.geomspace(5, 0.1, 20001)
    V, delta = 1 + sigmas**2, sigmas[:-1] ** 2 - sigmas[1:] ** 2
    squares = error**2 / V                               # E|s - s*|^2 under q_sigma
    integral = ((squares[:-1] + squares[1:]) / 2 * delta).sum()
    by_loss = 2 * math.log(50) * (sigmas**2 * squares / 2).mean()        # geometric levels
    assert by_loss == pytest.approx(integral / 2, rel=1e-3)
    for zeta in (0.5, 1.0, 2.0):
        u = 26.0 * 1.3                                   # a start that is too wide
        for i in range(20000):
            u += (zeta**2 - (1 + zeta**2) * (1 + error) * u / V[i]) * delta[i]
        bound = (1 + zeta**2) ** 2 / (8 * zeta**2) * integral
        assert 0.02 * bound < gaussian_kl(1.01, u) <= gaussian_kl(26, 26 * 1.3) + bound


def test_theory_11_2_one_level_is_blind_to_the_shares():
    """Shares 0.7 against 0.3 of modes at -m and m: the KL stays, the Fisher divergence goes."""
    for m, expected in [(4.0, 5.8e-4), (6.0, 4.0e-8)]:
        means, x = torch.tensor([[-m], [m]]).double(), (1.5 * LINE).requires_grad_()
        log_q, log_r = [mixture_1d(w, means, 1.0).log_prob(x) for w in ([0.7, 0.3], [0.3, 0.7])]
        difference = torch.autograd.grad((log_q - log_r).sum(), x, retain_graph=True)[0][:, 0]
        weight = log_q.exp() * 27 / 36000
        assert (weight * difference**2).sum().item() == pytest.approx(expected, rel=0.01)
        assert (weight * (log_q - log_r)).sum().item() == pytest.approx(0.3389, rel=1e-3)


@pytest.mark.parametrize("w", [0.5, 1.0])
def test_theory_11_2_guided_score_is_no_noised_score(w):
    """Class N(0, 1), all N(0, 4): the score of q(x|y)^(1+w)/q(x)^w, and the variance it implies."""
    a, b = 1.0, 4.0
    x = normal(20, 1).requires_grad_()
    for sigma in [0.0, 1.0, 1000.0]:
        of_class = normal_law(0.0, a + sigma**2).log_prob(x)
        of_all = normal_law(0.0, b + sigma**2).log_prob(x)
        score, = torch.autograd.grad(((1 + w) * of_class - w * of_all).sum(), x)
        V = 1 / ((1 + w) / (a + sigma**2) - w / (b + sigma**2))
        close(score, -x.detach() / V)
        if sigma == 0:
            assert V == pytest.approx(a * b / ((1 + w) * b - w * a))
        if sigma == 1000:
            assert V - sigma**2 == pytest.approx((1 + w) * a - w * b, abs=1e-3)


def test_theory_11_2_scores_of_scaled_data():
    """s of A x, at A y, is A^-T s of x with noise A^-1 eps: only a multiple of A keeps its form."""
    x, sigma, A = normal(20, 2), 0.7, torch.tensor([[2.0, 0.5], [0.0, 0.3]]).double()
    means, cov = normal(3, 2, seed=1), torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double()
    equal, eye, inverse = Categorical(torch.ones(3).double()), torch.eye(2).double(), A.inverse()

    def score(x, means, cov):
        x = x.detach().requires_grad_()
        law = MixtureSameFamily(equal, MultivariateNormal(means, cov))
        return torch.autograd.grad(law.log_prob(x).sum(), x)[0]

    scaled = score(3 * x, 3 * means, 9 * cov + (3 * sigma) ** 2 * eye)
    close(scaled, score(x, means, cov + sigma**2 * eye) / 3)
    turned = score(x @ A.T, means @ A.T, A @ cov @ A.T + sigma**2 * eye)
    close(turned, score(x, means, cov + sigma**2 * inverse @ inverse.T) @ inverse)


def multistep(score, x, sigmas):
    """theory.md 11.2, section 4.7.2: denoisers of two levels, one new call a step."""
    D_before = h_before = None
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        D, h = x + sigma**2 * score(x, sigma), math.log(sigma / sigma_next)
        D_mean = D if D_before is None else D + h / (2 * h_before) * (D - D_before)
        x = sigma_next / sigma * x + (1 - sigma_next / sigma) * D_mean
        D_before, h_before = D, h
    return x


def test_dsm_2d_11_2_exponential_integrators(dsm_2d):
    """N(0, 1) by DDIM, Heun, multistep: errors after 40 calls, and how 80 divide them."""
    x, errors = normal(3, 1), []
    exact = math.sqrt((0.01**2 + 1) / (10**2 + 1)) * x
    for n in (40, 80):
        levels, half = np.geomspace(10, 0.01, n + 1), np.geomspace(10, 0.01, n // 2 + 1)
        ends = [dsm_2d.ancestral_sampling(gaussian(1), x, levels.tolist(), True)[-2],
                dsm_2d.heun_sampling(gaussian(1), x, half.tolist())[-2],
                multistep(gaussian(1), x, levels.tolist())]
        errors.append([(end / exact - 1).mean().item() for end in ends])
    assert errors[0] == pytest.approx([-0.042, 0.016, 0.0018], rel=0.02)
    ratios = [few / many for few, many in zip(*errors)]
    assert ratios == pytest.approx([2, 4, 4], rel=0.06)
    step = dsm_2d.ancestral_step(mixed, normal(5, 2), 2.0, 1.2, ddim=True)
    close(step, multistep(mixed, normal(5, 2), [2.0, 1.2]))              # the first one is DDIM


def test_dsm_2d_11_2_churn_is_a_langevin_step(dsm_2d):
    """Noise up to sigma_up and Heun's step back: x + eta/2 s + sqrt(eta) z, but for eta^(3/2)."""
    x, z, differences = normal(50, 2), normal(50, 2, seed=1), []
    for eta in (0.01, 0.0025):
        up = math.sqrt(1 + eta)                          # from sigma = 1
        churned = dsm_2d.heun_sampling(mixed, x + math.sqrt(eta) * z, [up, 1.0])[1]
        langevin = x + eta / 2 * mixed(x, 1.0) + math.sqrt(eta) * z
        differences.append((churned - langevin).abs().max().item())
    assert differences[0] / differences[1] == pytest.approx(8, rel=0.1)


def anchors(text):
    """GitHub's anchors of the headings of a Markdown text."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("name", ["README.md", "theory.md"])
def test_theory_links_resolve(name):
    """Every relative link leads to a file and, behind a #, to a heading of it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", (HERE / name).read_text(encoding="utf-8")):
        if not link.startswith("http"):
            file, _, anchor = link.partition("#")
            path = HERE / (file or name)
            assert path.exists(), link
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", sorted(TINY))
def test_all_sections_that_a_script_names_exist(name):
    """Every number behind "theory.md" in a script is a heading there."""
    theory = (HERE / "theory.md").read_text(encoding="utf-8")
    number = r"\d+(?:\.\d+)?"
    groups = re.findall(rf"theory\.md (?:sections? )?((?:{number}(?:, | and | to )?)+)",
                        cells(name).replace("\n", " "))
    numbers = re.findall(number, " ".join(groups))
    assert numbers
    for number in numbers:
        assert re.search(rf"^##+ {re.escape(number)} ", theory, re.M), number


def test_theory_names_exist():
    """Functions and tests that theory.md names are defined in a script or in this file."""
    code = ""
    for name in [*TINY, "test_scripts"]:
        code += (HERE / f"{name}.py").read_text(encoding="utf-8")
    theory = (HERE / "theory.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([a-z][a-z_0-9]+)`", theory):
        assert re.search(rf"\b{name}\b", code), name


# %% ncsn_mnist.py: note 001 task 3
@pytest.fixture(scope="session")
def ncsn_mnist():
    return pasted_script("ncsn_mnist")


@pytest.fixture(scope="session")
def unet():
    """A run with the other network, up to its samples."""
    return run("ncsn_mnist", "--net unet --epochs 1", until="Check")


@pytest.fixture(scope="session")
def homework():
    """The network's cell and, apart from it, the class, each pasted into 001's notebook."""
    model_cell = cells("ncsn_mnist").partition("\n# %% Model\n")[2].partition("\n# %% ")[0]
    names = vars(pasted(model_cell))
    ncsn = pasted(class_text("ncsn_mnist", "NoiseConditionedScoreNetwork"))
    assert "NoiseConditionedScoreNetwork" not in names
    return SimpleNamespace(**names, NoiseConditionedScoreNetwork=ncsn.NoiseConditionedScoreNetwork)


def test_ncsn_mnist_homework_test_conditioned_resnet(homework):
    """What 001 asserts of its network: a fresh one tells two levels apart."""
    model = homework.ConditionedSimpleResnet(in_channels=1, out_channels=1, n_filters=16,
                                             n_blocks=1, num_embeddings=2)
    x = torch.rand((1, 1, 28, 28))
    out1 = model(x, torch.zeros(size=(1,), dtype=torch.long))
    out2 = model(x, torch.ones(size=(1,), dtype=torch.long))
    assert not np.allclose(out1.detach().numpy(), out2.detach().numpy())


class DummyConditionedMLP(torch.nn.Module):
    """001's: a linear layer that has the level index added to its answer."""
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x, y):
        return self.layer(x) + y.view(-1, 1)


def test_ncsn_mnist_homework_test_ncsn(homework):
    """What 001 asserts of its class."""
    ncsn = homework.NoiseConditionedScoreNetwork(score_model=DummyConditionedMLP(),
                                                 input_shape=(2,), sigmas=[0.1])
    x = torch.rand(16, 2)
    assert x.size() == ncsn(x).size()
    loss = ncsn.loss(x)["total_loss"]
    assert len(loss.size()) == 0
    assert list(ncsn.sample(4).size()) == [4, 2]


def test_ncsn_mnist_homework_notebook(homework):
    """001's cells with both of ours: network, class, loaders, training helper, samples."""
    images = torch.tensor(load_digits().images[:256] / 16).float()[:, None]
    sigmas = [0.3 * 10 ** (i / 9) for i in range(10)]
    score_model = homework.ConditionedSimpleResnet(in_channels=1, out_channels=1, n_filters=8,
                                                   n_blocks=7, num_embeddings=len(sigmas))
    ncsn = homework.NoiseConditionedScoreNetwork(score_model=score_model, input_shape=(1, 8, 8),
                                                 sigmas=sigmas)
    loader = homework.data.DataLoader(2 * images - 1, batch_size=32, shuffle=True)
    optimizer = torch.optim.Adam(ncsn.parameters(), lr=5e-3)
    losses = []
    for _ in range(3):
        for batch in loader:
            loss = ncsn.loss(batch.to(ncsn.device))["total_loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert np.mean(losses[-8:]) < 0.85 * np.mean(losses[:8])
    samples = ncsn.sample(20, num_steps=2, eps=0.1).cpu()
    assert samples.shape == (20, 1, 8, 8) and torch.isfinite(samples).all()


class Slopes(torch.nn.Module):
    """s = -a_t x, a slope for each level."""
    def __init__(self, *slopes):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.tensor(slopes))

    def forward(self, x, y):
        self.seen = y
        one_each = [len(x)] + [1] * (x.dim() - 1)
        return -self.slopes[y].view(one_each) * x


def test_ncsn_mnist_training_helper(homework):
    """A helper that only knows loss(batch)["total_loss"] teaches each level its own slope."""
    sigmas, x = [2.0, 1.0, 0.5], normal(4000, 2, seed=1).float()
    ncsn = homework.NoiseConditionedScoreNetwork(Slopes(0.0, 0.0, 0.0), (2,), sigmas)
    optimizer = torch.optim.SGD(ncsn.parameters(), 0.3)
    for _ in range(150):
        optimizer.zero_grad()
        ncsn.loss(x)["total_loss"].backward()
        optimizer.step()
    exact = torch.tensor([1 / (1 + sigma**2) for sigma in sigmas])
    close(ncsn.score_model.slopes.detach(), exact, rtol=0, atol=0.06)


@pytest.mark.parametrize("shape", [(5,), (1, 4, 4)])
@pytest.mark.parametrize("sigmas", [[0.1], [0.1, 2.0, 0.5], np.array([0.1, 2.0, 0.5])])
def test_ncsn_mnist_class_takes_any_shape_and_order_of_levels(homework, shape, sigmas):
    ncsn = homework.NoiseConditionedScoreNetwork(Slopes(1.0, 1.0, 1.0), shape, sigmas)
    x = torch.rand(16, *shape)
    assert ncsn(x).shape == x.shape and ncsn.loss(x)["total_loss"].shape == ()
    close(ncsn.sigmas, torch.tensor(sorted(sigmas)[::-1]).float())
    samples = ncsn.sample(4, num_steps=2)
    assert samples.shape == (4, *shape) and not samples.requires_grad
    assert ncsn.device == torch.device("cpu")


def test_ncsn_mnist_class_saves_and_moves_its_levels(homework):
    """001's plain attribute stays behind."""
    ncsn = homework.NoiseConditionedScoreNetwork(Slopes(1.0, 1.0), (2,), [0.1, 2.0])
    other = homework.NoiseConditionedScoreNetwork(Slopes(1.0, 1.0), (2,), [7.0, 8.0])
    other.load_state_dict(ncsn.state_dict())
    assert torch.equal(other.sigmas, ncsn.sigmas)
    assert ncsn.to("meta").device == torch.device("meta")


def level_moments(homework, shape=(3,), **options):
    """Of each of three levels: elements of the loss of s = -a_t x on N(0, 0.7 I), expectation.

    s + eps/sigma = -a x + (1/sigma - a sigma) eps
    """
    sigmas, slopes = [2.0, 0.5, 0.1], [0.9, 0.3, 4.0]
    model = Slopes(*slopes)
    ncsn = homework.NoiseConditionedScoreNetwork(model, shape, sigmas, **options).double()
    values = ncsn(math.sqrt(0.7) * normal(30000, *shape, seed=1)).detach()
    for t, (sigma, a) in enumerate(zip(sigmas, slopes)):
        yield values[model.seen == t], a**2 * 0.7 + (1 / sigma - a * sigma) ** 2


@pytest.mark.parametrize("shape", [(3,), (2, 3, 2)])
def test_ncsn_mnist_4_4_loss_on_a_quadratic(homework, shape):
    """The weight is (sigma/sigma_max)^2, and all levels come equally often."""
    for (values, expected), sigma in zip(level_moments(homework, shape), [2.0, 0.5, 0.1]):
        within(values, (sigma / 2.0) ** 2 * expected)
        assert len(values) == pytest.approx(10000, abs=4 * math.sqrt(30000 * 2 / 9))


def test_ncsn_mnist_class_takes_weights_and_probs(homework):
    weights, probs = torch.tensor([5.0, 0.3, 1.0]), torch.tensor([1.0, 0.0, 3.0])
    moments = level_moments(homework, weights=weights, probs=probs)
    for (values, expected), w, p in zip(moments, weights.tolist(), [0.25, 0, 0.75]):
        assert len(values) == pytest.approx(30000 * p, abs=4 * math.sqrt(30000 * p * (1 - p)))
        if p:
            within(values, w * expected)


@pytest.mark.parametrize("sigma", [0.1, 2.0])
@pytest.mark.parametrize("factor", [0.3, 0.9, 1.1, 2.0])
def test_ncsn_mnist_gradient_of_the_loss_has_the_right_sign(homework, sigma, factor):
    """On N(0, v I) the loss of -a x in 2-D has the slope 4 (a (v + sigma^2) - 1)."""
    x = math.sqrt(0.7) * normal(100000, 2, seed=1)
    model = Slopes(factor / (0.7 + sigma**2))
    ncsn = homework.NoiseConditionedScoreNetwork(model, (2,), [sigma]).double()
    ncsn.loss(x)["total_loss"].backward()
    slope = model.slopes.grad.item()
    assert slope == pytest.approx(4 * (factor - 1), abs=0.03 / min(sigma, 1))
    assert slope * (factor - 1) > 0


@pytest.mark.parametrize("sigma_max, eps, arrives", [(1.0, None, True), (30.0, None, True),
                                                     (1.0, 0.1, True), (30.0, 0.1, False)])
def test_ncsn_mnist_8_4_variance_of_annealed_langevin(homework, sigma_max, eps, arrives):
    """That of the recursion; 001's eps = 0.1 arrives at N(0, v) for sigma_max near 1 only."""
    v, sigmas = 0.5, np.geomspace(0.1, sigma_max, 20)

    def exact_score(x, y):
        return -x / (v + ncsn.sigmas[y].square()[:, None])

    ncsn = homework.NoiseConditionedScoreNetwork(exact_score, (1,), sigmas)
    u = sigma_max**2
    for sigma in sigmas[::-1]:
        eta = 0.8 * sigma**2 if eps is None else eps * (sigma / sigma_max) ** 2
        for _ in range(50):
            u = (1 - eta / (2 * (v + sigma**2))) ** 2 * u + eta
    x = ncsn.sample(5000, 50, eps).double()
    within(x, 0.0)
    within(x.square(), u)
    assert u == pytest.approx(v + 0.1**2, rel=0.06) if arrives else u > 100 * v


def test_ncsn_mnist_one_langevin_step_of_the_class(homework):
    """It is x + eta/2 s + sqrt(eta) z; the start is N(0, sigma_max^2 I)."""
    def score_model(x, y):
        return 7 - x

    x = normal(5, 2)
    ncsn = homework.NoiseConditionedScoreNetwork(score_model, (2,), [0.4])
    torch.manual_seed(2)
    step = x + 0.15 * (7 - x) + math.sqrt(0.3) * normal(5, 2, seed=2)
    close(ncsn.annealed_langevin_dynamics(x, 1, 0.3), step)
    torch.manual_seed(3)
    start = 0.4 * torch.randn(5, 2, generator=generator(3))
    close(ncsn.sample(5, num_steps=0), start)
    torch.manual_seed(3)
    own_step = ncsn.sample(5, num_steps=1)   # eta = 0.8 sigma_max^2
    torch.manual_seed(3)
    close(own_step, ncsn.sample(5, num_steps=1, eps=0.8 * 0.4**2), rtol=1e-5, atol=1e-6)
    assert (own_step - ncsn.sample(5, num_steps=1, eps=1.0 * 0.4**2)).abs().max() > 0.1


def test_ncsn_mnist_sample_has_the_homeworks_defaults(homework):
    """64 samples, 100 steps at each level from the largest down, and nothing behind them."""
    seen = []

    def score_model(x, y):
        seen.append(y.tolist())
        return -x

    ncsn = homework.NoiseConditionedScoreNetwork(score_model, (2,), [0.1, 1.0, 0.3])
    assert ncsn.sample().shape == (64, 2)
    assert seen == 100 * [64 * [0]] + 100 * [64 * [1]] + 100 * [64 * [2]]


# %% ncsn_mnist.py: networks
def randomised(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.double()


def standardised(x, dims):
    return (x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True, correction=0)


def silu(x):
    return x / (1 + torch.exp(-x))


def convolved(x, layer):
    return torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)


def test_ncsn_mnist_block_scales_and_shifts_by_its_level(homework):
    block = randomised(homework.ConditionedResnetBlock(4, 3))
    x, y = normal(5, 4, 6, 6), torch.tensor([0, 1, 2, 0, 1])

    def normalised(h, norm):
        weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
        return weight * standardised(h, (1, 2, 3)) + bias

    film = block.embedding.weight[y][:, :, None, None]
    h = convolved(silu(normalised(x, block.norm1)), block.conv1)
    h = normalised(h, block.norm2) * (1 + film[:, :4]) + film[:, 4:]
    close(block(x, y), x + convolved(silu(h), block.conv2), rtol=1e-3, atol=1e-3)


def test_ncsn_mnist_block_of_the_unet(ncsn_mnist):
    block = randomised(ncsn_mnist.ResBlock(4, 3))
    x, embedding = normal(5, 4, 6, 6), normal(5, 3)
    h = convolved(silu(block.norm1(x, embedding)), block.conv1)
    h = convolved(silu(block.norm2(h, embedding)), block.conv2)
    close(block(x, embedding), x + h)


def test_ncsn_mnist_instance_norm(ncsn_mnist):
    """Mean 0 and variance 1 in every channel of every image, then the embedding's FiLM."""
    norm = ncsn_mnist.ConditionalInstanceNorm2d(4, 6).double()
    x, embedding = 3 + 5 * normal(7, 4, 8, 8), normal(7, 6)
    plain = standardised(x, (2, 3))
    close(norm(x, embedding), plain, rtol=0, atol=1e-5)   # a fresh one has scale 1, shift 0
    film = (embedding @ randomised(norm).film.weight.T + norm.film.bias)[:, :, None, None]
    close(norm(x, embedding), film[:, :4] * plain + film[:, 4:], rtol=0, atol=1e-4)


def network(script, kind, filters=8, blocks=4, sigmas=(3.0, 1.0, 0.1)):
    if kind == "unet":
        return script.UNet(1, filters, blocks, torch.tensor(sigmas))
    return script.ConditionedSimpleResnet(1, 1, filters, blocks, len(sigmas))


NETWORKS = ["resnet", "unet"]


@pytest.mark.parametrize("kind", NETWORKS)
def test_ncsn_mnist_fresh_network_changes_little(ncsn_mnist, kind):
    """The last convolution of each block and of the network has a tenth of the usual weights."""
    net = network(ncsn_mnist, kind)
    small = 0
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            inputs = layer.weight[0].numel()
            size = layer.weight.std().item() * math.sqrt(3 * inputs)   # the usual one: 1
            if name.endswith(("conv2", "last_block")):
                assert size == pytest.approx(0.1, rel=0.15) and not layer.bias.any()
                small += 1
            else:
                assert size == pytest.approx(1, rel=0.15) and layer.bias.any()
    assert small == 5


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("blocks, outer", [(1, 0), (4, 1), (9, 2)])
def test_ncsn_mnist_network_has_its_blocks(ncsn_mnist, kind, blocks, outer):
    """As many before and behind those that work at a quarter of the resolution."""
    net = network(ncsn_mnist, kind, blocks=blocks)
    sizes = [len(net.blocks_14_down), len(net.blocks_7), len(net.blocks_14_up)]
    assert sizes == [outer, blocks - 2 * outer, outer]


def test_ncsn_mnist_network_takes_other_channels_and_sizes(homework):
    net = homework.ConditionedSimpleResnet(3, 2, 8, 5, 5)
    assert net(torch.rand(6, 3, 8, 12), torch.arange(6) % 5).shape == (6, 2, 8, 12)


def recorded(net, *inputs):
    """name -> (input, output) of each part of a network in one call of it."""
    seen = {}

    def keep(name, part, part_inputs, output):
        seen[name] = (part_inputs[0].detach(), output.detach())

    for name, part in net.named_modules():
        part.register_forward_hook(partial(keep, name))
    net(*inputs)
    return seen


def apart(x):
    """The four pixels of each 2x2 square as channels, (B, 1, H, W) -> (B, 4, H/2, W/2)."""
    corners = [x[:, :, i::2, j::2] for i in range(2) for j in range(2)]
    return torch.cat(corners, dim=1)


def together(x):
    """The opposite, (B, 4 C, H, W) -> (B, C, 2 H, 2 W)."""
    batch, channels, height, width = x.shape
    squares = x.view(batch, channels // 4, 2, 2, height, width)
    return squares.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // 4, 2 * height, 2 * width)


@pytest.mark.parametrize("kind", NETWORKS)
def test_ncsn_mnist_network_joins_two_resolutions(ncsn_mnist, kind):
    """What is found at a quarter of the resolution joins what was found at half of it."""
    net = network(ncsn_mnist, kind)
    x = torch.randn(5, 1, 12, 8)
    seen = recorded(net, x, torch.tensor([0, 1, 2, 0, 1]))
    fine, coarse = seen["blocks_14_down.0"][1], together(seen["up"][1])
    pairs = [(seen["first_block"][0], apart(x)),
             (seen["blocks_14_down.0"][0], seen["first_block"][1]),
             (seen["down"][0], fine), (seen["blocks_7.0"][0], seen["down"][1]),
             (seen["blocks_7.1"][0], seen["blocks_7.0"][1]),
             (seen["up"][0], seen["blocks_7.1"][1]),
             (seen["last_norm"][0], seen["blocks_14_up.0"][1]),
             (seen["last_block"][0], silu(seen["last_norm"][1])),
             (seen[""][1], together(seen["last_block"][1]))]
    if kind == "unet":
        pairs.append((seen["merge"][0], torch.cat([fine, coarse], dim=1)))
        pairs.append((seen["blocks_14_up.0"][0], seen["merge"][1]))
    else:
        pairs.append((seen["blocks_14_up.0"][0], fine + coarse))
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected)
    assert seen["down"][1].shape == (5, 16, 3, 2)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("size", [8, 28])
def test_ncsn_mnist_conditioning_matters(ncsn_mnist, kind, size):
    """Both networks learn to answer each level in its own way, image by image."""
    levels = torch.tensor([3.0, 1.0, 0.1])
    net = network(ncsn_mnist, kind)
    x, y = torch.randn(1, 1, size, size).expand(3, -1, -1, -1), torch.arange(3)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(8):
        optimizer.zero_grad()
        (net(x, y) - levels.log()[:, None, None, None]).square().mean().backward()
        optimizer.step()
    answer = net(x, y)
    assert answer.shape == (3, 1, size, size)
    assert pdist(answer.detach().flatten(1)).min() > 0.01 * size
    close(net(x, y.flip(0)), answer.flip(0), rtol=1e-3, atol=1e-4)


def test_ncsn_mnist_fresh_embeddings_of_neighbours_are_alike(homework):
    """Of 32 levels each differs from all others, the more the farther it is, and not by much."""
    weight = homework.ConditionedResnetBlock(64, 32).embedding.weight.detach()
    assert weight.shape == (32, 128)
    assert weight.std().item() == pytest.approx(0.2, rel=0.3)
    distances = torch.cdist(weight, weight)
    assert pdist(weight).min() > 0.1
    near, far = distances.diagonal(1).mean(), distances.diagonal(20).mean()
    assert near < far / 3


def test_ncsn_mnist_unet_separates_levels(ncsn_mnist):
    """Levels that 003's sin(2^k pi sigma) takes for one another differ; neighbours are alike."""
    waves = network(ncsn_mnist, "unet", sigmas=[2.0, 4.0, 10.0, 1.0, 1.05]).waves
    assert waves.shape == (5, 32)
    assert pdist(waves[:3]).min() > 0.5 and pdist(waves[3:]).max() < 0.3


class Recorder(torch.nn.Module):
    """A 1x1 convolution with the factor 2 that keeps its inputs and its answer."""
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1, bias=False)
        torch.nn.init.constant_(self.layer.weight, 2.0)

    def forward(self, x, y, label):
        answer = self.layer(x)
        self.seen = x, y, answer
        return answer


@pytest.mark.parametrize("bf16", [False, True])
def test_ncsn_mnist_7_1_model_is_preconditioned(homework, bf16):
    """score = (D - x)/sigma^2 with the D of Karras et al. 2022; the net sees unit variance."""
    sigmas, mean, d = torch.tensor([10.0, 0.6, 0.02]), torch.tensor(-0.4), torch.tensor(0.75)
    y = torch.arange(3).repeat(2000)
    sigma = sigmas[y][:, None, None, None]
    x = mean + d * torch.randn(6000, 1, 4, 4) + sigma * torch.randn(6000, 1, 4, 4)
    module = homework.PreconditionedScore(Recorder(), sigmas, mean, d, bf16)
    s = module.requires_grad_(False)(x, y)
    inputs, index, answer = module.net.seen
    assert s.dtype == torch.float32 and torch.equal(index, y)
    assert answer.dtype == (torch.bfloat16 if bf16 else torch.float32)
    total = sigma**2 + d**2
    D = mean + d**2 / total * (x - mean) + sigma * d / total.sqrt() * answer.float()
    torch.testing.assert_close(sigma**2 * s, D - x, rtol=1e-4, atol=1e-5)
    for t in range(3):
        within(inputs[y == t].square().mean((1, 2, 3)), 1.0)


def test_ncsn_mnist_loss_of_the_first_guess_is_1_at_every_level(ncsn_mnist):
    """With the script's weights the target of the net's own answer has unit variance."""
    script = ncsn_mnist
    net = Recorder()
    torch.nn.init.zeros_(net.layer.weight)
    model = script.PreconditionedScore(net, script.sigmas, script.mean, script.sigma_data)
    ncsn = script.NoiseConditionedScoreNetwork(model, script.input_shape, script.levels,
                                               script.weights)
    x = script.mean + script.sigma_data * torch.randn(6000, *script.input_shape)
    values = ncsn(x).detach().sum((1, 2, 3))
    for t in range(script.args.T):
        within(values[net.seen[1] == t], 1.0)
    assert torch.equal(script.model.weights, script.weights)


def test_ncsn_mnist_levels_are_drawn_around_09(ncsn_mnist):
    """log sigma is normal about log 0.9, with the width 1.2."""
    log_sigma = torch.tensor(ncsn_mnist.levels).log()
    normal_law = torch.distributions.Normal(math.log(0.9), 1.2)
    share = normal_law.log_prob(log_sigma).exp()
    close(ncsn_mnist.model.probs / ncsn_mnist.model.probs.sum(), share / share.sum(), rtol=1e-4)
    assert ncsn_mnist.levels[ncsn_mnist.probs.argmax()] == pytest.approx(0.83, abs=0.01)


def test_ncsn_mnist_levels_are_geometric(ncsn_mnist):
    assert ncsn_mnist.levels == pytest.approx([10 * 500 ** (-t / 5) for t in range(6)])
    torch.testing.assert_close(ncsn_mnist.sigmas, torch.tensor(ncsn_mnist.levels))


# %% ncsn_mnist.py: training
@pytest.mark.parametrize("fixture", ["ncsn_mnist", "unet"])
def test_ncsn_mnist_muon_trains_the_inner_convolutions_and_adamw_the_rest(fixture, request):
    """Each parameter is trained by one of them; all convolutions but first and last by Muon."""
    script = request.getfixturevalue(fixture)
    net = script.score_model.net
    inner = [part for part in net.modules() if isinstance(part, torch.nn.Conv2d)
             and part is not net.first_block and part is not net.last_block]

    def addresses(parameters):
        return sorted(id(parameter) for parameter in parameters)

    by_muon = script.muon.param_groups[0]["params"]
    by_adamw = script.adamw.param_groups[0]["params"]
    assert addresses(by_muon) == addresses(part.weight for part in inner)
    assert addresses(by_muon + by_adamw) == addresses(script.model.parameters())
    assert isinstance(script.muon, script.Muon) and isinstance(script.adamw, torch.optim.AdamW)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (12, 12)])
def test_ncsn_mnist_orthogonalized_matrix(ncsn_mnist, shape):
    """The singular vectors stay, the singular values are drawn near 1."""
    matrix = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    drawn = left.T @ ncsn_mnist.orthogonalized(1000 * matrix) @ right.T
    assert 0.6 < drawn.diagonal().min() and drawn.diagonal().max() < 1.25
    torch.testing.assert_close(drawn, drawn.diagonal().diag(), rtol=0, atol=1e-3)
    with mock.patch.dict(ncsn_mnist.generate.__globals__, bf16=True):
        again = ncsn_mnist.orthogonalized(matrix)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, left @ drawn @ right, rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (40, 4, 3, 3), (40, 8, 1, 1)])
def test_ncsn_mnist_muon_is_that_of_torch(ncsn_mnist, shape):
    """With kernels taken as matrices, and to the accuracy of bfloat16, in which torch computes."""
    start = torch.randn(shape)
    ours = start.clone().to(memory_format=torch.channels_last).requires_grad_()
    theirs = start.flatten(1).clone().requires_grad_()
    optimizers = [ncsn_mnist.Muon([ours], 0.1), torch.optim.Muon([theirs], 0.1, weight_decay=0)]
    for _ in range(4):
        ours.grad = torch.randn(shape).to(memory_format=torch.channels_last)
        theirs.grad = ours.grad.flatten(1).clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start.flatten(1)).detach().square().mean().sqrt()
    error = (theirs - ours.flatten(1)).detach().square().mean().sqrt()
    assert error < 0.03 * moved


def test_ncsn_mnist_rate_rises_over_3_percent_and_falls_along_half_a_cosine(ncsn_mnist):
    progress = np.linspace(0, 1, 1001)
    rates = np.array([ncsn_mnist.rate(p) for p in progress])
    cosine = np.cos(np.pi * progress / 2) ** 2
    assert rates[30:] == pytest.approx(cosine[30:], abs=1e-12)
    assert rates[:30] == pytest.approx((cosine * progress / 0.03)[:30])


def test_ncsn_mnist_both_optimizers_follow_the_rate(ncsn_mnist):
    """The last of 12 steps is at progress 11.5/12."""
    last = math.cos(math.pi / 2 * 11.5 / 12) ** 2
    assert ncsn_mnist.muon.param_groups[0]["lr"] == pytest.approx(0.02 * last)
    assert ncsn_mnist.adamw.param_groups[0]["lr"] == pytest.approx(0.003 * last)


def test_ncsn_mnist_weights_are_averaged(ncsn_mnist):
    """After 30 steps 1 % of the start is left; in the end the average is over 500 steps."""
    average = torch.zeros(())
    for n in range(1, 31):
        average = ncsn_mnist.moving_average(average, torch.ones(()), torch.tensor(n))
    assert average > 0.99
    step = ncsn_mnist.moving_average(torch.zeros(()), torch.ones(()), torch.tensor(10**6))
    assert 1 / step.item() == pytest.approx(500, rel=1e-3)
    assert ncsn_mnist.ema.n_averaged == 12
    exact = ncsn_mnist.moving_average(torch.tensor(4.0), torch.tensor(7.0), torch.tensor(2))
    assert exact.item() == pytest.approx((3 * 4 + 9 * 7) / 12)


def test_ncsn_mnist_training_step_is_one_of_each_optimizer(unet):
    """It moves all parameters, the average with them, and returns the loss before the step."""
    before = [parameter.clone() for parameter in unet.model.parameters()]
    unet.model.requires_grad_(True)
    torch.manual_seed(1)
    expected = unet.model.loss(unet.x_data[:50])["total_loss"].item()
    torch.manual_seed(1)
    assert unet.training_step(unet.x_data[:50], None, 0.5) == pytest.approx(expected)
    unet.model.requires_grad_(False)
    for old, new in zip(before, unet.model.parameters()):
        assert (old != new).any()
    assert unet.ema.n_averaged == 7


def test_ncsn_mnist_training_learns(ncsn_mnist, unet):
    """The loss begins at that of one Gaussian, 1, and falls."""
    for script, steps in [(ncsn_mnist, 12), (unet, 6)]:
        assert script.history["step"] == list(range(1, steps + 1))
        losses = script.history["held_out"]
        assert losses[0] == pytest.approx(1, abs=0.05) and losses[-1] < losses[0] - 0.01
        assert script.history["loss"][0] == pytest.approx(1, abs=0.1)


def test_ncsn_mnist_model_is_the_average_and_so_is_the_file(ncsn_mnist):
    saved = torch.load(Path(ncsn_mnist.args.outdir) / "model.pt", weights_only=True)
    average = ncsn_mnist.ema.module.state_dict()
    for name, value in ncsn_mnist.model.state_dict().items():
        assert torch.equal(value, average[name]) and torch.equal(value, saved[name]), name
    assert saved.keys() == average.keys()
    assert ncsn_mnist.held_out_loss(ncsn_mnist.model) == ncsn_mnist.history["held_out"][-1]


def test_ncsn_mnist_looking_does_not_change_the_training(ncsn_mnist):
    """The held-out loss leaves torch's generator, which the training uses, where it was."""
    state = torch.get_rng_state()
    first = ncsn_mnist.held_out_loss(ncsn_mnist.model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert ncsn_mnist.held_out_loss(ncsn_mnist.model) == first


def test_ncsn_mnist_an_epoch_shows_each_image_once_in_an_order_of_its_own():
    text = cells("ncsn_mnist", until="Sampling").replace(
        "loss = training_step(x,", "history.setdefault('x', []).append(x)\n"
        "        loss = training_step(x,")
    batches = torch.cat(execute("ncsn_mnist", text).history["x"]).view(2, 1500, 64)
    data = execute("ncsn_mnist", cells("ncsn_mnist", until="Model")).x_data.view(1500, 64)
    orders = torch.cdist(batches, data).argmin(2)
    for order in orders:
        assert torch.equal(data[order].sort(0).values, data.sort(0).values)
    assert (orders[0] != orders[1]).double().mean() > 0.99


# %% ncsn_mnist.py: stopping and going on
def after_step(n, action):
    """In this block a run does action(model) at the end of its n-th training step."""
    plain = torch.optim.swa_utils.AveragedModel.update_parameters
    models = []

    def update_parameters(self, model):
        plain(self, model)
        models.append(model)
        if len(models) == n:
            action(model)

    return mock.patch.object(torch.optim.swa_utils.AveragedModel, "update_parameters",
                             update_parameters)


def press_ctrl_c(model):
    raise KeyboardInterrupt


def fill_with_nan(model):
    next(model.parameters()).data.fill_(math.nan)


def same_run(script, other):
    """Asserts that two runs ended alike to the last bit: losses, weights, samples."""
    assert script.history == other.history and len(script.history["step"]) == 12
    first, second = contents(script.args.outdir), contents(other.args.outdir)
    assert first["samples.npy"] == second["samples.npy"]
    weights = [torch.load(io.BytesIO(files["model.pt"])) for files in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("n", [7, 9])   # the first step of the second epoch, and one within it
def test_ncsn_mnist_resume_ends_like_an_uninterrupted_run(ncsn_mnist, n, tmp_path, capsys):
    with after_step(n, press_ctrl_c):
        script = run("ncsn_mnist", until="Check", outdir=tmp_path)
    printed = capsys.readouterr().out
    assert f"Ctrl-C after {n - 1} of 12 steps" in printed
    assert f"the checkpoint of step {n - 1}" in printed
    assert np.load(tmp_path / "samples.npy").shape == OUTPUT["ncsn_mnist"][0]
    assert (script.samples != ncsn_mnist.samples).any()
    same_run(run("ncsn_mnist", "--resume", "Check", tmp_path), ncsn_mnist)


def test_ncsn_mnist_resume_of_a_finished_run(ncsn_mnist, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(contents(ncsn_mnist.args.outdir)["checkpoint.pt"])
    same_run(run("ncsn_mnist", "--resume", "Check", tmp_path), ncsn_mnist)


def test_ncsn_mnist_ctrl_c_writes_no_checkpoint_and_takes_the_average(tmp_path):
    """Of 83 steps every second one writes a checkpoint: in the fourth there is that of two."""
    with after_step(4, press_ctrl_c):
        script = run("ncsn_mnist", "--batch 18 --epochs 1", "Sampling", tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert script.steps_done == 3 and script.ema.n_averaged == 4
    average = script.ema.module.state_dict()
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    for name, value in script.model.state_dict().items():
        assert torch.equal(value, average[name]) and torch.equal(value, saved[name])


def test_ncsn_mnist_checkpoints_come_40_times_and_at_the_end(tmp_path):
    """Of 83 steps after every second one and the last."""
    script = run("ncsn_mnist", "--batch 18 --epochs 1", "Sampling", tmp_path)
    assert script.history["step"] == [*range(2, 83, 2), 83]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 83


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_ncsn_mnist_kill_in_the_middle_of_a_write(ncsn_mnist, tmp_path):
    """kill -9 with half of the fifth checkpoint written leaves the fourth, to go on from."""
    plain = torch.save
    files = []

    def save(state, file):
        plain(state, file)
        files.append(file)
        if len(files) == 5:
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        signal.alarm(60)   # a child that hangs ends, too
        try:
            with mock.patch("torch.save", save):
                run("ncsn_mnist", until="Sampling", outdir=tmp_path)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pt", "checkpoint.pt.new"]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
    with pytest.raises(Exception):
        torch.load(tmp_path / "checkpoint.pt.new", weights_only=True)
    same_run(run("ncsn_mnist", "--resume", "Check", tmp_path), ncsn_mnist)
    assert "checkpoint.pt.new" not in os.listdir(tmp_path)


def test_ncsn_mnist_loss_that_is_not_finite_stops_the_run(tmp_path):
    """One line names the step and a remedy; the last checkpoint stays."""
    message = "^the held-out loss is nan at step 5: .*--lr below 0.003 .*--lr_muon below 0.02$"
    with after_step(4, fill_with_nan), pytest.raises(SystemExit, match=message):
        run("ncsn_mnist", outdir=tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


def saved_weights(script, **changed):
    """What is in model.pt, but for some entries."""
    return torch.load(Path(script.args.outdir) / "model.pt", weights_only=True) | changed


def test_ncsn_mnist_sampler_that_leaves_the_finite_stops_the_run(ncsn_mnist, tmp_path):
    bias = {"score_model.net.last_block.bias": torch.full((4,), math.nan)}
    torch.save(saved_weights(ncsn_mnist, **bias), tmp_path / "nan.pt")
    with pytest.raises(SystemExit, match="^--sampler pc: pixels are not finite"):
        run("ncsn_mnist", f"--load {tmp_path}/nan.pt", outdir=tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_ncsn_mnist_load_samples_like_the_run_that_trained(ncsn_mnist, tmp_path):
    """--load writes samples and no weights; another sampler gives others."""
    flags = f"--load {ncsn_mnist.args.outdir}/model.pt"
    script = run("ncsn_mnist", flags, "Check", tmp_path)
    assert os.listdir(tmp_path) == ["samples.npy"] and script.history["step"] == []
    ours, theirs = contents(tmp_path), contents(ncsn_mnist.args.outdir)
    assert ours["samples.npy"] == theirs["samples.npy"]
    other = run("ncsn_mnist", flags + " --sampler ddim", "Check")
    assert (other.samples != ncsn_mnist.samples).any()


def test_ncsn_mnist_model_file_can_be_loaded_and_used(ncsn_mnist):
    script = ncsn_mnist
    net = script.ConditionedSimpleResnet(1, 1, 4, 4, 6)
    score_model = script.PreconditionedScore(net, script.sigmas, script.mean, script.sigma_data)
    model = script.NoiseConditionedScoreNetwork(score_model, (1, 8, 8), script.levels)
    model.load_state_dict(saved_weights(script))
    x = torch.randn(5, 1, 8, 8)
    close(model.score_model(x, torch.full((5,), 2)).detach(), script.score(x, script.levels[2]),
          rtol=1e-4, atol=1e-4)
    assert model.sample(3, num_steps=1).shape == (3, 1, 8, 8)


def refused(flag, flags, outdir, capsys):
    """The one line, about `flag`, in which a run ends; outdir is as it was."""
    before = contents(outdir)
    with pytest.raises(SystemExit) as stop:
        run("ncsn_mnist", flags, "Sampling", outdir)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"ncsn_mnist.py: error: argument {flag}: ")
    assert stop.value.code == 2 and contents(outdir) == before
    return line


@pytest.mark.parametrize("flags, reason", [
    ("--lr 0.001", "--lr 0.003, this one 0.001"), ("--net unet", "--net resnet, this one unet"),
    ("--seed 1", "--seed 0, this one 1"), ("--T 7", "--T 6, this one 7"),
    ("--epochs 3", "--epochs 2, this one 3"), ("--filters 8", "--filters 4, this one 8"),
    ("--sigma_max 5", "--sigma_max 10, this one 5"), ("--batch 100", "--batch 250, this one 100"),
    ("--blocks 1", "--blocks 4, this one 1"), ("--lr_muon 0.1", "--lr_muon 0.02, this one 0.1"),
    ("--labels", "--labels False, this one True")])
def test_ncsn_mnist_resume_with_other_settings(ncsn_mnist, flags, reason, capsys):
    """--resume goes on with the run's own settings only, and names the one that differs."""
    assert reason in refused("--resume", "--resume " + flags, ncsn_mnist.args.outdir, capsys)


def test_ncsn_mnist_resume_or_load(ncsn_mnist, capsys):
    """A run either goes on or takes finished weights."""
    line = refused("--load", "--resume --load x", ncsn_mnist.args.outdir, capsys)
    assert "not allowed with argument --resume" in line


def broken(kind, name, script, path):
    """Writes at path what is left of a file of a run."""
    if kind == "truncated":
        path.write_bytes(contents(script.args.outdir)[name][:-2000])
    elif kind == "text":
        path.write_text("not weights\nat all")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "list", "empty"])
def test_ncsn_mnist_broken_files(ncsn_mnist, kind, tmp_path, capsys):
    """Half a file or none: one line with the path, and what is there stays for another look."""
    broken(kind, "checkpoint.pt", ncsn_mnist, tmp_path / "checkpoint.pt")
    assert "checkpoint.pt" in refused("--resume", "--resume", tmp_path, capsys)
    broken(kind, "model.pt", ncsn_mnist, tmp_path / "model.pt")
    assert "model.pt" in refused("--load", f"--load {tmp_path}/model.pt", tmp_path, capsys)


@pytest.mark.parametrize("flags", ["--net unet", "--filters 8", "--blocks 5", "--T 7",
                                   "--sigma_max 5", "--sigma_min 0.05"])
def test_ncsn_mnist_load_of_another_network(ncsn_mnist, flags, capsys):
    """Weights of another network or of other levels are refused, and so is a checkpoint."""
    outdir = ncsn_mnist.args.outdir
    assert "model.pt" in refused("--load", f"--load {outdir}/model.pt {flags}", outdir, capsys)
    assert "checkpoint.pt" in refused("--load", f"--load {outdir}/checkpoint.pt", outdir, capsys)


def test_ncsn_mnist_load_of_a_network_for_other_data(ncsn_mnist, tmp_path, capsys):
    """MNIST's mean is -0.74, that of the digits -0.39."""
    weights = saved_weights(ncsn_mnist, **{"score_model.mean": torch.tensor(-0.74)})
    torch.save(weights, tmp_path / "mnist.pt")
    line = refused("--load", f"--load {tmp_path}/mnist.pt", tmp_path, capsys)
    assert "other --data" in line


# %% ncsn_mnist.py: sampling; for data N(0, v) the exact score -x/(sigma^2 + v)
def test_ncsn_mnist_score_is_that_of_the_nearest_level(ncsn_mnist):
    x, levels = torch.randn(4, *ncsn_mnist.input_shape), ncsn_mnist.levels
    for t, share, nearest in [(0, 0, 0), (0, 0.4, 0), (2, 0.6, 3), (4, 1, 5)]:
        sigma = levels[t] ** (1 - share) * levels[t + 1] ** share
        expected = ncsn_mnist.score_model(x, torch.full((4,), nearest))
        torch.testing.assert_close(ncsn_mnist.score(x, sigma), expected)
    assert not ncsn_mnist.score(x, 1.0).requires_grad
    for wrong in [1.01 * levels[0], 0.99 * levels[-1], 0.0, -1.0, math.nan]:
        with pytest.raises(ValueError, match="not between 10 and 0.02|not between 0.02 and 10"):
            ncsn_mnist.score(x, wrong)


def mixed_in_1d(x, sigma):
    """A score that is not linear."""
    return (torch.tanh(x) - x) / (1 + sigma**2)


def expected_variances(name, u, sigmas, v, kappa, K):
    """Those of the states of a sampler that starts with the variance u."""
    variances = []
    if name == "ald":
        for sigma in sigmas:
            u = after_langevin(u, sigma, v, kappa, K)
            variances.append(u)
        return variances + [u * (v / (sigmas[-1] ** 2 + v)) ** 2]
    variances.append(u)
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        if name == "pc":
            u = after_langevin(u, sigma, v, kappa, 1)
        u = after_rho(u, sigma, sigma_next, v, 1 if name == "ddim" else sigma_next / sigma)
        variances.append(u)
    if name == "pc":
        u = after_langevin(u, sigmas[-1], v, kappa, 1)
    return variances + [u * (v / (sigmas[-1] ** 2 + v)) ** 2]


@pytest.mark.parametrize("v", [0, 0.3, 2])
@pytest.mark.parametrize("name", ["ald", "pc", "ancestral", "ddim"])
def test_ncsn_mnist_7_3_sampler_variances(ncsn_mnist, name, v):
    """Every state has the variance that theory.md 7 and 8 predict; a point (v = 0) is found."""
    sigmas = [3.0, 2.0, 1.0, 0.6, 0.2]
    x = 4 * normal(20000, 1, seed=1)   # not the numbers that the sampler draws
    path = ncsn_mnist.run_sampler(name, gaussian(v), x, sigmas)
    variances = [state.square().mean().item() for state in path]
    args = ncsn_mnist.args
    expected = expected_variances(name, 16.0, sigmas, v, args.kappa, args.K)
    assert variances == pytest.approx(expected, rel=0.04, abs=1e-20)   # 4 SE = 4 sqrt(2/20000)


def test_ncsn_mnist_8_4_ald_is_the_homeworks_and_a_denoising_step(ncsn_mnist):
    """The class's method with eps = 2 kappa sigma_max^2 ends where the script's is before that."""
    sigmas, x = [3.0, 2.0, 0.6], normal(50, 1)

    def by_index(x, y):
        return mixed_in_1d(x, sigmas[y[0].item()])

    model = ncsn_mnist.NoiseConditionedScoreNetwork(by_index, (1,), sigmas)
    args = ncsn_mnist.args
    torch.manual_seed(1)
    end = model.annealed_langevin_dynamics(x, args.K, 2 * args.kappa * 3.0**2)
    torch.manual_seed(1)
    path = ncsn_mnist.run_sampler("ald", mixed_in_1d, x, sigmas)
    close(path[-2], end, rtol=1e-5, atol=1e-5)
    close(path[-1], ncsn_mnist.denoise(mixed_in_1d, end, 0.6), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ddim", [False, True])
def test_ncsn_mnist_7_3_ancestral_step(ncsn_mnist, ddim):
    """DDPM's in the form of Song et al. 2021, appendix F; DDIM's is Euler's for the flow."""
    x, a, b = normal(30, 2), 2.0, 1.2
    torch.manual_seed(1)
    z = torch.randn_like(x)
    expected = x + (a**2 - b**2) * mixed(x, a) + math.sqrt(b**2 * (a**2 - b**2) / a**2) * z
    if ddim:
        expected = x + (b - a) * -a * mixed(x, a)
    torch.manual_seed(1)
    close(ncsn_mnist.ancestral_step(mixed, x, a, b, ddim), expected)


def test_ncsn_mnist_4_2_denoising_is_tweedies(ncsn_mnist):
    """For data N(0, v) the mean of the clean x is v/(v + sigma^2) of the noisy one."""
    x = normal(30, 2)
    close(ncsn_mnist.denoise(gaussian(0.5), x, 1.5), 0.5 / (0.5 + 1.5**2) * x)


@pytest.mark.parametrize("name", ["ald", "pc", "ancestral", "ddim"])
def test_ncsn_mnist_calls_of_the_samplers_are_as_printed(ncsn_mnist, name):
    """Descending through all levels; the images keep their shape."""
    seen = []

    def keep(module, inputs, output):
        seen.append(inputs[1][0].item())

    with ncsn_mnist.score_model.register_forward_hook(keep):
        x = ncsn_mnist.generate(name, ncsn_mnist.start[:2], ncsn_mnist.levels)
    assert len(seen) == ncsn_mnist.calls[name] and x.shape == (2, 1, 8, 8)
    assert sorted(set(seen)) == list(range(6)) and seen == sorted(seen)


def test_ncsn_mnist_generate_keeps_the_order_of_the_images(ncsn_mnist):
    """Also in pieces of 250; it starts at the first of the levels that it is given."""
    x, levels = torch.randn(300, 1, 8, 8), ncsn_mnist.levels[2:]
    with mock.patch.dict(ncsn_mnist.generate.__globals__, score=gaussian(0.5)):
        images = ncsn_mnist.generate("ddim", x, levels)
    factor = 1.0
    for sigma, sigma_next in zip(levels, [*levels[1:], 0.0]):
        D = 0.5 / (0.5 + sigma**2)
        factor *= D + sigma_next / sigma * (1 - D)
    torch.testing.assert_close(images, factor * x, rtol=1e-4, atol=1e-5)


def test_ncsn_mnist_start_has_the_moments_of_the_noisy_data(ncsn_mnist):
    x = ncsn_mnist.start.flatten().double()
    within(x, ncsn_mnist.x_data.mean().double())
    variance = 10**2 + ncsn_mnist.x_data.double().var()
    within((x - ncsn_mnist.x_data.mean()).square(), variance)
    spread = (ncsn_mnist.start - ncsn_mnist.mean) / ncsn_mnist.start_noise
    torch.testing.assert_close(spread, torch.full_like(spread, variance.sqrt()), rtol=1e-3, atol=0)


def test_ncsn_mnist_samples_are_those_of_the_sampler(ncsn_mnist):
    torch.manual_seed(1)
    torch.randn(24, 1, 8, 8)   # the start
    samples = ncsn_mnist.generate("pc", ncsn_mnist.start, ncsn_mnist.levels).clamp(-1, 1)
    close(ncsn_mnist.samples, samples, rtol=0, atol=0)
    saved = np.load(Path(ncsn_mnist.args.outdir) / "samples.npy")
    assert (saved == ncsn_mnist.samples.numpy()).all()


# %% ncsn_mnist.py: checks, pictures, extras
def test_ncsn_mnist_linear_losses_are_those_of_one_gaussian(ncsn_mnist):
    """Its score at sigma is -P (x - mean), P = (C + sigma^2 I)^-1; the mean over eps is exact."""
    script = ncsn_mnist
    x, train = script.x_test[:250].flatten(1).double(), script.x_data.flatten(1).double()
    one = torch.eye(64).double()
    expected = []
    for sigma in script.levels:
        P = torch.linalg.inv(torch.cov(train.T) + sigma**2 * one)
        # sigma s + eps = -sigma P (x - mean) + (1 - sigma^2 P) eps
        bias = (sigma * (x - train.mean(0)) @ P).square().sum(1).mean()
        noise = (one - sigma**2 * P).square().sum()
        expected.append((bias + noise).item() / 2)
    assert script.linear == pytest.approx(expected, rel=1e-3)


def test_ncsn_mnist_network_losses_are_those_of_its_score(ncsn_mnist):
    """The script has one draw of the noise, within 4 deviations of the mean of ten others."""
    x = ncsn_mnist.x_test[:250]
    for t, sigma in enumerate(ncsn_mnist.levels):
        losses = []
        for i in range(10):
            eps = normal(250, 1, 8, 8, seed=100 * t + i).float()
            error = ncsn_mnist.score(x + sigma * eps, sigma) + eps / sigma
            losses.append(sigma**2 / 2 * error.square().sum().item() / 250)
        spread = np.std(losses, ddof=1) * math.sqrt(1 + 1 / 10)
        assert ncsn_mnist.learned[t] == pytest.approx(np.mean(losses), abs=4 * spread)


def test_ncsn_mnist_network_losses_of_the_exact_score(ncsn_mnist):
    """On N(0, v I) the loss at sigma is d/2 v/(v + sigma^2)."""
    x = math.sqrt(0.5) * torch.randn(4000, 1, 4, 4)
    with mock.patch.dict(ncsn_mnist.generate.__globals__, score=gaussians(0.5, 0.5)):
        losses = ncsn_mnist.network_losses(x)
    expected = [8 * 0.5 / (0.5 + sigma**2) for sigma in ncsn_mnist.levels]
    assert losses == pytest.approx(expected, rel=0.04)


def test_ncsn_mnist_nearest_images(ncsn_mnist):
    """Those of a search by brute force; a copy has the distance 0."""
    x, data = ncsn_mnist.samples[:5], ncsn_mnist.x_data
    distances = (x[:, None] - data[None]).flatten(2).norm(dim=2).sort(dim=1)
    values, numbers = ncsn_mnist.nearest(x, 3)
    torch.testing.assert_close(values, distances.values[:, :3], rtol=1e-3, atol=1e-3)
    assert torch.equal(numbers, distances.indices[:, :3])
    values, numbers = ncsn_mnist.nearest(data[7:9])
    assert numbers.flatten().tolist() == [7, 8] and values.max() < 0.01


def rows_below(printed, header):
    """The numbers of the printed rows between a header and the next line that has words."""
    numbers = []
    for line in printed.partition(header + "\n")[2].splitlines():
        if re.search("[a-z]{3}", line):
            break
        numbers.append([float(word) for word in line.split()])
    return numbers


def test_ncsn_mnist_printed_figures(ncsn_mnist):
    script = ncsn_mnist
    printed = np.array(rows_below(script.printed, " sigma    network    linear"))
    measured = np.stack([script.levels, script.learned, script.linear], axis=1)
    assert printed == pytest.approx(measured, rel=0.005, abs=0.006)
    medians = []
    for x in [script.samples, script.x_test[:200]]:
        distances = (x[:, None] - script.x_data[None]).flatten(2).norm(dim=2)
        medians.append(distances.amin(1).median().item())
    figures = script.summary
    assert [figures["nn_samples"], figures["nn_real"]] == pytest.approx(medians, abs=0.02)
    assert f"samples {medians[0]:.2f}, held-out images {medians[1]:.2f}" in script.printed
    ratio = scipy.stats.gmean(script.learned / script.linear)
    assert figures["loss_vs_linear"] == pytest.approx(ratio, rel=1e-3)
    assert figures["epochs"] == 2 and figures["calls"] == 12 and figures["sampler"] == "pc"
    summary = json.loads(contents(script.args.outdir)["summary.json"])
    assert summary["levels"] == script.levels and summary["settings"]["data"] == "digits"
    assert summary["network"] == pytest.approx(script.learned)
    assert summary["linear"] == pytest.approx(script.linear)


def test_ncsn_mnist_sheet_has_each_image_in_its_place(ncsn_mnist):
    images = 4 * torch.rand(2, 3, 1, 8, 8) - 2
    ax = plt.figure().subplots()
    ncsn_mnist.draw_images(ax, images, "title", ["a", "b", "c"], ["d", "e"])
    sheet = torch.tensor(ax.images[0].get_array())
    for row in range(2):
        for column in range(3):
            place = sheet[9 * row:9 * row + 8, 9 * column:9 * column + 8]
            assert torch.equal(place, images[row, column, 0].clamp(-1, 1))
    assert ax.images[0].get_clim() == (-1, 1)
    assert ax.get_xticks().tolist() == [4.5, 13.5, 22.5] and ax.get_yticks().tolist() == [4.5, 13.5]
    labels = [label.get_text() for label in ax.get_xticklabels() + ax.get_yticklabels()]
    assert labels == ["a", "b", "c", "d", "e"]
    plt.close("all")


def test_ncsn_mnist_path_is_as_bright_as_digits(ncsn_mnist):
    """Where sigma > 1 it is shown in units of sigma; 7 states."""
    torch.testing.assert_close(ncsn_mnist.path[0], ncsn_mnist.start[:24] / 10)
    assert len(ncsn_mnist.path) == 7


def test_ncsn_mnist_movie_of_mnist_is_small(ncsn_mnist, tmp_path):
    """With 28x28 pixels and the noise of the default levels it has at most 1.5 MB."""
    digits = torch.nn.functional.interpolate(ncsn_mnist.x_test[:24], 28)
    levels = np.geomspace(10, 0.02, 32).tolist()
    path = [(digits + sigma * torch.randn_like(digits)) / max(1, sigma) for sigma in levels]
    names = dict(ncsn_mnist.generate.__globals__)
    names |= {"path": path + [digits], "all_levels": levels + [0.0],
              "args": SimpleNamespace(T=32, outdir=tmp_path)}
    text = "frames = " + cells("ncsn_mnist").partition("\nframes = ")[2].partition("\n\n")[0]
    exec(text, names)
    size = os.path.getsize(tmp_path / "annealing.gif")
    assert 1e5 < size <= 1.5e6


def test_ncsn_mnist_extra_compares_all_samplers(ncsn_mnist):
    """From the same noise, each with its calls."""
    script = ncsn_mnist
    text = cells("ncsn_mnist").partition("\n# %% Extra: which sampler?\n")[2]
    names = dict(script.generate.__globals__)
    exec(text.partition("fig, ax")[0], names)
    assert names["row_names"] == ["ancestral, 6", "ddim, 6", "ald, 31", "pc, 12"]
    ddim = script.run_sampler("ddim", script.score, script.start[:20], script.levels)
    torch.testing.assert_close(names["rows"][1], ddim[-1])


def test_ncsn_mnist_extra_shows_the_nearest_images(ncsn_mnist):
    distances = (ncsn_mnist.samples[:10, None] - ncsn_mnist.x_data[None]).flatten(2).norm(dim=2)
    expected = ncsn_mnist.x_data[distances.argsort(1)[:, :3]]
    torch.testing.assert_close(ncsn_mnist.relatives, expected.transpose(0, 1))


def test_ncsn_mnist_extra_goes_there_and_back(ncsn_mnist):
    """Real digits at the ends; from little noise the same digit comes back, from much another."""
    digits, rows = ncsn_mnist.digits, ncsn_mnist.rows
    for i in range(2):
        assert rows[i].shape == (10, 1, 8, 8)
        assert torch.equal(rows[i][[0, -1]], digits[2 * i:2 * i + 2])
    assert ncsn_mnist.middle == 2   # 0.83
    changes = [(column - digits[:2]).std().item() for column in ncsn_mnist.columns]
    assert len(changes) == 10 and changes[0] == 0 and ncsn_mnist.column_names[0] == "real"
    assert changes[1] < 0.15 and changes[1] < changes[-1] / 3


def angle(x, y):
    return torch.acos((x * y).sum() / (x.norm() * y.norm()))


def test_ncsn_mnist_slerp(ncsn_mnist):
    """From a to b on an arc of the whole image; parallel noise does not divide by 0."""
    a, b = normal(1, 8, 8), normal(1, 8, 8, seed=1)
    b *= a.norm() / b.norm()
    close(ncsn_mnist.slerp(a, b, 0.0), a)
    close(ncsn_mnist.slerp(a, b, 1.0), b)
    for w in [0.2, 0.5, 0.9]:
        x = ncsn_mnist.slerp(a, b, w)
        close(x.norm(), a.norm())
        close(angle(a, x), w * angle(a, b))
        close(angle(x, b), (1 - w) * angle(a, b))
        close(ncsn_mnist.slerp(a, 3 * a, w), (1 + 2 * w) * a)
        assert torch.isfinite(ncsn_mnist.slerp(a, -a, w)).all()


# %% ncsn_mnist.py: data
IDX = {"train-images-idx3-ubyte": 5, "t10k-images-idx3-ubyte": 3}   # stand-ins and their sizes


def idx(n, magic=2051, size=28):
    """The bytes of an IDX file of n images, and its pixels."""
    pixels = np.random.default_rng(n).integers(0, 256, (n, size, size), dtype=np.uint8)
    return np.array([magic, n, size, size], ">i4").tobytes() + pixels.tobytes(), pixels


def mnist_folder(folder, end=""):
    """Writes the stand-ins."""
    folder.mkdir(parents=True)
    for name, n in IDX.items():
        content = idx(n)[0]
        (folder / (name + end)).write_bytes(gzip.compress(content) if end else content)


@pytest.mark.parametrize("sub, end", [("", ""), ("", ".gz"), ("MNIST/raw", ""),
                                      ("MNIST/raw", ".gz")])
def test_ncsn_mnist_idx_files(sub, end, tmp_path):
    """Raw or compressed, in torchvision's folder, too, they become images from -1 to 1."""
    mnist_folder(tmp_path / "data" / sub, end)
    flags = f"--data mnist --batch 2 --data_dir {tmp_path}/data"
    script = run("ncsn_mnist", flags, "Model", tmp_path / "out")
    for ours, n in zip([script.x_data, script.x_test], IDX.values()):
        pixels = torch.tensor(idx(n)[1]).float()[:, None]
        torch.testing.assert_close(ours, pixels / 255 * 2 - 1)
    assert script.dataset == "mnist" and script.input_shape == (1, 28, 28)


GOOD = idx(5)[0]
PACKED = gzip.compress(GOOD)
WRONG_IDX = {"missing": None, "empty": b"", "short header": GOOD[:10], "truncated": GOOD[:-1],
             "too long": GOOD + b"\0", "labels": idx(5, 2049)[0], "32x32": idx(5, size=32)[0],
             "no images": idx(0)[0], "web page": b"<html>\n<title>404</title>" + 4000 * b" ",
             "truncated, packed": gzip.compress(GOOD[:-1]), "cut, packed": PACKED[:-100],
             "damaged, packed": PACKED[:50] + b"\xff" * 50 + PACKED[100:], "no gzip, packed": GOOD}


@pytest.mark.parametrize("kind", WRONG_IDX)
def test_ncsn_mnist_broken_idx_files(ncsn_mnist, kind, tmp_path, capsys):
    """Missing, cut, of another shape or no IDX file at all: one line, before outdir is made."""
    end = ".gz" if "packed" in kind else ""
    mnist_folder(tmp_path / "mnist", end)
    file = tmp_path / "mnist" / ("train-images-idx3-ubyte" + end)
    file.unlink()
    if WRONG_IDX[kind] is not None:
        file.write_bytes(WRONG_IDX[kind])
    if not end:
        with pytest.raises((ValueError, FileNotFoundError), match="train-images-idx3-ubyte"):
            ncsn_mnist.read_idx(tmp_path / "mnist", "train-images-idx3-ubyte", (28, 28))
    for data in ["auto", "mnist"]:
        flags = f"--data {data} --data_dir {tmp_path}/mnist"
        assert str(tmp_path / "mnist") in refused("--data_dir", flags, tmp_path / "out", capsys)
    assert not (tmp_path / "out").exists()


def test_ncsn_mnist_data_dir_that_is_not_there(tmp_path, capsys):
    assert "nowhere" in refused("--data_dir", f"--data auto --data_dir {tmp_path}/nowhere",
                                tmp_path, capsys)


@pytest.mark.parametrize("pandas, reader", [(None, "liac-arff"), (object(), "auto")])
def test_ncsn_mnist_openml(ncsn_mnist, pandas, reader):
    """The 70000 rows become 60000 and 10000 images in their order, without pandas, too."""
    table = np.zeros((70000, 784), np.uint8)
    table[5, 30] = 200
    table[60007, 783] = 100
    digits = np.full(70000, "7", dtype=object)   # openml's labels are strings
    digits[60007] = "3"
    fetch = mock.Mock(return_value=SimpleNamespace(data=table, target=digits))
    with (mock.patch.dict(ncsn_mnist.load_mnist.__globals__, fetch_openml=fetch),
          mock.patch("importlib.util.find_spec", return_value=pandas),
          mock.patch("socket.setdefaulttimeout")):
        train, test, train_labels, test_labels = ncsn_mnist.load_mnist(None)
    fetch.assert_called_once_with("mnist_784", version=1, as_frame=False, parser=reader)
    assert train.shape == (60000, 28, 28) and test.shape == (10000, 28, 28)
    assert train.dtype == np.uint8 and train[5, 1, 2] == 200 and test[7, 27, 27] == 100
    assert (train_labels == 7).all() and test_labels[7] == 3 and len(test_labels) == 10000


@pytest.mark.parametrize("error", [OSError("no route\nto host"), TimeoutError(),
                                   ValueError("md5 of the page")])
def test_ncsn_mnist_without_a_network(error, tmp_path, capsys):
    """Without MNIST auto says what to do and goes on with the digits; --data mnist ends the run."""
    with (mock.patch("sklearn.datasets.fetch_openml", side_effect=error) as fetch,
          mock.patch("socket.setdefaulttimeout")):
        script = run("ncsn_mnist", "--data auto", "Model", tmp_path / "out")
        printed = capsys.readouterr().out
        refused("--data_dir", "--data mnist", tmp_path / "none", capsys)
    assert script.dataset == "digits" and script.x_data.shape == (1500, 1, 8, 8)
    loud = [line for line in printed.splitlines() if line.startswith("!!!")]
    assert len(loud) == 1 and "8x8 digits" in loud[0] and "--data_dir" in loud[0]
    assert fetch.call_count == 2 and not (tmp_path / "none").exists()


def test_ncsn_mnist_settings_that_are_not_given_follow_the_data(tmp_path):
    mnist_folder(tmp_path / "data")
    for flags in ["--data digits --filters 7",
                  f"--data mnist --data_dir {tmp_path}/data --filters 7 --batch 4"]:
        with mock.patch.dict(TINY, ncsn_mnist=flags):
            settings = run("ncsn_mnist", until="Model", outdir=tmp_path / "out").args
        assert settings.filters == 7
        assert min(settings.epochs, settings.batch, settings.n_samples) > 0


def sorted_rows(x):
    return sorted(tuple(row) for row in x.flatten(1).tolist())


def test_ncsn_mnist_digits(ncsn_mnist):
    """scikit-learn's, each in one of the two parts; held out from all of them, not the last."""
    images = torch.tensor(load_digits().images / 8 - 1).float()
    ours = torch.cat([ncsn_mnist.x_data, ncsn_mnist.x_test])
    assert sorted_rows(ours) == sorted_rows(images) and len(ncsn_mnist.x_test) == 297
    place = torch.cdist(ncsn_mnist.x_test.flatten(1), images.flatten(1)).argmin(1)
    assert place.double().mean().item() == pytest.approx(898, abs=4 * 519 / math.sqrt(297))


# %% ncsn_mnist.py: labels and guidance
@pytest.fixture(scope="session")
def labelled():
    return run_whole("ncsn_mnist", "--labels --guidance 0.5")


def gaussians(a, b):
    """A stand-in for score: that of N(0, a) with a label, without one that of N(0, b)."""
    def score(x, sigma, label=None):
        return gaussian(b if label is None else a)(x, sigma)
    return score


@pytest.mark.parametrize("w", [-1, 0, 0.5, 3])
def test_ncsn_mnist_11_2_guided_score(ncsn_mnist, w):
    """(1 + w) times the score with a label minus w times that without: w = -1 forgets it."""
    x, label = normal(20, 1), torch.zeros(20)
    with mock.patch.dict(ncsn_mnist.generate.__globals__, score=gaussians(1.0, 4.0)):
        guided = ncsn_mnist.guided_score(label, w)(x, 2.0)
    close(guided, -(1 + w) * x / (1 + 4) + w * x / (4 + 4))


@pytest.mark.parametrize("w", [0, 0.5, 2])
def test_ncsn_mnist_11_2_guided_flow_is_narrower_than_the_class(ncsn_mnist, w):
    """From N(0, V + sigma^2) the flow of N(0, a) against N(0, b) ends near a^(1+w)/b^w."""
    a, b, sigmas = 1.0, 4.0, np.geomspace(100, 0.01, 1000).tolist()
    with mock.patch.dict(ncsn_mnist.generate.__globals__, score=gaussians(a, b)):
        x = torch.full((1, 1), 100.0, dtype=torch.float64)   # a deviation of 100, one of sigma_max
        end = ncsn_mnist.generate("ddim", x, sigmas, torch.zeros(1), w)
    assert end.item() ** 2 == pytest.approx(a ** (1 + w) / b**w, rel=0.02)


def test_ncsn_mnist_generate_gives_each_image_its_label(ncsn_mnist):
    """Also in pieces of 250; without labels there is no guidance."""
    def score(x, sigma, label):
        return (label[:, None] - x) / sigma**2   # the clean image is the label

    label = torch.arange(300.0)
    with mock.patch.dict(ncsn_mnist.generate.__globals__, score=score):
        images = ncsn_mnist.generate("ancestral", normal(300, 1), [2.0, 1.0], label, 0)
    close(images[:, 0].float(), label, rtol=1e-4, atol=1e-4)


def test_ncsn_mnist_one_label_in_five_is_left_out(ncsn_mnist):
    label = torch.arange(20000) % 10
    ours = ncsn_mnist.leave_out(label)
    left_out = ours == ncsn_mnist.NO_LABEL
    assert left_out.sum().item() == pytest.approx(4000, abs=4 * math.sqrt(20000 * 0.16))
    assert torch.equal(ours[~left_out], label[~left_out])
    assert torch.equal(label, torch.arange(20000) % 10)


def labelled_network(script, kind):
    if kind == "unet":
        return script.UNet(1, 8, 4, torch.tensor([3.0, 1.0, 0.1]), num_labels=2)
    return script.ConditionedSimpleResnet(1, 1, 8, 4, 3, num_labels=2)


@pytest.mark.parametrize("kind", NETWORKS)
def test_ncsn_mnist_networks_learn_what_a_label_means(ncsn_mnist, kind):
    """Fresh ones know no difference; the last index is what no label means."""
    net = labelled_network(ncsn_mnist, kind)
    x, y = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1), torch.zeros(3, dtype=torch.long)
    label = torch.arange(3)
    close(net(x, y, label), net(x, y), rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    wanted = torch.tensor([-1.0, 1.0, 0.0])[:, None, None, None]
    for _ in range(60):
        optimizer.zero_grad()
        (net(x, y, label) - wanted).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(net(x, y, label).mean((1, 2, 3)), wanted.flatten(), rtol=0, atol=0.2)
    close(net(x, y), net(x, y, torch.full((3,), 2)), rtol=1e-5, atol=1e-6)


def test_ncsn_mnist_class_hands_labels_to_its_network(homework):
    """Without labels the network is called as the homework calls it."""
    seen = []

    def score_model(*inputs):
        seen.append(inputs)
        return torch.zeros_like(inputs[0])

    ncsn = homework.NoiseConditionedScoreNetwork(score_model, (2,), [2.0, 1.0])
    x, label = torch.randn(5, 2), torch.arange(5)
    ncsn.loss(x, label)
    ncsn.loss(x)
    assert [len(inputs) for inputs in seen] == [3, 2] and torch.equal(seen[0][2], label)


def test_ncsn_mnist_samples_are_of_the_digits_asked_for(labelled):
    """Sample i of the digit i mod 10, with the guidance of the settings, two calls a level."""
    assert labelled.asked.tolist() == [i % 10 for i in range(24)]
    torch.manual_seed(1)
    torch.randn(24, 1, 8, 8)   # the start
    samples = labelled.generate("pc", labelled.start, labelled.levels, labelled.asked, 0.5)
    close(labelled.samples, samples.clamp(-1, 1), rtol=0, atol=0)
    assert labelled.calls["pc"] == 2 * 2 * 6 and labelled.summary["calls"] == 24
    assert labelled.summary["guidance"] == 0.5


@pytest.mark.parametrize("w", [0, 0.5])
def test_ncsn_mnist_calls_with_guidance_are_two_for_each(labelled, w):
    seen = []

    def keep(module, inputs, output):
        seen.append(inputs)

    with labelled.score_model.register_forward_hook(keep):
        labelled.generate("ddim", labelled.start[:2], labelled.levels, labelled.asked[:2], w)
    assert len(seen) == (labelled.calls["ddim"] if w else 6)
    assert torch.equal(seen[0][2], torch.arange(2))


def test_ncsn_mnist_labelled_run_says_how_many_are_read_as_asked(labelled):
    """By the label of the training image that is nearest."""
    distances = torch.cdist(labelled.samples.flatten(1), labelled.x_data.flatten(1))
    read = labelled.train_labels[distances.argmin(1)]
    share = (read == torch.arange(24) % 10).double().mean().item()
    assert labelled.summary["read_as_asked"] == round(share, 3)
    assert f"as the digit asked for: {share:.1%} of the samples" in labelled.printed
    distances = torch.cdist(labelled.x_test.flatten(1), labelled.x_data.flatten(1))
    read = labelled.train_labels[distances.argmin(1)]
    real = (read == labelled.test_labels).double().mean().item()
    assert real > 0.95 and f"as their label: {real:.1%} (good" in labelled.printed
    assert labelled.summary["real_as_labelled"] == round(real, 3)


def test_ncsn_mnist_labels_stay_with_their_images(labelled):
    bunch = load_digits()
    images = torch.tensor(bunch.images / 8 - 1).float().flatten(1)
    for x, label in [(labelled.x_data, labelled.train_labels),
                     (labelled.x_test, labelled.test_labels)]:
        place = torch.cdist(x.flatten(1), images).argmin(1)
        assert torch.equal(label, torch.tensor(bunch.target)[place])


def test_ncsn_mnist_batches_have_their_own_labels(tmp_path):
    """Each image of a batch comes with its label, or with none."""
    seen = []
    line = "        loss = training_step("
    text = cells("ncsn_mnist", "Sampling").replace(line, "        seen.append((x, label))\n" + line)
    text = text.replace("# %% Training", "# %% Training\nseen = []")
    script = execute("ncsn_mnist", text, "--labels", tmp_path)
    seen = script.seen
    assert len(seen) == 12
    for x, label in seen:
        place = torch.cdist(x.flatten(1), script.x_data.flatten(1)).argmin(1)
        told = label != 10
        assert torch.equal(label[told], script.train_labels[place][told])
        assert told.double().mean().item() == pytest.approx(0.8, abs=4 * 0.4 / math.sqrt(250))


def test_ncsn_mnist_held_out_losses_know_the_true_labels(labelled):
    """Those of the training and those of the table."""
    seen = []

    def keep(module, inputs, output):
        seen.append(inputs[2])

    with labelled.score_model.register_forward_hook(keep):
        labelled.held_out_loss(labelled.model)
        labelled.network_losses(labelled.x_test[:250], labelled.test_labels[:250])
    assert torch.equal(seen[0], labelled.test_labels)   # there are fewer than 512
    assert len(seen) == 1 + 6 and torch.equal(seen[1], labelled.test_labels[:250])
    torch.testing.assert_close(labelled.held_out_label, labelled.test_labels[:250])


def test_ncsn_mnist_extra_shows_digits_on_demand(labelled, tmp_path):
    """The last row of its table, that of w = 3: share, and correlation of all pairs of a digit."""
    x, digits = labelled.x_data, labelled.train_labels
    read = digits[torch.cdist(labelled.images.flatten(1), x.flatten(1)).argmin(1)]
    share = (read == torch.arange(200) % 10).double().mean().item()
    correlations = []
    for digit in range(10):
        same = labelled.images[labelled.label == digit].flatten(1).numpy()
        correlations += [np.mean([scipy.stats.pearsonr(a, b)[0] for a, b in combinations(same, 2)])]
    row = f"        3 {share:16.1%} {np.mean(correlations):8.2f}"
    assert row in labelled.printed.splitlines()
    labelled.fig.savefig(tmp_path / "digits_on_demand.png")   # this time drawn
    assert plt.imread(tmp_path / "digits_on_demand.png").std() > 0.1


def test_ncsn_mnist_sevens_are_compared_with_sevens(labelled, capsys):
    """With --digit the held-out images beside the samples are of this digit."""
    flags = f"--load {labelled.args.outdir}/model.pt --labels --digit 7"
    script = run("ncsn_mnist", flags, "Pictures")
    sevens = labelled.x_test[labelled.test_labels == 7].flatten(1)
    distances = torch.cdist(sevens, labelled.x_data.flatten(1)).min(1).values
    assert 0 < len(sevens) < 200 and script.nn_real == pytest.approx(distances.median().item())


@pytest.mark.parametrize("flags, digits", [("", range(10)), ("--digit 7", [7])])
def test_ncsn_mnist_load_of_weights_that_know_labels(labelled, flags, digits, capsys):
    """They decide: no --labels is needed, and without it no label file."""
    script = run("ncsn_mnist", f"--load {labelled.args.outdir}/model.pt --guidance 0.5 {flags}",
                 "Pictures")
    assert set(script.asked.tolist()) == set(digits)
    assert torch.equal(script.samples, labelled.samples) == (flags == "")
    assert "asked for" not in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--labels", "--digit 0", "--digit 3", "--guidance 0"])
def test_ncsn_mnist_load_of_weights_that_know_no_labels(ncsn_mnist, flags, tmp_path, capsys):
    line = refused(flags.split()[0], f"--load {ncsn_mnist.args.outdir}/model.pt {flags}",
                   tmp_path / "out", capsys)
    assert "know no labels" in line and not (tmp_path / "out").exists()


LABELS = {"train-labels-idx1-ubyte": 5, "t10k-labels-idx1-ubyte": 3}


def idx_labels(digits, magic=2049):
    return np.array([magic, len(digits)], ">i4").tobytes() + bytes(digits)


def test_ncsn_mnist_label_files(tmp_path):
    mnist_folder(tmp_path / "data")
    for name, n in LABELS.items():
        (tmp_path / "data" / name).write_bytes(idx_labels(range(n)))
    script = run("ncsn_mnist", f"--data mnist --batch 2 --data_dir {tmp_path}/data --labels",
                 "Model", tmp_path / "out")
    assert script.train_labels.tolist() == list(range(5))
    assert script.test_labels.tolist() == list(range(3))


@pytest.mark.parametrize("wrong", [None, b"", idx_labels(range(4)), idx_labels([1, 2, 3, 4, 10]),
                                   idx_labels(range(5))[:-1], idx_labels(range(5), 2051)])
def test_ncsn_mnist_broken_label_files(wrong, tmp_path, capsys):
    """Missing, empty, too few, no digits, cut, of images: refused with --labels, else not read."""
    mnist_folder(tmp_path / "data")
    (tmp_path / "data" / "t10k-labels-idx1-ubyte").write_bytes(idx_labels(range(3)))
    if wrong is not None:
        (tmp_path / "data" / "train-labels-idx1-ubyte").write_bytes(wrong)
    flags = f"--data mnist --batch 2 --data_dir {tmp_path}/data"
    refused("--data_dir", flags + " --labels", tmp_path / "out", capsys)
    assert not (tmp_path / "out").exists()
    assert len(run("ncsn_mnist", flags, "Model", tmp_path / "out").x_data) == 5


def test_ncsn_mnist_load_of_no_name(capsys, tmp_path):
    """An empty variable in --load "$WEIGHTS" is a mistake, not a wish to train."""
    argv = ["ncsn_mnist.py", "--load", "", "--outdir", str(tmp_path / "out")]
    with mock.patch.object(sys, "argv", argv), pytest.raises(SystemExit) as stop:
        exec(compile(cells("ncsn_mnist", "Data"), "ncsn_mnist.py", "exec"), {})
    assert stop.value.code == 2 and "argument --load:" in capsys.readouterr().err
