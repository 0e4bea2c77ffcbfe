r"""Denoising score matching with one noise level on two moons, and what Langevin dynamics makes of the learned score.

Reads beside: notes 001 task 2 (whole); 003 sections 4.1.2 (Langevin), 4.4; theory.md 4, 6.

    python dsm_homework.py                                 # the homework, solved and measured
    python dsm_homework.py --sigma 0.3 --num_steps 300     # more noise: faster mixing, blurred moons
    python dsm_homework.py --help                          # every setting with its unit, range and default

DenoisingScoreMatcher has the homework's interface and drops into its notebook. The moons are a curve plus Gaussian noise,
so the score of the noised data is known in closed form: each figure is a distance to it, or stands beside its floor.

A good run takes 39 s and ends like this (2 CPU cores, Python 3.11, torch 2.13.0):
    seed=0 sigma=0.1 epochs=300 num_steps=1000 eta=0.01 score_err=0.1129 SW2=0.0383 floor=0.0309
    SW2_tweedie=0.0401 clean_floor=0.0313 bias_se=2.1 mala_gap=0.0075 train_s=5.8
"""
# %% Imports and settings
import argparse
import json
import math
import sys
import tempfile
import time
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
parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: cuda where there is one, else cpu")
parser.add_argument("--outdir", default="out_dsm_homework", help="folder for pictures, samples.npy, model.pt and summary.json")
NUMBERS = [   # flag, default, lowest, highest (of the flag's type), meaning; the homework asks for epochs > 50, lr > 1e-3, hidden > 32
    ("n", 5000, 10, 10**7, "points of make_moons, 80 %% of them for training"),
    ("sigma", 0.1, 1e-3, 100.0, "the noise level"),
    ("epochs", 300, 1, 10**6, "passes over the training points"),
    ("batch", 500, 1, 10**6, "training points per step"),   # 1000 at lr 2e-2: same error, but with one seed of three a moon gets 55 %
    ("lr", 1e-2, 1e-8, 100.0, "peak of the one-cycle learning rate"),
    ("hidden", 48, 1, 8192, "width of the network"),
    ("layers", 4, 1, 64, "hidden layers"),   # 3 layers of 64: the score error is larger by a fifth after equal time
    ("num_steps", 1000, 1, 10**6, "Langevin steps"),
    ("eta", 0.01, 1e-8, 1e5, "Langevin step, below the stability limit 4 (sigma^2 + 0.1^2)"),
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
if args.batch > 0.8 * args.n:
    parser.error(f"argument --batch: {args.batch} is more than the {int(0.8 * args.n)} training points of --n; give a smaller --batch")
TAU = 0.1   # the homework's make_moons(noise=0.1)
limit = 4 * (args.sigma**2 + TAU**2)   # theory.md 6.2
if args.eta >= limit * (1 - 1e-9):
    parser.error(f"argument --eta: {args.eta:g} is not below the stability limit 4 (sigma^2 + {TAU:g}^2) = {limit:.4g}")
available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
if args.device != "auto" and not available[args.device]:
    parser.error(f"argument --device: no {args.device} on this machine")
device = torch.device(args.device if args.device != "auto" else "cuda" if available["cuda"] else "cpu")
try:
    Path(args.outdir).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.outdir).close()   # better to learn it now than after the training
except OSError as error:
    parser.error(f"argument --outdir: cannot write to {args.outdir!r} ({error.strerror})")
torch.manual_seed(args.seed)
torch.set_num_threads(1)   # as fast as 2 for so small a network, and not 10 times slower when another program is busy

# %% Data: 400 centres along the two moons, each with Gaussian noise TAU, so the score is known at every noise level
def generate_moons_data(count, seed=None):
    """The homework's data: train_data (0.8 count, 2), train_labels, test_data (0.2 count, 2), test_labels; float32."""
    data, labels = make_moons(n_samples=count, noise=TAU, random_state=seed)
    data, split = data.astype("float32"), int(0.8 * count)
    return data[:split], labels[:split], data[split:], labels[split:]

centres = torch.tensor(make_moons(400, shuffle=False)[0])   # (M, 2) float64: the upper moon, then the lower

