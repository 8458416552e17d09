"""Update rules, kernels, loss scale and clipping."""
