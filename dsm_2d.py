"""Denoising score matching in 2-D: learn the score at many noise levels, walk from noise to data.

    noisy data   q_sigma, the density of x + sigma eps, where x is a data point and eps ~ N(0, I)
    score        s(x, sigma) = grad log q_sigma(x), an arrow towards where the noisy data are denser
    training     minimise the mean of sigma^2/2 |s(x + sigma eps, sigma) + eps/sigma|^2
    sampling     from sigma_max down: guess the clean point noisy_x + sigma^2 s, put less noise back
                 (the default sampler, pc, then takes a Langevin step at the new level)

    python dsm_2d.py                             # two Gaussians; look at out_dsm_2d/generation.gif
    python dsm_2d.py --data swiss_roll           # or moons, circles
    python dsm_2d.py --help                      # all settings; in a notebook, edit their defaults

The data are mixtures of Gaussians, so the exact score is known and everything can be measured
against it. The default run takes 25 s on one core (Python 3.11, torch 2.13.0). Its last line:

    data=gmm2 seed=0 ... score_err=0.1443 SW2=0.0555 floor=0.0545 ...

score_err is the relative error of the learned score, a mean over noise levels: 0 is exact, 1 no
better than s = 0; before training it is 0.69. SW2 is the sliced Wasserstein distance of the samples
to fresh data. Its floor is that of fresh data to other fresh data: good is an SW2 below 1.3 floors.

Read beside: notes 000; 003 sections 4.2.2, 4.3.1, 4.3.3, exercises 4.2 to 4.4; 002 part 2;
theory.md sections 1, 4, 7 and 8.
"""
# %% Settings
import argparse
import copy
import json
import math
import os
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from matplotlib.animation import PillowWriter
from sklearn.datasets import make_circles, make_moons
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
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


parser = argparse.ArgumentParser(description="Denoising score matching in 2-D",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--data", default="gmm2", choices=["gmm2", "circles", "moons", "swiss_roll"])
parser.add_argument("--n", type=number(int, 10, 10**7), default=50_000, help="training points")
parser.add_argument("--T", type=number(int, 2, 1000), default=50, help="noise levels")
parser.add_argument("--schedule", default="geometric", help="spacing (adaptive: range) of levels",
                    choices=["geometric", "linear", "quadratic", "cosine", "adaptive"])
parser.add_argument("--sigma_min", type=number(float, 1e-4, 1e4),
                    help="smallest level (None: 0.01; adaptive: quantile of the distances)")
parser.add_argument("--sigma_max", type=number(float, 1e-4, 1e4),
                    help="largest level (None: the largest distance between 2000 data points)")
parser.add_argument("--hidden", type=number(int, 1, 8192), default=64, help="width of the network")
parser.add_argument("--layers", type=number(int, 1, 64), default=3, help="hidden layers")
parser.add_argument("--w_mode", default="sigma2", help="weight of a level in the loss",
                    choices=["none", "sigma", "sigma2", "inv_sigma2"])
parser.add_argument("--steps", type=number(int, 1, 10**7), default=1200, help="training steps")
parser.add_argument("--batch", type=number(int, 1, 10**6), default=1024,
                    help="points in a step, each used twice")
parser.add_argument("--lr", type=number(float, 1e-8, 1), default=0.015, help="peak of the rate")
parser.add_argument("--sampler", default="pc", help="which one makes samples.npy",
                    choices=["ancestral", "ddim", "heun", "ald", "pc"])
parser.add_argument("--n_samples", type=number(int, 2, 10**6), default=5000,
                    help="points to generate")
parser.add_argument("--K", type=number(int, 1, 10**5), default=5, help="steps a level (ald)")
parser.add_argument("--kappa", type=number(float, 1e-4, 1.9999), default=0.4,
                    help="Langevin step in units of 2 sigma^2 (ald, pc), below 2")
parser.add_argument("--viz_sigma", type=number(float, 1e-4, 1e4),
                    help="level of the denoising picture (None: 10 sigma_min)")
parser.add_argument("--eta", type=number(float, 0, 1e4),
                    help="step of the denoising picture (None: viz_sigma^2)")
parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all randomness")
parser.add_argument("--outdir", default="out_dsm_2d", help="folder for pictures and results")
in_notebook = "kernel_launcher" in sys.argv[0]      # there the command line is the kernel's
args = parser.parse_args([] if in_notebook else None)  # in a notebook, settings go into []
if args.batch > args.n:
    parser.error(f"argument --batch: {args.batch} is more than the {args.n} points of --n")

torch.manual_seed(args.seed)
torch.set_num_threads(1)                            # a second core is no help to so small a net


# %% Data
# All data are mixtures of equally likely Gaussians: two large ones, or 600 small ones on a curve,
# about as far from each other as they are wide, so that no gap shows.
# Noise makes each of them wider and does nothing else, so the score of noisy data is known exactly.
if args.data == "gmm2":
    centres = torch.tensor([[0.0, 0.0], [3.0, 3.0]])                  # (M, 2)
    covs = torch.tensor([[[1.0, 0.3], [0.3, 1.2]], [[0.6, -0.2], [-0.2, 0.8]]])
else:
    if args.data == "moons":
        curve, spread = make_moons(600, shuffle=False)[0], 0.06
    elif args.data == "circles":
        curve, spread = make_circles(600, shuffle=False, factor=0.5)[0], 0.06
    else:
        # The curve of make_swiss_roll, seven times smaller.
        angle = 1.5 * np.pi * (1 + 2 * (np.arange(600) + 0.5) / 600)
        curve = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1) / 7
        spread = 0.03
    centres = torch.tensor(curve, dtype=torch.float32)
    covs = spread**2 * torch.eye(2).repeat(600, 1, 1)                 # (M, 2, 2)