def sample_data(n, generator):
    """n i.i.d. points (n, 2), a random centre plus noise each; make_moons spaces its points evenly, so its sets are too alike."""
    k = torch.randint(len(centres), (n,), generator=generator)
    return (centres[k] + TAU * torch.randn(n, 2, generator=generator, dtype=torch.float64)).float()

def exact_density(x, sigma):
    """log q_sigma(x) (B,), its gradient (B, 2) and Laplacian (B,), data convolved with N(0, sigma^2 I); sigma a float or (B,)."""
    y, var = x.detach().cpu().double(), TAU**2 + torch.as_tensor(sigma).cpu().double().expand(len(x))[:, None] ** 2   # (B, 2), (B, 1)
    square = torch.cdist(y, centres).square()                                               # (B, M)
    log_qk = -square / (2 * var) - (2 * math.pi * var).log() - math.log(len(centres))       # (B, M)
    w = log_qk.softmax(dim=1)                                                               # (B, M) posterior of the centre of x
    s = (w @ centres - y) / var                                                             # (B, 2) to its mean, theory.md 4.2
    laplacian = (w * square).sum(1) / var[:, 0] ** 2 - 2 / var[:, 0] - s.square().sum(1)    # (B,) = (Laplacian q)/q - |s|^2
    return [value.to(x.dtype).to(x.device) for value in (log_qk.logsumexp(dim=1), s, laplacian)]

exact_score = lambda x, sigma: exact_density(x, sigma)[1]   # (B, 2)
train_data, train_labels, test_data, test_labels = generate_moons_data(args.n, args.seed)
x_data, x_test = torch.tensor(train_data, device=device), torch.tensor(test_data, device=device)   # 5000 points need no DataLoader
print(f"two moons: {len(x_data)} training and {len(x_test)} test points, sigma {args.sigma:g}, stable for eta < {limit:.4g}, on {device}")

# %% Model: the homework's plain network, Linear layers with activations
def make_score_model():
    sizes = [2] + [args.hidden] * args.layers
    return nn.Sequential(*[layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())], nn.Linear(args.hidden, 2))

