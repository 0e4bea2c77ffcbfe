r"""Implicit score matching: its identity by quadrature, training by it, the geometry of a score, and noise that is not Gaussian.

Reads beside: notes 001 problem 2; 002 part 1.3 and closing question; 003 sections 4.1, 4.2.1, exercise 4.1; theory.md 3, 9, 10.

    python implicit_sm.py                               # all four parts
    python implicit_sm.py --activation relu             # warned of: the gradient of the trace is then wrong
    python implicit_sm.py --help                        # every setting with its unit, range and default

All data but Exp(1) are mixtures of Gaussians, so densities and scores are known, and every identity is checked by quadrature.

A good run takes 41 s and ends like this (2 CPU cores, Python 3.11, torch 2.13.0; errors: 0 is perfect, 1 is what s = 0 has):
    seed=0 steps=700 activation=silu err_1d=0.0603 err_relu=0.8784 err_2d=0.0441 err_hutchinson=0.0557
    err_few=23.01 err_dsm=0.2159 identities=8e-11 kernels=0.0389 uniform=1.0 SW2=0.0846 floor=0.0714 train_s=19.6
"""
# %% Imports and settings
import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from itertools import combinations, product
from pathlib import Path

# Ctrl-C and a closed pipe take one line, not a traceback; also during the imports below, which take seconds
sys.excepthook = lambda kind, *rest: (print("\nstopped by", kind.__name__, file=sys.stderr)
                                      if kind in (KeyboardInterrupt, BrokenPipeError) else sys.__excepthook__(kind, *rest))

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
from torch.func import grad, jacrev, vjp, vmap
from tqdm.auto import tqdm

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] + " Lengths are in data units.",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--activation", default="silu", choices=["silu", "softplus", "tanh", "relu"], help="of the networks; relu fails")
parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: cuda where there is one, else cpu")
parser.add_argument("--outdir", default="out_implicit_sm", help="folder for pictures, samples.npy, model.pt and summary.json")
NUMBERS = [   # flag, default, lowest, highest (of the flag's type), meaning
    ("n", 20000, 2, 10**7, "training points, as many in 1-D as in 2-D"),
    ("n_few", 30, 2, 10**6, "training points of the run that over-fits; not more than n"),
    ("n_hutchinson", 1, 1, 10**4, "random vectors per point in Hutchinson's trace"),
    ("sigma", 0.5, 0.1, 1.0, "standard deviation of every kind of noise"),
    ("hidden", 64, 1, 8192, "width of the networks"),
    ("layers", 2, 1, 64, "hidden layers"),
    ("steps", 700, 1, 10**7, "training steps of each network"),
    ("batch", 1024, 1, 10**6, "data points per step; not more than n"),
    ("lr", 2e-2, 1e-8, 100.0, "peak of the one-cycle learning rate"),
    ("K", 200, 1, 10**5, "Langevin steps"),
    ("eta", 0.1, 1e-6, 2.0, "size of a Langevin step; on modes of variance 1 they diverge from 4 on"),
    ("n_samples", 2000, 2, 10**6, "points in samples.npy and in every set behind an SW2"),
    ("seed", 0, 0, 2**32 - 1, "seed of everything random"),
]
for flag, default, low, high, meaning in NUMBERS:
    parser.add_argument(f"--{flag}", type=type(high), default=default, help=f"{meaning} [{low:g} ... {high:g}]")
args = parser.parse_args([] if "kernel_launcher" in sys.argv[0] else None)   # a notebook's argv belongs to its kernel
for flag, default, low, high, meaning in NUMBERS:
    value = getattr(args, flag)
    if value is not None and not low <= value <= high:   # refuses nan as well
        parser.error(f"argument --{flag}: {value:g} is outside [{low:g}, {high:g}]")
for flag in ["batch", "n_few"]:
    if getattr(args, flag) > args.n:
        parser.error(f"argument --{flag}: {getattr(args, flag)} is more than the {args.n} points of --n; give a smaller --{flag}")
available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
if args.device != "auto" and not available[args.device]:
    parser.error(f"argument --device: no {args.device} on this machine")
device = torch.device(args.device if args.device != "auto" else "cuda" if available["cuda"] else "cpu")
try:
    Path(args.outdir).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.outdir).close()   # better to learn it now than after the training
