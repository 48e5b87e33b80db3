"""Scripts that train models with PyTorch; nothing else of this package imports them."""