def sample_data(n):
    """n independent points (n, 2): choose a Gaussian, draw from it."""
    k = torch.randint(len(centres), (n,))                             # which Gaussian
    roots = torch.linalg.cholesky(covs)[k]                            # (n, 2, 2)
    noise = torch.einsum("nij,nj->ni", roots, torch.randn(n, 2))      # of covariance covs[k]
    return centres[k] + noise


def exact_score(x, sigma):
    """grad log q_sigma(x) = sum over k of share_k(x) cov_k^-1 (centre_k - x).  -> (B, 2)"""
    # grad log of a sum is the mean of the terms' own grad logs, weighted by their shares in it.
    cov = covs + sigma**2 * torch.eye(2)                              # (M, 2, 2)
    to_centre = centres - x[:, None]                                  # (B, M, 2)
    pull = torch.einsum("mij,bmj->bmi", cov.inverse(), to_centre)     # the score of each Gaussian
    log_density = -0.5 * (to_centre * pull).sum(-1) - 0.5 * cov.logdet()   # (B, M) + a constant
    share = log_density.softmax(dim=1)                                # the chance that x is from it
    return (share[:, :, None] * pull).sum(dim=1)


def exact_log_density(x, sigma):
    """log q_sigma(x), (B, 2) -> (B,); for the pictures and the extra on likelihood."""
    noisy = MultivariateNormal(centres, covs + sigma**2 * torch.eye(2))
    return MixtureSameFamily(Categorical(torch.ones(len(centres))), noisy).log_prob(x)


x_data = sample_data(args.n)


# %% Noise levels
# At the largest level the data drown in noise, so that generation can start from plain noise. The
# smallest is finer than anything in the data. The levels between them make the steps short. (Only
# the schedule "adaptive" takes its limits from the data, and its smallest is not always so fine:
# 1 % and 99 % of the distances are below them.)
def geometric_sigma_schedule(T, sigma_min, sigma_max):
    """T levels (T,) from sigma_max down to sigma_min, each the same factor below the last."""
    return torch.logspace(math.log10(sigma_max), math.log10(sigma_min), T)


def sigma_schedule(name, T, sigma_min, sigma_max):
    """The schedules of 003 section 4.3.1, (T,), descending as the samplers need them."""
    if name in ["geometric", "adaptive"]:                # adaptive: the same between other limits
        return geometric_sigma_schedule(T, sigma_min, sigma_max)
    height = torch.linspace(1, 0, T)                     # linear
    if name == "quadratic":
        height = height**2
    if name == "cosine":
        height = (1 - torch.cos(math.pi * height)) / 2
    return sigma_min + (sigma_max - sigma_min) * height


distances = torch.pdist(x_data[:2000])                   # between all pairs of 2000 points
if args.schedule == "adaptive":
    quantiles = torch.tensor([0.01, 0.99])
    default_min, default_max = torch.quantile(distances[distances > 0], quantiles).tolist()
else:
    default_min, default_max = 0.01, distances.max().item()
sigma_min = args.sigma_min or default_min
sigma_max = args.sigma_max or default_max
viz_sigma = args.viz_sigma or min(10 * sigma_min, sigma_max)
eta = viz_sigma**2 if args.eta is None else args.eta     # of the denoising picture

if sigma_min >= 0.99 * sigma_max:
    parser.error(f"argument --sigma_min: {sigma_min:g} is not below sigma_max = {sigma_max:g}")
if not sigma_min <= viz_sigma <= sigma_max:
    parser.error(f"argument --viz_sigma: {viz_sigma:g} is not between the smallest level, "
                 f"{sigma_min:g}, and the largest, {sigma_max:g}")
try:                                                     # all settings are right: make the folder
    os.makedirs(args.outdir, exist_ok=True)
except OSError as error:
    parser.error(f"argument --outdir: cannot make {args.outdir} ({error.strerror})")
if not os.access(args.outdir, os.W_OK):
    parser.error(f"argument --outdir: cannot write to {args.outdir}")

sigmas = sigma_schedule(args.schedule, args.T, sigma_min, sigma_max)
largest_ratio = (sigmas[:-1] / sigmas[1:]).max().item()
print(f"{args.data}: {args.n} points, {args.T} levels from {sigma_max:.3g} to {sigma_min:.3g}, "
      f"neighbours differ by a factor of {largest_ratio:.3g} at most")


