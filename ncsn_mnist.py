"""A noise conditional score network (NCSN) on MNIST: digits grown from pure noise.

    noisy data   q_sigma, the density of x + sigma eps, where x is an image and eps ~ N(0, I)
    training     minimise the mean of weight(sigma) |s(x + sigma eps, sigma) + eps/sigma|^2 over
                 images, noise and levels sigma; the best s is the score, grad log q_sigma
    sampling     at each level, from sigma_max down: take a Langevin step, guess the clean image
                 x + sigma^2 s, put less noise back; at the last level put none back
                 (predictor-corrector, the default; the homework's annealed Langevin dynamics,
                 with a last denoising step, is --sampler ald)

    python ncsn_mnist.py --data_dir FOLDER       # MNIST's files; look at out_ncsn_mnist/samples.png
    python ncsn_mnist.py                         # MNIST from openml.org, or else 8x8 digits
    python ncsn_mnist.py --data digits           # scikit-learn's 8x8 digits, about a minute
    python ncsn_mnist.py --load out_ncsn_mnist/model.pt --sampler ddim --outdir out_ddim
    python ncsn_mnist.py --data_dir FOLDER --labels          # digits on demand, 0 1 2 ... 9 0 1 ...
    python ncsn_mnist.py --load out_ncsn_mnist/model.pt --digit 7 --outdir out_7       # then sevens

(With --load give the --data or --data_dir of that run, too.)

The run on MNIST takes about 20 minutes on two cores (an estimate; Python 3.11, torch 2.13.0), most
of them for training. It is shorter on processors that know bfloat16. Its last line:

    data=mnist ... calls=64 loss_vs_linear=0.387 nn_samples=9.23 nn_real=8.6 train_s=...

loss_vs_linear is the error on held-out images divided by that of the best linear denoiser, a
(geometric) mean over the levels: 2.2 before training, when all pixels are shrunk alike; 1 would be
as good as linear. nn_samples is the median distance of the samples to their nearest neighbour among
the training images, nn_real that of held-out images: good is within a fifth of nn_real, copies
would have 0. With --labels also read_as_asked, the share of samples whose nearest training image
shows the digit that was asked for, beside real_as_labelled, the same of held-out images and their
labels: good is 0.95.

Read beside: notes 001 task 3 (the homework); 003 (a textbook chapter) sections 4.3.2 and 4.3.3;
theory.md sections 4, 7 and 8.
"""
# %% Settings
import argparse
import gzip
import importlib.util
import json
import math
import os
import socket
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.animation import PillowWriter
from sklearn.datasets import fetch_openml, load_digits
from torch.optim.swa_utils import AveragedModel
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


# The homework wants fewer than 8 blocks, a rate of at most 1e-3 and at most 30 epochs. We have 8
# blocks, but on fewer pixels, and higher rates, which need only 4 epochs. (On a GPU we take 40.)
parser = argparse.ArgumentParser(description="A noise conditional score network on MNIST",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--data", default="auto", choices=["auto", "mnist", "digits"],
                    help="auto: mnist (28x28), or else digits (8x8)")
parser.add_argument("--data_dir",
                    help="folder of MNIST's IDX files, raw or .gz (None: from openml.org)")
parser.add_argument("--labels", action="store_true",
                    help="train with labels of the digits; sample i is of digit i %% 10")
parser.add_argument("--net", default="resnet", choices=["resnet", "unet"],
                    help="resnet: after 001's network; unet: after 003's")
parser.add_argument("--filters", type=number(int, 1, 1024),
                    help="channels at half resolution, twice as many at a quarter "
                         "(None: mnist 48, digits 32)")
parser.add_argument("--blocks", type=number(int, 1, 64), default=8,
                    help="residual blocks, at least half of them at a quarter of the resolution")
parser.add_argument("--T", type=number(int, 2, 1000), default=32, help="noise levels, geometric")
parser.add_argument("--sigma_min", type=number(float, 1e-3, 0.5), default=0.02,
                    help="smallest level; pixels run from -1 to 1")
parser.add_argument("--sigma_max", type=number(float, 1, 100), default=10,
                    help="largest level; its noise hides every image")
parser.add_argument("--epochs", type=number(int, 1, 10**6),
                    help="passes over the images (None: mnist 4, on a GPU 40; digits 60)")
parser.add_argument("--batch", type=number(int, 1, 10**5),
                    help="images in a step (None: mnist 64, on a GPU 256; digits 128)")
parser.add_argument("--lr", type=number(float, 1e-8, 1), default=3e-3,
                    help="peak of AdamW's rate, for all but the inner convolutions")
parser.add_argument("--lr_muon", type=number(float, 1e-8, 1), default=0.02,
                    help="peak of Muon's rate, for the inner convolutions")
parser.add_argument("--sampler", default="pc", help="which one makes samples.npy",
                    choices=["ancestral", "ddim", "ald", "pc"])
parser.add_argument("--n_samples", type=number(int, 24, 10**6),
                    help="images to generate (None: mnist 2000, digits 500)")
parser.add_argument("--K", type=number(int, 1, 10**5), default=5, help="steps a level (ald)")
parser.add_argument("--kappa", type=number(float, 1e-4, 1.9999), default=0.4,
                    help="Langevin step in units of 2 sigma^2 (ald, pc), below 2")
parser.add_argument("--digit", type=number(int, 0, 9),
                    help="all samples show this one (needs labels)")
parser.add_argument("--guidance", type=number(float, 0, 100),
                    help="w: what the label changes in the score is taken 1 + w times "
                         "(needs labels; None: 0.2)")
parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"],
                    help="auto: cuda where there is one")
parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of all randomness")
parser.add_argument("--load", help="weights (model.pt) of a run with the same data, levels and "
                                   "network: sample without training")
parser.add_argument("--resume", action="store_true",
                    help="go on from checkpoint.pt in --outdir; give the settings of that run")
parser.add_argument("--outdir", default="out_ncsn_mnist", help="folder for pictures and results")
in_notebook = "kernel_launcher" in sys.argv[0]      # there the command line is the kernel's
args = parser.parse_args([] if in_notebook else None)  # in a notebook, settings go into []
checkpoint_path = os.path.join(args.outdir, "checkpoint.pt")
for name in ["digit", "guidance"]:
    value = getattr(args, name)
    if value is not None and not (args.labels or args.load):
        parser.error(f"argument --{name}: {value} needs --labels, or --load and weights that know "
                     "labels")
if args.load and args.resume:
    parser.error("argument --load: not allowed with argument --resume")
if args.load is not None and not os.path.isfile(args.load):
    parser.error(f"argument --load: there is no file {args.load}")
if args.resume and not os.path.isfile(checkpoint_path):
    parser.error(f"argument --resume: there is no checkpoint.pt in {args.outdir}")
if args.device == "cuda" and not torch.cuda.is_available():
    parser.error("argument --device: there is no cuda on this machine")
device = torch.device("cpu")
if args.device != "cpu" and torch.cuda.is_available():
    device = torch.device("cuda")
torch.manual_seed(args.seed)

# Half as many bits make training twice as fast, where the processor can multiply such numbers.
if device.type == "cuda":
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
else:
    capabilities = torch.cpu.get_capabilities()
    bf16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


