r"""A noise conditional score network (NCSN) on MNIST: digits grown from pure noise, on two CPU cores in eleven minutes.

Reads beside: note 001 task 3 (whole); 003 sections 4.3.2, 4.3.3; theory.md 4, 7, 8.

    python ncsn_mnist.py --data_dir FOLDER    # MNIST from IDX files; without it from openml.org, else 8x8 digits
    python ncsn_mnist.py --data digits        # the 8x8 digits of scikit-learn, no network needed: under a minute
    python ncsn_mnist.py --load out_ncsn_mnist/model.pt --outdir out_ddim --sampler ddim

A good run (--data_dir) takes 9 to 11 minutes and ends like this (2 CPU cores with bfloat16, Python 3.11, torch 2.13.0):
    data=mnist seed=0 net=resnet epochs=4.0 T=32 sampler=pc calls=64 loss_vs_linear=0.3851
    nn_samples=9.89 nn_real=8.6 train_s=482.1 sample_s=61.6
"""
# %% Imports and settings
import argparse
import gzip
import importlib.util
import json
import math
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

# Ctrl-C and a closed pipe take one line, not a traceback; also during the imports below, which take seconds
sys.excepthook = lambda kind, *rest: (print("\nstopped by", kind.__name__, file=sys.stderr)
                                      if kind in (KeyboardInterrupt, BrokenPipeError) else sys.__excepthook__(kind, *rest))

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import fetch_openml, load_digits
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--data", default="auto", choices=["auto", "mnist", "digits"], help="auto: mnist (28x28), or else digits (8x8)")
parser.add_argument("--data_dir", help="folder of MNIST's IDX files, raw or .gz (None: openml.org, kept by scikit-learn); digits need none")
parser.add_argument("--net", default="resnet", choices=["resnet", "unet"], help="resnet: after the homework's network; unet: after 003's")
parser.add_argument("--sampler", default="pc", choices=["ald", "pc", "ancestral", "ddim"], help="sampler of samples.npy")
parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: cuda where there is one, else cpu")
parser.add_argument("--outdir", default="out_ncsn_mnist", help="folder for pictures, samples.npy, model.pt and summary.json")
one_of = parser.add_mutually_exclusive_group()
one_of.add_argument("--load", help="weights (model.pt) of a run with the same data, levels and network: sample without training")
one_of.add_argument("--resume", action="store_true", help="go on from checkpoint.pt in --outdir, with the settings of that run")
NUMBERS = [   # flag, default, lowest, highest (of the flag's type), meaning
    ("T", 32, 1, 1000, "noise levels, geometric"),   # with 001's 10 the noise is halved from level to level: too coarse
    ("sigma_min", 0.02, 1e-3, 0.5, "smallest level; pixels run from -1 to 1, two grey values of mnist differ by 0.008"),
    ("sigma_max", 10.0, 1.0, 100.0, "largest level, of the order of the distance between two images"),
    ("filters", None, 1, 1024, "channels at half resolution, twice as many at a quarter (None: mnist 48, digits 32)"),
    ("blocks", 8, 1, 64, "residual blocks, at least half of them at a quarter of the resolution"),
    ("epochs", None, 1, 10**6, "passes over the training images (None: mnist 4 on a CPU, 40 on a GPU; digits 75)"),
    ("batch", None, 1, 10**5, "images per step (None: mnist 64 on a CPU, 256 on a GPU; digits 128)"),
    ("lr", 3e-3, 1e-8, 1.0, "peak of the learning rate"),   # above 001's limit of 1e-3: after equal time 4e-3 is ahead of 2e-3
    ("K", 5, 1, 10**5, "Langevin steps per level (ald)"),
    ("kappa", 0.4, 1e-4, 1.9999, "Langevin step in units of sigma^2, eta = 2 kappa sigma^2 (ald, pc); diverges from 2 on"),   # 0.15: worse
    ("n_samples", None, 20, 10**6, "images in samples.npy (None: mnist 2000, digits 500)"),
    ("seed", 0, 0, 2**32 - 1, "seed of everything random"),
]
for flag, default, low, high, meaning in NUMBERS:
    parser.add_argument(f"--{flag}", type=type(high), default=default, help=f"{meaning} [{low:g} ... {high:g}]")
