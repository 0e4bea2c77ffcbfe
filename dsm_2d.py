r"""Denoising score matching in 2-D with many noise levels: from data to samples, measured against the exact answer.

Reads beside: notes 000 (whole); 003 sections 4.2.2, 4.3.1, 4.3.3, exercises 4.2-4.4; 002 part 2; theory.md 1, 4, 7, 8.

    python dsm_2d.py                                    # two Gaussians, grown from pure noise
    python dsm_2d.py --data swiss_roll --sampler pc     # exercise 4.2; --help lists every setting

The data are mixtures of Gaussians, so the score of data plus noise is known in closed form at every noise level: each
figure printed is a distance to that exact answer, or stands beside the floor that a perfect model would reach.

A good run takes 20 s and ends like this (2 CPU cores, Python 3.11, torch 2.13.0), with any seed nearly so:
    data=gmm2 seed=0 steps=1200 w_mode=sigma2 schedule=geometric T=40
    sampler=heun calls=39 score_err=0.0878 SW2=0.0642 floor=0.0564 train_s=6.1
"""
# %% Imports and settings
import argparse
import copy
import json
import math
import sys
import tempfile
import time
import warnings
from functools import partial
from itertools import combinations, product
from pathlib import Path

# Ctrl-C and a closed pipe take one line, not a traceback; also during the imports below, which take seconds
sys.excepthook = lambda kind, *rest: (print("\nstopped by", kind.__name__, file=sys.stderr)
                                      if kind in (KeyboardInterrupt, BrokenPipeError) else sys.__excepthook__(kind, *rest))

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from sklearn.datasets import make_circles, make_moons
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] + " Lengths are in data units.",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--data", default="gmm2", choices=["gmm2", "circles", "moons", "swiss_roll"], help="which 2-D law")
parser.add_argument("--schedule", default="geometric", choices=["geometric", "linear", "quadratic", "cosine", "adaptive"],
                    help="spacing of the levels")
parser.add_argument("--w_mode", default="sigma2", choices=["none", "sigma", "sigma2", "inv_sigma2"], help="weight of a level")
parser.add_argument("--sampler", default="heun", choices=["ald", "pc", "ancestral", "ddim", "heun"], help="which one makes samples.npy")
parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: cuda where there is one, else cpu")
parser.add_argument("--outdir", default="out_dsm_2d", help="folder for pictures, samples.npy, model.pt and summary.json")
NUMBERS = [   # flag, default, lowest, highest (of the flag's type), meaning; sigmas and distances are in data units
    ("n", 50000, 10, 10**7, "training points"),   # with 000's 8192 the score of gmm2 at sigma = 0.2 is 1.5 times as far off
    ("T", 40, 2, 1000, "noise levels"),
    ("sigma_min", None, 1e-4, 1e4, "smallest level (None: 0.01; adaptive: 1 %% quantile of the pairwise distances of 2000 points)"),
    ("sigma_max", None, 1e-4, 1e4, "largest level (None: largest of those distances; adaptive: their 99 %% quantile)"),
    ("hidden", 64, 1, 8192, "width of the network"),   # better than 128 after equal time, and faster to sample from
    ("layers", 3, 1, 64, "hidden layers"),
    ("steps", 1200, 1, 10**7, "training steps"),
    ("batch", 1024, 1, 10**6, "data points per step, each used with +eps and -eps; not more than n"),
    ("lr", 1.5e-2, 1e-8, 100.0, "peak of the one-cycle learning rate"),   # at 8e-3 slower, at 2e-2 erratic on the roll
    ("K", 5, 1, 10**5, "Langevin steps per level (ald)"),
    ("kappa", 0.4, 1e-4, 1.9999, "Langevin step in units of sigma^2, eta = 2 kappa sigma^2 (ald, pc); it diverges from 2 on"),
    ("n_samples", 5000, 2, 10**6, "points in samples.npy and in every set behind an SW2"),
    ("viz_sigma", None, 1e-4, 1e4, "level of the denoising picture, inside the trained range (None: 10 sigma_min)"),
    ("eta", None, 0, 1e4, "step of the one-step denoising (None: viz_sigma^2, Tweedie)"),
    ("seed", 0, 0, 2**32 - 1, "seed of everything random"),
]
for flag, default, low, high, meaning in NUMBERS:
    parser.add_argument(f"--{flag}", type=type(high), default=default, help=f"{meaning} [{low:g} ... {high:g}]")