# %% Model
# One network for all levels. It is told the level as waves of log sigma. What it is trained on, the
# target -eps/sigma of the loss below, has the size 100 at sigma = 0.01 and 0.1 at sigma = 10, and
# networks are best with numbers of size 1. So a formula makes a first guess of the score, and the
# network answers what the guess misses, in a unit that fits the level.
class FourierTimeEmbedding(nn.Module):
    """sin and cos of dim multiples of log sigma, (B,) -> (B, 2 dim)."""

    def __init__(self, dim=8, max_freq=1.0):
        super().__init__()
        # The waves are so slow that neighbouring levels look alike, and can learn from each other.
        # (A buffer is saved with the weights, but not trained.)
        self.register_buffer("frequencies", torch.linspace(max_freq / dim, max_freq, dim))

    def forward(self, log_sigma):
        angles = log_sigma[:, None] * self.frequencies   # (B, dim)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class ScoreMLP(nn.Module):
    """model(x, log_sigma) -> score; (B, 2), (B,) -> (B, 2)."""

    def __init__(self, hidden=64, time_dim=8, num_layers=3,
                 mean=torch.zeros(2), sigma_data=torch.tensor(1.0), num_waves=8):
        super().__init__()
        self.register_buffer("mean", mean)               # of the data
        self.register_buffer("sigma_data", sigma_data)   # of both coordinates together
        self.register_buffer("directions", torch.randn(2, num_waves))    # of waves over the plane
        self.embedding = FourierTimeEmbedding(time_dim)
        width = 2 + 2 * num_waves + 2 * time_dim         # of x, its waves and the embedding
        layers = []
        for _ in range(num_layers):
            layers.append(nn.Linear(width, hidden))
            layers.append(nn.SiLU())
            width = hidden
        last = nn.Linear(hidden, 2)
        nn.init.zeros_(last.weight)                      # before training `net` answers 0,
        nn.init.zeros_(last.bias)                        # so training begins at the first guess
        self.net = nn.Sequential(*layers, last)

    def forward(self, x, log_sigma):
        sigma = log_sigma.exp()[:, None]                       # (B, 1)
        total = (sigma**2 + self.sigma_data**2).sqrt()         # spread of the noisy data
        scaled = (x - self.mean) / total                       # (B, 2), of size 1 at every level
        angles = scaled @ self.directions                      # (B, num_waves)
        waves = [angles.sin(), angles.cos()]                   # for sharp bends in the score
        features = [scaled, *waves, self.embedding(log_sigma)]
        answer = self.net(torch.cat(features, dim=1))          # (B, 2)
        # The first guess is the score of one Gaussian as wide as the noisy data. If its mean is 0,
        #     target - first_guess = -eps/sigma + (x_clean + sigma eps) / total^2
        #                          = x_clean / total^2 - eps sigma_data^2 / (sigma total^2).
        # The two terms are independent. Their variances, in each coordinate, add up to
        #     sigma_data^2/total^4 + sigma_data^4/(sigma^2 total^4) = sigma_data^2/(sigma total)^2.
        # With the root of this, the standard deviation, as the unit of the answer, `net` has to
        # answer numbers of size 1. The unit is about 1/sigma if sigma is small, and less if it is
        # large, where the guess explains the most. (This is called preconditioning; theory.md 7.1.)
        first_guess = -scaled / total
        unit = self.sigma_data / (sigma * total)
        return first_guess + unit * answer


# %% Loss
# Add noise to a data point. The target is the arrow from the noisy point back to the clean one,
# divided by sigma^2: (x - noisy_x) / sigma^2 = -eps / sigma. Many clean points can lie behind one
# noisy point, each with its own arrow. Trained on squared errors, the network learns their mean,
# and this mean is the score of the noisy data. For the target is a gradient with respect to
# noisy_x, that of log q(noisy_x | x) with q(noisy_x | x) = N(noisy_x; x, sigma^2 I), and its mean
# is (theory.md 4.1)
#     sum over x of p(x | noisy_x) grad log q(noisy_x | x)
#   = sum over x of p(x) q(noisy_x | x) grad log q(noisy_x | x) / q_sigma(noisy_x)     (Bayes)
#   = sum over x of p(x) grad q(noisy_x | x) / q_sigma(noisy_x)         since q grad log q = grad q
#   = grad q_sigma(noisy_x) / q_sigma(noisy_x) = grad log q_sigma(noisy_x)
def level_weight(sigma, w_mode):
    """lambda(sigma) of a number or (B,). Targets have size 1/sigma; sigma^2 makes up for that."""
    power = {"none": 0, "sigma": 1, "sigma2": 2, "inv_sigma2": -2}[w_mode]
    return sigma**power


def dsm_loss_multi_sigma(model, x, sigmas, w_mode="sigma2"):
    """Mean of lambda/2 |s(x + sigma eps, sigma) + eps/sigma|^2 at random levels.  x (B, 2) -> ()"""
    sigma = sigmas[torch.randint(len(sigmas), (len(x),))]      # (B,)
    eps = torch.randn_like(x)
    # Plain DSM does without the next three lines: each point is used twice, with eps and with -eps.
    # Both are equally likely, so the same score is learned. But at small sigma the targets are
    # almost all noise. The two noisy points of a pair are then close to each other, and their
    # targets opposite, so that in the gradient most of this noise cancels.
    x = torch.cat([x, x])                                      # (2B, 2)
    sigma = torch.cat([sigma, sigma])
    eps = torch.cat([eps, -eps])
    noisy_x = x + sigma[:, None] * eps
    target = -eps / sigma[:, None]
    squared_error = (model(noisy_x, sigma.log()) - target).square().sum(dim=1)
    return (0.5 * level_weight(sigma, w_mode) * squared_error).mean()


# %% Training
# The loss hardly falls, since most of it is the spread of the arrows around their mean, which no
# network can learn. That part is its floor, the loss of the exact score s*:
#     loss of s  =  mean of lambda/2 |s - s*|^2  +  floor.
# (000's losses stay near 480, and 478.6 is their floor; with the weight sigma^2 the floor lies
# between 0 and 1.) What is learned shows in the first part alone, and so in the relative error of
# the score, sqrt(E|s - s*|^2 / E|s*|^2).
def loss_floor(sigmas, w_mode):
    """Loss of the exact score, a number; from 500 points a level it is uncertain by 0.5 %.

    The score is the mean of the targets at a point, so E[target . score] = E|score|^2, and
    E|target - score|^2 = E|target|^2 - E|score|^2.
    """
    floors = []
    for sigma in sigmas.tolist():
        noisy_x = sample_data(500) + sigma * torch.randn(500, 2)
        score_square = exact_score(noisy_x, sigma).square().sum(dim=1).mean()
        target_square = 2 / sigma**2                     # in 2-D |eps|^2 has the mean 2
        floors.append(0.5 * level_weight(sigma, w_mode) * (target_square - score_square))
    return torch.stack(floors).mean().item()