except OSError as error:
    parser.error(f"argument --outdir: cannot write to {args.outdir!r} ({error.strerror})")
if args.activation == "relu":
    warnings.warn("relu: autograd does not see the jumps of ds/dx move: a biased gradient, so something else is learned (theory.md 3.6)")
torch.manual_seed(args.seed)
torch.set_num_threads(1)   # as fast as 2 for so small a network, and not 10 times slower when another program is busy

# %% Data: mixtures of round Gaussians, (means (K, d), weights (K,), standard deviations (K,)), in float64
tensor = lambda *rows: torch.tensor(rows, dtype=torch.float64)
law1 = (tensor([-1.2], [1.0]), tensor(0.4, 0.6), tensor(0.35, 0.5))            # 1-D
law2 = (tensor([-2.0, 0.0], [2.0, 0.0]), tensor(0.5, 0.5), tensor(1.0, 1.0))   # 003's N(-m, I)/2 + N(m, I)/2, m = (2, 0)
noisy_law1 = (*law1[:2], (law1[2] ** 2 + args.sigma**2).sqrt())                # q: law1 convolved with N(0, sigma^2)

def gmm(x, means, weights, stds):
    """log p (...,) and grad log p (..., d) of a mixture at x (..., d)."""
    if x.shape[-1] != means.shape[-1]:
        raise ValueError(f"points of dimension {x.shape[-1]} for a mixture of dimension {means.shape[-1]}")
    z = (means - x[..., None, :]) / stds[:, None]   # (..., K, d)
    log_pk = weights.log() - 0.5 * z.square().sum(-1) - x.shape[-1] * (math.sqrt(2 * math.pi) * stds).log()   # (..., K)
    # 003 has no softmax, it divides by the density + 1e-8: its score at (10, 0) is then -5e-6 and not -8
    return log_pk.logsumexp(-1), (log_pk.softmax(-1)[..., None] * z / stds[:, None]).sum(-2)

def gmm_score(x, means, weights, stds=1.0):
    """003's gmm_score at x (..., d), with means and weights that may be lists as there; stds a number or (K,)."""
    means = torch.stack(list(means))
    return gmm(x, means, torch.as_tensor(weights), stds * means.new_ones(len(means)))[1].to(x.dtype)

def sample_gmm(n, law, generator):
    """n i.i.d. points (n, d) of a mixture."""
    means, weights, stds = law
    k = torch.multinomial(weights, n, replacement=True, generator=generator)
    return means[k] + stds[k, None] * torch.randn(n, means.shape[1], generator=generator, dtype=torch.float64)

def panels(breaks, order=12):
    """Gauss-Legendre nodes and weights (N,) for each interval between breaks; a kink or jump has to be one of them."""
    (u, w), ends = np.polynomial.legendre.leggauss(order), np.unique(breaks)   # np.unique sorts
    half, middle = np.diff(ends)[:, None] / 2, (ends[1:] + ends[:-1])[:, None] / 2
    return torch.tensor((middle + half * u).ravel()), torch.tensor((half * w).ravel())

def nodes(law, *kinks):
    """Points x (N, d) and weights P (N,) with which sum(P f(x)) = E f(x) under a mixture, d = 1 (f may have kinks) or 2."""
    d = law[0].shape[1]
    u, w = panels([*np.linspace(-12, 12, 97), *kinks] if d == 1 else np.linspace(-9, 9, 19))
    x, w = (torch.cartesian_prod(*[v] * d).view(-1, d) for v in (u, w))   # (N, d)
    return x, w.prod(1) * gmm(x, *law)[0].exp()

def seeded(offset):
    """A generator of its own for evaluation and sampling, so that looking at the model does not change its training."""
    return torch.Generator().manual_seed(10**6 * args.seed + offset)

exact_score = lambda x: gmm_score(x, *law2)   # (B, 2)
x1_data, x_data = sample_gmm(args.n, law1, seeded(0)), sample_gmm(args.n, law2, seeded(1))   # (n, 1), (n, 2)

