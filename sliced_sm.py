r"""Sliced score matching and its relatives side by side: what each loss learns, how much it scatters, what a step costs.

Reads beside: notes 003 section 4.2.3 (whole, with its table of methods); 002 part 1.3-4; theory.md 5.

    python sliced_sm.py                                       # all four parts
    python sliced_sm.py --slices sphere --n_slices 4          # other directions, more of them
    python sliced_sm.py --data gmm2 --loss dsm --dim 10       # other data; samples from the model of another loss

Part 1 trains the same network on the same data with every loss, part 2 measures the variance of the losses, part 3 the time
of a step from 2 to 1000 dimensions, part 4 shows three traps. The score of the data is known: every error is an exact one.

A good run takes 60 s (2 CPU cores, Python 3.11, torch 2.13.0) and ends like this (errors in 20-D, costs in DSM steps at d = 100):
    ... err_explicit=0.1283 err_exact=0.2201 err_ssm=0.3781 err_ssm_vr=0.2478 err_fd_ssm=0.3781 err_dsm=0.2466
    SW2=0.052 floor=0.0363 law_gap=0.056 fd_order=2.0 cost_ssm_vr=1.38 cost_exact=26.2 train_s=27.3
"""
# %% Imports and settings
import argparse
import copy
import json
import math
import sys
import tempfile
import time
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
from sklearn.datasets import make_moons
from tqdm.auto import tqdm

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] + " Lengths are in data units.",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--data", default="moons", choices=["moons", "gmm2"], help="which 2-D law")
parser.add_argument("--loss", default="ssm_vr", choices=["explicit", "exact", "ssm", "ssm_vr", "fd_ssm", "dsm"],
                    help="whose 2-D model is kept and sampled; every one is trained")
parser.add_argument("--slices", default="rademacher", choices=["rademacher", "gaussian", "sphere"], help="law of the directions v")
parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: cuda where there is one, else cpu")
parser.add_argument("--outdir", default="out_sliced_sm", help="folder for pictures, samples.npy, model.pt and summary.json")
NUMBERS = [   # flag, default, lowest, highest (of the flag's type), meaning
    ("n", 50000, 10, 10**7, "training points"),
    ("dim", 20, 1, 1000, "dimension of the second data set, a mixture of three correlated Gaussians"),
    ("n_slices", 1, 1, 10**4, "directions per point"),
    ("h", 0.01, 1e-8, 10.0, "step of the finite differences"),
    ("sigma", 0.1, 1e-4, 1e4, "noise of denoising score matching, which learns q_sigma instead of p"),
    ("hidden", 64, 1, 8192, "width of the network"),
    ("layers", 3, 1, 64, "hidden layers"),
    ("steps", 600, 1, 10**7, "training steps"),
    ("batch", 256, 1, 10**6, "data points per step; not more than n"),
    ("lr", 1e-2, 1e-8, 100.0, "peak of the one-cycle learning rate"),
    ("points", 20000, 10, 10**7, "points behind each variance"),
    ("d_max", 1000, 2, 1000, "largest dimension in which a step is timed"),
    ("K", 500, 1, 10**5, "Langevin steps"),
    ("eta", 0.01, 1e-8, 100.0, "size of a Langevin step, x + (eta/2) s + sqrt(eta) z"),
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
if args.batch > args.n:
    parser.error(f"argument --batch: {args.batch} is more than the {args.n} points of --n; give a smaller --batch")
available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
if args.device != "auto" and not available[args.device]:
    parser.error(f"argument --device: no {args.device} on this machine")
device = torch.device(args.device if args.device != "auto" else "cuda" if available["cuda"] else "cpu")
try:
    Path(args.outdir).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.outdir).close()   # better to learn it now than after the training
except OSError as error:
    parser.error(f"argument --outdir: cannot write to {args.outdir!r} ({error.strerror})")
torch.set_num_threads(1)   # as fast as 2 for so small a network, and not 10 times slower when another program is busy

# %% Data: mixtures of Gaussians with equal weights, so that their score is known
def seeded(offset):
    """A generator of its own for evaluation and sampling, so that looking at the model does not change its training."""
    return torch.Generator().manual_seed(10**6 * args.seed + offset)