args = parser.parse_args([] if "kernel_launcher" in sys.argv[0] else None)   # a notebook's argv belongs to its kernel
for flag, default, low, high, meaning in NUMBERS:
    value = getattr(args, flag)
    if value is not None and not low <= value <= high:   # refuses nan as well
        parser.error(f"argument --{flag}: {value:g} is outside [{low:g}, {high:g}]")
if args.batch > args.n:
    parser.error(f"argument --batch: {args.batch} is more than the {args.n} points of --n; give a smaller --batch")
available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
if args.device != "auto" and not available[args.device]:
    parser.error(f"argument --device: no {args.device} on this machine")
device = torch.device(args.device if args.device != "auto" else "cuda" if available["cuda"] else "cpu")
torch.manual_seed(args.seed)
torch.set_num_threads(1)   # as fast as 2 for so small a network, and not 10 times slower when another program is busy

# %% Data: every law is a mixture of Gaussians with equal weights, so its score is known at every noise level
if args.data == "gmm2":   # 000's two Gaussians
    centres = torch.tensor([[0.0, 0.0], [3.0, 3.0]], dtype=torch.float64)
    covs = torch.tensor([[[1.0, 0.3], [0.3, 1.2]], [[0.6, -0.2], [-0.2, 0.8]]], dtype=torch.float64)
else:   # 600 centres along a noise-free curve, at most about their noise tau apart
    t = 1.5 * np.pi * (1 + 2 * (np.arange(600) + 0.5) / 600)   # make_swiss_roll draws this angle at random
    curve, tau = {"circles": (make_circles(600, shuffle=False, factor=0.5)[0], 0.06),
                  "moons": (make_moons(600, shuffle=False)[0], 0.06),
                  "swiss_roll": (np.stack([t * np.cos(t), t * np.sin(t)], axis=1) / 7, 0.03)}[args.data]   # exercise 4.2
    centres, covs = torch.tensor(curve), (tau**2 * torch.eye(2, dtype=torch.float64)).expand(600, 2, 2)
variances, axes = torch.linalg.eigh(covs)   # of the M Gaussians: (M, 2) along their axes, the columns of (M, 2, 2); all in float64

def seeded(offset):
    """A generator of its own for evaluation and sampling, so that looking at the model does not change its training."""
    return torch.Generator().manual_seed(10**6 * args.seed + offset)

def sample_data(n, generator):
    """n i.i.d. points (n, 2): a random centre plus its noise. 000's sample_gmm2 and sample_two_moons in one.

    make_moons itself spaces its points evenly, so that two of its sets are nearer to each other than two random ones.
    """
    k = torch.randint(len(centres), (n,), generator=generator)
    z = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return (centres[k] + torch.einsum("bij,bj->bi", axes[k], variances[k].sqrt() * z)).float()

def exact_density(x, sigma):
    """log q_sigma(x) (B,), its gradient (B, 2) and Laplacian (B,), data convolved with N(0, sigma^2 I); sigma a float or (B,)."""
    pieces, sigma = [], torch.as_tensor(sigma).cpu().double().expand(len(x))
    for x_i, sigma_i in zip(x.detach().cpu().double().split(500), sigma.split(500)):   # 500 points fit in the cache
        y = torch.einsum("kji,bkj->bki", axes, centres - x_i[:, None])   # (B, M, 2) towards the centres, along their axes
        var = variances + sigma_i[:, None, None] ** 2                    # (B, M, 2) noise adds to every variance
        log_qk = -0.5 * (y**2 / var + (2 * math.pi * var).log()).sum(-1) - math.log(len(centres))   # (B, M)
        w, s_k = log_qk.softmax(dim=1), y / var   # (B, M), (B, M, 2); in log space: far out, 003's "density + 1e-8" loses the score
        s = torch.einsum("bk,kij,bkj->bi", w, axes, s_k)                 # (B, 2)
        laplacian = (w[:, :, None] * (s_k**2 - 1 / var)).sum((1, 2)) - s.square().sum(1)   # = (Laplacian q)/q - |s|^2
        pieces.append((log_qk.logsumexp(dim=1), s, laplacian))
    return [torch.cat(piece).to(x.dtype).to(x.device) for piece in zip(*pieces)]

exact_score = lambda x, sigma: exact_density(x, sigma)[1]   # (B, 2)
x_data = sample_data(args.n, seeded(0))   # (n, 2)