# %% Data
# 60000 images of handwritten digits, 28x28 pixels, as numbers from -1 (black) to 1 (white), and
# 10000 that are held out from training. With --labels also which digits they show.
def read_idx(folder, name, shape):
    """The numbers (N, *shape), uint8, of one of MNIST's files.  ValueError if it is not whole.

    shape: (28, 28) in a file of images, () in one of labels. A file begins with whole numbers of
    four bytes: 2051 for images or 2049 for labels, then N, then the shape. Then comes the rest.
    """
    path = os.path.join(folder, name)
    # torchvision puts them into MNIST/raw.
    for place in [name, name + ".gz", f"MNIST/raw/{name}", f"MNIST/raw/{name}.gz"]:
        if os.path.isfile(os.path.join(folder, place)):
            path = os.path.join(folder, place)
            break
    with open(path, "rb") as file:
        raw = file.read()
    if path.endswith(".gz"):
        raw = gzip.decompress(raw)
    start = 4 * (2 + len(shape))
    first_bytes = raw[:start].ljust(start)               # filled up, should there be too few
    header = np.frombuffer(first_bytes, dtype=">i4").tolist()
    n = header[1]
    expected = [2049 + len(shape), n, *shape]
    if header != expected or n <= 0 or len(raw) != start + n * math.prod(shape):
        kind = "28x28 images" if shape else "labels"
        raise ValueError(f"{path} is not a whole file of {kind}: {len(raw)} bytes, "
                         f"header {', '.join(map(str, header))}")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(n, *shape)


def load_mnist(folder):
    """Training and held-out images, (60000, 28, 28) and (10000, 28, 28), and the labels of both.

    From a folder, the labels are None without --labels: no file of them is needed.
    """
    if folder is not None:
        train_pixels = read_idx(folder, "train-images-idx3-ubyte", (28, 28))
        test_pixels = read_idx(folder, "t10k-images-idx3-ubyte", (28, 28))
        if not args.labels:
            return train_pixels, test_pixels, None, None
        train_labels = read_idx(folder, "train-labels-idx1-ubyte", ())
        test_labels = read_idx(folder, "t10k-labels-idx1-ubyte", ())
        for pixels, labels in [(train_pixels, train_labels), (test_pixels, test_labels)]:
            if len(labels) != len(pixels) or labels.max() > 9:
                raise ValueError(f"{len(labels)} labels from 0 to {labels.max()} for "
                                 f"{len(pixels)} images of ten digits")
        return train_pixels, test_pixels, train_labels, test_labels
    socket.setdefaulttimeout(60)
    print("fetching MNIST from openml.org: 15 MB the first time, and reading it takes 30 s and "
          "1.2 GB of memory without pandas ...")
    reader = "auto" if importlib.util.find_spec("pandas") else "liac-arff"
    table = fetch_openml("mnist_784", version=1, as_frame=False, parser=reader)
    pixels = table.data.astype(np.uint8).reshape(70000, 28, 28)
    labels = table.target.astype(np.uint8)
    return pixels[:60000], pixels[60000:], labels[:60000], labels[60000:]