def mixture(name, d=2):
    """A law: centres (M, d), principal axes as columns (M, d, d) and variances along them (M, d), all float64."""
    if name == "moons":   # dense enough for one smooth density; with dsm_2d's noise 0.06 its Jacobian would be 10 times larger
        centres, covs = torch.tensor(make_moons(80, shuffle=False)[0]), 0.2**2 * torch.eye(2, dtype=torch.float64).expand(80, 2, 2)
    elif name == "gmm2":
        centres = torch.tensor([[0.0, 0.0], [3.0, 3.0]], dtype=torch.float64)
        covs = torch.tensor([[[1.0, 0.3], [0.3, 1.2]], [[0.6, -0.2], [-0.2, 0.8]]], dtype=torch.float64)
    else:
        centres = 2 * nn.functional.normalize(torch.randn(3, d, generator=seeded(50), dtype=torch.float64))
        turns = torch.linalg.qr(torch.randn(3, d, d, generator=seeded(51), dtype=torch.float64))[0]
        covs = turns * torch.logspace(math.log10(0.3), math.log10(2), d, dtype=torch.float64) @ turns.mT
    variances, axes = torch.linalg.eigh(covs)
    return centres, axes, variances

def sample_data(law, n, generator):
    """n i.i.d. points (n, d) of a law: a random centre plus its noise."""
    centres, axes, variances = law
    k = torch.randint(len(centres), (n,), generator=generator)
    noise = variances[k].sqrt() * torch.randn(n, centres.shape[1], generator=generator, dtype=torch.float64)
    for i in range(len(centres)):
        noise[k == i] = noise[k == i] @ axes[i].T
    return (centres[k] + noise).float()

def mixture_score(law, x, sigma=0.0):
    """grad log q_sigma(x) (B, d), q_sigma the law convolved with N(0, sigma^2 I): a softmax mean of the Gaussians' scores."""
    centres, axes, variances = law
    pieces, var = [], variances + sigma**2                               # (M, d)
    for x_i in x.detach().cpu().double().split(500):
        y = torch.einsum("kji,bkj->bki", axes, centres - x_i[:, None])   # (B, M, d) towards the centres, along their axes
        w = (-0.5 * (y**2 / var + var.log()).sum(-1)).softmax(dim=1)     # (B, M)
        pieces.append(torch.einsum("bk,kij,bkj->bi", w, axes, y / var))
    return torch.cat(pieces).to(x.dtype).to(x.device)

DATA = {}   # name: law, training points (n, d), [(points of p, their score), (points of q_sigma, their score)]
for name, d in [(args.data, 2), ("correlated", args.dim)]:
    law = mixture(name, d)
    x, noise = sample_data(law, 4000, seeded(1)).to(device), torch.randn(4000, d, generator=seeded(2)).to(device)
    checks = [(y, mixture_score(law, y, sigma)) for y, sigma in [(x, 0.0), (x + args.sigma * noise, args.sigma)]]
    DATA[name] = law, sample_data(law, args.n, seeded(0)).to(device), checks
law, x_data, _ = DATA[args.data]
exact_score = partial(mixture_score, law)   # x (B, 2) -> (B, 2)

# %% Model
class ScoreMLP(nn.Module):
    """(B, d) -> (B, d): the score of one isotropic Gaussian with the data's variance, plus a network that starts at 0."""
    def __init__(self, x, hidden=64, num_layers=3, activation=nn.SiLU):   # a smooth one: part 4 shows what ReLU does
        super().__init__()
        self.register_buffer("mean", x.mean(0))
        self.register_buffer("scale", x.var(0).mean().sqrt())
        sizes = [x.shape[1]] + [hidden] * num_layers
        blocks = [nn.Sequential(nn.Linear(a, b), activation()) for a, b in zip(sizes, sizes[1:])]
        self.net = nn.Sequential(*blocks, nn.Linear(hidden, x.shape[1]))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x):
        x = (x - self.mean) / self.scale
        return (self.net(x) - x) / self.scale