# Noisy points and their exact scores, to compare the learned score with while it is learned.
check_sigmas = []
for sigma in [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]:
    if sigma_min <= sigma <= sigma_max:
        check_sigmas.append(sigma)
if not check_sigmas:                                     # a narrow range of levels: its middle
    check_sigmas.append(math.sqrt(sigma_min * sigma_max))
check_points = [sample_data(4000) + sigma * torch.randn(4000, 2) for sigma in check_sigmas]
check_scores = [exact_score(x, sigma) for x, sigma in zip(check_points, check_sigmas)]


@torch.no_grad()
def score_errors(model):
    """The relative error of a network at each of check_sigmas: a list."""
    errors = []
    for sigma, x, exact in zip(check_sigmas, check_points, check_scores):
        learned = model(x, torch.full((len(x),), math.log(sigma)))
        errors.append(((learned - exact).norm() / exact.norm()).item())
    return errors


model = ScoreMLP(args.hidden, num_layers=args.layers,
                 mean=x_data.mean(dim=0), sigma_data=x_data.std())
optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
# The learning rate rises for 15 % of the steps, then falls to 0. The high rates in the middle
# learn fast, and the low ones at the end take out the noise of the steps. (By default it also
# lowers Adam's momentum while the rate is high.)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.15)
# The weights that will be used are a mean over about the last 100 steps, which is less noisy. It
# begins at half time, with the weights as they are then: so nothing in it is from the start, after
# a short run either.
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))

errors_before = score_errors(model)
floor_of_loss = loss_floor(sigmas, args.w_mode)
with torch.no_grad():
    loss_before = dsm_loss_multi_sigma(model, x_data, sigmas, args.w_mode).item()
print(f"before any step: loss {loss_before:.4g} (its floor {floor_of_loss:.4g})   "
      f"mean relative score error {np.mean(errors_before):.3f}")
