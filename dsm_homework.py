"""Denoising score matching with one noise level on two moons, and Langevin dynamics to sample.

    noisy data   q_sigma, the density of x + sigma eps, where x is a data point and eps ~ N(0, I)
    training     minimise the mean of |s(x + sigma eps) + eps/sigma|^2; the best s is the score of
                 the noisy data, grad log q_sigma, an arrow towards where they are denser
    sampling     x + eta/2 s(x) + sqrt(eta) z, many times: half a step along the arrow, and noise

    python dsm_homework.py                       # look at out_dsm_homework/grid.png
    python dsm_homework.py --sigma 0.3 --eta 0.05
    python dsm_homework.py --help                # all settings; in a notebook, edit their defaults

DenoisingScoreMatcher has the interface of the homework, and its text alone works in the homework's
notebook. The moons are known Gaussians on a curve, so the exact score is known and everything can
be measured against it. The default run takes 30 s on one core (Python 3.11, torch 2.13.0). Its
last line:

    seed=0 ... score_err=0.1177 SW2=0.0326 floor=0.0299 SW2_tweedie=0.0401 clean_floor=0.033 ...

score_err is the relative error of the learned score: 0 is exact, 1 no better than s = 0. SW2 is the
distance of the samples to fresh noisy data, and its floor that of fresh noisy data to others: good
samples have an SW2 of 0.8 to 1.3 floors. SW2_tweedie and clean_floor are the same for the data
without noise, after a last step that takes the mean of what may lie behind it.

Read beside: notes 001 task 2; 003 sections 4.1.2 and 4.4; theory.md sections 4 and 6.
"""
# %% Settings
import argparse
import json
import math
import os
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from sklearn.datasets import make_moons
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from tqdm.auto import tqdm


def number(kind, low, high):
    """An argparse type: a number of this kind, between low and high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value
    parse.__name__ = kind.__name__                  # argparse names it in its message
    return parse


# The homework asks for more than 50 epochs, a rate above 1e-3 and a width above 32.
parser = argparse.ArgumentParser(description="Denoising score matching on two moons",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--n", type=number(int, 10, 10**7), default=5000,
                    help="points, four fifths of them for training")
parser.add_argument("--sigma", type=number(float, 1e-3, 100), default=0.1, help="the noise level")
parser.add_argument("--epochs", type=number(int, 1, 10**6), default=250,
                    help="passes over the training points")
parser.add_argument("--batch", type=number(int, 1, 10**6), default=500, help="points in a step")
parser.add_argument("--lr", type=number(float, 1e-8, 1), default=0.01, help="peak of the rate")
parser.add_argument("--hidden", type=number(int, 1, 8192), default=48, help="width of the network")
parser.add_argument("--layers", type=number(int, 1, 64), default=4, help="hidden layers")
parser.add_argument("--num_steps", type=number(int, 1, 10**6), default=1000, help="Langevin steps")
parser.add_argument("--eta", type=number(float, 1e-8, 1e5), default=0.01,
                    help="Langevin step, below its limit 4 (sigma^2 + 0.1^2)")
parser.add_argument("--n_samples", type=number(int, 2, 10**6), default=2000,
                    help="points in a set of samples")
parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all randomness")
parser.add_argument("--outdir", default="out_dsm_homework", help="folder for pictures and results")
in_notebook = "kernel_launcher" in sys.argv[0]      # there the command line is the kernel's
args = parser.parse_args([] if in_notebook else None)
if args.batch > 0.8 * args.n:
    parser.error(f"argument --batch: {args.batch} is more than the {int(0.8 * args.n)} training "
                 "points of --n")
TAU = 0.1                                           # the spread of the moons, make_moons' noise
limit = 4 * (args.sigma**2 + TAU**2)                # longer Langevin steps overshoot and run away
if args.eta >= limit * (1 - 1e-9):                  # round-off must not let the limit itself pass
    parser.error(f"argument --eta: {args.eta:g} is not below the limit of a Langevin step, "
                 f"4 (sigma^2 + {TAU:g}^2) = {limit:.4g}")
try:                                                     # all settings are right: make the folder
    os.makedirs(args.outdir, exist_ok=True)
except OSError as error:
    parser.error(f"argument --outdir: cannot make {args.outdir} ({error.strerror})")
if not os.access(args.outdir, os.W_OK):
    parser.error(f"argument --outdir: cannot write to {args.outdir}")

np.random.seed(args.seed)                           # make_moons draws from numpy
torch.manual_seed(args.seed)
torch.set_num_threads(1)                            # a second core is no help to so small a net


# %% Data
# The homework's two moons. To measure against the truth we also need their density: a point of one
# of two half circles, plus Gaussian noise of size TAU. With 400 points for the half circles this is
# a mixture of 400 equal Gaussians, and the noise sigma only makes each of them wider.
def generate_moons_data(count):
    """The homework's train_data (0.8 count, 2), train_labels, test_data, test_labels."""
    data, labels = make_moons(count, noise=TAU)
    data = data.astype("float32")
    split = int(0.8 * count)
    return data[:split], labels[:split], data[split:], labels[split:]


