"""Implicit score matching: learn the score of a density from its points alone, without noise.

    score       s*(x) = grad log p(x), an arrow towards where the data are denser; p is unknown
    theorem     E|s - s*|^2 / 2  =  E[|s|^2 / 2 + tr ds/dx]  +  E|s*|^2 / 2   for every s(x) with
                s p = 0 at the ends; E is the mean over x from p, tr ds/dx the sum of ds_i/dx_i
    training    minimise the mean of |s|^2 / 2 + tr ds/dx over the data: s* is not in it
    sampling    x + eta/2 s(x) + sqrt(eta) z, many times: half a step along the arrow, and noise

    python implicit_sm.py                        # look at out_implicit_sm/scores.png
    python implicit_sm.py --activation relu      # a trap; see the extra "what does a ReLU do?"
    python implicit_sm.py --help                 # all settings; in a notebook, edit their defaults

The data are mixtures of Gaussians, so the exact score is known and everything can be measured
against it. The default run takes 30 s on one core (Python 3.11, torch 2.13.0). Its last line:

    seed=0 ... err_1d=0.0736 err_2d=0.0578 err_hutchinson=0.0617 SW2=0.0861 floor=0.0739 ...

err_1d, err_2d and err_hutchinson are relative errors of learned scores: 0 is exact, 1 no better
than s = 0. SW2 is the sliced Wasserstein distance of the samples to fresh data, and its floor that
of fresh data to other fresh data: samples whose SW2 is at most 1.3 times the floor are good. (The
line has identity=4e-16, too: by how much the theorem is missed, which is round-off.)

Read beside: notes 001 problem 2; 002 part 1.3 and its closing question; 003 sections 4.1, 4.2.1,
exercise 4.1; theory.md sections 3, 9 and 10.
"""
# %% Settings
import argparse
import json
import math
import os
import sys
import time
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from torch.distributions import Laplace, Normal, StudentT, Uniform
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


parser = argparse.ArgumentParser(description="Implicit score matching in one and two dimensions",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--n", type=number(int, 2, 10**7), default=20_000,
                    help="training points, as many in 1-D as in 2-D")
parser.add_argument("--activation", default="silu", help="of the networks; relu fails",
                    choices=["silu", "softplus", "tanh", "relu"])
parser.add_argument("--hidden", type=number(int, 1, 8192), default=64, help="width of the networks")
parser.add_argument("--layers", type=number(int, 1, 64), default=2, help="hidden layers")
parser.add_argument("--n_hutchinson", type=number(int, 1, 10**4), default=1,
                    help="random vectors per point in Hutchinson's estimate of the trace")
parser.add_argument("--steps", type=number(int, 1, 10**7), default=600,
                    help="training steps of each network")
parser.add_argument("--batch", type=number(int, 1, 10**6), default=512, help="points in a step")
parser.add_argument("--lr", type=number(float, 1e-8, 1), default=0.02, help="peak of the rate")
parser.add_argument("--K", type=number(int, 1, 10**5), default=200, help="Langevin steps")
parser.add_argument("--eta", type=number(float, 1e-6, 2), default=0.1,
                    help="Langevin step, at most 2; from 4 on the points would run away")
parser.add_argument("--n_samples", type=number(int, 2, 10**6), default=2000,
                    help="points in a set of samples")
parser.add_argument("--n_few", type=number(int, 2, 10**6), default=30,
                    help="training points in the extra on few points")
parser.add_argument("--sigma", type=number(float, 0.1, 1), default=0.5,
                    help="standard deviation of the noise in the extras")
parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all randomness")
parser.add_argument("--outdir", default="out_implicit_sm", help="folder for pictures and results")
in_notebook = "kernel_launcher" in sys.argv[0]      # there the command line is the kernel's
args = parser.parse_args([] if in_notebook else None)  # in a notebook, settings go into []
if args.batch > args.n:
    parser.error(f"argument --batch: {args.batch} is more than the {args.n} points of --n")
if args.n_few > args.n:
    parser.error(f"argument --n_few: {args.n_few} is more than the {args.n} points of --n")
try:                                                     # all settings are right: make the folder
    os.makedirs(args.outdir, exist_ok=True)
except OSError as error:
    parser.error(f"argument --outdir: cannot make {args.outdir} ({error.strerror})")
if not os.access(args.outdir, os.W_OK):
    parser.error(f"argument --outdir: cannot write to {args.outdir}")
if args.activation == "relu":
    print("warning: with relu the gradient of the loss is wrong and little is learned; the extra "
          "\"what does a ReLU do?\" says why")

torch.manual_seed(args.seed)
torch.set_num_threads(1)                            # a second core is no help to so small a net


# %% Data
# Two mixtures of round Gaussians: one in 1-D, and in 2-D that of 003 section 4.1, half N(-m, I) and
# half N(m, I) with m = (2, 0). Their scores are known: each Gaussian pulls x to its mean.
def gmm_score(x, means, weights, stds=1.0):
    """grad log p(x) = sum over k of share_k(x) (mean_k - x) / std_k^2, (..., d) -> (..., d).

    Called as in 003 section 4.1.3: means (K, d) may be a list of points, weights (K,) a list of
    numbers. stds is a number or (K,).
    """
    means = torch.stack([torch.as_tensor(mean) for mean in means]).to(x)      # to(x): of x's type
    weights = torch.as_tensor(weights).to(x)
    stds = torch.as_tensor(stds).to(x).expand(len(means))
    d = means.shape[1]
    if x.shape[-1] != d:
        raise ValueError(f"points of dimension {x.shape[-1]} for a mixture of dimension {d}")
    to_mean = means - x[..., None, :]                                 # (..., K, d)
    square = to_mean.square().sum(dim=-1) / stds**2                   # (..., K)
    log_density = weights.log() - 0.5 * square - d * stds.log()       # of each, + a constant
    # The chance that x came from Gaussian k. Where we have softmax, 003 divides by density + 1e-8,
    # and so loses the score far from all means: at (10, 0) it is -8, with 003's code -5e-6.
    share = log_density.softmax(dim=-1)                               # (..., K)
    pull = to_mean / stds[:, None] ** 2                               # the score of each Gaussian
    return (share[..., None] * pull).sum(dim=-2)