losses = []
history = {"step": [0], "loss": [loss_before], "error": [np.mean(errors_before)]}
interval = max(1, args.steps // 10)                      # steps between two printed lines
started = time.time()

bar = tqdm(range(1, args.steps + 1), desc="training")
for step in bar:
    x = x_data[torch.randint(len(x_data), (args.batch,))]
    loss = dsm_loss_multi_sigma(model, x, sigmas, args.w_mode)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step > args.steps // 2:
        ema.update_parameters(model)
    losses.append(loss.item())
    if not math.isfinite(losses[-1]):
        sys.exit(f"the loss is {losses[-1]} at step {step}: try a --lr below {args.lr:g}")
    if step % interval == 0:
        # This is the error of the current weights; the averaged ones are measured in the Check.
        recent_loss = np.mean(losses[-interval:])
        error = np.mean(score_errors(model))
        bar.write(f"step {step:5d}   loss {recent_loss:.4g} (its floor {floor_of_loss:.4g})   "
                  f"mean relative score error {error:.3f}")
        history["step"].append(step)
        history["loss"].append(recent_loss)
        history["error"].append(error)

train_s = time.time() - started
model = ema.module                                       # from here on the averaged weights,
model.requires_grad_(False)                              # which are trained: no more gradients
torch.save(model.state_dict(), os.path.join(args.outdir, "model.pt"))


# %% Sampling
# Every sampler takes a score, points x at the first level, and the levels (a list, descending). It
# returns all states on the way: one for each level and, last, the points at sigma = 0. (The state
# of the first level is x itself; only ald walks at that level, too.)
def score(x, sigma):
    """The learned score of q_sigma; x (B, 2), sigma a number -> (B, 2)."""
    return model(x, torch.full((len(x),), math.log(sigma)))


def denoise(score, x, sigma):
    """The mean of all clean data that could lie behind x (Tweedie's formula).

    The score is the mean of the arrows (x_clean - x) / sigma^2 (cell Loss); solve for x_clean.
    """
    return x + sigma**2 * score(x, sigma)


def ancestral_step(score, x, sigma, sigma_next, ddim=False):
    """x_clean + sigma_next (keep eps + sqrt(1 - keep^2) z), with x_clean and eps guessed from x."""
    x_clean = denoise(score, x, sigma)
    eps = (x - x_clean) / sigma                          # a guess of the noise in x
    # The next level needs noise again, but less. `keep` is how much of eps is in it, the rest is
    # new. Its square and that of the rest add up to 1, so that the noise has the right size.
    if ddim:
        keep = 1.0                                       # DDIM puts the same noise back
    else:
        # DDPM renews a part. On the way up, the noise eps' of sigma_next became the eps of sigma:
        # fresh noise z' was added to it,
        #     sigma eps = sigma_next eps' + sqrt(sigma^2 - sigma_next^2) z'
        # So their correlation is sigma_next / sigma. Seen from eps, as both are Gaussian:
        #     eps' = (sigma_next / sigma) eps + noise that does not depend on eps
        keep = sigma_next / sigma
    z = torch.randn_like(x)                              # in DDIM times 0
    eps_next = keep * eps + math.sqrt(1 - keep**2) * z
    return x_clean + sigma_next * eps_next


def ancestral_sampling(score, x, sigmas, ddim=False):
    """DDPM's sampler, or DDIM's: one step from each level to the next."""
    path = [x]
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        x = ancestral_step(score, x, sigma, sigma_next, ddim)
        path.append(x)
    path.append(denoise(score, x, sigmas[-1]))           # to sigma = 0: put no noise back
    return path


def heun_sampling(score, x, sigmas):
    """Follow dx/dsigma = -sigma s.

    Points that move by it have the density q_sigma at every sigma (theory.md 7.2). DDIM's step is
    Euler's rule. Heun's goes there, looks at the slope again, and takes the mean of both slopes.
    """
    path = [x]
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        slope = -sigma * score(x, sigma)
        x_euler = x + (sigma_next - sigma) * slope
        slope_there = -sigma_next * score(x_euler, sigma_next)
        x = x + (sigma_next - sigma) * (slope + slope_there) / 2
        path.append(x)
    path.append(denoise(score, x, sigmas[-1]))
    return path


# (This eta is the notes' Langevin step; --eta, of the denoising picture, is the step of 000.)
def langevin_step(score, x, sigma, kappa):
    """x + eta/2 s + sqrt(eta) z with eta = 2 kappa sigma^2, the same kappa at every level.

    A walk within one level: it draws x towards the density q_sigma and keeps it near it. The
    smaller kappa, the nearer and the slower; from 2 on it diverges (theory.md 8.4).
    """
    noise = math.sqrt(2 * kappa) * sigma * torch.randn_like(x)
    return x + kappa * sigma**2 * score(x, sigma) + noise


def annealed_langevin_dynamics(score, x, sigmas, K, kappa):
    """003 section 4.3.3: walk K steps at each level, then denoise."""
    path = []
    for sigma in sigmas:
        for _ in range(K):
            x = langevin_step(score, x, sigma, kappa)
        path.append(x)
    path.append(denoise(score, x, sigmas[-1]))
    return path


def predictor_corrector(score, x, sigmas, kappa):
    """To each lower level a step by DDPM's rule, then a Langevin step there.

    The first puts the mean of the possible clean points in the place of one of them, so that the
    points come out slightly too close together. The second spreads them slightly too far; kappa =
    0.4 was chosen by trial.
    """
    path = [x]
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        x = ancestral_step(score, x, sigma, sigma_next)
        x = langevin_step(score, x, sigma_next, kappa)
        path.append(x)
    path.append(denoise(score, x, sigmas[-1]))
    return path


def sampling_levels(name):
    """All T levels; half for heun, so that it costs about as many calls as ddim.  -> a list"""
    T = max(2, args.T // 2) if name == "heun" else args.T
    return sigma_schedule(args.schedule, T, sigma_min, sigma_max).tolist()


def run_sampler(name, score, x, levels):
    """The states of the sampler of that name."""
    if name == "ancestral":
        return ancestral_sampling(score, x, levels)
    if name == "ddim":
        return ancestral_sampling(score, x, levels, ddim=True)
    if name == "heun":
        return heun_sampling(score, x, levels)
    if name == "ald":
        return annealed_langevin_dynamics(score, x, levels, args.K, args.kappa)
    return predictor_corrector(score, x, levels, args.kappa)


# At sigma_max the noisy data are nearly one Gaussian, with this mean and covariance.
start = MultivariateNormal(x_data.mean(dim=0), torch.cov(x_data.T) + sigma_max**2 * torch.eye(2))


# Noise that is left over from the level above shrinks by |1 - kappa|^K in K Langevin steps. If
# sigma itself shrinks faster, the rest grows in units of sigma, level by level (theory.md 8.4).
if abs(1 - args.kappa) ** args.K * largest_ratio >= 1:
    print("warning: annealed Langevin (ald) cannot keep up with these levels; raise --K or --T, "
          "or bring --kappa nearer to 1")

levels = sampling_levels(args.sampler)                   # sigmas again, or half as many for heun
n_sets = 8                                               # one set says little about a distance
sample_sets = []
for _ in tqdm(range(n_sets), desc="sampling"):
    path = run_sampler(args.sampler, score, start.sample((args.n_samples,)), levels)
    sample_sets.append(path[-1])
    for sigma, x in zip(levels + [0.0], path):
        if not torch.isfinite(x).all():
            sys.exit(f"--sampler {args.sampler}: points are not finite at sigma = {sigma:.3g}; "
                     "train longer, or with --w_mode sigma2")
samples = path[-1]                                       # (n_samples, 2)
np.save(os.path.join(args.outdir, "samples.npy"), samples.numpy())


# %% Check
# Two questions. How far is the learned score from the exact one, level by level? It is often worst
# where sigma is smallest, and does the least harm there, as a step multiplies the score by sigma^2.
# And how far are the samples from the data? Even two fresh sets of data are some way apart: that is
# the floor.
print("\nsigma    relative score error (0: exact)    before training (first guess alone)")
errors = score_errors(model)
for sigma, error, before in zip(check_sigmas, errors, errors_before):
    print(f"{sigma:5.3g}    {error:31.3f}    {before:35.3f}")
score_err = np.mean(errors)


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


generated = [sorted_projections(x) for x in sample_sets]
fresh = [sorted_projections(sample_data(args.n_samples)) for _ in range(n_sets)]
perfect = [sorted_projections(sample_data(args.n_samples)) for _ in range(n_sets)]
sw2 = mean_sw2(generated, fresh)
sw2_floor = mean_sw2(perfect, fresh)                     # what a perfect sampler would get
# Were the samples fresh data, too, the ratio would still vary by about 0.1 from run to run.
print(f"\nSW2 of samples to fresh data, mean of {n_sets} x {n_sets} pairs of sets: {sw2:.4f}. "
      f"Its floor, fresh to fresh data: "
      f"{sw2_floor:.4f}.\nTheir ratio: {sw2 / sw2_floor:.2f} (good: below 1.3)")

summary = {"data": args.data, "seed": args.seed, "steps": args.steps, "w_mode": args.w_mode,
           "schedule": args.schedule, "T": args.T, "sampler": args.sampler,
           "score_err": round(float(score_err), 4), "SW2": round(float(sw2), 4),
           "floor": round(float(sw2_floor), 4), "train_s": round(train_s, 1)}
settings = vars(args) | {"sigma_min": sigma_min, "sigma_max": sigma_max}
settings |= {"viz_sigma": viz_sigma, "eta": eta}         # what None stood for
with open(os.path.join(args.outdir, "summary.json"), "w") as file:
    json.dump({"settings": settings, "figures": summary}, file, indent=1)


# %% Pictures
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"        # truth, what is learned, the rest
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 10})
middle = (x_data.amin(dim=0) + x_data.amax(dim=0)) / 2
half = 0.6 * (x_data.amax(dim=0) - x_data.amin(dim=0)).max().item()
left, bottom = (middle - half).tolist()
view = [left, left + 2 * half, bottom, bottom + 2 * half]