centres = torch.tensor(make_moons(400, shuffle=False)[0], dtype=torch.float32)   # (400, 2)


def sample_data(n):
    """n independent points (n, 2).

    make_moons spaces its points evenly along the curve, so two of its sets are more alike than
    independent sets, and the floor below would be too low.
    """
    return centres[torch.randint(len(centres), (n,))] + TAU * torch.randn(n, 2)


def exact_score(x, sigma):
    """grad log q_sigma(x) = sum over k of share_k(x) (centre_k - x) / (TAU^2 + sigma^2). -> (B, 2)

    share_k is the chance that x came from centre k: the arrow points to the mean centre.
    """
    variance = TAU**2 + sigma**2
    to_centre = centres - x[:, None]                               # (B, 400, 2)
    share = (-to_centre.square().sum(dim=2) / (2 * variance)).softmax(dim=1)
    return (share[:, :, None] * to_centre).sum(dim=1) / variance


train_data, train_labels, test_data, test_labels = generate_moons_data(args.n)
x_data = torch.tensor(train_data)
x_test = torch.tensor(test_data)
print(f"two moons: {len(x_data)} training points, {len(x_test)} test points, "
      f"noise level {args.sigma:g}")


# %% Model
# The homework's network: Linear layers with activations between them. It knows one noise level, so
# it need not be told which.
def make_score_model():
    """score_model(x) -> score; (B, 2) -> (B, 2)."""
    layers = [nn.Linear(2, args.hidden), nn.SiLU()]
    for _ in range(args.layers - 1):
        layers.append(nn.Linear(args.hidden, args.hidden))
        layers.append(nn.SiLU())
    layers.append(nn.Linear(args.hidden, 2))
    return nn.Sequential(*layers)


# %% Loss
# The homework's class. Of a noisy point x + sigma eps the loss asks: which way back to the clean
# point? The target is the arrow x - noisy_x, divided by sigma^2: -eps/sigma. Many clean points can
# lie behind one noisy point; the mean of their targets is the score of the noisy data (theory.md
# 4.1).
class DenoisingScoreMatcher(nn.Module):
    """Learns grad log q_sigma with score_model, (B, *input_shape) to the same, and samples q_sigma.

    Raises ValueError if sigma is not positive. Source: notes 001 task 2.
    """

    def __init__(self, score_model, input_shape, sigma):
        super().__init__()
        if not sigma > 0:
            raise ValueError(f"sigma = {sigma} is not positive")
        self.score_model = score_model
        self.input_shape = input_shape
        # A buffer is saved with the weights and moves with them, but is not trained.
        self.register_buffer("sigma", torch.tensor(float(sigma)))

    @property
    def device(self):
        return self.sigma.device

    def forward(self, x):
        """(s(noisy_x) + eps/sigma)^2, of x's shape.

        The target, the gradient of log q(noisy_x | x), is -eps/sigma; so s - target has a plus.
        """
        eps = torch.randn_like(x)
        noisy_x = x + self.sigma * eps
        s = self.score_model(noisy_x)
        return (s + eps / self.sigma) ** 2

    def loss(self, x):
        """The mean over the batch, the sum over coordinates: a scalar in a dict."""
        return {"total_loss": self(x).mean(dim=0).sum()}

    @torch.no_grad()
    def langevin_dynamics(self, x, num_steps, eta):
        """num_steps times x + eta/2 s(x) + sqrt(eta) z, from x (B, *input_shape)."""
        for _ in range(num_steps):
            z = torch.randn_like(x)
            x = x + eta / 2 * self.score_model(x) + eta**0.5 * z
        return x

    @torch.no_grad()
    def sample(self, num_samples=64, num_steps=100, eta=0.01):
        """Langevin dynamics from U[-1, 1], as in the homework.  -> (num_samples, *input_shape)"""
        x0 = 2 * torch.rand(num_samples, *self.input_shape, device=self.device) - 1
        return self.langevin_dynamics(x0, num_steps, eta)