# %% Noise levels, always descending: 003's schedules ascend, its samplers need them descending
def level_range(x, adaptive=False):
    """sigma_min, sigma_max: 0.01 and the largest distance between points, or two quantiles. 000's 0.8 is too small: theory.md 8.1."""
    distances = torch.pdist(x[:2000])
    distances = distances[distances > 0]   # of duplicated points 003's adaptive schedule takes the logarithm of 0
    return torch.quantile(distances, torch.tensor([0.01, 0.99])).tolist() if adaptive else (0.01, distances.max().item())

def geometric_sigma_schedule(T=40, sigma_min=0.01, sigma_max=10.0):
    """T levels (T,) with a constant ratio, from sigma_max down to sigma_min."""
    return torch.tensor(np.geomspace(sigma_max, sigma_min, T), dtype=torch.float32)

def sigma_schedule(name, T, sigma_min, sigma_max):
    """The schedules of 003 section 4.3.1, (T,) descending; adaptive is geometric between limits taken from the data."""
    if name in ("geometric", "adaptive"):
        return geometric_sigma_schedule(T, sigma_min, sigma_max)
    u = torch.linspace(1, 0, T)
    return sigma_min + (sigma_max - sigma_min) * {"linear": u, "quadratic": u**2, "cosine": (1 - torch.cos(math.pi * u)) / 2}[name]

sigma_min, sigma_max = level_range(x_data, args.schedule == "adaptive")
sigma_min, sigma_max = args.sigma_min or sigma_min, args.sigma_max or sigma_max   # what is given is above 0
viz_sigma = args.viz_sigma or min(10 * sigma_min, sigma_max)
eta = viz_sigma**2 if args.eta is None else args.eta
if not 1.01 * sigma_min <= sigma_max:
    parser.error(f"argument --sigma_min: {sigma_min:g} is not below sigma_max = {sigma_max:g} by at least 1 %")
if not sigma_min <= viz_sigma <= sigma_max:
    parser.error(f"argument --viz_sigma: {viz_sigma:g} is outside the trained range [{sigma_min:g}, {sigma_max:g}]")
try:
    Path(args.outdir).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.outdir).close()   # better to learn it now than after the training
except OSError as error:
    parser.error(f"argument --outdir: cannot write to {args.outdir!r} ({error.strerror})")
sigmas = sigma_schedule(args.schedule, args.T, sigma_min, sigma_max).to(device)   # (T,)
levels = sigmas.tolist()
gamma = max(a / b for a, b in zip(levels, levels[1:]))
print(f"{args.data}: {args.n} points, {args.T} levels {levels[0]:.4g} ... {levels[-1]:.4g}, largest ratio {gamma:.3g}, on {device}")
if (carried := abs(1 - args.kappa) ** args.K * gamma) >= 1:
    warnings.warn(f"ald: |1 - kappa|^K gamma = {carried:.2f} >= 1: K Langevin steps shrink surplus noise less than sigma shrinks "
                  "from level to level, so relative to sigma it grows; raise --K or --T, or bring --kappa nearer to 1")

# %% Model
class FourierTimeEmbedding(nn.Module):
    """sin and cos of multiples of log sigma, (B,) -> (B, 2 dim); of sigma itself they would repeat (003's sin(2^k pi sigma))."""
    def __init__(self, dim=8, max_freq=1.0):   # 000 goes to 10; but only levels that look alike help one another
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(max_freq / dim, max_freq, dim))

    def forward(self, log_sigma):
        angles = log_sigma[:, None] * self.frequencies   # (B, dim)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

class ScoreMLP(nn.Module):
    """model(x, log_sigma) -> score: (B, 2), (B,) -> (B, 2), preconditioned as in Karras et al. 2022, table 1 (theory.md 7.1)."""
    def __init__(self, hidden=64, time_dim=8, num_layers=3, mean=0.0, sigma_data=1.0, waves=8):
        super().__init__()
        self.embedding = FourierTimeEmbedding(time_dim)
        self.register_buffer("mean", torch.as_tensor(mean))
        self.register_buffer("sigma_data", torch.as_tensor(sigma_data))
        self.register_buffer("waves", torch.randn(2, waves))   # random Fourier features of x: thin curves are learned faster
        sizes = [2 + 2 * waves + 2 * time_dim] + [hidden] * num_layers
        blocks = [nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in zip(sizes, sizes[1:])]
        self.net = nn.Sequential(*blocks, nn.Linear(hidden, 2))
        nn.init.zeros_(self.net[-1].weight)   # F = 0 is the score of one Gaussian with the data's variance: a good start
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, log_sigma):
        sigma, x = log_sigma.exp()[:, None], x - self.mean   # (B, 1), (B, 2)
        total = (sigma**2 + self.sigma_data**2).sqrt()       # (B, 1) standard deviation of the noisy data
        angles = (x / total) @ self.waves                    # (B, waves)
        # F sees x / total, of unit variance at every sigma, and its answer must have unit variance too.
        F = self.net(torch.cat([x / total, angles.sin(), angles.cos(), self.embedding(log_sigma)], dim=-1))
        return -x / total**2 + self.sigma_data * F / (sigma * total)