def grid(n):
    """n x n points of the visible square, (n^2, 2), row by row."""
    line = torch.linspace(-half, half, n)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return middle + torch.stack([x.flatten(), y.flatten()], dim=1)


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
              angles="xy", scale_units="xy", scale=10 * longest / half)


def draw_row(clouds, titles, colours, title, file_name):
    """A row of panels, one for each cloud of points (n, 2)."""
    fig, axs = plt.subplots(1, len(clouds), figsize=(2 * len(clouds), 2.7))
    for ax, x, name, colour in zip(axs, clouds, titles, colours):
        dots(ax, x, colour)
        panel(ax, name)
    fig.suptitle(title)
    fig.savefig(os.path.join(args.outdir, file_name))


# Where do the arrows point? Exact above, learned below.
fig, axs = plt.subplots(2, 3, figsize=(9, 6.4))
where = grid(16)
large_sigma = max(viz_sigma, min(2 * model.sigma_data.item(), sigma_max))
for column, sigma in enumerate(np.geomspace(viz_sigma, large_sigma, 3)):
    density = exact_log_density(grid(60), sigma).exp().view(60, 60)
    exact = exact_score(where, sigma)
    longest = exact.norm(dim=1).median().item()
    for ax in axs[:, column]:
        ax.contourf(density, 12, extent=view, cmap="Greys", vmax=1.6 * density.max())
    arrows(axs[0, column], where, exact, longest, BLUE)
    arrows(axs[1, column], where, score(where, sigma), longest, ORANGE)
    panel(axs[0, column], rf"exact, $\sigma$ = {sigma:.2g}")
    panel(axs[1, column], rf"learned, $\sigma$ = {sigma:.2g}")
fig.suptitle("Score over the density of the noisy data (long arrows cut at the median length)")
fig.savefig(os.path.join(args.outdir, "quiver.png"))

# One denoising step, by default of the right size, sigma^2, and one of the size that 000 uses, by
# default 15 times too long.
fig, axs = plt.subplots(1, 3, figsize=(10, 4.1))
x_clean = sample_data(1500)
noisy_x = x_clean + viz_sigma * torch.randn(1500, 2)
names = ["noisy", "one step", "000's step"]
for ax, name, step_size, colour in zip(axs, names, [0, eta, 0.15], [GREY, ORANGE, ORANGE]):
    x_step = noisy_x + step_size * score(noisy_x, viz_sigma)
    distance = (x_step - x_clean).square().sum(dim=1).mean().item()
    dots(ax, x_clean, BLUE)
    dots(ax, x_step, colour)
    panel(ax, rf"{name}, $\eta$ = {step_size:.3g}" + f"\nmean square distance {distance:.3g}")
fig.suptitle(rf"One step $x + \eta\,s(x, \sigma)$ at $\sigma$ = {viz_sigma:.2g}; clean points blue")
fig.savefig(os.path.join(args.outdir, "denoise_scatter.png"))

# From noise to data.
clouds = []
titles = []
all_levels = levels + [0.0]
for i in np.linspace(0, len(levels), 6).astype(int):     # six states, the first and last among them
    clouds.append(path[i])
    titles.append(rf"$\sigma$ = {all_levels[i]:.2g}")
clouds.append(sample_data(2000))
titles.append("data")
colours = [GREY, GREY, GREY, GREY, GREY, ORANGE, BLUE]
draw_row(clouds, titles, colours, f"From pure noise to samples ({args.sampler})", "generation.png")

# The same as a movie: at most 41 of the states, then the last one for a while, and again.
frames = np.linspace(0, len(levels), min(41, len(path))).astype(int).tolist()
frames += 8 * [len(levels)]
fig, axs = plt.subplots(1, 2, figsize=(6.4, 3.4))
dots(axs[1], clouds[-1], BLUE)
panel(axs[1], "data")
movie = PillowWriter(fps=10)
with movie.saving(fig, os.path.join(args.outdir, "generation.gif"), dpi=100):
    for i in frames:
        axs[0].clear()
        dots(axs[0], path[i], ORANGE)
        panel(axs[0], rf"points at $\sigma$ = {all_levels[i]:.3f}")
        movie.grab_frame()
plt.close(fig)                                           # of a movie only the file is of use

# What was learned?
fig, axs = plt.subplots(1, 3, figsize=(11, 3.4))
axs[0].plot(history["step"], history["loss"], "o-", color=ORANGE, label="loss")
axs[0].axhline(floor_of_loss, color=BLUE, ls="--", label="floor: loss of the exact score")
axs[0].set(xlabel="step", title=f"Loss (weight {args.w_mode})",
           ylim=(0, 1.4 * max(history["loss"])))
