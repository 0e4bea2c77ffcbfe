"""Denoising score matching with one noise level on two moons, and Langevin dynamics to sample.

    noisy data   q_sigma, the density of x + sigma eps, where x is a data point and eps ~ N(0, I)
    training     minimise the mean of |s(x + sigma eps) + eps/sigma|^2 over networks s; the best is
                 the score of the noisy data, grad log q_sigma, an arrow to where they are denser
    sampling     x + eta/2 s(x) + sqrt(eta) z, many times, with small eta and fresh z ~ N(0, I):
                 half a step along the arrow, and noise

    python dsm_homework.py                       # look at out_dsm_homework/grid.png
    python dsm_homework.py --sigma 0.3 --eta 0.05
    python dsm_homework.py --help                # all settings; in a notebook, edit their defaults

DenoisingScoreMatcher has the interface of the homework, and its text alone works in the homework's
notebook. The moons are known Gaussians on a curve, so the exact score is known and everything can
be measured against it. The default run takes 30 s on one core (Python 3.11, torch 2.13.0). Its
last line:

    seed=0 ... score_err=0.1177 SW2=0.0326 floor=0.0311 SW2_tweedie=0.0379 clean_floor=0.0326 ...

score_err is the relative error of the learned score: 0 is exact, 1 no better than s = 0. SW2 is the
sliced Wasserstein distance of the samples to fresh noisy data; its floor is that of fresh noisy
data to other fresh noisy data; samples whose SW2 is at most 1.3 times the floor are good.
SW2_tweedie is the distance to clean data, after a last step that takes the noise away, and
clean_floor its floor.

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
args = parser.parse_args([] if in_notebook else None)  # in a notebook, settings go into []
if args.batch > 0.8 * args.n:
    parser.error(f"argument --batch: {args.batch} is more than the {int(0.8 * args.n)} training "
                 "points of --n")
TAU = 0.1                                           # the spread of the moons, make_moons' noise
# Longer Langevin steps overshoot and run away; the cell "the number of steps and eta" shows why.
limit = 4 * (args.sigma**2 + TAU**2)
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
# of two half circles, plus Gaussian noise of size TAU. With 400 points for the half circles, much
# closer to each other than TAU, this is a mixture of 400 equal Gaussians. The noise sigma, which we
# add, only makes each of them wider.
def generate_moons_data(count):
    """The homework's train_data (0.8 count, 2), train_labels, test_data, test_labels.

    The labels tell the moon. Nothing here needs them, but the homework's function returns them.
    """
    data, labels = make_moons(count, noise=TAU)
    data = data.astype("float32")
    split = int(0.8 * count)
    return data[:split], labels[:split], data[split:], labels[split:]


centres = torch.tensor(make_moons(400, shuffle=False)[0], dtype=torch.float32)   # (400, 2)


def sample_data(n):
    """n independent points (n, 2).

    make_moons spaces its points evenly along the curve, so two of its sets are more alike than
    independent sets are: no yardstick for samples.
    """
    return centres[torch.randint(len(centres), (n,))] + TAU * torch.randn(n, 2)


def exact_score(x, sigma):
    """grad log q_sigma(x) = sum over k of share_k(x) (centre_k - x) / (TAU^2 + sigma^2). -> (B, 2)

    share_k is the chance that x came from centre k: the arrow points to the mean of the centres
    that x may have come from.
    """
    variance = TAU**2 + sigma**2
    to_centre = centres - x[:, None]                               # (B, 400, 2)
    log_density = -to_centre.square().sum(dim=2) / (2 * variance)  # of each Gaussian, + a constant
    share = log_density.softmax(dim=1)                             # Bayes' rule: density over sum
    return (share[:, :, None] * to_centre).sum(dim=1) / variance


def exact_density(x, sigma):
    """q_sigma(x) up to a constant factor, (B, 2) -> (B,); only the pictures need it."""
    distance = torch.cdist(x, centres)                             # (B, 400)
    return (-distance.square() / (2 * (TAU**2 + sigma**2))).exp().mean(dim=1)


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
# The homework's class. From a noisy point x + sigma eps, which way is it back to the clean point x?
# The arrow back is -sigma eps. As target the network gets it divided by sigma^2, because then it is
# a gradient with respect to noisy_x:
#     log q(noisy_x | x) = -|noisy_x - x|^2 / (2 sigma^2) + constant
#     grad log q(noisy_x | x) = -(noisy_x - x) / sigma^2 = -eps/sigma
# Many clean points can lie behind one noisy point. The network sees the noisy point only, and since
# the loss is a square, the best that it can answer is the mean of their targets. With p for the
# density of the clean data (001's pi), this mean is the score of the noisy data (theory.md 4.1):
#     sum over x of p(x | noisy_x) grad log q(noisy_x | x)
#   = sum over x of p(x) q(noisy_x | x) grad log q(noisy_x | x) / q_sigma(noisy_x)     (Bayes)
#   = sum over x of p(x) grad q(noisy_x | x) / q_sigma(noisy_x)         since q grad log q = grad q
#   = grad q_sigma(noisy_x) / q_sigma(noisy_x) = grad log q_sigma(noisy_x)
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
        """(s(noisy_x) - target)^2 with the target -eps/sigma, of x's shape.

        There is no 1/2, as in the homework: a factor moves no minimum. (In 001's formula of the
        target the grad is missing.)
        """
        eps = torch.randn_like(x)
        noisy_x = x + self.sigma * eps
        target = -eps / self.sigma                       # of the same eps: another teaches s = 0
        return (self.score_model(noisy_x) - target) ** 2

    def loss(self, x):
        """The mean over the batch of |s - target|^2, a sum over coordinates: a scalar in a dict.

        With .mean() over everything it would be half of this, in 2-D, and least at the same s.
        """
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
# The loss soon stops falling, far from 0: most of it is the spread of the targets around their
# mean, which no network can learn. This part is its floor, the loss of the exact score s*. For
#     |s - target|^2  =  |s - s*|^2  +  2 (s - s*) . (s* - target)  +  |s* - target|^2,
# and at every noisy point the mean of the targets is s*, so that the middle vanishes:
#     loss of s  =  E|s - s*|^2  +  floor.
# What is learned shows in the first part alone, which is soon too small to be seen in the loss.
# Hence the relative error, sqrt(E|s - s*|^2 / E|s*|^2): 0 is exact, and s = 0 has the error 1.
def score_power(sigma):
    """E|s*|^2 under q_sigma, a mean over 20000 fresh points: a number."""
    x = sample_data(20000)
    noisy_x = x + sigma * torch.randn_like(x)
    return exact_score(noisy_x, sigma).square().sum(dim=1).mean().item()


@torch.no_grad()
def relative_error(matcher, x):
    """sqrt(mean |s - s*|^2 / mean |s*|^2) over the points x (n, 2), a number."""
    exact = exact_score(x, matcher.sigma)
    return ((matcher.score_model(x) - exact).norm() / exact.norm()).item()


@torch.no_grad()
def loss_at_test_points(matcher):
    """The loss at the test points, with 20 draws of the noise for each: a number."""
    return matcher.loss(x_test.repeat(20, 1))["total_loss"].item()


def train(matcher, epochs):
    """Epochs over shuffled batches.  -> history, a list with a dict for each printed line."""
    x_check = sample_data(5000)
    x_check += matcher.sigma * torch.randn_like(x_check)
    optimizer = torch.optim.Adam(matcher.parameters(), lr=args.lr)
    # The learning rate rises for 15 % of the steps, then falls to 0. The high rates in the middle
    # learn fast, and the low ones at the end take out the noise of the steps. (By default it also
    # lowers Adam's momentum while the rate is high.)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, epochs=epochs, pct_start=0.15,
        steps_per_epoch=math.ceil(len(x_data) / args.batch))
    history = []
    for epoch in tqdm(range(1, epochs + 1), desc=f"training, sigma {matcher.sigma.item():g}"):
        losses = []
        for x in x_data[torch.randperm(len(x_data))].split(args.batch):
            loss = matcher.loss(x)["total_loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            sys.exit(f"the loss is {losses[-1]} at epoch {epoch}: try a --lr below {args.lr:g}")
        if epoch % max(1, epochs // 10) == 0 or epoch == epochs:
            history.append({"epoch": epoch, "loss": np.mean(losses),
                            "test_loss": loss_at_test_points(matcher),
                            "error": relative_error(matcher, x_check)})
    return history


model = make_score_model()
matcher = DenoisingScoreMatcher(model, (2,), args.sigma)
loss_of_zero = 2 / args.sigma**2                         # s = 0: E|eps/sigma|^2 in 2-D
power = score_power(args.sigma)
floor_of_loss = loss_of_zero - power                     # loss = E|s - s*|^2 + floor, with s = 0
started = time.time()
history = train(matcher, args.epochs)
train_s = time.time() - started
torch.save(matcher.state_dict(), os.path.join(args.outdir, "model.pt"))

print(f"\nloss of s = 0: {loss_of_zero:.2f}, E|s*|^2: {power:.2f}, their difference, the floor: "
      f"{floor_of_loss:.2f}\nepoch    training loss    test loss    relative score error")
for row in history:
    print(f"{row['epoch']:5d} {row['loss']:16.2f} {row['test_loss']:12.2f} {row['error']:23.3f}")
score_err = history[-1]["error"]
# The loss of a point varies about as much as |eps/sigma|^2, whose standard deviation is, in 2-D,
# its mean.
uncertainty = loss_of_zero / math.sqrt(20 * len(x_test))
print(f"The last error makes {score_err**2 * power:.2f} of the loss. "
      f"(The test loss is uncertain by {uncertainty:.1f}.)")


@torch.no_grad()
def score(x, sigma=args.sigma):
    """The learned score of q_sigma, (B, 2) -> (B, 2); ValueError at a level it was not taught."""
    if sigma != args.sigma:
        raise ValueError(f"the network was trained at sigma = {args.sigma:g} only")
    return model(x)


point = x_test[:1]
exact = exact_score(point, args.sigma)[0]
learned = score(point)[0]
print(f"\nat the test point ({point[0, 0]:.2f}, {point[0, 1]:.2f}) the score is "
      f"({exact[0]:.2f}, {exact[1]:.2f}), learned: ({learned[0]:.2f}, {learned[1]:.2f})")


# %% Sampling
# Langevin dynamics walks along the score and is shaken at every step, and so ends up distributed
# nearly as the density whose score it follows: q_sigma, that of the noisy data. (Nearly, since eta
# is not 0; see "the number of steps and eta".) Tweedie's formula leads back to the clean data. The
# score is the mean of the arrows (x_clean - x) / sigma^2 (cell Loss); solve for the mean of the
# clean points that could lie behind x: it is x + sigma^2 s(x). Means vary less than points. Across
# a moon s is nearly -x / (TAU^2 + sigma^2), so the step multiplies x by TAU^2 / (TAU^2 + sigma^2):
# by default, perfect samples with a standard deviation of 0.14 across a moon get one of 0.07, while
# that of the data is 0.1.
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
# two fresh sets of data are some way apart: that is the floor. For perfect samples the ratio of the
# two would have the mean 1 and the standard deviation 0.1 for four sets, 0.2 for one. We call a
# ratio below 1.3 good, and after Tweedie's step, whose points are too thin, one below 1.5.
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


def fresh_projections(sigma):
    """Eight sets of n_samples fresh noisy points, each as its sorted projections."""
    sets = []
    for _ in range(8):
        x = sample_data(args.n_samples) + sigma * torch.randn(args.n_samples, 2)
        sets.append(sorted_projections(x))
    return sets


def upper_share(x):
    """The share of the points (B, 2) that are nearer to the upper moon: 0.5 in the data."""
    nearest = torch.cdist(x, centres).argmin(dim=1)      # the first 200 centres are the upper moon
    return (nearest < 200).float().mean().item()


fresh_noisy = fresh_projections(args.sigma)
sw2 = mean_sw2([sorted_projections(x) for x in sample_sets], fresh_noisy)
sw2_floor = mean_sw2(fresh_projections(args.sigma), fresh_noisy)   # what perfect samples would get

fresh_clean = fresh_projections(0)
denoised_sets = [tweedie(matcher, x) for x in sample_sets]
sw2_tweedie = mean_sw2([sorted_projections(x) for x in denoised_sets], fresh_clean)
clean_floor = mean_sw2(fresh_projections(0), fresh_clean)

print(f"\nSW2 of the samples to fresh noisy data: {sw2:.4f}, its floor {sw2_floor:.4f}, "
      f"ratio {sw2 / sw2_floor:.2f} (good: below 1.3)")
print(f"after Tweedie's step, to fresh clean data: {sw2_tweedie:.4f}, its floor {clean_floor:.4f}, "
      f"ratio {sw2_tweedie / clean_floor:.2f} (good: below 1.5)")
print(f"share in the upper moon: {upper_share(samples):.3f} (data: 0.5)")

summary = {"seed": args.seed, "sigma": args.sigma, "epochs": args.epochs,
           "num_steps": args.num_steps, "eta": args.eta, "score_err": round(score_err, 4),
           "SW2": round(sw2, 4), "floor": round(sw2_floor, 4),
           "SW2_tweedie": round(sw2_tweedie, 4), "clean_floor": round(clean_floor, 4),
           "train_s": round(train_s, 1)}
with open(os.path.join(args.outdir, "summary.json"), "w") as file:
    json.dump({"settings": vars(args), "figures": summary}, file, indent=1)


# %% Check: the number of steps and eta
# "Experiment with number of steps and eta." Too few steps, or too short ones, and the chains have
# not reached the right end of the moons, where no start lies. Too long ones, and the moons are too
# wide. Why? Across a moon q_sigma is nearly a Gaussian of variance V = sigma^2 + TAU^2, with the
# score -x/V. A Langevin step is then
#     x  <-  (1 - eta/(2V)) x + sqrt(eta) z,
# and the variance v of the chains becomes
#     v  <-  (1 - eta/(2V))^2 v + eta.
# It stays where it is if (eta/V - eta^2/(4V^2)) v = eta, that is v = V / (1 - eta/(4V)). With the
# default eta, an eighth of 4V, this is 8/7 V, and so the width sqrt(v) is 7 % too large (theory.md
# 6.2). With eta = 4V the factor 1 - eta/(2V) is -1: the step jumps to the other side of the moon,
# just as far out. Hence limit = 4V. Beyond the limit it jumps further out than it was. Near the
# moons it may land among other points; far from them the exact score is about -x/V again, and the
# jumps grow for ever.
def has_left(x):
    """Which points (B, 2) are far from all data, or no longer finite: (B,) of bool."""
    near = x.norm(dim=1) < 6 * (1 + args.sigma)          # data end near 2.3 + 3 sigma
    return ~near                                         # nan is not near, either


def run_chains(matcher, x, eta):
    """Chains from x after 10, 100 and 1000 steps: a dict, steps -> points."""
    states = {}
    done = 0
    for steps in [10, 100, 1000]:
        x = matcher.langevin_dynamics(x, steps - done, eta)          # it goes on where it stopped
        done = steps
        states[steps] = x
    return states


def first_to_leave(matcher, x, eta):
    """The step at which the first of the chains from x leaves; None if none does in 1000."""
    for step in range(1, 1001):
        x = matcher.langevin_dynamics(x, 1, eta)
        if has_left(x).any():
            return step
    return None


def right_share(x):
    """The share of the points (B, 2) at the right end of the lower moon, right of all starts."""
    return (x[:, 0] > 1.1).float().mean().item()


def measure_chains(x):
    """What the table below says of chains x (B, 2): a dict; nan if some have left."""
    left = has_left(x).float().mean().item()
    if left > 0:
        return {"ratio": math.nan, "upper": math.nan, "right": math.nan, "left": left}
    ratio = mean_sw2([sorted_projections(x)], fresh_noisy) / sw2_floor
    return {"ratio": ratio, "upper": upper_share(x), "right": right_share(x), "left": left}


etas = [limit / 80, limit / 8, 5 / 8 * limit, 2 * limit]     # limit / 8 is --eta by default
chains = {}                                              # eta -> steps -> points
for eta in etas:
    chains[eta] = run_chains(matcher, 2 * torch.rand(args.n_samples, 2) - 1, eta)
in_data = right_share(sample_data(20000) + args.sigma * torch.randn(20000, 2))
print("\nLangevin dynamics from U[-1, 1], one set of chains each (nan: some have left)\n"
      "   eta  eta/limit  steps  SW2/floor  in the upper moon  right of 1.1  have left")
for eta in etas:
    for steps, x in chains[eta].items():
        measured = measure_chains(x)
        print(f"{eta:6.3g} {eta / limit:10.4f} {steps:6d} {measured['ratio']:10.2f} "
              f"{measured['upper']:18.2f} {measured['right']:13.2f} {measured['left']:10.2f}")
print(f"data:                          1.00               0.50 {in_data:13.2f}       0.00")
step = first_to_leave(matcher, 2 * torch.rand(args.n_samples, 2) - 1, etas[-1])
print(f"With the last eta the first chain leaves at step {step}.")


# %% Pictures
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"        # truth, what is learned, the rest
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 10})
left, right, bottom, top = -1.6, 2.6, -1.85, 2.35
view = [left, right, bottom, top]


def plane(n):
    """n x n points of the visible square, (n^2, 2), row by row."""
    y, x = torch.meshgrid(torch.linspace(bottom, top, n), torch.linspace(left, right, n),
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
    density = exact_density(plane(60), args.sigma).view(60, 60)
    ax.contourf(density, 12, extent=view, cmap="Greys", vmax=1.6 * density.max())


def arrows(ax, x, vectors, longest, colour):
    """Arrows at x; those above `longest` are cut to it."""
    length = vectors.norm(dim=1, keepdim=True)
    vectors = vectors * (longest / length).clamp(max=1)
    ax.quiver(x[:, 0], x[:, 1], vectors[:, 0], vectors[:, 1], color=colour, width=0.006,
              angles="xy", scale_units="xy", scale=5 * longest)


# Where do the arrows point, and where do they lead? Exact and data left, learned right.
fig, axs = plt.subplots(2, 2, figsize=(8, 8.4))
where = plane(18)
exact = exact_score(where, args.sigma)
longest = exact.norm(dim=1).quantile(0.25).item()        # the arrows far away are far longer
shade(axs[0, 0])
arrows(axs[0, 0], where, exact, longest, BLUE)
panel(axs[0, 0], "exact score over the density of the noisy data")
shade(axs[0, 1])
arrows(axs[0, 1], where, score(where), longest, ORANGE)
panel(axs[0, 1], f"learned score, relative error {score_err:.2f}")
x_clean = x_data[:2000]
dots(axs[1, 0], x_clean + args.sigma * torch.randn_like(x_clean), GREY)
dots(axs[1, 0], x_clean, BLUE)
panel(axs[1, 0], rf"training points (blue), with noise $\sigma$ = {args.sigma:g} (grey)")
dots(axs[1, 1], samples, GREY)
dots(axs[1, 1], denoised_sets[-1], ORANGE)
panel(axs[1, 1], "samples (grey), after Tweedie's step (orange)")
fig.suptitle("Score and points, exact beside learned (all but the shortest arrows are cut)")
fig.savefig(os.path.join(args.outdir, "fields.png"))

# Number of steps and eta.
fig, axs = plt.subplots(3, 4, figsize=(10, 8.2))
for column, eta in enumerate(etas):
    for row, steps in enumerate(chains[eta]):
        x = chains[eta][steps]
        measured = measure_chains(x)
        words = f"SW2/floor {measured['ratio']:.2f}, right end {measured['right']:.2f}"
        if measured["left"] > 0:
            words = f"{100 * measured['left']:.0f} % have left"
        dots(axs[row, column], x[~has_left(x)], ORANGE)
        panel(axs[row, column], rf"{steps} steps, $\eta$ = {eta:.3g} = {eta / limit:.3g} limit"
              f"\n{words}")
        axs[row, column].title.set_fontsize(8)
fig.suptitle(rf"Langevin dynamics from $U[-1,1]^2$ (data: SW2/floor 1, right end {in_data:.2f})")
fig.savefig(os.path.join(args.outdir, "grid.png"))

# A few chains, step by step, with each eta below the limit.
fig, axs = plt.subplots(1, 3, figsize=(11, 4.2))
starts = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
colours = [ORANGE, BLUE, "#009E73", "#CC79A7"]
names = ["too short", "good", "too long: it overshoots"]
for ax, eta, name in zip(axs, etas[:3], names):
    path = [starts]
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
# The network of the lesson, and the same at other levels. No level is good for everything, which is
# why dsm_2d.py uses many:
#   little noise   The targets are long and nearly all chance, so the score is learned badly. The
#                  plane outside the moons is hardly ever seen (see the column "on plane") or
#                  crossed: what starts at one moon stays there (column "upper moon").
#   much noise     The score is learned well, and the samples have the right density. But this is
#                  q_sigma, a blur, and Tweedie's step gives the mean of many possible clean points,
#                  which is near none of them.
def train_and_sample(sigma):
    """A matcher trained at sigma, and its samples (n_samples, 2).

    More noise than in the lesson is learned sooner, and its steps are longer: a third of the epochs
    and steps is enough. Less noise gets as many as the lesson.
    """
    epochs = args.epochs
    num_steps = args.num_steps
    if sigma > args.sigma:
        epochs = math.ceil(epochs / 3)
        num_steps = math.ceil(num_steps / 3)
    matcher = DenoisingScoreMatcher(make_score_model(), (2,), sigma)
    train(matcher, epochs)
    eta = 4 * (sigma**2 + TAU**2) / 8                    # an eighth of the limit
    return matcher, matcher.sample(args.n_samples, num_steps, eta)


def measure_level(matcher, x):
    """What the table below says of a matcher and its samples x (n, 2): a dict."""
    sigma = matcher.sigma.item()
    noisy_sets = fresh_projections(sigma)
    noisy_floor = mean_sw2(fresh_projections(sigma), noisy_sets)
    noisy_x = sample_data(5000)
    noisy_x += sigma * torch.randn_like(noisy_x)
    return {
        "error": relative_error(matcher, noisy_x),
        "plane": relative_error(matcher, plane(60)),
        "noisy": mean_sw2([sorted_projections(x)], noisy_sets) / noisy_floor,
        "clean": mean_sw2([sorted_projections(x)], fresh_clean) / clean_floor,
        "tweedie": mean_sw2([sorted_projections(tweedie(matcher, x))], fresh_clean) / clean_floor,
        "upper": upper_share(x),
    }


trained = {args.sigma: (matcher, samples)}               # from the lesson
for sigma in [0.03, 0.1, 0.3, 1.0]:
    if sigma not in trained:
        trained[sigma] = train_and_sample(sigma)

print("\n      score error:             SW2/floor (one set):                    share in the\n"
      "sigma   under q_sigma  on plane  to q_sigma  to data  after Tweedie    upper moon")
fig, axs = plt.subplots(2, len(trained), figsize=(2.75 * len(trained), 6.2))
for column, sigma in enumerate(sorted(trained)):
    this_matcher, x = trained[sigma]
    measured = measure_level(this_matcher, x)
    print(f"{sigma:5g} {measured['error']:15.3f} {measured['plane']:9.3f} "
          f"{measured['noisy']:11.2f} {measured['clean']:8.2f} {measured['tweedie']:14.2f} "
          f"{measured['upper']:13.2f}")
    dots(axs[0, column], x, ORANGE)
    panel(axs[0, column], rf"$\sigma$ = {sigma:g}: score error {measured['error']:.2f},"
          f"\non the whole plane {measured['plane']:.2f}")
    dots(axs[1, column], sample_data(2000), BLUE)
    dots(axs[1, column], tweedie(this_matcher, x), ORANGE)
    panel(axs[1, column], f"SW2/floor to the data:\n{measured['clean']:.1f} above, "
          f"{measured['tweedie']:.1f} here")
fig.suptitle("One noise level: the samples follow the noisy data (above); after Tweedie's step "
             "(below, data in blue)")
fig.savefig(os.path.join(args.outdir, "sigma_row.png"))


# %% Extra: how wrong is a Langevin step?
# Settled chains on a Gaussian have the variance V / (1 - eta/(4V)) in each direction (cell "the
# number of steps and eta"). Ours is as long as a moon (V = 1, along) and as thin (V = sigma^2 +
# TAU^2, across). Three variants:
#   temperature      The noise is multiplied by sqrt(T), and the variance by T: a sharper density.
#   M = covariance   The score is multiplied by a matrix M, and the noise by its root. Along an axis
#                    of M this is a plain step, of length M eta: long where the Gaussian is long. In
#                    100 steps, which are otherwise too few along, it settles in both directions.
#   M = its inverse  So 003 has it, by mistake: steps are shortest where the Gaussian is longest.
# Formula and last column are for across, where all have settled; along, plain chains have not.
variances = torch.tensor([1.0, args.sigma**2 + TAU**2])                   # along, across


def gaussian_score(x):
    """The score of N(0, diag(variances)), (B, 2) -> (B, 2)."""
    return -x / variances


def langevin(score, x, num_steps, eta, temperature=1.0):
    """x + eta/2 s(x) + sqrt(eta temperature) z: samples the density to the power 1/temperature."""
    for _ in range(num_steps):
        z = torch.randn_like(x)
        x = x + eta / 2 * score(x) + math.sqrt(eta * temperature) * z
    return x


def preconditioned_langevin(score, x, num_steps, eta, M):
    """x + eta/2 M s(x) + sqrt(eta) R z with M = R R^T (d, d): the same density for every M."""
    R = torch.linalg.cholesky(M)
    for _ in range(num_steps):
        z = torch.randn_like(x)
        x = x + eta / 2 * score(x) @ M + math.sqrt(eta) * z @ R.T
    return x


def print_row(name, x, eta, step_over_4V, temperature=1.0):
    """Variances of chains x (n, 2), beside the formula across; the step is eta, or M eta across."""
    along, across = (x.var(dim=0) / variances).tolist()
    formula = temperature / (1 - step_over_4V)
    standard_error = formula * math.sqrt(2 / len(x))     # of the variance of n Gaussian numbers
    print(f"{name:22s} {eta:7.2g} {step_over_4V:9.3f} {along:9.2f} {across:8.3f} {formula:9.3f} "
          f"{(across - formula) / standard_error:15.1f}")


start = 2 * torch.rand(20000, 2) - 1                     # of the variance 1/3, and V = 1 along
V = variances[1].item()
print("\n100 steps                                  variance of the chains / V          off by\n"
      "on a Gaussian              eta step/(4V)     along   across   formula standard errors")
for step_over_4V in [0.125, 0.625]:
    eta = step_over_4V * 4 * V
    print_row("Langevin", langevin(gaussian_score, start, 100, eta), eta, step_over_4V)
eta = 0.125 * 4 * V
x = langevin(gaussian_score, start, 100, eta, temperature=0.5)
print_row("temperature 1/2", x, eta, 0.125, temperature=0.5)
eta = 0.125 * 4                                          # a step M eta = V eta across
x = preconditioned_langevin(gaussian_score, start, 100, eta, M=torch.diag(variances))
print_row("M = covariance", x, eta, 0.125)
eta = 0.125 * 4 * V**2                                   # a step M eta = eta / V across
x = preconditioned_langevin(gaussian_score, start, 100, eta, M=torch.diag(1 / variances))
print_row("M = its inverse (003)", x, eta, 0.125)


# %% Extra: can the bias be removed?
# Yes, if the density itself is known: propose a Langevin step, and accept it with the probability
# that makes forward and backward equally frequent (Metropolis and Hastings; theory.md 6.3). Our
# network gives arrows and no density, so this is for the Gaussian of the extra above. (It is
# written again, so that each extra can be deleted.)
variances = torch.tensor([1.0, args.sigma**2 + TAU**2])                   # along, across


def gaussian_score(x):
    """The score of N(0, diag(variances)), (B, 2) -> (B, 2)."""
    return -x / variances


def gaussian_log_density(x):
    """log density of N(0, diag(variances)) up to a constant, (B, 2) -> (B,)."""
    return -0.5 * (x.square() / variances).sum(dim=1)


def normal_score(x):
    """The score of N(0, I), (B, d) -> (B, d)."""
    return -x


def normal_log_density(x):
    """log density of N(0, I) up to a constant, (B, d) -> (B,)."""
    return -0.5 * x.square().sum(dim=1)


def mala(log_density, score, x, num_steps, eta):
    """Langevin dynamics with a test of each step, for each chain by itself.  -> x, acceptance"""
    acceptances = []
    for _ in range(num_steps):
        forward_mean = x + eta / 2 * score(x)
        y = forward_mean + math.sqrt(eta) * torch.randn_like(x)
        backward_mean = y + eta / 2 * score(y)
        log_forward = -(y - forward_mean).square().sum(dim=1) / (2 * eta)      # (B,)
        log_backward = -(x - backward_mean).square().sum(dim=1) / (2 * eta)
        # How much more frequent are y, then the step back, than x, then the step forward?
        log_ratio = log_density(y) + log_backward - log_density(x) - log_forward
        accepted = torch.rand(len(x)).log() < log_ratio
        x = torch.where(accepted[:, None], y, x)
        acceptances.append(accepted.float().mean().item())
    return x, np.mean(acceptances)


def print_mala(name, x, eta, step_over_4V, acceptance):
    """Variances of chains x (n, 2), scaled to V = 1, and the share of accepted steps."""
    along, across = x.var(dim=0).tolist()
    print(f"{name:22s} {eta:7.2g} {step_over_4V:9.3f} {along:9.2f} {across:8.3f} "
          f"{acceptance:11.3f}")


start = 2 * torch.rand(20000, 2) - 1
print("\n100 steps                                   variance / V (right: 1)\n"
      "on a Gaussian              eta step/(4V)     along   across    accepted")
for step_over_4V in [0.125, 0.625]:
    eta = step_over_4V * 4 * variances[1].item()
    x, acceptance = mala(gaussian_log_density, gaussian_score, start, 100, eta)
    print_mala("MALA", x / variances.sqrt(), eta, step_over_4V, acceptance)
# With M = covariance: the same as plain steps in the coordinates x / sqrt(variances), where V = 1.
x, acceptance = mala(normal_log_density, normal_score, start / variances.sqrt(), 100, 0.625 * 4)
print_mala("MALA, M = covariance", x, 0.625 * 4, 0.625, acceptance)

# In many dimensions d, with V = 1, the share of accepted steps is about 2 Phi(-sqrt(d eta^3) / 8)
# (theory.md 6.3), with the normal distribution function Phi. So for as many accepted steps eight
# times the dimension must be paid with half the step.
print("\nMALA on N(0, I)    d     eta    accepted    2 Phi(-sqrt(d eta^3) / 8)")
for d, eta in [(100, 0.2), (100, 0.5), (100, 0.8), (100, 1.1), (800, 1.1), (800, 0.55)]:
    x, acceptance = mala(normal_log_density, normal_score, torch.randn(500, d), 40, eta)
    argument = math.sqrt(d * eta**3) / 8
    formula = math.erfc(argument / math.sqrt(2))         # erfc(a / sqrt(2)) = 2 Phi(-a)
    print(f"{d:20d} {eta:7.2f} {acceptance:11.3f} {formula:16.3f}")


# %% Result
print(f"\npictures in {args.outdir}; look at grid.png first")
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