# %% Training
# The loss soon stops falling, far from 0: most of it is the spread of the arrows around their mean,
# which no network can learn. This part is its floor, the loss of the exact score s*. What is
# learned shows in the relative error of the score, sqrt(E|s - s*|^2 / E|s*|^2).
def loss_floor(sigma):
    """Loss of the exact score at fresh points, a number.

    s* is the mean of the targets at a point, so E|target - s*|^2 = E|target|^2 - E|s*|^2, and in
    2-D E|eps/sigma|^2 = 2/sigma^2.
    """
    x = sample_data(20000)
    noisy_x = x + sigma * torch.randn_like(x)
    return 2 / sigma**2 - exact_score(noisy_x, sigma).square().sum(dim=1).mean().item()


@torch.no_grad()
def relative_error(score_model, x, sigma):
    """sqrt(mean |s - s*|^2 / mean |s*|^2) over the points x (n, 2), a number."""
    exact = exact_score(x, sigma)
    return ((score_model(x) - exact).norm() / exact.norm()).item()


def train(matcher, sigma, epochs):
    """Trains a matcher.  -> its history: lists under the keys epoch, loss, test_loss, error."""
    x_check = sample_data(5000) + sigma * torch.randn(5000, 2)
    x_test_often = x_test[:1000].repeat(20, 1)           # with 20 draws of the noise for each point
    optimizer = torch.optim.Adam(matcher.parameters(), lr=args.lr, fused=True)
    # The learning rate rises for 15 % of the steps, then falls to 0: so it can be high.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, epochs=epochs, pct_start=0.15,
        steps_per_epoch=math.ceil(len(x_data) / args.batch))
    history = {"epoch": [], "loss": [], "test_loss": [], "error": []}
    losses = []
    for epoch in tqdm(range(1, epochs + 1), desc=f"training, sigma {sigma:g}"):
        order = torch.randperm(len(x_data))
        for x in x_data[order].split(args.batch):
            loss = matcher.loss(x)["total_loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            sys.exit(f"the loss is {losses[-1]} at epoch {epoch}: try a --lr below {args.lr:g}")
        if epoch % max(1, epochs // 10) == 0 or epoch == epochs:
            with torch.no_grad():
                test_loss = matcher.loss(x_test_often)["total_loss"].item()
            history["epoch"].append(epoch)
            history["loss"].append(np.mean(losses))      # of the epochs since the last entry
            history["test_loss"].append(test_loss)
            history["error"].append(relative_error(matcher.score_model, x_check, sigma))
            losses = []
    return history


model = make_score_model()
matcher = DenoisingScoreMatcher(model, (2,), args.sigma)
floor_of_loss = loss_floor(args.sigma)
started = time.time()
history = train(matcher, args.sigma, args.epochs)
train_s = time.time() - started
torch.save(matcher.state_dict(), os.path.join(args.outdir, "model.pt"))

print(f"\nThe loss of s = 0 is 2 / sigma^2 = {2 / args.sigma**2:.2f}, that of the exact score, the "
      f"floor, {floor_of_loss:.2f}.\nepoch    training loss    test loss    relative score error")
for epoch, loss, test_loss, error in zip(*history.values()):
    print(f"{epoch:5d} {loss:16.2f} {test_loss:12.2f} {error:23.3f}")


@torch.no_grad()
def score(x, sigma=args.sigma):
    """The learned score of q_sigma, (B, 2) -> (B, 2); ValueError at a level it was not taught."""
    if sigma != args.sigma:
        raise ValueError(f"the network was trained at sigma = {args.sigma:g} only")
    return model(x)


x = x_test[:1]
exact = exact_score(x, args.sigma)[0]
learned = score(x)[0]
print(f"\nat the test point ({x[0, 0]:.2f}, {x[0, 1]:.2f}) the score is "
      f"({exact[0]:.2f}, {exact[1]:.2f}), learned: ({learned[0]:.2f}, {learned[1]:.2f})")


# %% Sampling
# Langevin dynamics walks along the score and is shaken at every step, and so ends up distributed as
# the density whose score it follows: q_sigma, that of the noisy data. Tweedie's formula leads back:
# x + sigma^2 s(x) is the mean of all clean points that could lie behind x. Means vary less than
# points, so what it gives is thinner than the data.
@torch.no_grad()
def tweedie(matcher, x):
    """The mean of the clean points behind x, (B, 2) -> (B, 2)."""
    return x + matcher.sigma**2 * matcher.score_model(x)


sample_sets = []
for _ in tqdm(range(4), desc="sampling"):                # one set says little about a distance
    sample_sets.append(matcher.sample(args.n_samples, args.num_steps, args.eta))
samples = sample_sets[-1]                                # (n_samples, 2), of the noisy data
if not torch.isfinite(torch.cat(sample_sets)).all():
    sys.exit(f"the Langevin chains ran away: take an --eta below {args.eta:g}, or train longer")
np.save(os.path.join(args.outdir, "samples.npy"), samples.numpy())


# %% Check
# How far are the samples from the noisy data, and those of Tweedie's step from the clean data? Even
# two fresh sets of data are some way apart: that is the floor.
def sorted_projections(x):
    """(n, 2) -> (32, n): the points seen along 32 directions, in order."""
    angles = math.pi * torch.arange(32) / 32
    directions = torch.stack([angles.cos(), angles.sin()])                # (2, 32)
    return (x @ directions).T.sort().values


def mean_sw2(sets, other_sets):
    """Mean sliced 2-Wasserstein distance over all pairs; each set as its sorted projections.

    Along a line, the cheapest way to move n points onto n others takes them in order. SW2 is the
    root mean square of these moves, over points and directions.
    """
    distances = []
    for ours in sets:
        for theirs in other_sets:
            distances.append((ours - theirs).square().mean().sqrt().item())
    return np.mean(distances)


def fresh_sets(sigma):
    """Eight sets of noisy data, as their sorted projections."""
    sets = []
    for _ in range(8):
        x = sample_data(args.n_samples) + sigma * torch.randn(args.n_samples, 2)
        sets.append(sorted_projections(x))
    return sets


def upper_share(x):
    """The share of the points (B, 2) that are nearer to the upper moon: 0.5 in the data."""
    nearest = torch.cdist(x, centres).argmin(dim=1)      # the first 200 centres are the upper moon
    return (nearest < 200).float().mean().item()


denoised_sets = [tweedie(matcher, x) for x in sample_sets]
fresh_noisy = fresh_sets(args.sigma)
fresh_clean = fresh_sets(0)
sw2 = mean_sw2([sorted_projections(x) for x in sample_sets], fresh_noisy)
sw2_floor = mean_sw2(fresh_sets(args.sigma), fresh_noisy)          # what perfect samples would get
sw2_tweedie = mean_sw2([sorted_projections(x) for x in denoised_sets], fresh_clean)
clean_floor = mean_sw2(fresh_sets(0), fresh_clean)
score_err = history["error"][-1]
print(f"\nSW2 of the samples to fresh noisy data: {sw2:.4f}, its floor {sw2_floor:.4f}, "
      f"ratio {sw2 / sw2_floor:.2f} (good: below 1.3)")
print(f"after Tweedie's step, to fresh clean data: {sw2_tweedie:.4f}, its floor {clean_floor:.4f}, "
      f"ratio {sw2_tweedie / clean_floor:.2f} (good: below 1.5)")
print(f"share in the upper moon: {upper_share(samples):.3f} (data: 0.5)")

summary = {"seed": args.seed, "sigma": args.sigma, "epochs": args.epochs,
           "num_steps": args.num_steps, "eta": args.eta, "score_err": round(float(score_err), 4),
           "SW2": round(float(sw2), 4), "floor": round(float(sw2_floor), 4),
           "SW2_tweedie": round(float(sw2_tweedie), 4),
           "clean_floor": round(float(clean_floor), 4), "train_s": round(train_s, 1)}
with open(os.path.join(args.outdir, "summary.json"), "w") as file:
    json.dump({"settings": vars(args), "figures": summary}, file, indent=1)


# %% Check: the number of steps and eta
# "Experiment with number of steps and eta." Too few steps, or too short ones, and the chains have
# not reached the right end of the moons, where no start lies. Too long ones, and the moons are too
# wide: on a Gaussian of variance V a step turns the variance v into (1 - eta/(2V))^2 v + eta. This
# stands still at v = V / (1 - eta/(4V)). From eta = 4V on, each step throws a chain further out.
# Across the moons V = sigma^2 + TAU^2, which gives the limit (theory.md 6.2).
def has_left(x):
    """Which points (B, 2) are far from all data, or no longer finite: (B,) of bool."""
    return ~(x.norm(dim=1) < 6 * (1 + args.sigma))


def run_chains(x, eta):
    """Chains from x at 10, 100 and 1000 steps, a dict; and the step at which one has left, or None.

    Langevin dynamics goes on where it stopped, so that ten steps at a time are as good as 1000.
    """
    states = {}
    first_left = None
    for step in range(10, 1001, 10):
        x = matcher.langevin_dynamics(x, 10, eta)
        if first_left is None and has_left(x).any():
            first_left = step
        if step in [10, 100, 1000]:
            states[step] = x
    return states, first_left


fresh = sample_data(20000) + args.sigma * torch.randn(20000, 2)
right_share = (fresh[:, 0] > 1.1).float().mean().item()
print(f"\nFrom U[-1, 1]: SW2/floor (one set: uncertain by a third), share in the upper moon (data: "
      f"0.50)\nand right of x_1 = 1.1 (data: {right_share:.2f})")
print("    eta  eta/limit   10 steps            100 steps           1000 steps")
etas = [limit / 80, limit / 8, 5 / 8 * limit, 3 / 2 * limit]
grid_states = {}                                         # eta -> steps -> points
grid_words = {}
for eta in etas:
    x0 = 2 * torch.rand(args.n_samples, 2) - 1
    grid_states[eta], first_left = run_chains(x0, eta)
    grid_words[eta] = {}
    for steps, x in grid_states[eta].items():
        left = has_left(x)
        if left.any():
            grid_words[eta][steps] = f"{100 * left.float().mean():.0f} % have left"
        else:
            ratio = mean_sw2([sorted_projections(x)], fresh_noisy) / sw2_floor
            right = (x[:, 0] > 1.1).float().mean()
            grid_words[eta][steps] = f"{ratio:.2f}, {upper_share(x):.2f}, {right:.2f}"
    words = "".join(f"{text:20s}" for text in grid_words[eta].values())
    after = f"the first left within {first_left} steps" if first_left else ""
    print(f"{eta:7.4f} {eta / limit:10.4f}   {words}{after}")


# %% Pictures
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"        # exact and data, learned, noisy
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 10})
view = [-1.6, 2.6, -1.85, 2.35]                          # left, right, bottom, top


