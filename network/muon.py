"""Muon (Jordan et al., 2024): an optimiser that orthogonalises its steps."""

import copy

import torch

MOMENTUM = 0.95
# Jordan's odd polynomial. Applied five times, it takes every singular value from 0.01 to 1
# to a value between 0.68 and 1.14.
QUINTIC = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
MIN_CHANNELS = 16  # Muon trains convolutions with as many input and output channels


def inverse_roots(grams):
    """Return matrices close to (x x^T)^(-1/2): times x, they bring its singular values to 1.

    Each of the five iterations would multiply x from the left by a polynomial in x x^T. We
    compute the product of these polynomials instead, from matrices of m x m.

    Args:
        grams: x x^T of some matrices x (m, n), m <= n: (N, m, m).
    """
    a, b, c = QUINTIC

    def polynomial(gram):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        return step

    # The trace is the squared norm of x, by which the iterations divide x.
    norm = grams.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[:, None, None] + 1e-12
    gram = grams / norm**2
    product = step = polynomial(gram)
    for _ in range(ITERATIONS - 1):
        gram = step @ gram @ step
        step = polynomial(gram)
        product = step @ product
    return product / norm


def orthogonalise(matrices, size=1, together=False):
    """Bring all singular values of each matrix (m, n), m <= n, close to size * sqrt(n).

    Then the root mean square of its entries is close to `size`.

    Args:
        matrices: a list; their shapes may differ.
        size: a number, or a tensor that holds one.
        together: whether all matrices share one batch, padded with zeros, which needs few
            CUDA kernels. Otherwise those of equal m share the iterations.
    """
    lengths = [x.shape[1] ** 0.5 for x in matrices]
    if together:
        sizes = [x.shape for x in matrices]
        batch = matrices[0].new_zeros(len(matrices), *map(max, zip(*sizes)))
        torch._foreach_copy_([x[:m, :n] for x, (m, n) in zip(batch, sizes)], matrices)
        roots = size * inverse_roots(batch @ batch.mT)
        torch._foreach_mul_([*roots], lengths)
        return [x[:m, :n] for x, (m, n) in zip(roots @ batch, sizes)]
    grams = {}
    for x in matrices:
        grams.setdefault(len(x), []).append(x @ x.mT)
    roots = {m: iter(size * inverse_roots(torch.stack(g))) for m, g in grams.items()}
    return [next(roots[len(x)]).mul_(n) @ x for x, n in zip(matrices, lengths)]


class Muon(torch.optim.Optimizer):
    """Orthogonalised steps with Nesterov's momentum.

    A step changes an entry by about 0.2 * lr, as Adam's does (Liu et al., 2025), so that a
    learning rate means the same for both. PyTorch's own Muon accepts no convolutions,
    computes in bfloat16, which many CPUs are slow at, and cannot run in a CUDA graph.

    Args:
        params: convolution weights (K, C, h, w), best with K <= C*h*w.
        lr: learning rate, a tensor on the device of the weights; captured steps read it.
        together: see orthogonalise.
    """

    def __init__(self, params, lr, together=False):
        super().__init__(params, {"lr": lr, "together": together})

    @torch.no_grad()
    def step(self):
        """Take one step; a weight without a gradient stays as it is."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            momenta = [self.state[weight]["momentum"] for weight in weights]
            gradients = [weight.grad for weight in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(momenta, gradients, 1 - MOMENTUM)
            # In this order of columns the matrices of channels_last weights are views.
            matrices = [x.permute(0, 2, 3, 1).flatten(1) for x in ahead]
            steps = orthogonalise(matrices, 0.2 * group["lr"], group["together"])
            steps = [
                x.unflatten(1, (*weight.shape[2:], -1)).permute(0, 3, 1, 2)
                for x, weight in zip(steps, weights)
            ]
            torch._foreach_sub_(weights, steps)


def make_optimizers(network, name, beta2, rate):
    """Return the optimisers of a network; all their tensors exist and change in place.

    Args:
        network: any module with weights to train; they get gradients of zeros.
        name, beta2: see recipes.Recipe.
        rate: the learning rate, a tensor on the device of the weights.
    """
    wide, rest = [], []
    for weight in network.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
            fits = weight.ndim == 4 and min(weight.shape[:2]) >= MIN_CHANNELS
            (wide if name == "muon" and fits else rest).append(weight)
    optimizers, cuda = [], rate.device.type == "cuda"
    if rest or not wide:  # PyTorch names the fault of a network without weights
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        betas = 0.9, beta2
        adam = kind(rest, lr=rate, fused=True, betas=betas, capturable=cuda)
        optimizers.append(adam)
    if wide:
        optimizers.append(Muon(wide, rate, together=cuda))
    before = copy.deepcopy(network.state_dict())
    for optimizer in optimizers:
        optimizer.step()  # creates the state tensors
    network.load_state_dict(before)
    for tensor in moments(optimizers):
        tensor.zero_()
    return optimizers


def moments(optimizers):
    """List the tensors that the optimisers keep from step to step."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return [value for state in states for value in state.values()]