args = parser.parse_args([] if "kernel_launcher" in sys.argv[0] else None)   # a notebook's argv belongs to its kernel
for flag, default, low, high, meaning in NUMBERS:
    value = getattr(args, flag)
    if value is not None and not low <= value <= high:   # refuses nan as well
        parser.error(f"argument --{flag}: {value:g} is outside [{low:g}, {high:g}]")
if args.resume and not Path(args.outdir, "checkpoint.pt").is_file():
    parser.error(f"argument --resume: there is no checkpoint.pt in {args.outdir!r}")
available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
if args.device != "auto" and not available[args.device]:
    parser.error(f"argument --device: no {args.device} on this machine")
device = torch.device(args.device if args.device != "auto" else "cuda" if available["cuda"] else "cpu")
cpu_bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))   # elsewhere emulated and slow
bf16 = cpu_bf16 if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
torch.manual_seed(args.seed)

# %% Data: images (N, 1, H, W) in [-1, 1]
def read_idx(folder, name):
    """Images (N, 28, 28), uint8, of an IDX file: 16 bytes of header (2051, N, rows, columns), then the pixels."""
    places = [Path(folder, sub, name + end) for sub in ("", "MNIST/raw") for end in ("", ".gz")]   # torchvision adds MNIST/raw
    path = next((place for place in places if place.is_file()), places[0])
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header = np.frombuffer(raw[:16].ljust(16), ">i4").tolist()
    if [header[0], *header[2:]] != [2051, 28, 28] or header[1] < 1 or len(raw) != 16 + header[1] * 784:
        raise ValueError(f"{path} is not a whole file of 28x28 images: {len(raw)} bytes, header {header}")
    return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)

def load_mnist(folder):
    """Training and held-out images, uint8 (60000, 28, 28) and (10000, 28, 28)."""
    if folder is not None:
        return [read_idx(folder, name) for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")]
    socket.setdefaulttimeout(60)
    print("fetching MNIST from openml.org: 15 MB the first time, and reading it takes 30 s and 1.2 GB of memory without pandas ...")
    x = fetch_openml("mnist_784", version=1, as_frame=False, parser="auto" if importlib.util.find_spec("pandas") else "liac-arff").data
    return np.split(x.astype(np.uint8).reshape(70000, 28, 28), [60000])

data = "digits" if args.data == "digits" else "mnist"
try:
    images = load_mnist(args.data_dir) if data == "mnist" else None
except Exception as error:   # no network, a proxy's page, a full disk, a broken file, ...
    reason = f"cannot read MNIST from {args.data_dir or 'openml.org'}: {type(error).__name__}: {error}".splitlines()[0]
    if args.data_dir is not None or args.data == "mnist":
        parser.error(f"argument --data_dir: {reason}; give a folder with its whole IDX files")
    print(f"!!! {reason}: going on with scikit-learn's 8x8 digits. For MNIST give --data_dir FOLDER with its IDX files. !!!")
    data = "digits"
if data == "digits":   # in an order of their own: the file is sorted by writer
    images = np.split(load_digits().images[np.random.default_rng(0).permutation(1797)], [1500])
x_data, x_test = (torch.tensor(x / np.float32(8 if data == "digits" else 127.5) - 1, dtype=torch.float32)[:, None] for x in images)
chosen = (32, 75, 128, 500) if data == "digits" else (48, 4, 64, 2000) if device.type == "cpu" else (48, 40, 256, 2000)
vars(args).update({flag: value for flag, value in zip(["filters", "epochs", "batch", "n_samples"], chosen) if vars(args)[flag] is None})
if args.batch > len(x_data):
    parser.error(f"argument --batch: {args.batch} is more than the {len(x_data)} training images; give a smaller --batch")
try:
    Path(args.outdir).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.outdir).close()   # better to learn it now than after the training
except OSError as error:
    parser.error(f"argument --outdir: cannot write to {args.outdir!r} ({error.strerror})")
input_shape, mean, sigma_data = tuple(x_data.shape[1:]), x_data.mean(), x_data.std()
levels = np.geomspace(args.sigma_max, args.sigma_min, args.T).tolist()   # descending; 001's text counts upwards, its code down
print(f"{data}: images {tuple(x_data.shape)}, mean {mean:.3f}, std {sigma_data:.3f}, on {device} in {'bfloat16' if bf16 else 'float32'}")

