"""A training step as one CUDA graph: one launch in place of hundreds."""

import copy
import functools

import torch


@functools.cache
def capture_stream(device):
    """Return the one stream for all captures on a device: every stream keeps workspace."""
    return torch.cuda.Stream(device)


def capture(step, learner):
    """Capture a learner's step in one CUDA graph.

    Args:
        step: function without arguments that takes a step; it may copy nothing from the
            host. It is called three times to warm up.
        learner: a self2self.Self2Self; it gets back the state that it had.

    Returns:
        The torch.cuda.CUDAGraph; its method `replay` takes a step.
    """
    before = copy.deepcopy(learner.state_dict())
    stream = capture_stream(learner.device)
    stream.wait_stream(torch.cuda.current_stream(learner.device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(learner.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(learner.masks.generator)
    with torch.cuda.graph(graph, stream=stream):
        step()
    learner.load_state_dict(before)
    return graph