# %% Loss
def implicit_loss(model, x):
    """|s|^2 / 2 + tr ds/dx at each point, x (B, d) -> (B,); theory.md 3."""
    s, pullback = vjp(model, x)   # s (B, d); pullback(v) is v^T ds/dx, in a tuple
    # 003's loop asks torch.autograd.grad(s[:, i].sum(), x, create_graph=True) for row i of ds/dx and keeps its entry i:
    # the same d backward passes, but it leaves requires_grad on the caller's x and fails under no_grad
    trace = sum(pullback(unit.expand_as(x))[0][:, i] for i, unit in enumerate(torch.eye(x.shape[1]).to(x)))   # (B,)
    return 0.5 * s.square().sum(-1) + trace

def compute_score_matching_loss(model, x):
    """Implicit score matching with the exact trace, d backward passes; x (B, d) -> scalar. 003 section 4.2.1."""
    return implicit_loss(model, x).mean()

def compute_score_matching_loss_hutchinson(model, x, n_hutchinson=args.n_hutchinson):
    """The same with tr ds/dx estimated by the mean of v^T (ds/dx) v, E[v v^T] = I: n_hutchinson backward passes."""
    s, pullback = vjp(model, x)   # (B, d)
    # Unlike 003's Gaussian v, random signs add no variance from the diagonal of ds/dx, so none at all in 1-D
    probes = [torch.randn_like(x).sign() for _ in range(n_hutchinson)]
    trace = sum((pullback(v)[0] * v).sum(-1) for v in probes) / n_hutchinson   # (B,)
    return (0.5 * s.square().sum(-1) + trace).mean()

def denoising_loss(model, x, n, target):
    """|s(x + n) - target|^2 / 2, target = d log k / dn, all (B, d) -> scalar; with +n and -n, as every noise density k here is even."""
    return 0.5 * (model(torch.cat([x + n, x - n])) - torch.cat([target, -target])).square().sum(-1).mean()

# %% Part 1: E|s - s*|^2 / 2 = E[|s|^2 / 2 + tr ds/dx] + E|s*|^2 / 2 for any s
(x, P), (n, P_n), (u, w) = nodes(law1), nodes((tensor([0.0]), tensor(1.0), tensor(args.sigma))), panels(np.linspace(0, 40, 81))
x_noisy, target = (x + n.T).reshape(-1, 1), -n.repeat(len(x), 1) / args.sigma**2   # (N M, 1): all pairs of x ~ p and noise
CASES = {"1-D": (*nodes(law1, 0.3), lambda x: gmm_score(x, *law1)), "2-D": (*nodes(law2), exact_score),
         "Exp(1)": (u[:, None], w * (-u).exp(), lambda x: 0 * x - 1),   # points (N, d), P (N,), exact score s*
         "x + n": (x_noisy, torch.outer(P, P_n).flatten(), lambda _: target)}
ROWS = [("1-D", "-x", lambda x: -x), ("1-D", "sin 3x", lambda x: (3 * x).sin()), ("1-D", "|x - 0.3|", lambda x: (x - 0.3).abs()),
        ("2-D", "-x", lambda x: -x), ("2-D", "s*", exact_score),
        ("2-D", "(x2 sin x1, x1 + x2^3)", lambda x: torch.stack([x[:, 1] * x[:, 0].sin(), x[:, 0] + x[:, 1] ** 3], 1)),
        ("x + n", "-x", lambda x: -x), ("x + n", "sin 3x", lambda x: (3 * x).sin()),
        ("Exp(1)", "0", lambda x: 0 * x), ("Exp(1)", "-1", lambda x: 0 * x - 1), ("Exp(1)", "-2", lambda x: 0 * x - 2)]
print("1. For every s: explicit = implicit + I/2 (by quadrature). 003 leaves the 1/2 out; its 'constant' changes with s.\n"
      "x + n, noised by N(0, sigma^2), has the target -n/sigma^2 for s* and d/(2 sigma^2) for I/2: the bridge to denoising (3.8)\n"
      "Exp(1) has s* = -1 and a jump at 0: the difference is p(0) s(0), and of the constants implicit prefers 0 (theory.md 3.5)\n"
      "law     s(x)                     explicit   implicit        I/2   difference   003's constant")
gaps = []   # of the identities that hold
for law, name, s in ROWS:
    (x, P, exact), half = CASES[law], lambda v: (P * 0.5 * v.square().sum(-1)).sum().item()   # E|v|^2 / 2
    explicit, implicit, constant = half(s(x) - exact(x)), (P * implicit_loss(s, x)).sum().item(), half(exact(x))
    gap = explicit - implicit - constant
    print(f"{law:6s}  {name:23s} {explicit:9.5f}  {implicit:9.5f}  {constant:9.5f}   {gap:10.1e}   {2 * explicit - implicit:14.5f}")
    if law != "Exp(1)":
        gaps.append(gap)