axs[1].plot(history["step"], history["error"], "o-", color=ORANGE)
axs[1].set(xlabel="step", title="Mean relative score error of the weights", ylim=(0, None))
axs[2].loglog(check_sigmas, errors_before, "o--", color=GREY, label="before training")
axs[2].loglog(check_sigmas, errors, "o-", color=ORANGE, label="after")
axs[2].set(xlabel=r"$\sigma$", title="Relative score error of the averaged weights")
axs[0].legend()
axs[2].legend()
fig.savefig(os.path.join(args.outdir, "training.png"))


# %% Extra: which sampler?
# All five on the same network. Their cost is the number of calls of the network. This is the SW2 of
# one set of samples, and uncertain by a quarter.
calls = {
    "ancestral": args.T,
    "ddim": args.T,
    "heun": 2 * len(sampling_levels("heun")) - 1,        # the last step needs but one
    "ald": args.K * args.T + 1,                          # one to denoise
    "pc": 2 * args.T - 1,
}
clouds = []
titles = []
print("\nsampler      calls    SW2/floor")
for name in calls:
    x = start.sample((args.n_samples,))
    x = run_sampler(name, score, x, sampling_levels(name))[-1]
    ratio = mean_sw2([sorted_projections(x)], fresh) / sw2_floor
    print(f"{name:10s} {calls[name]:7d} {ratio:12.2f}")
    clouds.append(x)
    titles.append(f"{name}, {calls[name]} calls\nSW2 = {ratio:.2f} floors")
draw_row(clouds, titles, [ORANGE] * 5, "One network, five samplers", "samplers.png")


# %% Extra: can one start from given points?
# Yes: give them the noise of a level and go down from there. With little noise a point comes back
# near its start, with much noise anywhere. 003's code forgets the noise. Then each point is drawn
# to the mean of the clean points behind it as if it were noisy: they end too close together.
def sample_with_initialization(score, x_init, levels, with_noise=True):
    """Points (B, 2) sent up to the first of these levels, and down all of them.  -> (B, 2)"""
    if with_noise:
        x_init = x_init + levels[0] * torch.randn_like(x_init)
    return heun_sampling(score, x_init, levels)[-1]


print("\nstart at sigma    SW2/floor    mean distance moved    noise forgotten: SW2/floor    "
      "spread (data: 1.00)")
