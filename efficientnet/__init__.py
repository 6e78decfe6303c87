"""EfficientNets trained at scale: the model, its numerics, and the grid of devices it runs on."""