# %% Loss
# Each is loss(score_fn, x, v, c) -> (B,): score_fn maps (B, d) to (B, d), v (m, B, d) are directions with E[v v'] = c I. J = ds/dx.
# All but dsm have the mean E[tr J + |s|^2/2] = E|s - grad log p|^2/2 - E|grad log p|^2/2 (explicit: without the last term):
#     explicit  nothing is projected       nothing differentiated        1 forward, and the exact score: the oracle
#     exact     nothing                    s along all d axes            1 forward, d backward
#     ssm_vr    J on v                     s along v                     1 forward, 1 backward per slice
#     ssm       J and s on v               s along v                     1 forward, 1 backward per slice
#     fd_ssm    J and s on v               a difference of s along v     2 forward per slice
#     dsm       nothing                    nothing: it learns q_sigma    1 forward per noise
# Training adds one pass back through all of it. theory.md 5.
def slices(x, kind="rademacher", m=1):
    """m directions v for each point of x (B, d), (m, B, d), and c. The d "axes" are slices, too: with them nothing is random."""
    d = x.shape[1]
    if kind is None:
        return None, 1.0
    if kind == "axes":
        return torch.eye(d, dtype=x.dtype, device=x.device)[:, None].expand(d, *x.shape), 1 / d
    v = torch.randn(m, *x.shape, dtype=x.dtype, device=x.device)
    v = {"rademacher": v.sign(), "gaussian": v, "sphere": v / v.norm(dim=-1, keepdim=True)}[kind]
    return v, 1 / d if kind == "sphere" else 1.0   # 003's theorem has c = 1, its text and its code have unit vectors

@torch.enable_grad()   # 003's code fails under no_grad
def directional(score_fn, x, v, loop=False):
    """s (B, d) and v'J (m, B, d), differentiable once more: one backward pass per slice, all at once (vmap) or in a loop."""
    x = x.detach().requires_grad_()   # 003's requires_grad_ stays on the caller's data
    s = score_fn(x)
    if loop or len(v) == 1:
        return s, torch.stack([torch.autograd.grad(s, x, v_i, create_graph=True)[0] for v_i in v])
    return s, torch.autograd.grad(s, x, v, is_grads_batched=True, create_graph=True)[0]

def explicit(score_fn, x, v=None, c=1.0, target=exact_score):
    """|s - grad log p|^2/2."""
    return 0.5 * (score_fn(x) - target(x)).square().sum(-1)

def sliced_score_matching_loss(score_fn, x, v, c=1.0):
    """SSM: (v'Jv + (v's)^2/2)/c. 003's draws unit v and is 2/d times this; its "more stable" version is the same to the last bit."""
    s, vJ = directional(score_fn, x, v)
    return (((vJ * v).sum(-1) + 0.5 * (s * v).sum(-1) ** 2) / c).mean(0)

def ssm_vr(score_fn, x, v, c=1.0, loop=False):
    """SSM-VR: v'Jv/c + |s|^2/2, as E(v's)^2 = c |s|^2 is known. It is Hutchinson's estimator, and with the axes the exact trace."""
    s, vJ = directional(score_fn, x, v, loop)
    return ((vJ * v).sum(-1) / c).mean(0) + 0.5 * s.square().sum(-1)

def fd_ssm(score_fn, x, v, c=1.0, h=args.h):
    """SSM up to O(h^2), first orders cancel: v'(s+ - s-)/2h in the place of v'Jv, v'(s+ + s-)/2 in that of v's."""
    s_plus, s_minus = score_fn(torch.cat([x + h * v, x - h * v]).flatten(0, 1)).view(2, *v.shape)   # (m, B, d) each
    vJv, vs = (v * (s_plus - s_minus)).sum(-1) / (2 * h), (v * (s_plus + s_minus)).sum(-1) / 2      # (m, B)
    return ((vJv + 0.5 * vs**2) / c).mean(0)

