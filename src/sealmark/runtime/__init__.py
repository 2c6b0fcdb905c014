"""Where models meet weight files: the architecture from a task or a module, the weights from safetensors."""