# %% Model
def small(layer):
    """A last convolution that starts small, not at 0: the level has to change the answer of a fresh network, as 001's test asks."""
    layer.weight.data.mul_(0.1)
    nn.init.zeros_(layer.bias)
    return layer

class ConditionedResnetBlock(nn.Module):
    """The homework's block, (B, dim, H, W), level index (B,) -> (B, dim, H, W), normalised; the level scales and shifts."""
    def __init__(self, dim, num_embeddings):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)   # one group: 8 would take 1.4 times as long on a CPU
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), small(nn.Conv2d(dim, dim, 3, padding=1))
        self.embedding = nn.Embedding(num_embeddings, 2 * dim)
        # slow waves of the index: neighbouring levels start alike, so that what one learns helps the next
        angles = torch.linspace(0, 6, num_embeddings)[:, None] * torch.linspace(0.125, 1, 8)   # (levels, 8)
        self.embedding.weight.data = 0.07 * torch.cat([angles.sin(), angles.cos()], dim=1) @ torch.randn(16, 2 * dim)

    def forward(self, x, y):
        scale, shift = self.embedding(y)[:, :, None, None].to(x.dtype).chunk(2, dim=1)   # (B, dim, 1, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))

class ConditionedSimpleResnet(nn.Module):
    """The homework's network, (B, in_channels, H, W), (B,) -> (B, out_channels, H, W); H and W divisible by 4."""
    def __init__(self, in_channels, out_channels, n_filters, n_blocks, num_embeddings, block=ConditionedResnetBlock):
        super().__init__()
        outer, wide = n_blocks // 4, 2 * n_filters   # half of the blocks work on 7x7 pixels and see a whole digit; 001's at most 19 of 28
        blocks = lambda dim, n: nn.ModuleList([block(dim, num_embeddings) for _ in range(n)])
        self.first_block = nn.Conv2d(4 * in_channels, n_filters, 3, padding=1)
        self.before, self.middle, self.after = blocks(n_filters, outer), blocks(wide, n_blocks - 2 * outer), blocks(n_filters, outer)
        self.down, self.up = nn.Conv2d(n_filters, wide, 2, stride=2), nn.Conv2d(wide, 4 * n_filters, 1)
        self.merge = None   # x and what comes back from below are added (UNet: concatenated and convolved)
        self.last_block = nn.Sequential(nn.GroupNorm(1, n_filters), nn.SiLU(), small(nn.Conv2d(n_filters, 4 * out_channels, 3, padding=1)))

    def forward(self, x, y):
        x = self.first_block(F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))   # (B, n_filters, H/2, W/2)
        for block in self.before:
            x = block(x, y)
        h = self.down(x)                        # (B, 2 n_filters, H/4, W/4)
        for block in self.middle:
            h = block(h, y)
        h = F.pixel_shuffle(self.up(h), 2).contiguous(memory_format=torch.channels_last)   # (B, n_filters, H/2, W/2)
        x = x + h if self.merge is None else self.merge(torch.cat([x, h], dim=1))
        for block in self.after:
            x = block(x, y)
        return F.pixel_shuffle(self.last_block(x), 2)

class ConditionalInstanceNorm2d(nn.Module):
    """(B, C, H, W), embedding (B, E): each channel to mean 0, variance 1, then FiLM, which starts at scale 1, shift 0."""
    def __init__(self, channels, embed_dim):
        super().__init__()
        self.film = nn.Linear(embed_dim, 2 * channels)
        nn.init.zeros_(self.film.weight)   # 003 writes the scale's 1 into columns: they belong to the inputs, the features are rows
        self.film.bias.data = torch.cat([torch.ones(channels), torch.zeros(channels)])

    def forward(self, x, embedding):
        scale, shift = self.film(embedding)[:, :, None, None].to(x.dtype).chunk(2, dim=1)   # (B, C, 1, 1)
        return torch.addcmul(shift, F.instance_norm(x), scale)

class ResBlock(nn.Module):
    """003's residual block: (B, dim, H, W), embedding (B, E) -> (B, dim, H, W)."""
    def __init__(self, dim, embed_dim):
        super().__init__()
        self.norm1, self.norm2 = ConditionalInstanceNorm2d(dim, embed_dim), ConditionalInstanceNorm2d(dim, embed_dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 3, padding=1), small(nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x, embedding)))
        return x + self.conv2(F.silu(self.norm2(h, embedding)))