class Mixture:
    """Gaussians N(mean_k, std_k^2 I) with weights: means (K, d), weights (K,), stds (K,)."""

    def __init__(self, means, weights, stds):
        self.means = torch.as_tensor(means)
        self.weights = torch.as_tensor(weights)
        self.stds = torch.as_tensor(stds)

    def sample(self, n):
        """n independent points (n, d): choose a Gaussian, draw from it."""
        k = torch.multinomial(self.weights, n, replacement=True)      # which Gaussian
        return self.means[k] + self.stds[k, None] * torch.randn(n, self.means.shape[1])

    def density(self, x):
        """p(x), (..., d) -> (...)."""
        stds = self.stds.to(x)                                        # (K,), of x's type
        to_mean = self.means - x[..., None, :]                        # (..., K, d)
        square = to_mean.square().sum(dim=-1) / stds**2               # (..., K)
        factor = (math.sqrt(2 * math.pi) * stds) ** x.shape[-1]
        return (self.weights * (-0.5 * square).exp() / factor).sum(dim=-1)

    def score(self, x):
        """grad log p(x), (..., d) -> (..., d)."""
        return gmm_score(x, self.means, self.weights, self.stds)


law_1d = Mixture([[-1.2], [1.0]], [0.4, 0.6], [0.35, 0.5])
law_2d = Mixture([[-2.0, 0.0], [2.0, 0.0]], [0.5, 0.5], [1.0, 1.0])
x_data_1d = law_1d.sample(args.n)                                     # (n, 1)
x_data = law_2d.sample(args.n)                                        # (n, 2)


def exact_score(x):
    """grad log p of the 2-D data, (B, 2) -> (B, 2)."""
    return law_2d.score(x)


# %% The identity
# What one would like to minimise is the "explicit" loss E(s - s*)^2 / 2, with E the mean over x
# from p. It cannot be computed from data, since s* is what we are looking for. Multiply out:
#
#     E(s - s*)^2 / 2  =  E s^2 / 2  -  E[s s*]  +  E s*^2 / 2.
#
# Only the middle has both s and s*. But s* = p'/p, so it is an integral of s p', and by parts
#
#     E[s s*]  =  integral of s p'  =  [s p] at the ends  -  integral of s' p  =  0 - E s'.
#
# (On the whole line s p falls to 0 at the ends, if E|s| is finite; theory.md 3.1.) So
#
#     explicit loss  =  E[s^2 / 2 + s']  +  I/2     with the Fisher information I = E s*^2.
#
# The first mean is the "implicit" loss: it needs points and s only. I/2 does not depend on s. Here
# are both sides for a few s, as areas under curves on a fine grid. (003 has no 1/2 on the left.
# What it calls a constant is then 2 explicit - implicit = implicit + I, and changes with s: the
# last column.)
def both_sides(s, x, p, s_exact):
    """explicit and implicit loss of s on the grid x under the density p, all (N,): two numbers."""
    # Each s(x) depends on its own x only, so the gradient of their sum has all the slopes.
    slope = torch.autograd.grad(s.sum(), x)[0]                        # s'(x) at each x, (N,)
    explicit = torch.trapezoid(p * (s - s_exact) ** 2 / 2, x)
    implicit = torch.trapezoid(p * (s**2 / 2 + slope), x)
    return explicit.item(), implicit.item()


x = torch.linspace(-9, 9, 18001, dtype=torch.float64, requires_grad=True)
p = law_1d.density(x[:, None])
s_exact = law_1d.score(x[:, None])[:, 0]
half_fisher_1d = torch.trapezoid(p * s_exact**2 / 2, x).item()
values_of_s = {"-x": -x, "x^2": x**2, "sin 3x": torch.sin(3 * x), "s*": s_exact}   # s on the grid
largest_difference = 0.0
print(f"The 1-D mixture, I/2 = {half_fisher_1d:.5f} (difference: good if it is round-off)\n"
      "s(x)      implicit     explicit   implicit + I/2   difference   003's \"constant\"")
for name, s in values_of_s.items():
    explicit, implicit = both_sides(s, x, p, s_exact)
    difference = explicit - implicit - half_fisher_1d
    largest_difference = max(largest_difference, abs(difference))
    print(f"{name:7s} {implicit:10.5f} {explicit:12.5f} {implicit + half_fisher_1d:16.5f} "
          f"{difference:12.0e} {2 * explicit - implicit:18.5f}")

# The ends matter. Exp(1) has p = exp(-x) for x > 0 and s* = -1. At its end x = 0 the density jumps
# to 0, and [s p] = -s(0) p(0) is left, so that E[s s*] = -s(0) p(0) - E s' and
#
#     explicit loss  =  implicit loss  +  I/2  +  s(0) p(0).
#
# Of the constants s the implicit loss then prefers 0, though -1 is right (theory.md 3.5).
x = torch.linspace(0, 40, 40001, dtype=torch.float64, requires_grad=True)
p = torch.exp(-x)
s_exact = -torch.ones_like(x)
print("\nExp(1), I/2 = 0.5\n"
      "s(x)      implicit     explicit   implicit + I/2   difference     s(0) p(0)")
for constant in [0.0, -1.0, -2.0]:
    s = constant + 0 * x                                 # so that autograd finds x in it
    explicit, implicit = both_sides(s, x, p, s_exact)
    difference = explicit - implicit - 0.5
    print(f"{constant:<7g} {implicit:10.5f} {explicit:12.5f} {implicit + 0.5:16.5f} "
          f"{difference:12.5f} {constant:13.5f}")


# %% Loss
# In d dimensions s' becomes tr ds/dx = ds_1/dx_1 + ... + ds_d/dx_d, the trace of the Jacobian J.
# Autograd gives one row of J in a backward pass, so the trace takes d passes. Hutchinson's estimate
# takes one. Draw a random sign v_i for each coordinate. Then E[v_i v_j] is 1 for i = j and 0
# otherwise, so that E[v^T J v] = sum over i, j of E[v_i v_j] ds_i/dx_j is the trace. One v a point
# is enough: its loss and gradient are right in the mean, and the mean is taken by batch and steps.
@torch.enable_grad()                                     # 003's fails under torch.no_grad()
def compute_score_matching_loss(model, x):
    """Mean of |s|^2 / 2 + tr ds/dx over the points x (B, d) -> (); 003 section 4.2.1."""
    x = x.detach().requires_grad_()                      # the caller's x stays as it is
    s = model(x)                                         # (B, d)
    trace = 0
    for i in range(x.shape[1]):
        # create_graph: the weights' gradient will be taken of this derivative. (It also keeps the
        # graph for the next i. With retain_graph alone the trace would be a constant to the
        # weights, and s = 0 the best.)
        row = torch.autograd.grad(s[:, i].sum(), x, create_graph=True)[0]      # (B, d), row i of J
        trace = trace + row[:, i]                        # ds_i/dx_i at each point, (B,)
    return (0.5 * s.square().sum(dim=1) + trace).mean()


