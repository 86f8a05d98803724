"""Self2Self (Quan, Chen, Pang, Ji, CVPR 2020): learning one image from its observation."""

import copy

import torch

from network import health, restoring
from network.blur import check_operator
from network.capture import capture
from network.checks import check_observation
from network.cpu import tune_cpu
from network.ensemble import Ensemble
from network.fast_punet import FastPunet
from network.masks import BernoulliMasks, flip
from network.muon import make_optimizers, moments
from network.scale import UNIT
from network.windows import Window

ATTEMPT_SEED = 1_000_003  # difference of the seeds of two attempts
# The part of a learner's state that is not tensors.
COUNTED = ("step", "loss_steps", "attempt", "lr", "notes", "losses")


def dropped_loss(degraded, y, judged):
    """Mean squared error over the judged entries (paper, equation 7): the dropped ones.

    Args:
        degraded: A(f), the prediction through the forward operator, (N, C, H, W).
        y: the observation, broadcast to the same shape.
        judged: 1 - m, of the same shape: 1 where the loss counts an entry, else 0.
    """
    return (judged * (degraded - y) ** 2).sum() / judged.count_nonzero().clamp(min=1)


class Self2Self:
    """The learner of one image.

    It learns in its own units, to which `recipe.scale` maps y. `predict` and `fuse` return
    y's units.

    Args:
        y: the observation, (C, H, W), floats in any units, not clipped, with fewer than 32
            channels and sides of 32 pixels or more.
        forward_operator: A of y = A(x) + n, from and to (N, C, H, W): see network/blur.py.
            The identity for denoising. It maps a constant image to itself. The constructor
            applies it to y once, to check it.
        known: 1 where an entry of y is known, else 0; (C, H, W) or (1, H, W). The network
            never gets an unknown entry, and the loss does not count it. None: all are
            known.
        recipe: how to train, a recipes.Recipe: see recipes.adapt.
        seed: seed of the weights, the masks and the dropout.
        device: where to compute.
        clipped: True where y is at its sensor's white, (C, H, W), bool: there A(x) is y or
            more. None: nowhere.
        network: function that takes C and returns a new module, called as
            module(x, mask, draw): see Punet.forward. Every restart calls the function
            again. The recipe's settings of layers and initial weights do not apply. A
            method `start_at` and an attribute `bend`, as Punet has them, are used if they
            exist. None: the recipe's Punet.
        loss: what a step minimises: a function like dropped_loss.
        capture: whether a step on CUDA runs as one graph. Without it every line of a step
            runs in Python, so prints and breakpoints work.

    Raises:
        ValueError: y, known or the operator is not as described; the message says why.

    `step` counts the training steps done. `notes` has a sentence for each time that the
    network died and started over. `losses` has the loss of every LOSS_EVERY-th step; the
    last ones may still be on the device: see `read_losses`.
    """

    LOSS_EVERY = 10

    def __init__(
        self,
        y,
        forward_operator,
        known,
        recipe,
        seed=0,
        device="cpu",
        clipped=None,
        network=None,
        loss=dropped_loss,
        capture=True,
    ):
        tune_cpu()
        y, known = check_observation(y, known)
        self.recipe, self.seed, self.device = recipe, seed, torch.device(device)
        self.forward_operator = forward_operator
        self.observed_dtype = y.dtype
        kind = {"dtype": torch.float32, "device": self.device}
        self.y = torch.as_tensor(recipe.scale.to(y) * known, **kind)[None]
        self.known = torch.as_tensor(known, **kind)[None]
        self.clipped = None
        if clipped is not None:
            self.clipped = torch.as_tensor(clipped, device=self.device)[None]
        scale = recipe.scale if recipe.absolute else UNIT
        # Photons are counted from `black` on; 1 in the learner's units is `unit` in the photons'.
        self.black, self.unit = -scale.offset / scale.span, scale.span
        check_operator(forward_operator, self.y)
        self.make_network, self.loss = network or self._punet, loss
        self.captures = capture and self.device.type == "cuda"
        self.masks = BernoulliMasks(self.device, seed, 0)
        reach = getattr(forward_operator, "reach", 0)
        self.window = Window(y.shape[1:], recipe.window, reach, self.device)
        self.network = self._new_network(0, recipe.start).to(
            self.device, memory_format=torch.channels_last
        )
        bend = getattr(self.network, "bend", None)
        self.health = health.Health(self.y, self.known, bend)
        # A captured step reads its learning rate from this tensor.
        self.rate = torch.tensor(recipe.lr, device=self.device)
        kind = recipe.optimizer, recipe.beta2
        self.optimizers = make_optimizers(self.network, *kind, self.rate)
        self.ensemble = None  # the sums of the predictions that training makes
        if recipe.averaging_power is not None:
            self.ensemble = Ensemble(self.y[0])
        # A captured step reads `prediction_weight`, and writes the two losses.
        values = torch.zeros(3, device=self.device)
        self.prediction_weight, self.loss_sum, self.last_loss = values
        self.recent = self.last_loss.new_zeros(health.CHECK_EVERY // self.LOSS_EVERY)
        self.step = self.loss_steps = self.attempt = 0
        self.lr, self.notes, self.losses, self.graph = recipe.lr, [], [], None

    def _punet(self, channels):
        """Return the network that the recipe asks for."""
        recipe = self.recipe
        network = FastPunet(
            channels,
            recipe.drop_rate,
            recipe.ratio,
            recipe.drop_upsampled,
            recipe.bend,
            recipe.width,
        )
        if recipe.initialisation == "tensorflow":
            network.initialise_like_tensorflow()
        return network

    def _new_network(self, attempt, start):
        """Return a new network, initialised on the CPU so that all devices start alike."""
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(self.seed + ATTEMPT_SEED * attempt)
            network = self.make_network(self.y.shape[1])
            if start == "mean" and hasattr(network, "start_at"):
                sums = (self.known * self.y).sum((0, 2, 3))
                counts = self.known.expand_as(self.y).sum((0, 2, 3)).clamp(min=1)
                network.start_at((sums / counts).cpu())
        return network

    def train_step(self):
        """Take one optimiser step on `bs` Bernoulli samples of the observation.

        Every 100 steps, and after the last one, we check whether the network has died. If
        so, it starts over: see `restart`.

        Raises:
            FloatingPointError: it died after step 1,000, or for the fifth time.
        """
        recipe, factor = self.recipe, 1.0
        if recipe.schedule == "linear":
            left = max(0, recipe.iteration - self.step) / recipe.iteration
            factor = left * min(1.0, 20 * (self.step + 1) / recipe.iteration)
        self.rate.fill_(self.lr * factor)
        if self.ensemble:
            self.prediction_weight.fill_(self.weight_of(self.step + 1))
        self.window.move(self.seed, self.attempt, self.step)
        if self.captures:
            self.graph = self.graph or capture(self._train, self)
            self.graph.replay()
        else:
            self._train()
        self.step += 1
        self.loss_steps += 1
        if self.step % self.LOSS_EVERY == 0:
            self.recent[self.step // self.LOSS_EVERY - len(self.losses) - 1] = (
                self.last_loss
            )
        if self.step % health.CHECK_EVERY == 0 or self.step == recipe.iteration:
            self.read_losses()
            if not self.alive():
                self._start_over_or_give_up()

    def _train(self):
        recipe, window = self.recipe, self.window.place()
        y, known = (x[:, :, *window] for x in (self.y, self.known))
        counts = self.draw_photons(y.expand(recipe.bs, -1, -1, -1))
        prediction, mask = self.sample(self.masks, counts, known, recipe.bs)
        judged = (known - mask if recipe.drop_rate else known) * self.window.inner
        judged = judged.expand_as(prediction)
        degraded = self.forward_operator(prediction)
        if self.clipped is not None:
            clipped = self.clipped[:, :, *window]
            y = y.where(~clipped, torch.maximum(y, degraded.detach()))
        loss = self.loss(degraded, y, judged)
        self.network.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        loss, prediction = loss.detach(), prediction.detach()
        self.loss_sum += loss
        self.last_loss.copy_(loss)
        self.health.watch(loss, prediction)
        if self.ensemble:
            self.ensemble.add(prediction, self.prediction_weight, window)

    def sample(self, masks, y, known, n):
        """Predict from n Bernoulli samples of y, or of a part of it.

        Args:
            masks: the BernoulliMasks that draw flips, masks and dropout.
            y, known: (1, C, h, w), or n of them; known may have one channel for all.

        Returns:
            Predictions f and masks m, both (n, C, h, w), in y's orientation.
        """
        y = y.expand(n, -1, -1, -1)
        flips = masks((n, 2, 1, 1), 0.5)
        mask = masks(y.shape, self.recipe.drop_rate).float() * known
        flipped_mask = flip(mask, flips)
        x = flip(y, flips) * flipped_mask
        if isinstance(self.network, FastPunet):
            x = x.to(getattr(torch, self.recipe.precision))
        prediction = self.network(x, flipped_mask, masks)
        return flip(prediction, flips), mask

    def draw_photons(self, y):
        """Replace an observation (N, C, H, W) by random photon counts: Poisson(n y) / n.

        The counts break up noise that neighbours share, as in TensorFlow's mode for real
        noise. For y below black, the distance to black is counted. If the recipe has no
        `photons`, y is returned unchanged.
        """
        if not self.recipe.photons:
            return y
        black, n = self.black, self.recipe.photons * self.unit
        counts = self.masks.poisson(n * (y - black).abs())
        return black + (y - black).sign() * counts / n

    def weight_of(self, step):
        """Return the weight that the predictions of a step have in the ensemble."""
        return (step / self.recipe.iteration) ** self.recipe.averaging_power

    def read_losses(self):
        """Return the losses of steps LOSS_EVERY, 2 LOSS_EVERY, ... Waits for the device."""
        new = self.step // self.LOSS_EVERY - len(self.losses)
        self.losses += self.recent[:new].tolist() if new else []
        return self.losses

    def mean_loss(self):
        """Return the mean loss of the steps since `reset_mean_loss`. Waits for the device."""
        return self.loss_sum.item() / max(1, self.loss_steps)

    def reset_mean_loss(self):
        """Forget the losses so far: `mean_loss` covers the steps from now on."""
        self.loss_sum.zero_()
        self.loss_steps = 0

    def alive(self):
        """Tell whether the network learns: see health.Health. Waits for the device."""
        return self.health.lives(self.step)

    def _start_over_or_give_up(self):
        """Restart a dead network, or raise FloatingPointError: see train_step."""
        death = f"the network died (constant or non-finite output) by step {self.step}"
        if self.step > health.EARLY or self.attempt == health.ATTEMPTS:
            lr = self.recipe.lr
            raise FloatingPointError(f"{death}; a lower --lr than {lr:g} cures it")
        self.restart()
        self.notes.append(
            f"{death}: started over at the mean, learning rate {self.lr:g}"
        )

    def restart(self):
        """Start over at step 0, with new weights and half the learning rate.

        The network begins at the observation's mean.
        """
        self.attempt, self.lr = self.attempt + 1, self.lr / 2
        self.step = self.loss_steps = 0
        self.losses.clear()
        for tensor in self._tensors():
            tensor.detach().zero_()
        self.network.load_state_dict(
            self._new_network(self.attempt, "mean").state_dict()
        )
        self.masks.seed(self.seed, 0)

    def ensemble_size(self, num_prediction):
        """Return how many predictions are averaged: see restoring.ensemble_size."""
        return restoring.ensemble_size(self, num_prediction)

    def predict(self, num_prediction, advance=lambda n: None):
        """Average the dropout ensemble (paper, equation 8).

        With an `averaging_power` the predictions that training has made so far join it.
        The masks and dropout of the new ones depend on the seed and the step alone, so
        predicting does not change the training.

        Args:
            num_prediction: number of predictions by the present weights; see
                ensemble_size.
            advance: function that gets the number of predictions made since its last call.

        Returns:
            The Restoration, in y's units and type.
        """
        return restoring.predict(self, num_prediction, advance)

    def fuse(self, restored):
        """Fuse an ensemble with the observation: see fusing.fuse.

        Args:
            restored: the Restoration that `predict` gave.

        Returns:
            The restoration, (C, H, W), in y's units, and its predicted squared error, in
            their squares. If the recipe does not fuse: the ensemble's image, and None.
        """
        return restoring.fuse_restoration(self, restored)

    def _tensors(self):
        """List every tensor that a training step changes."""
        sums = self.ensemble.tensors() if self.ensemble else ()
        learnt = *self.network.state_dict().values(), *moments(self.optimizers)
        return [*learnt, self.last_loss, self.loss_sum, *self.health.tensors(), *sums]

    def state_dict(self):
        """Return all that the coming steps depend on: numbers, and tensors that steps change."""
        self.read_losses()
        tensors = [tensor.detach() for tensor in self._tensors()]
        state = {"tensors": tensors, "masks": self.masks.state()}
        return state | {name: getattr(self, name) for name in COUNTED}

    def load_state_dict(self, state):
        """Continue from a state_dict of the same image, settings and device type."""
        with torch.no_grad():
            for tensor, saved in zip(self._tensors(), state["tensors"], strict=True):
                tensor.copy_(saved)
        self.masks.load_state(state["masks"])
        for name in COUNTED:
            setattr(self, name, copy.copy(state[name]))