class UNet(ConditionedSimpleResnet):
    """003's U-Net for 28 pixels, (B, C, H, W), level index (B,) -> (B, C, H, W): its blocks, its embedding, one skip."""
    def __init__(self, channels, dim, n_blocks, sigmas, embed_dim=64):
        super().__init__(channels, channels, dim, n_blocks, embed_dim, ResBlock)
        angles = sigmas.log()[:, None] * torch.linspace(0.125, 2, 16)   # (T, 16); in 003's text sin(2^k pi sigma): 2, 4, 10 are one
        self.register_buffer("waves", torch.cat([angles.sin(), angles.cos()], dim=1))   # (T, 32)
        self.embed = nn.Sequential(nn.Linear(32, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim), nn.SiLU())
        self.merge = nn.Conv2d(2 * dim, dim, 1)   # 003's skips do not fit their convolutions

    def forward(self, x, y):
        return super().forward(x, self.embed(self.waves[y]))

class PreconditionedScore(nn.Module):
    """score_model(x, level index) -> score, from a network that sees and answers unit variance at every level (F in theory.md 7.1)."""
    def __init__(self, net, sigmas, mean, sigma_data, bf16=False):
        super().__init__()
        self.net, self.bf16 = net, bf16
        for name, value in {"sigmas": sigmas, "mean": mean, "sigma_data": sigma_data}.items():
            self.register_buffer(name, value.clone())

    def forward(self, x, y):
        x, sigma = x - self.mean, self.sigmas[y][:, None, None, None]   # (B, 1, 1, 1)
        total = (sigma**2 + self.sigma_data**2).sqrt()                  # standard deviation of the noisy data
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            answer = self.net(x / total, y).float()
        return -x / total**2 + self.sigma_data * answer / (sigma * total)

# %% Loss
class NoiseConditionedScoreNetwork(nn.Module):
    """The homework's class. score_model(x, level index (B,)) -> score, both of shape (B, *input_shape); sigmas in any order."""
    def __init__(self, score_model, input_shape, sigmas, weights=None, probs=None):
        super().__init__()
        self.score_model, self.input_shape = score_model, tuple(input_shape)
        sigmas = torch.tensor(sorted(map(float, sigmas), reverse=True))   # index 0 is the largest
        self.register_buffer("sigmas", sigmas)   # 001's plain attribute is neither saved nor moved by .to()
        self.register_buffer("weights", (sigmas / sigmas[0]) ** 2 if weights is None else weights, persistent=False)   # (T,) descending
        self.register_buffer("probs", torch.ones_like(sigmas) if probs is None else probs, persistent=False)   # (T,) descending

    device = property(lambda self: self.sigmas.device)   # 001 has it, too

    def forward(self, x):
        """weight_t (s(x + sigma_t eps, t) + eps/sigma_t)^2, a term for every element of x."""
        t = torch.multinomial(self.probs, len(x), replacement=True)                                   # (B,)
        sigma, weight = (v[t].view(-1, *[1] * (x.dim() - 1)) for v in (self.sigmas, self.weights))   # (B, 1, ...)
        eps = torch.randn_like(x)
        return weight * (self.score_model(x + sigma * eps, t) + eps / sigma) ** 2

    def loss(self, x):
        return {"total_loss": self(x).mean(dim=0).sum()}

    @torch.no_grad()
    def annealed_langevin_dynamics(self, x, num_steps, eps):
        """At every level num_steps of x + (eta/2) s + sqrt(eta) z, with eta = eps sigma_t^2/sigma_max^2."""
        for t, sigma in enumerate(self.sigmas.tolist()):
            eta, y = eps * (sigma / self.sigmas[0].item()) ** 2, torch.full((len(x),), t, device=self.device)
            for _ in range(num_steps):
                x = x + eta / 2 * self.score_model(x, y) + math.sqrt(eta) * torch.randn_like(x)
        return x

    @torch.no_grad()
    def sample(self, num_samples=64, num_steps=10, eps=None, kappa=0.4):
        """From N(0, sigma_max^2 I), as 001's text has it (its code: U[-1, 1]), down the levels, and one denoising step."""
        sigmas = self.sigmas.tolist()
        eps = 2 * kappa * sigmas[0] ** 2 if eps is None else eps   # a step of kappa sigma^2; 001's 0.1 suits sigma_max near 1 only
        x = sigmas[0] * torch.randn(num_samples, *self.input_shape, device=self.device)
        x = self.annealed_langevin_dynamics(x, num_steps, eps)
        return x + sigmas[-1] ** 2 * self.score_model(x, torch.full((num_samples,), len(sigmas) - 1, device=self.device))

