"""The graph that Dynamo hands to a backend."""

import torch


def dynamo_graph(function, *inputs, **given):
    """Return the first Dynamo graph of a function; `given`: arguments of `torch.compile`."""
    graphs = []

    def keep(gm, _):
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, **given)(*inputs)
    return graphs[0]