mean, sigma_data = x_data.mean(0), x_data.var(0).mean().sqrt()
model = ScoreMLP(args.hidden, num_layers=args.layers, mean=mean, sigma_data=sigma_data).to(device)

@torch.no_grad()
def score(x, sigma, net=model):
    """Learned grad log q_sigma(x), (B, 2); x (B, 2) in data units, sigma a float or (B,)."""
    return net(x, torch.as_tensor(sigma, dtype=x.dtype, device=x.device).log().expand(len(x)))

# %% Loss
# lambda(sigma) = sigma^power. Only sigma2 makes the levels count alike, since E||eps/sigma||^2 = d/sigma^2; 000 uses none.
WEIGHT_POWER = {"none": 0, "sigma": 1, "sigma2": 2, "inv_sigma2": -2}

def dsm_loss_multi_sigma(model, x, sigmas, w_mode="sigma2"):
    """E over levels, data and noise of lambda/2 ||s(x + sigma eps, sigma) + eps/sigma||^2; x (B, 2) -> scalar; theory.md 4."""
    t = torch.randint(len(sigmas), (len(x),), device=x.device)
    eps = torch.randn_like(x)
    # Each x is used with +eps and with -eps: at small sigma most of the gradient's noise is odd in eps and cancels.
    sigma, eps = sigmas[t].repeat(2), torch.cat([eps, -eps])               # (2B,), (2B, 2)
    x_noisy = x.repeat(2, 1) + sigma[:, None] * eps                        # (2B, 2)
    # The target's mean over all x behind one noisy point is the score of q_sigma; its spread around that mean is the loss's floor.
    target = -eps / sigma[:, None]                                         # (2B, 2)
    loss = 0.5 * (model(x_noisy, sigma.log()) - target).square().sum(-1)   # (2B,)
    return (sigma ** WEIGHT_POWER[w_mode] * loss).mean()

# %% Training
def save(name, write):
    """Write outdir/name under a temporary name first: what stands there is always whole."""
    temporary = Path(args.outdir, "unfinished_" + name)
    try:
        write(temporary)
        temporary.replace(Path(args.outdir, name))
    except (OSError, RuntimeError) as error:   # a full disk; torch.save has its own kind of it
        sys.exit(f"cannot write {name} to {args.outdir!r}; is the disk full? ({str(error).splitlines()[0]})")
    finally:
        temporary.unlink(missing_ok=True)

