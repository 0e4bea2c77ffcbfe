"""Sliced score matching: look at the score along one random direction instead of all d.

    score        s(x), to be grad log p(x): an arrow towards where the data are denser
    training     minimise the mean of v^T J v + (v^T s)^2 / 2 (half of 003's loss), where J = ds/dx
                 is the Jacobian and v a random direction, a slice; this takes one backward pass
    sampling     x + eta/2 s(x) + sqrt(eta) z, many times: half a step along the arrow, and noise

    python sliced_sm.py                          # look at out_sliced_sm/training.png
    python sliced_sm.py --data gmm2 --n_slices 4 --slices sphere
    python sliced_sm.py --help                   # all settings; in a notebook, edit their defaults

The same network is trained by this loss, ssm, and by five relatives of it, on two moons and on data
in 20 dimensions. The data are mixtures of Gaussians, so the exact score is known, and every error
is one against the truth. The default run takes 45 s on one core (Python 3.11, torch 2.13.0). Its
last line:

    data=moons ... err_exact=0.2312 err_ssm=0.3966 err_ssm_vr=0.261 ... SW2=0.0372 floor=0.0312 ...

err_... is the relative error of the score that a loss has learned in 20 dimensions: 0 is exact, 1
no better than s = 0. (exact is the loss without slices, ssm_vr the sliced loss with less variance.
dsm learns the score of noisy data, but err_dsm, too, is against that of the data.)
SW2 is the sliced Wasserstein distance of the samples, those of two moons, to fresh data, and its
floor that of fresh data to other fresh data: samples whose SW2 is at most 1.3 times the floor are
good.

Read beside: notes 003 section 4.2.3; 002 part 1.3 and 1.4; theory.md section 5.
"""
# %% Settings
import argparse
import copy
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
from sklearn.datasets import make_moons
from torch.distributions import MultivariateNormal
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


