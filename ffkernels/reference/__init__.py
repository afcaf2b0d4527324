"""The definition of every op in plain PyTorch: any floating dtype, gradients by autograd, no argument checks."""