# %% Langevin dynamics
def noise_like(x, generator):
    """z ~ N(0, I), drawn on the CPU so that every device gets the same."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

@torch.no_grad()
def langevin(score, x, num_steps, eta, generator=None, noise_scale=1.0):
    """Yields the state x + (eta/2) s(x) + sqrt(eta noise_scale) z after each step; x (B, ...). theory.md 6.1.

    It samples q_sigma, whose score it is given, not the data (001 does not say so), and for eta > 0 only nearly. noise_scale
    is a temperature: the density becomes q^(1/noise_scale). 003's epsilon is eta in one formula, eta / 2 in the others.
    """
    for _ in range(num_steps):
        x = x + eta / 2 * score(x) + (eta * noise_scale) ** 0.5 * noise_like(x, generator)
        yield x

@torch.no_grad()
def mala(log_density, x, num_steps, eta, generator=None):
    """Yields (state, accepted (B,)): Langevin proposals with the Metropolis-Hastings test; log_density(x) -> log q (B,), score.

    Exact for every eta, but it needs log q: differences of log q cannot be had from a free network, whose field need not be
    a gradient. Each chain has its own test: 003 adds the log ratios of the whole batch, and then hardly anything is accepted.
    """
    log_q, s = log_density(x)
    for _ in range(num_steps):
        y = x + eta / 2 * s + math.sqrt(eta) * noise_like(x, generator)
        log_q_y, s_y = log_density(y)
        there, back = (y - x - eta / 2 * s).square().sum(1), (x - y - eta / 2 * s_y).square().sum(1)   # (B,)
        accepted = torch.rand(len(x), generator=generator, dtype=x.dtype).to(x.device).log() < log_q_y - log_q + (there - back) / (2 * eta)
        x, s = torch.where(accepted[:, None], y, x), torch.where(accepted[:, None], s_y, s)
        log_q = torch.where(accepted, log_q_y, log_q)
        yield x, accepted

def whitened(log_density, root):
    """log_density of y = root^-1 x, whose Langevin dynamics is, in x, preconditioned: x + (eta/2) M s + sqrt(eta) root z.

    M = root root^T should be near the covariance; with its inverse, as 003 has it, things get worse (theory.md 6.5).
    """
    def of_y(y):
        log_q, s = log_density(y @ root.T)
        return log_q, s @ root
    return of_y

# %% Loss and sampling: the homework's class
class DenoisingScoreMatcher(nn.Module):
    """Score matching at one noise level sigma > 0: score_model maps (B, *input_shape) to the same shape. Note 001 task 2."""
    def __init__(self, score_model, input_shape, sigma):
        super().__init__()
        if not sigma > 0:
            raise ValueError(f"sigma = {sigma} is not positive")
        self.score_model, self.input_shape = score_model, tuple(input_shape)
        self.register_buffer("sigma", torch.tensor(float(sigma)))   # moves with .to() and is saved with the weights

    @property
    def device(self):
        return self.sigma.device

    def forward(self, x, generator=None):
        """||s(x + sigma eps) + eps/sigma||^2 coordinate by coordinate, of x's shape; the homework's form, without 1/2.

        The target is the gradient of log k(x_noisy | x) (001 leaves out the gradient sign); what is learned is its mean over
        all x behind x_noisy, the score of q_sigma (theory.md 4.1).
        """
        eps = noise_like(x, generator)
        noisy_x = x + self.sigma * eps
        return (self.score_model(noisy_x) + eps / self.sigma).square()

    def loss(self, x, generator=None):
        """A sum over coordinates (F.mse_loss would divide by their number), a mean over the batch."""
        return {"total_loss": self(x, generator).mean(dim=0).sum()}

    def langevin_dynamics(self, x, num_steps, eta, generator=None):
        """The state after num_steps steps of size eta from x (B, *input_shape). An eta too large is not refused here."""
        for x in langevin(self.score_model, x, num_steps, eta, generator):
            pass
        return x

    def sample(self, num_samples=64, num_steps=100, eta=0.01, generator=None):
        """The homework starts from U[-1, 1], which misses a third of the moons, and its 100 steps do not mix: see grid.png."""
        x0 = (2 * torch.rand(num_samples, *self.input_shape, generator=generator) - 1).to(self.device)
        return self.langevin_dynamics(x0, num_steps, eta, generator)

# %% Training
def seeded(offset):
    """A generator of its own for evaluation and sampling, so that looking at the model does not change its training."""
    return torch.Generator().manual_seed(10**6 * args.seed + offset)

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

def noisy_data(n, sigma, seed_x, seed_eps):
    """n points of q_sigma (n, 2)."""
    x = sample_data(n, seeded(seed_x))
    return x + sigma * noise_like(x, seeded(seed_eps))

def train(sigma):
    """A DenoisingScoreMatcher, the floor of its loss, its history: rows of epoch, loss, test loss, excess, relative score error."""
    matcher, history, losses = DenoisingScoreMatcher(make_score_model(), (2,), sigma).to(device), [], []
    x_check = noisy_data(5000, sigma, 1, 2).to(device)
    _, s, laplacian = exact_density(x_check, sigma)
    floor = 2 / sigma**2 + laplacian.mean().item()                               # E||eps/sigma + s*||^2, theory.md 4.3
    excess = lambda: (matcher.score_model(x_check) - s).square().sum(1).mean()   # E||s - s*||^2
    too_large = 100 * max(floor, excess().item())                                # beyond this it has diverged
    optimizer = torch.optim.Adam(matcher.parameters(), lr=args.lr, fused=True)
    steps = args.epochs * math.ceil(len(x_data) / args.batch)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps + 10, pct_start=0.1)   # +10: 10 divides by 0
    for epoch in (bar := tqdm(range(1, args.epochs + 1), desc=f"training, sigma {sigma:g}", mininterval=0.5)):
        for x in x_data[torch.randperm(len(x_data), device=device)].split(args.batch):
            loss = matcher.loss(x)["total_loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        if epoch % max(1, args.epochs // 10) == 0 or epoch == args.epochs:
            test_loss = matcher.loss(x_test[:1000].repeat(20, 1), seeded(3))["total_loss"].item()   # once would show the noise of eps
            error = excess().item()
            history.append((epoch, np.mean(losses), test_loss, error, math.sqrt(error / s.square().sum(1).mean())))
            losses = []
            bar.set_postfix_str("loss {1:.4g}, test {2:.4g}, relative error {4:.2g}".format(*history[-1]))
            if not error < too_large:
                sys.exit(f"diverged at epoch {epoch}: loss {loss:.3g}; try a --lr below {args.lr:g}")
    return matcher, floor, history

started = time.time()
model, floor, history = train(args.sigma)
train_s = time.time() - started
print(f"epoch  training loss  test loss    excess  relative error   (no 1/2, as in the homework; floor of the losses: {floor:.2f})")
print("\n".join("{:5d}  {:13.2f}  {:9.2f}  {:8.3f}  {:14.3f}".format(*line) for line in history))
save("model.pt", lambda file: torch.save(model.state_dict(), file))

@torch.no_grad()
def score(x, sigma=args.sigma):
    """Learned grad log q_sigma(x), (B, 2); x (B, 2) in data units. The network knows one sigma, another is a ValueError."""
    if not (torch.as_tensor(sigma) - args.sigma).abs().max() < 1e-6:
        raise ValueError(f"the network was trained at sigma = {args.sigma:g} only")
    return model.score_model(x)

# %% Checks
directions = torch.stack([f(torch.arange(32) * math.pi / 32) for f in (torch.cos, torch.sin)])   # (2, 32)

def projections(x):
    """(n, 2) -> (32, n): sorted projections. The RMS difference of two of these is the sliced 2-Wasserstein distance SW2."""
    return (x.cpu() @ directions).T.sort().values

mean_sw2 = lambda pairs: float(np.mean([(a - b).square().mean().sqrt() for a, b in pairs]))

def sw2_to(fresh, x):
    """Mean SW2 of sets x (sets * n_samples, 2) to the fresh ones, and the floor: that between the fresh ones."""
    fresh = [projections(y) for y in fresh]
    return mean_sw2(product([projections(part) for part in x.split(args.n_samples)], fresh)), mean_sw2(combinations(fresh, 2))

fresh_sets = lambda sigma: [noisy_data(args.n_samples, sigma, 300 + i, 350 + i) for i in range(8)]

def shares(x):
    """Shares of points x (B, 2) in the upper moon (nearer to one of its centres; 1/2 under every q_sigma) and at x_1 > 1.1."""
    x = x.cpu().double()
    return (torch.cdist(x, centres).argmin(1) < 200).double().mean().item(), (x[:, 0] > 1.1).double().mean().item()

tweedie = lambda net, x: (x + net.sigma**2 * net.score_model(x)).detach()   # E[x | x_noisy] at x_noisy
chains = model.sample(4 * args.n_samples, args.num_steps, args.eta, seeded(10))   # (4 n_samples, 2)
samples = chains[:args.n_samples].cpu()
if not (chains.abs() < 1000 * (1 + args.sigma)).all():
    sys.exit(f"Langevin dynamics diverged on the learned score: take an --eta below {args.eta:g}, or train longer")
score_err = history[-1][4]
sw2, sw2_floor = sw2_to(fresh_sets(args.sigma), chains)
sw2_tweedie, clean_floor = sw2_to(fresh_sets(0.0), tweedie(model, chains))
print(f"{args.num_steps} steps, eta {args.eta}: SW2 to q_sigma {sw2:.4f}, floor {sw2_floor:.4f}; upper moon {shares(chains)[0]:.3f} (0.5)")
print(f"after the Tweedie step: SW2 to the clean data {sw2_tweedie:.4f} (floor {clean_floor:.4f})")

# Number of steps and eta. A chain has left when it is further than 5 (1 + sigma) from the middle of the moons, or not a number.
has_left = lambda x: ~((x.cpu() - centres.mean(0)).norm(dim=-1) < 5 * (1 + args.sigma))
STEPS, ETAS = (10, 100, 1000), [share * limit for share in (1 / 80, 1 / 8, 5 / 8, 3 / 2)]
x0 = (2 * torch.rand(args.n_samples, 2, generator=seeded(20)) - 1).to(device)
grid, walks = {}, {}
print("\nFrom U[-1, 1]: SW2/floor to q_sigma (one set: +-30 %), share of the chains in the upper moon and at the right end (x_1 > 1.1);")
print(f"expected: 1, 0.5, {shares(fresh_sets(args.sigma)[0])[1]:.2f} (few steps: not mixed; large eta: too wide, then chains leave)")
for eta in ETAS:
    path = torch.stack([x0, *langevin(model.score_model, x0, max(STEPS), eta, seeded(21))]).cpu()   # (steps + 1, n_samples, 2)
    left = has_left(path).cumsum(0) > 0                                                             # (steps + 1, n_samples)
    for count in STEPS:
        ratio = np.divide(*sw2_to(fresh_sets(args.sigma), path[count]))
        report = "SW2/floor {:.2f}, upper {:.2f}, right {:.2f}".format(ratio, *shares(path[count]))
        if left[count].any():
            report = f"{100 * left[count].float().mean().item():.1f} % left, first at step {left.any(1).int().argmax()}"
        grid[eta, count] = path[count][~left[count]], report
    walks[eta] = path[:201, :4]
    print(f"eta {eta:6.4f} = {eta / limit:5.3f} of the limit   " + "   ".join(f"{count}: {grid[eta, count][1]}" for count in STEPS))

# Bias: on N(0, V) the chain settles at V/(1 - eta/4V) (theory.md 6.2). V as thin as the noised moons, 20000 chains for each eta.
V, count = args.sigma**2 + TAU**2, 20000
bias_etas = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)   # (10,) in units of the limit 4V
*_, x = langevin(lambda x: -x / V, torch.zeros(10, count, dtype=torch.float64), 200, 4 * V * bias_etas[:, None], seeded(30))
predicted, measured = 1 / (1 - bias_etas), x.square().mean(1) / V   # (10,) in units of V; the mean is known to be 0
bias_se = ((measured / predicted - 1) / math.sqrt(2 / count)).abs().max().item()
print(f"\nvariance of Langevin dynamics on N(0, V) against V/(1 - eta/4V): off by at most {bias_se:.1f} standard errors (good: below 3)")

# Acceptance of MALA on N(0, I) in d = 100, chains at their law from the start: 2 Phi(-sqrt(eta^3 d) / 8), theory.md 6.3.
d, mala_etas, acceptance = 100, np.linspace(0.1, 1.2, 12), []
formula = [math.erfc(math.sqrt(eta**3 * d) / 8 / math.sqrt(2)) for eta in mala_etas]
start = noise_like(torch.empty(500, d, dtype=torch.float64), seeded(32))
for eta in mala_etas:
    _, accepted = zip(*mala(lambda x: (-x.square().sum(1) / 2, -x), start, 40, eta, seeded(33)))
    acceptance.append(torch.stack(accepted).double().mean().item())
mala_gap = np.abs(np.subtract(acceptance, formula)).max()
print(f"acceptance of MALA in d = {d} against its formula: off by at most {mala_gap:.4f} (good: below 0.02)")

# Variants on a Gaussian as long (variance 1) and as thin (V) as a moon, lying askew
lengths, turn = torch.tensor([1.0, V], dtype=torch.float64), math.sqrt(0.5) * torch.tensor([[1.0, -1], [1, 1]], dtype=torch.float64)
Sigma = lambda power: turn * lengths**power @ turn.T   # (2, 2) the covariance to a power
gaussian = lambda x: (-(x @ Sigma(-1) * x).sum(1) / 2, -x @ Sigma(-1))
x0, CALLS = 2 * torch.rand(4 * args.n_samples, 2, generator=seeded(34), dtype=torch.float64) - 1, 100
fresh = [(noise_like(x0[:args.n_samples], seeded(500 + i)) * lengths.sqrt() @ turn.T).float() for i in range(8)]
print(f"\n{CALLS} score calls from U[-1, 1] on N(0, Sigma): variances divided by Sigma's, 1 (long) and {V:.3g} (thin), which noise_scale")
print("1/2 halves; share: eta divided by its limit, 4 / largest eigenvalue of M Sigma^-1")
print("method                              eta   share   accepted   long   thin   SW2/floor")
for name, power, share, noise_scale in [   # M = Sigma^power
        ("Langevin", 0, 1 / 8, 1), ("Langevin", 0, 5 / 8, 1), ("Langevin, noise_scale 1/2", 0, 1 / 8, 0.5),
        ("MALA", 0, 1 / 8, 1), ("MALA", 0, 5 / 8, 1), ("Langevin, M = Sigma", 1, 1 / 8, 1), ("MALA, M = Sigma", 1, 5 / 8, 1),
        ("Langevin, M = Sigma^-1 (003)", -1, 1 / 8, 1)]:
    eta = 4 * share * (lengths ** (1 - power)).min().item()
    log_density, y0 = whitened(gaussian, Sigma(power / 2)), x0 @ Sigma(-power / 2)
    if name.startswith("MALA"):
        states, accepts = zip(*mala(log_density, y0, CALLS - 1, eta, seeded(35)))   # the start costs a call
        y, accepted = states[-1], f"{torch.stack(accepts).double().mean():.3f}"
    else:
        *_, y = langevin(lambda y: log_density(y)[1], y0, CALLS, eta, seeded(35), noise_scale)
        accepted = "-"
    x = y @ Sigma(power / 2)
    long, thin = (x @ turn).var(0) / lengths
    ratio = np.divide(*sw2_to(fresh, x.float()))
    print(f"{name:29s} {eta:9.3g} {share:7.3f} {accepted:>10s} {long:6.2f} {thin:6.2f} {ratio:11.2f}")

# What one sigma can and cannot do: the same training and the same share of the stability limit at other sigmas.
view = [-1.6, 2.6, -1.85, 2.35]   # one square of the plane for every panel
raster = lambda n: torch.cartesian_prod(torch.linspace(*view[2:], n), torch.linspace(*view[:2], n)).flip(1)   # (n^2, 2), row by row
print("\nsigma  error: under q_sigma  on the plane  SW2/floor: to q_sigma  to the data  after Tweedie  upper moon (expected: 0.5)")
row = {}
for sigma in (0.03, 0.1, 0.3, 1.0):
    net, rows, x = model, history, chains
    if sigma != args.sigma:
        net, _, rows = train(sigma)
        x = net.sample(2 * args.n_samples, args.num_steps, args.eta / limit * 4 * (sigma**2 + TAU**2), seeded(40))
    points, clean = raster(60).to(device), tweedie(net, x)
    s = exact_score(points, sigma)
    plane = ((net.score_model(points) - s).square().sum() / s.square().sum()).sqrt().item()
    to_q, to_data, denoised = (np.divide(*sw2_to(fresh_sets(level), y)) for level, y in ((sigma, x), (0.0, x), (0.0, clean)))
    row[sigma] = x, clean, rows[-1][4], plane, to_q, to_data, denoised
    print("{:5g}{:22.3f}{:14.3f}{:23.2f}{:13.2f}{:15.2f}{:12.3f}".format(sigma, *row[sigma][2:], shares(x)[0]))

save("samples.npy", lambda file: np.save(file, samples.numpy()))

# %% Pictures
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"   # data and exact, samples and learned, noise
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 10, "savefig.dpi": 100})

def panel(ax, title, *clouds):
    """A square panel with clouds (points (n, 2), colour)."""
    for x, colour in clouds:
        ax.scatter(*x.cpu().T.numpy(), s=3, color=colour, alpha=0.5, linewidths=0)
    ax.axis(view)
    ax.set(aspect="equal", title=title, xticks=[], yticks=[])

density = exact_density(raster(100), args.sigma)[0].exp().view(100, 100).numpy()
shade = lambda ax: ax.contourf(density, 12, extent=view, cmap="Greys", vmax=1.6 * density.max())
fig, axs = plt.subplots(1, 3, figsize=(11, 4.2))
panel(axs[0], rf"training points (blue), noised with $\sigma$ = {args.sigma:g} (grey)",
      (x_data[:2000] + args.sigma * noise_like(x_data[:2000], seeded(50)), GREY), (x_data[:2000], BLUE))
points = raster(18)
exact, learned = exact_score(points, args.sigma), score(points.to(device)).cpu()
cap = exact.norm(dim=1).quantile(0.25).item()
for ax, name, v, colour in (axs[1], "exact", exact, BLUE), (axs[2], "learned", learned, ORANGE):
    v = v * (cap / v.norm(dim=1, keepdim=True)).clamp(max=1)
    shade(ax)
    ax.quiver(*points.T.numpy(), *v.T.numpy(), angles="xy", scale_units="xy", scale=5 * cap, width=0.006, color=colour)
    panel(ax, rf"{name} score $\nabla\log q_\sigma$")
fig.suptitle(f"Score over the density of the noised data (long arrows cut): relative error {score_err:.2f} under it")
save("fields.png", fig.savefig)

fig, axs = plt.subplots(3, 4, figsize=(10, 8.2))
for ax, (count, eta) in zip(axs.flat, product(STEPS, ETAS)):
    stays, report = grid[eta, count]
    panel(ax, f"{count} steps, " + rf"$\eta$ = {eta:.3g}" + f"\n{report}", (stays, ORANGE))
    ax.title.set_fontsize(8)
fig.suptitle(rf"Langevin dynamics with the learned score, started from $U[-1,1]^2$; stable below $\eta=4(\sigma^2+\tau^2)$ = {limit:.3g}")
save("grid.png", fig.savefig)

fig, axs = plt.subplots(2, 4, figsize=(11, 6.2))
for ax, below, (sigma, (x, clean, error, plane, _, to_data, denoised)) in zip(*axs, row.items()):
    panel(ax, rf"$\sigma$ = {sigma:g}: score error {error:.2f}," + f"\non the whole plane {plane:.2f}", (x[:args.n_samples], ORANGE))
    panel(below, f"SW2/floor to the data:\n{to_data:.1f} above, {denoised:.1f} denoised",
          (sample_data(args.n_samples, seeded(51)), BLUE), (clean[:args.n_samples], ORANGE))
fig.suptitle(r"One noise level: samples follow $q_\sigma$ (top); one Tweedie step $x+\sigma^2 s$ (bottom, data in blue)")
save("sigma_row.png", fig.savefig)

fig, axs = plt.subplots(1, 3, figsize=(11, 3.6))
epochs, losses, test_losses, excesses, _ = zip(*history)
axs[0].plot(epochs, losses, "o-", color=ORANGE, label="training loss")
axs[0].plot(epochs, test_losses, "s--", color=GREY, label="test loss")
axs[0].axhline(floor, color=BLUE, ls="--", label="floor: loss of the exact score")
axs[0].set(xlabel="epoch", title=f"The loss ends on its floor; excess {excesses[-1]:.2f}")
axs[1].plot(bias_etas.numpy(), predicted.numpy(), color=BLUE, label=r"$1/(1-\eta/4V)$")
axs[1].plot(bias_etas.numpy(), measured.numpy(), "o", color=ORANGE, label="measured")
axs[1].set(xlabel=r"$\eta$ / stability limit $4V$", yscale="log", title=r"Variance / $V$ of Langevin dynamics on $N(0,V)$")
axs[2].plot(mala_etas, formula, color=BLUE, label=r"$2\Phi(-\sqrt{\eta^3d}/8)$")
axs[2].plot(mala_etas, acceptance, "o", color=ORANGE, label="measured")
axs[2].set(xlabel=r"$\eta$", title=f"Acceptance of MALA on $N(0,I)$, d = {d}")
for ax in axs:
    ax.legend()
save("curves.png", fig.savefig)

fig, axs = plt.subplots(1, 3, figsize=(11, 4.2))
for ax, eta in zip(axs, ETAS):
    shade(ax)
    for walk, colour in zip(walks[eta].unbind(1), [ORANGE, BLUE, "#009E73", "#CC79A7"]):
        ax.plot(*walk.T.numpy(), "o-", markevery=[0], mec="black", lw=0.8, color=colour)   # a dot where it starts
    panel(ax, rf"$\eta$ = {eta:.3g}, {eta / limit:.3g} of the limit")
fig.suptitle("200 Langevin steps of four chains over the density of the noised data: too short, good, so long that it overshoots")
save("trajectories.png", fig.savefig)

summary = dict(seed=args.seed, sigma=args.sigma, epochs=args.epochs, num_steps=args.num_steps, eta=args.eta, score_err=round(score_err, 4),
               SW2=round(sw2, 4), floor=round(sw2_floor, 4), SW2_tweedie=round(sw2_tweedie, 4), clean_floor=round(clean_floor, 4),
               bias_se=round(bias_se, 2), mala_gap=round(float(mala_gap), 4), train_s=round(train_s, 1))
save("summary.json", lambda file: file.write_text(json.dumps({"settings": vars(args), "figures": summary}, indent=1)))
print(" ".join(f"{key}={value}" for key, value in summary.items()))

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "scikit-learn==1.9.1", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