def grid(n):
    """n x n points of the visible square, (n^2, 2), row by row."""
    y, x = torch.meshgrid(torch.linspace(-1.85, 2.35, n), torch.linspace(-1.6, 2.6, n),
                          indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def panel(ax, title):
    """A square panel with the same limits as all others."""
    ax.axis(view)
    ax.set(aspect="equal", title=title, xticks=[], yticks=[])


def dots(ax, x, colour):
    """Points (n, 2), 2000 at most."""
    ax.scatter(x[:2000, 0], x[:2000, 1], s=3, color=colour, alpha=0.5, linewidths=0)


def shade(ax):
    """The density of the noisy data in grey."""
    noisy = MultivariateNormal(centres, (TAU**2 + args.sigma**2) * torch.eye(2))
    law = MixtureSameFamily(Categorical(torch.ones(len(centres))), noisy)
    density = law.log_prob(grid(60)).exp().view(60, 60)
    ax.contourf(density, 12, extent=view, cmap="Greys", vmax=1.6 * density.max())


def arrows(ax, x, vectors, longest, colour):
    """Arrows at x; those above `longest` are cut to it."""
    length = vectors.norm(dim=1, keepdim=True)
    vectors = vectors * (longest / length).clamp(max=1)
    ax.quiver(x[:, 0], x[:, 1], vectors[:, 0], vectors[:, 1], color=colour, width=0.006,
              angles="xy", scale_units="xy", scale=5 * longest)


# The data, and where the arrows point: exact beside learned.
fig, axs = plt.subplots(1, 3, figsize=(11, 4.2))
x_clean = x_data[:2000]
dots(axs[0], x_clean + args.sigma * torch.randn_like(x_clean), GREY)
dots(axs[0], x_clean, BLUE)
panel(axs[0], rf"training points (blue), with noise $\sigma$ = {args.sigma:g} (grey)")
where = grid(18)
exact = exact_score(where, args.sigma)
longest = exact.norm(dim=1).quantile(0.25).item()
shade(axs[1])
arrows(axs[1], where, exact, longest, BLUE)
panel(axs[1], "exact score")
shade(axs[2])
arrows(axs[2], where, score(where), longest, ORANGE)
panel(axs[2], f"learned score, relative error {score_err:.2f}")
fig.suptitle("Score over the density of the noisy data (all but the shortest arrows are cut)")
fig.savefig(os.path.join(args.outdir, "fields.png"))

# Number of steps and eta.
fig, axs = plt.subplots(3, 4, figsize=(10, 8.2))
for column, eta in enumerate(etas):
    for row, steps in enumerate(grid_states[eta]):
        x = grid_states[eta][steps]
        dots(axs[row, column], x[~has_left(x)], ORANGE)
        panel(axs[row, column], rf"{steps} steps, $\eta$ = {eta:.3g} = {eta / limit:.3g} limit"
              f"\n{grid_words[eta][steps]}")
        axs[row, column].title.set_fontsize(8)
fig.suptitle(r"Langevin dynamics from $U[-1,1]^2$: SW2/floor, upper moon (0.5), right end "
             f"({right_share:.2f})")
fig.savefig(os.path.join(args.outdir, "grid.png"))

# A few chains, step by step.
fig, axs = plt.subplots(1, 3, figsize=(11, 4.2))
x0 = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
colours = [ORANGE, BLUE, "#009E73", "#CC79A7"]
names = ["too short", "good", "too long: it overshoots"]
for ax, eta, name in zip(axs, etas, names):
    path = [x0]
    for _ in range(200):
        path.append(matcher.langevin_dynamics(path[-1], 1, eta))
    path = torch.stack(path)                             # (201, 4, 2)
    shade(ax)
    for i, colour in enumerate(colours):
        ax.plot(path[:, i, 0], path[:, i, 1], lw=0.8, color=colour)
        ax.plot(path[0, i, 0], path[0, i, 1], "o", mec="black", color=colour)
    panel(ax, rf"$\eta$ = {eta:.3g}, {name}")
fig.suptitle("200 Langevin steps of four chains, each from its dot")
fig.savefig(os.path.join(args.outdir, "trajectories.png"))


# %% Extra: what can one sigma do?
# The network of the lesson, and the same at other levels with half the epochs to save time, and an
# eta of an eighth of each limit.
# Little noise: the targets are large and almost all chance, so more steps are needed; and the
# plane between the moons is hardly ever seen or crossed. Much noise: everything is learned, but
# q_sigma is blurred, and Tweedie's step gives a mean where many clean points are possible. No level
# is good for everything; dsm_2d.py uses many.
def one_level(matcher, error, x, sigma, axs):
    """Measures samples x (n, 2) at sigma: prints a line of the table and draws two panels."""
    plane_error = relative_error(matcher.score_model, grid(60), sigma)
    clean = tweedie(matcher, x)
    noisy_sets = fresh_sets(sigma)
    noisy_floor = mean_sw2(fresh_sets(sigma), noisy_sets)
    to_noisy = mean_sw2([sorted_projections(x)], noisy_sets) / noisy_floor
    to_data = mean_sw2([sorted_projections(x)], fresh_clean) / clean_floor
    denoised = mean_sw2([sorted_projections(clean)], fresh_clean) / clean_floor
    print(f"{sigma:5g} {error:15.3f} {plane_error:9.3f} {to_noisy:11.2f} {to_data:8.2f} "
          f"{denoised:14.2f} {upper_share(x):13.2f}")
    dots(axs[0], x, ORANGE)
    panel(axs[0], rf"$\sigma$ = {sigma:g}: score error {error:.2f},"
          f"\non the whole plane {plane_error:.2f}")
    dots(axs[1], sample_data(2000), BLUE)
    dots(axs[1], clean, ORANGE)
    panel(axs[1], f"SW2/floor to the data:\n{to_data:.1f} above, {denoised:.1f} here")


def train_and_sample(sigma):
    """A matcher trained at sigma, its relative score error, its samples (n_samples, 2)."""
    matcher = DenoisingScoreMatcher(make_score_model(), (2,), sigma)
    history = train(matcher, sigma, max(1, args.epochs // 2))
    eta = (sigma**2 + TAU**2) / 2
    return matcher, history["error"][-1], matcher.sample(args.n_samples, args.num_steps, eta)


trained = {args.sigma: (matcher, score_err, samples)}    # from the lesson
for sigma in [0.03, 0.1, 0.3, 1.0]:
    if sigma not in trained:
        trained[sigma] = train_and_sample(sigma)

print("\n      score error:             SW2/floor (one set):                    share in the\n"
      "sigma   under q_sigma  on plane  to q_sigma  to data  after Tweedie    upper moon")
fig, axs = plt.subplots(2, len(trained), figsize=(2.75 * len(trained), 6.2))
for column, sigma in enumerate(sorted(trained)):
    one_level(*trained[sigma], sigma, axs[:, column])
fig.suptitle("One noise level: the samples follow the noisy data (above); after Tweedie's step "
             "(below, data in blue)")
fig.savefig(os.path.join(args.outdir, "sigma_row.png"))


# %% Extra: how wrong is a Langevin step?
# On a Gaussian everything is known. Ours is as long as a moon (variance 1) and as thin. Settled
# chains have the variance V / (1 - eta/(4V)) in each direction; noise of a temperature T multiplies
# it by T. 100 steps are enough for this across, but not along. A step can also be multiplied by a
# matrix M. With M = covariance it is long where the Gaussian is long, and 100 steps are enough in
# both directions. With the inverse of the covariance, as 003 has it, they are too few along.
covariance = torch.diag(torch.tensor([1.0, args.sigma**2 + TAU**2]))
precision = covariance.inverse()


def gaussian_score(x):
    """The score of N(0, covariance), (B, 2) -> (B, 2)."""
    return -x @ precision


def langevin(score, x, num_steps, eta, temperature=1.0):
    """x + eta/2 s(x) + sqrt(eta temperature) z: samples the density to the power 1/temperature."""
    for _ in range(num_steps):
        x = x + eta / 2 * score(x) + math.sqrt(eta * temperature) * torch.randn_like(x)
    return x


def preconditioned_langevin(score, x, num_steps, eta, M):
    """x + eta/2 M s(x) + sqrt(eta) R z with R R^T = M, (d, d): the same density for every M."""
    R = torch.linalg.cholesky(M)
    for _ in range(num_steps):
        x = x + eta / 2 * score(x) @ M.T + math.sqrt(eta) * torch.randn_like(x) @ R.T
    return x


def print_row(name, x, eta, share, temperature=1.0):
    """Variances of chains x (n, 2) beside the formula, whose eta/4V is `share` across."""
    long, thin = (x.var(dim=0) / covariance.diag()).tolist()
    formula = temperature / (1 - share)
    errors = (thin / formula - 1) / math.sqrt(2 / len(x))
    print(f"{name:26s} {eta:8.3g} {share:10.3f} {long:8.2f} {thin:8.3f} {formula:10.3f} "
          f"{errors:11.1f}")


x0 = 2 * torch.rand(20000, 2) - 1
thin_V = covariance[1, 1].item()
print("\n100 steps on a Gaussian        eta  eta/limit    along   across    formula  "
      "difference in standard errors")
for share in [0.125, 0.625]:
    eta = share * 4 * thin_V
    print_row("Langevin", langevin(gaussian_score, x0, 100, eta), eta, share)
eta = 0.125 * 4 * thin_V
x = langevin(gaussian_score, x0, 100, eta, temperature=0.5)
print_row("temperature 1/2", x, eta, 0.125, temperature=0.5)
eta = 0.125 * 4                                          # M covariance^-1 = I: every V is 1
x = preconditioned_langevin(gaussian_score, x0, 100, eta, M=covariance)
print_row("M = covariance", x, eta, 0.125)
eta = 0.125 * 4 * thin_V**2                              # M covariance^-1 = covariance^-2
x = preconditioned_langevin(gaussian_score, x0, 100, eta, M=precision)
print_row("M = its inverse (003)", x, eta, 0.125)


# %% Extra: can the bias be removed?
# Yes, if the density itself is known: propose a Langevin step, and accept it with the probability
# that makes forward and backward equally frequent (Metropolis and Hastings; theory.md 6.3). Our
# network gives arrows and no density, so this is for the Gaussian. In many dimensions the step must
# shrink as d^(-1/3), or hardly anything is accepted.
def mala(log_density, score, x, num_steps, eta):
    """Langevin dynamics with a test of each step, for each chain by itself.  -> x, acceptance"""
    accepted_share = []
    for _ in range(num_steps):
        forward_mean = x + eta / 2 * score(x)
        y = forward_mean + math.sqrt(eta) * torch.randn_like(x)
        backward_mean = y + eta / 2 * score(y)
        log_forward = -(y - forward_mean).square().sum(dim=1) / (2 * eta)      # (B,)
        log_backward = -(x - backward_mean).square().sum(dim=1) / (2 * eta)
        log_ratio = log_density(y) + log_backward - log_density(x) - log_forward
        accepted = torch.rand(len(x)).log() < log_ratio
        x = torch.where(accepted[:, None], y, x)
        accepted_share.append(accepted.float().mean().item())
    return x, np.mean(accepted_share)


variances = torch.tensor([1.0, args.sigma**2 + TAU**2])


def log_gaussian(x):
    """log density of N(0, variances) up to a constant, (B, 2) -> (B,)."""
    return -0.5 * (x.square() / variances).sum(dim=1)


def score_gaussian(x):
    """Its gradient."""
    return -x / variances


def log_normal(x):
    """log density of N(0, I) up to a constant, (B, d) -> (B,)."""
    return -0.5 * x.square().sum(dim=1)


def score_normal(x):
    """Its gradient."""
    return -x


x0 = 2 * torch.rand(20000, 2) - 1
print("\n100 steps of MALA              eta  eta/limit    along   across    accepted")
for share in [0.125, 0.625]:
    eta = share * 4 * variances[1].item()
    x, acceptance = mala(log_gaussian, score_gaussian, x0, 100, eta)
    long, thin = (x.var(dim=0) / variances).tolist()
    print(f"{'MALA':26s} {eta:8.3g} {share:10.3f} {long:8.2f} {thin:8.3f} {acceptance:11.3f}")
# With M = covariance: the same as plain steps in the coordinates x / sqrt(variances).
x, acceptance = mala(log_normal, score_normal, x0 / variances.sqrt(), 100, 0.625 * 4)
long, thin = x.var(dim=0).tolist()
print(f"{'MALA, M = covariance':26s} {2.5:8.3g} {0.625:10.3f} {long:8.2f} {thin:8.3f} "
      f"{acceptance:11.3f}")

print("\nMALA in 100 dimensions, on N(0, I)    eta    accepted    2 Phi(-sqrt(100 eta^3) / 8)")
for eta in [0.2, 0.5, 0.8, 1.1]:
    x, acceptance = mala(log_normal, score_normal, torch.randn(500, 100), 40, eta)
    argument = math.sqrt(100 * eta**3) / 8
    formula = math.erfc(argument / math.sqrt(2))         # erfc(a / sqrt(2)) = 2 Phi(-a)
    print(f"{eta:41.1f} {acceptance:11.3f} {formula:14.3f}")


# %% Result
print(f"\npictures in {args.outdir}: grid.png (look at it first), fields.png, trajectories.png, "
      "sigma_row.png")
print(" ".join(f"{key}={value}" for key, value in summary.items()))

# What `uv run` installs for this script:
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "scikit-learn==1.9.1",
#     "matplotlib==3.11.2",
#     "tqdm==4.70.1",
# ]
# ///