# %% Part 2: training
class ScoreNet(nn.Module):
    """model(x) -> score, (B, d) -> (B, d): the score of a Gaussian with the data's mean and variances, plus a network that starts at 0."""
    def __init__(self, x, activation=args.activation):
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("std", x.std(0))
        unit = {"silu": nn.SiLU, "softplus": nn.Softplus, "tanh": nn.Tanh, "relu": nn.ReLU}[activation]
        sizes = [x.shape[1]] + [args.hidden] * args.layers
        blocks = [nn.Sequential(nn.Linear(a, b), unit()) for a, b in zip(sizes, sizes[1:])]
        self.net = nn.Sequential(*blocks, nn.Linear(args.hidden, x.shape[1]))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x):
        y = (x - self.mean) / self.std   # (B, d)
        return (self.net(y) - y) / self.std

def train(model, loss, x, fresh):
    """Minimises loss(model, batch) in float32: model (float64, CPU), losses, rows (step, mean loss, implicit loss on fresh points)."""
    model, x, fresh = (item.float().to(device) for item in (model, x, fresh))
    losses, history, every = [], [], max(1, args.steps // 25)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 10, pct_start=0.1)   # +10: 10 divides by 0
    for step in (bar := tqdm(range(1, args.steps + 1), desc="training", mininterval=0.5, leave=False)):
        value = loss(model, x[torch.randint(len(x), (args.batch,), device=device)])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        scheduler.step()
        losses.append(value.item())
        if not -math.inf < losses[-1] < 1e7:   # nan, too; on few points it may fall without limit
            sys.exit(f"diverged at step {step}: loss {losses[-1]:.3g}; try a --lr below {args.lr:g}")
        if step % every == 0 or step == args.steps:
            history.append((step, np.mean(losses[-every:]), implicit_loss(model, fresh).mean().item()))
            bar.set_postfix_str(f"loss {history[-1][1]:.4g}, on fresh points {history[-1][2]:.4g}")
    return model.requires_grad_(False).cpu().double(), losses, history

def relative_error(values, exact, P):
    """sqrt(E|s - s*|^2 / E|s*|^2) by quadrature; s = 0 has 1."""
    return ((P * (values - exact).square().sum(-1)).sum() / (P * exact.square().sum(-1)).sum()).sqrt().item()

def fit(label, x, law, loss=compute_score_matching_loss, activation=args.activation):
    """A network trained on x (n, d), its relative score error under a law, and its history."""
    net, _, history = train(ScoreNet(x, activation), loss, x, sample_gmm(1000, law, seeded(2)))
    (grid, P), (_, on_points, on_fresh) = nodes(law), history[-1]
    exact = gmm_score(grid, *law)
    error, least = relative_error(net(grid), exact, P), -0.5 * (P * exact.square().sum(-1)).sum()
    print(f"{label:34s} {on_points:9.4f}  {on_fresh:15.4f}  {least:9.4f}  {error:12.3f}")
    return net, error, history

def gaussian_loss(net, x):
    """Denoising loss - d/(2 sigma^2): by the bridge (theory.md 3.8) the implicit loss under q, the law of the noisy points."""
    n = args.sigma * torch.randn_like(x)
    return denoising_loss(net, x, n, -n / args.sigma**2) - 0.5 * x.shape[1] / args.sigma**2

standard_error = implicit_loss(lambda x: gmm_score(x, *law1), sample_gmm(1000, law1, seeded(2))).std() / math.sqrt(1000)
print(f"\n2. Training by it; the exact score has the loss -I/2 (on fresh points, in 1-D, +- {standard_error:.2f}) and the error 0\n"
      "network                                 loss  on fresh points       -I/2   score error")
started, x_few = time.time(), x1_data[:args.n_few]
model1, err_1d, _ = fit(f"1-D, {args.activation}", x1_data, law1)
relu_model, err_relu, _ = fit("1-D, relu: biased gradient", x1_data, law1, activation="relu")
model, err_2d, _ = fit(f"2-D, {args.activation}, exact trace", x_data, law2)
_, err_hutchinson, _ = fit(f"2-D, {args.activation}, Hutchinson, {args.n_hutchinson} vector(s)", x_data, law2,
                           compute_score_matching_loss_hutchinson)
# Nothing stops a network from s' = -k at each of a few points: its loss has no lowest value. Noise is the remedy.
few_model, err_few, few_history = fit(f"1-D, only {args.n_few} points", x_few, law1)
dsm_model, err_dsm, dsm_history = fit(f"1-D, only {args.n_few} points, denoising", x_few, noisy_law1, gaussian_loss)
train_s = time.time() - started

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

score = lambda x: model(x.double()).to(x.dtype)   # learned grad log p, (B, 2)
save("model.pt", lambda file: torch.save(model.state_dict(), file))

# %% Part 2: sampling
def langevin_dynamics(score, x, eta, K, generator):
    """K steps x + (eta/2) s + sqrt(eta) z from x (B, d); on a mode of variance 1 they settle at the variance 1/(1 - eta/4)."""
    for _ in range(K):
        x = x + eta / 2 * score(x) + math.sqrt(eta) * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x

directions = torch.stack([f(torch.arange(32) * math.pi / 32) for f in (torch.cos, torch.sin)])   # (2, 32)

def projections(x):
    """(n, 2) -> (32, n): sorted projections. The RMS difference of two of these is the sliced 2-Wasserstein distance SW2."""
    return (x.cpu() @ directions).T.sort().values

mean_sw2 = lambda pairs: float(np.mean([(a - b).square().mean().sqrt() for a, b in pairs]))

starts = [model.mean + model.std * torch.randn(args.n_samples, 2, generator=seeded(100 + i)) for i in range(2)]
clouds = [langevin_dynamics(score, x, args.eta, args.K, seeded(200 + i)).float() for i, x in enumerate(starts)]
samples = clouds[0]   # (n_samples, 2)
if not (torch.stack(clouds).abs() < 1000).all():
    sys.exit("Langevin dynamics diverged on the learned score; train longer, or with a smooth --activation")
save("samples.npy", lambda file: np.save(file, samples.numpy()))
fresh = [projections(sample_gmm(args.n_samples, law2, seeded(300 + i)).float()) for i in range(8)]
sw2, sw2_floor = mean_sw2(product(map(projections, clouds), fresh)), mean_sw2(combinations(fresh, 2))
print(f"SW2 of {args.n_samples} Langevin draws from the 2-D model to fresh data {sw2:.4f}; floor, two fresh sets: {sw2_floor:.4f}")

# %% Part 3: geometry
def analyze_score_geometry(score_fn, x, tol=1e-4):
    """003's function, x (B, d) or (d,): score, divergence, Jacobian ("hessian"), its eigenvalues, kind of equilibrium of dx/dt = s."""
    points = torch.atleast_2d(x.detach())   # (B, d); 003 leaves requires_grad on the caller's x
    s = score_fn(points).detach()
    if s.shape != points.shape:
        raise ValueError(f"score_fn answers {tuple(s.shape)} to points {tuple(points.shape)}")
    J = vmap(jacrev(lambda y: score_fn(y[None])[0]))(points).detach()   # (B, d, d)
    symmetric = (J - J.mT).abs().max() <= 1e-6 * J.abs().max()
    # A learned field need not be a gradient: then 003, which copies one triangle of J into the other, has wrong eigenvalues
    e = torch.linalg.eigvalsh((J + J.mT) / 2) if symmetric else torch.linalg.eigvals(J)   # (B, d), may be complex
    e = e.gather(-1, e.real.argsort(-1))
    tests = [s.norm(dim=-1) > tol, e.real.abs().amin(-1) <= tol, e.real[:, -1] < 0, e.real[:, 0] > 0]   # the first that holds decides
    kind = np.select(tests, ["not critical", "degenerate", "peak", "valley"], "saddle").tolist()
    g = {"score": s, "divergence": J.diagonal(dim1=1, dim2=2).sum(-1), "hessian": J, "eigenvalues": e, "kind": kind}
    return g if x.dim() > 1 else {key: value[0] for key, value in g.items()}

def find_critical_points(score_fn, x):
    """Zeros (M, d) of a field, by x1: Newton steps of length up to 1/2 from starts x (B, d). 003's ascent finds only peaks."""
    for _ in range(40):
        g = analyze_score_geometry(score_fn, x)
        step = -(torch.linalg.pinv(g["hessian"]) @ g["score"][:, :, None])[:, :, 0]
        x = x + step * (0.5 / step.norm(dim=1, keepdim=True)).clamp(max=1)
    x = x[(score_fn(x).norm(dim=1) < 1e-4) & (x.norm(dim=1) < 4)]
    return x[np.unique(x.numpy().round(3) + 0.0, axis=0, return_index=True)[1]]

print("\n3. Geometry. The chapter's 'peak' (-2, 0) is not critical, its saddle has divergence +2; where that is 0 nothing is critical")
print("field    point                    |score|      eigenvalues                divergence  kind")
x1 = torch.linspace(-3, 3, 6001).double()   # the level set of p through (0, 1), by log p(x1, x2) = log p(x1, 0) - x2^2 / 2:
x2_squared = 1 + 2 * gmm(torch.stack([x1, 0 * x1], 1), *law2)[0] - 2 * gmm(tensor([0.0, 0.0]), *law2)[0]
level = torch.stack([x1, x2_squared.sqrt()], 1)[x2_squared > 0.01]
starts = torch.cartesian_prod(torch.linspace(-3, 3, 9), torch.linspace(-2, 2, 5)).double() + 0.01   # off the axes of symmetry
FIELDS, critical = {"exact": exact_score, "learned": score}, {}
for name, field in FIELDS.items():
    points = torch.cat([tensor([-2.0, 0.0], [math.acosh(math.sqrt(2)) / 2, 0.0]), find_critical_points(field, starts)])
    g = analyze_score_geometry(field, points)
    critical[name] = list(zip(points, g["kind"]))[2:]
    for x, s, e, div, kind in zip(points, g["score"], g["eigenvalues"].real, g["divergence"], g["kind"]):
        print(f"{name:7s}  ({x[0]:10.7f}, {x[1]:8.5f})  {s.norm():9.2e}  ({e[0]:10.7f}, {e[1]:10.7f})  {div:12.7f}  {kind}")
    J, cosine = g["hessian"], torch.cosine_similarity(level[2:] - level[:-2], field(level[1:-1])).abs()
    print(f"         asymmetry |J - J^T|/|J| {(J - J.mT).norm() / J.norm():.1g}; |cos| of score and tangent of the level set of p "
          f"through (0, 1): mean {cosine.mean():.1e}, largest {cosine.max():.1e}")
x, P = nodes(law2)
for name, f in (("E s", lambda x: torch.ones(len(x), 1)), ("E s x^T", lambda x: x), ("I = E s s^T", exact_score)):
    moment = lambda x: (exact_score(x)[:, :, None] * f(x)[:, None]).flatten(1)   # s f^T, (n, 2) or (n, 4)
    exact, values = P @ moment(x), moment(x_data)
    off = ((values.mean(0) - exact) / values.std(0)).abs().max() * math.sqrt(args.n)
    print(f"{name:11s} by quadrature {exact.numpy().round(7) + 0.0}, over the data {values.mean(0).numpy().round(4)}, "
          f"off by at most {off:.1f} standard errors")

# %% Part 4: why Gaussian noise? Denoising score matching with six kernels of one variance
rng = np.random.default_rng(args.seed)
KERNELS = {   # name: (scale a over sigma, draws of t = n/a, log k up to a constant as a function of t, is |t| < 1?, target)
    "Gaussian": (1, rng.standard_normal, lambda t: -t**2 / 2, False, "-n/a^2"),
    "logistic": (3**0.5 / math.pi, lambda size: rng.logistic(size=size), lambda t: -2 * (t / 2).cosh().log(), False, "-tanh(n/2a)/a"),
    "Student-t 5": (0.6**0.5, lambda size: rng.standard_t(5, size), lambda t: -3 * (1 + t**2 / 5).log(), False, "-6n/(5a^2 + n^2)"),
    "Laplace": (0.5**0.5, lambda size: rng.laplace(size=size), lambda t: -t.abs(), False, "-sign(n)/a"),
    "triangular": (6**0.5, lambda size: rng.triangular(-1, 0, 1, size), lambda t: (1 - t.abs()).log(), True, "-sign(n)/(a - |n|)"),
    "uniform": (3**0.5, lambda size: rng.uniform(-1, 1, size), lambda t: 0 * t, True, "0"),
}
target_of = lambda log_k, a: grad(lambda n: log_k(n / a).sum())   # n -> d log k / dn; it does not see jumps

def kernel_scores(log_k, a, bounded, x):
    """At x (N,): q, its score with the derivative taken on p, E[d log k / dn | x] with it taken on k; I(k) to 1e-4, 1e-8 from its edge."""
    edges, reach = a * (1 - np.logspace(-1, -9, 9)), a if bounded else 18   # finer towards the edge, if any
    n, w = panels(np.clip([*np.linspace(-18, 18, 145), *args.sigma * np.linspace(-6, 6, 49), *edges, *-edges], -reach, reach))
    k, target = w * log_k(n / a).exp(), target_of(log_k, a)(n)   # (M,)
    k /= k.sum()
    log_p, s_p = gmm((x[:, None] - n)[:, :, None], *law1)   # (N, M), (N, M, 1)
    joint = log_p.exp() * k
    q = joint.sum(1)
    fisher = [(k * target**2)[n.abs() < reach * (1 - cut)].sum().item() for cut in (1e-4, 1e-8)]
    return q, (joint * s_p[:, :, 0]).sum(1) / q, (joint * target).sum(1) / q, fisher

print(f"\n4. Why Gaussian noise? x ~ the 1-D mixture, noise n of standard deviation {args.sigma}, x + n ~ q\n"
      "kernel       target d log k/dn   I(k) sigma^2   |E[target|x+n] - d log q|   loss finite?   largest batch loss   error of the net")
(x_grid, w_grid), kernels = panels(np.linspace(-12, 12, 49), 8), {}
for name, (scale, draw, log_k, bounded, formula) in KERNELS.items():
    a, target = scale * args.sigma, target_of(log_k, scale * args.sigma)
    q, exact, conditional, (I_near, I_edge) = kernel_scores(log_k, a, bounded, x_grid)
    def kernel_loss(net, x):
        n = torch.tensor(a * draw((args.batch, 1)))
        return denoising_loss(net, x, n.to(x), target(n).to(x))
    x_noisy = x1_data + torch.tensor(a * draw((args.n, 1)))
    net, losses, _ = train(ScoreNet(x_noisy), kernel_loss, x1_data, x_noisy[:1000])
    gap, error = (relative_error(v[:, None], exact[:, None], w_grid * q) for v in (conditional, net(x_grid[:, None])[:, 0]))
    finite, kernels[name] = I_edge <= 1.001 * I_near, (error, gap, exact, net)   # with the log divergence each decade adds the same
    print(f"{name:12s} {formula:18s} {I_edge * args.sigma**2 if finite else math.inf:13.3f}   {gap:12.1e} "
          f"{'equal' if gap < 1e-8 else 'NOT EQUAL':12s} {'yes' if finite else 'NO':>12s}   {max(losses):18.1f}   {error:16.3f}")
print("blur x/2     none: k is a point mass, so log k has no derivative; blur plus Gaussian noise is the first row for the law of x/2")

# %% Pictures
BLUE, ORANGE = "#0072B2", "#D55E00"   # data and exact, samples and learned
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 10, "savefig.dpi": 100})
line = torch.linspace(-3, 3, 400, dtype=torch.float64)[:, None]
fig, axs = plt.subplots(2, 2, figsize=(9, 6.4))
for ax, net, title in ((axs[0, 0], model1, f"{args.n} points, {args.activation}"),
                       (axs[0, 1], relu_model, "The same with relu: a biased gradient"),
                       (axs[1, 1], few_model, f"{args.n_few} points (ticks): over-fitted, and the remedy")):
    ax.fill_between(line[:, 0], -8, 8 * gmm(line, *law1)[0].exp() - 8, color="0.88")
    ax.plot(line, gmm_score(line, *law1), color=BLUE, label=r"exact, $\nabla\log p$ over $p$")
    ax.plot(line, net(line), color=ORANGE, label="learned, implicit loss")
    ax.set(ylim=(-8, 8), xlabel="$x$", ylabel="$s(x)$", title=title)