@torch.enable_grad()
def compute_score_matching_loss_hutchinson(model, x, n_hutchinson=1):
    """The same with an estimated trace: n_hutchinson backward passes, whatever d is."""
    x = x.detach().requires_grad_()
    s = model(x)
    trace = 0
    for _ in range(n_hutchinson):
        # 003 draws v from N(0, I). Random signs vary less: v_i^2 is always 1.
        v = torch.randn_like(x).sign()                                         # (B, d)
        vJ = torch.autograd.grad((v * s).sum(), x, create_graph=True)[0]       # v^T J, (B, d)
        trace = trace + (vJ * v).sum(dim=1)
    return (0.5 * s.square().sum(dim=1) + trace / n_hutchinson).mean()


# %% Model
# A formula makes a first guess: the score of one Gaussian with the mean and spread of the data,
# (mean - x) / std^2. The network adds what this guess misses. It sees (x - mean) / std, and its
# answer is divided by std, so that it works with numbers of size 1 whatever the unit of x.
class ScoreNetwork(nn.Module):
    """model(x) -> score, (B, d) -> (B, d); mean and std (d,) are those of the data."""

    def __init__(self, mean, std, activation="silu"):
        super().__init__()
        self.register_buffer("mean", mean)               # saved with the weights, not trained
        self.register_buffer("std", std)
        units = {"silu": nn.SiLU, "softplus": nn.Softplus, "tanh": nn.Tanh, "relu": nn.ReLU}
        layers = []
        width = len(mean)
        for _ in range(args.layers):
            layers.append(nn.Linear(width, args.hidden))
            layers.append(units[activation]())
            width = args.hidden
        last = nn.Linear(width, len(mean))
        nn.init.zeros_(last.weight)                      # an untrained network answers 0,
        nn.init.zeros_(last.bias)                        # so training begins at the first guess
        self.net = nn.Sequential(*layers, last)

    def forward(self, x):
        scaled = (x - self.mean) / self.std              # (B, d), of size 1
        first_guess = -scaled / self.std
        return first_guess + self.net(scaled) / self.std


def new_network(x, activation=args.activation):
    """An untrained network for points like x (n, d)."""
    return ScoreNetwork(x.mean(dim=0), x.std(dim=0), activation)