def dsm(score_fn, x, v=None, c=1.0, sigma=args.sigma, signs=(1, -1)):
    """|e|^2/2, e = s(x + sigma eps) + eps/sigma, mean over eps and -eps (theory.md 4.5); with v 003's "sliced" one, (v'e)^2/2c."""
    eps = torch.tensor(signs, device=x.device)[:, None, None] * torch.randn_like(x)    # (signs, B, d)
    e = score_fn((x + sigma * eps).flatten(0, 1)).view(eps.shape) + eps / sigma        # (signs, B, d)
    square = e.square().sum(-1) if v is None else ((e[:, None] * v).sum(-1) ** 2 / c).mean(1)
    return 0.5 * square.mean(0)

LOSSES = {   # name: (loss, kind of slices)
    "explicit": (explicit, None), "exact": (ssm_vr, "axes"), "ssm": (sliced_score_matching_loss, args.slices),
    "ssm_vr": (ssm_vr, args.slices), "fd_ssm": (fd_ssm, args.slices), "dsm": (dsm, None)}

def parts(x, kind, m, limit=2**22):
    """x (B, d) cut so that v and each layer hold at most `limit` numbers: bounded memory, also for the exact trace at large d."""
    return x.split(max(1, limit // ({"axes": x.shape[1], None: 1}.get(kind, m) * max(x.shape[1], args.hidden))))

# %% Training: part 1, every loss from the same start, with the same batches and the same slices
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

clock = time.process_time if device.type == "cpu" else time.perf_counter   # processor time leaves out other programs

def training_step(net, optimizer, x, loss, kind, m=args.n_slices):
    """One step down the gradient of a batch's mean loss, which is added part by part; the seconds it took."""
    started = clock()
    optimizer.zero_grad()
    for part in parts(x, kind, m):
        (loss(net, part, *slices(part, kind, m)).sum() / len(x)).backward(inputs=list(net.parameters()))   # not those of x
    optimizer.step()
    if device.type != "cpu":
        torch.accelerator.synchronize()   # until then it may still be at work
    return clock() - started

def train(data, name, loss, kind, activation=nn.SiLU):
    """The network of one run and its history: (step, seconds of training so far, error against p, error against q_sigma)."""
    law, x_train, checks = DATA[data]
    loss = partial(explicit, target=partial(mixture_score, law)) if loss is explicit else loss
    torch.manual_seed(args.seed)
    net = ScoreMLP(x_train, args.hidden, args.layers, activation).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps + 10, pct_start=0.1)   # +10: 10 divides by 0
    batches, seconds, history = seeded(3), 0.0, []
    for step in (bar := tqdm(range(1, args.steps + 1), desc=f"{data}, {name}", mininterval=0.5, leave=False)):
        x = x_train[torch.randint(args.n, (args.batch,), generator=batches).to(device)]
        seconds += training_step(net, optimizer, x, loss, kind)
        scheduler.step()
        if step % max(1, args.steps // 12) == 0 or step == args.steps:
            errors = [((net(x) - exact).norm() / exact.norm()).item() for x, exact in checks]   # sqrt(E|s - s*|^2/E|s*|^2)
            history.append((step, seconds, *errors))
            bar.set_postfix_str(f"error {errors[0]:.3f}")
            if not errors[0] < 100:
                sys.exit(f"diverged at step {step}: {name} on {data}, error {errors[0]:.3g}; try a --lr below {args.lr:g}")
    return net, np.array(history)

runs = {(data, name): train(data, name, *loss) for data in DATA for name, loss in LOSSES.items()}
final = lambda name, data=args.data, column=2: runs[data, name][1][-1, column]   # column 1: seconds, 2: error against p, 3: q_sigma
print(f"\n1. {args.steps} equal steps, {args.n_slices} {args.slices} slice(s): relative score error against p and q_sigma, 1 for s = 0")
print(f"          {args.data}, d = 2: p  q_{args.sigma:<5g}  sec    correlated, d = {args.dim}: p  q_{args.sigma:<5g}  sec  (p) / exact's")
for name in LOSSES:
    row = [final(name, data, column) for data in DATA for column in (2, 3, 1)]
    print("{:10s}{:15.3f}{:8.3f}{:6.1f}{:25.3f}{:8.3f}{:6.1f}{:10.2f}".format(name, *row, row[3] / final("exact", "correlated")))
model = runs[args.data, args.loss][0]
save("model.pt", lambda file: torch.save(model.state_dict(), file))

@torch.no_grad()
def score(x, net=model):
    """What --loss has learned at x (B, 2): grad log p, with dsm grad log q_sigma, (B, 2)."""
    return net(x)

# %% Sampling
@torch.no_grad()
def langevin_dynamics(score, x, eta, K, generator):
    """K steps x + (eta/2) s + sqrt(eta) z, which end in the law with this score up to a bias of order eta."""
    for _ in range(K):
        x = x + eta / 2 * score(x) + math.sqrt(eta) * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return x

directions = torch.stack([f(torch.arange(32) * math.pi / 32) for f in (torch.cos, torch.sin)])   # (2, 32)

def projections(x):
    """(n, 2) -> (32, n): sorted projections. The RMS difference of two of these is the sliced 2-Wasserstein distance SW2."""
    return (x.cpu() @ directions).T.sort().values

mean_sw2 = lambda pairs: float(np.mean([(a - b).square().mean().sqrt() for a, b in pairs]))

root = torch.linalg.cholesky(torch.cov(x_data.T))
starts = [x_data.mean(0) + torch.randn(args.n_samples, 2, generator=seeded(100 + i)).to(device) @ root.T for i in range(3)]
sets = [langevin_dynamics(score, start, args.eta, args.K, seeded(200 + i)).cpu() for i, start in enumerate(starts)]
if not (torch.stack(sets).abs() < 1000).all():
    sys.exit(f"Langevin dynamics diverged: take an --eta below {args.eta:g}, or train longer")
samples = sets[0]   # (n_samples, 2)
fresh = [projections(sample_data(law, args.n_samples, seeded(300 + i))) for i in range(8)]
sw2, sw2_floor = mean_sw2(product(map(projections, sets), fresh)), mean_sw2(combinations(fresh, 2))
print(f"\nSW2 (data units) of {args.n_samples} Langevin samples of {args.loss} to fresh data: {sw2:.4f}; "
      f"floor, two fresh sets: {sw2_floor:.4f}")
save("samples.npy", lambda file: np.save(file, samples.numpy()))

# %% Checks: part 2, variance of a loss at one point
KINDS, M, one_eps = ["rademacher", "gaussian", "sphere"], (1, 3, 10), partial(dsm, signs=(1,))
net, points = runs["correlated", "ssm_vr"][0], sample_data(DATA["correlated"][0], args.points, seeded(4)).to(device)

def slicing_variance(A, kind):
    """Var over v of v'Av/c for matrices A (B, d, d), (B,); theory.md 5.4."""
    A = (A + A.mT) / 2
    square, diagonal, d = A.square().sum((1, 2)), A.diagonal(dim1=1, dim2=2), A.shape[1]
    return {"gaussian": 2 * square, "rademacher": 2 * (square - diagonal.square().sum(1)),
            "sphere": 2 * d / (d + 2) * (square - diagonal.sum(1) ** 2 / d)}[kind]

def added_by_a_slice(score_fn, x, v, c):
    """slicing_variance at x of J, J + s s'/2, e e'/2 (what ssm_vr, ssm, sliced dsm project), three kinds each, (B, 9); v: the axes."""
    s, J = directional(score_fn, x, v)                                             # (B, d), (d, B, d)
    eps, half = torch.randn_like(x), lambda a: a[:, :, None] * a[:, None] / 2
    e, J = score_fn(x + args.sigma * eps) + eps / args.sigma, J.transpose(0, 1)    # (B, d), (B, d, d)
    return torch.stack([slicing_variance(A, kind) for A in (J, J + half(s), half(e)) for kind in KINDS], dim=1)

def at_points(loss, kind, m=1):
    """A loss at all points, (n, ...), part by part."""
    return torch.cat([loss(net, x, *slices(x, kind, m)).detach() for x in parts(points, kind, m)])

torch.manual_seed(args.seed)
whole, whole_dsm = at_points(ssm_vr, "axes"), at_points(one_eps, None)
added = at_points(added_by_a_slice, "axes").mean(0).view(3, 3).tolist()
print(f"\n2. Variance of a loss at one of {args.points} points, d = {args.dim}, with m slices, and in brackets the law of total variance")
print(f"no slices: exact {whole.var():.4g}, mean {whole.mean():.4g}; dsm with one eps {whole_dsm.var():.4g}, mean {whole_dsm.mean():.4g}")
line = "{:24}" + "{:<23}" * len(M) + "{}"
print(line.format("m", *M, "mean"))
print(line.format("003: Var(exact)/m", *[f"{whole.var() / m:.4g}" for m in M], ""))
variance = {}   # (name, kind): [(m, measured, law)]
for name, loss, base, extras in [("ssm_vr", ssm_vr, whole, added[0]), ("ssm", sliced_score_matching_loss, whole, added[1]),
                                 ("fd_ssm", fd_ssm, whole, added[1]), ("sliced dsm", one_eps, whole_dsm, added[2])]:
    for kind, extra in zip(KINDS, extras):
        values = [at_points(loss, kind, m) for m in M]
        variance[name, kind] = np.array([(m, y.var().item(), base.var().item() + extra / m) for m, y in zip(M, values)])
        cells = [f"{measured:.4g} ({expected:.4g})" for _, measured, expected in variance[name, kind]]
        print(line.format(f"{name}, {kind}", *cells, f"{values[-1].mean():.4g}"))
law_gap = max(np.abs(rows[:, 1] / rows[:, 2] - 1).max() for rows in variance.values())
print(f"largest deviation from the law {law_gap:.1%} (up to 10 % is the noise of heavy tails)")

# %% Checks: part 3, cost of a training step
METHODS = {   # name: (loss, kind of slices, m)
    "dsm, one eps": (one_eps, None, 1), "dsm": (dsm, None, 1), "fd_ssm": (fd_ssm, args.slices, 1),
    "ssm": (sliced_score_matching_loss, args.slices, 1), "ssm_vr": (ssm_vr, args.slices, 1), "ssm_vr, m = 10": (ssm_vr, args.slices, 10),
    "exact": (ssm_vr, "axes", 1), "exact, loop": (partial(ssm_vr, loop=True), "axes", 1)}
cost, dims = {name: {} for name in METHODS}, [d for d in (2, 10, 30, 100, 300, 1000) if d <= args.d_max]
for d in dims:
    x = torch.randn(128, d, device=device)
    mlp = ScoreMLP(x, args.hidden, args.layers).to(device)
    optimizer = torch.optim.Adam(mlp.parameters(), lr=1e-4, fused=True)
    times = {name: [] for name in METHODS if d <= 300 or name != "exact, loop"}   # it would take 20 s at d = 1000
    for name in list(times) * 30:   # in turn, so that a slow moment of the machine meets them all
        if sum(times[name]) < 0.7:
            times[name].append(training_step(mlp, optimizer, x, *METHODS[name]))
    for name in times:
        cost[name][d] = float(np.median(times[name]))
ratio = {name: {d: seconds[d] / cost["dsm"][d] for d in seconds} for name, seconds in cost.items()}
print(f"\n3. Time of a training step of 128 points / that of dsm (eps and -eps, {1000 * cost['dsm'][dims[-1]]:.1f} ms at d = {dims[-1]})")
print(f"{'d':15s}" + "".join(f"{d:>9}" for d in dims))
count = {"exact / m = 10": {d: cost["exact"][d] / cost["ssm_vr, m = 10"][d] for d in dims}, "003: d / 10": {d: d / 10 for d in dims}}
for name, row in (ratio | count).items():
    print(f"{name:15s}" + "".join(f"{row.get(d, '-'):>9.4}" for d in dims))

# %% Checks: part 4, traps
TRAPS = {"unit v": (lambda score_fn, x, v, c: ssm_vr(score_fn, x, v), "sphere"),   # c forgotten
         "ssm_vr, ReLU": (ssm_vr, args.slices, nn.ReLU), "dsm, ReLU": (dsm, None, nn.ReLU)}
runs |= {(args.data, name): train(args.data, name, *settings) for name, settings in TRAPS.items()}
x, truth = DATA[args.data][2][0]
share = (score(x, runs[args.data, "unit v"][0]) * truth).sum() / truth.square().sum()   # by least squares
v, _ = slices(points, "sphere")
s, vJ = directional(net, points, v)
best = -(vJ * v).sum() / s.square().sum()   # minimises E[a v'Jv + a^2 |s|^2/2]
print(f"\n4. Unit slices with the whole |s|^2, c forgotten: in 2-D learned / exact = {share:.3f} (1/d = 0.5); in d = {args.dim} this loss")
print(f"   likes {best:.4f} times a learned score best (1/d = {1 / args.dim:.4f})")

normal = torch.randn(10**6, 1, generator=seeded(5), dtype=torch.float64)
relu_loss = lambda theta: ssm_vr(lambda x: (x - theta).relu(), normal, torch.ones_like(normal)[None]).mean()   # s = max(x - theta, 0)
theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
seen, = torch.autograd.grad(relu_loss(theta), theta)
slope = (relu_loss(theta + 0.05) - relu_loss(theta - 0.05)) / 0.1
print(f"   ReLU: autograd's gradient of ssm_vr is {seen:.3f}, the slope of the same loss {slope:.3f}: autograd does not see kinks move")
print("   trained, error against p: " + ", ".join(f"{name} {final(name):.3f}" for name in ["ssm_vr", "ssm_vr, ReLU", "dsm", "dsm, ReLU"]))
hs, fd_gap = np.geomspace(1e-7, 1, 29), {}   # every fourth is a power of ten
x, net64 = points[:500].cpu().double(), copy.deepcopy(net).cpu().double()   # mps has no float64
v, c = slices(x, args.slices)
limit = sliced_score_matching_loss(net64, x, v, c)
for name, f, dtype in [("float64", net64, torch.float64), ("float32", copy.deepcopy(net64).float(), torch.float32)]:
    fd_gap[name] = np.array([((fd_ssm(f, x.to(dtype), v.to(dtype), c, h) - limit).norm() / limit.norm()).item() for h in hs])
fd_order = math.log10(fd_gap["float64"][20] / fd_gap["float64"][16])   # between h = 0.001 and 0.01
print(f"   fd_ssm is off ssm by a share that grows like h^{fd_order:.3f} (float64); smallest "
      + ", ".join(f"{gap.min():.0e} at h = {hs[gap.argmin()]:.0e} ({name})" for name, gap in fd_gap.items()))

# %% Pictures
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"   # data and exact, samples and learned, noise
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 10, "savefig.dpi": 100})
COLOURS = dict(zip(LOSSES, [BLUE, "black", ORANGE, "#E69F00", "#009E73", "#CC79A7"]))
low, high = x_data.cpu().aminmax(dim=0)
side = torch.linspace(-0.55, 0.55, 15) * (high - low).max()   # one square view for all panels
grid = torch.cartesian_prod(side, side) + (low + high) / 2
cap = exact_score(grid).norm(dim=1).median()
fields = {r"exact $\nabla\log p$": (exact_score(grid), BLUE)}
for name in ["exact", "ssm", "ssm_vr", "fd_ssm", "dsm", "unit v"]:
    fields[f"{name}\nerror {final(name):.3f}"] = score(grid.to(device), runs[args.data, name][0]).cpu(), ORANGE