sigmas = torch.tensor(levels)   # (T,)
# With these weights the loss is the mean square error of the network's own answer (theory.md 7.1's F), so all levels weigh alike.
# The levels are drawn around sigma = 0.4 (log-normal, width 1.2), where a digit takes its shape. Frechet distance of the digits
# after one epoch 10.7; with levels drawn uniformly 12.7; with 001's weight, too, 17.9 (README.md says how it is measured).
weights = (sigmas**2 + sigma_data**2) * (sigmas / sigma_data) ** 2 / x_data[0].numel()
probs = torch.exp(-0.5 * ((sigmas / 0.4).log() / 1.2) ** 2)
net = UNet(1, args.filters, args.blocks, sigmas) if args.net == "unet" else ConditionedSimpleResnet(1, 1, args.filters, args.blocks, args.T)
score_model = PreconditionedScore(net.to(memory_format=torch.channels_last), sigmas, mean, sigma_data, bf16)
model = NoiseConditionedScoreNetwork(score_model, input_shape, levels, weights, probs).to(device)

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

@torch.no_grad()
def held_out_loss(net):
    """The training loss on 512 held-out images, with always the same levels and noise."""
    with torch.random.fork_rng(device_type="mps" if device.type == "mps" else "cuda"):   # gives torch's own generators their state back
        torch.manual_seed(args.seed)
        return net.loss(x_test[:512].to(device))["total_loss"].item()

SHAPING = ["net", "T", "sigma_min", "sigma_max", "filters", "blocks", "epochs", "batch", "lr", "seed"]   # resuming keeps these
settings = {"data": data, "device": device.type} | {name: getattr(args, name) for name in SHAPING}
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
# The decay grows as (1 + n)/(10 + n) to 0.998: at a constant one the average of a short run is still the random start.
ema = AveragedModel(model, avg_fn=lambda old, new, n: torch.lerp(old, new, 1 - min(0.998, (1 + n.item()) / (10 + n.item()))))
rng = torch if device.type == "cpu" else getattr(torch, device.type)   # whose generator the training uses
parts, per_epoch = {"model": model, "ema": ema, "optimizer": optimizer}, len(x_data) // args.batch
steps, step, history, order = 0 if args.load else args.epochs * per_epoch, 0, [], None
if args.load or args.resume:
    flag, path = ("load", args.load) if args.load else ("resume", Path(args.outdir, "checkpoint.pt"))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in state.get("settings", {}).items():
            if value != settings[name]:
                parser.error(f"argument --{flag}: the run in {path} has --{name} {value}, this one {settings[name]}")
        for name in ["model"] if args.load else parts:   # model.pt holds the averaged weights alone
            parts[name].load_state_dict(state if args.load else state[name])
    except Exception as error:   # a file cut short raises half a dozen kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        parser.error(f"argument --{flag}: {path} is missing, not whole or of another --data, --net, --filters, --blocks or --T ({reason})")
    if not (torch.allclose(model.sigmas.cpu(), sigmas) and torch.allclose(score_model.mean.cpu(), mean, atol=1e-4)):
        parser.error(f"argument --{flag}: {path} was trained on other --data, --sigma_min or --sigma_max")
if args.resume:
    step, history = state["step"], state["history"]
    rng.set_rng_state(state["rng"])