parser = argparse.ArgumentParser(description="Sliced score matching and its relatives",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--data", default="moons", choices=["moons", "gmm2"], help="the data in 2-D")
parser.add_argument("--dim", type=number(int, 1, 1000), default=20,
                    help="dimension of the second data set, three correlated Gaussians")
parser.add_argument("--n", type=number(int, 10, 10**7), default=50_000, help="training points")
parser.add_argument("--loss", default="ssm_vr", help="whose network makes samples.npy",
                    choices=["explicit", "exact", "ssm", "ssm_vr", "fd_ssm", "dsm"])
parser.add_argument("--slices", default="rademacher", help="how the directions are drawn",
                    choices=["rademacher", "gaussian", "sphere"])
parser.add_argument("--n_slices", type=number(int, 1, 10**4), default=1,
                    help="directions for each point and step")
parser.add_argument("--h", type=number(float, 1e-8, 10), default=0.01,
                    help="step of the finite differences (fd_ssm): they are taken at x +- h v")
parser.add_argument("--sigma", type=number(float, 1e-4, 1e4), default=0.1,
                    help="noise of denoising score matching (dsm), in units of the data")
parser.add_argument("--hidden", type=number(int, 1, 8192), default=64, help="width of the network")
parser.add_argument("--layers", type=number(int, 1, 64), default=3, help="hidden layers")
parser.add_argument("--steps", type=number(int, 1, 10**5), default=500, help="training steps")
parser.add_argument("--batch", type=number(int, 1, 10**6), default=256, help="points in a step")
parser.add_argument("--lr", type=number(float, 1e-8, 1), default=0.01, help="peak of the rate")
parser.add_argument("--K", type=number(int, 1, 10**5), default=500, help="Langevin steps")
parser.add_argument("--eta", type=number(float, 1e-8, 100), default=0.01,
                    help="Langevin step, below its limit (moons 0.16, gmm2 1.9)")
parser.add_argument("--n_samples", type=number(int, 2, 10**6), default=2000,
                    help="points in a set of samples")
parser.add_argument("--d_max", type=number(int, 2, 1000), default=1000,
                    help="largest dimension in which a training step is timed")
parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all randomness")
parser.add_argument("--outdir", default="out_sliced_sm", help="folder for pictures and results")
in_notebook = "kernel_launcher" in sys.argv[0]      # there the command line is the kernel's
args = parser.parse_args([] if in_notebook else None)  # in a notebook, settings go into []
if args.batch > args.n:
    parser.error(f"argument --batch: {args.batch} is more than the {args.n} points of --n")
limit = {"moons": 0.16, "gmm2": 1.9}[args.data]          # the cell Sampling says why
if args.eta >= limit:
    parser.error(f"argument --eta: {args.eta:g} is not below the limit of a Langevin step, {limit}")
try:                                                     # all settings are right: make the folder
    os.makedirs(args.outdir, exist_ok=True)
except OSError as error:
    parser.error(f"argument --outdir: cannot make {args.outdir} ({error.strerror})")
if not os.access(args.outdir, os.W_OK):
    parser.error(f"argument --outdir: cannot write to {args.outdir}")

torch.manual_seed(args.seed)
torch.set_num_threads(1)                            # a second core is no help to so small a net


# %% Loss: one slice
# We want the s with the least distance to s* = grad log p, which is just what we don't know:
#     E|s - s*|^2 / 2  =  E|s|^2 / 2  -  E[s . s*]  +  E|s*|^2 / 2.
# The last term has no s in it. In the middle one p s* = grad p, so integrate by parts (s p vanishes
# far out, and div s = ds_1/dx_1 + ... + ds_d/dx_d is tr J; theory.md 3):
#     E[s . s*]  =  integral of p s . s*  =  integral of s . grad p  =  -integral of p div s
#                =  -E[tr J].
# So we can minimise, from data alone,
#     E[tr J + |s|^2 / 2]                           (exact score matching)
# but the trace takes d backward passes, one for each row of J. Now draw v with E[v v^T] = I. Then
# E[v^T J v] = tr(J E[v v^T]) = tr J, and in the same way E[(v^T s)^2] = |s|^2, so that
#     E[v^T J v + (v^T s)^2 / 2]                    (sliced score matching; theory.md 5.1)
# is the same number. And v^T J is the gradient of v^T s with respect to x, for fixed v: one
# backward pass. One pass is enough for all points, since the v^T s of a point depends on no other
# point: in the gradient of the sum over points each point finds its own.
@torch.enable_grad()                                     # it works under torch.no_grad(), too
def sliced_score_matching_loss(model, x, n_slices=1, draw=torch.randn_like, reduction="mean"):
    """Mean of v^T J v + (v^T s)^2 / 2 over points and slices.  x (B, d) -> ()

    draw(x) is a random direction for each point, (B, d), with E[v v^T] = I. As in PyTorch's losses,
    reduction="none" gives one value for each point, (B,). Source: notes 003 section 4.2.3, whose
    formula is twice this one. (Its second, "improved" code is the same loss again.)
    """
    x = x.detach().requires_grad_()                      # the caller's x stays as it is
    s = model(x)                                         # (B, d)
    total = torch.zeros_like(x[:, 0])                    # (B,)
    for _ in range(n_slices):
        v = draw(x)                                      # (B, d)
        vs = (v * s).sum(dim=1)                          # (B,)
        # create_graph: the weights' gradient will be taken of this derivative. It keeps the graph,
        # too. (With retain_graph alone v^T J v would be a constant to the weights, and s = 0 best.)
        vJ = torch.autograd.grad(vs.sum(), x, create_graph=True)[0]      # (B, d)
        vJv = (vJ * v).sum(dim=1)                        # (B,)
        total = total + vJv + 0.5 * vs**2
    values = total / n_slices
    return values.mean() if reduction == "mean" else values


# Three ways to draw v.
def rademacher(x):
    """A random sign for each coordinate. With it the loss varies no more than with gaussian."""
    return torch.randn_like(x).sign()


def sphere(x):
    """A point on the sphere of radius sqrt(d).

    003 draws from the unit sphere, where |v|^2 = 1 is the sum of d parts with equal means, so that
    E[v v^T] = I / d. The factor sqrt(d) makes up for it.
    """
    v = torch.randn_like(x)
    return math.sqrt(x.shape[1]) * v / v.norm(dim=1, keepdim=True)


draws = {"rademacher": rademacher, "gaussian": torch.randn_like, "sphere": sphere}
draw = draws[args.slices]


# %% Loss: its relatives
#              what is projected    what is differentiated by x    passes through the network
#   explicit   nothing              nothing                        1 forward, and the exact score
#   exact      nothing              s_1, ..., s_d                  1 forward, d backward
#   ssm        J and s              v^T s                          1 forward, 1 backward per slice
#   ssm_vr     J                    v^T s                          1 forward, 1 backward per slice
#   fd_ssm     J and s              nothing: a difference          2 forward per slice
#   dsm        nothing              nothing                        2 forward, with eps and -eps
#
# Training adds one pass back through all of this, to the weights.
#
# explicit is the goal itself. It can be had only where the answer is known, and is here to show how
# far network and steps can come. exact, ssm and ssm_vr have the same mean, fd_ssm nearly, and
# explicit but for a constant: all these learn the score of the data. dsm learns that of noisy data.
#
# What is estimated by a random v varies with it: tr J and |s|^2 in ssm, tr J alone in ssm_vr,
# nothing in exact. The larger the variance, the noisier are the training steps, and the larger is
# the error after equally many. |s|^2 grows with d, so this is seen in many dimensions.
@torch.enable_grad()
def variance_reduced_loss(model, x, n_slices=1, draw=torch.randn_like, reduction="mean"):
    """ssm_vr: ssm with |s|^2 / 2 in the place of its estimate (v^T s)^2 / 2.  x (B, d) -> ()

    The same as score matching with Hutchinson's estimate of the trace.
    """
    x = x.detach().requires_grad_()
    s = model(x)                                         # (B, d)
    total = torch.zeros_like(x[:, 0])
    for _ in range(n_slices):
        v = draw(x)
        vs = (v * s).sum(dim=1)
        vJ = torch.autograd.grad(vs.sum(), x, create_graph=True)[0]
        vJv = (vJ * v).sum(dim=1)
        total = total + vJv                              # ssm adds 0.5 * vs**2 here
    values = total / n_slices + 0.5 * s.square().sum(dim=1)
    return values.mean() if reduction == "mean" else values


def finite_difference_loss(model, x, n_slices=1, draw=torch.randn_like, h=0.01, reduction="mean"):
    """fd_ssm: ssm from the scores at x + h v and x - h v, which differ by about 2 h J v.

    x (B, d) -> (). The mean of the two scores stands for s, which saves a third call of the
    network. Difference and mean are both right but for an error of the size h^2.
    """
    total = torch.zeros_like(x[:, 0])
    for _ in range(n_slices):
        v = draw(x)
        s_plus = model(x + h * v)                        # (B, d)
        s_minus = model(x - h * v)
        vJv = (v * (s_plus - s_minus)).sum(dim=1) / (2 * h)
        vs = (v * (s_plus + s_minus)).sum(dim=1) / 2
        total = total + vJv + 0.5 * vs**2
    values = total / n_slices
    return values.mean() if reduction == "mean" else values


@torch.enable_grad()
def exact_trace_loss(model, x, reduction="mean"):
    """exact: tr J + |s|^2 / 2, with the d axes in the place of v.  x (B, d) -> ()"""
    x = x.detach().requires_grad_()
    s = model(x)                                         # (B, d)
    d = x.shape[1]
    axes = torch.eye(d)[:, None].expand(d, len(x), d)    # (d, B, d): each axis, for every point
    # d backward passes, all at once and so much faster than one by one (exact_trace_loop_loss,
    # below, is what this means). The i-th goes along axis i: row i of J at every point.
    J = torch.autograd.grad(s, x, axes, is_grads_batched=True, create_graph=True)[0]  # (d, B, d)
    diagonal = J.diagonal(dim1=0, dim2=2)                # (B, d): J[i, b, i] for each point b
    trace = diagonal.sum(dim=1)                          # (B,)
    values = trace + 0.5 * s.square().sum(dim=1)
    return values.mean() if reduction == "mean" else values


def denoising_loss(model, x, sigma=0.1, reduction="mean"):
    """dsm: |s(x + sigma eps) + eps/sigma|^2 / 2, dsm_2d.py's loss at one noise level, unweighted.

    x (B, d) -> (). The target -eps/sigma leads back to x; its mean over all x that could lie behind
    a noisy point is the score of the noisy data (theory.md 4.1). Each point is used with eps and
    with -eps: both are equally likely, and in the gradient much of their noise cancels.
    """
    eps = torch.randn_like(x)
    pair = torch.stack([eps, -eps])                      # (2, B, d)
    s = model(x + sigma * pair)                          # (2, B, d)
    values = 0.5 * (s + pair / sigma).square().sum(dim=2).mean(dim=0)
    return values.mean() if reduction == "mean" else values


def explicit_loss(model, x, exact_score, reduction="mean"):
    """explicit: |s - grad log p|^2 / 2, what the others are to make small.  x (B, d) -> ()"""
    values = 0.5 * (model(x) - exact_score(x)).square().sum(dim=1)
    return values.mean() if reduction == "mean" else values


# %% Data
# Two sets of data, one to look at and one with many dimensions. Both are mixtures of equally likely
# Gaussians, so that the exact score is known, with noise and without: noise makes each of them
# wider and does nothing else.
class Mixture:
    """Equally likely Gaussians with these centres (M, d) and covariances (M, d, d)."""

    def __init__(self, centres, covs):
        self.centres = centres
        self.covs = covs

    def sample(self, n):
        """n independent points (n, d): choose a Gaussian, draw from it."""
        k = torch.randint(len(self.centres), (n,))                    # which Gaussian
        noise = torch.randn(n, self.centres.shape[1])
        for i, root in enumerate(torch.linalg.cholesky(self.covs)):   # (d, d)
            noise[k == i] = noise[k == i] @ root.T
        return self.centres[k] + noise

    def score(self, x, sigma=0.0):
        """The score of the data with the noise sigma eps, (B, d) -> (B, d).

        It is the sum over k of share_k(x) cov_k^-1 (centre_k - x): each Gaussian pulls to its own
        centre, and share_k is the chance that x came from it.
        """
        cov = self.covs + sigma**2 * torch.eye(x.shape[1])            # (M, d, d)
        to_centre = self.centres - x[:, None]                         # (B, M, d)
        pull = torch.einsum("mij,bmj->bmi", cov.inverse(), to_centre)
        log_density = -0.5 * (to_centre * pull).sum(-1) - 0.5 * cov.logdet()   # + a constant
        share = log_density.softmax(dim=1)                            # (B, M)
        return (share[:, :, None] * pull).sum(dim=1)


def plane_mixture(name):
    """moons: 80 Gaussians of spread 0.2 on two half circles; gmm2: two large Gaussians."""
    if name == "moons":
        centres = torch.tensor(make_moons(80, shuffle=False)[0], dtype=torch.float32)
        return Mixture(centres, 0.2**2 * torch.eye(2).repeat(80, 1, 1))
    centres = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    return Mixture(centres, torch.tensor([[[1.0, 0.3], [0.3, 1.2]], [[0.6, -0.2], [-0.2, 0.8]]]))


def correlated_mixture(d):
    """Three Gaussians at distance 2 from 0, each with variances 0.3 to 2 along axes of its own."""
    centres = 2 * nn.functional.normalize(torch.randn(3, d))
    axes = torch.linalg.qr(torch.randn(3, d, d))[0]                   # orthonormal columns
    variances = torch.logspace(math.log10(0.3), math.log10(2), d)
    return Mixture(centres, axes @ torch.diag(variances) @ axes.mT)


# Law is short for probability distribution: what one can draw points from.
laws = {args.data: plane_mixture(args.data), "correlated": correlated_mixture(args.dim)}
train_points = {name: law.sample(args.n) for name, law in laws.items()}
x_data = train_points[args.data]                                      # (n, 2)
exact_score = laws[args.data].score                                   # (B, 2) -> (B, 2)


# %% Model
# A first guess, the score of one round Gaussian as wide as the data, (mean - x) / scale^2, plus a
# network for the rest. Its activation must be smooth, because most of the losses differentiate the
# score: what happens with ReLU is shown in an extra below.
class ScoreNet(nn.Module):
    """model(x) -> score; (B, d) -> (B, d). Mean and scale are those of the points x it is given."""

    def __init__(self, x, hidden=64, num_layers=3, activation=nn.SiLU):
        super().__init__()
        self.register_buffer("mean", x.mean(dim=0))
        self.register_buffer("scale", x.var(dim=0).mean().sqrt())
        width = x.shape[1]
        layers = []
        for _ in range(num_layers):
            layers.append(nn.Linear(width, hidden))
            layers.append(activation())
            width = hidden
        last = nn.Linear(hidden, x.shape[1])
        nn.init.zeros_(last.weight)                      # an untrained network answers 0,
        nn.init.zeros_(last.bias)                        # so training begins at the first guess
        self.net = nn.Sequential(*layers, last)

    def forward(self, x):
        scaled = (x - self.mean) / self.scale            # (B, d), of size 1
        return (self.net(scaled) - scaled) / self.scale


# %% Training
# All losses side by side: the same batches, drawn once, the same first weights and the same slices.
#
# What a loss has learned shows in the relative error of the score, sqrt(E|s - s*|^2 / E|s*|^2), at
# fresh points. The exact score s* is that of the data, whose density is p.
#
# But dsm learns the score of the data with the noise sigma, whose density is q_sigma. So all are
# measured against that, too. On moons, whose Gaussians are but 0.2 wide, the noise 0.1 makes a
# difference: dsm has a small error against q_sigma and can't have one against p, and for the others
# it is the other way round. In 20 dimensions sigma is so small beside the data that the two errors
# nearly agree.
check_points = {}
check_scores = {}
for name, law in laws.items():
    for sigma in [0.0, args.sigma]:                      # p, q_sigma
        x = law.sample(4000)
        check_points[name, sigma] = x + sigma * torch.randn_like(x)
        check_scores[name, sigma] = law.score(check_points[name, sigma], sigma)

batches = torch.randint(args.n, (args.steps, args.batch))             # which points, step by step


@torch.no_grad()
def relative_error(model, law_name, sigma):
    """The relative error of model as the score of q_sigma, a number; sigma = 0: of p."""
    exact = check_scores[law_name, sigma]
    return ((model(check_points[law_name, sigma]) - exact).norm() / exact.norm()).item()


def losses_for(law):
    """name -> loss(model, x), with the settings of this run."""
    return {
        "explicit": partial(explicit_loss, exact_score=law.score),
        "exact": exact_trace_loss,
        "ssm": partial(sliced_score_matching_loss, n_slices=args.n_slices, draw=draw),
        "ssm_vr": partial(variance_reduced_loss, n_slices=args.n_slices, draw=draw),
        "fd_ssm": partial(finite_difference_loss, n_slices=args.n_slices, draw=draw, h=args.h),
        "dsm": partial(denoising_loss, sigma=args.sigma),
    }


def training_step(model, optimizer, loss_function, x):
    """One step down the gradient.  -> the loss, a number"""
    loss = loss_function(model, x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train(loss_function, law_name, title, activation=nn.SiLU):
    """A network trained on a law.  -> it, its history: lists of step, seconds, error_p, error_q."""
    # The same first weights, and for each loss with slices the same slices: it draws nothing else.
    torch.manual_seed(args.seed)
    points = train_points[law_name]
    model = ScoreNet(points, args.hidden, args.layers, activation)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    # The learning rate rises for 15 % of the steps, then falls to 0. The high rates in the middle
    # learn fast, and the low ones at the end take out the noise of the steps. (By default it also
    # lowers Adam's momentum while the rate is high.)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.15)
    history = {"step": [], "seconds": [], "error_p": [], "error_q": []}
    seconds = 0.0
    bar = tqdm(batches, desc=f"{title}, {law_name}", leave=False)
    for step, batch in enumerate(bar, start=1):
        started = time.process_time()                    # the time of this program alone
        loss = training_step(model, optimizer, loss_function, points[batch])
        scheduler.step()
        seconds += time.process_time() - started
        if not math.isfinite(loss):
            sys.exit(f"{title} on {law_name}: the loss is {loss} at step {step}: try a --lr below "
                     f"{args.lr:g}")
        if step % max(1, args.steps // 12) == 0 or step == args.steps:
            history["step"].append(step)
            history["seconds"].append(seconds)
            history["error_p"].append(relative_error(model, law_name, 0.0))
            history["error_q"].append(relative_error(model, law_name, args.sigma))
    return model, history


networks = {}                                            # law, loss -> network
histories = {}
for law_name, law in laws.items():
    for loss_name, loss_function in losses_for(law).items():
        network, history = train(loss_function, law_name, loss_name)
        networks[law_name, loss_name] = network
        histories[law_name, loss_name] = history

train_s = sum(history["seconds"][-1] for history in histories.values())
model = networks[args.data, args.loss]
torch.save(model.state_dict(), os.path.join(args.outdir, "model.pt"))

print(f"After {args.steps} equal steps, with {args.n_slices} {args.slices} slice(s): relative "
      "error of the score (0: exact, 1: that of s = 0)\nagainst p, also as a multiple of the exact "
      f"trace's, and against q_sigma, sigma = {args.sigma:g}")
for law_name in laws:
    untrained = ScoreNet(train_points[law_name])         # it answers its first guess
    error_of_exact = histories[law_name, "exact"]["error_p"][-1]
    print(f"\n{law_name + ', d = ' + str(train_points[law_name].shape[1]):22s} p   / exact      "
          "q_sigma    seconds")
    print(f"before training {relative_error(untrained, law_name, 0.0):8.3f} {'':10s}"
          f"{relative_error(untrained, law_name, args.sigma):12.3f}")
    for loss_name in losses_for(laws[law_name]):
        last = {key: values[-1] for key, values in histories[law_name, loss_name].items()}
        print(f"{loss_name:15s} {last['error_p']:8.3f} {last['error_p'] / error_of_exact:9.2f} "
              f"{last['error_q']:12.3f} {last['seconds']:10.1f}")

# The loss itself tells little. Its least value, the floor, is not 0 but -E|s*|^2 / 2 (put s = s*
# into the derivation above). What is above the floor is half the mean square error of the score.
x = x_data[:20000]
loss_reached = exact_trace_loss(model, x).item()
loss_floor = exact_trace_loss(exact_score, x).item()     # at the same points: less chance
print(f"\n{args.data}: E[tr J + |s|^2 / 2] of the network of {args.loss} is {loss_reached:.2f}; "
      f"its floor, that of the exact score, {loss_floor:.2f}")


# %% Sampling
# Langevin dynamics walks along the score and is shaken at every step, and so ends up distributed as
# the density whose score it follows, but for a bias: in a Gaussian of variance V the chains settle
# at the variance V / (1 - eta/(4V)) (theory.md 6.2). With the score -x/V a step multiplies x by
# 1 - eta/(2V), and beyond eta = 4V this is below -1: x jumps to the other side, further out each
# time. So the limit of --eta is 4V with the smallest variance of our Gaussians (moons: 0.2^2,
# gmm2: 0.476). It is a cautious one, since in a mixture the other Gaussians may hold x back.
@torch.no_grad()
def score(x):
    """The score that --loss has learned, (B, 2) -> (B, 2)."""
    return model(x)


def langevin_dynamics(score, x, K, eta):
    """K times x + eta/2 s(x) + sqrt(eta) z, from x (B, d)."""
    for _ in range(K):
        z = torch.randn_like(x)
        x = x + eta / 2 * score(x) + math.sqrt(eta) * z
    return x


# The chains start in one Gaussian with the mean and covariance of the data.
start = MultivariateNormal(x_data.mean(dim=0), torch.cov(x_data.T))
n_sets = 4                                               # one set says little about a distance
x = langevin_dynamics(score, start.sample((n_sets * args.n_samples,)), args.K, args.eta)
if not torch.isfinite(x).all():
    sys.exit(f"the Langevin chains ran away: take an --eta below {args.eta:g}, or train longer")
sample_sets = x.split(args.n_samples)
samples = sample_sets[-1]                                # (n_samples, 2)
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


def fresh_sets():
    """Eight sets of data, as their sorted projections."""
    return [sorted_projections(laws[args.data].sample(args.n_samples)) for _ in range(8)]


fresh = fresh_sets()
sw2 = mean_sw2([sorted_projections(x) for x in sample_sets], fresh)
sw2_floor = mean_sw2(fresh_sets(), fresh)                # what perfect samples would get
print(f"\nSW2 of the Langevin samples of {args.loss} to fresh data: {sw2:.4f}, its floor "
      f"{sw2_floor:.4f}, ratio {sw2 / sw2_floor:.2f} (good: below 1.3)")

summary = {"data": args.data, "seed": args.seed, "steps": args.steps, "slices": args.slices,
           "n_slices": args.n_slices, "dim": args.dim, "loss": args.loss}
for loss_name in losses_for(laws["correlated"]):
    summary["err_" + loss_name] = round(histories["correlated", loss_name]["error_p"][-1], 4)
summary |= {"SW2": round(sw2, 4), "floor": round(sw2_floor, 4),
            "train_s": round(train_s, 1)}
with open(os.path.join(args.outdir, "summary.json"), "w") as file:
    json.dump({"settings": vars(args), "figures": summary}, file, indent=1)


# %% Pictures
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"        # truth, what is learned, the rest
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 10})
loss_colours = {"explicit": BLUE, "exact": "black", "ssm": ORANGE, "ssm_vr": "#56B4E9",
                "fd_ssm": "#009E73", "dsm": "#CC79A7"}
middle = (x_data.amin(dim=0) + x_data.amax(dim=0)) / 2
half = 0.6 * (x_data.amax(dim=0) - x_data.amin(dim=0)).max().item()
left, bottom = (middle - half).tolist()
view = [left, left + 2 * half, bottom, bottom + 2 * half]


def panel(ax, title):
    """A square panel with the same limits as all others."""
    ax.axis(view)
    ax.set(aspect="equal", title=title, xticks=[], yticks=[])


def dots(ax, x, colour):
    """Points (n, 2), 2000 at most."""
    ax.scatter(x[:2000, 0], x[:2000, 1], s=3, color=colour, alpha=0.5, linewidths=0)


def arrows(ax, x, vectors, longest, colour):
    """Arrows at x; those above `longest` are cut to it."""
    length = vectors.norm(dim=1, keepdim=True)
    vectors = vectors * (longest / length).clamp(max=1)
    ax.quiver(x[:, 0], x[:, 1], vectors[:, 0], vectors[:, 1], color=colour, width=0.007,
              angles="xy", scale_units="xy", scale=8 * longest / half)


# Where do the arrows of each loss point?
line = torch.linspace(-half, half, 15)
where = middle + torch.cartesian_prod(line, line)        # (225, 2)
exact = exact_score(where)
longest = exact.norm(dim=1).median().item()              # far out they are far longer
fig, axs = plt.subplots(2, 4, figsize=(10, 5.8))
axs = axs.flatten()
dots(axs[0], x_data[:800], GREY)
arrows(axs[0], where, exact, longest, BLUE)
panel(axs[0], r"exact score of the data, $\nabla\log p$")
for ax, loss_name in zip(axs[1:7], loss_colours):
    with torch.no_grad():
        learned = networks[args.data, loss_name](where)
    dots(ax, x_data[:800], GREY)
    arrows(ax, where, learned, longest, ORANGE)
    title = f"{loss_name}: error {histories[args.data, loss_name]['error_p'][-1]:.2f}"
    if loss_name == "dsm":
        title += rf" ($q_\sigma$: {histories[args.data, 'dsm']['error_q'][-1]:.2f})"
    panel(ax, title)
dots(axs[7], samples, ORANGE)
panel(axs[7], f"samples ({args.loss}): {sw2 / sw2_floor:.2f} floors")
fig.suptitle("The score that each loss has learned, over the data (long arrows cut at the median "
             "length)")
fig.savefig(os.path.join(args.outdir, "fields.png"))

# How fast do they learn?
fig, axs = plt.subplots(2, 2, figsize=(9, 6.4), sharey="row")
for row, law_name in enumerate(laws):
    for column, key in enumerate(["step", "seconds"]):
        ax = axs[row, column]
        for loss_name, colour in loss_colours.items():
            history = histories[law_name, loss_name]
            style = "--" if loss_name == "fd_ssm" else "-"             # it lies on ssm
            ax.plot(history[key], history["error_p"], style, color=colour, label=loss_name)
        history = histories[law_name, "dsm"]
        ax.plot(history[key], history["error_q"], ":", color=loss_colours["dsm"],
                label=r"dsm, against $q_\sigma$")
        ax.set(xlabel=key, yscale="log", title=f"{law_name}, d = {train_points[law_name].shape[1]}")
    axs[row, 0].set_ylabel("relative score error")
axs[0, 1].legend(fontsize=8)
fig.suptitle("The same batches for all: error against p, by steps (left) and by seconds (right)")
fig.savefig(os.path.join(args.outdir, "training.png"))


# %% Extra: do more slices help?
# They make the loss, and so the training step, less noisy; --n_slices shows what this does for the
# error. The loss at a point x varies with x, and the sliced one with v, too. By the law of total
# variance the mean over m slices has the variance
#     Var over x of the loss without slices  +  E over x of the variance of one slice / m.
# More slices take away the second part, and never the first. A batch of B points divides both by B.
# (003 has Var(without slices) / m: the first part, divided by m as the second should be.)
#
# The second part has a closed form. At fixed x all sliced losses are v^T A v plus a constant: that
# of ssm_vr with A = J, that of ssm with A = J + s s^T / 2, and that of fd_ssm nearly the same.
#
# Denoising can be sliced, too, as in 003: (v^T e)^2 / 2 for the error e = s + eps/sigma, which has
# A = e e^T / 2. It has no J, so there is nothing to save by this, and the variance is paid.
def slicing_variance(A, slices):
    """Variance of v^T A v over v, for each of the matrices A (B, d, d).  -> (B,); theory.md 5.4

    v^T A v = sum over i, j of A_ij v_i v_j. With random signs v_i^2 = 1, so the diagonal of A adds
    no variance; with vectors of length sqrt(d) a multiple of the identity matrix adds none.
    """
    A = (A + A.mT) / 2                                   # v^T A v = v^T A^T v
    d = A.shape[1]
    square = A.square().sum(dim=(1, 2))                  # (B,)
    diagonal = A.diagonal(dim1=1, dim2=2)                # (B, d)
    if slices == "rademacher":
        return 2 * (square - diagonal.square().sum(dim=1))
    if slices == "gaussian":
        return 2 * square
    # sphere
    return 2 * d / (d + 2) * (square - diagonal.sum(dim=1) ** 2 / d)


def outer(a):
    """a a^T for each point, (B, d) -> (B, d, d)."""
    return a[:, :, None] * a[:, None]


def sliced_denoising_loss(model, x, eps, draw, sigma, reduction="mean"):
    """(v^T e)^2 / 2 with one slice and the noise eps (B, d).  x (B, d) -> ()"""
    e = model(x + sigma * eps) + eps / sigma
    values = 0.5 * (draw(x) * e).sum(dim=1) ** 2
    return values.mean() if reduction == "mean" else values


def ten_slices(loss_function, model, x, **settings):
    """The loss at each point along ten slices, one by one, (10, B)."""
    values = []
    for _ in range(10):
        values.append(loss_function(model, x, reduction="none", **settings).detach())
    return torch.stack(values)


def measured_and_expected(values, without_slices, A, slices):
    """The variance of the mean of 1, 3 and 10 of `values` (10, B), and the formula's: two lists."""
    of_one_slice = slicing_variance(A, slices).mean()
    measured = []
    expected = []
    for m in [1, 3, 10]:
        measured.append(values[:m].mean(dim=0).var().item())
        expected.append((without_slices.var() + of_one_slice / m).item())
    return measured, expected


network = networks["correlated", "ssm_vr"]               # a good one
n_points = min(5000, 50_000_000 // args.dim**2)          # each has a (d, d) matrix in memory
x = train_points["correlated"][:n_points]
s = network(x).detach()                                              # (B, d)
J = torch.func.vmap(torch.func.jacrev(network))(x).detach()          # (B, d, d)
exact_losses = exact_trace_loss(network, x, reduction="none").detach()   # (B,)

variances = {}
for slices, its_draw in draws.items():
    values = ten_slices(variance_reduced_loss, network, x, draw=its_draw)
    variances["ssm_vr, " + slices] = measured_and_expected(values, exact_losses, J, slices)
    values = ten_slices(sliced_score_matching_loss, network, x, draw=its_draw)
    variances["ssm, " + slices] = measured_and_expected(
        values, exact_losses, J + outer(s) / 2, slices)
values = ten_slices(finite_difference_loss, network, x, draw=draw, h=args.h)
variances["fd_ssm, " + args.slices] = measured_and_expected(
    values, exact_losses, J + outer(s) / 2, args.slices)
eps = torch.randn_like(x)
e = network(x + args.sigma * eps).detach() + eps / args.sigma
dsm_losses = 0.5 * e.square().sum(dim=1)
with torch.no_grad():
    values = ten_slices(sliced_denoising_loss, network, x, eps=eps, draw=draw, sigma=args.sigma)
variances["sliced dsm, " + args.slices] = measured_and_expected(
    values, dsm_losses, outer(e) / 2, args.slices)

print(f"\nVariance of a loss over points and slices, d = {args.dim}, with m slices, in brackets by "
      f"formula.\nWithout slices: exact {exact_losses.var():.4g}, dsm (one eps) "
      f"{dsm_losses.var():.4g}. (003's Var(exact) / m: {exact_losses.var():.3g}, "
      f"{exact_losses.var() / 3:.3g}, {exact_losses.var() / 10:.3g})")
print(f"{'m':24s}{1:<22d}{3:<22d}{10}")
for name, (measured, expected) in variances.items():
    cells = [f"{a:.4g} ({b:.4g})" for a, b in zip(measured, expected)]
    print(f"{name:24s}{cells[0]:22s}{cells[1]:22s}{cells[2]}")


# %% Extra: what does a step cost?
# A training step on 64 points, in units of one with dsm (eps and -eps). The exact trace takes d
# backward passes, all at once as in the lesson or, as 003 thinks of it, one after the other. The
# number of passes is not the time: a step has its fixed costs, and passes at once are cheaper.
def exact_trace_loop_loss(model, x):
    """exact_trace_loss, one backward pass after the other.  x (B, d) -> ()"""
    x = x.detach().requires_grad_()
    s = model(x)
    trace = torch.zeros(len(x))
    for i in range(x.shape[1]):
        row = torch.autograd.grad(s[:, i].sum(), x, create_graph=True)[0]    # (B, d), row i of J
        trace = trace + row[:, i]
    return (trace + 0.5 * s.square().sum(dim=1)).mean()


methods = {
    "dsm": denoising_loss,
    "fd_ssm": partial(finite_difference_loss, draw=draw),
    "ssm": partial(sliced_score_matching_loss, draw=draw),
    "ssm_vr": partial(variance_reduced_loss, draw=draw),
    "ssm_vr, m = 10": partial(variance_reduced_loss, n_slices=10, draw=draw),
    "exact": exact_trace_loss,
    "exact, loop": exact_trace_loop_loss,
}


def step_seconds(d):
    """name -> median time of a training step in d dimensions."""
    x = torch.randn(64, d)
    model = ScoreNet(x, args.hidden, args.layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    times = {name: [] for name in methods}
    for _ in range(12):                                  # in turn: a slow moment meets all of them
        for name, loss_function in methods.items():
            if (name == "exact, loop" and d > 300) or sum(times[name]) > 0.15:
                continue                                 # it would take too long
            started = time.process_time()
            training_step(model, optimizer, loss_function, x)
            times[name].append(time.process_time() - started)
    return {name: np.median(values) for name, values in times.items() if values}


dimensions = [d for d in [2, 10, 30, 100, 300, 1000] if d <= args.d_max]
seconds = {}
for d in tqdm(dimensions, desc="timing", leave=False):
    seconds[d] = step_seconds(d)
print("\nTime of a training step / that of dsm\nd              "
      + "".join(f"{d:9d}" for d in dimensions))
for name in methods:
    row = ""
    for d in dimensions:
        row += f"{seconds[d][name] / seconds[d]['dsm']:9.2f}" if name in seconds[d] else "        -"
    print(f"{name:15s}{row}")


# %% Extra: which traps are there?
# 1. Unit slices. With |v| = 1 the mean of v^T J v is tr J / d. ssm is then smaller by the factor d
#    as a whole and learns the same; but ssm_vr's |s|^2 / 2 stays as it is, and so it learns
#    grad log p / d (theory.md 5.3).
#
# 2. ReLU. Take d = 1 and s(x) = relu(x - a), whose slope is 0 left of the kink a and 1 right of it.
#    The mean slope is the chance that x > a: it falls as the kink moves right. Autograd asks each
#    point by itself how its slope changes with a: the answer is 0 at every point. So ssm and ssm_vr
#    have a wrong gradient, which lacks this part (implicit_sm.py, theory.md 3.6).
#
#    fd_ssm differentiates values of s, not slopes. With the kink between x - h v and x + h v, one
#    of the two values depends on a. Such points are few, a share proportional to h, and each of
#    them counts 1/h: the mean gradient is right but for an error of the size h^2, and the longer h
#    is, the smaller is its variance. So fd_ssm survives a ReLU, and so do dsm and explicit, which
#    have no J. exact fails with ssm.
#
# 3. The step h. The error of fd_ssm grows as h^2; below the best h round-off takes over.
def unit_sphere(x):
    """A direction of length 1: E[v v^T] = I / d."""
    return sphere(x) / math.sqrt(x.shape[1])


def fitted_factor(model, law_name):
    """The factor a with the least |s - a s*|^2 at the check points of p, a number."""
    exact = check_scores[law_name, 0.0]
    with torch.no_grad():
        learned = model(check_points[law_name, 0.0])
    return ((learned * exact).sum() / exact.square().sum()).item()


def train_traps():
    """name -> network and history on the data in 2-D: unit slices, and what survives a ReLU."""
    fd_ssm = partial(finite_difference_loss, n_slices=args.n_slices, draw=draw)
    ssm_vr = partial(variance_reduced_loss, n_slices=args.n_slices, draw=draw)
    dsm = partial(denoising_loss, sigma=args.sigma)
    return {
        "ssm_vr, unit slices": train(partial(ssm_vr, draw=unit_sphere), args.data, "unit slices"),
        "ssm_vr, ReLU": train(ssm_vr, args.data, "ssm_vr, ReLU", nn.ReLU),
        "fd_ssm, ReLU, h = 0.01": train(partial(fd_ssm, h=0.01), args.data, "h = 0.01", nn.ReLU),
        "fd_ssm, ReLU, h = 0.03": train(partial(fd_ssm, h=0.03), args.data, "h = 0.03", nn.ReLU),
        "dsm, ReLU": train(dsm, args.data, "dsm, ReLU", nn.ReLU),
    }


def difference_gaps(hs, dtype):
    """The relative distance of fd_ssm from ssm at 500 points, for each step h and in this dtype."""
    network = copy.deepcopy(networks[args.data, "ssm_vr"]).to(dtype)
    x = x_data[:500].to(dtype)
    v = draw(x)                                          # the same slices for both

    def same_slices(x):
        return v

    by_autograd = sliced_score_matching_loss(network, x, draw=same_slices, reduction="none")
    gaps = []
    for h in hs:
        values = finite_difference_loss(network, x, draw=same_slices, h=h, reduction="none")
        gaps.append(((values - by_autograd).norm() / by_autograd.norm()).item())
    return gaps


traps = train_traps()
print(f"\ntrained on {args.data}           relative error against p (dsm: q_sigma)")
for name in ["ssm_vr", "fd_ssm", "dsm"]:
    key = "error_q" if name == "dsm" else "error_p"
    print(f"{name:26s} {histories[args.data, name][key][-1]:10.3f}")
for name, (network, history) in traps.items():
    key = "error_q" if name == "dsm, ReLU" else "error_p"
    print(f"{name:26s} {history[key][-1]:10.3f}")
print("ssm_vr: the learned score is about a times the exact one, with the right slices "
      f"a = {fitted_factor(networks[args.data, 'ssm_vr'], args.data):.3f},\nwith unit slices "
      f"a = {fitted_factor(traps['ssm_vr, unit slices'][0], args.data):.3f} (expected: 1/d = 0.5)")

hs = np.geomspace(1e-7, 1, 29)                           # four to each power of ten
gaps64 = difference_gaps(hs, torch.float64)
gaps32 = difference_gaps(hs, torch.float32)
order = math.log10(gaps64[20] / gaps64[16])              # hs[20] = 0.01, hs[16] = 0.001
print(f"fd_ssm's distance from ssm grows as h^{order:.2f} (expected: 2). It is least at "
      f"h = {hs[np.argmin(gaps64)]:.0e} in float64 ({min(gaps64):.0e})\nand at "
      f"h = {hs[np.argmin(gaps32)]:.0e} in float32 ({min(gaps32):.0e}), in which we train.")


def draw_traps():
    """traps.png: what ReLU does while training, and finite differences against h."""
    fig, axs = plt.subplots(1, 2, figsize=(10, 4.2))
    with_relu = {"ssm_vr": "ssm_vr, ReLU", "fd_ssm": "fd_ssm, ReLU, h = 0.03", "dsm": "dsm, ReLU"}
    for name, trap in with_relu.items():
        colour = loss_colours[name]
        key = "error_q" if name == "dsm" else "error_p"
        history = histories[args.data, name]
        axs[0].plot(history["step"], history[key], color=colour, label=f"{name}, SiLU")
        history = traps[trap][1]
        axs[0].plot(history["step"], history[key], "--", color=colour, label=trap)
    axs[0].set(xlabel="step", ylabel="relative score error", yscale="log", ylim=(0.1, 1.6),
               title=rf"ReLU (dashed) on {args.data}: error against p (dsm: $q_\sigma$)")
    axs[0].legend(fontsize=8, ncols=2)
    axs[1].loglog(hs, gaps64, "o-", ms=3, color=BLUE, label="float64")
    axs[1].loglog(hs, gaps32, "o-", ms=3, color=ORANGE, label="float32")
    axs[1].axvline(args.h, color=GREY, label="--h")
    axs[1].set(xlabel="h", title="Distance of fd_ssm from ssm: round-off, then $h^2$")
    axs[1].legend(fontsize=8)
    fig.savefig(os.path.join(args.outdir, "traps.png"))


draw_traps()


# %% Result
print(f"\npictures in {args.outdir}; look at training.png first")
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