heun_levels = sampling_levels("heun")
for i in [3 * len(heun_levels) // 4, len(heun_levels) // 2, len(heun_levels) // 4]:
    x_init = sample_data(args.n_samples)
    back = sample_with_initialization(score, x_init, heun_levels[i:])
    forgotten = sample_with_initialization(score, x_init, heun_levels[i:], with_noise=False)
    moved = (back - x_init).norm(dim=1).mean().item()
    ratio = mean_sw2([sorted_projections(back)], fresh) / sw2_floor
    ratio_forgotten = mean_sw2([sorted_projections(forgotten)], fresh) / sw2_floor
    spread = (forgotten.std() / x_data.std()).item()
    print(f"{heun_levels[i]:14.3g} {ratio:12.2f} {moved:22.2f} {ratio_forgotten:29.2f} "
          f"{spread:23.2f}")


# %% Extra: how likely is a point?
# A network that has learned only arrows can tell the density, too. Heun's sampler moves points by
# dx/dsigma = f with f = -sigma s. Follow a point upwards. Where the arrows f go apart, a cloud of
# points around it grows thinner. So the density at the moving point changes by
#     d log q / dsigma  =  -div f  =  -(df_1/dx_1 + df_2/dx_2)
# (theory.md 7.2), and at the end, at sigma_max, it is known: there q is nearly the Gaussian from
# which sampling starts. So
#     log q(x) at sigma_min  =  log q(end) at sigma_max  +  integral of div f from min to max.
def flow(score, x, sigma):
    """f = -sigma s, (B, 2), and its divergence, (B,), at the points x (B, 2)."""
    x = x.detach().requires_grad_()
    f = -sigma * score(x, sigma)
    # A point's f depends on no other point, so the gradient of the sum has that of each.
    df_1 = torch.autograd.grad(f[:, 0].sum(), x, retain_graph=True)[0]         # (B, 2)
    df_2 = torch.autograd.grad(f[:, 1].sum(), x)[0]
    return f.detach(), df_1[:, 0] + df_2[:, 1]


def log_likelihood(score, x, levels, log_start):
    """log q of x (B, 2) at the last level, from log_start(x), log q at the first.  -> (B,)

    levels: a list, descending. Heun's rule, from the last one up, for point and integral.
    """
    upwards = levels[::-1]
    integral = 0
    for sigma, sigma_next in zip(upwards, upwards[1:]):
        step = sigma_next - sigma
        f, div_f = flow(score, x, sigma)
        f_there, div_f_there = flow(score, x + step * f, sigma_next)
        x = x + step * (f + f_there) / 2
        integral = integral + step * (div_f + div_f_there) / 2
    return log_start(x) + integral


likelihood_levels = geometric_sigma_schedule(40, sigma_min, sigma_max).tolist()
x = sample_data(2000) + sigma_min * torch.randn(2000, 2)
learned = log_likelihood(score, x, likelihood_levels, start.log_prob)
exact = exact_log_density(x, sigma_min)
difference = learned - exact
standard_error = difference.std().item() / math.sqrt(2000)
# A difference of 0.05 is a density that is 5 % too high, in the (geometric) mean over the points.
print(f"\nlog density at 2000 fresh points, sigma = {sigma_min:.3g}, mean in nats: "
      f"learned {learned.mean():.3f}, exact {exact.mean():.3f},\ndifference "
      f"{difference.mean():.3f} +- {standard_error:.3f} (good: within 0.05)")


# %% Extra: is this a DDPM?
# Exercise 4.4. A DDPM shrinks the data while it adds noise: x_t = alpha_t x0 + sigma_t eps. Divide
# by alpha_t, and this is our x + sigma eps with sigma = sigma_t / alpha_t. So our network serves as
# a DDPM, without any training, and its samplers take the same steps as ours (theory.md 7.5). (The
# literature calls DDPM's way VP, variance preserving, and ours VE, variance exploding.)
def convert(value, x, alpha, sigma, source, target):
    """From one of "score", "eps", "x0", "v" to another, at the point x = alpha x0 + sigma eps.

    Four ways to say what a network predicts; knowing x, each of them tells the others.
    """
    if source == "score":
        eps = -sigma * value
    elif source == "eps":
        eps = value
    elif source == "x0":
        eps = (x - alpha * value) / sigma
    else:                                                # v = alpha eps - sigma x0
        eps = (sigma * x + alpha * value) / (alpha**2 + sigma**2)
    x0 = (x - sigma * eps) / alpha
    return {"score": -eps / sigma, "eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[target]


def vp_schedule(sigma_min, sigma_max):
    """alpha_t, sigma_t of DDPM's steps, with sigma_t / alpha_t within the levels: two lists.

    What the papers call alpha_bar is alpha_t^2 here.
    """
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(dim=0).flip(0)        # from noise to data
    ratio = (1 / alpha_bar - 1).sqrt()                   # sigma_t / alpha_t
    alpha_bar = alpha_bar[(sigma_min <= ratio) & (ratio <= sigma_max)]
    alpha_bar = alpha_bar[::5]                           # every fifth step is enough to compare
    return alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()


def ddpm_sampling(eps_model, x, alphas, sigmas, ddim=False):
    """DDPM's sampler, or DDIM's, as in their papers; eps_model(x, alpha, sigma) -> noise."""
    path = [x]
    for alpha, sigma, alpha_next, sigma_next in zip(alphas, sigmas, alphas[1:], sigmas[1:]):
        eps = eps_model(x, alpha, sigma)
        if ddim:
            x0 = (x - sigma * eps) / alpha
            x = alpha_next * x0 + sigma_next * eps
        else:
            z = torch.randn_like(x)
            beta = 1 - (alpha / alpha_next) ** 2
            mean = (x - beta / sigma * eps) / math.sqrt(1 - beta)
            x = mean + math.sqrt(beta) * sigma_next / sigma * z
        path.append(x)
    eps = eps_model(x, alphas[-1], sigmas[-1])
    path.append((x - sigmas[-1] * eps) / alphas[-1])     # x0
    return path


model64 = copy.deepcopy(model).double()                  # so that only true differences are seen


def score64(x, sigma):
    """score in float64."""
    return model64(x, torch.full((len(x),), math.log(sigma), dtype=torch.float64))


def eps64(x, alpha, sigma):
    """The network as a DDPM's: the score of x_t at x is our score at x / alpha, over alpha."""
    score_t = score64(x / alpha, sigma / alpha) / alpha
    return convert(score_t, x, alpha, sigma, "score", "eps")


def compare_with_ddpm(alphas, vp_sigmas, ddim):
    """The largest difference between the paths of DDPM's sampler and of ours, with equal noise."""
    ve_sigmas = [sigma / alpha for sigma, alpha in zip(vp_sigmas, alphas)]
    x = torch.randn(32, 2, dtype=torch.float64)
    torch.manual_seed(args.seed)                         # the same seed, so the same noise
    vp_path = ddpm_sampling(eps64, vp_sigmas[0] * x, alphas, vp_sigmas, ddim)
    torch.manual_seed(args.seed)
    ve_path = ancestral_sampling(score64, ve_sigmas[0] * x, ve_sigmas, ddim)
    largest = 0.0
    for vp, ve, alpha in zip(vp_path, ve_path, alphas + [1.0]):
        largest = max(largest, (vp / alpha - ve).abs().max().item())
    return largest


x_t = torch.tensor([[1.0, 2.0]], dtype=torch.float64)    # one answer of the network, four ways
eps_t = eps64(x_t, 0.8, 0.6)
print("\nAt x_t = (1, 2), where alpha_t = 0.8 and sigma_t = 0.6, the network says:")
for name in ["score", "eps", "x0", "v"]:
    value = convert(eps_t, x_t, 0.8, 0.6, "eps", name)
    eps_again = convert(value, x_t, 0.8, 0.6, name, "eps")
    print(f"{name:5s} = ({value[0, 0]:.3f}, {value[0, 1]:.3f}), "
          f"from which eps = ({eps_again[0, 0]:.3f}, {eps_again[0, 1]:.3f})")

alphas, vp_sigmas = vp_schedule(sigma_min, sigma_max)
if alphas:
    print(f"\nThe same noise through {len(alphas)} of DDPM's steps, as a DDPM and by our samplers:")
    print(f"largest difference, DDPM {compare_with_ddpm(alphas, vp_sigmas, ddim=False):.0e}, "
          f"DDIM {compare_with_ddpm(alphas, vp_sigmas, ddim=True):.0e} (float64 has 16 digits)")


# %% Result
print(f"\npictures in {args.outdir}; look at generation.gif first")
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