axs[1, 1].plot(line, gmm_score(line, *noisy_law1), "--", color=BLUE, label=rf"exact, $\nabla\log q$, $\sigma$ = {args.sigma:g}")
axs[1, 1].plot(line, dsm_model(line), "--", color=ORANGE, label="learned, denoising")
axs[1, 1].plot(x_few, torch.full_like(x_few, -7.6), "|", color="black")
for history, style, name in ((few_history, "-", "implicit"), (dsm_history, "--", "denoising")):
    steps, on_points, on_fresh = zip(*history)
    axs[1, 0].plot(steps, on_points, style, color=ORANGE, label=f"{name}: on the {args.n_few} points")
    axs[1, 0].plot(steps, on_fresh, style, color=BLUE, label=f"{name}: on fresh points")
axs[1, 0].set(xlabel="step", ylabel="implicit loss", yscale="symlog", title=f"{args.n_few} points: down on them, up on fresh ones")
for ax in axs.flat:
    ax.legend(fontsize=7)
save("training.png", fig.savefig)

fig, axs = plt.subplots(1, 3, figsize=(13, 3.7))
u, v = torch.linspace(-4.5, 4.5, 91).double(), torch.linspace(-3, 3, 61).double()
points, arrows = torch.cartesian_prod(v, u).flip(1), torch.cartesian_prod(v[::6], u[::6]).flip(1)
for ax, title in zip(axs, ("exact score", "learned score", "Langevin draws from the learned score")):
    ax.contour(u, v, gmm(points, *law2)[0].view(61, 91), 12, colors="0.75", linewidths=0.8, linestyles="-")
    ax.set(aspect="equal", xlim=(-4.5, 4.5), ylim=(-3, 3), xlabel="$x_1$", ylabel="$x_2$", title=title)