fig, axs = plt.subplots(2, 4, figsize=(10, 5.8))
for ax, (title, (v, colour)) in zip(axs.flat, fields.items()):
    v = v * (cap / v.norm(dim=1, keepdim=True)).clamp(max=1)
    ax.scatter(*x_data[:800].cpu().T.numpy(), s=3, color="0.85")
    ax.quiver(*grid.T.numpy(), *v.T.numpy(), angles="xy", scale_units="xy", scale=(8 * cap / side[-1]).item(), width=0.007, color=colour)
    ax.set_title(title)
axs[1, 3].scatter(*samples.T.numpy(), s=3, color=ORANGE, alpha=0.5, linewidths=0)
axs[1, 3].set_title(f"Langevin samples of {args.loss}\nSW2 {sw2:.3f}, floor {sw2_floor:.3f}")
plt.setp(axs, xlim=grid[[0, -1], 0].tolist(), ylim=grid[[0, -1], 1].tolist(), aspect="equal", xticks=[], yticks=[])
fig.suptitle(rf"What each loss learns (arrows cut at the median length); dsm learns $q_\sigma$, $\sigma$ = {args.sigma:g}; "
             "unit v has forgotten c = 1/d")
save("fields.png", fig.savefig)

def curves(ax, lines, title, xlabel, ylabel, xscale="log"):
    """Lines {label: (x, y, format, colour)} over each other."""
    for label, (x, y, style, colour) in lines.items():
        ax.plot(x, y, style, color=colour, label=label, ms=4)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale="log")
    ax.legend(fontsize=8)

