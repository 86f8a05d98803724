"""Self2Self (Quan, Chen, Pang, Ji, CVPR 2020): learning one image from its observation."""

import copy
import math

import numpy as np
import torch

from network import fusion
from network.muon import Muon
from network.punet import Punet

# Pixels in one forward pass of the ensemble: they fill a GPU, and suit a CPU's cache.
PREDICTION_PIXELS = {"cuda": 2**20, "cpu": 1, "mps": 2**18}

ATTEMPT_SEED = 1_000_003  # between the seeds of a network's attempts

MUON_CHANNELS = 32  # fewest, in and out, of a convolution that Muon steps


class BernoulliMasks:
    """A seeded stream of Bernoulli masks on one device.

    Four entries come from one 64-bit draw, 16 bits each, so a rate is exact to 2**-16.
    On the CPU the draws are NumPy's: PyTorch's are serial there and three times slower,
    its bernoulli_ twenty times.

    Args:
        device: where the masks are made.
        entropy: non-negative integers that name the stream, such as (seed, step).
    """

    def __init__(self, device, *entropy):
        self.device = device
        if device.type == "cuda":
            self.generator = torch.Generator(device)
        self.seed(*entropy)

    def seed(self, *entropy):
        """Start the stream named by `entropy`."""
        sequence = np.random.SeedSequence(entropy)
        if self.device.type == "cuda":
            self.generator.manual_seed(
                int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
            )
        else:
            self.bits = np.random.SFC64(sequence)

    def state(self):
        """The stream's position, as a tensor."""
        if self.device.type == "cuda":
            return self.generator.get_state()
        return torch.from_numpy(self.bits.state["state"]["state"].view(np.int64).copy())

    def load_state(self, state):
        """Go on from a position that `state` gave."""
        if self.device.type == "cuda":
            self.generator.set_state(state.cpu())
        else:
            words = state.numpy().view(np.uint64)
            self.bits.state = self.bits.state | {"state": {"state": words}}

    def __call__(self, shape, drop_rate):
        """Draw a mask: 1 = kept, 0 = dropped with probability drop_rate.

        It is bool on CUDA, float elsewhere: a CPU multiplies by bool ten times slower.
        """
        count = math.prod(shape)
        words = (count + 3) // 4
        threshold = min(round(drop_rate * 2**16), 2**16 - 1) - 2**15
        if self.device.type == "cuda":
            bits = torch.empty(words, dtype=torch.int64, device=self.device)
            bits.random_(-(2**63), None, generator=self.generator)
            kept = bits.view(torch.int16)[:count] >= threshold
            # in channels_last order, as the maps that it will multiply
            n, c, h, w = shape
            return kept.view(n, h, w, c).permute(0, 3, 1, 2)
        bits = torch.from_numpy(self.bits.random_raw(words).view(np.int64))
        kept = bits.view(torch.int16)[:count] >= threshold
        return kept.view(shape).float().to(self.device)


def flip(x, flips):
    """Mirror samples of x (N, C, H, W) left-right and up-down; its own inverse.

    Args:
        flips: (N, 2, 1, 1); where the first is not 0, left-right, the second, up-down.
    """
    x = torch.where(flips[:, :1] > 0, x.flip(-1), x)
    return torch.where(flips[:, 1:] > 0, x.flip(-2), x)


def dropped_loss(degraded, y, judged):
    """Mean squared error over the judged entries (paper, equation 7): the dropped ones.

    Args:
        degraded: A(f), the prediction through the forward operator, (N, C, H, W).
        y: the observation, broadcast to the same shape.
        judged: 1 - m, of the same shape; where it is 0 an entry is not looked at.
    """
    return (judged * (degraded - y) ** 2).sum() / judged.count_nonzero().clamp(min=1)