# The first Ctrl-C leaves a mark, so that the step under way ends, and puts the usual handler back for a second one.
interrupted, usual = [], signal.getsignal(signal.SIGINT)
signal.signal(signal.SIGINT, lambda *_: interrupted.append(signal.signal(signal.SIGINT, usual)))
x_data, started = x_data.to(device), time.time()
with tqdm(total=steps * args.batch, initial=step * args.batch, desc="training", unit="img", mininterval=1, disable=not steps) as bar:
    while step < steps and not interrupted:
        epoch, i = divmod(step, per_epoch)
        if i == 0 or order is None:   # the order of an epoch follows from its number: nothing to store
            order = torch.randperm(len(x_data), generator=seeded(1000 + epoch)).to(device)
        rise, fall = min(1, (step + 1) / (0.03 * steps)), 0.5 * (1 + math.cos(math.pi * step / steps))   # warm-up, half a cosine
        optimizer.param_groups[0]["lr"] = args.lr * rise * fall
        loss = model.loss(x_data[order[i * args.batch:(i + 1) * args.batch]])["total_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_parameters(model)
        step += 1
        bar.update(args.batch)
        if step % max(1, steps // 40) == 0 or step == steps or interrupted:
            history.append((step, loss.item(), held_out_loss(ema.module)))
            bar.set_postfix_str(f"loss {history[-1][1]:.4f}, held-out {history[-1][2]:.4f}")
            if not math.isfinite(history[-1][2]):
                sys.exit(f"diverged at step {step}: held-out loss {history[-1][2]}; try a --lr below {args.lr:g}")
            state = {"settings": settings, "step": step, "history": history, "rng": rng.get_rng_state()}
            save("checkpoint.pt", lambda file: torch.save(state | {name: part.state_dict() for name, part in parts.items()}, file))
signal.signal(signal.SIGINT, usual)
train_s = time.time() - started
if interrupted:
    print(f"Ctrl-C after {step} of {steps} steps: sampling from what there is. The same command with --resume goes on.")
if not args.load:
    model.load_state_dict(ema.module.state_dict())   # from here on the averaged weights are the model
    save("model.pt", lambda file: torch.save(model.state_dict(), file))

# %% Sampling
@torch.no_grad()
def score(x, sigma):
    """Learned grad log q_sigma(x), (B, 1, H, W), at the level nearest to sigma (a float or (B,)) in log sigma."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
    if not ((0.999 * levels[-1] <= sigma) & (sigma <= 1.001 * levels[0])).all():
        raise ValueError(f"sigma is outside the trained range [{levels[-1]:g}, {levels[0]:g}]")
    return score_model(x, (sigma[:, None] / model.sigmas).log().abs().argmin(dim=1))

def noise_like(x, generator):
    """z ~ N(0, I), drawn on the CPU so that every device gets the same."""
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

# name: (rho of the steps between levels, Langevin steps at each level)
SAMPLERS = {"ald": (None, args.K), "pc": (lambda ratio: ratio, 1), "ancestral": (lambda ratio: ratio, 0), "ddim": (lambda ratio: 1.0, 0)}
calls = lambda name, n=args.T: n * SAMPLERS[name][1] + (n if SAMPLERS[name][0] else 1)   # of the network, on n levels

def run_sampler(name, x, sigmas, generator, bar, kappa=args.kappa):
    """x with noise sigmas[0] -> its states at sigmas + [0]: K Langevin steps at each level, then one to the next level.

        x <- x + kappa sigma^2 s + sqrt(2 kappa) sigma z                                    Langevin, eta = 2 kappa sigma^2
        x <- x + (1 - rho sigma_next/sigma) sigma^2 s + sigma_next sqrt(1 - rho^2) z        to sigma_next; theory.md 7.3

    rho = 1: DDIM. rho = sigma_next/sigma: ancestral = DDPM, and with K > 0 predictor-corrector (003 adds noise sigma_next
    here: its variance grows with T). None, no steps between levels: annealed Langevin. The step to 0 denoises in all.
    """
    path, (rho, K) = [x], SAMPLERS[name]
    for sigma, sigma_next in zip(sigmas, sigmas[1:] + [0.0]):
        for _ in range(K):
            x = x + kappa * sigma**2 * score(x, sigma) + math.sqrt(2 * kappa) * sigma * noise_like(x, generator)
            bar.update()
        if rho or not sigma_next:
            r = rho(sigma_next / sigma) if rho else 0.0
            x = x + (1 - r * sigma_next / sigma) * sigma**2 * score(x, sigma) + sigma_next * math.sqrt(1 - r**2) * noise_like(x, generator)
            bar.update()
        path.append(x)
    return path

def generate(name, x, start=0, seed=200):
    """Images x (n, 1, H, W) with noise of level `start` -> states; the last one is n clean images, the others are of the first 250."""
    chunks, generator = x.to(device).split(250), seeded(seed)
    with tqdm(total=len(chunks) * calls(name, args.T - start), desc=f"sampling {name}", unit="call", leave=False) as bar:
        path = run_sampler(name, chunks[0], levels[start:], generator, bar)
        ends = [path[-1]] + [run_sampler(name, chunk, levels[start:], generator, bar)[-1] for chunk in chunks[1:]]
    return [state.cpu() for state in path[:-1]] + [torch.cat(ends).cpu()]

def slerp(a, b, w):
    """From a (w = 0) to b (w = 1) on an arc: noise keeps its norm. One angle for the whole image; 003 takes one per row."""
    angle = torch.acos((a.flatten() @ b.flatten() / (a.norm() * b.norm())).clamp(-1, 1))
    if angle.sin() < 1e-4:   # parallel: 003 divides by 0
        return torch.lerp(a, b, w)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / angle.sin()

started, start_noise = time.time(), torch.randn(args.n_samples, *input_shape, generator=seeded(100))
pure_noise = mean + math.hypot(levels[0], sigma_data) * start_noise   # q at sigma_max is almost this Gaussian
path = generate(args.sampler, pure_noise)
sample_s = time.time() - started
samples = path[-1].clamp(-1, 1)   # (n_samples, 1, H, W)
if not torch.isfinite(path[-1]).all():   # clamp has made 1 of infinity
    sys.exit(f"sampler {args.sampler} diverged: no usable score at some level; train longer")
save("samples.npy", lambda file: np.save(file, samples.numpy()))

# %% Checks: no exact score is known here, so the best linear denoiser stands beside the network, held-out images beside the samples
def level_losses(x):
    """sigma^2/2 E||s + eps/sigma||^2 per level (T,) of the network and of the best linear denoiser, on images x."""
    losses, generator = [], seeded(1)
    for sigma in levels:
        eps = noise_like(x, generator)
        losses.append(0.5 * (sigma * score(x + sigma * eps, sigma) + eps).square().flatten(1).sum(1).mean().item())
    variance, axes = torch.linalg.eigh(torch.cov(x_data.flatten(1).T).cpu())
    power = ((x - x_data.mean(0)).flatten(1).cpu() @ axes).square().mean(0)   # (d,) of x along the axes of the training data
    gain = variance.clamp(min=0) / (variance.clamp(min=0) + sigmas[:, None] ** 2)   # (T, d): D(x) = mean + gain (x - mean)
    linear = 0.5 * (((1 - gain) ** 2 * power).sum(1) / sigmas**2 + (gain**2).sum(1))
    return np.array(losses), linear.numpy()

learned, linear = level_losses(x_test[:250].to(device))
print("\nsigma: loss sigma^2/2 E||s + eps/sigma||^2 on 250 held-out images, network / best linear denoiser (good: below it)")
entries = [f"{s:6.3g}: {a:5.1f} /{b:6.1f}" for s, a, b in zip(levels, learned, linear)]
print("\n".join("   ".join(entries[i:i + 5]) for i in range(0, len(entries), 5)))

nearest = lambda x, k=1: torch.cdist(x.flatten(1).to(device), x_data.flatten(1)).topk(k, largest=False)   # distances, indices (n, k)
nn_samples, nn_real = (nearest(x[:200])[0].median().item() for x in (samples, x_test))
print(f"median distance to the nearest training image: samples {nn_samples:.2f}, held-out images {nn_real:.2f} (good: alike; a copy has 0)")

# %% Pictures
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"   # data and exact, samples and learned, noise
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 10, "savefig.dpi": 100})

def picture(name, size, shape, *panels):
    """Panels of images laid out in a grid: (images (rows, columns, 1, H, W), title, names of the columns, names of the rows)."""
    fig, axs = plt.subplots(*shape, figsize=size, squeeze=False)
    for ax, (images, title, columns, lines) in zip(axs.flat, panels):
        x = F.pad(images.clamp(-1, 1)[:, :, 0], (0, 1, 0, 1), value=-1.0)   # (rows, columns, H + 1, W + 1)
        ax.imshow(x.transpose(1, 2).flatten(2).flatten(0, 1).numpy(), cmap="gray", vmin=-1, vmax=1)
        ax.set(title=title, xticks=(np.arange(len(columns)) + 0.5) * x.shape[3], xticklabels=columns)
        ax.set(yticks=(np.arange(len(lines)) + 0.5) * x.shape[2], yticklabels=lines)
    save(name, fig.savefig)

level_names = lambda which: [rf"$\sigma$={(levels + [0.0])[t]:.2g}" for t in which]
side = min(10, math.isqrt(args.n_samples))
grids = [x[:side**2].unflatten(0, (side, side)) for x in (samples, x_test)]
picture("samples.png", (10, 5.3), (1, 2), (grids[0], f"Samples ({args.sampler})", [], []), (grids[1], "Held-out real digits", [], []))

shown = np.linspace(0, args.T, 10).round().astype(int)
states = torch.stack([path[t][:3] / max(1, (levels + [0])[t]) for t in shown], dim=1)   # (3, 10, 1, H, W)
picture("annealing.png", (10, 3.6), (1, 1), (states, r"From noise to digits ($x/\sigma$ where $\sigma$ > 1)", level_names(shown), []))
relatives = torch.cat([samples[None, :10], x_data[nearest(samples[:10], 3)[1].T].cpu()])   # (4, 10, 1, H, W)
picture("neighbours.png", (10, 4.4), (1, 1), (relatives, "Samples over their nearest training images", [], ["sample", "1st", "2nd", "3rd"]))

few, z, middle = x_test[[2, 3, 7, 18]], start_noise[:4], int(np.abs(np.log(np.array(levels) / 0.7)).argmin())
mixed = lambda mix, v: torch.stack([mix(v[i], v[i + 1], w) for i in (0, 2) for w in np.linspace(0, 1, 8).tolist()])   # (16, 1, H, W)
between = generate("ddim", mixed(torch.lerp, few) + levels[middle] * mixed(slerp, z), middle)[-1].unflatten(0, (2, 8))
between = torch.cat([few[0::2, None], between, few[1::2, None]], dim=1)   # (2, 10, 1, H, W)
starts = np.linspace(args.T * 4 // 5, args.T // 5, 9).astype(int)
again = [generate(args.sampler, few[:2] + levels[t] * z[:2], t)[-1] for t in starts]   # 003 leaves the noise out
picture("interpolation.png", (10, 5.2), (2, 1),
        (between, rf"Between two real digits (at the ends), mixed at $\sigma$ = {levels[middle]:.2g}, denoised by DDIM", [], []),
        (torch.stack([few[:2], *again], dim=1), "A real digit, noised to the level below and brought back: more noise, more freedom",
         ["real", *level_names(starts)], []))

rows = {f"{name}, {calls(name)}": (path if name == args.sampler else generate(name, pure_noise[:20]))[-1][:20] for name in SAMPLERS}
picture("samplers.png", (10, 3), (1, 1), (torch.stack([*rows.values()]), "One network, four samplers, calls of the network", [], [*rows]))

fig, axs = plt.subplots(1, 2, figsize=(10, 3.6))
log = np.array(history).reshape(-1, 3)   # step, loss, held-out loss
axs[0].semilogy(log[:, 0], log[:, 1], ".", color=GREY, label="one training batch")
axs[0].semilogy(log[:, 0], log[:, 2], color=ORANGE, label="held-out images, averaged weights")
axs[0].set(xlabel="step", title="Training loss (1 is that of one Gaussian's score)" if history else "Loaded weights: nothing was trained")
axs[1].loglog(levels, linear, color=BLUE, label="best linear denoiser")
axs[1].loglog(levels, learned, "o-", ms=3, color=ORANGE, label="network")
axs[1].set(xlabel=r"$\sigma$", title=r"Held-out $\frac{\sigma^2}{2}E\|s+\varepsilon/\sigma\|^2$: how far the network gets below linear")
for ax in axs:
    ax.legend()
save("training.png", fig.savefig)

summary = dict(data=data, seed=args.seed, net=args.net, epochs=round(step / per_epoch, 2), T=args.T, sampler=args.sampler,
               calls=calls(args.sampler), loss_vs_linear=round(float(np.exp(np.log(learned / linear).mean())), 4),
               nn_samples=round(nn_samples, 2), nn_real=round(nn_real, 2), train_s=round(train_s, 1), sample_s=round(sample_s, 1))
record = {"settings": vars(args), "levels": levels, "network": learned.tolist(), "linear": linear.tolist(), "figures": summary}
save("summary.json", lambda file: file.write_text(json.dumps(record, indent=1)))
print(" ".join(f"{key}={value}" for key, value in summary.items()))

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "scikit-learn==1.9.1", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///