fig, axs = plt.subplots(2, 2, figsize=(9, 6.4), sharey="row")
for i, (data, d) in enumerate([(args.data, 2), ("correlated", args.dim)]):
    for j, (title, xlabel) in enumerate([("equal steps", "step"), ("equal time", "seconds of training")]):
        lines = {name: (*runs[data, name][1][:, [j, 2]].T, "--" if name == "fd_ssm" else "-", COLOURS[name]) for name in LOSSES}
        curves(axs[i, j], lines, f"{title}: {data}, d = {d}", xlabel, "relative error against p", "linear")
fig.suptitle("One slice is cheap; what it costs is the variance of ssm in high dimension. fd_ssm lies on ssm")
save("training.png", fig.savefig)

fig, axs = plt.subplots(2, 2, figsize=(10, 7.6))
lines = {"003: Var(exact) / m": (M, whole.var().item() / np.array(M), "--", GREY)}
for name in ["ssm", "ssm_vr"]:
    m, measured, expected = variance[name, args.slices].T
    lines |= {f"{name}, law": (m, expected, "-", COLOURS[name]), f"{name}, measured": (m, measured, "o", COLOURS[name])}
curves(axs[0, 0], lines, f"Variance at a point, d = {args.dim}: more slices do not remove it all", f"{args.slices} slices m", "variance")
lines = {name: (list(row), list(row.values()), "--" if "," in name else "-", COLOURS[name.split(",")[0]]) for name, row in ratio.items()}
lines["d"] = dims, dims, ":", GREY
curves(axs[0, 1], lines, "Time of a training step", "d", "time / that of dsm")
lines = {name: (hs, gap, "o-", colour) for (name, gap), colour in zip(fd_gap.items(), (BLUE, ORANGE))}
lines |= {"$h^2$": (hs[12:], (hs[12:] / hs[20]) ** 2 * fd_gap["float64"][20], ":", GREY), "--h": ([args.h] * 2, [1e-10, 1], "-", GREY)}
curves(axs[1, 0], lines, "Finite differences: round-off on the left, $h^2$ on the right", "h", "relative distance of fd_ssm from ssm")
lines = {name: (*runs[args.data, name][1][:, [0, 2]].T, "--" if "dsm" in name else "-", ORANGE if "ReLU" in name else BLUE)
         for name in ["ssm_vr", "ssm_vr, ReLU", "dsm", "dsm, ReLU"]}
curves(axs[1, 1], lines, "ReLU: fine for dsm, useless where s is differentiated", "step", "relative error against p", "linear")
save("measures.png", fig.savefig)

at = max(d for d in dims if d <= 100)   # dimension of cost_ssm_vr and cost_exact
summary = dict(data=args.data, seed=args.seed, steps=args.steps, slices=args.slices, n_slices=args.n_slices, dim=args.dim, loss=args.loss,
               **{f"err_{name}": round(final(name, "correlated"), 4) for name in LOSSES}, SW2=round(sw2, 4), floor=round(sw2_floor, 4),
               law_gap=round(law_gap, 3), fd_order=round(fd_order, 3), cost_ssm_vr=round(ratio["ssm_vr"][at], 2),
               cost_exact=round(ratio["exact"][at], 1), train_s=round(sum(history[-1, 1] for _, history in runs.values()), 1))
save("summary.json", lambda file: file.write_text(json.dumps({"settings": vars(args), "cost": cost, "figures": summary}, indent=1)))
print(" ".join(f"{key}={value}" for key, value in summary.items()))

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "scikit-learn==1.9.1", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