class Self2Self:
    """The learner of one image at a time.

    Args:
        drop_rate: p of the Bernoulli mask and of the decoder's dropout, in [0, 1); 0:
            no sampling, every entry is judged.
        lr: learning rate.
        optimizer: "adam", "adamw", or "muon": Muon for the wide convolutions' weights,
            Adam for the rest.
        bs: Bernoulli samples of the observation per step.
        seed: of the weights, the masks and the dropout.
        device: where to compute.
        anneal: the number of steps over which the learning rate rises, for the first
            twentieth, and falls to 0 as a half cosine; None: it stays as it is.
        start: "default": PyTorch's initial weights; "mean": with the last bias such
            that the first predictions have the observation's mean, from which a large
            learning rate does not run into the sigmoid's flat ends.
        beta2: decay of Adam's mean of squared gradients; with 0.9, as the mean of the
            gradients has, no step is larger than the learning rate.
        average: the training's own predictions join the ensemble, those of step t of
            T with weight (t / T)**average; 0: they do not.
        ratio: the partial convolutions' numerator, "window" or "entries".
    """

    def __init__(
        self,
        *,
        drop_rate,
        lr,
        optimizer,
        bs,
        seed,
        device,
        anneal=None,
        average=0,
        ratio="window",
        start="default",
        beta2=0.999,
    ):
        self.drop_rate, self.bs, self.seed = drop_rate, bs, seed
        self.initial_lr, self.optimizer_name = lr, optimizer
        self.anneal, self.average = anneal, average
        self.ratio, self.initial_start, self.beta2 = ratio, start, beta2
        self.device = torch.device(device)
        self.y = None

    def begin(self, observation, forward_operator):
        """Start on an image with new weights.

        On CUDA an image of the same shape, under the same operator, uses the step that
        was captured for the last one.

        Args:
            observation: y, (C, H, W), float, on the [0, 1] scale, not clipped.
            forward_operator: A, of y = A(x) + n, from and to (N, C, H, W): the identity
                for denoising.
        """
        self.attempt, self.lr, self.start = 0, self.initial_lr, self.initial_start
        self._start(observation, forward_operator)

    def begin_again(self):
        """Start over: other weights, begun at the mean, and half the learning rate."""
        self.attempt, self.lr, self.start = self.attempt + 1, self.lr / 2, "mean"
        self._start(self.y[0].clone(), self.forward_operator)

    def _start(self, observation, forward_operator):
        y = torch.as_tensor(observation, dtype=torch.float32, device=self.device)[None]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed + ATTEMPT_SEED * self.attempt)
            # the same weights on every device
            network = Punet(y.shape[1], self.drop_rate, self.ratio)
        if self.start == "mean":
            mean = y.mean((0, 2, 3)).clamp(0.02, 0.98).cpu()
            with torch.no_grad():
                network.decoder[-1][-1].bias.copy_(torch.logit(mean))
        if (
            self.y is None
            or y.shape != self.y.shape
            or forward_operator is not self.forward_operator
        ):
            self._build(y, forward_operator, network)
        self.y.copy_(y)
        self.network.load_state_dict(network.state_dict())
        for value in self._averages():
            value.zero_()
        self.rate.fill_(self.lr)
        self.masks.seed(self.seed, 0)
        self.step = self.loss_steps = 0
        for watched in (self.loss_sum, self.recent, self.spread, self.slope):
            watched.zero_()
        self.sums.zero_()

    def _build(self, y, forward_operator, network):
        """Make what lasts as long as the shape: the tensors that a captured step uses."""
        on_cuda = self.device.type == "cuda"
        layout = torch.channels_last if on_cuda else torch.contiguous_format
        self.y, self.forward_operator = y.clone(), forward_operator
        self.network = copy.deepcopy(network).to(self.device, memory_format=layout)
        weights = list(self.network.parameters())
        wide, rest = [], []
        for weight in weights:
            fits = weight.ndim == 4 and min(weight.shape[:2]) >= MUON_CHANNELS
            (wide if self.optimizer_name == "muon" and fits else rest).append(weight)
        # A captured step reads the rate.
        self.rate = torch.tensor(self.lr, device=self.device)
        kind = torch.optim.AdamW if self.optimizer_name == "adamw" else torch.optim.Adam
        adam = kind(
            rest,
            lr=self.rate,
            fused=True,
            betas=(0.9, self.beta2),
            capturable=on_cuda,
        )
        self.optimizers = [adam, Muon(wide, self.rate)] if wide else [adam]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        for optimizer in self.optimizers:
            optimizer.step()  # makes the averages: from here on all is in place
        zeros = torch.zeros(4, device=self.device)
        self.loss_sum, self.recent, self.spread, self.slope = zeros
        # Of the training's predictions, weighted, and of their squares.
        self.sums = y.new_zeros(2, *y.shape[1:])
        self.fading = torch.tensor(0.0, device=self.device)  # a captured step reads it
        self.masks = BernoulliMasks(self.device)
        self.graph = None

    def _averages(self):
        """The optimisers' tensors."""
        states = [s for optimizer in self.optimizers for s in optimizer.state.values()]
        return [value for state in states for value in state.values()]

    def _tensors(self):
        """Every tensor that a training step changes."""
        watched = [self.loss_sum, self.recent, self.spread, self.slope]
        watched += [self.sums] if self.average else []
        return [*self.network.parameters(), *self._averages(), *watched]

    def state_dict(self):
        """All that the coming steps depend on, as tensors and numbers."""
        tensors = [tensor.detach().clone() for tensor in self._tensors()]
        return {
            "tensors": tensors,
            "masks": self.masks.state(),
            "step": self.step,
            "loss_steps": self.loss_steps,
            "attempt": self.attempt,
            "lr": self.lr,
        }

    def load_state_dict(self, state):
        """Go on from a state of the same image, settings and device type, in place."""
        with torch.no_grad():
            for tensor, saved in zip(self._tensors(), state["tensors"], strict=True):
                tensor.copy_(saved)
        self.masks.load_state(state["masks"])
        self.step, self.loss_steps = state["step"], state["loss_steps"]
        self.attempt, self.lr = state["attempt"], state["lr"]
        self.rate.fill_(self.lr)

    def train_step(self):
        """One optimiser step on `bs` Bernoulli samples of the observation."""
        if self.anneal:
            progress = min(1.0, self.step / self.anneal)
            factor = (1 + math.cos(math.pi * progress)) / 2
            factor *= min(1.0, 20 * (self.step + 1) / self.anneal)
            self.rate.fill_(self.lr * factor)
        if self.average:
            self.fading.fill_((self.step / (self.step + 1)) ** self.average)
        if self.device.type == "cuda":
            if self.graph is None:
                self._capture()
            self.graph.replay()
        else:
            self._train()
        self.step += 1
        self.loss_steps += 1

    def predict(self, num_prediction):
        """Average the dropout ensemble (paper, equation 8).

        With `average`, the training's own predictions so far belong to it too. The
        masks and the dropout of the others come from the seed and the step alone:
        looking does not change the training.

        Args:
            num_prediction: predictions of the weights as they are.

        Returns:
            The restoration, (C, H, W), float32 on the CPU, in (0, 1). Its predictions'
            variance, of the same shape, is then found as `variance`.
        """
        masks = BernoulliMasks(self.device, self.seed, self.step)
        size = max(1, PREDICTION_PIXELS[self.device.type] // self.y[0, 0].numel())
        total, squares = self.sums.clone()
        count = num_prediction
        if self.average:
            steps = np.arange(1, self.step + 1)
            weights = (steps / self.step) ** self.average
            count += self.bs * float(weights.sum())
        with torch.inference_mode():
            for start in range(0, num_prediction, size):
                n = min(size, num_prediction - start)
                prediction, _ = self._sample(masks, n)
                total += prediction.sum(0)
                squares += (prediction**2).sum(0)
        mean = total / count
        variance = (squares - count * mean**2) / max(1, count - 1)
        self.variance = variance.clamp(min=0).cpu().numpy()
        return mean.cpu().numpy()

    def fuse(self, ensemble, sigma):
        """Fuse the last `predict` with the observation: see fusion.fuse.

        Args:
            ensemble: what `predict` gave, (C, H, W).
            sigma: standard deviation of the observation's noise, 0-255 scale.

        Returns:
            The fused restoration and its predicted squared error, both (C, H, W).
        """
        known = self.variance, self.y[0], sigma, self.forward_operator
        return fusion.fuse(ensemble, *known)

    def mean_loss(self):
        """Mean loss of the steps since this was last asked for. Reads the device."""
        mean = self.loss_sum.item() / max(1, self.loss_steps)
        self.loss_sum.zero_()
        self.loss_steps = 0
        return mean

    def recent_loss(self):
        """Running mean of the loss over about 20 steps. Reads the device."""
        return self.recent.item() / (1 - 0.95 ** max(1, self.step))

    def alive(self):
        """Tell whether the network still learns; to be asked after 100 steps or more.

        Dead are a loss that is not finite; a prediction on the sigmoid's flat ends,
        where no gradient passes, that errs by more than the noise (which neighbouring
        entries' differences bound: a black picture's black prediction is alive); and
        one that swings by more than the observation and errs by twice its variance.
        """
        loss, slope, spread = self.recent_loss(), self.slope.item(), self.spread.item()
        noise = (self.y.diff(dim=-1) ** 2).mean().item() / 2
        variance = self.y.var((2, 3)).max().item()
        stuck = slope < 1e-5 and loss > 1.1 * noise
        wild = spread**2 > max(variance, 0.01) and loss > 2 * variance
        return math.isfinite(loss) and not stuck and not wild

    def _sample(self, masks, n):
        """Predict from n Bernoulli samples of y.

        Returns:
            Predictions f and masks m, both (n, C, H, W), in y's orientation.
        """
        y = self.y.expand(n, -1, -1, -1)
        flips = masks((n, 2, 1, 1), 0.5)
        mask = masks(y.shape, self.drop_rate).float()
        seen = flip(mask, flips)
        prediction = self.network(flip(y, flips) * seen, seen, masks)
        return flip(prediction, flips), mask

    def _train(self):
        prediction, mask = self._sample(self.masks, self.bs)
        judged = 1 - mask if self.drop_rate else torch.ones_like(mask)
        loss = dropped_loss(self.forward_operator(prediction), self.y, judged)
        self.network.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.loss_sum += loss.detach()
        self.recent.lerp_(loss.detach(), 0.05)
        prediction = prediction.detach()
        self.spread.copy_(prediction.std((2, 3)).max())
        self.slope.copy_((prediction * (1 - prediction)).mean())
        if self.average:
            self.sums *= self.fading
            self.sums += torch.stack([prediction.sum(0), (prediction**2).sum(0)])

    def _capture(self):
        """Capture the whole step in one CUDA graph; the warm-up leaves no trace."""
        before = self.state_dict()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._train()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.masks.generator)
        with torch.cuda.graph(self.graph, stream=stream):
            self._train()
        self.load_state_dict(before)