for ax, (name, field), colour in zip(axs, FIELDS.items(), (BLUE, ORANGE)):
    ax.quiver(*arrows.T, *field(arrows).T, angles="xy", color=colour, width=0.004)
    ax.contour(u, v, analyze_score_geometry(field, points)["divergence"].view(61, 91), [0], colors="black", linestyles="--")
    for x, kind in critical[name]:
        ax.plot(*x, {"peak": "^", "saddle": "X"}.get(kind, "o"), color="black", ms=9, mec="white")
axs[2].scatter(*samples[:1500].T, s=3, color=ORANGE, alpha=0.5, linewidths=0)
fig.suptitle("Arrows cross the level sets of $p$ at right angles; peaks (triangles), saddle (cross), divergence 0 (dashed)", y=0.98)
save("geometry.png", lambda file: fig.savefig(file, bbox_inches="tight"))

fig, axs = plt.subplots(2, 3, figsize=(9, 5.4), sharex=True, sharey=True)
for ax, (name, (error, gap, exact, net)) in zip(axs.flat, kernels.items()):
    scale, _, log_k, bounded, formula = KERNELS[name]
    t = line[:, 0] / (scale * args.sigma)
    ax.fill_between(line[:, 0], -6, 3 * log_k(t).exp() - 6, where=(t.abs() < 1) | (not bounded), color="0.85")
    ax.plot(x_grid, exact, color=BLUE, label=r"exact $\partial\log q$")
    ax.plot(x_grid, net(x_grid[:, None]), color=ORANGE, label="learned by denoising")
    ax.set(xlim=(-3, 3), ylim=(-6, 6), title=f"{name}, target {formula}\nerror {error:.3f}")
axs[0, 0].legend(fontsize=8)
fig.suptitle("One density, six kinds of noise (grey) of equal variance: only uniform noise teaches nothing")
save("kernels.png", fig.savefig)

*errors, err_uniform = [error for error, *_ in kernels.values()]   # uniform is the last
summary = dict(seed=args.seed, steps=args.steps, activation=args.activation, err_1d=round(err_1d, 4), err_relu=round(err_relu, 4),
               err_2d=round(err_2d, 4), err_hutchinson=round(err_hutchinson, 4), err_few=round(err_few, 2), err_dsm=round(err_dsm, 4),
               identities=float(f"{max(map(abs, gaps)):.0e}"), kernels=round(max(errors), 4), uniform=round(err_uniform, 4),
               SW2=round(sw2, 4), floor=round(sw2_floor, 4), train_s=round(train_s, 1))
save("summary.json", lambda file: file.write_text(json.dumps({"settings": vars(args), "figures": summary}, indent=1)))
print(" ".join(f"{key}={value}" for key, value in summary.items()))

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