# %% Training
# The least possible loss is that of the exact score, -I/2 (put s = s* into the identity): negative,
# not 0. What is above it is the explicit loss of the learned score. All this is true of means over
# p. So the loss is watched at fresh points, too, since at the training points it can fall below
# (see the extra on few points).
def train(model, loss_function, x_train, x_fresh):
    """Trains with loss_function(model, x).  -> lists under the keys step, loss, fresh_loss.

    fresh_loss is the implicit loss at 1000 fresh points of the law whose score is to be learned.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)   # fused: faster
    # The learning rate rises for 15 % of the steps, then falls to 0. The high rates in the middle
    # learn fast, and the low ones at the end take out the noise of the steps. (By default it also
    # lowers Adam's momentum while the rate is high.)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.15)
    history = {"step": [], "loss": [], "fresh_loss": []}
    interval = max(1, args.steps // 20)
    losses = []
    for step in tqdm(range(1, args.steps + 1), desc="training", leave=False):
        x = x_train[torch.randint(len(x_train), (args.batch,))]
        loss = loss_function(model, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            sys.exit(f"the loss is {losses[-1]} at step {step}: try a --lr below {args.lr:g}")
        if step % interval == 0 or step == args.steps:
            history["step"].append(step)
            history["loss"].append(np.mean(losses[-interval:]))
            fresh_loss = compute_score_matching_loss(model, x_fresh[:1000]).item()
            history["fresh_loss"].append(fresh_loss)
    model.requires_grad_(False)                          # trained: no more gradients by weights
    return history


x_fresh_1d = law_1d.sample(20_000)
x_fresh = law_2d.sample(20_000)
model_1d = new_network(x_data_1d)
model = new_network(x_data)
model_hutchinson = new_network(x_data)
hutchinson = partial(compute_score_matching_loss_hutchinson, n_hutchinson=args.n_hutchinson)

started = time.time()
history_1d = train(model_1d, compute_score_matching_loss, x_data_1d, x_fresh_1d)
history_2d = train(model, compute_score_matching_loss, x_data, x_fresh)
history_hutchinson = train(model_hutchinson, hutchinson, x_data, x_fresh)
train_s = time.time() - started
torch.save(model.state_dict(), os.path.join(args.outdir, "model.pt"))


def measure(model, law, x_train, x_fresh, loss_function=compute_score_matching_loss):
    """A dict of numbers: the loss at x_train and at fresh points, of the model and of the exact s*.

    loss_function is for x_train. error is sqrt(mean |s - s*|^2 / mean |s*|^2) at fresh points.
    """
    exact = law.score(x_fresh)
    return {"train": loss_function(model, x_train).item(),
            "train_exact": loss_function(law.score, x_train).item(),
            "fresh": compute_score_matching_loss(model, x_fresh).item(),
            "fresh_exact": compute_score_matching_loss(law.score, x_fresh).item(),
            "error": ((model(x_fresh) - exact).norm() / exact.norm()).item()}


columns = "training: learned   exact     fresh: learned   exact     relative error"


def print_row(name, measured):
    """A line of a table of networks, below `columns`."""
    print(f"{name:26s} {measured['train']:17.3f} {measured['train_exact']:7.3f} "
          f"{measured['fresh']:18.3f} {measured['fresh_exact']:7.3f} {measured['error']:18.3f}")


measured_1d = measure(model_1d, law_1d, x_data_1d, x_fresh_1d)
measured_2d = measure(model, law_2d, x_data, x_fresh)
measured_hutchinson = measure(model_hutchinson, law_2d, x_data, x_fresh)
axis = torch.linspace(-8, 8, 321)                        # I/2 in 2-D: a sum over cells 0.05 wide
plane = torch.cartesian_prod(axis, axis)
square = exact_score(plane).square().sum(dim=1)
half_fisher_2d = (law_2d.density(plane) * square / 2).sum().item() * 0.05**2

print(f"\nImplicit loss (least possible in the mean: -I/2 = {-half_fisher_1d:.3f} in 1-D, "
      f"{-half_fisher_2d:.3f} in 2-D)\n{'network':26s} {columns}")
print_row(f"1-D, {args.activation}, exact trace", measured_1d)
print_row(f"2-D, {args.activation}, exact trace", measured_2d)
print_row(f"2-D, {args.activation}, Hutchinson ({args.n_hutchinson})", measured_hutchinson)
print("Learned should be near exact. At training points it may be a little below, since it was "
      "fitted to them;\nfar below, it has learned them by heart, and is far above at fresh points.")

points = torch.tensor([[-2.0], [-1.0], [-0.5], [0.0], [1.0], [2.0]])
exact_there = law_1d.score(points)
learned_there = model_1d(points)
print("\n1-D:           x" + "".join(f"{value:8.2f}" for value in points[:, 0]))
print("     exact score" + "".join(f"{value:8.2f}" for value in exact_there[:, 0]))
print("   learned score" + "".join(f"{value:8.2f}" for value in learned_there[:, 0]))


# %% Sampling
# Langevin dynamics walks along the score and is shaken at every step, and so ends up distributed as
# the density whose score it follows. It starts from one Gaussian as wide as the data. Its steps
# must be short: a Gaussian of variance 1 comes out with the variance 1 / (1 - eta/4) (theory.md
# 6.2). (`train` has switched the weights' gradients off, so no graph grows along the walk.)
def score(x):
    """The learned grad log p of the 2-D data, (B, 2) -> (B, 2)."""
    return model(x)


def langevin_dynamics(score, x, K, eta):
    """K times x + eta/2 s(x) + sqrt(eta) z, from x (B, d)."""
    for _ in range(K):
        z = torch.randn_like(x)
        x = x + eta / 2 * score(x) + math.sqrt(eta) * z
    return x


sample_sets = []
for _ in tqdm(range(4), desc="sampling", leave=False):   # one set says little about a distance
    x_start = model.mean + model.std * torch.randn(args.n_samples, 2)
    sample_sets.append(langevin_dynamics(score, x_start, args.K, args.eta))
samples = sample_sets[-1]                                # (n_samples, 2)
if not torch.isfinite(torch.cat(sample_sets)).all():
    sys.exit("the Langevin chains ran away, for the learned score does not lead back to the data: "
             "train longer, with more points --n, or with a smooth --activation")
np.save(os.path.join(args.outdir, "samples.npy"), samples.numpy())


# %% Check
# How far are the samples from the data? Even two fresh sets of data are some way apart: that is the
# floor.
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


fresh_sets = [sorted_projections(law_2d.sample(args.n_samples)) for _ in range(8)]
perfect_sets = [sorted_projections(law_2d.sample(args.n_samples)) for _ in range(8)]
sw2 = mean_sw2([sorted_projections(x) for x in sample_sets], fresh_sets)
sw2_floor = mean_sw2(perfect_sets, fresh_sets)           # what perfect samples would get
print(f"\nSW2 of the 2-D samples to fresh data: {sw2:.4f}, its floor {sw2_floor:.4f}, "
      f"ratio {sw2 / sw2_floor:.2f} (good: below 1.3)")

summary = {"seed": args.seed, "steps": args.steps, "activation": args.activation,
           "identity": float(f"{largest_difference:.0e}"), "err_1d": round(measured_1d["error"], 4),
           "err_2d": round(measured_2d["error"], 4),
           "err_hutchinson": round(measured_hutchinson["error"], 4),
           "SW2": round(sw2, 4), "floor": round(sw2_floor, 4),
           "train_s": round(train_s, 1)}
with open(os.path.join(args.outdir, "summary.json"), "w") as file:
    json.dump({"settings": vars(args), "figures": summary}, file, indent=1)


# %% Pictures
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"        # truth, what is learned, the rest
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 10})
view = [-4.5, 4.5, -3.5, 3.5]                            # left, right, bottom, top
line = torch.linspace(-3.2, 3.2, 400)[:, None]           # (400, 1)


def grid(n_x, n_y):
    """Points of the visible part of the plane, (n_x n_y, 2), row by row."""
    y, x = torch.meshgrid(torch.linspace(-3.5, 3.5, n_y), torch.linspace(-4.5, 4.5, n_x),
                          indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def panel(ax, title):
    """A panel of the plane with the same limits as all others."""
    ax.axis(view)
    ax.set(aspect="equal", title=title, xticks=[], yticks=[])


def dots(ax, x, colour):
    """Points (n, 2), 2000 at most."""
    ax.scatter(x[:2000, 0], x[:2000, 1], s=3, color=colour, alpha=0.5, linewidths=0)


def shade(ax):
    """The density of the 2-D data in grey."""
    density = law_2d.density(grid(90, 70)).view(70, 90)
    ax.contourf(density, 12, extent=view, cmap="Greys", vmax=2 * density.max())


def arrows(ax, x, vectors, colour):
    """Arrows at x, an eighth as long as the vectors."""
    ax.quiver(x[:, 0], x[:, 1], vectors[:, 0], vectors[:, 1], color=colour, width=0.005,
              angles="xy", scale_units="xy", scale=8)


def curve(ax, values, colour, label, style="-"):
    """A score in 1-D: its values (400, 1) over `line`."""
    ax.plot(line, values, style, color=colour, label=label)
    ax.set(ylim=(-8, 8), xlabel="$x$", ylabel="$s(x)$")


def shade_1d(ax, density):
    """A density (400,) over `line` in grey, at the bottom of a panel of scores."""
    ax.fill_between(line[:, 0], -8, 8 * density - 8, color="0.85", linewidth=0)


def draw_loss(ax, history, law, x, half_fisher):
    """The loss while training, beside that of the exact score at the same fresh points x (n, d)."""
    exact_loss = compute_score_matching_loss(law.score, x).item()
    ax.plot(history["step"], history["loss"], "o-", ms=3, color=ORANGE, label="training points")
    ax.plot(history["step"], history["fresh_loss"], "s--", ms=3, color="black",
            label=f"{len(x)} fresh points")
    ax.axhline(exact_loss, color=BLUE, ls="--", label=f"exact score, the {len(x)} points")
    ax.axhline(-half_fisher, color=GREY, label="exact score, in the mean: $-I/2$")
    ax.set(xlabel="step", title=f"{x.shape[1]}-D: implicit loss")


fig, axs = plt.subplots(2, 3, figsize=(12.5, 7))
shade_1d(axs[0, 0], law_1d.density(line))
curve(axs[0, 0], law_1d.score(line), BLUE, "exact")
curve(axs[0, 0], model_1d(line), ORANGE, "learned")
axs[0, 0].set_title(f"1-D: score over the density, relative error {measured_1d['error']:.2f}")
axs[0, 0].legend()
draw_loss(axs[0, 1], history_1d, law_1d, x_fresh_1d[:1000], half_fisher_1d)
draw_loss(axs[0, 2], history_2d, law_2d, x_fresh[:1000], half_fisher_2d)
axs[0, 2].legend(fontsize=8)
where = grid(18, 14)
shade(axs[1, 0])
arrows(axs[1, 0], where, exact_score(where), BLUE)
panel(axs[1, 0], "2-D: exact score over the density")
shade(axs[1, 1])
arrows(axs[1, 1], where, score(where), ORANGE)
panel(axs[1, 1], f"2-D: learned score, relative error {measured_2d['error']:.2f}")
dots(axs[1, 2], law_2d.sample(2000), BLUE)
dots(axs[1, 2], samples, ORANGE)
panel(axs[1, 2], f"2-D: samples, data (blue), SW2 = {sw2 / sw2_floor:.2f} floors")
fig.savefig(os.path.join(args.outdir, "scores.png"))


# %% Extra: what if there are few points?
# The loss at finitely many points has no least value. With s(x_i) = 0 and s'(x_i) = -k at each
# training point it is -k, for any k: the network learns the points by heart, and is wrong between
# them. With few points this happens soon. The sign is a training loss far below that of the exact
# score at the same points.
#
# Noise is the remedy: it makes many points of one. And it makes the trace superfluous. For eps from
# N(0, I) integration by parts gives E[eps_i f(eps)] = E[df/deps_i], as the density of eps has the
# slope -eps_i times itself. With f = s_i(x + sigma eps), whose slope is sigma ds_i/dx_i, summed up
# over i,
#
#     E[eps . s(x + sigma eps)]  =  sigma E[tr J],     and so
#     E|s(x + sigma eps) + eps/sigma|^2 / 2  =  implicit loss at the noisy points  +  d/(2 sigma^2).
#
# The left side is the loss of denoising score matching (dsm_2d.py). So this equation is a bridge:
# denoising is implicit score matching of the noisy data (theory.md 3.7, 3.8). And since a square is
# never negative, this implicit loss can't fall below -d/(2 sigma^2), in 1-D with sigma = 0.5 below
# -2. (That is a bound. The least value is again -I/2, with the I of the noisy data.)
def implicit_loss_by_denoising(model, x):
    """Implicit loss at noisy points x + sigma eps, over the bridge; x (B, d) -> ()."""
    eps = torch.randn_like(x)
    # Each point with eps and with -eps: then much of what is chance cancels.
    x = torch.cat([x, x])
    eps = torch.cat([eps, -eps])
    s = model(x + args.sigma * eps)
    denoising = 0.5 * (s + eps / args.sigma).square().sum(dim=1).mean()
    return denoising - x.shape[1] / (2 * args.sigma**2)


def noisy_points(law, n):
    """n points x + sigma eps with x from the law, (n, d)."""
    x = law.sample(n)
    return x + args.sigma * torch.randn_like(x)


def bridge_sides(model):
    """Implicit loss at noisy points of the 1-D law, by derivatives and by denoising: two (20,)."""
    by_derivatives = []
    by_denoising = []
    for _ in range(20):
        by_derivatives.append(compute_score_matching_loss(model, noisy_points(law_1d, 5000)))
        by_denoising.append(implicit_loss_by_denoising(model, law_1d.sample(5000)))
    return torch.stack(by_derivatives).detach(), torch.stack(by_denoising).detach()


def wave(x):
    """Any function will do for the bridge: here sin 3x."""
    return torch.sin(3 * x)


x_few = x_data_1d[:args.n_few]
noisy_law = Mixture(law_1d.means, law_1d.weights, (law_1d.stds**2 + args.sigma**2).sqrt())
x_fresh_noisy = noisy_points(law_1d, 20_000)
model_few = new_network(x_few)
model_denoising = new_network(x_few)
history_few = train(model_few, compute_score_matching_loss, x_few, x_fresh_1d)
history_denoising = train(model_denoising, implicit_loss_by_denoising, x_few, x_fresh_noisy)
x_few_often = x_few.repeat(1000, 1)                      # each point with 1000 draws of eps
name = f"{args.n_few} points in 1-D"
print(f"\n{name:26s} {columns}")
print_row("implicit", measure(model_few, law_1d, x_few, x_fresh_1d))
print_row(f"denoising, sigma = {args.sigma:g}", measure(
    model_denoising, noisy_law, x_few_often, x_fresh_noisy, implicit_loss_by_denoising))
print("(The second row is about the noisy data: their score, and noisy points.)\n\n"
      "Implicit loss at noisy points, both ways (difference: good below 3 standard errors)\n"
      "s                       by derivatives    by denoising    difference    standard error")
for name, s in {"sin 3x": wave, "learned by denoising": model_denoising}.items():
    by_derivatives, by_denoising = bridge_sides(s)
    difference = by_derivatives - by_denoising
    standard_error = difference.std() / math.sqrt(20)
    print(f"{name:23s} {by_derivatives.mean():14.3f} {by_denoising.mean():15.3f} "
          f"{difference.mean():13.3f} {standard_error:17.3f}")


def draw_few():
    """few_points.png: the losses, and what was learned."""
    fig, axs = plt.subplots(1, 2, figsize=(11, 4.2))
    axs[0].plot(history_few["step"], history_few["loss"], "o-", color=ORANGE,
                label="implicit, training points")
    axs[0].plot(history_few["step"], history_few["fresh_loss"], "o-", color="black",
                label="implicit, fresh points")
    axs[0].plot(history_few["step"], history_denoising["loss"], "--", color=ORANGE,
                label="denoising, training points")
    axs[0].plot(history_few["step"], history_denoising["fresh_loss"], "--", color="black",
                label="denoising, fresh points")
    axs[0].set(xlabel="step", yscale="symlog",
               title=f"Implicit loss with {args.n_few} training points\n(least possible for the "
                     f"clean data: {-half_fisher_1d:.2f})")
    shade_1d(axs[1], law_1d.density(line))
    curve(axs[1], law_1d.score(line), BLUE, "exact")
    curve(axs[1], model_few(line), ORANGE, "learned, implicit loss")
    curve(axs[1], noisy_law.score(line), BLUE, "exact, noisy data", "--")
    curve(axs[1], model_denoising(line), ORANGE, "learned by denoising", "--")
    axs[1].plot(x_few, torch.full_like(x_few, -7.6), "|", color="black")
    axs[1].set_title("Learned by heart between the points (ticks); noise is the remedy")
    axs[0].legend(fontsize=8)
    axs[1].legend(fontsize=8)
    fig.savefig(os.path.join(args.outdir, "few_points.png"))


draw_few()


# %% Extra: what does a ReLU do?
# The loss has the right value, for s is continuous, and so its integration by parts is right in
# spite of the kinks. But autograd's gradient of the loss is wrong. Take the unit
# s = relu(x - theta) for x from N(0, 1). Its s' is 0 left of theta and 1 right of it, so
# E s' = P(x > theta), which falls as theta grows, at the rate p(theta). Autograd takes the mean of
# the slopes of s' in theta at each point, which are all 0, since s' is constant but for a jump. So
# its slope of the loss lacks -p(theta), which is -0.38 at theta = 0.3, and training goes downhill
# on something else. Smooth units are free of this; so is denoising, which has no s' (theory.md
# 3.6).
def unit_loss(unit, theta, x):
    """Implicit loss of s = unit(x - theta) at points x (B, 1), a tensor ()."""
    def shifted_unit(x):
        return unit(x - theta)
    return compute_score_matching_loss(shifted_unit, x)


def unit_slopes(unit, n):
    """d loss / d theta at theta = 0.3 over n points, by autograd, by a difference: two numbers."""
    x = torch.randn(n, 1)
    theta = torch.tensor(0.3, requires_grad=True)
    by_autograd = torch.autograd.grad(unit_loss(unit, theta, x), theta)[0]
    by_difference = (unit_loss(unit, 0.35, x) - unit_loss(unit, 0.25, x)) / (0.35 - 0.25)
    return by_autograd.item(), by_difference.item()


print("\n        slope of the loss in theta              relative error of\n"
      "unit    by autograd    by a difference (true)   a network in 1-D")
for name, unit in {"silu": nn.SiLU(), "relu": nn.ReLU()}.items():
    by_autograd, by_difference = unit_slopes(unit, 1_000_000)
    network = model_1d
    if name != args.activation:
        network = new_network(x_data_1d, name)
        train(network, compute_score_matching_loss, x_data_1d, x_fresh_1d)
    error = measure(network, law_1d, x_data_1d, x_fresh_1d)["error"]
    print(f"{name:7s} {by_autograd:11.3f} {by_difference:25.3f} {error:18.3f}")


# %% Extra: what does a score look like?
# 003 section 4.1, on its own example, which is our 2-D law. Where s = 0, the Jacobian ds/dx (for an
# exact score the Hessian of log p) tells what the point is: if all eigenvalues are negative, the
# arrows lead into it from all sides, a peak. The divergence, their sum, does not tell: it is +2 at
# the saddle, and where it is 0 there need be nothing at all (theory.md 9).
def kind_of_point(s, real_parts, tolerance=1e-4):
    """What a point is for dx/dt = s; s (d,) and the real parts of the eigenvalues (d,)."""
    if s.norm() > tolerance:
        return "not critical"
    if real_parts.abs().min() <= tolerance:
        return "degenerate"
    if (real_parts < 0).all():
        return "peak"
    if (real_parts > 0).all():
        return "valley"
    return "saddle"


def analyze_score_geometry(score_fn, x):
    """At x, (d,) or (B, d): a dict with score, divergence, hessian, eigenvalues by real part, kind.

    Of 003 section 4.1.3. Its code sums over a batch, and copies one half of the Jacobian over the
    other; a learned field need not be a gradient, so that the halves may differ.
    """
    points = torch.atleast_2d(x.detach()).requires_grad_()                     # (B, d)
    s = score_fn(points)
    if s.shape != points.shape:
        raise ValueError(f"score_fn answers {tuple(s.shape)} to points {tuple(points.shape)}")
    rows = []
    for i in range(points.shape[1]):
        row = torch.autograd.grad(s[:, i].sum(), points, retain_graph=True)[0]     # (B, d)
        rows.append(row)
    s = s.detach()
    jacobian = torch.stack(rows, dim=1)                                        # (B, d, d)
    eigenvalues = torch.linalg.eigvals(jacobian)                               # (B, d), complex
    eigenvalues = eigenvalues.gather(1, eigenvalues.real.argsort(dim=1))
    kinds = []
    for i in range(len(points)):
        kinds.append(kind_of_point(s[i], eigenvalues[i].real))
    if not eigenvalues.imag.any():
        eigenvalues = eigenvalues.real
    result = {"score": s, "divergence": jacobian.diagonal(dim1=1, dim2=2).sum(dim=1),
              "hessian": jacobian, "eigenvalues": eigenvalues, "kind": kinds}
    if x.dim() == 1:
        result = {key: value[0] for key, value in result.items()}
    return result


def find_critical_points(score_fn, x):
    """Points (M, d) where s = 0, by x_1, from starts x (B, d): Newton steps, at most 1/2 long."""
    for _ in range(40):
        geometry = analyze_score_geometry(score_fn, x)
        inverse = torch.linalg.pinv(geometry["hessian"])                       # (B, d, d)
        step = -torch.einsum("bij,bj->bi", inverse, geometry["score"])
        x = x + step * (0.5 / step.norm(dim=1, keepdim=True)).clamp(max=1)
    arrived = score_fn(x).norm(dim=1) < 1e-4
    found = []
    for point in sorted(x[arrived].tolist()):
        point = torch.tensor(point)
        if all((point - other).norm() > 0.01 for other in found):              # each only once
            found.append(point)
    return torch.stack(found) if found else x[:0]


def level_set():
    """Points (601, 2) on the level set of p through (0, 1).

    log p = -|x|^2 / 2 + log cosh(2 x_1) + constant (theory.md 9.2), solved for x_2.
    """
    x_1 = torch.linspace(-3, 3, 601)
    x_2 = (1 - x_1**2 + 2 * torch.cosh(2 * x_1).log()).sqrt()
    return torch.stack([x_1, x_2], dim=1)


def level_set_cosine(score_fn):
    """The mean |cos| of the angle between the score and the level set: 0 if they are orthogonal."""
    points = level_set()
    tangent = points[2:] - points[:-2]
    return torch.cosine_similarity(tangent, score_fn(points[1:-1])).abs().mean().item()


def print_points(name, points, geometry):
    """A line for each of the points (M, 2)."""
    for i, (x_1, x_2) in enumerate(points.tolist()):
        low, high = geometry["eigenvalues"][i].real.tolist()
        length = geometry["score"][i].norm()
        print(f"{name:7s}  ({x_1:8.5f}, {x_2:8.5f}) {length:10.5f} {low:13.5f} {high:9.5f} "
              f"{geometry['divergence'][i]:13.5f}    {geometry['kind'][i]}")


fields = {"exact": exact_score, "learned": score}
critical = {}                                            # field -> its critical points (M, 2)
geometries = {}                                          # field -> what they are
for name, field in fields.items():
    critical[name] = find_critical_points(field, grid(9, 7))
    geometries[name] = analyze_score_geometry(field, critical[name])
# 003's "peak", which is only near one; and a point of divergence 0, where cosh(2 x_1)^2 = 2.
others = torch.tensor([[-2.0, 0.0], [0.5 * math.acosh(math.sqrt(2)), 0.0]])
print("\nfield     point                   |score|         eigenvalues       divergence    kind")
print_points("exact", others, analyze_score_geometry(exact_score, others))
for name, field in fields.items():
    print_points(name, critical[name], geometries[name])
print("\nfield     |J - J^T| / |J| there (0: a gradient)   |cos| to a level set (0: orthogonal)")
for name, field in fields.items():
    jacobian = geometries[name]["hessian"]
    asymmetry = (jacobian - jacobian.mT).norm() / jacobian.norm()
    print(f"{name:7s} {asymmetry:22.0e} {level_set_cosine(field):39.0e}")

# Since E[s s*] = -E s' (cell "The identity"), with s = 1 and s = x_j: E s*_i = 0, and E s*_i x_j is
# -1 for i = j, else 0. The mean of s* s*^T is the Fisher information; here it is diag(0.7256, 1)
# (theory.md 9.3).
s = exact_score(x_data)
print(f"\nmeans over the {args.n} data points    exact   standard errors off (good: below 3)")
for name, values, exact in [("s_1", s[:, 0], 0), ("s_1 x_1", s[:, 0] * x_data[:, 0], -1),
                            ("s_1 x_2", s[:, 0] * x_data[:, 1], 0), ("s_1^2", s[:, 0]**2, 0.7256),
                            ("s_2^2", s[:, 1]**2, 1)]:
    standard_error = values.std().item() / math.sqrt(args.n)
    mean = values.mean().item()
    print(f"{name:8s} {mean:20.4f} {exact:16.4f} {(mean - exact) / standard_error:14.1f}")


def draw_geometry():
    """geometry.png: arrows, level sets, critical points, and where the divergence is 0."""
    fig, axs = plt.subplots(1, 2, figsize=(11, 4.7))
    for ax, name, colour in zip(axs, fields, [BLUE, ORANGE]):
        log_density = law_2d.density(grid(90, 70)).log().view(70, 90)
        geometry = analyze_score_geometry(fields[name], grid(45, 35))
        divergence = geometry["divergence"].view(35, 45)
        ax.contour(log_density, 12, extent=view, colors="0.75", linewidths=0.8, linestyles="-")
        ax.contour(divergence, [0], extent=view, colors="black", linestyles="--")
        arrows(ax, grid(18, 14), fields[name](grid(18, 14)), colour)
        for point, kind in zip(critical[name], geometries[name]["kind"]):
            marker = {"peak": "^", "saddle": "X"}.get(kind, "o")
            ax.plot(*point, marker, color="black", ms=9, mec="white")
        panel(ax, f"{name} score")
    fig.suptitle("Arrows cross level sets at right angles; peaks (triangles), saddle (cross), "
                 "divergence 0 (dashed)")
    fig.savefig(os.path.join(args.outdir, "geometry.png"))


draw_geometry()


# %% Extra: why Gaussian noise?
# 002's last question. Add noise n of density k to x. The noisy data y = x + n have the density
#
#     q(y)  =  integral of p(x) k(y - x) dx.
#
# Differentiate by y, which stands in k only, and divide by q:
#
#     grad log q(y)  =  integral of p(x) k(y - x) grad log k(y - x) dx / q(y),
#
# the mean of grad log k(n) over all noise n that could have led to y. With the loss
# |s(y) - target|^2 / 2 and the target grad log k(n), a network learns just this mean: the score of
# q. Nothing in this is Gaussian, but k must not jump (theory.md 10).
#
# What, then, is best about the Gaussian? Of all k with the same variance sigma^2 it has the
# shortest targets. By parts E[n target] = integral of n k' = -1, if k does not jump. A mean product
# is at most the root of the product of mean squares, so 1 <= sigma^2 E[target^2], with equality if
# the target is a multiple of n, as it is for Gaussian noise only. (Uniform noise jumps: its target
# is 0 where a draw can fall.) And Gaussian noise on Gaussian noise is Gaussian noise, which the
# many levels of dsm_2d.py build on (theory.md 10.3).
#
# To check it, q's score is also computed without k's slope. Put n = y - x in the place of x, and y
# stands in p only:  q(y) = integral of p(y - n) k(n) dn,  so that grad log q(y) is the mean of
# grad log p(x) over all x that could have led to y.
class Logistic:
    """The logistic density, 1 / (4 scale cosh(n / (2 scale))^2)."""

    def __init__(self, scale):
        self.scale = scale

    def sample(self, shape):
        return self.scale * torch.logit(torch.rand(shape), eps=1e-7)

    def log_prob(self, n):
        # log cosh u = |u| + log(1 + exp(-2 |u|)) - log 2, which cannot overflow.
        u = (n / (2 * self.scale)).abs()
        return -2 * (u + torch.log1p(torch.exp(-2 * u))) - math.log(self.scale)


class Triangular:
    """The density (a - |n|) / a^2 for |n| < a: that of the sum of two uniform draws.

    Its target -sign(n) / (a - |n|) grows without limit towards the edges, and E[target^2], the
    integral of 1 / (a^2 (a - |n|)), is infinite. So is the loss, E[s^2] / 2 - E[s target] +
    E[target^2] / 2, but only by its last part, which has no s in it: s is learned all the same.
    """

    def __init__(self, a):
        self.a = a

    def sample(self, shape):
        return self.a * (torch.rand(shape) - torch.rand(shape))

    def log_prob(self, n):
        return (self.a - n.abs()).log() - 2 * math.log(self.a)


def target_of(kernel, n):
    """d log k / dn at the noise n, any shape."""
    n = n.detach().requires_grad_()
    log_k = kernel.log_prob(n) + 0 * n                   # uniform noise's log k has no n in it
    return torch.autograd.grad(log_k.sum(), n)[0]


def kernel_denoising_loss(model, x, kernel):
    """Mean of |s(x + n) - target|^2 / 2 and the same with -n, as all our k are even; -> ()."""
    n = kernel.sample(x.shape)
    target = target_of(kernel, n)
    learned = model(torch.cat([x + n, x - n]))
    return 0.5 * (learned - torch.cat([target, -target])).square().sum(dim=1).mean()


def noise_cells(kernel, reach, count):
    """The middles n of `count` equal cells of (-reach, reach), the chance of each: two (count,)."""
    n = reach * (2 * (torch.arange(count) + 0.5) / count - 1)
    density = kernel.log_prob(n).exp()
    return n, density / density.sum()


def fisher_information(kernel, reach, count):
    """E[target^2], k's Fisher information if k does not jump, as a sum over cells.

    The finer the cells, the nearer to the edges of k it looks.
    """
    n, chance = noise_cells(kernel, reach, count)
    return (chance * target_of(kernel, n) ** 2).sum().item()


def noisy_density(kernel, reach, y):
    """On the grid y (G,): q, its score as the mean of grad log p(x), and the mean target."""
    n, chance = noise_cells(kernel, reach, 2000)
    x = (y[:, None] - n)[:, :, None]                     # (G, 2000, 1): what may lie behind y
    joint = law_1d.density(x) * chance                   # (G, 2000)
    q = joint.sum(dim=1)
    exact = (joint * law_1d.score(x)[:, :, 0]).sum(dim=1) / q
    mean_target = (joint * target_of(kernel, n)).sum(dim=1) / q
    return q, exact, mean_target


def error_under(q, values, exact):
    """sqrt(E(values - exact)^2 / E exact^2) under q on the grid, all (G,): a number."""
    return ((q * (values - exact) ** 2).sum() / (q * exact**2).sum()).sqrt().item()


# All have the standard deviation sigma; this is what the factors are for.
kernels = {
    "Gaussian": Normal(0.0, args.sigma),
    "logistic": Logistic(math.sqrt(3) / math.pi * args.sigma),
    "Student-t": StudentT(5.0, 0.0, math.sqrt(3 / 5) * args.sigma),
    "Laplace": Laplace(0.0, args.sigma / math.sqrt(2)),
    "triangular": Triangular(math.sqrt(6) * args.sigma),
    "uniform": Uniform(-math.sqrt(3) * args.sigma, math.sqrt(3) * args.sigma),
}
reaches = {"triangular": math.sqrt(6) * args.sigma, "uniform": math.sqrt(3) * args.sigma}
y = torch.linspace(-5, 5, 401)
learned_scores = {}                                      # kernel -> (401,)
exact_scores = {}
kernel_errors = {}
print(f"\nnoise of standard deviation {args.sigma:g} on the 1-D data\n"
      "kernel      E[target^2]           is the mean target    is the loss    relative error\n"
      "            times sigma^2         the score? (off by)   finite?        of a network")
for name, kernel in kernels.items():
    reach = reaches.get(name, 10.0)                      # beyond 10 there is next to nothing
    q, exact, mean_target = noisy_density(kernel, reach, y)
    coarse = fisher_information(kernel, reach, 1000)
    fine = fisher_information(kernel, reach, 100_000)
    finite = fine <= 1.01 * coarse                       # if not, finer cells find ever more
    off = error_under(q, mean_target, exact)
    network = new_network(x_data_1d + kernel.sample(x_data_1d.shape))
    y_fresh = x_fresh_1d + kernel.sample(x_fresh_1d.shape)
    train(network, partial(kernel_denoising_loss, kernel=kernel), x_data_1d, y_fresh)
    learned_scores[name] = network(y[:, None])[:, 0]
    exact_scores[name] = exact
    kernel_errors[name] = error_under(q, learned_scores[name], exact)
    information = f"{fine * args.sigma**2:.3f}" if finite else "infinite"
    print(f"{name:11s} {information:>18s} {'yes' if off < 1e-3 else 'NO':>17s} ({off:.0e}) "
          f"{'yes' if finite else 'NO':>14s} {kernel_errors[name]:17.3f}")
print("Uniform noise has the target 0 but for its two jumps, which no draw meets: so s = 0 is "
      "learned,\nand the loss says nothing of it. 002 also asks about blur: alone, y = x/2,"
      "\nit has no k to differentiate, so no target; blur, then Gaussian noise, is the first row, "
      "for data x/2.")


def draw_kernels():
    """kernels.png: for each kernel its density, the exact score of the noisy data, the learned."""
    fig, axs = plt.subplots(2, 3, figsize=(10, 6), sharex=True, sharey=True)
    for ax, name in zip(axs.flat, kernels):
        n, chance = noise_cells(kernels[name], reaches.get(name, 10.0), 2000)
        ax.fill_between(n, -5, 3 * chance / chance.max() - 5, color="0.85", linewidth=0)
        ax.plot(y, exact_scores[name], color=BLUE, label="exact score of x + n")
        ax.plot(y, learned_scores[name], color=ORANGE, label="learned by denoising")
        ax.set(xlim=(-3, 3), ylim=(-5, 5), title=f"{name}, error {kernel_errors[name]:.2f}")
    axs[0, 0].legend(fontsize=8)
    fig.suptitle("Six kinds of noise n (grey) of one standard deviation: only uniform noise "
                 "teaches nothing")
    fig.savefig(os.path.join(args.outdir, "kernels.png"))


draw_kernels()


# %% Result
print(f"\npictures in {args.outdir}; look at scores.png first")
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
