"""Self2Self (Quan, Chen, Pang, Ji, CVPR 2020): learning one image from its observation."""

import copy
import itertools
import math
import time

import numpy as np
import torch

from network import fusion, missing
from network.cpu import keep_memory, tune_cpu
from network.masks import BernoulliMasks, flip
from network.muon import Muon
from network.punet import Punet, inverse_bent_sigmoid
from network.scale import find_scale
from network.windows import tiles, window_place

# Pixels in one forward pass of the ensemble: they fill a GPU, and suit a CPU's cache.
PREDICTION_PIXELS = {"cuda": 2**20, "cpu": 1, "mps": 2**18}
FULL_ENSEMBLE = 2**18  # pixels of a picture up to which an ensemble has its full size
MUON_CHANNELS = 32  # fewest, in and out, of a convolution that Muon steps

CHECK_EVERY = 100  # steps between two looks at whether the network lives
EARLY = 1000  # steps within which a network that died is started over
ATTEMPTS = 4  # times
ATTEMPT_SEED = 1_000_003  # between the seeds of a network's attempts


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
        drop_upsampled: whether dropout takes entries of upsampled maps, too: see Punet.
        iteration: training steps, which the schedule goes by.
        optimizer: "adam", "adamw", or "muon": Muon for the wide convolutions' weights,
            Adam for the rest.
        lr: learning rate.
        beta2: decay of Adam's mean of squared gradients; with 0.9, as the mean of the
            gradients has, no step is larger than the learning rate.
        schedule: "constant", or "linear": the learning rate rises for the first
            twentieth of the steps, and falls to 0 in a straight line.
        ratio: the partial convolutions' numerator, "window" or "entries".
        start: "default": PyTorch's initial weights; "mean": with the last bias such
            that the first predictions have the observation's mean, from which a large
            learning rate does not run into the sigmoid's flat ends.
        bend: where the network's sigmoid goes on as a straight line: see Punet.
        averaging_power: the training's own predictions join the ensemble, those of step
            t of T with weight (t / T)**averaging_power; None: they do not.
        bs: Bernoulli samples of the observation per step.
        seed: of the weights, the masks and the dropout.
        photons: n, by which steps see the observation as drawn anew, Poisson(n y) / n,
            against noise that neighbours share (TensorFlow's mode for real noise, where
            n is 25); None: as it is.
        precision: of feature maps and convolutions, "float32" or "bfloat16"; weights,
            loss, optimisers and ensemble are float32.
        window: side of the windows that steps are trained on, in pixels; a side of the
            picture that is no longer is taken whole. None: the picture is the window.
        device: where to compute.
    """

    def __init__(
        self,
        *,
        drop_rate,
        drop_upsampled,
        iteration,
        optimizer,
        lr,
        beta2,
        schedule,
        ratio,
        start,
        bend,
        averaging_power,
        bs,
        seed,
        photons,
        precision,
        window,
        device,
    ):
        self.drop_rate, self.bs, self.seed = drop_rate, bs, seed
        self.optimizer_name, self.beta2 = optimizer, beta2
        self.initial_lr, self.schedule, self.iteration = lr, schedule, iteration
        self.ratio, self.drop_upsampled = ratio, drop_upsampled
        self.initial_start, self.bend = start, bend
        self.averaging_power, self.window_side = averaging_power, window
        self.photons, self.device = photons, torch.device(device)
        self.dtype = getattr(torch, precision)
        self.y = None
        tune_cpu()

    def begin(
        self,
        observation,
        forward_operator,
        known=None,
        weights=None,
        scale=None,
        on_restart=None,
    ):
        """Start on an image with new weights, at step 0.

        All is learnt in units of the learner's own, in which the picture fills about
        [0, 1]. What `predict`, `variance` and `fuse` give is in the observation's.

        On CUDA an image of the same shape, under the same operator, uses the step that
        was captured for the last one.

        Args:
            observation: y, (C, H, W), float, in any units, not clipped.
            forward_operator: A, of y = A(x) + n, from and to (N, C, H, W): the identity
                for denoising. It keeps a constant. One that looks around takes the
                picture as periodic, and has `reach`, how many pixels it looks.
            known: 1 where an entry of y is known, else 0; (C, H, W) or (1, H, W). An
                unknown entry is neither seen nor judged. None: all are known.
            weights: to start from, another network's: see `network_weights`. None: new
                ones.
            scale: the map to the learner's units; None: found from the observation, see
                scale.find_scale.
            on_restart: told what happened, in a sentence, when the network has died and
                started over.
        """
        self.on_restart, self.initial_weights = on_restart, weights
        self.attempt, self.lr, self.start = 0, self.initial_lr, self.initial_start
        y = np.asarray(observation)
        known = np.ones((1, *y.shape[1:])) if known is None else np.asarray(known)
        blurred = getattr(forward_operator, "reach", 0) > 0
        self.scale = scale or find_scale(y, known, blurred)
        self.observation_dtype = y.dtype
        self._start(self.scale.to(y) * known, forward_operator, known)

    def restart(self):
        """Start over: other weights, begun at the mean, and half the learning rate."""
        self.attempt, self.lr, self.start = self.attempt + 1, self.lr / 2, "mean"
        known = self.known[0].clone()
        self._start(self.y[0].clone(), self.forward_operator, known)

    def _start(self, observation, forward_operator, known):
        here = {"dtype": torch.float32, "device": self.device}
        y = torch.as_tensor(observation, **here)[None]
        known = torch.as_tensor(known, **here)[None]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed + ATTEMPT_SEED * self.attempt)
            # the same weights on every device
            settings = self.drop_rate, self.ratio, self.drop_upsampled, self.bend
            network = Punet(y.shape[1], *settings)
        if self.initial_weights and not self.attempt:
            with torch.no_grad():
                for weight, given in zip(network.parameters(), self.initial_weights):
                    weight.copy_(given)
        elif self.start == "mean":
            sums, counts = ((known * x).sum((0, 2, 3)) for x in (y, torch.ones_like(y)))
            mean = (sums / counts.clamp(min=1)).clamp(0.02, 0.98).cpu()
            with torch.no_grad():
                bias = inverse_bent_sigmoid(mean, self.bend)
                network.decoder[-1][-1].bias.copy_(bias)
        if (
            self.y is None
            or y.shape != self.y.shape
            or known.shape != self.known.shape
            or forward_operator is not self.forward_operator
        ):
            self._build(y, known, forward_operator, network)
        self.y.copy_(y)
        self.known.copy_(known)
        self.network.load_state_dict(network.state_dict())
        for tensor in (*self._moments(), *self._watched(), *self._sums()):
            tensor.zero_()
        self.masks.seed(self.seed, 0)
        self.step = self.loss_steps = 0

    def _build(self, y, known, forward_operator, network):
        """Make what lasts as long as the shape: the tensors that a captured step uses."""
        self.y, self.forward_operator = y.clone(), forward_operator
        self.known, self.planes = known.clone(), fusion.opponent(y[0])
        self._build_window(y.shape[2:], getattr(forward_operator, "reach", 0))
        self.network = copy.deepcopy(network)
        self.network.to(self.device, memory_format=torch.channels_last)
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
            capturable=self.device.type == "cuda",
        )
        self.optimizers = [adam, Muon(wide, self.rate)] if wide else [adam]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        for optimizer in self.optimizers:
            optimizer.step()  # makes the averages: from here on all is in place
        zeros = torch.zeros(4, device=self.device)
        self.loss_sum, self.recent, self.prediction_std, self.sigmoid_slope = zeros
        # Of the training's predictions, weighted; of their squares; of the weights.
        self.sums, self.squares = y.new_zeros(2, *y.shape[1:])
        self.weights = y.new_zeros(y.shape[2:])
        self.weight = torch.tensor(0.0, device=self.device)  # a captured step reads it
        self.masks = BernoulliMasks(self.device)
        self.graph = None

    def _build_window(self, size, reach):
        """Set the window's size, and say which of its entries are judged.

        Under an operator that looks around those are not that lie within its reach of
        the window's edge; the window is larger by as much.
        """
        side = self.window_side and -(-(self.window_side + 2 * reach) // 32) * 32
        self.window = [min(n, side or n) for n in size]
        self.periodic = reach > 0
        self.corner = torch.zeros(2, dtype=torch.int64, device=self.device)
        inner = torch.ones(1, 1, *self.window, device=self.device)
        for axis, (n, whole) in enumerate(zip(self.window, size), 2):
            if reach and n < whole:
                for part in (slice(reach), slice(n - reach, None)):
                    inner.transpose(2, axis)[:, :, part] = 0
        self.inner = inner

    def _place(self):
        """Return the indices of the window's rows, (h, 1), and columns, (w,)."""
        rows, columns = (
            (first + torch.arange(side, device=self.device)) % whole
            for first, side, whole in zip(self.corner, self.window, self.y.shape[2:])
        )
        return rows[:, None], columns

    def network_weights(self):
        """Return copies of the network's weights, on the CPU."""
        return [w.detach().cpu().clone() for w in self.network.parameters()]

    def _moments(self):
        """The optimisers' tensors."""
        states = [s for optimizer in self.optimizers for s in optimizer.state.values()]
        return [value for state in states for value in state.values()]

    def _watched(self):
        """What tells how the training goes: the loss and the last prediction's spread."""
        return self.loss_sum, self.recent, self.prediction_std, self.sigmoid_slope

    def _sums(self):
        """What the training's predictions leave for the ensemble."""
        joined = self.averaging_power is not None
        return (self.sums, self.squares, self.weights) if joined else ()

    def _tensors(self):
        """Every tensor that a training step changes."""
        learnt = (*self.network.parameters(), *self._moments())
        return [*learnt, *self._watched(), *self._sums()]

    def state_dict(self):
        """All that the coming steps depend on: numbers, and tensors that steps change."""
        tensors = [tensor.detach() for tensor in self._tensors()]
        return {
            "weights": tensors[: len(list(self.network.parameters()))],
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

    def train_step(self):
        """One optimiser step on `bs` Bernoulli samples of the observation.

        Every 100 steps a network that has died is noticed. It starts over, so that
        `step` is 0, with other weights and half the learning rate.

        Raises:
            FloatingPointError: it died after step 1,000, or for the fifth time.
        """
        factor = 1.0
        if self.schedule == "linear":
            left = max(0, self.iteration - self.step) / self.iteration
            factor = left * min(1.0, 20 * (self.step + 1) / self.iteration)
        self.rate.fill_(self.lr * factor)
        if self.averaging_power is not None:
            self.weight.fill_(self._weight(self.step + 1))
        if self.window != [*self.y.shape[2:]]:
            place = self.y.shape[2:], self.window, self.periodic
            corner = window_place(*place, self.seed, self.attempt, self.step)
            for scalar, first in zip(self.corner, corner):
                scalar.fill_(first)  # a captured step reads it
        if self.device.type == "cuda":
            if self.graph is None:
                self._capture()
            self.graph.replay()
        else:
            self._train()
        self.step += 1
        self.loss_steps += 1
        if self.step % CHECK_EVERY == 0 and not self.alive():
            self._start_over_or_give_up()

    def _weight(self, step):
        """The weight of a training step's predictions in the ensemble."""
        return (step / self.iteration) ** self.averaging_power

    def _start_over_or_give_up(self):
        """Answer the network's death; early on other weights may live."""
        told = f"the network died (constant or non-finite output) by step {self.step}"
        if self.step > EARLY:
            raise FloatingPointError(told)
        if self.attempt == ATTEMPTS:
            raise FloatingPointError(
                f"{told}; a lower --lr than {self.initial_lr:g} cures it"
            )
        self.restart()
        if self.on_restart:
            self.on_restart(
                f"{told}: started over at the mean, learning rate {self.lr:g}"
            )

    @torch.inference_mode()
    def forecast(self, steps, tests, num_prediction, fuse):
        """Estimate the seconds that training steps and tests, fused or not, will take.

        From two predictions of a window: a step takes as long as some three of them,
        fusing as long as some twenty of the picture for every channel, of one with
        holes a hundred.
        """
        height, width = self.window
        y, known = (x[..., :height, :width] for x in (self.y, self.known))
        masks = BernoulliMasks(self.device, self.seed)
        for _ in range(2):  # the first may be slow
            started = time.perf_counter()
            self._sample(masks, y, known, 1)[0].sum().item()
            seconds = time.perf_counter() - started
        rows, columns = (
            sum(last - first for first, last, _ in tiles(size))
            for size in self.y.shape[2:]
        )
        tested = self.ensemble_size(num_prediction) * rows * columns
        tested += (100 if self._has_holes() else 20) * fuse * self.y.numel()
        return seconds * (3 * steps * self.bs + tests * tested / (height * width))

    def ensemble_size(self, num_prediction):
        """Return how many predictions are averaged: of a large picture fewer.

        Where steps are trained on windows, an ensemble takes no longer than one of a
        picture of 512x512 pixels, but has 10 predictions: the training's own are many.
        """
        height, width = self.y.shape[2:]
        if self.window == [height, width]:
            return num_prediction
        affordable = int(num_prediction * FULL_ENSEMBLE / (height * width))
        return min(num_prediction, max(10, affordable))

    @torch.inference_mode()
    def predict(self, num_prediction):
        """Average the dropout ensemble (paper, equation 8).

        With an `averaging_power` the training's own predictions so far belong to it too.
        The masks and the dropout of the others come from the seed and the step alone:
        looking does not change the training.

        Args:
            num_prediction: predictions of the weights as they are; see ensemble_size.

        Returns:
            The restoration, (C, H, W), in the observation's units and type. Its
            predictions' variance by plane, of the same shape, is then found as
            `variance`: see fusion.opponent.
        """
        num_prediction = self.ensemble_size(num_prediction)
        masks = BernoulliMasks(self.device, self.seed, self.step)
        size = max(1, PREDICTION_PIXELS[self.device.type] // self.y[0, 0].numel())
        total = squares = count = torch.zeros((), device=self.device)
        if self._sums() and self.step:
            weight = self._weight(self.step)
            total, squares, count = (x / weight for x in self._sums())
        for start in range(0, num_prediction, size):
            prediction = self._predict(masks, min(size, num_prediction - start))
            total = total + prediction.sum(0)
            squares = squares + self._planes(prediction).square_().sum(0)
        count = count + num_prediction
        mean = total / count
        # The sum of squared distances from the mean, over one less than all.
        squares -= count * self._planes(mean[None])[0].square_()
        squares /= (count - 1).clamp(min=1)
        self.variance = self._squared(squares.clamp_(min=0))
        return self._back(mean)

    def _back(self, values):
        """Bring a tensor to the observation's units and type."""
        return self.scale.back(values.cpu(), self.observation_dtype)

    def _squared(self, values):
        """Bring a tensor of variances or squared errors to the observation's units."""
        squared = np.float64(values.cpu()) * self.scale.slope() ** 2
        return squared.astype(self.observation_dtype)

    def _planes(self, images):
        """Take (N, C, H, W) to the planes that are fused: see fusion.opponent."""
        return torch.einsum("pc,nchw->nphw", self.planes, images)

    def _predict(self, masks, n):
        """Predict the whole picture, tile by tile, from n Bernoulli samples."""
        rows, columns = map(tiles, self.y.shape[2:])
        if len(rows) == len(columns) == 1:
            return self._sample(masks, self.y, self.known, n)[0]
        whole = self.y.new_zeros(n, *self.y.shape[1:])
        for (top, bottom, rise), (left, right, run) in itertools.product(rows, columns):
            y, known, part = (
                x[..., top:bottom, left:right] for x in (self.y, self.known, whole)
            )
            weight = (rise[:, None] * run).to(y)
            part += self._sample(masks, y, known, n)[0] * weight
        return whole

    def fuse(self, ensemble, sigma):
        """Fuse the last `predict` with the observation: see fusion.fuse, missing.fuse.

        Args:
            ensemble: what `predict` gave, (C, H, W).
            sigma: standard deviation of the observation's noise, where 255 stands for 1
                in its units.

        Returns:
            The fused restoration and its predicted squared error, both (C, H, W), in the
            observation's units.
        """
        ensemble = self.scale.to(ensemble)
        variance = self.variance / self.scale.slope() ** 2
        given = ensemble, variance, self.y[0], self.known[0]
        keep_memory(2**26, 2**28)  # of a large picture's tensors there are many
        try:
            if self._has_holes():
                fused, error = missing.fuse(*given)
            else:
                sigma = sigma / self.scale.slope()
                fused, error = fusion.fuse(*given, sigma, self.forward_operator)
        finally:
            tune_cpu()
        return self._back(fused), self._squared(error)

    def _has_holes(self):
        """Tell whether entries are missing, and not because a blur left a margin."""
        return not self.periodic and not self.known.all()

    def mean_loss(self):
        """Mean loss of the steps since this was last asked for. Reads the device."""
        mean = self.loss_sum.item() / max(1, self.loss_steps)
        self.loss_sum.zero_()
        self.loss_steps = 0
        return mean

    def alive(self):
        """Tell whether the network still learns. Reads the device.

        Dead are a loss that is not finite; and, from step 100 on, a prediction on the
        sigmoid's flat ends, where no gradient passes, that errs by more than the noise
        (which known neighbours' differences bound: a black picture's black prediction
        is alive); and one that swings by more than the observation and errs
        by twice its variance.
        """
        # The loss's running mean over about 20 steps.
        loss = self.recent.item() / (1 - 0.95 ** max(1, self.step))
        if not math.isfinite(loss) or self.step < CHECK_EVERY:
            return math.isfinite(loss)
        known = self.known.expand_as(self.y)
        pairs = known[..., 1:] * known[..., :-1]
        noise = (pairs * self.y.diff(dim=-1) ** 2).sum() / pairs.sum().clamp(min=1) / 2
        count = known.sum((2, 3), keepdim=True).clamp(min=1)
        mean = (known * self.y).sum((2, 3), keepdim=True) / count
        variance = (known * (self.y - mean) ** 2 / count).sum((2, 3)).max().item()
        flat = self.sigmoid_slope.item() < 1e-5
        swing = self.prediction_std.item() ** 2
        stuck = flat and loss > 1.1 * noise.item()
        wild = swing > max(variance, 0.01) and loss > 2 * variance
        return not stuck and not wild

    def _sample(self, masks, y, known, n):
        """Predict from n Bernoulli samples of y, or of a part of it.

        Args:
            masks: where masks and dropout come from.
            y, known: (1, C, h, w); known may have one channel for all.

        Returns:
            Predictions f and masks m, both (n, C, h, w), in y's orientation.
        """
        y = y.expand(n, -1, -1, -1)
        flips = masks((n, 2, 1, 1), 0.5)
        mask = masks(y.shape, self.drop_rate).float() * known
        seen = flip(mask, flips)
        x = (flip(y, flips) * seen).to(self.dtype)
        prediction = self.network(x, seen, masks)
        return flip(prediction, flips), mask

    def _train(self):
        rows, columns = self._place()
        y, known = (x[:, :, rows, columns] for x in (self.y, self.known))
        seen = y.expand(self.bs, -1, -1, -1)
        if self.photons:
            # Below 0 the counts are of what lies below.
            counts = self.masks.counts(self.photons * seen.abs())
            seen = seen.sign() * counts / self.photons
        prediction, mask = self._sample(self.masks, seen, known, self.bs)
        judged = (known - mask if self.drop_rate else known) * self.inner
        judged = judged.expand_as(prediction)
        loss = dropped_loss(self.forward_operator(prediction), y, judged)
        self.network.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.loss_sum += loss.detach()
        self.recent.lerp_(loss.detach(), 0.05)
        prediction = prediction.detach()
        self.prediction_std.copy_(prediction.std((2, 3)).max())
        inner = prediction.clamp(self.bend, 1 - self.bend)
        self.sigmoid_slope.copy_((inner * (1 - inner)).mean())
        if self.averaging_power is not None:
            self.sums[:, rows, columns] += self.weight * prediction.sum(0)
            squares = (self._planes(prediction) ** 2).sum(0)
            self.squares[:, rows, columns] += self.weight * squares
            self.weights[rows, columns] += self.weight * self.bs

    def _capture(self):
        """Capture the whole step in one CUDA graph; the warm-up leaves no trace."""
        before = copy.deepcopy(self.state_dict())
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._train()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.masks.generator)
        with torch.cuda.graph(graph, stream=stream):
            self._train()
        self.load_state_dict(before)
        self.graph = graph  # now that there is one to replay