def load_small_digits():
    """scikit-learn's 1797 digits, (1500, 8, 8) and (297, 8, 8), and the labels of both.

    They are shuffled, always alike: in the file they are sorted by writer.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    pixels, labels = digits.images[order], digits.target[order]
    return pixels[:1500], pixels[1500:], labels[:1500], labels[1500:]


def to_images(pixels, white):
    """Pixels (N, H, W) from 0 to white as images (N, 1, H, W) from -1 to 1."""
    return torch.tensor(pixels / np.float32(white / 2) - 1, dtype=torch.float32)[:, None]


dataset = args.data
if dataset != "digits":
    try:
        train_pixels, test_pixels, train_labels, test_labels = load_mnist(args.data_dir)
        dataset = "mnist"
    except Exception as error:                           # no network, a broken file, ...
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        reason = f"cannot read MNIST from {args.data_dir or 'openml.org'}: {reason}"
        if args.data_dir is not None or args.data == "mnist":
            parser.error(f"argument --data_dir: {reason}; give a folder with its whole IDX files")
        print(f"!!! {reason}: going on with scikit-learn's 8x8 digits. For MNIST give --data_dir "
              "FOLDER with its IDX files. !!!")
        dataset = "digits"
if dataset == "mnist":
    x_data, x_test = to_images(train_pixels, 255), to_images(test_pixels, 255)
    defaults = {"filters": 48, "epochs": 4, "batch": 64, "n_samples": 2000}
    if device.type == "cuda":
        defaults |= {"epochs": 40, "batch": 256}
else:
    train_pixels, test_pixels, train_labels, test_labels = load_small_digits()
    x_data, x_test = to_images(train_pixels, 16), to_images(test_pixels, 16)
    defaults = {"filters": 32, "epochs": 60, "batch": 128, "n_samples": 500}
NO_LABEL = 10                                            # stands where a label is left out
if args.labels:
    train_labels = torch.tensor(train_labels, dtype=torch.long)             # (60000,), 0 to 9
    test_labels = torch.tensor(test_labels, dtype=torch.long)               # (10000,)
for name, value in defaults.items():
    if getattr(args, name) is None:
        setattr(args, name, value)

if args.batch > len(x_data):
    parser.error(f"argument --batch: {args.batch} is more than the {len(x_data)} training images")
input_shape = tuple(x_data.shape[1:])                    # (1, 28, 28)
mean, sigma_data = x_data.mean(), x_data.std()           # of all pixels
print(f"{dataset}: images {tuple(x_data.shape)}, mean {mean:.3f}, standard deviation "
      f"{sigma_data:.3f}, on {device} in {'bfloat16' if bf16 else 'float32'}")


# %% Noise levels
# At the largest level all images drown in the noise, and at the smallest the eye sees no noise.
# From one level to the next the noise shrinks by a fifth. (001's 10 levels would halve it, which is
# too coarse. What 001 calls level T, the largest, has index 0 here.)
levels = np.geomspace(args.sigma_max, args.sigma_min, args.T).tolist()      # descending
sigmas = torch.tensor(levels)                                               # (T,)


# %% Model
# The homework's network, changed where it helps. It works at a half and at a quarter of the
# resolution, where it is cheap and a 3x3 convolution sees more of the digit. It normalises. The
# level does not only shift the features but scales them, too (FiLM in 003). With --labels the digit
# is told in the same way as the level.
#
#     28x28 -> 14x14 -> blocks ----------------------------- + -> blocks -> 14x14 -> 28x28
#                            \                               /
#                             -> 7x7, twice the channels -> blocks
def start_small(convolution):
    """A tenth of the usual weights: at first a block changes little, the net answers nearly 0."""
    with torch.no_grad():
        convolution.weight.mul_(0.1)
        convolution.bias.zero_()
    return convolution


class ConditionedResnetBlock(nn.Module):
    """The homework's block: x (B, dim, H, W), level index y (B,) -> (B, dim, H, W).

    With num_labels > 0 also label (B,) from 0 to num_labels; num_labels itself means: any. (In a
    network that knows no labels, label is None.)
    """

    def __init__(self, dim, num_embeddings, num_labels=0):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, dim)                # all channels of an image together
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.GroupNorm(1, dim)
        self.conv2 = start_small(nn.Conv2d(dim, dim, 3, padding=1))
        self.embedding = nn.Embedding(num_embeddings, 2 * dim)          # scale and shift
        # They start as random mixtures of slow waves of the index, of the size 0.2: neighbouring
        # levels are alike, and can learn from each other.
        angles = torch.linspace(0, 6, num_embeddings)[:, None] * torch.linspace(0.125, 1, 8)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)          # (num_embeddings, 16)
        self.embedding.weight.data = 0.07 * waves @ torch.randn(16, 2 * dim)
        if num_labels > 0:
            self.label_embedding = nn.Embedding(num_labels + 1, 2 * dim)
            nn.init.zeros_(self.label_embedding.weight)                 # at first all are alike

    def forward(self, x, y, label=None):
        condition = self.embedding(y)                                   # (B, 2 dim)
        if label is not None:
            condition = condition + self.label_embedding(label)
        scale, shift = condition[:, :, None, None].chunk(2, dim=1)      # (B, dim, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class ConditionedSimpleResnet(nn.Module):
    """The homework's network: x (B, in_channels, H, W), level y (B,) -> (B, out_channels, H, W).

    y is an index. H and W are multiples of 4; names and comments here are for 28 pixels.
    With num_labels > 0 it can be told labels (B,), too: num_labels itself, or None, means any.
    """

    def __init__(self, in_channels, out_channels, n_filters, n_blocks, num_embeddings,
                 num_labels=0):
        super().__init__()
        self.num_labels = num_labels
        n_outer = n_blocks // 4                          # of 8 blocks: 2, then 4 at 7x7, then 2
        self.first_block = nn.Conv2d(4 * in_channels, n_filters, 3, padding=1)
        self.blocks_14_down = nn.ModuleList()
        for _ in range(n_outer):
            block = ConditionedResnetBlock(n_filters, num_embeddings, num_labels)
            self.blocks_14_down.append(block)
        self.down = nn.Conv2d(n_filters, 2 * n_filters, 2, stride=2)
        self.blocks_7 = nn.ModuleList()
        for _ in range(n_blocks - 2 * n_outer):
            block = ConditionedResnetBlock(2 * n_filters, num_embeddings, num_labels)
            self.blocks_7.append(block)
        self.up = nn.Conv2d(2 * n_filters, 4 * n_filters, 1)
        self.blocks_14_up = nn.ModuleList()
        for _ in range(n_outer):
            block = ConditionedResnetBlock(n_filters, num_embeddings, num_labels)
            self.blocks_14_up.append(block)
        self.last_norm = nn.GroupNorm(1, n_filters)
        self.last_block = start_small(nn.Conv2d(n_filters, 4 * out_channels, 3, padding=1))

    def forward(self, x, y, label=None):
        if self.num_labels > 0 and label is None:
            label = torch.full_like(y, self.num_labels)
        # Each square of 2x2 pixels becomes four channels of one pixel.
        x = F.pixel_unshuffle(x, 2)                      # (B, 4 in_channels, 14, 14)
        x = self.first_block(x.contiguous(memory_format=torch.channels_last))     # faster on CPUs
        for block in self.blocks_14_down:
            x = block(x, y, label)                       # (B, n_filters, 14, 14)
        h = self.down(x)
        for block in self.blocks_7:
            h = block(h, y, label)                       # (B, 2 n_filters, 7, 7)
        # The other way round: four channels of one pixel become a square of 2x2 pixels.
        h = F.pixel_shuffle(self.up(h), 2)               # (B, n_filters, 14, 14)
        x = x + h.contiguous(memory_format=torch.channels_last)
        for block in self.blocks_14_up:
            x = block(x, y, label)
        x = self.last_block(F.silu(self.last_norm(x)))   # (B, 4 out_channels, 14, 14)
        return F.pixel_shuffle(x, 2)                     # (B, out_channels, 28, 28)


# What the network is trained on, the target -eps/sigma of the loss below, has the size 50 at
# sigma = 0.02 and 0.1 at sigma = 10, and networks are best with numbers of size 1. Could the net
# answer -eps? At large sigma it would have to copy its input, which is nearly all noise, and each
# small error of the copy would be sigma times as large in the guess of the clean image. So a
# formula does the copying. Were the images a Gaussian of standard deviation sigma_data, noisy ones
# would be a Gaussian of standard deviation total = sqrt(sigma^2 + sigma_data^2), with the score
# -(noisy_x - mean)/total^2. That is the first guess. The net answers what it misses, in a unit that
# fits the level.
class PreconditionedScore(nn.Module):
    """score_model(x, y, label=None) -> score, from a net that sees and answers numbers of size 1.

    Before training the net answers nearly 0, and the score is nearly the first guess. bf16: compute
    in bfloat16. (Karras et al. write this for the denoiser x + sigma^2 s, with c_skip =
    sigma_data^2/total^2 and c_out = sigma sigma_data/total.)
    """

    def __init__(self, net, sigmas, mean, sigma_data, bf16=False):
        super().__init__()
        self.net = net
        self.bf16 = bf16
        # Buffers are saved with the weights, but not trained.
        self.register_buffer("mean", mean.clone())
        # The size of the net's task (with the mean 0): target minus first guess is
        #     -eps/sigma + noisy_x/total^2
        #   = -eps/sigma + (x + sigma eps)/total^2
        #   = x/total^2 - eps sigma_data^2/(sigma total^2).
        # x and eps are independent, with the variances sigma_data^2 and 1. So its variance is
        #     sigma_data^2/total^4 + sigma_data^4/(sigma^2 total^4)
        #   = sigma_data^2/(sigma^2 total^2),
        # and the unit is the root of this (theory.md 7.1).
        total = (sigmas**2 + sigma_data**2).sqrt()       # (T,)
        self.register_buffer("total", total)
        self.register_buffer("unit", sigma_data / (sigmas * total))

    def forward(self, x, y, label=None):
        total = self.total[y][:, None, None, None]       # (B, 1, 1, 1)
        unit = self.unit[y][:, None, None, None]
        scaled = (x - self.mean) / total
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            answer = self.net(scaled, y, label).float()
        return -scaled / total + unit * answer


# %% Loss
# The homework's class. Add the noise of a random level to an image. The target is the arrow back to
# the clean image, x - noisy_x = -sigma eps, divided by sigma^2: -eps/sigma. Then it is a gradient
# with respect to noisy_x, that of log q(noisy_x | x) = -|noisy_x - x|^2/(2 sigma^2) + a constant.
# Trained on squared errors, a network learns the mean of the targets, here of all clean images that
# could lie behind a noisy one. This mean is the score of the noisy images (theory.md 4.1):
#     sum over x of p(x | noisy_x) grad log q(noisy_x | x)
#   = sum over x of p(x) q(noisy_x | x) grad log q(noisy_x | x) / q_sigma(noisy_x)     (Bayes)
#   = sum over x of p(x) grad q(noisy_x | x) / q_sigma(noisy_x)         since q grad log q = grad q
#   = grad q_sigma(noisy_x) / q_sigma(noisy_x) = grad log q_sigma(noisy_x)
class NoiseConditionedScoreNetwork(nn.Module):
    """Learns grad log q_sigma at all levels with score_model(x, level index (B,)), and samples.

    input_shape: that of an image, without batch. sigmas: the levels, in any order; index 0 is the
    largest. weights and probs (T,), that of the largest level first: the factor of a level in the
    loss, and how often it is drawn (probs need not add up to 1). Their defaults are the homework's,
    (sigma/sigma_max)^2 and all alike.
    """

    def __init__(self, score_model, input_shape, sigmas, weights=None, probs=None):
        super().__init__()
        self.score_model = score_model
        self.input_shape = tuple(input_shape)
        sigmas = torch.tensor(sorted([float(sigma) for sigma in sigmas], reverse=True))
        if weights is None:
            weights = (sigmas / sigmas[0]) ** 2
        if probs is None:
            probs = torch.ones_like(sigmas)
        # Buffers are moved with the weights. (001's plain attribute is moved by hand, in `forward`,
        # and not saved.)
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("weights", weights, persistent=False)      # not in model.pt
        self.register_buffer("probs", probs, persistent=False)

    @property
    def device(self):
        return self.sigmas.device

    def forward(self, x, label=None):
        """weight_t (s(x + sigma_t eps, t) - target)^2 with target -eps/sigma_t, one value a pixel.

        With labels (B,) the score_model is asked for s(x + sigma_t eps, t, label).
        """
        t = torch.multinomial(self.probs, len(x), replacement=True)     # levels, (B,)
        one_each = [len(x)] + [1] * (x.dim() - 1)                       # (B, 1, 1, 1) for images
        sigma = self.sigmas[t].view(one_each)
        weight = self.weights[t].view(one_each)
        eps = torch.randn_like(x)
        noisy_x = x + sigma * eps
        target = -eps / sigma
        if label is None:                                # the homework's networks take no label
            s = self.score_model(noisy_x, t)
        else:
            s = self.score_model(noisy_x, t, label)
        return weight * (s - target) ** 2

    def loss(self, x, label=None):
        """The mean over the batch of the sum over pixels: a scalar in a dict."""
        return {"total_loss": self(x, label).mean(dim=0).sum()}

    # The homework asks for these two. In the cell Sampling, this script writes them once more, for
    # a score that is told sigma and not its index, and with a last denoising step.
    @torch.no_grad()
    def annealed_langevin_dynamics(self, x, num_steps, eps):
        """At each level num_steps of x + eta/2 s + sqrt(eta) z, eta = eps sigma_t^2/sigma_max^2.

        eps is 001's name of this step size; it is not the noise.
        """
        for t, sigma in enumerate(self.sigmas.tolist()):
            eta = eps * (sigma / self.sigmas[0].item()) ** 2
            y = torch.full((len(x),), t, device=x.device)
            for _ in range(num_steps):
                z = torch.randn_like(x)
                x = x + eta / 2 * self.score_model(x, y) + math.sqrt(eta) * z
        return x

    @torch.no_grad()
    def sample(self, num_samples=64, num_steps=100, eps=None):
        """Annealed Langevin dynamics from N(0, sigma_max^2 I).  -> (num_samples, *input_shape)

        eps = None stands for 0.8 sigma_max^2: then the step at level t is 0.4 sigma_t^2 s, long
        enough to come down from the noise of the level above (theory.md 8.4). 001's eps = 0.1 suits
        sigma_max near 1. With sigma_max = 10 its steps are 800 times shorter than ours, and what
        comes out is noise. (001's text starts as we do, its code from U[-1, 1].)
        """
        if eps is None:
            eps = 0.8 * self.sigmas[0].item() ** 2
        x = self.sigmas[0] * torch.randn(num_samples, *self.input_shape, device=self.device)
        return self.annealed_langevin_dynamics(x, num_steps, eps)


# This script's weight is 1/unit^2 = (sigma total/sigma_data)^2; the unit is PreconditionedScore's.
# So the loss is the mean square error of the net's own answer, about 1 before training at every
# level. (With the homework's weight such an error would count in proportion to
# sigma_data^2/total^2: 1 at the smallest levels, 0.004 at the largest.)
weights = sigmas**2 * (sigmas**2 + sigma_data**2) / sigma_data**2
# The class sums over pixels, we want a mean. (This only makes the printed loss readable: both
# optimizers take the same steps, whatever common factor the gradients have.)
weights = weights / x_data[0].numel()
# Most draws are spent where a digit takes shape: two thirds of them between 0.3 and 3 (log-normal,
# around 0.9). Above, all digits look alike; below, what went wrong cannot be mended any more. (In
# all, a level counts in proportion to weight times probability.)
probs = torch.exp(-0.5 * ((sigmas / 0.9).log() / 1.2) ** 2)


# %% Model: the U-Net of 003 (--net unet)
# Its levels are told as waves of log sigma, and scale and shift each channel after it was brought
# to mean 0 and variance 1. (Skip this at first reading: the default is the network above.)
class ConditionalInstanceNorm2d(nn.Module):
    """x (B, C, H, W), embedding (B, E) -> (B, C, H, W); at the start scale 1 and shift 0."""

    def __init__(self, channels, embed_dim):
        super().__init__()
        self.film = nn.Linear(embed_dim, 2 * channels)
        nn.init.zeros_(self.film.weight)
        # Its first outputs are scales, the others shifts. (003 mixes up rows and columns here.)
        self.film.bias.data = torch.cat([torch.ones(channels), torch.zeros(channels)])

    def forward(self, x, embedding):
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1)
        return F.instance_norm(x) * scale + shift


class ResBlock(nn.Module):
    """x (B, dim, H, W), embedding (B, E) -> (B, dim, H, W)."""

    def __init__(self, dim, embed_dim):
        super().__init__()
        self.norm1 = ConditionalInstanceNorm2d(dim, embed_dim)
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = ConditionalInstanceNorm2d(dim, embed_dim)
        self.conv2 = start_small(nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x, embedding)))
        h = self.conv2(F.silu(self.norm2(h, embedding)))
        return x + h


class UNet(nn.Module):
    """x (B, channels, H, W), level index y (B,) -> (B, channels, H, W); H and W multiples of 4.

    num_labels and label (B,) as in ConditionedSimpleResnet.
    """

    def __init__(self, channels, dim, n_blocks, sigmas, num_labels=0, embed_dim=64):
        super().__init__()
        self.num_labels = num_labels
        # 003 takes sin(2^k pi sigma), for which sigma = 2, 4 and 10 are all the same.
        angles = sigmas.log()[:, None] * torch.linspace(0.125, 2, 16)          # (T, 16)
        self.register_buffer("waves", torch.cat([angles.sin(), angles.cos()], dim=1))
        self.embed = nn.Sequential(nn.Linear(32, embed_dim), nn.SiLU(),
                                   nn.Linear(embed_dim, embed_dim), nn.SiLU())
        if num_labels > 0:
            self.label_embedding = nn.Embedding(num_labels + 1, embed_dim)
            nn.init.zeros_(self.label_embedding.weight)
        n_outer = n_blocks // 4
        self.first_block = nn.Conv2d(4 * channels, dim, 3, padding=1)
        self.blocks_14_down = nn.ModuleList([ResBlock(dim, embed_dim) for _ in range(n_outer)])
        self.down = nn.Conv2d(dim, 2 * dim, 2, stride=2)
        self.blocks_7 = nn.ModuleList()
        for _ in range(n_blocks - 2 * n_outer):
            self.blocks_7.append(ResBlock(2 * dim, embed_dim))
        self.up = nn.Conv2d(2 * dim, 4 * dim, 1)
        self.merge = nn.Conv2d(2 * dim, dim, 1)       # (003's skips do not fit its convolutions)
        self.blocks_14_up = nn.ModuleList([ResBlock(dim, embed_dim) for _ in range(n_outer)])
        self.last_norm = nn.GroupNorm(1, dim)
        self.last_block = start_small(nn.Conv2d(dim, 4 * channels, 3, padding=1))

    def forward(self, x, y, label=None):
        embedding = self.embed(self.waves[y])            # (B, embed_dim)
        if self.num_labels > 0:
            if label is None:
                label = torch.full_like(y, self.num_labels)
            embedding = embedding + self.label_embedding(label)
        x = F.pixel_unshuffle(x, 2)                      # (B, 4 channels, 14, 14)
        x = self.first_block(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks_14_down:
            x = block(x, embedding)                      # (B, dim, 14, 14)
        h = self.down(x)
        for block in self.blocks_7:
            h = block(h, embedding)                      # (B, 2 dim, 7, 7)
        h = F.pixel_shuffle(self.up(h), 2)               # (B, dim, 14, 14)
        h = h.contiguous(memory_format=torch.channels_last)
        x = self.merge(torch.cat([x, h], dim=1))         # the skip of a U-Net
        for block in self.blocks_14_up:
            x = block(x, embedding)
        x = self.last_block(F.silu(self.last_norm(x)))   # (B, 4 channels, 14, 14)
        return F.pixel_shuffle(x, 2)                     # (B, channels, 28, 28)


# %% Optimizer
# AdamW divides each entry of a gradient by its usual size. Muon takes the gradient of a layer as a
# matrix, and makes the step go equally far in all (singular) directions of this matrix, also where
# the gradient is small. (This and the next cell are not about scores; skip them at first reading.)
def orthogonalized(matrix):
    """The matrix (n, m) with its singular values between 0.7 and 1.2, but for tiny ones.

    The polynomial 3.4445 x - 4.775 x^3 + 2.0315 x^5, applied five times, brings all numbers from
    0.002 to 1 into that range. Written in matrices, as here, it acts on the singular values.
    """
    x = matrix.to(torch.bfloat16 if bf16 else torch.float32)
    x = x / (x.norm() + 1e-7)                            # singular values are 1 at most
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalized (Jordan et al. 2024), for kernels of convolutions.

    A kernel is taken as the matrix (out, in * height * width). torch.optim.Muon without weight
    decay is the same, but for matrices only, and always in bfloat16: ten times slower on processors
    that have to imitate such numbers.
    """

    def __init__(self, kernels, lr):
        super().__init__(kernels, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for kernel in group["params"]:
                state = self.state[kernel]               # a dict, empty at first
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(kernel)
                state["momentum"].lerp_(kernel.grad, 0.05)               # a mean over 20 steps
                ahead = torch.lerp(kernel.grad, state["momentum"], 0.95)     # Nesterov's momentum
                matrix = ahead.flatten(1)
                scale = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5     # tall ones go further
                step = scale * orthogonalized(matrix)
                kernel -= group["lr"] * step.view_as(kernel)


# %% Checkpoints
# A run can be continued (--resume) from its last checkpoint. That holds everything on which the
# next step depends (on the same machine), and the settings, so that nobody continues another run.
run_settings = {"data": dataset, "device": device.type}
for name in ["labels", "net", "T", "sigma_min", "sigma_max", "filters", "blocks", "epochs", "batch",
             "lr", "lr_muon", "seed"]:
    run_settings[name] = getattr(args, name)


def save_checkpoint(parts, step, history):
    """Write checkpoint.pt under another name first: what stands there is always whole."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"settings": run_settings, "step": step, "history": history,
              "rng": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state()
    torch.save(state, checkpoint_path + ".new")
    os.replace(checkpoint_path + ".new", checkpoint_path)


def read_file(flag, path):
    """The dict that torch.save wrote to path; if there is none, the run ends in one line."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("it holds no dict")
        return content
    except Exception as error:                           # a file cut short raises many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        parser.error(f"argument {flag}: {path} is missing or not whole ({reason})")


def load_weights(flag, path, model, state):
    """Put a state_dict into the model, if it is of such a model, data and levels."""
    try:
        model.load_state_dict(state)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        parser.error(f"argument {flag}: {path} is of another --data, --net, --filters, --blocks, "
                     f"--T or --labels ({reason})")
    same_levels = torch.allclose(model.sigmas.cpu(), sigmas)
    same_mean = torch.allclose(model.score_model.mean.cpu(), mean, atol=1e-4)
    if not (same_levels and same_mean):
        parser.error(f"argument {flag}: {path} was trained on other --data, --sigma_min or "
                     "--sigma_max")


def resume(parts):
    """Put the last checkpoint into the parts.  -> its step, its history"""
    state = read_file("--resume", checkpoint_path)
    settings = state.get("settings", {})
    for name, value in run_settings.items():
        if settings.get(name) != value:
            parser.error(f"argument --resume: the run in {checkpoint_path} has --{name} "
                         f"{settings.get(name)}, this one {value}")
    load_weights("--resume", checkpoint_path, parts["model"], state["model"])
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["rng"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"])
    return state["step"], state["history"]


# %% Training
# Two optimizers, and an average of the weights, which will be used in the end.
# args.labels: do we have labels of the images?  knows_labels: has the network learned from labels?
# After --load the second can be true without the first.
knows_labels = args.labels
if args.load:
    loaded_weights = read_file("--load", args.load)
    knows_labels = any("label_embedding" in name for name in loaded_weights)
    for name in ["labels", "digit", "guidance"]:
        value = getattr(args, name)
        given = value is not None and value is not False
        if given and not knows_labels:
            parser.error(f"argument --{name}: the weights in {args.load} know no labels")
if knows_labels and args.guidance is None:
    args.guidance = 0.2
num_labels = 10 if knows_labels else 0                   # NO_LABEL is the eleventh

if args.net == "resnet":
    net = ConditionedSimpleResnet(1, 1, args.filters, args.blocks, args.T, num_labels)
else:
    net = UNet(1, args.filters, args.blocks, sigmas, num_labels)
score_model = PreconditionedScore(net, sigmas, mean, sigma_data, bf16)
model = NoiseConditionedScoreNetwork(score_model, input_shape, levels, weights, probs).to(device)


@torch.no_grad()
def held_out_loss(model):
    """The loss on 512 held-out images, always with the same levels and noise: a number.

    With --labels the network is told all of them, an easier task than in training (one in five is
    left out there).
    """
    label = test_labels[:512].to(device) if args.labels else None
    with torch.random.fork_rng():                        # the training goes on with its own noise
        torch.manual_seed(args.seed)
        return model.loss(x_test[:512].to(device), label)["total_loss"].item()


def moving_average(old, new, n):
    """Exponentially averaged weights after n steps: over the last n/9 of them, at most over 500."""
    decay = min(0.998, (1 + n.item()) / (10 + n.item()))
    return torch.lerp(old, new, 1 - decay)


# Muon trains the inner convolutions, AdamW all else: biases, norms, embeddings (the U-Net's linear
# layers), the first and the last convolution.
kernels = []
others = []
for name, parameter in model.named_parameters():
    if parameter.dim() == 4 and "first_block" not in name and "last_block" not in name:
        kernels.append(parameter)
    else:
        others.append(parameter)
muon = Muon(kernels, args.lr_muon)
adamw = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.99), fused=True)
ema = AveragedModel(model, avg_fn=moving_average)
parts = {"model": model, "ema": ema, "muon": muon, "adamw": adamw}


def rate(progress):
    """Factor of both learning rates: it rises for 3 % of the steps, then falls as half a cosine."""
    return min(1, progress / 0.03) * (1 + math.cos(math.pi * progress)) / 2


def leave_out(label):
    """One label in five becomes NO_LABEL: so the network also learns the score of all digits."""
    left_out = torch.rand(len(label)) < 0.2
    return label.masked_fill(left_out, NO_LABEL)


def training_step(x, label, progress):
    """One step of both optimizers on the images x; progress runs from 0 to 1.  -> the loss"""
    muon.param_groups[0]["lr"] = args.lr_muon * rate(progress)
    adamw.param_groups[0]["lr"] = args.lr * rate(progress)
    loss = model.loss(x, label)["total_loss"]
    model.zero_grad()
    loss.backward()
    muon.step()
    adamw.step()
    ema.update_parameters(model)
    return loss.item()


steps_per_epoch = len(x_data) // args.batch
steps = args.epochs * steps_per_epoch
first_step = 0
history = {"step": [], "loss": [], "held_out": []}
if args.load:
    load_weights("--load", args.load, model, loaded_weights)
    steps = 0
if args.resume:
    first_step, history = resume(parts)
try:                                                     # all settings are right: make the folder
    os.makedirs(args.outdir, exist_ok=True)
except OSError as error:
    parser.error(f"argument --outdir: cannot make {args.outdir} ({error.strerror})")
if not os.access(args.outdir, os.W_OK):
    parser.error(f"argument --outdir: cannot write to {args.outdir}")

x_data = x_data.to(device)
interval = max(1, steps // 40)                           # steps between two checkpoints
steps_done = first_step
steps_saved = first_step
started = time.time()
try:
    bar = tqdm(range(first_step, steps), initial=first_step, total=steps, desc="training",
               disable=steps == 0)
    for step in bar:
        epoch, i = divmod(step, steps_per_epoch)
        if i == 0 or step == first_step:
            # The order of an epoch follows from its number, so that a resumed run has the same.
            generator = torch.Generator().manual_seed(args.seed * 10**6 + epoch)
            order = torch.randperm(len(x_data), generator=generator)
        batch = order[i * args.batch:(i + 1) * args.batch]                  # which images
        x = x_data[batch.to(device)]
        label = None
        if args.labels:
            label = leave_out(train_labels[batch]).to(device)
        loss = training_step(x, label, (step + 0.5) / steps)
        steps_done = step + 1
        if steps_done % interval == 0 or steps_done == steps:
            held_out = held_out_loss(ema.module)
            bar.set_postfix_str(f"loss {loss:.4f}, held-out {held_out:.4f}")
            if not math.isfinite(held_out):
                sys.exit(f"the held-out loss is {held_out} at step {steps_done}: try an --lr below "
                         f"{args.lr:g} and an --lr_muon below {args.lr_muon:g}")
            history["step"].append(steps_done)
            history["loss"].append(loss)
            history["held_out"].append(held_out)
            save_checkpoint(parts, steps_done, history)
            steps_saved = steps_done
except KeyboardInterrupt:
    print(f"\nCtrl-C after {steps_done} of {steps} steps: sampling from what there is.")
    if steps_saved > 0:
        print(f"The same command with --resume goes on from the checkpoint of step {steps_saved}.")
train_s = time.time() - started
model.requires_grad_(False)                              # trained: no more gradients
if not args.load:
    # From here on model, and score_model in it, has the averaged weights.
    model.load_state_dict(ema.module.state_dict())
    torch.save(model.state_dict(), os.path.join(args.outdir, "model.pt"))


# %% Sampling
# As in dsm_2d.py: a sampler takes a score, images x at the first level, and the levels (a list,
# descending), and returns all states on the way, the last at sigma = 0.
def score(x, sigma, label=None):
    """The learned score of q_sigma, (B, 1, H, W), at the level nearest to the number sigma.

    With labels (B,), the score of the noisy images of these digits. ValueError outside the levels.
    """
    if not 0.999 * levels[-1] <= sigma <= 1.001 * levels[0]:
        raise ValueError(f"sigma = {sigma:g} is not between {levels[-1]:g} and {levels[0]:g}")
    nearest_level = np.abs(np.log(np.array(levels) / sigma)).argmin()
    return score_model(x, torch.full((len(x),), nearest_level, device=x.device), label)


# With labels the network knows two scores, that of a digit and that of all. By Bayes' rule
#     grad log q(x | label) = grad log q(x) + grad log q(label | x),
# so their difference points to where the label is more probable. (Classifier-free) guidance takes
# this difference 1 + w times. With w > 0 the samples are more surely of their digit, and more
# alike. (The result is no longer the score of any noisy images; theory.md 11.2, 003 4.7.3.)
def guided_score(label, w):
    """The function score(x, sigma) of images with these labels (B,), as samplers take it."""
    def score_with_label(x, sigma):
        s_digit = score(x, sigma, label)
        if w == 0:
            return s_digit
        s_all = score(x, sigma)
        return s_all + (1 + w) * (s_digit - s_all)
    return score_with_label


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


# (This is the homework's step, with its eps = 2 kappa sigma_max^2.)
def langevin_step(score, x, sigma, kappa):
    """x + eta/2 s + sqrt(eta) z with eta = 2 kappa sigma^2, the same kappa at every level.

    A walk within one level: it draws x towards the density q_sigma and keeps it near it. The
    smaller kappa, the nearer and the slower; from 2 on it diverges (theory.md 8.4).
    """
    noise = math.sqrt(2 * kappa) * sigma * torch.randn_like(x)
    return x + kappa * sigma**2 * score(x, sigma) + noise


def predictor_corrector(score, x, sigmas, kappa):
    """At each level the corrector, a Langevin step, then the predictor, DDPM's step to the next.

    (dsm_2d.py begins with the predictor, and has no corrector at the first level.) 003's predictor
    adds noise of the size sigma_next, which is too much (theory.md 7.4).
    """
    path = [x]
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        x = langevin_step(score, x, sigma, kappa)
        x = ancestral_step(score, x, sigma, sigma_next)
        path.append(x)
    x = langevin_step(score, x, sigmas[-1], kappa)
    path.append(denoise(score, x, sigmas[-1]))
    return path


def annealed_langevin_dynamics(score, x, sigmas, K, kappa):
    """003 section 4.3.3: walk K steps at each level, then denoise."""
    path = []
    for sigma in sigmas:
        for _ in range(K):
            x = langevin_step(score, x, sigma, kappa)
        path.append(x)
    path.append(denoise(score, x, sigmas[-1]))
    return path


def run_sampler(name, score, x, levels):
    """The states of the sampler of that name; the last are clean images (n, 1, H, W)."""
    if name == "ancestral":
        return ancestral_sampling(score, x, levels)
    if name == "ddim":
        return ancestral_sampling(score, x, levels, ddim=True)
    if name == "ald":
        return annealed_langevin_dynamics(score, x, levels, args.K, args.kappa)
    return predictor_corrector(score, x, levels, args.kappa)


def generate(name, x, levels, label=None, w=0):
    """Images (n, 1, H, W) from images x with the noise of levels[0]; 250 at a time save memory."""
    ends = []
    for i in tqdm(range(0, len(x), 250), desc=f"sampling ({name})", leave=False):
        chunk = x[i:i + 250].to(device)
        chunk_score = score if label is None else guided_score(label[i:i + 250].to(device), w)
        ends.append(run_sampler(name, chunk_score, chunk, levels)[-1].cpu())
    return torch.cat(ends)


# How often each calls the network. With guidance, twice as often.
calls = {"ancestral": args.T, "ddim": args.T, "ald": args.K * args.T + 1, "pc": 2 * args.T}
if args.guidance:
    calls = {name: 2 * number_of_calls for name, number_of_calls in calls.items()}

asked = None                                             # the digits that are asked for
if knows_labels:
    asked = torch.arange(args.n_samples) % 10
    if args.digit is not None:
        asked = torch.full((args.n_samples,), args.digit)

torch.manual_seed(args.seed + 1)                         # the same noise after --load and --resume
# At sigma_max the noisy images are nearly one Gaussian, with this spread.
start_noise = torch.randn(args.n_samples, *input_shape)
start = mean + math.hypot(levels[0], sigma_data) * start_noise
started = time.time()
samples = generate(args.sampler, start, levels, asked, args.guidance)       # (n_samples, 1, H, W)
sample_s = time.time() - started
if not torch.isfinite(samples).all():
    sys.exit(f"--sampler {args.sampler}: pixels are not finite; train longer")
samples = samples.clamp(-1, 1)
np.save(os.path.join(args.outdir, "samples.npy"), samples.numpy())


# %% Check
# No exact score is known for digits. So the loss stands beside that of the best linear denoiser,
# and the samples beside images that were held out. The loss of a score is the error of its denoiser
# D = x + sigma eps + sigma^2 s, in units of sigma:  |D - x|^2 / sigma^2 = |sigma s + eps|^2.
def network_losses(x, label=None):
    """sigma^2/2 |s(x + sigma eps) + eps/sigma|^2 of the network, a mean over images x: (T,).

    label: that of the images, (B,), or None. (With the 1/2 of dsm_2d.py.)
    """
    losses = []
    for sigma in levels:
        eps = torch.randn_like(x)
        error = sigma * score(x + sigma * eps, sigma, label) + eps
        losses.append(error.square().flatten(1).sum(dim=1).mean().item() / 2)
    return np.array(losses)


def linear_losses(x):
    """The same of the best linear denoiser, which knows mean and covariance of the images: (T,).

    Along each axis of the covariance, where the images have the variance v, it shrinks the noisy
    image towards the mean by the factor v / (v + sigma^2). To get below it, a network must have
    learned more about images than mean and covariance.
    """
    flat = x_data.flatten(1).cpu()                                         # (N, d)
    variances, axes = torch.linalg.eigh(torch.cov(flat.T))                 # (d,), (d, d)
    variances = variances.clamp(min=0)                                     # round-off goes below 0
    centred = x.flatten(1).cpu() - flat.mean(dim=0)
    power = (centred @ axes).square().mean(dim=0)                          # along each axis, (d,)
    losses = []
    for sigma in levels:
        gain = variances / (variances + sigma**2)
        bias = (1 - gain) ** 2 * power                                     # of x too much shrunk
        noise = gain**2 * sigma**2                                         # of noise that is left
        losses.append((bias + noise).sum().item() / (2 * sigma**2))
    return np.array(losses)


def nearest(x, k=1):
    """Distances to the k nearest training images, and their indices: two (n, k)."""
    distances = torch.cdist(x.flatten(1).to(device), x_data.flatten(1))
    return distances.topk(k, largest=False)


def read_digits(images):
    """The digits on images (n, 1, H, W), read by the labels of their nearest neighbours: (n,)."""
    _, indices = nearest(images)
    return train_labels[indices[:, 0].cpu()]


real = x_test
real_name = "held-out images"
if args.digit is not None and args.labels:
    real = x_test[test_labels == args.digit]             # to compare sevens with sevens
elif args.digit is not None:
    real_name += " (of all digits; with --labels of this one)"
torch.manual_seed(args.seed + 2)                         # the same noise after every sampler
# (With --labels the network is told the labels, which the linear denoiser does not know.)
held_out_label = test_labels[:250].to(device) if args.labels else None
learned = network_losses(x_test[:250].to(device), held_out_label)
linear = linear_losses(x_test[:250])
loss_vs_linear = np.exp(np.log(learned / linear).mean()).item()           # a geometric mean
nn_samples = nearest(samples[:200])[0].median().item()
nn_real = nearest(real[:200])[0].median().item()
print("\nsigma^2/2 |s + eps/sigma|^2 on 250 held-out images (good: below the linear denoiser)\n"
      " sigma    network    linear")
for sigma, a, b in zip(levels, learned, linear):
    print(f"{sigma:6.3g} {a:10.2f} {b:9.2f}")
print(f"median distance to the nearest training image: samples {nn_samples:.2f}, {real_name} "
      f"{nn_real:.2f} (good: within a fifth; a copy has 0)")

summary = {"data": dataset, "seed": args.seed, "net": args.net,
           "epochs": round(steps_done / steps_per_epoch, 2), "T": args.T, "sampler": args.sampler,
           "calls": calls[args.sampler], "loss_vs_linear": round(loss_vs_linear, 4),
           "nn_samples": round(nn_samples, 2), "nn_real": round(nn_real, 2),
           "train_s": round(train_s, 1), "sample_s": round(sample_s, 1)}
if knows_labels:
    summary["guidance"] = args.guidance
if args.labels:
    as_asked = read_digits(samples[:500]) == asked[:500]
    as_labelled = read_digits(x_test[:500]) == test_labels[:500]            # of all digits
    read_as_asked = as_asked.float().mean().item()
    real_as_labelled = as_labelled.float().mean().item()
    print(f"read (by the nearest training image) as the digit asked for: {read_as_asked:.1%} of "
          f"the samples; held-out images as their label: {real_as_labelled:.1%} (good: 95 %)")
    summary |= {"read_as_asked": round(read_as_asked, 3),
                "real_as_labelled": round(real_as_labelled, 3)}
with open(os.path.join(args.outdir, "summary.json"), "w") as file:
    json.dump({"settings": vars(args), "levels": levels, "network": learned.tolist(),
               "linear": linear.tolist(), "figures": summary}, file, indent=1)


# %% Pictures
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.55"        # truth, what is learned, the rest
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.titlesize": 10})


def draw_images(ax, images, title, column_names=(), row_names=()):
    """Images (rows, columns, 1, H, W) side by side."""
    rows, columns, _, height, width = images.shape
    framed = F.pad(images.clamp(-1, 1)[:, :, 0], (0, 1, 0, 1), value=-1.0)
    sheet = framed.transpose(1, 2).reshape(rows * (height + 1), columns * (width + 1))
    ax.imshow(sheet.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[])
    if column_names:
        ax.set_xticks((np.arange(columns) + 0.5) * (width + 1), column_names)
    if row_names:
        ax.set_yticks((np.arange(rows) + 0.5) * (height + 1), row_names)
    ax.tick_params(length=0)


def level_name(sigma):
    return rf"$\sigma$={sigma:.2g}"


# Samples beside real digits.
side = min(10, math.isqrt(args.n_samples))
fig, axs = plt.subplots(1, 2, figsize=(10, 5.3))
names = [f"samples ({args.sampler})", "held-out digits"]
if knows_labels and args.digit is None and side == 10:
    names[0] += ", a column for each digit"
for ax, images, name in zip(axs, [samples, x_test], names):
    draw_images(ax, images[:side**2].unflatten(0, (side, side)), name)
fig.savefig(os.path.join(args.outdir, "samples.png"))

# From noise to digits, by ancestral sampling: a strip, and a movie whose last frame is held.
path_score = score if asked is None else guided_score(asked[:24].to(device), args.guidance)
path = ancestral_sampling(path_score, start[:24].to(device), levels)
all_levels = levels + [0.0]
path = [(x / max(1, sigma)).cpu() for x, sigma in zip(path, all_levels)]  # or noise is too bright
shown = np.linspace(0, args.T, 10).round().astype(int)
fig, ax = plt.subplots(figsize=(10, 3.6))
draw_images(ax, torch.stack([path[t][:3] for t in shown], dim=1),
            r"From noise to digits (ancestral sampling; $x/\sigma$ where $\sigma$ > 1)",
            column_names=[level_name(all_levels[t]) for t in shown])
fig.savefig(os.path.join(args.outdir, "annealing.png"))

frames = np.linspace(0, args.T, min(30, len(path))).astype(int).tolist() + 10 * [args.T]
fig, ax = plt.subplots(figsize=(6, 2.6))
movie = PillowWriter(fps=10)
with movie.saving(fig, os.path.join(args.outdir, "annealing.gif"), dpi=80):
    for t in frames:
        ax.clear()
        draw_images(ax, path[t].unflatten(0, (3, 8)), level_name(all_levels[t]))
        movie.grab_frame()
plt.close(fig)                                           # of a movie only the file is of use

# What was learned?
fig, axs = plt.subplots(1, 2, figsize=(10, 3.6))
if history["step"]:
    axs[0].semilogy(history["step"], history["loss"], ".", color=GREY, label="a training batch")
    axs[0].semilogy(history["step"], history["held_out"], color=ORANGE,
                    label="held-out images, averaged weights")
    axs[0].legend()
    axs[0].set(xlabel="step", title="Loss (1: that of the first guess)")
else:
    axs[0].set(title="Loaded weights: nothing was trained")
axs[1].loglog(levels, linear, color=BLUE, label="best linear denoiser")
axs[1].loglog(levels, learned, "o-", ms=3, color=ORANGE, label="network")
axs[1].set(xlabel=r"$\sigma$",
           title=r"$\frac{\sigma^2}{2}E|s+\varepsilon/\sigma|^2$ on held-out images")
axs[1].legend()
fig.savefig(os.path.join(args.outdir, "training.png"))


# %% Extra: which sampler?
# All four from the same start. Their cost is the number of calls of the network.
rows = []
row_names = []
label = None if asked is None else asked[:20]
for name in calls:
    rows.append(generate(name, start[:20], levels, label, args.guidance))
    row_names.append(f"{name}, {calls[name]}")
fig, ax = plt.subplots(figsize=(10, 2.8))
draw_images(ax, torch.stack(rows), "One network, four samplers (and their calls of it)",
            row_names=row_names)
fig.savefig(os.path.join(args.outdir, "samplers.png"))


# %% Extra: are they copies?
# Each sample above the training images that are nearest to it, pixel by pixel.
indices = nearest(samples[:10], 3)[1]                                      # (10, 3)
relatives = x_data[indices.T].cpu()                                        # (3, 10, 1, H, W)
fig, ax = plt.subplots(figsize=(10, 4.4))
draw_images(ax, torch.cat([samples[None, :10], relatives]),
            "Samples and their nearest training images", row_names=["sample", "1st", "2nd", "3rd"])
fig.savefig(os.path.join(args.outdir, "neighbours.png"))


# %% Extra: between two digits, there and back?
# Add the noise of a level to an image and bring it back: with little noise it is the same digit,
# with much any. At a level in the middle, near 0.7, two images with their noises can be mixed, and
# the way back turns the mixture into a digit. (No label is told here.)
def slerp(a, b, w):
    """From a (w = 0) to b (w = 1) on an arc, as noise must keep its length; any shape.

    003 takes an angle for each row of pixels, and divides by 0 where a and b are parallel.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, w)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / angle.sin()


digits = x_test[[2, 3, 7, 18]]                           # of MNIST a 1, a 0, a 9 and a 3
noise = start_noise[:4]
middle = np.abs(np.log(np.array(levels) / 0.7)).argmin()
rows = []
for i in [0, 2]:
    mixed = []
    for w in np.linspace(0, 1, 8).tolist():
        image = torch.lerp(digits[i], digits[i + 1], w)
        mixed.append(image + levels[middle] * slerp(noise[i], noise[i + 1], w))
    between = generate("ddim", torch.stack(mixed), levels[middle:])
    rows.append(torch.cat([digits[i:i + 1], between, digits[i + 1:i + 2]]))

first_levels = np.linspace(args.T * 4 // 5, args.T // 5, 9).astype(int)
columns = [digits[:2]]
column_names = ["real"]
for t in first_levels:
    noisy = digits[:2] + levels[t] * noise[:2]           # 003 leaves this noise out
    columns.append(generate("ancestral", noisy, levels[t:]))
    column_names.append(level_name(levels[t]))
fig, axs = plt.subplots(2, 1, figsize=(10, 5.2))
draw_images(axs[0], torch.stack(rows), "Between two real digits (at the ends): mixed at "
            rf"$\sigma$ = {levels[middle]:.2g}, then down by DDIM")
draw_images(axs[1], torch.stack(columns, dim=1), "A real digit, noised to the level that is "
            "written below, and brought back: more noise, more freedom", column_names=column_names)
fig.savefig(os.path.join(args.outdir, "interpolation.png"))


# %% Extra: digits on demand?
# Three strengths of guidance from the same noise. Without guidance some samples are not the digit
# that was asked for, with a little nearly all are, and with much they all look alike. (Only with
# --labels.)
def likeness(images, label):
    """The mean correlation of two images of the same digit; images (n, 1, H, W), label (n,)."""
    total = 0
    for digit in range(10):
        same = images[label == digit].flatten(1)
        correlations = torch.corrcoef(same)              # of all pairs; 1 of an image with itself
        n = len(same)
        total += (correlations.sum().item() - n) / (n * (n - 1))
    return total / 10


if args.labels:
    label = torch.arange(200) % 10                       # twenty of each
    noise = torch.randn(len(label), *input_shape)
    x = mean + math.hypot(levels[0], sigma_data) * noise
    real_likeness = likeness(x_data[:5000].cpu(), train_labels[:5000])
    fig, axs = plt.subplots(1, 3, figsize=(10, 4.4))
    print(f"\n guidance    read as asked    alike (real digits: {real_likeness:.2f})")
    for ax, w in zip(axs, [0.0, args.guidance, 3.0]):
        torch.manual_seed(args.seed + 3)                 # the same noise on the way, too
        images = generate("ancestral", x, levels, label, w).clamp(-1, 1)
        share = (read_digits(images) == label).float().mean().item()
        alike = likeness(images, label)
        print(f"{w:9g} {share:16.1%} {alike:8.2f}")
        rows = images.unflatten(0, (20, 10)).transpose(0, 1)                # one for each digit
        draw_images(ax, rows[:, :8], f"w = {w:g}: {share:.0%} as asked, alike {alike:.2f}",
                    row_names=[str(digit) for digit in range(10)])
    fig.suptitle("Digits on demand: from the same noise with guidance w (alike: correlation of "
                 f"two images of a digit; real ones {real_likeness:.2f})", fontsize=11)
    fig.savefig(os.path.join(args.outdir, "digits_on_demand.png"))


# %% Result
print(f"\npictures in {args.outdir}; look at samples.png first")
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