# Noisy points with their exact scores, at the levels (check_levels[::2]) and at their geometric means (check_levels[1::2]).
check_levels = torch.stack([sigmas, (sigmas * sigmas.roll(-1)).sqrt()], dim=1).flatten()[:-1]   # (2T - 1,)
check_sigma = check_levels.repeat_interleave(min(1000, 16000 // len(check_levels) + 1))
check_x = sample_data(len(check_sigma), seeded(1)).to(device)
check_x += check_sigma[:, None] * torch.randn(check_x.shape, generator=seeded(2)).to(device)
_, check_score, check_laplacian = exact_density(check_x, check_sigma)
level_mean = lambda v: v.view(len(check_levels), -1).mean(1)   # (points,) -> mean at each check level, (2T - 1,)
squared_error = lambda net: level_mean((score(check_x, check_sigma, net) - check_score).square().sum(-1))   # E||s - s*||^2 there

weight = sigmas ** WEIGHT_POWER[args.w_mode]   # (T,)
# Floor lambda/2 E tr Cov(x | x_noisy) / sigma^4; with Cov = sigma^2 I + sigma^4 Hessian of log q it needs only the Laplacian (d = 2).
floor = (weight / 2 * (2 / sigmas**2 + level_mean(check_laplacian)[::2])).mean().item()
limit = 100 * max(floor, (weight / 2 * squared_error(model)[::2]).mean().item())   # an excess above this is a divergence
optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 10, pct_start=0.1)   # +10: 10 divides by 0
# The decay grows as (1 + n)/(10 + n) to 0.995: at a constant 0.999, 82 % of the average is still the start after 200 steps.
ema = AveragedModel(model, avg_fn=lambda old, new, n: torch.lerp(old, new, 1 - min(0.995, (1 + n.item()) / (10 + n.item()))))
x_data = x_data.to(device)
history, losses, started = [], [], time.time()
with tqdm(range(1, args.steps + 1), desc="training", mininterval=0.5) as bar:
    for step in bar:
        x = x_data[torch.randint(args.n, (args.batch,), device=device)]
        loss = dsm_loss_multi_sigma(model, x, sigmas, args.w_mode)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)
        losses.append(loss.item())
        if step % max(1, args.steps // 10) == 0 or step == args.steps or not math.isfinite(losses[-1]):
            excess = (weight / 2 * squared_error(ema.module)[::2]).mean().item()   # loss - floor would drown in the loss's noise
            history.append((step, np.mean(losses), excess))
            figures = f"loss = {np.mean(losses):.5g}   floor = {floor:.5g}   excess = {excess:.3g}"
            bar.write(f"[{step:5d}/{args.steps}] {figures}")
            bar.set_postfix_str(figures)
            losses = []
            if not excess < limit:
                sys.exit(f"diverged at step {step}: loss {loss.item():.3g}, excess {excess:.3g}; try a --lr below {args.lr:g}")
train_s = time.time() - started
model.load_state_dict(ema.module.state_dict())   # from here on the averaged weights are the model
save("model.pt", lambda file: torch.save(model.state_dict(), file))

# %% Sampling: each sampler takes (score, x at the first level, levels, generator) and returns the states at levels + [0]
def noise_like(x, generator):
    """z ~ N(0, I), drawn on the CPU so that every device gets the same."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

def langevin_step(score, x, sigma, kappa, generator):
    """x + (eta/2) s + sqrt(eta) z, eta = 2 kappa sigma^2: for small kappa it keeps q_sigma; 002 takes it for a step to the next level."""
    if not 0 < kappa < 2:
        raise ValueError(f"kappa = {kappa} is outside (0, 2): Langevin dynamics diverges there")
    eta = 2 * kappa * sigma**2
    return x + eta / 2 * score(x, sigma) + math.sqrt(eta) * noise_like(x, generator)

@torch.no_grad()
def annealed_langevin_dynamics(score, x, sigmas, generator, K=5, kappa=0.4):
    """003 section 4.3.3: K Langevin steps a level, then one denoising step. Its step rules and 001's suit one scale only: theory.md 8.4."""
    path = []
    for sigma in sigmas:
        for _ in range(K):
            x = langevin_step(score, x, sigma, kappa, generator)
        path.append(x)
    return path + [x + sigmas[-1] ** 2 * score(x, sigmas[-1])]

@torch.no_grad()
def consistent_annealed_sampling(score, x, sigmas, generator, rho=lambda ratio: ratio, corrector_steps=0, corrector_kappa=0.4):
    """theory.md 7.3: keep a part rho(sigma_next / sigma) of the noise that is there, draw the rest anew (0: all of it, 1: none)."""
    path = [x]
    for sigma, sigma_next in zip(sigmas, sigmas[1:] + [0.0]):   # the last step, to sigma = 0, only denoises
        r = rho(sigma_next / sigma)
        kappa = 1 - r * sigma_next / sigma   # below, 003's predictor adds noise of full size sigma_next: its variance grows with T
        x = x + kappa * sigma**2 * score(x, sigma) + sigma_next * math.sqrt(1 - r**2) * noise_like(x, generator)
        for _ in range(corrector_steps if sigma_next else 0):
            x = langevin_step(score, x, sigma_next, corrector_kappa, generator)
        path.append(x)
    return path

@torch.no_grad()
def heun(score, x, sigmas, generator=None):
    """Heun's second-order steps of the probability-flow ODE dx/dsigma = -sigma s."""
    path = [x]
    for sigma, sigma_next in zip(sigmas, sigmas[1:] + [0.0]):
        slope = -sigma * score(x, sigma)
        if sigma_next:   # the last step stays Euler, which denoises: at sigma = 0 the score was never trained
            slope = 0.5 * (slope - sigma_next * score(x + (sigma_next - sigma) * slope, sigma_next))
        x = x + (sigma_next - sigma) * slope
        path.append(x)
    return path

SAMPLERS = {   # name: (sampler, its levels)
    "ald": (partial(annealed_langevin_dynamics, K=args.K, kappa=args.kappa), levels),
    "pc": (partial(consistent_annealed_sampling, corrector_steps=1, corrector_kappa=args.kappa), levels),   # predictor-corrector
    "ancestral": (consistent_annealed_sampling, levels),   # rho = sigma_next / sigma: DDPM
    "ddim": (partial(consistent_annealed_sampling, rho=lambda ratio: 1.0), levels),   # an Euler step of the probability-flow ODE
    "heun": (heun, [levels[i] for i in np.linspace(0, args.T - 1, max(2, args.T // 2)).round().astype(int)]),   # every 2nd: 2 calls a step
}

def sample_with_initialization(name, score, x_init, start, generator):
    """Noise x_init (B, ...) to level `start` of a sampler and go down from there (003 forgets the noise): list of states."""
    sampler, its_levels = SAMPLERS[name]
    return sampler(score, x_init + its_levels[start] * noise_like(x_init, generator), its_levels[start:], generator)

def one_gaussian(n, generator):
    """n points (n, 2) of N(mean, covariance of the data): noised to sigma_max, nearly q there."""
    return mean + torch.randn(n, 2, generator=generator) @ torch.linalg.cholesky(torch.cov(x_data.T.cpu())).T

# %% Exercise 4.4: the same network as a DDPM, x_t = alpha x0 + sigma eps
def convert(value, x, alpha, sigma, source, target):
    """From "score", "eps", "x0" or "v" = alpha eps - sigma x0 to another of them, at x_t = x, for any alpha, sigma > 0."""
    eps = {"score": -sigma * value, "eps": value, "x0": (x - alpha * value) / sigma,
           "v": (sigma * x + alpha * value) / (alpha**2 + sigma**2)}[source]
    x0 = (x - sigma * eps) / alpha
    return {"score": -eps / sigma, "eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[target]

def vp_schedule(sigma_min, sigma_max, steps=1000):
    """alpha_t, sigma_t (lists, t descending) of DDPM's linear beta, where sigma_t/alpha_t lies in [sigma_min, sigma_max]."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)).cumprod(0).flip(0)
    ratio = (1 / alpha_bar - 1).sqrt()
    alpha_bar = alpha_bar[(sigma_min <= ratio) & (ratio <= sigma_max)]
    return alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()

@torch.no_grad()
def vp_sampler(score, x, alphas, sigmas, generator, ddim=False):
    """DDPM, or DDIM, in DDPM's own terms; grad log q_t(x) = s(x / alpha, sigma / alpha) / alpha from the network s."""
    path = [x]
    for a, s, a_next, s_next in zip(alphas, sigmas, alphas[1:] + [1.0], sigmas[1:] + [0.0]):
        eps = convert(score(x / a, s / a) / a, x, a, s, "score", "eps")
        beta, z = 1 - (a / a_next) ** 2, noise_like(x, generator)
        if ddim:
            x = a_next * convert(eps, x, a, s, "eps", "x0") + s_next * eps
        else:
            x = (x - beta / s * eps) / math.sqrt(1 - beta) + math.sqrt(beta) * s_next / s * z
        path.append(x)
    return path

# %% Checks
relative_error = (squared_error(model) / level_mean(check_score.square().sum(-1))).sqrt().cpu().numpy()   # (2T - 1,)
log_sigma = check_levels.log().cpu().numpy()
score_err = np.trapezoid(relative_error, log_sigma) / (log_sigma[-1] - log_sigma[0])   # mean over log sigma: comparable between schedules
print("\nsigma: relative score error sqrt(E||s - s*||^2 / E||s*||^2) under q_sigma, 1 for s = 0. Every other sigma lies between")
print(f"two levels. Each error is from {len(check_x) // len(check_levels)} points: where one of them lies far out, the error jumps.")
entries = [f"{s:7.3g}: {e:.3f}" for s, e in zip(check_levels.tolist(), relative_error)]
print("\n".join("  ".join(entries[i:i + 8]) for i in range(0, len(entries), 8)))

directions = torch.stack([f(torch.arange(32) * math.pi / 32) for f in (torch.cos, torch.sin)])   # (2, 32)

def projections(x):
    """(n, 2) -> (32, n): sorted projections. The RMS difference of two of these is the sliced 2-Wasserstein distance SW2."""
    return (x.cpu() @ directions).T.sort().values

mean_sw2 = lambda pairs: float(np.mean([(a - b).square().mean().sqrt() for a, b in pairs]))

fresh = [projections(sample_data(args.n_samples, seeded(300 + i))) for i in range(8)]

def generate(name, sets, source=one_gaussian, start=0):
    """Runs of a sampler from a source of points: path of the first, mean SW2 of all to fresh data, network calls of one."""
    calls, first, ends = [], None, []
    def counted_score(x, sigma):
        calls.append(sigma)
        return score(x, sigma)
    for i in range(sets):
        x_init = source(args.n_samples, seeded(100 + i)).to(device)
        path = sample_with_initialization(name, counted_score, x_init, start, seeded(200 + i))
        if not torch.isfinite(path[-1]).all():
            sys.exit(f"sampler {name} diverged: no usable score at some level; train longer, or with --w_mode sigma2")
        first = first or path
        ends.append(projections(path[-1]))
    return first, mean_sw2(product(ends, fresh)), len(calls) // sets

sw2_floor = mean_sw2(combinations(fresh, 2))
print(f"\nSW2 (data units) of {args.n_samples} samples to fresh data; floor, two fresh sets: {sw2_floor:.4f}; means of 2 sets vary by 10 %")
print("sampler    sets  calls     SW2   SW2/floor")
results = {}
for name in SAMPLERS:
    sets = 8 if name == args.sampler else 2
    path, sw2, calls = results[name] = generate(name, sets)
    print(f"{name:10s} {sets:4d} {calls:6d}  {sw2:.4f}   {sw2 / sw2_floor:6.2f}")
path, sw2, calls = results[args.sampler]
samples = path[-1].cpu()   # (n_samples, 2)
its_levels = SAMPLERS[args.sampler][1]
start = len(its_levels) // 2
print(f"started from data noised to sigma = {its_levels[start]:.3g}: SW2 {generate(args.sampler, 8, sample_data, start)[1]:.4f}")

alphas, vp_sigmas = vp_schedule(sigma_min, sigma_max)
ve_sigmas = [s / a for s, a in zip(vp_sigmas, alphas)]
z = torch.randn(32, 2, generator=seeded(5), dtype=torch.float64)
score64 = partial(score, net=copy.deepcopy(model).cpu().double())
for name in ["ancestral", "ddim"] if alphas else []:
    vp = vp_sampler(score64, vp_sigmas[0] * z, alphas, vp_sigmas, seeded(6), ddim=name == "ddim")
    ve = SAMPLERS[name][0](score64, ve_sigmas[0] * z, ve_sigmas, seeded(6))
    gap = max((x / a - y).abs().max() for x, y, a in zip(vp, ve, alphas + [1.0]))
    print(f"{name} in {len(alphas)} steps, as DDPM (x / alpha) and as VE, same noise: largest difference {gap:.0e} (round-off)")
save("samples.npy", lambda file: np.save(file, samples.numpy()))

# %% Pictures
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"   # data and exact, samples and learned, noise
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 10, "savefig.dpi": 100})
low, high = x_data.amin(0).cpu(), x_data.amax(0).cpu()
centre, half = (low + high) / 2, 0.6 * (high - low).max().item()
view = torch.stack([centre - half, centre + half], dim=1).flatten().tolist()   # left, right, bottom, top of every panel

def panel(ax, title, *clouds):
    """A square panel with clouds (points (n, 2), colour)."""
    for x, colour in clouds:
        ax.scatter(*x.cpu().T.numpy(), s=3, color=colour, alpha=0.5, linewidths=0)
    ax.axis(view)
    ax.set(aspect="equal", title=title, xticks=[], yticks=[])

raster = lambda n: torch.cartesian_prod(u := torch.linspace(-half, half, n), u).flip(1) + centre   # (n^2, 2), row by row
points = raster(16)   # where the arrows stand
large = max(viz_sigma, min(2 * sigma_data.item(), sigma_max))
fig, axs = plt.subplots(2, 3, figsize=(9, 6.4))
for column, sigma in zip(axs.T, np.geomspace(viz_sigma, large, 3)):
    density = exact_density(raster(60), sigma)[0].exp().view(60, 60).numpy()
    fields = [("exact", exact_score(points, sigma), BLUE), ("learned", score(points.to(device), sigma).cpu(), ORANGE)]
    cap = fields[0][1].norm(dim=1).median().item()
    for ax, (name, v, colour) in zip(column, fields):
        v = v * (cap / v.norm(dim=1, keepdim=True)).clamp(max=1)
        ax.contourf(density, 12, extent=view, cmap="Greys", vmax=1.6 * density.max())
        ax.quiver(*points.T, *v.T, color=colour, angles="xy", scale_units="xy", scale=10 * cap / half, width=0.007)
        panel(ax, rf"{name}, $\sigma$ = {sigma:.2g}")
fig.suptitle(r"Score $\nabla\log q_\sigma$ over the density $q_\sigma$ (long arrows cut at the median length)")
save("quiver.png", fig.savefig)

x = sample_data(1500, seeded(7)).to(device)
x_noisy = x + viz_sigma * noise_like(x, seeded(8))
fig, axs = plt.subplots(1, 3, figsize=(10, 4.1))
tweedie = r" = $\sigma^2$, Tweedie" if args.eta is None else ""
shown = [(0, r"noisy $\tilde x$", GREY), (eta, rf"$\eta$ = {eta:.3g}{tweedie}", ORANGE), (0.15, r"000's $\eta$ = 0.15", ORANGE)]
for ax, (step, name, colour) in zip(axs, shown):
    x_step = x_noisy + step * score(x_noisy, viz_sigma)
    panel(ax, f"{name}\nmean square error {(x_step - x).square().sum(-1).mean().item():.3g}", (x, BLUE), (x_step, colour))
fig.suptitle(rf"One step $\tilde x+\eta\,s(\tilde x,\sigma)$ at $\sigma$ = {viz_sigma:.2g}: clean blue, noisy grey, result orange")
save("denoise_scatter.png", fig.savefig)

fig, axs = plt.subplots(2, 6, figsize=(13, 5.1))
for ax, i in zip(axs[0], np.linspace(0, len(path) - 1, 6).astype(int)):
    panel(ax, rf"$\sigma$ = {(its_levels + [0.0])[i]:.2g}", (path[i][:2000], ORANGE if i == len(path) - 1 else GREY))
panel(axs[1, 0], f"fresh data\nfloor of SW2 {sw2_floor:.3f}", (sample_data(2000, seeded(9)), BLUE))
for ax, (name, (its_path, its_sw2, its_calls)) in zip(axs[1, 1:], results.items()):
    panel(ax, f"{name}: {its_calls} calls\nSW2 {its_sw2:.3f}", (its_path[-1][:2000], ORANGE))
fig.suptitle(f"From pure noise to data with {args.sampler} (top); what every sampler makes of the same network (bottom)")
save("generation.png", fig.savefig)

fig, axs = plt.subplots(1, 3, figsize=(11, 3.4))
steps, losses, excesses = zip(*history)
axs[0].plot(steps, losses, "o-", color=ORANGE, label="loss")
axs[0].axhline(floor, color=BLUE, ls="--", label="floor: loss of the exact score")
axs[0].set(xlabel="step", title=f"Training loss (weight {args.w_mode}): flat on its floor")
axs[1].semilogy(steps, excesses, "o-", color=ORANGE)
axs[1].set(xlabel="step", title=r"What is learned: excess $E\,\frac{\lambda}{2}\|s-s^*\|^2$")
axs[2].loglog(check_levels.tolist(), relative_error, "o-", ms=3, markevery=2, color=ORANGE, label="dots: trained levels")
axs[2].axhline(1, color=GREY, ls="--", label=r"$s=0$")
axs[2].set(xlabel=r"$\sigma$", title=r"Relative score error under $q_\sigma$")
for ax in axs[::2]:
    ax.legend()
save("training.png", fig.savefig)

summary = dict(data=args.data, seed=args.seed, steps=args.steps, w_mode=args.w_mode, schedule=args.schedule, T=args.T, sampler=args.sampler,
               calls=calls, score_err=round(float(score_err), 4), SW2=round(sw2, 4), floor=round(sw2_floor, 4), train_s=round(train_s, 1))
record = {"settings": vars(args) | {"viz_sigma": viz_sigma, "eta": eta}, "levels": levels, "figures": summary}
save("summary.json", lambda file: file.write_text(json.dumps(record, indent=1)))
print(" ".join(f"{key}={value}" for key, value in summary.items()))

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "scikit-learn==1.9.1", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
